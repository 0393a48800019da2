"""Classifies image files, and directories of them, with an exported network.

    python -m dfs_jax.inference.classify DIR IMAGE_OR_DIRECTORY...

Prints the class of each image, the exit that answered (1 is the shallowest), its confidence and the
latency. Directories are searched recursively, and a last line counts their images by class. An
image that cannot be read is reported on its line; the others are classified.
Images of another size are scaled as in training: the shorter side, then a centre crop.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dfs_jax.data.decoding import SUFFIXES
from dfs_jax.data.folder import walk_files
from dfs_jax.data.images import decode_images
from dfs_jax.guard import guarded, run_plain
from dfs_jax.inference.exported import ExportedNetwork, load_exported
from dfs_jax.inference.predictor import EarlyExitPredictor
from dfs_jax.output import say
from dfs_jax.paths import input_directory, local_path, shown
from dfs_jax.types import UserError

_UNREADABLE_STATUS = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 0, or 1 if an image could not be read, or 2 if nothing could."""
    parser = argparse.ArgumentParser(
        prog="python -m dfs_jax.inference.classify",
        description="Classifies image files with an exported network.",
    )
    parser.add_argument("directory", help="directory written by dfs_jax.inference.export")
    parser.add_argument("images", nargs="+", metavar="image", help="image file or directory")
    given = parser.parse_args(arguments)
    return guarded(lambda: classify_all(given.directory, given.images))


def classify_all(directory: str, images: Sequence[str]) -> int:
    """Prints a line for each image and the counts of directories; returns the exit status.

    Args:
      directory: directory of the exported network.
      images: image files, and directories of image files.

    Raises:
      UserError: there is no exported network in `directory`, or a directory without images.
    """
    paths = [found for image in images for found in _image_files(image)]
    network = load_exported(input_directory(directory, "directory"), share_threads=True)
    predictor = network.predictor(batch_size=1)
    predictor.warm_up()
    counts: Counter[str] = Counter()
    unreadable = 0
    for path in paths:
        try:
            label, line = classify(network, predictor, path)
            counts[label] += 1
        except UserError as error:
            unreadable += 1
            line = f"error: {error}"
        say(line)
    if len(paths) > len(images):
        by_class = ", ".join(f"{label} {count}" for label, count in counts.most_common())
        say(f"{len(paths)} images: {by_class or 'none classified'}; {unreadable} unreadable")
    return _UNREADABLE_STATUS if unreadable else 0


def _image_files(path: str) -> list[str | Path]:
    """Returns an image file itself, or the image files of a directory, searched recursively.

    Raises:
      UserError: a directory without images.
    """
    where = local_path(path, "image")
    if not where.is_dir():
        return [path]
    found = [file for file in sorted(walk_files(where)) if file.suffix.lower() in SUFFIXES]
    if not found:
        raise UserError(
            f"the directory {shown(path)} holds no images: they end in "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    return [*found]


def classify(
    network: ExportedNetwork, predictor: EarlyExitPredictor, path: str | Path
) -> tuple[str, str]:
    """Returns the class of an image file, and the line that reports it.

    Raises:
      UserError: the file cannot be read as an image, or the network has no answer for it.
    """
    name = shown(path)
    images = decode_images([local_path(path, "image")], 1, network.image_size, lambda _: name)
    answer = predictor(images)
    for reason in answer.errors.values():
        raise UserError(f"{name} cannot be classified: {reason}")
    label = network.labels[answer.predicted[0]]
    return label, (
        f"{name}: {label}, exit {answer.exit_index[0] + 1}, "
        f"confidence {answer.confidence[0]:.4f}, {1000 * answer.latency[0]:.2f} ms"
    )


if __name__ == "__main__":
    run_plain(main)
