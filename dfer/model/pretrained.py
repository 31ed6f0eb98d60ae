"""Weights for a network out of what others have saved: found by their names and shapes, and counted."""

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfer.cli import UserError

ENOUGH = 0.95  # of the tensors of a network that others have saved; below it is another network's file

# Renames the tensors of the network's own authors as timm calls them.
Rename = Callable[[dict[str, Any]], dict[str, Any]]


class Found(NamedTuple):
    """What a dictionary of tensors has for a network."""

    where: str  # the keys that lead to the dictionary
    prefix: str  # before the names of the network's tensors
    tensors: dict[str, Tensor]  # by the network's names
    misshapen: dict[str, Tensor]  # those in another shape, by the network's names
    surplus: list[str]  # names in the file of those that lie in the network's own blocks and that it does not have
    beside: list[str]  # and of those under the same prefix that lie in no block of the network


Held = list[tuple[str, dict[str, Tensor]]]  # the dictionaries of tensors in a file, and the keys that lead to each


def held_tensors(content: dict[str, Any]) -> Held:
    """Return the dictionaries of tensors in what `load_tensors` returns, whatever model they are of."""
    return list(_dictionaries(content))


def find_tensors(net: nn.Module, held: Held, rename: Rename | None = None) -> Found:
    """Return what fits a network best: the names may have a prefix (`module.`, `backbone.net.`).

    Where several dictionaries fit equally well, averaged weights go first. `rename` is tried where names or shapes do
    not fit; timm's also resizes tables of positions.
    """
    best = _best(net, held)
    if rename is not None and (best.misshapen or len(best.tensors) < ENOUGH * len(_names(net))):
        best = max(best, _best(net, _renamed(held, rename)), key=lambda found: len(found.tensors))
    return best


def load_found(
    net: nn.Module,
    found: Found,
    held: Held,
    source: str,
    name: str,
    fresh: Collection[str] = (),
    enough: float = ENOUGH,
) -> str:
    """Load what was found for a network, and say in a few words how many tensors that is.

    Args:
        net: the network.
        found: of `find_tensors`.
        held: what it was found in.
        source: where that is from, for messages.
        name: of the network, for messages.
        fresh: names of tensors that are not asked for, and stay as they are.
        enough: the share of the network's tensors that has to be in it, and of those in its blocks there that has to
            have a place in the network.

    Raises:
        UserError: if either share is less, if one of the tensors has another shape there, or if they are not finite.
    """
    wanted = [n for n in _names(net).values() if n not in fresh]
    # Old files have no counts of batches, which are of no consequence.
    if found.tensors and not any(n.endswith("num_batches_tracked") for n in found.tensors):
        wanted = [n for n in wanted if not n.endswith("num_batches_tracked")]
    tensors = {n: tensor for n, tensor in found.tensors.items() if n not in fresh}
    total, loaded, given = len(wanted), len(tensors), len(tensors) + len(found.surplus)
    missing = [n for n in wanted if n not in tensors and n not in found.misshapen]
    misshapen = [n for n in found.misshapen if n not in fresh]
    parts = {"missing": missing, "of another shape": misshapen, f"which {name} has no place for": found.surplus}
    lacks = "".join(f"; {what}: {some(names)}" for what, names in parts.items() if names)
    if loaded < enough * total or loaded < enough * given or misshapen:
        has = some([n for _, tensors in held for n in tensors]) or "no tensors by names"
        lacks += f"; it has {has}" * (not loaded)
        raise UserError(f"{source}: has {loaded} of the {total} tensors of {name}{lacks}")
    if non_finite := [n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]:
        raise UserError(f"{source}: its weights are not finite ({some(non_finite)})")
    net.load_state_dict(tensors, strict=False)
    keys = f", as {found.where}{found.prefix}*" if found.where or found.prefix else ""
    return f"{loaded} of {total} tensors of {name} from {source}{keys}{lacks}"


def _names(net: nn.Module) -> dict[str, str]:
    """Return plain name -> name of each tensor: an extractor writes `stages_0` for `stages.0`, or wraps the network."""
    return {_plain(_unwrapped(name)): name for name in net.state_dict()}


def _unwrapped(name: str) -> str:
    return name.removeprefix("model.").removeprefix("body.")


def _plain(name: str) -> str:
    return name.replace(".", "_")


def some(names: list[str]) -> str:
    """Return the first names in a text, and how many more there are."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _dictionaries(content: dict[Any, Any], where: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the dictionaries of tensors in a file's content, and where they lie."""
    if tensors := {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}:
        yield where, tensors
    for key, value in content.items():
        if isinstance(value, dict) and depth:
            yield from _dictionaries(value, f"{where}{key}.", depth - 1)


def _renamed(held: Held, rename: Rename) -> Held:
    renamed = []
    for where, tensors in held:
        with contextlib.suppress(Exception):  # made for the names of one file, it fails at others in any way
            renamed.append((where, {k: v for k, v in rename(dict(tensors)).items() if isinstance(v, Tensor)}))
    return renamed


def _best(net: nn.Module, held: Held) -> Found:
    """Return what the dictionary that fits the network best has for it."""
    averaged_first = sorted(held, key=lambda found: "ema" not in found[0].lower())
    found = [_match(net, where, tensors) for where, tensors in averaged_first]
    return max(found, key=lambda found: len(found.tensors), default=Found("", "", {}, {}, [], []))


def _match(net: nn.Module, where: str, tensors: dict[str, Tensor]) -> Found:
    """Return what a dictionary has for a network, under the prefix that most of its names have."""
    names, state = _names(net), net.state_dict()
    prefixes: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        starts = (i for i in range(len(parts)) if "_".join(parts[i:]) in names)
        prefixes.update("".join(f"{part}." for part in parts[:i]) for i in starts)
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    fitting, misshapen, surplus, beside = {}, {}, [], []
    blocks = tuple({f"{_plain(_unwrapped(name).split('.')[0])}_" for name in state})
    for given, tensor in tensors.items():
        plain = _plain(given.removeprefix(prefix))
        name = names.get(plain) if given.startswith(prefix) else None
        if name is None:
            if given.startswith(prefix):
                (surplus if plain.startswith(blocks) else beside).append(given)
        elif tensor.is_floating_point() != state[name].is_floating_point():
            misshapen[name] = tensor
        else:
            plainly = tensor.detach().to(torch.float32) if tensor.is_floating_point() else tensor
            (fitting if tensor.shape == state[name].shape else misshapen)[name] = plainly
    return Found(where, prefix, fitting, misshapen, surplus, beside)
