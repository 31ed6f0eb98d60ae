"""Check annotation lists of any format against themselves, each other and the disk; write them in the canonical form.

`python scripts/check_list.py train.csv test.csv --root DIR` says which format each list is in and why, counts classes
and lengths, and names each problem. Clips are folders of frames, stills, videos or packed. Of a folder the headers
of the first, middle and last frame are read, of a video the packets; with --decode all is decoded. Exit code: 0 fine,
1 problems found, 2 a list cannot be judged or the command is wrong.
"""

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import EXIT_PROBLEMS, Parser, UserError, begin, in_range, one_line_errors, printable
from dfer.files import check_output, disk_errors, write_whole
from dfer.lists.annotations import EMOTIONS, listed_faces, packed_index, write_annotations
from dfer.lists.checking import (
    Clip,
    PlacedList,
    Problems,
    check_disk,
    find_duplicates,
    hint_at_missing,
    length_bins,
    read_placed,
)
from dfer.lists.contact_sheet import draw_contact_sheet
from dfer.lists.stored import Stored

NAMED = 10  # problems of a kind that are printed
UNWRITABLE = (
    *("missing folders", "missing videos", "missing images", "unreadable folders", "unreadable videos"),
    *("folders without frames", "clips with two labels", "folders and videos in one list"),
    *("clips that are not in the pack", "other labels than in the pack"),
)


def run(args: argparse.Namespace) -> int:
    """Check, print and write, as the command line says."""
    sys.stdout.reconfigure(errors="backslashreplace")
    lists = []
    for number, path in enumerate(args.lists):
        lists.append(read_placed(number, path, args.root, not args.no_disk, args.class_order, args.label_base))
        check_outputs(args, path, args.write if lists[-1].form.canonical else None)
    clips = [clip for placed in lists for clip in placed.clips]
    if args.write and lists[0].pack and args.write.resolve().parent != args.lists[0].resolve().parent:
        raise UserError(f"{args.write}: a list of packed clips has to lie beside its pack, in {args.lists[0].parent}")
    if args.write and args.no_disk and any(clip.row.num_frames is None for clip in clips):
        raise UserError(f"{args.lists[0]}: lacks frame counts: --write needs the frames; drop --no-disk")

    problems: Problems = defaultdict(list)
    problems["damaged rows"] = [line for placed in lists for line in placed.form.problems]
    folders = None
    if not args.no_disk:
        folders, lines = check_disk(lists, args.decode, problems)
        for line in lines:
            print(line)
    find_duplicates(clips, folders, problems)
    lengths = [clip.row.num_frames or 0 for clip in clips] if folders is None else [f.num_frames for f in folders]
    start = 0
    for placed in lists:
        describe(placed, lengths[start : start + len(placed.clips)], args.frames)
        start += len(placed.clips)
    found = {kind: [printable(line) for line in lines] for kind, lines in problems.items() if lines}
    for kind, lines in found.items():
        print(f"{kind}: {len(lines):,}", *lines[:NAMED], sep="\n  ")
        if len(lines) > NAMED:
            print(f"  ... and {len(lines) - NAMED:,} more" + ("" if args.report else " (--report FILE names all)"))
    for i, folder in enumerate(folders or ()):
        if folder.error and folder.error[0].startswith("missing"):
            if hint := hint_at_missing(clips[i], lists[clips[i].number].base):
                print(hint)
            break
    with disk_errors("cannot write"):
        write_outputs(args, lists[0], clips, lengths, folders or [], found)
    total = sum(map(len, found.values()))
    print(f"{total:,} problems in {len(clips):,} clips" if total else f"no problems in {len(clips):,} clips")
    return EXIT_PROBLEMS if total else 0


def check_outputs(args: argparse.Namespace, list_path: Path, replaceable: Path | None) -> None:
    """Check before the work that files can be written, and that only `replaceable` replaces the list.

    Raises:
        UserError: if that is not so.
    """
    paths = [path for path in (args.write, args.picture, args.report) if path]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path}: would be written twice")
        check_output(path)
        if path != replaceable and os.path.exists(path) and os.path.samefile(path, list_path):
            raise UserError(f"{path}: would be overwritten, and --write replaces only canonical lists")


