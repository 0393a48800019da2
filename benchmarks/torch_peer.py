"""The same training step in PyTorch: `--peer=torch` of `dfs_jax.analysis.training_cost`.

Needs requirements-benchmarks.txt; torch is imported when the peer is made, not with this module.
"""

from __future__ import annotations

import os
from typing import Any

from dfs_jax.analysis.step_timing import StepPrograms
from dfs_jax.data.pipeline import train_batches
from dfs_jax.interop import to_torch_state_dict
from dfs_jax.losses import Loss
from dfs_jax.losses.deep_supervision import DeepSupervision
from dfs_jax.losses.distillation import BYOT
from dfs_jax.training.experiment import Experiment, initial_state
from dfs_jax.types import UserError

# The optimizer's options that the step below has.
_SGD_OPTIONS = {"name", "learning_rate", "weight_decay", "momentum", "nesterov"}


class TorchPeer:
    """PyTorch on the CPU, in eager mode, as it comes; on as many threads as JAX uses.

    Attributes:
      name: of the framework.
      layouts: how images and features may lie in memory.

    Raises:
      UserError: PyTorch is not installed.
    """

    name = "torch"
    layouts = ("channels_first", "channels_last")

    def __init__(self):
        try:
            import torch
        except ImportError as error:
            raise UserError(
                "the torch peer needs PyTorch: pip install -r requirements-benchmarks.txt"
            ) from error
        torch.set_num_threads(len(os.sched_getaffinity(0)))

    def compile_step(self, experiment: Experiment, layout: str) -> StepPrograms:
        """Returns the parts of the experiment's step, its network started from our weights.

        Raises:
          UserError: the experiment has a part that is not written in PyTorch here.
        """
        return _TorchStep(experiment, layout).programs()


class _TorchStep:
    def __init__(self, experiment: Experiment, layout: str):
        import torch

        from benchmarks.torch_networks import build_network

        _check_config(experiment)
        last = layout == "channels_last"
        self._format = torch.channels_last if last else torch.contiguous_format
        self._network = build_network(experiment.model, experiment.fork)
        self._network.load_state_dict(_published_weights(experiment))
        self._network.to(memory_format=self._format).train()  # type: ignore[call-overload]
        self._loss = torch_loss(experiment.loss)
        options = experiment.config.optimizer
        self._optimizer = torch.optim.SGD(
            self._network.parameters(),
            lr=options.learning_rate,
            momentum=0.9 if options.momentum is None else options.momentum,
            nesterov=bool(options.nesterov),
            weight_decay=options.weight_decay or 0.0,
        )
        std = torch.tensor(experiment.dataset.std)
        self._scale = (1 / (255 * std))[:, None, None]
        self._shift = (torch.tensor(experiment.dataset.mean) / std)[:, None, None]
        self._batches = train_batches(experiment.dataset.train, experiment.sampler)
        self._total, self._correct = torch.zeros(()), torch.zeros(experiment.model.num_exits)
        self.make_batch()

    def programs(self) -> StepPrograms:
        return StepPrograms(
            forward=self.forward,
            forward_backward=self.forward_backward,
            step=self.step,
            data=self.make_batch,
        )

    def make_batch(self) -> None:
        import torch

        images, labels = next(self._batches)
        channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
        self._images = channels_first.contiguous(memory_format=self._format)
        self._labels = torch.from_numpy(labels).long()

    def forward(self) -> tuple[Any, Any]:
        outputs = self._network(self._images.float() * self._scale - self._shift)
        return self._loss(outputs, self._labels), outputs

    def forward_backward(self) -> tuple[Any, Any]:
        self._optimizer.zero_grad(set_to_none=True)
        total, outputs = self.forward()
        total.backward()
        return total, outputs

    def step(self) -> None:
        import torch

        total, outputs = self.forward_backward()
        self._optimizer.step()
        with torch.no_grad():
            answers = torch.stack(outputs.logits).argmax(dim=-1)
            self._correct += (answers == self._labels).sum(dim=1)
            self._total += len(self._labels) * total


def torch_loss(loss: Loss):
    """Returns our loss in PyTorch: `(outputs, labels) -> summed losses`.

    Raises:
      UserError: it is neither deep supervision nor BYOT.
    """
    if isinstance(loss, BYOT):
        return lambda outputs, labels: _byot(loss, outputs, labels)
    if isinstance(loss, DeepSupervision):
        return lambda outputs, labels: _deep_supervision(loss, outputs, labels)
    raise UserError(f"the torch peer has no loss like {loss}: it takes deep_supervision and byot")


def _deep_supervision(loss: DeepSupervision, outputs: Any, labels: Any) -> Any:
    entropies = _cross_entropies(outputs, labels, loss.label_smoothing)
    weights = loss.exit_weights or [1.0] * len(entropies)
    return sum(w * entropy for w, entropy in zip(weights, entropies, strict=True))


def _byot(loss: BYOT, outputs: Any, labels: Any) -> Any:
    import torch
    import torch.nn.functional as F

    *early, last = _cross_entropies(outputs, labels, loss.label_smoothing)
    teacher = F.softmax(outputs.logits[-1].detach() / loss.temperature, dim=1)
    total = last + (1 - loss.kd_weight) * sum(early)
    for i in range(len(early)):
        student = F.log_softmax(outputs.logits[i] / loss.temperature, dim=1)
        total = total - loss.kd_weight * (teacher * student).sum(dim=1).mean()
        if loss.feature_weight:
            distance = outputs.features[i] - outputs.features[-1].detach()
            total = total + loss.feature_weight * torch.linalg.vector_norm(distance)
    return total


def _cross_entropies(outputs: Any, labels: Any, smoothing: float) -> list[Any]:
    import torch.nn.functional as F

    return [F.cross_entropy(logits, labels, label_smoothing=smoothing) for logits in outputs.logits]


def _published_weights(experiment: Experiment) -> dict[str, Any]:
    import torch

    state = initial_state(experiment)
    state_dict = to_torch_state_dict(experiment.model, state.eval_variables)
    return {name: torch.from_numpy(array.copy()) for name, array in state_dict.items()}


def _check_config(experiment: Experiment) -> None:
    optimizer, augmentation = experiment.config.optimizer, experiment.config.data.augmentation
    if optimizer.name != "sgd":
        raise UserError(f"the torch peer has no optimizer {optimizer.name!r}: it takes sgd")
    for option, value in optimizer.items():
        if option not in _SGD_OPTIONS and value is not None:
            raise UserError(
                f"the torch peer has no optimizer.{option}, got {value!r}: leave it out"
            )
    if augmentation not in (None, "", "none"):
        raise UserError(f"the torch peer has no augmentation {augmentation!r}: set it to none")
