"""One training step in PyTorch, from a batch of uint8 images to new weights."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.training_step.torch_exits import TorchNetwork, TorchOutputs
from benchmarks.training_step.torch_msdnet import TorchMSDNet
from benchmarks.training_step.torch_resnet import TorchResNet
from benchmarks.training_step.torch_vgg import TorchVGG
from dfs_jax.data.pipeline import train_batches
from dfs_jax.forks import Fork
from dfs_jax.interop import to_torch_state_dict
from dfs_jax.losses import Loss
from dfs_jax.losses.deep_supervision import DeepSupervision
from dfs_jax.losses.distillation import BYOT
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.models.msdnet import MSDNet
from dfs_jax.models.resnet import ResNet
from dfs_jax.models.vgg import VGG
from dfs_jax.training.experiment import Experiment, initial_state
from dfs_jax.training.optimizer import sgd
from dfs_jax.types import Config, UserError

_NETWORKS: Mapping[type, Callable[[Any, Fork], TorchNetwork]] = {
    VGG: TorchVGG,
    ResNet: TorchResNet,
    MSDNet: TorchMSDNet,
}
_FORMATS = {
    "channels_first": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


class TorchStep:
    """An experiment's training step; see `benchmarks.training_step.step_timing.StepPrograms`.

    With `compute_dtype=bfloat16` the passes run under PyTorch's autocast to bfloat16, which casts
    weights and features and keeps parameters, statistics and losses in float32.

    Args:
      experiment: experiment of the step; its augmentation must be off.
      layout: "channels_first" or "channels_last".
      device: "cpu" or "cuda".
      compile_mode: mode of `torch.compile`; None runs eagerly.

    Raises:
      UserError: a part of the experiment has no counterpart here in PyTorch.
    """

    def __init__(
        self,
        experiment: Experiment,
        layout: str,
        *,
        device: str = "cpu",
        compile_mode: str | None = None,
    ):
        augmentation = experiment.config.data.augmentation
        if augmentation not in (None, "", "none"):
            raise UserError(
                f"the torch peer does not augment, got {augmentation!r}: set it to none"
            )
        self._format, self._device = _FORMATS[layout], torch.device(device)
        network = build_network(experiment.model, experiment.fork)
        network.load_state_dict(_initial_weights(experiment))
        self.network = network.train().to(self._device, memory_format=self._format)  # type: ignore[call-overload]
        self._loss = torch_loss(experiment.loss)
        self._optimizer = _create_optimizer(experiment.config.optimizer, self.network)
        std = torch.tensor(experiment.dataset.std)
        self._scale = (1 / (255 * std))[:, None, None].to(self._device)
        mean = torch.tensor(experiment.dataset.mean)
        self._shift = (mean / std)[:, None, None].to(self._device)
        self._batches = train_batches(experiment.dataset.train, experiment.sampler)
        self.total = torch.zeros((), device=self._device)
        self.correct = torch.zeros(self.network.num_exits, device=self._device)
        self._autocasts = experiment.config.get("compute_dtype") == "bfloat16"
        self._compiled = compile_mode is not None
        self._compute = _compiled(self._passes, compile_mode)
        self.make_batch()

    def make_batch(self) -> None:
        """Loads the next images and labels."""
        images, labels = next(self._batches)
        channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
        images = channels_first.contiguous(memory_format=self._format)
        self._images = images.to(self._device)
        self._labels = torch.from_numpy(labels).long().to(self._device)

    def forward(self) -> tuple[Tensor, TorchOutputs]:
        """Returns the summed losses in training mode, and the network's outputs."""
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        return self._compute(self._images, self._labels)

    def _passes(self, images: Tensor, labels: Tensor) -> tuple[Tensor, TorchOutputs]:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocasts):
            outputs = self.network(images.float() * self._scale - self._shift)
            return self._loss(outputs, labels), outputs

    def forward_backward(self) -> tuple[Tensor, TorchOutputs]:
        """Also computes the gradients."""
        self._optimizer.zero_grad(set_to_none=True)
        total, outputs = self.forward()
        total.backward()
        return total, outputs

    def step(self) -> None:
        """Runs the whole step, and adds to the sums of losses and of correct answers."""
        total, outputs = self.forward_backward()
        self._optimizer.step()
        with torch.no_grad():
            answers = torch.stack(outputs.logits).argmax(dim=-1)
            self.correct += (answers == self._labels).sum(dim=1)
            self.total += len(self._labels) * total


