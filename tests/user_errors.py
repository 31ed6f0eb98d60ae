"""Print every error that a user can cause, as the sources raise it: `python tests/user_errors.py [CHECKOUT]`.

One line each: the message with what is filled in as {}, and where it is raised. Two checkouts are compared by
`diff <(python tests/user_errors.py A) <(python tests/user_errors.py B)`, in which a message that only moved differs in
its place alone.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = (
    "UserError",
    "LauncherError",
    "ValueError",
    "BadClip",
    "BadImage",
)  # ValueError: as versions before 0.2 have it


def template(node: ast.expr) -> str:
    """The text of a message with {} for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "{}"


def messages(checkout: Path) -> list[tuple[str, str]]:
    """(message, place) of each error of a user that dfer, dali_pipes, train.py and the scripts raise."""
    found = []
    for name in ("train.py", "dfer", "dali_pipes", "scripts"):
        path = checkout / name
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                call = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
                if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in KINDS and call.args:
                    found.append((template(call.args[0]), f"{file.relative_to(checkout)}:{node.lineno}"))
    return sorted(found)


if __name__ == "__main__":
    for message, place in messages(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT):
        print(f"{message}    ({place})")
