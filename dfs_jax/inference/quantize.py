"""Networks in int8, by ONNX Runtime's static quantisation.

Activations are quantised to 8 bits, with the range of 99.99 % of their values on calibration
images: outliers would widen it. Weights have a scale for each channel, and 7 bits unless 8 are
asked for: with 8, sums of two products overflow on processors without VNNI. The last layer of each
head stays in float. Stages hand on their carries in 8 bits. Quantisation changes confidences, so
the policy is fitted again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfs_jax.extras import require
from dfs_jax.inference import onnx_stages
from dfs_jax.inference.int8_carries import with_int8_carries
from dfs_jax.inference.onnx_models import WHOLE
from dfs_jax.inference.onnx_stages import OnnxStage, OnnxStages
from dfs_jax.types import UserError

_BATCH = 32
_PERCENTILE = 99.99


def quantized(
    contents: Mapping[str, bytes],
    about: Mapping[str, Any],
    images: np.ndarray,
    *,
    weight_bits: int = 7,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Returns the models of `onnx_models.written` in int8, and their description for the manifest.

    Args:
      contents: models in float32, by name.
      about: their description for the manifest.
      images: images to find the ranges of activations on, `[n, height, width, channels]`.
      weight_bits: bits of a weight, 7, or 8 for processors with VNNI.

    Raises:
      UserError: another number of bits, or networks of this process share their threads.
    """
    check_weight_bits(weight_bits)
    require("onnx", "onnxruntime")
    if onnx_stages.is_shared():
        raise UserError(
            "networks in this process share their threads, which calibration cannot: export in a "
            "process of its own"
        )
    inputs = _batches(images)
    run = functools.partial(_quantized, weight_bits=weight_bits)
    whole, names, stages = run(contents[WHOLE], ["images"], inputs), [], []
    for entry in about["stages"]:
        names.append(entry["file"])
        stage = OnnxStage(contents[names[-1]])
        stages.append(run(contents[names[-1]], stage.names, inputs))
        inputs = [stage(carry)[0] for carry in inputs]
    found = dict(zip(names, with_int8_carries(stages), strict=True)) | {WHOLE: whole}
    checksum = hashlib.sha256(b"".join(content for _, content in sorted(found.items())))
    described = {
        "precision": "int8",
        "weight_bits": weight_bits,
        "fingerprint": checksum.hexdigest(),
    }
    return {name: found[name] for name in contents}, {**about, **described}


def check_weight_bits(bits: int) -> None:
    """Raises a UserError for another number of bits than 7 or 8."""
    if bits not in (7, 8):
        raise UserError(f"weight_bits must be 7 or 8, got {bits!r}")


def opened(
    contents: Mapping[str, bytes], about: Mapping[str, Any], *, share_threads: bool = False
) -> OnnxStages:
    """Returns models as stages that run."""
    stage = functools.partial(OnnxStage, share_threads=share_threads)
    return OnnxStages(
        [stage(contents[entry["file"]]) for entry in about["stages"]],
        whole=stage(contents[WHOLE]),
        fingerprint=about["fingerprint"],
    )


def _batches(images: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    return [(images[at : at + _BATCH],) for at in range(0, len(images), _BATCH)]


def _quantized(
    model: bytes,
    names: Sequence[str],
    inputs: Sequence[tuple[np.ndarray, ...]],
    *,
    weight_bits: int,
) -> bytes:
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        """Batch by batch: values of a batch are counted before those of the next are computed."""

        def __len__(self) -> int:
            return len(inputs)

        def set_range(self, start_index: int, end_index: int) -> None:
            self._feeds = (
                dict(zip(names, arrays, strict=True)) for arrays in inputs[start_index:end_index]
            )

        def get_next(self) -> Any:
            return next(self._feeds, None)

    loaded = onnx.load_from_string(model)
    _without_normalisation(loaded.graph)
    kept = [node.name for node in loaded.graph.node if "logits" in node.output]
    with tempfile.TemporaryDirectory() as directory:
        before, after = Path(directory) / "float.onnx", Path(directory) / "int8.onnx"
        onnx.save(loaded, before)
        with _quietly():
            quantization.quantize_static(
                before,
                after,
                Reader(),
                calibrate_method=quantization.CalibrationMethod.Percentile,
                extra_options={"CalibPercentile": _PERCENTILE, "CalibStridedMinMax": 1},
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                reduce_range=weight_bits == 7,
                nodes_to_exclude=kept,
            )
        return after.read_bytes()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Drops what the quantiser prints of its progress, and its advice to do what has been done."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)


def _without_normalisation(graph: Any) -> None:
    """Turns each `BatchNormalization` into a 1x1 convolution of each channel, which int8 has."""
    from onnx import helper, numpy_helper

    known = {x.name: x for x in graph.initializer}
    for k, node in enumerate(list(graph.node)):
        if node.op_type != "BatchNormalization":
            continue
        scale = numpy_helper.to_array(known[node.input[1]])
        name = f"{node.name}_weights"
        graph.initializer.append(numpy_helper.from_array(scale.reshape(-1, 1, 1, 1), name))
        inputs = [node.input[0], name, node.input[2]]
        conv = helper.make_node(
            "Conv", inputs, node.output, node.name, group=len(scale), kernel_shape=[1, 1]
        )
        graph.node.remove(node)
        graph.node.insert(k, conv)
    used = {name for node in graph.node for name in node.input}
    for unused in [x for x in graph.initializer if x.name not in used]:
        graph.initializer.remove(unused)