def describe(placed: PlacedList, lengths: Sequence[int], clip_length: int) -> None:
    """Print format, class counts and lengths of a list. `lengths` are in frames, 0 where unknown."""
    clips, form = placed.clips, placed.form
    title = f"{placed.path}: {len(clips):,} clips: {form.name}"
    print(
        printable(title),
        *(f"  because: {printable(line)}" for line in (*form.evidence, placed.remark) if line),
        sep="\n",
    )
    counts = Counter(clip.row.label for clip in clips)
    for label, emotion in enumerate(EMOTIONS):
        print(f"  {label} {emotion:<9}{counts[label]:>8,} {counts[label] / len(clips):>7.1%}")
    lengths = [length for length in lengths if length]
    if not lengths:
        return
    short = sum(length < clip_length for length in lengths)
    middle = sorted(lengths)[len(lengths) // 2]
    print(f"  frames: {min(lengths)} to {max(lengths)}, median {middle}; {short:,} clips shorter than {clip_length}")
    for low, high, number in length_bins(lengths):
        print(f"  {low:>6}..{high:<6}{number:>8,} {'#' * -(-40 * number // len(lengths))}")


def write_outputs(
    args: argparse.Namespace,
    placed: PlacedList,
    clips: Sequence[Clip],
    lengths: Sequence[int],
    folders: Sequence[Stored],
    found: Problems,
) -> None:
    """Write the files that were asked for: the list, as it was `placed`, the picture and the report.

    Raises:
        UserError: if a row cannot stand in a list.
        OSError: if a file cannot be written.
    """
    if args.write and (blocking := [kind for kind in UNWRITABLE if kind in found]):
        print(f"not written: {printable(args.write)}: {', '.join(blocking)}")
    elif args.write:
        root = placed.base if placed.base != os.path.abspath(args.write.parent) else None
        rows = [(clip.name, length, clip.row.label) for clip, length in zip(clips, lengths, strict=True)]
        packed = None if placed.pack is None else packed_index(placed.path)
        write_annotations(args.write, rows, root, packed and packed.name, listed_faces(placed.path))
        print(f"written: {printable(args.write)}")
    if args.picture:
        draw_contact_sheet(args.picture, clips, folders)
    if args.report:
        text = "".join(f"{kind}: {line}\n" for kind, lines in found.items() for line in lines)
        write_whole(args.report, text)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("check_list", __doc__)
    parser.add_argument(
        "lists", nargs="+", type=Path, metavar="LIST", help="list to check, alone and against the others"
    )
    parser.add_argument(
        "--root", type=Path, help="where the paths start (default: as its header says, else the list's folder)"
    )
    parser.add_argument(
        "--label-base", type=int, choices=(0, 1), help="id of the first class, where a list leaves it open"
    )
    parser.add_argument(
        "--class-order", metavar="ORDER", help="dfew, alphabetical, or the seven classes with commas between"
    )
    parser.add_argument(
        "--frames",
        type=in_range(int, 1, 10**6),
        default=16,
        metavar="T",
        help="clips below T frames are counted (default: 16)",
    )
    parser.add_argument("--no-disk", action="store_true", help="judge the lists alone, without the frames")
    parser.add_argument("--decode", action="store_true", help="decode every frame, which takes minutes")
    parser.add_argument(
        "--write", type=Path, metavar="OUT", help="write the list in the canonical form, with the disk's counts"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw a contact sheet with histograms")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write every problem, of which only the first are printed"
    )
    args = parser.parse_args(arguments)
    if args.no_disk and (args.decode or args.picture):
        parser.error("--decode and --picture need the frames: drop --no-disk")
    if args.write and len(args.lists) > 1:
        parser.error("--write takes one list at a time")
    return one_line_errors("check_list", lambda: run(args))


if __name__ == "__main__":
    begin("check_list")
    sys.exit(main())
