"""Measures the images per second that a config's input delivers, without training.

    python -m benchmarks.input_speed --config=configs/imagenet_vgg16.py --batches=8

`--config.data.num_workers` sets the readers: a number of processes, or with 0 one thread per core.
For comparison it measures the necessary work in one thread, on images in memory: decoding, and a
random crop of the network's size. The second number, where present, is images per second of
processor time, which other programs on the machine affect less.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import flags

from dfs_jax import program
from dfs_jax.data import Dataset, StreamedSplit, TrainSampler, train_batches
from dfs_jax.data.photographs import cut_out, decode_photograph, random_box
from dfs_jax.training.sections import define_config_flag
from dfs_jax.types import Config, UserError

_DECODED_IMAGES = 512


class Speed(NamedTuple):
    """Images per second of wall-clock time, and of this process's processor time."""

    by_clock: float
    by_processor: float


def input_speed(dataset: Dataset, batch_size: int, batches: int) -> Speed:
    """Returns the speed at which training batches arrive, after the first one.

    Raises:
      UserError: fewer than one batch.
    """
    if batches < 1:
        raise UserError(f"batches must be at least 1, got {batches}")
    sampler = TrainSampler(dataset.train.num_examples, batch_size)
    arriving = train_batches(dataset.train, sampler, stop_step=batches + 1)
    next(arriving)  # workers start
    return _timed(lambda: sum(len(labels) for _, labels in itertools.islice(arriving, batches)))


def decoding_speed(split: StreamedSplit, *, cut: bool = False) -> Speed:
    """Returns the speed at which one thread decodes images that are in memory.

    Args:
      split: split whose first images are decoded.
      cut: whether a random crop of the network's size is made of each, without flips.
    """
    records = split.records.read(split.indices[:_DECODED_IMAGES].tolist())
    how, generator = split.streaming, np.random.default_rng(0)

    def is_done(encoded: bytes) -> bool:
        image = decode_photograph(encoded)
        if cut and image is not None:
            height, width, _ = image.shape
            cut_out(image, random_box(generator, height, width, how.crop_area), how.image_size)
        return image is not None

    return _timed(lambda: sum(is_done(encoded) for encoded, _ in records))


def _timed(count_images: Callable[[], int]) -> Speed:
    clock, processor = time.perf_counter(), time.process_time()
    count = count_images()
    seconds = max(time.process_time() - processor, 1e-9)
    return Speed(count / (time.perf_counter() - clock), count / seconds)


def main() -> None:
    """Runs the program."""
    config = define_config_flag("Configuration of the run.")
    batches = flags.DEFINE_integer("batches", 8, "Number of batches to time.")
    flags.mark_flag_as_required("config")
    program.run(lambda: measure(config.value, batches.value))


def measure(config: Config, batches: int) -> None:
    """Prints the speed of a config's input, and that of decoding alone."""
    from dfs_jax.training.input_config import dataset_from_config

    dataset = dataset_from_config(config.data)
    workers = config.data.num_workers or 0
    if isinstance(dataset.train, StreamedSplit):
        speed = decoding_speed(dataset.train)
        program.say(f"decoding alone, one thread: {_line(speed)}")
        speed = decoding_speed(dataset.train, cut=True)
        program.say(f"decoding and cutting alone, one thread: {_line(speed)}")
    speed = input_speed(dataset, config.batch_size, batches)
    if workers:
        program.say(f"input, {workers} worker process(es): {speed.by_clock:.0f} images/s")
    else:
        program.say(f"input, threads of one process: {_line(speed)}")


def _line(speed: Speed) -> str:
    return f"{speed.by_clock:.0f} images/s, {speed.by_processor:.0f} a processor second"


if __name__ == "__main__":
    main()
