"""Write down what the clips of a list are made of, so that damage is noticed which no decoder notices.

`python scripts/hash_clips.py train.txt` reads all frames or videos of the list once and writes a hash of each to
train.txt.hashes.npz. While that file lies beside the list, training and evaluation verify all that they read, which
costs about 6 microseconds per 10 kB. `--verify` verifies all of it now. Exit code: 0 fine, 1 clips differ, 2 a clip
cannot be read or the command is wrong.
"""

import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dali_pipes.sources import BadClip, Source, source_of
from dfer.cli import Parser, UserError, in_range, shown
from dfer.lists.hashes import digest, hashes_path, write_hashes
from dfer.lists.index import load_index
from scripts.check_list import watch


def hash_clip(source: Source, video: int) -> list[bytes]:
    """The hashes of all frames of a clip, or the one of its video file.

    Raises:
        BadClip: in one line, if it cannot be read, or is not what it was.
    """
    return [digest(part) for part in source.fetch(video, np.arange(source.index.num_frames[video]))]


def problem(source: Source, video: int) -> str | None:
    try:
        source.fetch(video, np.arange(source.index.num_frames[video]))
    except BadClip as error:
        return str(error)
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("hash_clips", __doc__)
    parser.add_argument("list", type=Path, metavar="LIST", help="list of frame folders, of videos, or of packed clips")
    parser.add_argument("--root", type=Path, help="where the paths start (default: as for training)")
    parser.add_argument("--workers", type=in_range(int, 1, 512), default=os.cpu_count() or 1, help="threads")
    parser.add_argument("--verify", action="store_true", help="compare with what was written, and write nothing")
    args = parser.parse_args(arguments)
    try:
        if args.verify and not hashes_path(args.list).exists():
            raise UserError(f"{hashes_path(args.list)}: no such file; without --verify it is written")
        index = load_index(args.list, args.root, hashed=args.verify)
        source = source_of(index, whole_videos=True)
        videos = range(len(index))
        with ThreadPoolExecutor(args.workers) as pool:
            if args.verify:
                told: Iterable[str | None] = pool.map(lambda video: problem(source, video), videos)
                problems = [line for line in watch(told, len(index), "clips") if line is not None]
            else:
                found = pool.map(lambda video: hash_clip(source, video), videos)
                parts = list(watch(found, len(index), "clips"))
        if not args.verify:
            path = write_hashes(args.list, index.records, parts)
            print(f"written: {shown(path)}: {sum(map(len, parts)):,} hashes of {len(index):,} clips")
            return 0
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or args.list}: {error.strerror}")
    for line in problems:
        print(f"hash_clips: {shown(line)}", file=sys.stderr)
    print(f"{len(problems):,} of {len(index):,} clips differ" if problems else f"{len(index):,} clips: all as written")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
