"""The text of a list: its lines, whatever program wrote them, and which of them are rows."""

import codecs
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from dfer.cli import UserError
from dfer.files import reason

# With the longer ones first: UTF-32 begins as UTF-16 does.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
USUAL = ("byte-order mark", "CRLF line ends")  # oddities that change nothing of what stands there
_HEAD = 2**16  # bytes of a list in which its header ends
_NUMBER = r"[\s,;]+[0-9]+(?:\.0*)?"
_LIKE_A_ROW = re.compile(rf"#.*(?:\S{_NUMBER}{_NUMBER}|\.(?:mp4|avi|mov|mkv|webm|wmv|flv|m4v|mpe?g)\b.*)")


def read_lines(
    path: Path, what: str = "annotation list", advice: str = "", limit: int | None = None
) -> tuple[list[str], list[str]]:
    """Return the stripped lines of a list, and what of them is read otherwise than it stands there.

    A byte-order mark says how a list is encoded, and may begin any line, as in lists that were joined; without one it
    is UTF-8. Lines end in LF, CRLF or CR. They are not cut at other characters, which a file name may hold.

    Args:
        path: the list.
        what: what messages call it.
        advice: what the message about a list that is missing ends with.
        limit: bytes that it may have at most.

    Raises:
        UserError: if it is no file, cannot be read or is not text. The message names the row, where there is one.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"{path}: cannot be read as {_a(what)}: it is a folder; name the file in it")
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            raise UserError(
                f"{path}: cannot be read as {_a(what)}: it is a pipe or a device, and a list is read more than once; "
                "write it to a file"
            )
        with open(path, "rb") as file:
            data = file.read(-1 if limit is None else limit + 1)
        if limit is not None and len(data) > limit:
            raise UserError(f"{path}: too large for a list: over {limit:,} bytes")
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}{advice}") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise UserError(f"{path}: cannot be read as {_a(what)} ({reason(error)})") from None
    text, oddities = _decode(path, data, what)
    return [line.strip() for line in text.split("\n")], oddities


def read_head(path: Path) -> list[str]:
    """Return the lines that stand before the first row of a list which can be read, as `read_lines` does.

    Raises:
        OSError, ValueError: if it cannot be read after all.
    """
    with open(path, "rb") as file:
        data = file.read(_HEAD)
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    lines = [line.strip("\ufeff \t\v\f") for line in re.split("[\r\n]", data.decode(encoding, errors="replace"))]
    first = next((number for number, line in enumerate(lines) if line and line[0] != "#"), len(lines))
    return lines[:first]


def _a(what: str) -> str:
    return f"an {what}" if what[0] in "aeiou" else f"a {what}"


def _decode(path: Path, data: bytes, what: str) -> tuple[str, list[str]]:
    """Return the text of a list with line ends of one kind and without byte-order marks, and its oddities."""
    mark, encoding = next(((m, name) for m, name in _MARKS.items() if data.startswith(m)), (b"", "utf-8"))
    oddities = []
    if encoding != "utf-8":
        oddities.append(f"{encoding[:6].upper()}, by its byte-order mark")
    elif mark:
        oddities.append(USUAL[0])
    elif b"\0" in data[:2]:
        raise UserError(f"{path}: looks like UTF-16 without a byte-order mark; save the list as UTF-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise UserError(
                f"{path}: cannot be read as {_a(what)}: begins as {encoding[:6].upper()}, but is not: damaged"
            ) from None
        row, bad = data.count(b"\n", 0, error.start + len(mark)) + 1, data[error.start + len(mark)]
        raise UserError(
            f"{path}:{row}: cannot be read as {_a(what)}: byte 0x{bad:02x} is not UTF-8; save the list "
            "as UTF-8, for example by: iconv -f GBK -t UTF-8 (with what it is encoded in for GBK)"
        ) from None
    if "\ufeff" in text and (joined := re.sub(r"^\ufeff+", "", text, flags=re.MULTILINE)) != text:
        text = joined
        oddities.append("byte-order marks inside it, as in lists that were joined")
    if "\r" in text:
        if "\r\n" in text:
            oddities.append(USUAL[1])
        text = text.replace("\r\n", "\n")
        if "\r" in text:
            oddities.append("line ends that are CR alone")
            text = text.replace("\r", "\n")
    return text, oddities


def split_rows(lines: Sequence[str], base: Path | None) -> tuple[list[tuple[int, str]], list[int]]:
    """Return the rows among the lines of a list with their numbers, from 1, and the numbers of those left out.

    A line that begins with # is a comment, unless there is a clip of that name in `base`. Comments that look like a row
    are left out, which is to be said.
    """
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line and line[0] != "#"]
    clips, left_out = [], []
    for number in [number for number, line in enumerate(lines, start=1) if line and line[0] == "#"]:
        line = lines[number - 1]
        if base is not None and any(os.path.lexists(base / path) for path in _paths(line)):
            clips.append((number, line))
        elif _LIKE_A_ROW.fullmatch(line):
            left_out.append(number)
    return sorted(rows + clips) if clips else rows, left_out


def _paths(line: str) -> Iterator[str]:
    """Yield what may be the path of a row of any format."""
    if "\0" in line:
        return
    yield line
    for separator in (None, ",", ";"):
        for columns in (1, 2):
            path = line.rsplit(separator, columns)[0].strip()
            if path not in ("", line):
                yield path


def name_hidden(text: str) -> str:
    r"""Return the characters of a text that cannot be seen, or look like a blank: \u200b (zero width space)."""
    found = dict.fromkeys(
        c for c in text if c not in " \t" and unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp")
    )
    return ", ".join(f"{ascii(c)[1:-1]} ({unicodedata.name(c, 'control character').lower()})" for c in found)
