"""Listed paths that are not there: what is there in their place, and why it is called otherwise."""

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from dfer.cli import command_of, say_once
from dfer.files import closed, is_data
from dfer.lists.annotations import VideoRecord
from dfer.lists.text import name_hidden


def other_form(path: str, name: str) -> str | None:
    """Return a path in the Unicode form that the disk has its name in, None if it has neither.

    An accented letter is one character (NFC) or two (NFD); they are the same letter, but not the same bytes.
    """
    if name.isascii():
        return None
    base, name = _split(path, name)
    forms = (base + unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next((form for form in forms if form != path and os.path.lexists(form)), None)


def relocate(records: Sequence[VideoRecord], missing: Sequence[int]) -> dict[int, Path]:
    """Return where those of the missing records are that lie there by another Unicode form of their names. Says so."""
    found: dict[int, Path] = {}
    for row in missing:
        record = records[row]
        if (other := other_form(os.fspath(record.path), record.name)) is not None:
            found[row] = Path(other)
    if found:
        first = records[min(found)].source
        say_once(f"{first}: the name is there in another Unicode form, as of {len(found):,} clips: the same letters")
    return found


def find_listed(base: Path, name: str, source: str) -> Path:
    """Return where a listed file lies; if by another Unicode form or with slashes for backslashes, that is said.

    Args:
        base: where the names of the list start.
        name: as the list has it.
        source: of the row, for messages.
    """
    path = base / name
    if os.path.lexists(path):
        return path
    for other in (other_form(os.fspath(path), name), os.fspath(base / name.replace("\\", "/"))):
        if other is not None and other != os.fspath(path) and os.path.lexists(other):
            say_once(f"{source}: {name} is not there and {other} is, by the same letters: that is taken")
            return Path(other)
    return path


def similar(name: str, names: Iterable[str]) -> str:
    """Return, for the end of a message that a name is not among others, which of them it may be; empty if none is."""
    for other in names:
        if (why := _difference(other, name)) is not None:
            return f" ({other} is: {why})"
    return ""


def explain(path: str | Path, name: str) -> str:
    """Return what to do about a listed path that is not there, as the end of a message; empty if nothing is known.

    Args:
        path: where it was looked for.
        name: as the list has it.
    """
    if why := closed(path):
        return f" (it cannot be looked at: {why})"
    path = os.fspath(path)
    here, lost = _first_missing(path)
    for entry in _entries(here):
        if (why := _difference(entry, lost)) is not None:
            return f" ({os.path.join(here, entry)} is there: {why})"
        if entry.startswith(f"{lost}\\"):
            return (
                f" ({here} has files with backslashes in their names, such as {entry!r}: where they were packed, these "
                "were folders; unpack them again with a program that makes folders, such as 7z)"
            )
    if "\\" in name and os.path.lexists("".join(_split(path, name)).replace("\\", "/")):
        return (
            f" (with slashes for the backslashes it is there: {command_of('check_list')} LIST --write OUT converts the "
            "list)"
        )
    if hidden := name_hidden(name):
        return f" (its name holds {hidden}, which looks like nothing or a blank)"
    if os.path.isabs(name) or re.match(r"[A-Za-z]:[/\\]", name):
        return (
            f" (the list's paths are absolute, where a root has no effect: {command_of('check_list')} LIST --root DIR "
            "--write OUT makes them start at DIR)"
        )
    if here != os.path.dirname(path):
        return " (its parent is missing too: is --data.root right?)"
    return ""


def _split(path: str, name: str) -> tuple[str, str]:
    """Return the folder in which the names of a list start, and a name below it, which together are its path."""
    name = name if path.endswith(name) else os.path.basename(path)
    return path[: len(path) - len(name)], name


def _first_missing(path: str) -> tuple[str, str]:
    """Return the last folder of a path that exists, and the part after it that does not."""
    here, lost = os.path.split(path.rstrip("/"))
    while here and here != "/" and not os.path.isdir(here):
        here, lost = os.path.split(here)
    return here or ".", lost


def _entries(folder: str) -> list[str]:
    try:
        return sorted(filter(is_data, os.listdir(folder)))
    except (OSError, ValueError):
        return []


def _difference(there: str, listed: str) -> str | None:
    """Return how the name of what is there differs from the one that is listed; None if they are different names."""
    folded, wanted = unicodedata.normalize("NFC", there), unicodedata.normalize("NFC", listed)
    if folded == wanted:
        return "the same letters in another Unicode form"
    if wanted.isdecimal() and folded.isdecimal() and int(wanted) == int(folded):
        return "the list has lost its leading zeros, as spreadsheets do" if len(wanted) < len(folded) else "fewer zeros"
    if _visible(folded) == _visible(wanted):
        return f"the names differ in {name_hidden(listed) or name_hidden(there) or 'blanks'}"
    if folded.casefold() == wanted.casefold():
        return "capital and small letters differ"
    stem, suffix = os.path.splitext(folded)
    if suffix and stem == wanted:
        return f"with {suffix}"
    if _without_zeros(folded) == _without_zeros(wanted):
        return "other leading zeros"
    return "without the suffix" if os.path.splitext(wanted)[0] == folded else None


def _visible(text: str) -> str:
    """Return a text without the characters that look like nothing or a blank."""
    return "".join(c for c in text if c != " " and not name_hidden(c))


def _without_zeros(text: str) -> str:
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", text)
