"""Evaluate a checkpoint on a list: `python scripts/evaluate.py CHECKPOINT [--list LIST] [--root DIR] [--out FILE.csv]`.

Works under torchrun too; every clip counts exactly once whatever the number of processes.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import begin

if __name__ == "__main__":
    begin("evaluate", "torch, DALI and timm")
from dfer.cli import Parser, UserError, in_range, one_line_errors, progress, say_once
from dfer.config import Config, RunConfig, config_from_json
from dfer.evaluation import Watch, evaluate
from dfer.files import check_output
from dfer.lists.index import ClipIndex, load_index
from dfer.precision import build_precision
from dfer.run import distributed
from dfer.run.algorithms import chosen_algorithms
from dfer.run.checkpoint import load_checkpoint
from dfer.run.distributed import World
from dfer.run.graph import build_graphs
from dfer.run.logger import print_result
from dfer.run.predictions import write_predictions
from dfer.run.resolving import evaluated
from dfer.run.step import captured_evaluation, ready_to_evaluate
from dfer.state import load_trained


def run(args: argparse.Namespace) -> None:
    """Evaluate the checkpoint and print, and write, what was found."""
    if args.out:
        check_output(args.out)
    state = load_checkpoint(args.checkpoint)
    if "exported" in state and args.list is None:
        raise UserError(f"{args.checkpoint}: an exported model does not say what it is to be evaluated on: give --list")
    config = evaluated_config(config_from_json(state["config"], source=args.checkpoint), args)
    data = config.data
    index = load_index(data.val_list, data.root, data.source)
    world = distributed.setup(config.run.device)
    on_gpu = world.device.type == "cuda"
    with chosen_algorithms(config.run) if on_gpu else contextlib.nullcontext():  # on a CPU it would choose the threads
        evaluate_all(state, config, index, world, args)


def evaluate_all(
    state: dict[str, Any], config: Config, index: ClipIndex, world: World, args: argparse.Namespace
) -> None:
    """Evaluate a checkpoint for each number of segments."""
    from dali_pipes.build import build_loader  # DALI and numba, which a wrong command need not wait for

    data = config.data
    precision = build_precision(config.run, world.device)
    model = load_trained(state, config).to(world.device)
    for note in ready_to_evaluate(model, config.run, precision, world):
        say_once(note)
    watch: Watch = functools.partial(progress, what="batches", to_stderr=True, quiet_s=5)
    told = {"watch": watch} if world.is_main else {}
    for segments in args.segments or [data.num_segments]:
        # The clips are cut otherwise, and the model stays that of training: it takes any number of frames.
        cut = dataclasses.replace(config, data=dataclasses.replace(data, num_segments=segments))
        loader = build_loader(cut, index, "eval", world)
        graphs = build_graphs(config.run, world).beside()
        with contextlib.closing(graphs):
            predict = captured_evaluation(model, precision, graphs)
            result = evaluate(model, loader, world, precision, **told, predict=predict)
        assert result is not None, "nothing can stop it"
        if note := graphs.take_note():
            say_once(note)
        if not world.is_main:
            continue
        if args.out:  # first: what is kept does not depend on who listens
            write_predictions(args.out, index, result.ids, result.probabilities)
        print_result(
            f"{args.checkpoint} on {data.val_list}" + f", {segments} segments" * bool(args.segments), result.confusion
        )
        if args.json:
            numbers = {"WAR": result.confusion.war(), "UAR": result.confusion.uar(), "clips": result.confusion.total()}
            numbers |= {"segments": segments, "confusion": result.confusion.counts.tolist()}
            print(json.dumps(numbers))


def evaluated_config(config: Config, args: argparse.Namespace) -> Config:
    """Return a run's configuration with what the command line changes of it.

    The run's own list is read as the run reads it. Another list may be of another source, and is taken for what it is.
    """
    data = dataclasses.replace(
        config.data,
        val_list=args.list or config.data.val_list,
        root=args.root or (None if args.list else config.data.root),
        source="auto" if args.list else config.data.source,
        cache="off",  # each clip is read once, from whatever this list points at
        # No engine, which might mix pixels (docs/LOG.md).
        jpeg_decoder="sms" if config.data.jpeg_decoder in ("engine", "mixed") else config.data.jpeg_decoder,
        video_decoder="cores" if config.preset == "exported" else config.data.video_decoder,  # its file names none
        batch_size=args.batch_size or config.data.batch_size,
        views=args.views or config.data.views,
        mirror_views=config.data.mirror_views if args.mirror_views is None else args.mirror_views,
    )
    return evaluated(dataclasses.replace(config, data=data), args.device, args.amp)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("evaluate", __doc__)
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a run's folder (its last checkpoint), its best_WAR.safetensors, a .pt of its checkpoints/, an export, or "
        "hf:ORG/NAME",
    )
    parser.add_argument("--list", type=Path, help="annotation list; the run's validation list if not given")
    parser.add_argument("--root", type=Path, help="where relative paths in the list start")
    parser.add_argument("--batch-size", type=in_range(int, 1, 65536), help="clips per process; the run's if not given")
    parser.add_argument(
        "--segments",
        type=in_range(int, 1, 1024),
        nargs="+",
        metavar="N",
        help="segments that a video is cut into, one number after the other; the run's if not given",
    )
    parser.add_argument(
        "--views", type=in_range(int, 1, 64), help="clips of a video to average; the run's if not given"
    )
    parser.add_argument(
        "--mirror-views", action=argparse.BooleanOptionalAction, help="and their mirror images; the run's if not given"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default=RunConfig.device)
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), help="the run's if not given")
    parser.add_argument("--out", type=Path, help="write predictions.csv here")
    parser.add_argument("--json", action="store_true", help="print the numbers as a line of JSON at the end")
    args = parser.parse_args(arguments)
    if args.out and args.segments and len(args.segments) > 1:
        parser.error("--out: takes the predictions of one number of --segments")
    return one_line_errors("evaluate", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
