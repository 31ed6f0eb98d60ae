"""Break the CRF in a line or two, in a copy, and run its tests: `python tests/mutants.py [NAME ...]`

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

MEANFIELD, PAIRS, DENSE, LAYER = (f"dfer/crf/{name}.py" for name in ("meanfield", "pairs", "dense", "layers"))
MUTANTS: dict[str, list[tuple[str, str, str]]] = {  # name -> (file, text, what it becomes)
    "a token sends itself a message": [
        (DENSE, "kernel.diagonal(dim1=-2, dim2=-1).zero_()  # a token", "# a token"),
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
        (DENSE, "scaled = self.scale[..., None] * x\n", "scaled = x\n"),
        (DENSE, "return self.scale[..., None] * self.product", "return self.scale[..., None].square() * self.product"),
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
            "to_logits = _softmax_adjoint(q, adjoint) + (1 - eta) * to_logits\n",
            "to_logits = _softmax_adjoint(q, adjoint)\n",
        )
    ],
    "degree taken for a constant": [
        (DENSE, "to_degree = 0.5 * (row + columns[:, block])", "to_degree = 0 * (row + columns[:, block])")
    ],
    "row sums of the kernel taken for the degree": [(DENSE, "row - to_degree * (1 - to_itself)", "row - to_degree")],
    "the result kept for backward is the start": [(MEANFIELD, "marginals.append(result)", "marginals.append(q)")],
    "damping of the whole batch": [
        (
            MEANFIELD,
            "return ((lam - 2) / 4).clamp(min=0)",
            "return ((lam - 2) / 4).clamp(min=0).amax().expand(len(lam))",
        )
    ],
    "degree without the token itself": [
        (DENSE, "self.scale = (1 + kernel.sum(-1)).rsqrt()", "self.scale = kernel.sum(-1).clamp(min=1e-6).rsqrt()")
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
        (DENSE, "            to_points.baddbmm_(pairs.mT, self.points[:, block])\n", "")
    ],
    "gradient of a frame's message to itself": [
        (PAIRS, "to_frames = to_frames - torch.diag_embed(to_itself @ cell_diagonal)", "to_frames = to_frames + 0")
    ],
    "certificate without the degrees": [
        (MEANFIELD, "torch.maximum(max_self * bounds[:, 0]", "torch.maximum(0 * max_self * bounds[:, 0]")
    ],
    "logarithms are pooled": [
        (
            LAYER,
            "self.class_probabilities(q.sum(1)).clamp(min=1e-12).log()",
            "self.class_probabilities(q).clamp(min=1e-12).log().mean(1)",
        )
    ],
}


def mutate(root: Path, edits: list[tuple[str, str, str]]) -> None:
    for file, text, instead in edits:
        source = (root / file).read_text()
        assert source.count(text) == 1, f"{file}: {text!r} stands there {source.count(text)} times"
        (root / file).write_text(source.replace(text, instead))


def killer(root: Path) -> str | None:
    """Return the first test that fails, or None. An error in collecting the tests counts as a mistake of the mutant."""
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
