"""Weights for a backbone out of what others have saved: found by their names and shapes, and counted."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfer.cli import UserError
from dfer.run.checkpoint import load_tensors

ENOUGH = 0.95  # of a network's tensors; below it is another network's file

# Renames the tensors of the network's own authors as timm calls them.
Rename = Callable[[dict[str, Any]], dict[str, Any]]


class _Found(NamedTuple):
    """What a dictionary of tensors has for a network."""

    where: str  # the keys that lead to the dictionary
    prefix: str  # before the names of the network's tensors
    tensors: dict[str, Tensor]  # by the network's names
    misshapen: list[str]  # names in the network of those in another shape
    surplus: list[str]  # names in the file of those that lie in the network's own blocks and that it does not have


def load_pretrained(net: nn.Module, path: Path, name: str, rename: Rename | None) -> str:
    """Load the weights that a file, or a folder, has for a network, and return how many in a few words.

    Names may have a prefix (`module.`, `backbone.net.`) and lie in a dictionary of the file ("state_dict"); where
    several fit equally well, averaged weights go first.

    Args:
        net: the network, as a feature extractor of timm.
        path: as of `load_tensors`.
        name: of the network, for messages.
        rename: is tried where names or shapes do not fit; timm's also resizes tables of positions.

    Raises:
        UserError: if fewer than ENOUGH of the network's tensors are in it, if one of them has another shape there, or
            if as many in it have no place in the network.
    """
    dictionaries = list(_dictionaries(load_tensors(path)))
    best = _best(net, dictionaries)
    if rename is not None and (best.misshapen or len(best.tensors) < ENOUGH * len(_names(net))):
        best = max(best, _best(net, _renamed(dictionaries, rename)), key=lambda found: len(found.tensors))
    wanted = list(_names(net).values())
    # Old files have no counts of batches, which are of no consequence.
    if best.tensors and not any(n.endswith("num_batches_tracked") for n in best.tensors):
        wanted = [n for n in wanted if not n.endswith("num_batches_tracked")]
    total, loaded, given = len(wanted), len(best.tensors), len(best.tensors) + len(best.surplus)
    missing = [n for n in wanted if n not in best.tensors and n not in best.misshapen]
    parts = {"missing": missing, "of another shape": best.misshapen, f"which {name} has no place for": best.surplus}
    lacks = "".join(f"; {what}: {_some(names)}" for what, names in parts.items() if names)
    if loaded < ENOUGH * total or loaded < ENOUGH * given or best.misshapen:
        has = _some([n for _, tensors in dictionaries for n in tensors]) or "no tensors by names"
        lacks += f"; it has {has}" * (not loaded)
        raise UserError(
            f"{path}: has {loaded} of the {total} tensors of {name}{lacks}: give weights of {name}, or another backbone"
        )
    if non_finite := [n for n, t in best.tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]:
        raise UserError(f"{path}: its weights are not finite ({_some(non_finite)})")
    net.load_state_dict(best.tensors, strict=False)
    keys = f", as {best.where}{best.prefix}*" if best.where or best.prefix else ""
    return f"{loaded} of {total} tensors of {name} from {path}{keys}{lacks}"


def _names(net: nn.Module) -> dict[str, str]:
    """Return plain name -> name of each tensor: an extractor writes `stages_0` for `stages.0`, or wraps the network."""
    return {_plain(_unwrapped(name)): name for name in net.state_dict()}


def _unwrapped(name: str) -> str:
    return name.removeprefix("model.").removeprefix("body.")


def _plain(name: str) -> str:
    return name.replace(".", "_")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _dictionaries(content: dict[Any, Any], where: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the dictionaries of tensors in a file's content, and where they lie."""
    if tensors := {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}:
        yield where, tensors
    for key, value in content.items():
        if isinstance(value, dict) and depth:
            yield from _dictionaries(value, f"{where}{key}.", depth - 1)


def _renamed(dictionaries: list[tuple[str, dict[str, Tensor]]], rename: Rename) -> list[tuple[str, dict[str, Tensor]]]:
    renamed = []
    for where, tensors in dictionaries:
        with contextlib.suppress(Exception):  # made for the names of one file, it fails at others in any way
            renamed.append((where, {k: v for k, v in rename(dict(tensors)).items() if isinstance(v, Tensor)}))
    return renamed


def _best(net: nn.Module, dictionaries: list[tuple[str, dict[str, Tensor]]]) -> _Found:
    """Return what the dictionary that fits the network best has for it."""
    averaged_first = sorted(dictionaries, key=lambda found: "ema" not in found[0].lower())
    found = [_match(net, where, tensors) for where, tensors in averaged_first]
    return max(found, key=lambda found: len(found.tensors), default=_Found("", "", {}, [], []))


def _match(net: nn.Module, where: str, tensors: dict[str, Tensor]) -> _Found:
    """Return what a dictionary has for a network, under the prefix that most of its names have."""
    names, state = _names(net), net.state_dict()
    prefixes: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        starts = (i for i in range(len(parts)) if "_".join(parts[i:]) in names)
        prefixes.update("".join(f"{part}." for part in parts[:i]) for i in starts)
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    fitting, misshapen, surplus = {}, [], []
    blocks = tuple({f"{_plain(_unwrapped(name).split('.')[0])}_" for name in state})
    for given, tensor in tensors.items():
        plain = _plain(given.removeprefix(prefix))
        name = names.get(plain) if given.startswith(prefix) else None
        if name is None:
            surplus += [given] * (given.startswith(prefix) and plain.startswith(blocks))
        elif tensor.shape == state[name].shape and tensor.is_floating_point() == state[name].is_floating_point():
            fitting[name] = tensor.detach().to(torch.float32) if tensor.is_floating_point() else tensor
        else:
            misshapen.append(name)
    return _Found(where, prefix, fitting, misshapen, surplus)
