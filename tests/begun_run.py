"""Begin a run with another version of the project, and keep it: `python tests/begun_run.py CHECKOUT NAME [FLAGS]`.

Writes tests/data/NAME.tar.xz: the folder of a run that was killed in its second epoch, and in final.json how it ends if
that version alone takes it to its end. tests/test_continuation.py continues it with the version at hand.
"""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.conftest import make_clips  # noqa: E402

# A CRF, batch statistics, dropout, AdamW and accumulation at the smallest size; 2 epochs of 5 steps.
WORDS = [
    "debug", "--data.train-list", "train.txt", "--data.val-list", "test.txt", "--data.size", "32",
    "--data.num-segments", "2", "--data.batch-size", "2", "--model.dim", "8", "--model.backbone", "test_efficientnet",
    "--optim.epochs", "2", "--optim.steps-per-epoch", "5", "--optim.accumulate", "2", "--optim.warmup-epochs", "1",
    "--optim.lr", "2e-3", "--run.log-every", "1", "--run.device", "cpu", "--run.amp", "off", "--run.save-minutes", "0",
]  # fmt: skip
KILLED_AFTER = 7  # steps


def start(checkout: Path, folder: Path, name: str, *words: str, code: str | None = None) -> subprocess.Popen:
    """Start train.py of a checkout, or code that starts it, in a folder that holds the clips."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    program = [str(checkout / "train.py")] if code is None else ["-c", code]
    command = [sys.executable, *program, *words, "--run.name", name]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def processor() -> str:
    """Return the model of this machine's processor: others of the same instructions round otherwise."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def how_it_ended(run: Path) -> dict:
    """Return the losses of a finished run's steps, its last evaluation, and its weights: a hash, and sums of each."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (last,) = (run / "checkpoints").glob("step-00000010-*.pt")
    weights = torch.load(last, map_location="cpu", weights_only=True)["model"]
    digest = hashlib.sha256(b"".join(weights[name].contiguous().numpy().tobytes() for name in sorted(weights)))
    return {
        "machine": [str(torch.__version__), torch.backends.cpu.get_cpu_capability(), processor()],
        "losses": {row["step"]: row["train/loss"] for row in rows if "train/loss" in row},
        "evaluation": [{k: row[k] for k in ("val/WAR", "val/UAR", "val/loss")} for row in rows if "val/WAR" in row],
        "sha256": digest.hexdigest(),
        "weights": {k: [float(w.double().sum()), float(w.double().abs().sum())] for k, w in sorted(weights.items())},
    }


def main(checkout: Path, name: str, flags: list[str]) -> None:
    """Make the fixture."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_clips(folder)
        whole = start(checkout, folder, "whole", *WORDS, *flags)
        assert whole.wait() == 0, whole.stderr.read()
        begun = start(checkout, folder, "begun", *WORDS, *flags)
        while not list((folder / "logs" / "begun" / "checkpoints").glob(f"step-{KILLED_AFTER:08d}.json")):
            assert begun.poll() is None, begun.stderr.read()
            time.sleep(0.001)
        begun.send_signal(signal.SIGKILL)
        begun.wait()
        run = folder / "logs" / "begun"
        steps = sorted(path.stem for path in (run / "checkpoints").glob("step-*.json"))
        for path in (run / "checkpoints").iterdir():
            if not path.name.startswith(steps[-1]):
                path.unlink()
        for path in (*run.glob("best_*"), run / "lock", run / "wandb"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        target = ROOT / "tests" / "data" / f"{name}.tar.xz"
        with tarfile.open(target, "w:xz") as tar:
            tar.add(run, "begun")
            final = json.dumps(how_it_ended(folder / "logs" / "whole"), indent=1).encode()
            about = tarfile.TarInfo("final.json")
            about.size = len(final)
            tar.addfile(about, io.BytesIO(final))
        print(f"{target}: killed after {steps[-1]}, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3:])