def _compiled(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    """Returns a bound method, compiled as one graph for fixed shapes; unchanged if mode is None.

    It gets its own code object: PyTorch caches compiled programs by code object, and gives up
    after a few instances that share one.
    """
    if mode is None:
        return function
    plain: Any = function.__func__  # type: ignore[attr-defined]
    own = types.FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__)
    bound = functools.partial(own, function.__self__)  # type: ignore[attr-defined]
    return torch.compile(bound, mode=mode, fullgraph=True, dynamic=False)


def build_network(model: MultiExitModel, fork: Fork) -> TorchNetwork:
    """Returns the PyTorch network with a model's family and sizes, forked like `fork`.

    Raises:
      UserError: there is no corresponding network here.
    """
    for family, network in _NETWORKS.items():
        if isinstance(model, family):
            return network(model, fork)
    known = ", ".join(family.__name__ for family in _NETWORKS)
    raise UserError(f"the torch peer has no {type(model).__name__}: only models of {known}")


def torch_loss(loss: Loss) -> Callable[[TorchOutputs, Tensor], Tensor]:
    """Returns our loss in PyTorch: `(outputs, labels) -> summed losses`.

    Raises:
      UserError: it is neither deep supervision nor BYOT.
    """
    if isinstance(loss, BYOT):
        return lambda outputs, labels: _byot(loss, outputs, labels)
    if isinstance(loss, DeepSupervision):
        return lambda outputs, labels: _deep_supervision(loss, outputs, labels)
    raise UserError(f"the torch peer has no loss like {loss}: only deep_supervision and byot")


def _deep_supervision(loss: DeepSupervision, outputs: TorchOutputs, labels: Tensor) -> Tensor:
    entropies = _cross_entropies(outputs, labels, loss.label_smoothing)
    losses = torch.stack(entropies)
    if loss.exit_weights is not None:
        losses = losses * losses.new_tensor(loss.exit_weights)
    return losses.sum()


def _byot(loss: BYOT, outputs: TorchOutputs, labels: Tensor) -> Tensor:
    *early, total = _cross_entropies(outputs, labels, loss.label_smoothing)
    teacher = F.softmax(outputs.logits[-1].detach() / loss.temperature, dim=1)
    for i, entropy in enumerate(early):
        student = F.log_softmax(outputs.logits[i] / loss.temperature, dim=1)
        distillation = -(teacher * student).sum(dim=1).mean()
        total = total + (1 - loss.kd_weight) * entropy + loss.kd_weight * distillation
        if loss.feature_weight:
            distance = outputs.features[i] - outputs.features[-1].detach()
            total = total + loss.feature_weight * torch.linalg.vector_norm(distance)
    return total


def _cross_entropies(outputs: TorchOutputs, labels: Tensor, smoothing: float) -> list[Tensor]:
    return [F.cross_entropy(logits, labels, label_smoothing=smoothing) for logits in outputs.logits]


def _initial_weights(experiment: Experiment) -> dict[str, Tensor]:
    variables = initial_state(experiment).eval_variables
    published = to_torch_state_dict(experiment.model, variables)
    return {name: torch.from_numpy(array.copy()) for name, array in published.items()}


def _create_optimizer(config: Config, network: TorchNetwork) -> torch.optim.Optimizer:
    if config.name != "sgd":
        raise UserError(f"the torch peer has no optimizer {config.name!r}: only sgd")
    given = {key: value for key, value in config.items() if value is not None and key != "name"}
    rate, options = given.pop("learning_rate"), dict(sgd.__kwdefaults__ or {})
    for option in given:
        if option not in options:
            raise UserError(f"the torch peer has no optimizer.{option}: leave it unset")
    # The fused optimizer is PyTorch's fastest.
    return torch.optim.SGD(network.parameters(), rate, **options | given, fused=True)
