"""Names to components: tables that also take a user's own `package.module:attribute`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from dfs_jax.types import UserError

# Fields that flax adds to every module's constructor; never options of a component.
_NOT_OPTIONS = frozenset({"self", "parent", "name"})


@dataclasses.dataclass(frozen=True)
class Registry:
    """A table of interchangeable components of one kind.

    The table maps a name to the component, or to `"module:attribute"`, which is imported on first
    use.

    Args:
      kind: kind of the components, for messages ("model", "fork", ...).
      table: name -> component or `"module:attribute"`.

    Example:
      >>> forks = Registry("fork", {"dfs": "dfs_jax.surgery:FeatureSurgery"})
      >>> forks.create("dfs", partition_ratio=0.25).partition_ratio
      0.25
    """

    kind: str
    table: Mapping[str, str | Callable[..., Any]]

    def resolve(self, name: str) -> Callable[..., Any]:
        """Returns the class or function called `name`, or a user's own `package.module:attribute`.

        Raises:
          UserError: the name is unknown, or the user's module or attribute is not there.
        """
        target = self.table.get(name, name if isinstance(name, str) and ":" in name else None)
        if target is None:
            known = ", ".join(sorted(self.table))
            raise UserError(
                f"unknown {self.kind} {name!r}: choose one of {known}, "
                f'or name your own as "package.module:attribute"'
            )
        if not isinstance(target, str):
            return target
        module_name, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except ModuleNotFoundError as error:
            if name in self.table or not _is_prefix(error.name, module_name):
                raise
            raise UserError(f"{self.kind} {name!r}: there is no module {error.name!r}") from error
        except AttributeError as error:
            raise UserError(f"{self.kind} {name!r}: {module_name} has no {attribute!r}") from error

    def create(self, name: str, *args: Any, **options: Any) -> Any:
        """Calls the component with `args` and with the options that are not None.

        Raises:
          UserError: the component lacks an option that is set, needs one that is not, or refuses
            a value.
        """
        component = self.resolve(name)
        chosen = {key: value for key, value in options.items() if value is not None}
        self._check_options(name, component, args, chosen)
        try:
            return component(*args, **chosen)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{self.kind} {name!r}: {error}") from error

    def _check_options(
        self, name: str, component: Callable[..., Any], args: tuple, chosen: dict[str, Any]
    ) -> None:
        signature = inspect.signature(component)
        parameters = signature.parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            accepted = sorted({p.name for p in parameters} - _NOT_OPTIONS)
            for key, value in chosen.items():
                if key not in accepted:
                    raise UserError(
                        f"{self.kind} {name!r} has no option {key!r} (given {value!r}): "
                        f"it takes {', '.join(accepted) or 'none'}"
                    )
        try:
            signature.bind(*args, **chosen)
        except TypeError as error:  # "missing a required argument: 'decay_epochs'"
            raise UserError(f"{self.kind} {name!r}: {error}") from error


def _is_prefix(missing: str | None, module_name: str) -> bool:
    """Returns whether the user's module itself is missing, not one that it imports."""
    return missing is not None and f"{module_name}.".startswith(f"{missing}.")
