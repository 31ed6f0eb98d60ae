"""What the ids of a list mean: the orders of the classes, and the emotions that its own paths name.

Many data sets put clips into folders of their emotion, `Crime/Angry/0063`. A path that names another emotion than its
label contradicts the order in which the ids are read.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Protocol, runtime_checkable

from dfer.cli import UserError, say_once

# The order of DFEW's label ids, which the field's `.txt` lists use for DFEW and FERV39k alike.
EMOTIONS = ("Happy", "Sad", "Neutral", "Angry", "Surprise", "Disgust", "Fear")

ORDERS = {"dfew": EMOTIONS, "alphabetical": tuple(sorted(EMOTIONS))}
WORDS = {emotion.lower(): emotion for emotion in EMOTIONS}
WORDS |= {"happiness": "Happy", "sadness": "Sad", "anger": "Angry", "surprised": "Surprise", "disgusted": "Disgust"}
WORDS |= {"fearful": "Fear"}
SAY_ORDER = "say --class-order dfew, --class-order alphabetical, or all seven classes in order with commas between"

MOST = 0.9  # of the rows whose paths name an emotion
_MIN_CLASSES = 3  # of which the folders have to agree before an order is read from them
# A folder or file named after an emotion, maybe numbered: Angry, 3_Angry, angry-07.mp4.
_NAMED = re.compile(r"[\W\d_]*([a-z]+)[\W\d_]*(?:\.[a-z0-9]{2,4})?", re.IGNORECASE)


@runtime_checkable
class Labelled(Protocol):
    """A row of a list, as far as `check_paths` needs it."""

    @property
    def source(self) -> str: ...  # "list.txt:row"
    @property
    def name(self) -> str: ...  # its path
    @property
    def label(self) -> int: ...  # index into EMOTIONS


def parse_order(order: str, where: str) -> tuple[str, ...]:
    """Return the classes of an order's name, or of its seven classes with commas between.

    Raises:
        UserError: if it is no order; the message begins with `where`.
    """
    if order in ORDERS:
        return ORDERS[order]
    classes = tuple(WORDS.get(word.strip().lower(), "") for word in order.split(","))
    if sorted(classes) != sorted(EMOTIONS):
        shown = repr(order if len(order) <= 80 else f"{order[:77]}...")
        raise UserError(f"{where}: {shown} is no order of the classes: {SAY_ORDER} ({','.join(EMOTIONS)})")
    return classes


def emotions_in(name: str) -> frozenset[str]:
    """Return the emotions that the folders of a path, and its last part, are named after."""
    folder, _, last = name.rpartition("/")
    if last.isdecimal() or not (found := emotion_of(last)):
        return _in_folder(folder)
    return _in_folder(folder) | {found}


@functools.lru_cache(maxsize=4096)  # lists have few folders of clips
def _in_folder(folder: str) -> frozenset[str]:
    return frozenset(filter(None, map(emotion_of, folder.split("/"))))


def emotion_of(part: str) -> str:
    """Return the emotion that a part of a path is named after; empty if it is none."""
    found = _NAMED.fullmatch(part)
    return WORDS.get(found[1].lower(), "") if found else ""


def read_order(ids: Sequence[int], emotions: Sequence[Collection[str]]) -> dict[int, str] | None:
    """Return what each id of a list stands for by the emotions that its paths name, None if they do not settle that.

    Each id has to stand for one emotion and each emotion for one id, of at least _MIN_CLASSES; an id that also stands
    in a row whose path names no emotion needs two rows whose paths do, as one may be a typo.
    """
    meaning: dict[int, str] = {}
    named = Counter(i for i, found in zip(ids, emotions, strict=True) if found)
    for i, found in zip(ids, emotions, strict=True):
        if len(found) > 1 or any(meaning.setdefault(i, emotion) != emotion for emotion in found):
            return None
    rows = Counter(ids)
    settled = all(named[i] > 1 or named[i] == count for i, count in rows.items())
    distinct = len(set(meaning.values())) == len(meaning)
    return meaning if settled and distinct and len(meaning) >= _MIN_CLASSES else None


def complete_order(meaning: dict[int, str], base: int) -> tuple[str, ...]:
    """Return seven classes in an order that has these; what the ids leave open comes as in EMOTIONS."""
    rest = iter(emotion for emotion in EMOTIONS if emotion not in meaning.values())
    return tuple(meaning.get(i) or next(rest) for i in range(base, base + len(EMOTIONS)))


def check_paths(rows: Sequence[Labelled], stated: bool, advice: Callable[[str], str]) -> None:
    """Compare labels with the emotions that the paths name, and say once where they differ.

    Args:
        rows: the rows of a list.
        stated: the list says what its labels mean: then the paths are only reported.
        advice: returns what to do, given the flags for scripts/check_list.py that name the order of the paths.

    Raises:
        UserError: if two or more, and most, of the rows whose paths name an emotion contradict an order that nobody
            has stated, and the paths are those of another one.
    """
    shared = _shared_folders([row.name for row in rows])
    emotions = [emotions_in(row.name[shared:]) for row in rows]
    named = sum(map(bool, emotions))
    pairs = zip(rows, emotions, strict=True)
    wrong = [(row, found) for row, found in pairs if found and EMOTIONS[row.label] not in found]
    if not wrong:
        return
    row, found = wrong[0]
    label, says = f"{row.label} means {EMOTIONS[row.label]}", " and ".join(sorted(found))
    share = f"{len(wrong):,} of the {named:,} rows whose path names an emotion"
    line = f"{row.source}: label {label}, but its path says {says}; so it is in {share}"
    if stated:
        say_once(f"{line}; the labels are taken as they are")
        return
    flags = _flags([row.label for row in rows], emotions) if len(wrong) > 1 and 2 * len(wrong) > named else ""
    if not flags:
        say_once(f"{line}; the labels are taken as they are: {advice('--class-order ORDER')}")
        return
    raise UserError(f"{line}: {advice(flags)}")


def _shared_folders(names: Sequence[str]) -> int:
    """Return the length of the folders that all paths begin with: of those none tells rows apart."""
    if not names:
        return 0
    first, last = min(names).split("/")[:-1], max(names).split("/")[:-1]
    return sum(
        len(a) + 1 for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    )


def _flags(ids: Sequence[int], emotions: Sequence[Collection[str]]) -> str:
    """Return the flags that say in which order of the classes the ids fit the emotions; empty if there is none.

    Each of _MIN_CLASSES ids or more has to stand for an emotion of its own in MOST rows whose paths name one: single
    folders are renamed, and posed clips relabelled.
    """
    pairs = Counter((i, emotion) for i, found in zip(ids, emotions, strict=True) for emotion in found)
    enough = MOST * sum(map(bool, emotions))
    meaning: dict[int, str] = {}
    for (i, emotion), _ in pairs.most_common():
        if i not in meaning and emotion not in meaning.values():
            meaning[i] = emotion
    if len(meaning) < _MIN_CLASSES:
        return ""
    for base in (0, 1):
        classes = dict(enumerate(ORDERS["alphabetical"], base))
        if sum(count for (i, emotion), count in pairs.items() if classes.get(i) == emotion) >= enough:
            return "--class-order alphabetical" + (" --label-base 1" if base else "")
    fits = sum(pairs[pair] for pair in meaning.items()) >= enough
    return f"--class-order {','.join(complete_order(meaning, 0))}" if fits else ""
