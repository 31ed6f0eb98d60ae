"""The values of a configuration: their ranges, what JSON has of them, and what its parser says is wrong."""

import dataclasses
import math
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from dfer.cli import Range, UserError


def check_ranges(section: Any, prefix: str) -> None:
    """Check the numbers of a configuration against the ranges that stand at its fields; `prefix` begins its flags.

    Raises:
        UserError: names the flag, its value and what is allowed.
    """
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        flag = f"{prefix}{name.replace('_', '-')}"
        value: Any = getattr(section, name)
        if dataclasses.is_dataclass(type(value)):
            check_ranges(value, f"{flag}.")
            continue
        for limits in (extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)):
            for number in value if isinstance(value, tuple) else (value,):
                if not math.isfinite(number) or not limits.low <= number <= limits.high:
                    raise UserError(f"{flag} {number}: must be between {limits.low} and {limits.high}")


def restored(kind: Any, saved: Any, flag: str) -> Any:
    """Return a value of a field's type from what JSON has of it.

    Raises:
        TypeError, ValueError: if it is of another type, or none of the choices.
    """
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        start = flag if flag == "--" else f"{flag}."
        known = {k: restored(hints[k], v, start + k.replace("_", "-")) for k, v in saved.items() if k in hints}
        return cast(type, kind)(**(dict(saved) | known))  # an unknown key is a TypeError
    if get_origin(kind) is tuple and isinstance(saved, list):
        return tuple(restored(get_args(kind)[0], value, flag) for value in saved)
    if get_origin(kind) is Literal:
        fits = saved in get_args(kind)
    elif get_origin(kind) is UnionType:  # a type, or None
        return None if saved is None else restored(get_args(kind)[0], saved, flag)
    elif kind is Path:
        fits = isinstance(saved, str) and "\0" not in saved
        saved = Path(saved) if fits else saved
    else:
        fits = isinstance(saved, int | float if kind is float else kind) and isinstance(saved, bool) == (kind is bool)
    if not fits:
        raise ValueError(f"{flag} is {saved!r}")
    return saved


def first_sentence(panel: str) -> str:
    """Return in one line what is wrong, and what may be meant, from the panel that tyro draws."""
    words = re.sub(r"[╭╰][^\n]*|│|─{3,}", "", panel)  # the upper edge has a title, which the text repeats
    words = re.split(r"For full helptext|Argument helptext", words)[0]
    return re.sub(r"\s+", " ", words.replace("Perhaps you meant:", "- perhaps you meant")).strip()
