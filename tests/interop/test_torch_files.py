"""PyTorch's files, both formats, read without PyTorch: written here byte by byte."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.interop import load_weights
from dfs_jax.types import UserError

MAGIC = 0x1950A86A20F9469CFC6C
VALUES = np.arange(11, dtype=np.float32) / 7
HALF = np.array([1.5, -2.0, 3.0], jnp.bfloat16)


class Storage:
    def __init__(self, key, kind, count):
        self.key, self.kind, self.count = key, kind, count


class Tensor:
    """Pickled as PyTorch does: a call of a function of its own, with a storage by its key."""

    def __init__(self, storage, offset, shape, strides):
        self.parts = storage, offset, shape, strides

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (*self.parts, False, collections.OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            kind = getattr(sys.modules["torch"], obj.kind)
            return ("storage", kind, obj.key, "cpu", obj.count, *([None] if self.legacy else []))
        return None


def dumped(content, legacy=False):
    buffer = io.BytesIO()
    pickler = Pickler(buffer, protocol=2)
    pickler.legacy = legacy
    pickler.dump(content)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def names_of_pytorch(monkeypatch):
    """Modules under PyTorch's names, so that pickles can refer to them."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "BFloat16Storage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*parts):
        raise AssertionError("code of a file was run")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


def state_dict(offset=1):
    storage, half = Storage("0", "FloatStorage", 11), Storage("1", "BFloat16Storage", 3)
    return collections.OrderedDict(
        {
            "module.weight": Tensor(storage, offset, (2, 5), (5, 1)),
            "module.transposed": Tensor(storage, offset, (5, 2), (1, 5)),
            "module.half": Tensor(half, 0, (3,), (1,)),
            "module.number": Tensor(storage, 3, (), ()),
        }
    )


def write(path, content, legacy):
    if not legacy:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", dumped(content))
            archive.writestr("archive/data/0", VALUES.tobytes())
            archive.writestr("archive/data/1", HALF.tobytes())
        return
    parts = [dumped(x) for x in (MAGIC, 1001, {"little_endian": True})]
    parts += [dumped(content, legacy=True), dumped(["0", "1"])]
    for array in (VALUES, HALF):
        parts += [struct.pack("<q", len(array)), array.tobytes()]
    path.write_bytes(b"".join(parts))


formats = pytest.mark.parametrize("legacy", [False, True])


@formats
def test_tensors_are_views_of_storages(tmp_path, legacy):
    path = tmp_path / "w.pth"
    write(path, {"epoch": 3, "state_dict": state_dict()}, legacy)
    found = load_weights(path)
    np.testing.assert_array_equal(found["weight"], VALUES[1:].reshape(2, 5))
    np.testing.assert_array_equal(found["transposed"], VALUES[1:].reshape(2, 5).T)
    np.testing.assert_array_equal(found["half"], [1.5, -2.0, 3.0])
    assert found["half"].dtype == np.float32
    assert found["number"] == VALUES[3]


@formats
def test_a_tensor_that_reaches_beyond_its_storage_is_damage(tmp_path, legacy):
    path = tmp_path / "w.pth"
    write(path, state_dict(offset=2), legacy)
    with pytest.raises(
        UserError, match=r"is damaged or not a .pth file \(a tensor reads element 11"
    ):
        load_weights(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@formats
def test_code_is_refused_and_never_run(tmp_path, legacy, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "w.pth", {"weight": Evil()}, legacy)
    with pytest.raises(
        UserError, match="holds more than weights, which is not read because it can"
    ):
        load_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [0, 3, 40, 300])
@formats
def test_files_that_end_early(tmp_path, legacy, length):
    path = tmp_path / "w.pth"
    write(path, state_dict(), legacy)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"is damaged or not a \.pth file"):
        load_weights(path)


def test_what_is_no_state_dict(tmp_path):
    write(tmp_path / "w.pth", [1, 2], False)
    with pytest.raises(UserError, match="holds no state_dict that can be found, but list"):
        load_weights(tmp_path / "w.pth")
