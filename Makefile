# Two commands matter: `make train` and `make test`. Everything else follows from requirements.txt.
PYTHON ?= python3
VENV := .venv
DEMO := .venv-demo
DOCS := .venv-docs
STREAMING := .venv-streaming
RUN := $(VENV)/bin/python
ARGS ?=

# Compiled once, not in each of the processes that tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test quick test-slow test-gpu faults bench bench-peers bench-gpu demo lint docs
.DELETE_ON_ERROR:

train: $(VENV)/.installed data/faces/test.txt
	$(RUN) train.py $(ARGS)

# One more than there are cores, as many tests wait for processes and time-outs.
WORKERS := $(shell echo $$(( $$(nproc) < 8 ? $$(nproc) + 1 : 8 )))
test: $(VENV)/.installed
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# While working, in under a minute: rules, formats, plans, model, one whole run.
QUICK := architecture annotations checkpoint cli config continuation crf files finite images index kernels logger metrics \
  model sampling train
quick: $(VENV)/.installed
	$(RUN) -m pytest -q -n $(WORKERS) --dist worksteal -k 'not unreachable and not options_run and not differences and not randaugment' \
	  $(QUICK:%=tests/test_%.py) $(ARGS)

test-slow: $(VENV)/.installed
	$(RUN) -m pytest -m slow $(ARGS)

test-gpu: $(VENV)/.installed
	REQUIRE_GPU=1 $(RUN) -m pytest -m gpu $(ARGS)

HOURS ?= 1
# Breaks runs in every way that machines do, for so long; root can fill disks too.
faults: $(VENV)/.installed
	$(RUN) -m tests.faults --hours $(HOURS) $(ARGS)

bench: $(VENV)/.installed-bench data/faces/test.txt
	$(RUN) benchmarks/loader_speed.py $(ARGS)

# Ours beside the best that others have, half an hour on a quiet machine.
bench-peers: $(VENV)/.installed-bench $(STREAMING)/.installed data/faces/test.txt
	$(RUN) benchmarks/loader_speed.py --peers $(ARGS)

# All that README calls "not yet measured on a GPU", in one go: the tests that need one, then all figures, in 10 minutes.
bench-gpu: $(VENV)/.installed-bench
	PYTHON=$(RUN) benchmarks/gpu.sh

# A page to try a model on: ARGS="--checkpoint logs/NAME", or the newest run, or one that is trained for it.
demo: $(DEMO)/.installed
	$(DEMO)/bin/python scripts/demo.py $(ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright --pythonpath $(RUN)

# These pages and the API's, as a site in build/docs/. A warning, such as a link that leads nowhere, is an error.
docs: $(DOCS)/.installed
	$(DOCS)/bin/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "build/docs/index.html"

# The stamp is written last: an installation that was cut off is done again.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ..." if not (3, 11) <= v <= (3, 13) else 0)'
	@$(PYTHON) -c 'import shutil, sys; u = shutil.disk_usage("."); free = u.free / 1e9; sys.exit(f"installing takes 13 GB of disk for a while, {free:.1f} GB are free here: make room" if u.total and free < 13 else 0)'
	@echo "installing requirements.txt into $(VENV)/ (9 GB, a few minutes, once); pip names each package as it comes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check -r requirements.txt
	@touch $@

# The peers come on top and may not move what requirements.txt pins.
$(VENV)/.installed-bench: requirements-bench.txt $(VENV)/.installed
	@echo "installing requirements-bench.txt into $(VENV)/"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c requirements.txt -r requirements-bench.txt
	@touch $@

# Its pins clash with ours; what it does not bring is found in the first one.
$(STREAMING)/.installed: requirements-streaming.txt $(VENV)/.installed
	@echo "installing requirements-streaming.txt into $(STREAMING)/ (60 MB to download, 250 MB of disk, once)"
	$(RUN) -m venv $(STREAMING)
	@$(RUN) $(PURELIB) > "$$($(STREAMING)/bin/python $(PURELIB))/dfer.pth"
	$(STREAMING)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-streaming.txt
	@touch $@

# Gradio wants an older Pillow than requirements.txt pins: what it needs lies in a venv of its own, which finds the rest in
# the first one, and that stays as it is. No other pin may move.
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(DEMO)/.installed: requirements-demo.txt $(VENV)/.installed
	@echo "installing requirements-demo.txt into $(DEMO)/ (60 MB to download, 240 MB of disk, once)"
	$(RUN) -m venv $(DEMO)
	@$(RUN) $(PURELIB) > "$$($(DEMO)/bin/python $(PURELIB))/dfer.pth"
	@grep -v '^pillow==' requirements.txt > $(DEMO)/constraints.txt
	$(DEMO)/bin/pip install --quiet --disable-pip-version-check -c $(DEMO)/constraints.txt -r requirements-demo.txt
	@touch $@

# Sphinx lies apart: a trainer needs none of it. It imports the project, whose libraries it finds in the first one.
$(DOCS)/.installed: requirements-docs.txt $(VENV)/.installed
	@echo "installing requirements-docs.txt into $(DOCS)/ (120 MB of disk, once)"
	$(RUN) -m venv $(DOCS)
	@$(RUN) $(PURELIB) > "$$($(DOCS)/bin/python $(PURELIB))/dfer.pth"
	$(DOCS)/bin/pip install --disable-pip-version-check -r requirements-docs.txt
	@touch $@

# The test list is the last thing that make_faces.py writes.
data/faces/test.txt: scripts/make_faces.py | $(VENV)/.installed
	$(RUN) scripts/make_faces.py --out data/faces
	@touch $@
