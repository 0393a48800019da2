"""Stages of a network as ONNX files, in ONNX Runtime: numpy and onnxruntime are enough.

By default each stage has a pool of threads, which sleep while another stage computes; spinning, as
ONNX Runtime has them do, they would take the cores from it. One pool that all stages share is
faster, for single images by a quarter, but belongs to the whole process: every other session in it
must then be made with `use_per_session_threads=False`. Programs of this package share.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dfs_jax.extras import require
from dfs_jax.inference.waiting import Carry
from dfs_jax.types import ArrayShape, UserError

_TYPES = {
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}


class OnnxStage:
    """One stage: `(carry) -> (carry, logits)`, with carries as tuples of numpy arrays.

    Args:
      model: bytes of the ONNX model, whose first output is the logits.
      providers: execution providers of ONNX Runtime; None for the CPU.
      share_threads: whether to use the pool of threads of the process, see above.

    Attributes:
      names: names of the inputs.

    Raises:
      UserError: bytes that ONNX Runtime does not accept, or a provider that it lacks.
    """

    def __init__(
        self,
        model: bytes,
        providers: Sequence[str] | None = None,
        *,
        share_threads: bool = False,
    ):
        wanted = tuple(providers or ("CPUExecutionProvider",))
        self._session = _session(model, wanted, share_threads or is_shared())
        self.names = [x.name for x in self._session.get_inputs()]
        types = sorted({x.type for x in self._session.get_inputs()} - {*_TYPES})
        if types:
            raise UserError(
                f"the model reads {', '.join(types)}, which no stage does: export again"
            )

    @property
    def carry(self) -> tuple[ArrayShape, ...]:
        """Shapes and types of the input for one example, without the batch."""
        return tuple(
            ArrayShape(tuple(x.shape[1:]), np.dtype(_TYPES[x.type]))
            for x in self._session.get_inputs()
        )

    def __call__(self, carry: Any) -> tuple[Carry, np.ndarray]:
        """Returns the next stage's carry and the logits `[batch, classes]`.

        Args:
          carry: images, or the carry of the stage before.
        """
        arrays = carry if isinstance(carry, tuple) else (carry,)
        logits, *following = self._session.run(None, dict(zip(self.names, arrays, strict=True)))
        return tuple(following), logits

    def bound(self, inputs: tuple[np.ndarray, ...]) -> BoundStage:
        """Returns the stage bound to arrays that it reads in every call."""
        return BoundStage(self._session, inputs)


class BoundStage:
    """A stage whose session reads and writes arrays that are made once.

    Args:
      session: session of ONNX Runtime.
      inputs: arrays that it reads, in the order of its inputs.

    Attributes:
      carry: arrays that the next stage reads.
    """

    def __init__(self, session: Any, inputs: tuple[np.ndarray, ...]):
        feeds = dict(zip((x.name for x in session.get_inputs()), inputs, strict=True))
        outputs = [np.ascontiguousarray(x) for x in session.run(None, feeds)]
        self._logits, *carry = outputs
        self.carry = tuple(carry)
        self._session, self._inputs, self._binding = session, inputs, session.io_binding()
        for name, x in feeds.items():
            self._binding.bind_input(name, "cpu", 0, x.dtype.type, x.shape, x.ctypes.data)
        for node, x in zip(session.get_outputs(), outputs, strict=True):
            self._binding.bind_output(node.name, "cpu", 0, x.dtype.type, x.shape, x.ctypes.data)

    def __call__(self) -> np.ndarray:
        """Runs the stage; returns its array of logits, which the next call overwrites."""
        self._session.run_with_iobinding(self._binding)
        return self._logits


class OnnxStages(tuple):
    """The stages of a network, shallow first.

    Attributes:
      whole: the network as one model with the last head alone, a stage without a carry; None for
        a part of a network.
      fingerprint: checksum of the network, which a policy's record names.
    """

    whole: OnnxStage | None
    fingerprint: str | None

    def __new__(
        cls,
        stages: Iterable[OnnxStage],
        *,
        whole: OnnxStage | None = None,
        fingerprint: str | None = None,
    ) -> OnnxStages:
        made = super().__new__(cls, stages)
        made.whole, made.fingerprint = whole, fingerprint
        return made

    def last_logits(self, images: np.ndarray) -> np.ndarray:
        """Returns the last exit's logits, `[batch, classes]`."""
        if self.whole is not None:
            return self.whole(images)[1]
        carry, logits = (images,), np.zeros(0)
        for stage in self:
            carry, logits = stage(carry)
        return logits


def recorded_onnx(
    stages: OnnxStages, batches: Iterable[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Runs every exit on many images and returns logits `[exits, n, classes]` float32.

    Args:
      stages: the stages.
      batches: pairs of images and masks `[batch]` bool, False for padding.
    """
    parts = []
    for images, mask in batches:
        carry, found = (images,), []
        for stage in stages:
            carry, logits = stage(carry)
            found.append(logits[mask])
        parts.append(np.stack(found))
    return np.concatenate(parts, axis=1).astype(np.float32)


def _session(model: bytes, providers: tuple[str, ...], share_threads: bool) -> Any:
    require("onnxruntime")
    import onnxruntime

    known = onnxruntime.get_available_providers()
    if {*providers} - {*known}:
        raise UserError(
            f"this onnxruntime has no {', '.join(sorted({*providers} - {*known}))}: it has "
            f"{', '.join(known)}"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if share_threads:
        share_threads_of_process()
        options.use_per_session_threads = False
    else:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model, options, providers=list(providers))
    except Exception as error:  # its exceptions share no base but this
        text = " ".join(str(error).split())
        raise UserError(f"ONNX Runtime does not accept the model: {text:.300}") from error


@functools.cache
def share_threads_of_process() -> None:
    """Makes the pool of threads of this process, one thread a core."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(0, 1)


def is_shared() -> bool:
    """Returns whether the process has its pool already, which every session must then use."""
    return share_threads_of_process.cache_info().currsize > 0
