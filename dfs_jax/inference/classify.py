"""Classifies image files with an exported network.

    python -m dfs_jax.inference.classify DIR IMAGE...

Prints a line for each: its class, the exit that answered (1 is the shallowest), how sure it was,
and how long that took. An image that cannot be read is told in its line; the others are answered.
Images of another size are scaled as for training: the shorter side, then the centre is cut out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dfs_jax.data.images import decode_images
from dfs_jax.guard import guarded, run_plain
from dfs_jax.inference.exported import ExportedNetwork, load_exported
from dfs_jax.inference.predictor import EarlyExitPredictor
from dfs_jax.output import say
from dfs_jax.paths import input_directory, local_path, shown
from dfs_jax.types import UserError

_UNREADABLE_STATUS = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 0, 1 where an image could not be read, 2 where nothing could."""
    parser = argparse.ArgumentParser(
        prog="python -m dfs_jax.inference.classify",
        description="Classifies image files with an exported network.",
    )
    parser.add_argument("directory", help="what dfs_jax.inference.export wrote")
    parser.add_argument("images", nargs="+", metavar="image", help="an image file")
    given = parser.parse_args(arguments)
    return guarded(lambda: classify_all(given.directory, given.images))


def classify_all(directory: str, images: Sequence[str]) -> int:
    """Prints a line for each image file; returns the program's status.

    Raises:
      UserError: there is no exported network in the directory.
    """
    network = load_exported(input_directory(directory, "directory"))
    predictor = network.predictor(batch_size=1)
    predictor.warm_up()
    status = 0
    for path in images:
        try:
            line = classify(network, predictor, path)
        except UserError as error:
            line, status = f"error: {error}", _UNREADABLE_STATUS
        say(line)
    return status


def classify(network: ExportedNetwork, predictor: EarlyExitPredictor, path: str | Path) -> str:
    """Returns what the network says of an image file, in a line.

    Raises:
      UserError: the file cannot be read as an image, or the network has no answer to it.
    """
    name = shown(path)
    images = decode_images([local_path(path, "image")], 1, network.image_size, lambda _: name)
    answer = predictor(images)
    for reason in answer.errors.values():
        raise UserError(f"{name} cannot be classified: {reason}")
    return (
        f"{name}: {network.labels[answer.predicted[0]]}, exit {answer.exit_index[0] + 1}, "
        f"confidence {answer.confidence[0]:.4f}, {1000 * answer.latency[0]:.2f} ms"
    )


if __name__ == "__main__":
    run_plain(main)
