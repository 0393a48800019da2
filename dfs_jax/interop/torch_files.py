"""Reads the tensors of PyTorch's files without PyTorch, and without running code from them.

Both formats are pickles: of a zip file since PyTorch 1.6, of a plain file before. A pickle names
the functions that build its objects; only those that tensors and dictionaries need are known here,
and none of PyTorch's own is called.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Element type of each kind of storage.
_TYPES = {
    "BFloat16Storage": jnp.bfloat16,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "ShortStorage": np.int16,
}


def read_torch_file(path: Path) -> Any:
    """Returns what a file of PyTorch holds, its tensors as numpy arrays (bfloat16 as float32).

    Raises:
      pickle.UnpicklingError: the file holds objects other than tensors and plain data.
      ValueError: the file is damaged.
    """
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            return _read_zip(file)
        file.seek(0)
        return _read_legacy(file)


class _Storage(NamedTuple):
    """A storage by its key, whose values are read later."""

    key: str
    dtype: Any


class _Tensor(NamedTuple):
    """A view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Builds plain data, and tensors as `_Tensor`."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TYPES:
            return name
        found = _KNOWN.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"Unsupported global: {module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, *_, last = pid
        is_view = len(pid) == 6 and last is not None
        if kind != "storage" or storage_type not in _TYPES or is_view:
            raise pickle.UnpicklingError(f"Unsupported storage: {pid[:3]}")
        return _Storage(str(key), _TYPES[storage_type])


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, int(offset), tuple(size), tuple(stride))


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = name.removesuffix("data.pkl")
        content = _Unpickler(io.BytesIO(archive.read(name))).load()
        return _filled(content, lambda storage: archive.read(f"{root}data/{storage.key}"))


def _read_legacy(file: BinaryIO) -> Any:
    magic, _, _ = (_Unpickler(file).load() for _ in range(3))
    if magic != _LEGACY_MAGIC:
        raise ValueError("it does not begin as a file of PyTorch does")
    content = _Unpickler(file).load()
    keys = _Unpickler(file).load()
    sizes = {storage.key: np.dtype(storage.dtype).itemsize for storage in _storages(content)}
    found = {}
    for key in map(str, keys):
        (count,) = np.frombuffer(file.read(8), "<i8")
        found[key] = file.read(int(count) * sizes[key])
    return _filled(content, lambda storage: found[storage.key])


def _storages(content: Any) -> list[_Storage]:
    if isinstance(content, _Tensor):
        return [content.storage]
    parts = content.values() if isinstance(content, dict) else content
    return (
        [one for part in parts for one in _storages(part)]
        if isinstance(content, dict | list | tuple)
        else []
    )


def _filled(content: Any, read: Any) -> Any:
    """Returns the content with arrays in place of tensors."""
    if isinstance(content, _Tensor):
        return _array(content, np.frombuffer(read(content.storage), content.storage.dtype))
    if isinstance(content, dict):
        return {key: _filled(value, read) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_filled(value, read) for value in content]
    return content


def _array(tensor: _Tensor, values: np.ndarray) -> np.ndarray:
    shape, strides = tensor.shape, tensor.strides
    last = tensor.offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if math.prod(shape) and not 0 <= tensor.offset <= last < len(values):
        raise ValueError(f"a tensor reads element {last} of {len(values)}")
    steps = [step * values.itemsize for step in strides]
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], shape, steps)
    return view.astype(np.float32) if values.dtype == jnp.bfloat16 else view.copy()
