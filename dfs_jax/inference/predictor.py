"""Early-exit inference for a multi-exit network.

The network is compiled as stages. After each stage the host compares confidences with thresholds.
Confident examples exit; the rest are repacked into one of a few batch shapes.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dfs_jax.inference.answers import (
    AnswerTable,
    BatchPrediction,
    Prediction,
    check_images,
    one_answer,
)
from dfs_jax.inference.identity import check_network
from dfs_jax.inference.pipeline import Counts, Engine, Pipeline
from dfs_jax.inference.policy import ROUNDING, Policy, last_exit_only
from dfs_jax.inference.programs import make_programs
from dfs_jax.inference.single import Single
from dfs_jax.inference.stream import stream_answers
from dfs_jax.inference.timing import StageTimes, measure_stages
from dfs_jax.inference.waiting import Carry
from dfs_jax.types import Example, UserError, check_whole

if TYPE_CHECKING:
    import jax

    from dfs_jax.forks import Fork
    from dfs_jax.inference.stages import Stage
    from dfs_jax.models.contract import MultiExitModel

_ROUNDS_FULL, _ROUNDS_ALONE = 5, 31
_IN_FLIGHT = 16  # full batches


class EarlyExitPredictor:
    """Classifies images, each at the first exit that is confident enough.

    The first call compiles and measures (`warm_up` does so in advance). If the whole network is
    faster under the policy, by the measured times and the exits that examples take, it runs instead
    and the last exit answers. A predictor must not be shared between threads.

    Args:
      stages: functions `(carry) -> (carry, logits)`, shallow first; see `model_stages`. Or the
        stages of an ONNX export.
      example: shape and type of one image, `jax.ShapeDtypeStruct((height, width, channels), ...)`.
      policy: early-exit policy; None for the last exit alone.
      batch_size: size of a full batch.
      shapes: batch sizes that programs are compiled for; None for 1, 4, 16 and the powers of two
        from 32 to `batch_size`. Smaller batches are padded to the next size.
      fall_back: whether the whole network may run instead where it is faster; the policy's
        `falls_back` must also be True.

    Raises:
      UserError: stages that do not fit together, a policy for another number of exits or fitted on
        another network, or shapes that do not ascend to `batch_size`.

    Example: two stages on numbers, of which the first is confident about those far from 0.
      >>> import jax
      >>> stage = lambda x: (x, jax.numpy.concatenate([x, -x], axis=-1))
      >>> one_number = jax.ShapeDtypeStruct((1,), np.float32)
      >>> predictor = EarlyExitPredictor(
      ...     [stage, stage], one_number, Policy((0.9,)), batch_size=4, fall_back=False
      ... )
      >>> predictor(np.array([[3.0], [-0.1], [-2.0]])).exit_index.tolist()
      [0, 1, 0]
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        example: Example,
        policy: Policy | None = None,
        *,
        batch_size: int = 256,
        shapes: Sequence[int] | None = None,
        fall_back: bool = True,
    ):
        check_whole("batch_size", batch_size)
        policy = last_exit_only(len(stages)) if policy is None else policy
        check_network(policy, stages)
        self.programs = make_programs(stages, policy.measure_function, policy.temperatures, example)
        self.shapes = _check_shapes(shapes, batch_size)
        self.times: dict[int, StageTimes] = {}
        self._set_policy(policy, fall_back)

    @classmethod
    def from_model(
        cls,
        model: MultiExitModel,
        variables: dict[str, Any],
        fork: Fork,
        example: Example,
        policy: Policy | None = None,
        *,
        prepare: Callable[[jax.Array], jax.Array] | None = None,
        **options: Any,
    ) -> EarlyExitPredictor:
        """Returns the predictor of a model and its variables (see `model_stages`)."""
        from dfs_jax.inference.stages import model_stages

        stages = model_stages(model, variables, fork, example, prepare=prepare)
        return cls(stages, example, policy, **options)

    def with_policy(self, policy: Policy) -> EarlyExitPredictor:
        """Returns a predictor with another policy and new counts that shares compiled programs.

        Measured times are shared too.

        Raises:
          UserError: a policy with another measure, which is compiled in, or of another network.
        """
        if policy.measure != self.policy.measure:
            raise UserError(
                f"the programs are compiled for the measure {self.policy.measure!r}, not "
                f"{policy.measure!r}: make a new predictor"
            )
        check_network(policy, self.programs.stages)
        predictor = copy.copy(self)
        predictor.programs = self.programs.with_temperatures(policy.temperatures)
        predictor._set_policy(policy, self._fall_back)
        return predictor

    def _set_policy(self, policy: Policy, fall_back: bool) -> None:
        self.policy = policy
        self.counts = Counts(policy.num_exits)
        self._single: Single | None = None
        self._thresholds = policy.all_thresholds()[:-1]
        self._fall_back = fall_back

    @property
    def batch_size(self) -> int:
        """Number of examples in a full batch."""
        return self.shapes[-1]

    def warm_up(self) -> dict[int, StageTimes]:
        """Compiles every program and times the stages, once.

        Returns:
          Times by batch size: 1 and a full batch.
        """
        if not self.times:
            example = self.programs.example
            programs, full = self.programs, self.batch_size
            buffers = [programs.make_buffer(k, full) for k in range(programs.num_exits)]
            for shape in self.shapes:
                carry: Carry = (np.zeros((shape, *example.shape), example.dtype),)
                programs.run_whole(carry[0])
                for k, buffer in enumerate(buffers):
                    # Carries arrive in two forms: repacked, and as the stage before returned them.
                    buffer.put(carry, np.arange(shape), 0)
                    programs.run(k, buffer.first(shape))
                    carry, _ = programs.run(k, carry)
            for batch, rounds in ((1, _ROUNDS_ALONE), (self.batch_size, _ROUNDS_FULL)):
                self.times[batch] = measure_stages(programs, batch, rounds=rounds)
        return self.times

    def __call__(self, images: np.ndarray | Sequence[Any]) -> BatchPrediction:
        """Classifies a batch of any size.

        Args:
          images: array `[n, height, width, channels]`, or list of n images. Images of another
            shape or type, or with pixels that are not finite, are reported in `errors`.
        """
        self.warm_up()
        now = time.perf_counter()
        good, places, errors = check_images(images, self.programs.example)
        if len(places) == 1 and not errors:
            return self._answer_one(good, now)
        table = AnswerTable(len(places) + len(errors), self.programs.classes)
        tickets = table.take(len(places) + len(errors), now)
        for place, reason in errors.items():
            table.fail(place, reason)
        pipeline = self._pipeline(table)
        pipeline.add(good, tickets[places])
        pipeline.finish()
        return table.all()

    def stream(
        self,
        batches: Iterable[Any],
        *,
        max_wait: float | None = 1.0,
        max_in_flight: int | None = None,
    ) -> Iterator[Prediction]:
        """Yields a `Prediction` for every example of every batch, in order, in constant memory.

        Waiting examples of several batches are merged, so that deep stages run full.

        Args:
          batches: iterable of arrays `[n, height, width, channels]` or lists of n images; a
            separate thread reads it, at most two batches ahead.
          max_wait: seconds for which an example waits at a stage for others to fill the batch, as
            long as answers are being taken; None for no limit.
          max_in_flight: maximum number of examples that are read or answered but not yet yielded;
            None for 16 full batches. At the limit, the stage that the earliest example waits for
            runs with a partial batch.

        Raises:
          UserError: numbers out of range. Exceptions of the input are raised after the answers to
            the batches before.
        """
        in_flight = _IN_FLIGHT * self.batch_size if max_in_flight is None else max_in_flight
        check_whole("max_in_flight", in_flight, at_least=self.batch_size)
        if max_wait is not None and not max_wait >= 0:
            raise UserError(f"max_wait must be at least 0 seconds, got {max_wait!r}")
        self.warm_up()
        return stream_answers(
            batches,
            self._pipeline,
            AnswerTable(in_flight, self.programs.classes),
            self.programs.example,
            chunk=self.batch_size,
            max_wait=max_wait,
        )

    def runs_whole(self, batch: int) -> bool:
        """Returns whether the whole network is expected to be faster on a batch of this size."""
        if not (self._fall_back and self.policy.falls_back) or batch not in self.times:
            return False
        shares = self.counts.shares() or self.policy.exit_shares
        if shares is None and all(threshold is None for threshold in self.policy.thresholds):
            shares = (*(0.0 for _ in self.policy.thresholds), 1.0)
        return shares is not None and not self.times[batch].stopping_pays(shares)

    def _pipeline(self, table: AnswerTable) -> Pipeline:
        engine = Engine(
            self.programs,
            self.policy,
            self.shapes,
            functools.partial(self.runs_whole, self.batch_size),
            self.counts,
        )
        return Pipeline(engine, table)

    def _answer_one(self, image: np.ndarray, now: float) -> BatchPrediction:
        """Runs a single example, which needs neither queues nor copies."""
        if self._single is None:
            self._single = self.programs.single()
        single, last = self._single, self.programs.num_exits - 1
        single.start(image)
        if self.runs_whole(1):
            self.counts.whole += 1
            return one_answer(single.run_whole(), last, now)
        for k, threshold in enumerate(self._thresholds):
            answers = single.run(k)
            confidence = float(answers[0, self.programs.classes])
            if abs(confidence - threshold) <= ROUNDING:
                self.counts.close += 1
            if confidence >= threshold:
                break
        else:
            k, answers = last, single.run(last)
        self.counts.exits[k] += 1
        return one_answer(answers, k, now)


def _check_shapes(shapes: Sequence[int] | None, batch_size: int) -> tuple[int, ...]:
    if shapes is None:
        powers = [1, 4, 16, *(2**i for i in range(5, batch_size.bit_length()))]
        return (*(shape for shape in powers if shape < batch_size), batch_size)
    if list(shapes) != sorted({1, *shapes}) or shapes[-1] != batch_size:
        raise UserError(f"shapes must ascend from 1 to batch_size {batch_size}, got {list(shapes)}")
    return tuple(shapes)
