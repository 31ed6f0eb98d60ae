"""Pack the clips of lists into a few large files, from which training reads at random faster than from a million small.

`python scripts/pack.py train.txt --out DIR` writes DIR/train.txt, the list to train on as any other, DIR/train.npz,
which knows where each frame lies, and DIR/train-00000.tar and so on. Several lists share one pack, in which each clip
is stored once: `python scripts/pack.py lists/dfew/*.txt --out DIR`. `--verify DIR/train.txt` reads all of it again.

shards    tar files that webdataset and DALI read too: CLIP.json, CLIP.cls (the label), CLIP.00000.jpg and so on.
          Image files are copied byte by byte, so that clips stay the same to the bit (PNG files too, as .png).
raw       pixels, exactly as they are decoded: nothing is left to decode in training, for 10 to 20 times the space.
--size PX squashes each frame to PX x PX. No harm is done to shapes: the trainer's crops are shares of the frame, so
          that a frame of another aspect ends as the same square. In shards, frames are then encoded again; pixels
          change slightly. A third more than the training size keeps most detail: 144 for 112.

Frames of videos are decoded, and for shards encoded as JPEG. All are encoded without chroma subsampling, which loses
less per byte at equal size of file, and with their own Huffman tables, 6 % smaller. A frame that cannot be decoded ends
the run. A run that was stopped goes on when it is started again; packing twice gives the same shards, byte by byte.

Exit code: 0 done, 1 --verify found problems, 2 a list cannot be packed or the command is wrong.
"""

import argparse
import shlex
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import EXIT_PROBLEMS, Parser, begin, command_of, in_range, one_line_errors, printable, usable_cores
from dfer.lists.annotations import packed_index
from dfer.lists.packed import SUFFIX, read_pack
from dfer.lists.packing import pack
from dfer.lists.shards import QUALITY, Options
from dfer.lists.verify import verify


def run_pack(args: argparse.Namespace, command: str) -> int:
    """Pack, and print how to train on the result. `command` is the command line, which the pack records."""
    options = Options(args.format, args.size, args.quality, args.shard_size * 10**6)
    targets = pack(args.lists, args.root, args.out, options, args.workers, command)
    index_path = packed_index(targets[0])
    assert index_path is not None
    print(read_pack(index_path).summary())
    for target in targets:
        path = printable(shlex.quote(str(target)))
        print(f"train on it: {command_of('train')} --data.train-list {path} --data.val-list VAL_LIST")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Verify a pack, and print its problems."""
    found, problems = verify(args.verify, args.workers)
    for problem in problems:
        print(f"pack: {printable(problem)}", file=sys.stderr)
    print(f"{found.summary()}: {len(problems)} problems" if problems else f"{found.summary()}: all as packed")
    return EXIT_PROBLEMS if problems else 0


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("pack", __doc__)
    default = Options()
    parser.add_argument("lists", nargs="*", type=Path, metavar="LIST", help="lists of frame folders or of videos")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write lists, index and shards to")
    parser.add_argument("--root", type=Path, help="where the paths start (default: as for training)")
    parser.add_argument("--format", choices=tuple(SUFFIX), default=default.format, help="(default: %(default)s)")
    parser.add_argument("--size", type=in_range(int, 16, 2048), metavar="PX", help="squash frames to PX x PX")
    parser.add_argument(
        "--quality", type=in_range(int, 1, 100), help=f"of JPEG images that are encoded (default: {QUALITY})"
    )
    parser.add_argument(
        "--shard-size",
        type=in_range(int, 1, 10**6),
        metavar="MB",
        default=default.shard_bytes // 10**6,
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=in_range(int, 1, 512), default=usable_cores(), help="processes; of --verify threads"
    )
    parser.add_argument("--verify", type=Path, metavar="DIR/LIST.txt", help="read a pack again, and all of it")
    args = parser.parse_args(arguments)
    if args.verify is not None and (args.lists or args.out is not None):
        parser.error("--verify takes the one list that it names, and writes nothing")
    if args.verify is None and not (args.lists and args.out is not None):
        parser.error("give the lists to pack and --out DIR, or --verify DIR/LIST.txt")
    print(f"pack: reading {', '.join(map(printable, args.lists or [args.verify]))}", flush=True)
    command = f"{command_of('pack')} {shlex.join(sys.argv[1:] if arguments is None else arguments)}"
    kept = "interrupted; what is finished stays finished: run the same again"
    with warnings.catch_warnings(action="ignore"):  # Pillow's, on odd files: what matters is raised
        if args.verify is not None:
            return one_line_errors("pack", lambda: run_verify(args), kept)
        return one_line_errors("pack", lambda: run_pack(args, command), kept)


if __name__ == "__main__":
    begin("pack")
    sys.exit(main())
