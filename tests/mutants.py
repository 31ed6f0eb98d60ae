"""Do the tests notice? Breaks the CRF in a line or two, in a copy, and runs its tests: `python tests/mutants.py`

Names of mutants as words try those only.
Prints which test killed each mutant; exit code 1 if one survives. The first twelve are mistakes that published layers
have made or that are easily made (docs/crf.md).
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/test_crf.py", "tests/test_crf_layer.py")
TOO_SLOW = "not compile and not fp16_survives"  # they are about other things

MEANFIELD, PAIRS, LAYER = "dfer/crf/meanfield.py", "dfer/crf/pairs.py", "dfer/crf/layers.py"
MUTANTS: dict[str, list[tuple[str, str, str]]] = {  # name -> (file, text, what it becomes)
    "a token hears itself": [
        (PAIRS, "kernel.diagonal(dim1=-2, dim2=-1).zero_()  # a token", "# a token"),
    ],
    "first message from log-probabilities": [
        (
            MEANFIELD,
            "logits, q = unary, unary.softmax(-1)\n    swept",
            "logits, q = unary, unary.log_softmax(-1)\n    swept",
        ),
    ],
    "pairs count twice in the energy": [(MEANFIELD, "q * (unary + 0.5 * message)", "q * (unary + message)")],
    "normalised by rows": [
        (PAIRS, "scaled = self.scale[..., None] * x\n", "scaled = x\n"),
        (PAIRS, "return self.scale[..., None] * self.product", "return self.scale[..., None].square() * self.product"),
    ],
    "compatibility is not symmetric": [(LAYER, "gram = self.affinity @ self.affinity.mT", "gram = self.affinity")],
    "centres zeroed axis by axis": [
        (
            PAIRS,
            "self.frames, self.cells = frames, cells\n",
            "self.frames = frames - torch.diag_embed(frames.diagonal(dim1=-2, dim2=-1))\n"
            "        self.cells = cells - torch.diag(cells.diagonal())\n",
        ),
    ],
    "what damping carries over is lost in backward": [
        (
            MEANFIELD,
            "carried = _softmax_adjoint(q, adjoint) + (1 - eta) * carried\n",
            "carried = _softmax_adjoint(q, adjoint)\n",
        )
    ],
    "degree taken for a constant": [
        (PAIRS, "worth = 0.5 * (row + columns[:, block])", "worth = 0 * (row + columns[:, block])")
    ],
    "row sums of the kernel taken for the degree": [(PAIRS, "row - worth * (1 - to_itself)", "row - worth")],
    "the result kept for backward is the start": [(MEANFIELD, "            q = result\n", "")],
    "damping of the whole batch": [
        (
            MEANFIELD,
            "return ((lam - 2) / 4).clamp(min=0)",
            "return ((lam - 2) / 4).clamp(min=0).amax().expand(len(lam))",
        )
    ],
    "padding counts in the degree": [
        (
            PAIRS,
            "half_norm = torch.where(valid, 0.5 * scaled.square().sum(-1), NEVER)",
            "half_norm = 0.5 * scaled.square().sum(-1)",
        )
    ],
    "softmax in bfloat16": [
        (
            PAIRS,
            "return logits, logits.softmax(-1), message",
            "return logits, logits.bfloat16().softmax(-1).to(q), message",
        )
    ],
    "height and width swapped": [(LAYER, "torch.stack([y, x, torch", "torch.stack([x, y, torch")],
    "gradient of one side of each pair": [
        (PAIRS, "            to_points.baddbmm_(pairs.mT, self.points[:, block])\n", "")
    ],
    "gradient of a frame's message to itself": [
        (PAIRS, "to_frames = to_frames - torch.diag_embed(to_itself @ own_cell)", "to_frames = to_frames + 0")
    ],
    "certificate without the degrees": [
        (MEANFIELD, "torch.maximum(max_self * bounds[:, 0]", "torch.maximum(0 * max_self * bounds[:, 0]")
    ],
    "invalid tokens are pooled": [(LAYER, "torch.where(valid[..., None], q, 0).sum(1)", "q.sum(1)")],
}


def mutate(root: Path, edits: list[tuple[str, str, str]]) -> None:
    for file, text, instead in edits:
        source = (root / file).read_text()
        assert source.count(text) == 1, f"{file}: {text!r} stands there {source.count(text)} times"
        (root / file).write_text(source.replace(text, instead))


def killer(root: Path) -> str | None:
    """The first test that fails, or None. The name of an error in collecting counts: such a mutant is none."""
    words = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=no", "-k", TOO_SLOW]
    run = subprocess.run([sys.executable, "-m", "pytest", *words, *TESTS], cwd=root, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    assert run.returncode == 1 and failed, f"the tests did not run:\n{run.stdout}{run.stderr}"
    return failed[0].removeprefix("FAILED ").split(" - ")[0]


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in MUTANTS]:
        print(f"mutants.py: no mutant {unknown[0]!r}; there are: {', '.join(MUTANTS)}", file=sys.stderr)
        return 2
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("dfer", "dali_pipes", "tests", "benchmarks", "scripts"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "train.py"):
            shutil.copy(ROOT / file, copy)
        assert (sound := killer(copy)) is None, f"without any mutant {sound} fails"
        for name in names or MUTANTS:
            mutate(copy, MUTANTS[name])
            test = killer(copy)
            survivors += test is None
            print(
                f"{'SURVIVED' if test is None else 'killed'}  {name}{'' if test is None else f': {test}'}", flush=True
            )
            for file in {edit[0] for edit in MUTANTS[name]}:
                shutil.copy(ROOT / file, copy / file)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
