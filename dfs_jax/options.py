"""The options of a component: its keyword arguments, with their types, defaults and docs."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

REQUIRED = inspect.Parameter.empty
_KINDS = (bool, int, float, str)
_ENTRY = re.compile(r"^  (\w+(?:, \w+)*): (.*)$")


class Option(NamedTuple):
    """One keyword argument of a component.

    Attributes:
      name: name of the argument.
      kind: type of its values: bool, int, float, str, tuple, or object for several types.
      default: value if it is not set; `REQUIRED` if there is none.
      doc: first sentence of its documentation.
    """

    name: str
    kind: type
    default: Any
    doc: str


def options_of(component: Callable[..., Any], given: Iterable[str] = ()) -> dict[str, Option]:
    """Returns a component's options by name.

    Args:
      component: class or function, or a `functools.partial` of one.
      given: arguments that are not options, since the caller gives them.

    Example:
      >>> def decay(rate: float, *, factor: float = 0.5, epochs: tuple[int, ...] | None = None):
      ...     '''Decays.
      ...
      ...     Args:
      ...       rate: initial rate.
      ...       factor: factor of each decay. It is above 0.
      ...     '''
      >>> options_of(decay, given=("rate",))["factor"]
      Option(name='factor', kind=<class 'float'>, default=0.5, doc='factor of each decay.')
      >>> options_of(decay)["epochs"].kind
      <class 'tuple'>
    """
    function = component
    while isinstance(function, functools.partial):
        function = function.func
    hints, docs = _type_hints(function), documented_arguments(function)
    skipped = {"self", "name", "parent", *given}
    return {
        p.name: Option(p.name, _kind(hints.get(p.name, Any)), p.default, docs.get(p.name, ""))
        for p in inspect.signature(component).parameters.values()
        if p.name not in skipped and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def takes_any(component: Callable[..., Any]) -> bool:
    """Returns whether a component takes keyword arguments of any name."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(component).parameters.values())


def documented_arguments(function: Callable[..., Any]) -> dict[str, str]:
    """Returns the first sentence of each argument's documentation, base classes included."""
    sources = reversed(function.__mro__) if isinstance(function, type) else [function]
    found: dict[str, str] = {}
    for source in sources:
        found.update(_entries(inspect.cleandoc(source.__doc__ or "")))
    return found


def _entries(docstring: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in docstring.splitlines():
        if line in ("Args:", "Attributes:"):
            inside = True
        elif line and not line.startswith(" "):
            inside, names = False, []
        elif inside and (match := _ENTRY.match(line)):
            names = match.group(1).split(", ")
            texts.update(dict.fromkeys(names, match.group(2)))
        elif inside and line.startswith("    "):
            texts.update({name: f"{texts[name]} {line.strip()}" for name in names})
    return {name: re.split(r"(?<=\w\w\.) ", text)[0] for name, text in texts.items()}


def _type_hints(function: Any) -> dict[str, Any]:
    sources = function.__mro__ if isinstance(function, type) else (function,)
    hints: dict[str, Any] = {}
    for source in reversed(sources):
        module = vars(inspect.getmodule(source) or types)
        for name, annotation in inspect.get_annotations(source).items():
            try:
                hints[name] = (
                    eval(annotation, module) if isinstance(annotation, str) else annotation
                )
            except (NameError, TypeError):  # a name for type checkers alone
                hints[name] = Any
    return hints


def _kind(annotation: Any) -> type:
    """Returns the one type of the values; object if there are several."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = typing.get_args(annotation) if is_union else (annotation,)
    kinds = {_plain(part) for part in parts if part is not type(None)}
    if kinds == {float, tuple}:  # one number for all, or one for each
        return tuple
    return kinds.pop() if len(kinds) == 1 else object


def _plain(annotation: Any) -> type:
    origin = typing.get_origin(annotation) or annotation
    if origin in _KINDS:
        return origin
    return tuple if origin in (tuple, list, collections.abc.Sequence) else object
