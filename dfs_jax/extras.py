"""Packages that `pip install dfs-jax` does not install, and the extra that installs each."""

from __future__ import annotations

import importlib

EXTRAS = {
    "PIL": "data",
    "array_record": "data",
    "cv2": "data",
    "grain": "data",
    "matplotlib": "plots",
    "ml_collections": "train",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "sklearn": "data",
    "tensorboardX": "train",
    "tensorflow_datasets": "data",
    "tqdm": "train",
}


def remedy(module: str | None) -> str | None:
    """Returns a sentence on how to install a missing module; None if no extra has it.

    >>> remedy("matplotlib.figure")
    "matplotlib is not installed: pip install 'dfs-jax[plots]'"
    """
    package = (module or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"{package} is not installed: pip install 'dfs-jax[{EXTRAS[package]}]'"


def require(*packages: str) -> None:
    """Raises a `ModuleNotFoundError` that names the extra of the first missing package."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(remedy(package), name=package) from error
