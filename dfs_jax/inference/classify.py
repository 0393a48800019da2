"""Classifies image files with an exported network.

    python -m dfs_jax.inference.classify DIR IMAGE...

Prints a line for each: its class, the exit that answered (1 is the shallowest), how sure it was,
and how long that took. An image that cannot be read is told in its line; the others are answered.
Images of another size are scaled as for training: the shorter side, then the centre is cut out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dfs_jax.data.images import decode_images
from dfs_jax.inference.exported import ExportedNetwork, load_exported
from dfs_jax.inference.predictor import EarlyExitPredictor
from dfs_jax.types import UserError

_USAGE_STATUS, _UNREADABLE_STATUS = 2, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 0, 1 where an image could not be read, 2 where nothing could."""
    parser = argparse.ArgumentParser(
        prog="python -m dfs_jax.inference.classify",
        description="Classifies image files with an exported network.",
    )
    parser.add_argument("directory", type=Path, help="what dfs_jax.inference.export wrote")
    parser.add_argument("images", type=Path, nargs="+", metavar="image", help="an image file")
    given = parser.parse_args(arguments)
    try:
        network = load_exported(given.directory)
        predictor = network.predictor(batch_size=1)
        predictor.warm_up()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return _USAGE_STATUS
    status = 0
    for path in given.images:
        try:
            line = classify(network, predictor, path)
        except UserError as error:
            line, status = f"error: {error}", _UNREADABLE_STATUS
        sys.stdout.write(f"{line}\n")
    return status


def classify(network: ExportedNetwork, predictor: EarlyExitPredictor, path: Path) -> str:
    """Returns what the network says of an image file, in a line.

    Raises:
      UserError: the file cannot be read as an image, or the network has no answer to it.
    """
    images = decode_images([path], 1, network.image_size, lambda _: str(path))
    answer = predictor(images)
    for reason in answer.errors.values():
        raise UserError(f"{path} cannot be classified: {reason}")
    return (
        f"{path}: {network.labels[answer.predicted[0]]}, exit {answer.exit_index[0] + 1}, "
        f"confidence {answer.confidence[0]:.4f}, {1000 * answer.latency[0]:.2f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
