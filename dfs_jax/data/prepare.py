"""Downloads a TFDS set and converts it to array_record, the only step that needs TensorFlow.

python -m dfs_jax.data.prepare cifar100 --data_dir=DIR
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dfs_jax.data.tfds_source import (
    DEFAULT_DATA_DIR,
    INFO_FILE,
    check_registered,
    find_prepared,
    prepare_command,
    stored_formats,
    tfds_data_dir,
)
from dfs_jax.guard import guarded, run_plain
from dfs_jax.output import say
from dfs_jax.paths import output_directory
from dfs_jax.types import UserError

_CONNECT_SECONDS = 5
_IMAGENET_ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def prepare(name: str, data_dir: str | None = None) -> Path:
    """Returns the directory of a set in array_record format; downloads or converts it if needed.

    Args:
      name: TFDS name, `NAME[/CONFIG][:VERSION]`.
      data_dir: directory of all sets, created if missing; None for TFDS's default.

    Raises:
      UserError: no TensorFlow, no such set, no network, archives that must be downloaded by hand,
        or a download or conversion that fails.
    """
    check_registered(name)
    root = output_directory(tfds_data_dir(data_dir), "data_dir")
    try:
        directory = find_prepared(name, str(root)) if root.is_dir() else None
        if directory is not None and "array_record" in stored_formats(directory):
            return directory
        _check_tensorflow(name, data_dir)
        root.mkdir(parents=True, exist_ok=True)
        if directory is None:
            return _download(name, root)
        _convert(directory)
        return directory
    except OSError as error:
        raise UserError(f"cannot prepare {name!r} in {root}: {error}") from error


def _check_tensorflow(name: str, data_dir: str | None) -> None:
    if importlib.util.find_spec("tensorflow") is not None:
        return
    by_hand = f"{_imagenet_by_hand(tfds_data_dir(data_dir))}; then " if _is_imagenet(name) else ""
    raise UserError(
        f"preparing {name!r} needs TensorFlow: {by_hand}run `pip install -r "
        f"requirements-prepare.txt` (training does not need it) and "
        f"`{prepare_command(name, data_dir)}`"
    )


def _download(name: str, root: Path) -> Path:
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    builder: Any = tfds.builder(name, data_dir=str(root), file_format="array_record")
    downloads = root / "downloads"
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        _check_manual_archives(name, downloads / "manual", builder.MANUAL_DOWNLOAD_INSTRUCTIONS)
    else:
        _check_reachable(name, builder.url_infos or {}, downloads)
    # TFDS's ready-made copies are tfrecord files, so they are not used.
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(download_dir=str(downloads), download_config=config)
    except (
        requests.RequestException,
        tfds.download.DownloadError,
        NonMatchingChecksumError,
    ) as error:
        raise UserError(f"the download of {name!r} failed: {error}") from error
    return Path(builder.data_path)


def _convert(directory: Path) -> None:
    """Writes array_record files next to a set's tfrecord files (TFDS's converter needs Beam)."""
    import tensorflow as tf  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
    from array_record.python.array_record_module import ArrayRecordWriter

    for source in sorted(directory.glob("*.tfrecord-*")):
        target = source.with_name(source.name.replace(".tfrecord-", ".array_record-"))
        writer = ArrayRecordWriter(str(target), "group_size:1")
        for record in tf.data.TFRecordDataset(str(source)).as_numpy_iterator():
            writer.write(record)
        writer.close()
    # Last, so that an interrupted conversion is not mistaken for a finished one.
    info_file = directory / INFO_FILE
    info = json.loads(info_file.read_text())
    info["alternativeFileFormats"] = [*info.get("alternativeFileFormats", []), "array_record"]
    info_file.write_text(json.dumps(info, indent=2))


def _is_imagenet(name: str) -> bool:
    return name.partition(":")[0] == "imagenet2012"


def _imagenet_by_hand(root: Path) -> str:
    """Returns the manual step: registration and the archives to download."""
    archives = " (138 GB) and ".join(_IMAGENET_ARCHIVES)
    return f"register at image-net.org, put {archives} (6 GB) into {root / 'downloads' / 'manual'}"


def _check_manual_archives(name: str, manual: Path, instructions: str) -> None:
    if _is_imagenet(name):
        missing = [archive for archive in _IMAGENET_ARCHIVES if not (manual / archive).is_file()]
        if missing:
            raise UserError(
                f"{name!r} has to be downloaded by hand: register at image-net.org, put "
                f"{' and '.join(missing)} into {manual} and run this again"
            )
    elif not manual.is_dir() or not any(manual.iterdir()):
        raise UserError(
            f"{name!r} has to be downloaded by hand into {manual}: {' '.join(instructions.split())}"
        )


def _check_reachable(name: str, urls: Iterable[str], downloads: Path) -> None:
    """Raises UserError if a server cannot be reached; TFDS itself would retry for minutes."""
    missing = [url for url in urls if url not in _downloaded(downloads)]
    if not missing:
        return
    request = urllib.request.Request(missing[0], method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        # The server answers; if it refuses, the download reports that.
        return
    except OSError as error:
        raise UserError(
            f"cannot download {name!r}: {missing[0]} cannot be reached ({error}); run "
            f"`{prepare_command(name, str(downloads.parent))}` on a machine with a network and "
            f"copy the directory"
        ) from error


def _downloaded(downloads: Path) -> set[str]:
    """Returns the addresses that TFDS has recorded next to its finished downloads."""
    return {
        url for note in downloads.glob("*.INFO") for url in json.loads(note.read_text())["urls"]
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dfs_jax.data.prepare", description=__doc__)
    parser.add_argument("name", help="a TFDS name, such as cifar10, cifar100, imagenet2012")
    parser.add_argument(
        "--data_dir", help=f"directory of all sets ($TFDS_DATA_DIR or {DEFAULT_DATA_DIR})"
    )
    options = parser.parse_args(arguments)

    def run() -> None:
        say(f"{options.name} is ready in {prepare(options.name, options.data_dir)}")

    return guarded(run)


if __name__ == "__main__":
    run_plain(main)
