"""Times whole networks in the runtimes that people use on a CPU, with random weights.

    python -m benchmarks.inference.peers --model=resnet18 --model=vgg7,width=64 --batch=1 --batch=64

    jax              the network with its last head, one program of XLA
    onnx             our export of it, in ONNX Runtime
    onnx stages      our export's stages, all of them one after another
    torch onnx       PyTorch's own export of the same weights, in ONNX Runtime
    torch            PyTorch, channels last

All take turns in random order, of two calls each, and the second is timed. Times are medians, and
the ratio is the median of the ratios to "torch onnx" in the same round (to "onnx" without PyTorch,
see requirements-benchmarks.txt). jax and onnx take uint8 images and normalise them; PyTorch takes
normalised floats. The last column is the largest difference of logits from those of "onnx".
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from dfs_jax import program
from dfs_jax.exits.scores import max_softmax
from dfs_jax.forks import create_fork
from dfs_jax.inference import onnx_models, quantize
from dfs_jax.inference.programs import make_programs
from dfs_jax.inference.stages import model_stages
from dfs_jax.models import create_model
from dfs_jax.models.contract import init_variables
from dfs_jax.stopwatch import seconds_of
from dfs_jax.tables import aligned
from dfs_jax.types import UserError

_CLASSES, _SIDE = 100, 32
TORCH_ONNX = "torch onnx"


def main() -> None:
    """Runs the program."""
    models = flags.DEFINE_multi_string(
        "model", ["vgg7,width=64", "resnet18", "msdnet"], "Model, with options after commas."
    )
    batches = flags.DEFINE_multi_integer("batch", [1, 64], "Batch sizes; may be repeated.")
    rounds = flags.DEFINE_integer("rounds", 15, "Number of rounds that medians are taken over.")

    def run() -> None:
        lines = [("model", "batch", "runtime", "ms", "ratio", "difference")]
        for text in models.value:
            peers = peers_of(*parsed(text))
            for batch in batches.value:
                turns = rounds.value * (10 if batch == 1 else 1)
                lines += [(text, str(batch), *row) for row in timed(peers, batch, turns)]
        program.say(aligned(lines))

    program.run(run)


def parsed(text: str) -> tuple[str, dict[str, int]]:
    """Returns a model's name and options.

    >>> parsed("vgg7,width=64")
    ('vgg7', {'width': 64})
    """
    name, *options = text.split(",")
    try:
        return name, {key: int(value) for key, value in (o.split("=") for o in options)}
    except ValueError as error:
        raise UserError(
            f"--model is a name and whole numbers, such as vgg7,width=64, got {text!r}"
        ) from error


class Peer(NamedTuple):
    """A network in one runtime.

    Attributes:
      run: function from prepared images to logits, the time of which is taken.
      prepare: function from uint8 images to what `run` takes.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[np.ndarray], Any] = lambda images: images


def peers_of(name: str, options: dict[str, int]) -> dict[str, Peer]:
    """Returns a network in every runtime, by name."""
    model, fork = create_model(name, num_classes=_CLASSES, **options), create_fork("dfs")
    shape = (_SIDE, _SIDE, 3)
    variables = init_variables(model, jax.random.key(0), shape)
    example = jax.ShapeDtypeStruct(shape, np.uint8)
    stages = model_stages(model, variables, fork, example, prepare=_normalised)
    compiled = make_programs(stages, max_softmax, (1.0,) * model.num_exits, example)
    ours = quantize.opened(*onnx_models.written(stages, example), share_threads=True)

    def in_turn(images: np.ndarray) -> np.ndarray:
        carry, logits = (images,), np.zeros(0)
        for stage in ours:
            carry, logits = stage(carry)
        return logits

    found = {"jax": compiled.run_whole, "onnx": ours.last_logits, "onnx stages": in_turn}
    own = {name: Peer(run) for name, run in found.items()}
    return {**own, **_of_torch(model, fork, variables)}


def timed(peers: dict[str, Peer], batch: int, rounds: int) -> list[tuple[str, ...]]:
    """Returns a row for each peer: its name, milliseconds, ratio and difference of logits."""
    images = np.random.default_rng(0).integers(0, 256, (batch, _SIDE, _SIDE, 3)).astype(np.uint8)
    runs = {name: functools.partial(c.run, c.prepare(images)) for name, c in peers.items()}
    logits = {name: np.asarray(run()) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    draw = np.random.default_rng(0)
    for _ in range(rounds):
        for name in draw.permutation(list(runs)).tolist():
            run = runs[name]
            run()  # wakes the runtime's threads, which slept while the others computed
            seconds[name].append(seconds_of(run))
    reference = np.array(seconds[TORCH_ONNX if TORCH_ONNX in peers else "onnx"])
    rows = []
    for name in peers:
        ratio = np.median(np.array(seconds[name]) / reference)
        # The programs of jax return probabilities, whose logits have been compared in the tests.
        far = "" if name == "jax" else f"{np.abs(logits[name] - logits['onnx']).max():.1e}"
        rows.append((name, f"{1000 * np.median(seconds[name]):.2f}", f"{ratio:.2f}", far))
    return rows


def _normalised(images: Any) -> Any:
    return images / 127.5 - 1


def _of_torch(model: Any, fork: Any, variables: Any) -> dict[str, Peer]:
    try:
        import torch
    except ImportError:
        return {}
    from benchmarks.inference.torch_network import whole_network

    whole = whole_network(model, fork, variables)
    written, images = io.BytesIO(), torch.zeros(2, 3, _SIDE, _SIDE)
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(
        whole,
        (images,),
        written,
        dynamo=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes=axes,
        opset_version=17,
    )
    from dfs_jax.inference.onnx_stages import OnnxStage

    exported = OnnxStage(written.getvalue(), share_threads=True)
    last = whole.to(memory_format=torch.channels_last)

    def floats(images: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(_normalised(images).transpose(0, 3, 1, 2), np.float32)

    def channels_last(images: np.ndarray) -> Any:
        return torch.from_numpy(floats(images)).to(memory_format=torch.channels_last)

    def eager(images: Any) -> np.ndarray:
        with torch.inference_mode():
            return last(images).numpy()

    return {
        TORCH_ONNX: Peer(lambda images: exported(images)[1], floats),
        "torch": Peer(eager, channels_last),
    }


if __name__ == "__main__":
    main()
