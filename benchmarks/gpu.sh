#!/bin/bash
# All that a machine with a GPU is asked, in one go and with nobody watching: the tests that need a GPU, then
# benchmarks/gpu.py. Needs no argument. Each part has a timeout; what they say and measure is in one folder.
#   OUT=data/gpu-results   the folder         PYTHON=python3     with the libraries, or PYTHONPATH=/tmp/site
#   BUDGET=540             seconds in all     TEST_SECONDS=60    of one file of tests
#   TESTS=150              seconds after which no further file of tests begins
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-data/gpu-results} PYTHON=${PYTHON:-python3} BUDGET=${BUDGET:-540} TEST_SECONDS=${TEST_SECONDS:-60}
TESTS=${TESTS:-150}
[ -z "${PYTHONPATH:-}" ] && [ -d /tmp/site ] && export PYTHONPATH=/tmp/site
export REQUIRE_GPU=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ulimit -c 0 # a core file of a process on a card takes many GB and a minute
mkdir -p "$OUT/tests"
timeout -k 20 20 nvidia-smi > "$OUT/nvidia-smi.txt" 2>&1
timeout -k 20 60 "$PYTHON" benchmarks/gpu.py --list > "$OUT/cases.txt" 2>&1
about=$(head -n 1 "$OUT/cases.txt") # card, versions, commit
# The clips are drawn on the cores meanwhile; tests are not timed.
timeout -k 20 150 "$PYTHON" benchmarks/gpu.py --parts data --out "$OUT/data" > "$OUT/data.txt" 2>&1 &
failed=0
for file in $(grep -l "mark.gpu" tests/test_*.py); do # one by one: what kills one file's process leaves the others
    if [ "$SECONDS" -ge "$TESTS" ]; then
        echo "$file: left out: $SECONDS s are gone" | tee -a "$OUT/tests.txt"
        failed=1
        continue
    fi
    log=$OUT/tests/$(basename "$file" .py).txt
    echo "$about" > "$log"
    timeout -k 20 "$TEST_SECONDS" "$PYTHON" -m pytest -m gpu -o filterwarnings=default -p no:cacheprovider -q \
        --durations=5 "$file" >> "$log" 2>&1
    code=$?
    [ $code -eq 0 ] || failed=1
    echo "$file: exit code $code; $(tail -n 1 "$log")" | tee -a "$OUT/tests.txt"
done
wait
left=$((BUDGET - SECONDS))
[ $left -ge 60 ] || left=60
timeout -k 20 $((left + 15)) "$PYTHON" benchmarks/gpu.py --peers --budget "$left" --out "$OUT" 2>&1 | tee "$OUT/gpu.txt"
code=${PIPESTATUS[0]}
[ "$code" -eq 0 ] && exit $failed
exit "$code"
