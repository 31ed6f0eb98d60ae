"""Annotation lists: the one place that knows what a row of a `.txt` list means."""

from dataclasses import dataclass
from pathlib import Path

# The order of DFEW's label ids, which the field's `.txt` lists use for DFEW and FERV39k alike.
EMOTIONS = ("Happy", "Sad", "Neutral", "Angry", "Surprise", "Disgust", "Fear")


@dataclass(frozen=True)
class VideoRecord:
    """One annotated video: a row of a list."""

    name: str  # as written in the list: how logs and predictions.csv call it
    path: Path  # folder of frames (or file) on this machine
    num_frames: int  # as listed; a hint only, published lists get it wrong
    label: int  # 0 .. len(EMOTIONS) - 1
    source: str  # "list.txt:row", for messages


def read_annotations(list_path: str | Path, root: str | Path | None = None) -> list[VideoRecord]:
    """Read a list of `path num_frames label` rows, the common form of the field.

    Rows are split from the right, so paths may hold spaces; CRLF, a byte-order mark, blank lines and lines starting
    with `#` are fine. Relative paths start at `root`, or at the list's own folder when `root` is None.

    Raises:
        ValueError: in one line that names the file and the row, if the list is missing, empty or damaged.
    """
    list_path = Path(list_path)
    try:
        text = list_path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{list_path}: no such annotation list{_hint(list_path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{list_path}: cannot be read as an annotation list ({error})") from None

    base = Path(root) if root is not None else list_path.parent
    records = []
    for row, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{list_path}:{row}"
        fields = line.rsplit(maxsplit=2)
        if len(fields) != 3:
            raise ValueError(f"{where}: expected 'path num_frames label', got {line!r}")
        name, num_frames, label = fields
        try:
            num_frames, label = int(num_frames), int(label)
        except ValueError:
            raise ValueError(f"{where}: num_frames and label must be whole numbers, got {line!r}") from None
        if num_frames < 1:
            raise ValueError(f"{where}: num_frames is {num_frames}, must be at least 1")
        if not 0 <= label < len(EMOTIONS):
            legend = " ".join(f"{i}={e}" for i, e in enumerate(EMOTIONS))
            raise ValueError(f"{where}: label {label} is not in 0..{len(EMOTIONS) - 1} ({legend})")
        records.append(VideoRecord(name, base / name, num_frames, label, where))
    if not records:
        raise ValueError(f"{list_path}: the annotation list is empty")
    return records


def _hint(list_path: Path) -> str:
    if list_path.parts[-3:-1] == ("data", "faces"):
        return "; make the embedded data set with: python scripts/make_faces.py"
    return "; check --data.train-list and --data.val-list"
