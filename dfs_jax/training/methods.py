"""Methods by one word: which fork, loss and gradient rule each of them stands for."""

from __future__ import annotations

from typing import NamedTuple

# The components in which each method differs from deep supervision.
METHODS: dict[str, dict[str, str]] = {
    "dfs": {"fork": "dfs"},
    "dsn": {},
    "byot": {"loss": "byot"},
    "distillation": {"loss": "distillation"},
    "ge": {"fork": "gradient_equilibrium"},
    "pcgrad": {"gradients": "pcgrad"},
    "cagrad": {"gradients": "cagrad"},
    "nash_mtl": {"gradients": "nash_mtl"},
    "upgrad": {"gradients": "upgrad"},
    "meta_gf": {"gradients": "meta_gf"},
    "wpn": {"gradients": "wpn"},
}


class MethodParts(NamedTuple):
    """Names of a method's components.

    Attributes:
      fork: name of the fork.
      loss: name of the loss; None where the method does not say, which is deep supervision unless
        a recipe says otherwise.
      gradients: name of the gradient rule.
    """

    fork: str = "plain"
    loss: str | None = None
    gradients: str = "sum"


def method_parts(method: str) -> MethodParts:
    """Returns the components of a method, or of several joined by a plus.

    Raises:
      KeyError: an unknown method, or two methods that name the same component.

    Example:
      >>> method_parts("dfs+pcgrad")
      MethodParts(fork='dfs', loss=None, gradients='pcgrad')
    """
    chosen: dict[str, str] = {}
    for name in method.split("+"):
        if name not in METHODS:
            raise KeyError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
        for part, component in METHODS[name].items():
            if part in chosen:
                raise KeyError(
                    f"{method!r} asks for two components of one kind ({part}), {chosen[part]} and "
                    f"{component}: name one"
                )
            chosen[part] = component
    return MethodParts(**chosen)
