"""Write down what the clips of a list are made of, so that damage is noticed which no decoder notices.

`python scripts/hash_clips.py train.txt` reads all frames or videos of the list once and writes a hash of each to
train.txt.hashes.npz. While that file lies beside the list, training and evaluation verify all that they read, which
costs about 6 microseconds per 10 kB. `--verify` verifies all of it now. Exit code: 0 done, 1 clips differ, 2 a clip
cannot be read or the command is wrong.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import begin

if __name__ == "__main__":
    begin("hash_clips", "torch and numba")
from dali_pipes.sources import Images, Source, source_of
from dali_pipes.stored import BadClip
from dfer.cli import EXIT_PROBLEMS, Parser, UserError, in_range, one_line_errors, printable, progress, usable_cores
from dfer.files import check_output, disk_errors
from dfer.lists import load_index
from dfer.lists.hashes import digest, hashes_path, write_hashes
from dfer.lists.threads import in_order

QUIET_S = 5


def hash_video(source: Source, video: int) -> list[bytes]:
    """Return the hashes of all frames of a video, or the one of its file.

    Raises:
        BadClip: if it cannot be read.
    """
    frames = np.arange(source.index.num_frames[video])
    if not isinstance(source, Images):
        return [digest(part) for part in source.fetch(video, frames)]
    parts = source.stored(video, frames)
    source.for_dali(video, frames, parts)  # what cannot be trained on is not hashed
    return [digest(part) for part in parts]


def problem(source: Source, video: int) -> str | None:
    """Return what is wrong with a video: it cannot be read, or is not what was hashed."""
    try:
        source.fetch(video, np.arange(source.index.num_frames[video]))
    except BadClip as error:
        return str(error)
    return None


def open_source(args: argparse.Namespace) -> Source:
    """Return the clips of the list, with hashes if they are to be verified."""
    with disk_errors("cannot read"):
        return source_of(load_index(args.list, args.root, hashed=args.verify))


def write(args: argparse.Namespace) -> int:
    """Hash all videos, and write the hashes beside the list."""
    check_output(hashes_path(args.list))
    source = open_source(args)
    count = len(source.index)
    found = in_order(lambda video: hash_video(source, video), range(count), args.workers)
    parts = list(progress(found, count, "clips", to_stderr=True, quiet_s=QUIET_S))
    with disk_errors("cannot write"):
        path = write_hashes(args.list, source.index.records, parts)
    print(f"written: {printable(path)}: {sum(map(len, parts)):,} hashes of {count:,} clips")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Compare all videos with the hashes beside the list, and name those that differ."""
    if not os.path.exists(hashes_path(args.list)):
        raise UserError(f"{hashes_path(args.list)}: no such file; without --verify it is written")
    source = open_source(args)
    count = len(source.index)
    found = in_order(lambda video: problem(source, video), range(count), args.workers)
    problems = [line for line in progress(found, count, "clips", to_stderr=True, quiet_s=QUIET_S) if line is not None]
    for line in problems:
        print(f"hash_clips: {printable(line)}", file=sys.stderr)
    print(f"{len(problems):,} of {count:,} clips differ" if problems else f"{count:,} clips: all as written")
    return EXIT_PROBLEMS if problems else 0


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("hash_clips", __doc__)
    parser.add_argument("list", type=Path, metavar="LIST", help="list of frame folders, of videos, or of packed clips")
    parser.add_argument("--root", type=Path, help="where the paths start (default: as for training)")
    parser.add_argument("--workers", type=in_range(int, 1, 512), default=usable_cores(), help="threads")
    parser.add_argument("--verify", action="store_true", help="compare with what was written, and write nothing")
    args = parser.parse_args(arguments)
    return one_line_errors("hash_clips", lambda: verify(args) if args.verify else write(args))


if __name__ == "__main__":
    sys.exit(main())
