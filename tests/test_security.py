"""What SECURITY.md says of files that a stranger has made: nothing in them is executed."""

import hashlib
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dfer.lists.annotations import read_annotations
from dfer.lists.hashes import hashes_path
from dfer.lists.index import load_index
from dfer.lists.packed import read_pack
from dfer.run.checkpoint import load_checkpoint
from tests.test_model import started


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def object_array(payload: Payload) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([payload], dtype=object), allow_pickle=True)
    return file.getvalue()


def test_the_payload_works(tmp_path):
    """Or the tests below would show nothing."""
    for number, load in enumerate((pickle.loads, lambda data: np.load(io.BytesIO(data), allow_pickle=True))):
        payload = Payload(tmp_path / str(number))
        load(pickle.dumps(payload) if number == 0 else object_array(payload))
        assert payload.mark.exists()


@pytest.mark.parametrize("form", ["state", "bare pickle", "config", "zip"])
def test_a_checkpoint_executes_nothing(tmp_path, form):
    """Not even with a manifest that vouches for it: whoever forges the one can forge the other."""
    payload, path = Payload(tmp_path / "mark"), tmp_path / "forged.pt"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(payload))
    elif form == "zip":
        path.write_bytes(npz(data=pickle.dumps(payload)))
    else:
        state = {"model": {"x": torch.zeros(1)}, "config": "{}", "optimizer": {}}
        torch.save(state | ({"config": payload} if form == "config" else {"model": {"x": payload}}), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path = path.rename(tmp_path / f"step-00000001-{sha256[:8]}.pt")
    manifest = {"format": 1, "step": 1, "file": path.name, "bytes": path.stat().st_size, "sha256": sha256}
    (tmp_path / "step-00000001.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load_checkpoint(path)
    assert not payload.mark.exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights.npz"])
def test_weights_execute_nothing(tmp_path, name):
    payload = Payload(tmp_path / "mark")
    if name.endswith(".npz"):
        (tmp_path / name).write_bytes(npz(weights=object_array(payload)))
    else:
        torch.save({"state_dict": {"conv1.weight": payload}}, tmp_path / name)
    with pytest.raises(ValueError, match=r"holds pickled Python objects|an archive of NumPy arrays"):
        started(str(tmp_path / name))
    assert not payload.mark.exists()


def test_indexes_packs_and_hashes_execute_nothing(clips):
    list_path, mark = clips / "test.txt", clips / "mark"
    index = load_index(list_path)
    data = npz(**dict.fromkeys(("paths", "states", "names", "format", "clips", "first"), object_array(Payload(mark))))
    cache = Path(f"{list_path}.index.npz")
    assert cache.exists()
    cache.write_bytes(data)
    assert load_index(list_path).store.names == index.store.names  # a cache that is none is made anew
    (clips / "pack.npz").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_pack(clips / "pack.npz")
    hashes_path(list_path).write_bytes(data)
    try:
        with pytest.raises(ValueError, match="damaged"):
            load_index(list_path)
    finally:
        hashes_path(list_path).unlink()
    assert not mark.exists()


def test_the_shards_of_a_pack_lie_beside_it(clips, tmp_path):
    """Names with folders in them lead nowhere else."""
    from scripts import pack  # it loads PyAV, which the other tests here do without

    assert pack.main([str(clips / "test.txt"), "--out", str(tmp_path), "--workers", "1"]) == 0
    with np.load(tmp_path / "test.npz") as found:
        entries = dict(found)
    for name in ("/etc/passwd", "../test-00000.tar", "a/b"):
        np.savez(tmp_path / "test.npz", **entries | {"shards": np.array([name])})
        assert {path.parent for path in read_pack(tmp_path / "test.npz").clips.paths} == {tmp_path}
    for header in ("/etc/x.npz", "../x.npz", "passwd"):
        (tmp_path / "list.txt").write_text(f"# packed: {header}\na 1 0\n")
        assert read_annotations(tmp_path / "list.txt")
        with pytest.raises(ValueError, match=r"no \.npz file beside the list"):
            load_index(tmp_path / "list.txt")
