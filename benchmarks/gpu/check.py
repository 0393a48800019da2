"""Stage `check`: compares this device's results with the CPU's and with the published code's.

- Every golden file in float64, forward and backward, like `python -m dfs_jax.interop check`.
- The gradients of every registered model, at small width, against the CPU's in the same process:
  in float64 they must agree; in float32 and bfloat16 the difference is recorded.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.accuracy.results import DIRECTORY
from benchmarks.gpu.clock import Expected
from benchmarks.gpu.session import Session
from dfs_jax.forks import create_fork
from dfs_jax.interop.__main__ import TOLERANCE
from dfs_jax.interop.golden import NEGLIGIBLE, compare, compute, read_golden
from dfs_jax.losses import create_loss
from dfs_jax.models import MODELS, create_model
from dfs_jax.models.contract import MultiExitModel, init_variables
from dfs_jax.program import say
from dfs_jax.tracing.cpu import compiler_options
from dfs_jax.types import PyTree, UserError

FIXTURES = DIRECTORY.parent.parent / "tests" / "fixtures"
FIRST = ("vgg7", "resnet18", "msdnet_cifar100")  # models of the published tables
CLASSES, BATCH, BETA = 7, 4, 0.5
_NARROW: dict[str, dict[str, Any]] = {
    "efficientnet": {"width": 4, "head_width": 8, "exits": (2, 5)},
    "vgg": {"width": 4},
    "resnet": {"width": 4},
    "msdnet": {"growth": 2, "initial_channels": 4, "base": 1, "step": 1},
    "vit": {"width": 12, "depth": 3, "heads": 3, "patch_size": 8, "first_exit_layer": 1},
}
_GUESS_S = 45.0


class Case(NamedTuple):
    """A model whose gradients are compared, and its type."""

    model: str
    dtype: str


def run(session: Session) -> int:
    """Runs checks without a record; returns 1 if any failed, else 0."""
    jax.config.update("jax_enable_x64", True)
    expected, failed = Expected(2.0 if session.rehearses else _GUESS_S), 0
    work = [
        *((f"golden/{path.name}", functools.partial(_golden, path)) for path in _files(session)),
        *(
            (f"gradients/{c.model}/{c.dtype}", functools.partial(_gradients, c))
            for c in _cases(session)
        ),
    ]
    for name, check in work:
        unit = session.unit(name)
        record = session.known(unit)
        if record is None:
            if not session.clock.allows(expected.seconds):
                say(
                    f"{session.clock.left():.0f} s are left: {name} and what follows is not checked"
                )
                break
            try:
                with expected.timed(session.clock):
                    record = check()
            except Exception as error:
                session.fail(unit, error)
                failed += 1
                continue
            session.keep(unit, {**record, "complete": record["passes"]})  # a failure is repeated
        failed += not record["passes"]
        worst = max(record["differences"].values())
        say(f"{name:50} {worst:8.1e}  {'ok' if record['passes'] else 'FAILS'}")
    return 1 if failed else 0


def _files(session: Session) -> list[Path]:
    """Returns the golden files of the tests, then those given by the flag."""
    found = sorted(FIXTURES.glob("*.json.gz"))
    for given in map(Path, flags.FLAGS.golden):
        if not given.exists():
            raise UserError(f"there is no golden file or directory {given}: check --golden")
        found += sorted(given.glob("*.json.gz")) if given.is_dir() else [given]
    return found[:1] if session.rehearses and not flags.FLAGS.golden else found


def _cases(session: Session) -> list[Case]:
    names = [*FIRST, *sorted(MODELS.table.keys() - set(FIRST))]
    if session.rehearses:
        return [Case("vgg7", "float64"), Case("vgg7", "bfloat16")]
    exact = [Case(name, "float64") for name in names]
    return exact + [Case(name, dtype) for dtype in ("float32", "bfloat16") for name in FIRST]


def _golden(path: Path) -> dict[str, Any]:
    case = read_golden(path)
    found = compare(case, compute(case, case.create_model()))
    passes = found.passes(TOLERANCE)
    return {"passes": passes, "differences": found.differences, "nonzero": found.nonzero}


def _gradients(case: Case) -> dict[str, Any]:
    """Compares the gradients of one step on the CPU and on the default device."""
    model = _narrow(case)
    side = 64 if "imagenet" in case.model else 32
    draw = np.random.default_rng(0)
    kind = "float64" if case.dtype == "float64" else "float32"
    images = draw.normal(size=(BATCH, side, side, 3)).astype(kind)
    labels = draw.integers(0, CLASSES, BATCH)
    variables = _random_variables(model, (side, side, 3), kind)
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    ours, theirs = (_compute(model, where, variables, images, labels) for where in (device, cpu))
    differences = compare_gradients(ours, theirs)
    passes = case.dtype != "float64" or max(differences.values()) <= TOLERANCE
    return {"passes": passes, "differences": differences}


def compare_gradients(ours: PyTree, theirs: PyTree) -> dict[str, float]:
    """Returns the worst relative difference of any tensor, by kind of number.

        |ours - theirs| / |theirs|, norms; tensors near zero are compared to the largest tensor

    NaN if one of our numbers is NaN.

    Example:
      >>> one = {"grads": {"a": jnp.array([3.0, 4.0])}}
      >>> two = {"grads": {"a": jnp.array([3.0, 4.5])}}
      >>> {k: round(v, 3) for k, v in compare_gradients(two, one).items()}
      {'grads': 0.1}
    """
    return {kind: _worst(ours[kind], theirs[kind]) for kind in theirs}


def _worst(ours: PyTree, theirs: PyTree) -> float:
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    norms = [float(np.linalg.norm(np.asarray(b, np.float64))) for _, b in pairs]
    largest = max(norms, default=0.0)
    found = [
        float(np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)))
        / max(norm, NEGLIGIBLE * largest, np.finfo(float).tiny)
        for (a, b), norm in zip(pairs, norms, strict=True)
    ]
    return float(np.max(found, initial=0.0))


def _narrow(case: Case) -> MultiExitModel:
    family = next(name for name in _NARROW if case.model.startswith(name))
    options = dict(_NARROW[family])
    if case.model.startswith("resnet"):
        options["stem"] = "cifar"
    model = create_model(case.model, num_classes=CLASSES, adapt_features=True, **options)
    return model.clone(dtype="bfloat16") if case.dtype == "bfloat16" else model


def _random_variables(
    model: MultiExitModel, shape: tuple[int, int, int], kind: str
) -> dict[str, Any]:
    with jax.default_device(jax.devices("cpu")[0]):
        variables = init_variables(model, jax.random.key(0), shape)
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(kind), variables)


def _compute(
    model: MultiExitModel,
    device: Any,
    variables: dict[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
) -> dict[str, PyTree]:
    """Returns logits, new statistics and gradients of surgery with BYOT's losses on one device.

    The CPU uses Flax's own layers, without kernels of this package, as a simple reference.
    """
    fork, loss = create_fork("dfs", partition_ratio=BETA), create_loss("byot")

    def run(variables: dict[str, Any], images: jax.Array, labels: jax.Array):
        def total(params: PyTree) -> tuple[jax.Array, Any]:
            outputs, updated = model.apply(
                {**variables, "params": params},
                images,
                fork,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(1)},
            )
            return jnp.sum(loss(outputs, labels)), (outputs.logits, updated.get("batch_stats", {}))

        grads, (logits, stats) = jax.grad(total, has_aux=True)(variables["params"])
        return {"logits": logits, "batch_stats": stats, "grads": grads}

    compiled = jax.jit(run, compiler_options=compiler_options(device.platform))
    arguments = jax.device_put((variables, images, labels), device)
    return jax.device_get(compiled(*arguments))
