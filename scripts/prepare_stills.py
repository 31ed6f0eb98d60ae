"""Write lists of labelled images as clips of one frame, to train on before clips: `python scripts/prepare_stills.py`.

`--root DIR --out lists/NAME` takes a tree of folders of emotions, DIR/train/happy/1.jpg and DIR/test/..., as FER2013 is
handed out, or RAF-DB with its list_patition_label.txt, and writes lists/NAME/train.txt, test.txt ... The images stay
where they are. Every header is read. Exit code: 0 done, 2 something is to be changed, which one line says.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import Parser, UserError, begin, one_line_errors, printable
from dfer.lists import releases
from dfer.lists.annotations import EMOTIONS
from dfer.lists.orders import parse_order
from dfer.lists.stills import ClassIds, find_stills, scan_still


def run(args: argparse.Namespace) -> None:
    """Find, check and write, as the command line says."""
    classes = parse_order(args.class_order, "--class-order") if args.class_order else ()
    if args.label_base is not None and not classes:
        raise UserError("--label-base: say with --class-order what the ids stand for")
    found = find_stills(args.root, ClassIds(classes, args.label_base or 0), args.leave_out)
    print(f"images: {printable(found.root)}", *found.notes, sep="\n")
    names = [name for rows in found.lists.values() for name, _ in rows]
    scans = releases.scan_clips(found.root, names, scan_still)
    bad = releases.bad_clips(scans)
    if bad and not args.allow_missing:
        raise UserError(
            f"{'; '.join(bad)}; nothing was written: --allow-missing leaves them out, and names them beside the lists"
        )
    for line in bad:
        print(line)
    releases.write_lists(args.out, found.root, found.lists, scans)
    for name, rows in found.lists.items():
        counts = Counter(label for image, label in rows if not scans[image].problem)
        classes = ", ".join(f"{emotion} {counts[label]:,}" for label, emotion in enumerate(EMOTIONS))
        print(f"{printable(args.out / name)}.txt: {counts.total():,} images ({classes})")
    print("train on them with --data.num-segments 1; then on clips with --model.init RUN (docs/weights.md)")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("prepare_stills", __doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds the images, however deep")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the lists to")
    parser.add_argument("--class-order", help="of folders called by numbers: dfew, alphabetical, or seven classes")
    parser.add_argument("--label-base", type=int, choices=(0, 1), help="the number of the first class (0)")
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="FOLDER", help="further classes, not taken")
    parser.add_argument("--allow-missing", action="store_true", help="leave out images that cannot be read")
    args = parser.parse_args(arguments)
    return one_line_errors("prepare_stills", lambda: run(args))


if __name__ == "__main__":
    begin("prepare_stills")
    sys.exit(main())
