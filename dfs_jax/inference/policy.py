"""Early-exit policies: thresholds, the confidence they apply to, and their origin, in JSON.

    {"version": 1,
     "measure": "max_softmax",             one of `dfs_jax.exits.scores`
     "thresholds": [0.93, null, 0.81],     one for each exit but the last; null: no example exits
     "temperatures": [1.2, 1.1, 1.1, 1.0], one for each exit
     "exit_shares": [0.4, 0.0, 0.3, 0.3],  fraction answered by each exit in fitting, or null
     "falls_back": true,                   whether the last exit may answer all, if that is faster
     "fitted_on": {...}}                   record of the network and the data

An example exits at the first exit whose threshold its confidence reaches (`>=`), or at the last.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfs_jax.exits.scores import MEASURES, Measure
from dfs_jax.files import write_whole
from dfs_jax.paths import reason
from dfs_jax.types import UserError

NOBODY = 1e8  # no confidence reaches it: the exit answers no example
EVERYBODY = -1e8  # every confidence reaches it: the exit answers all remaining examples

VERSION = 1
FILE = "policy.json"
# Recomputed in batches of another size, a confidence changes by less than this.
ROUNDING = 1e-6
_JSON_KINDS = {dict: "an object", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Policy:
    """Confidence thresholds at which examples exit.

    Args:
      thresholds: threshold of each exit but the last; None if no example exits there.
      measure: name of the measure of confidence.
      temperatures: temperature of each exit; empty for 1 everywhere.
      exit_shares: fraction of the fitting examples that each exit answered.
      falls_back: whether the last exit of the whole network may answer instead where that is
        faster; False for a policy whose guarantee does not cover the last exit.
      fitted_on: record of the network and the data, as plain data.

    Raises:
      UserError: an unknown measure, numbers out of range, or lengths that do not match.

    Example:
      >>> policy = Policy((0.9, None))
      >>> policy.num_exits, policy.temperatures
      (3, (1.0, 1.0, 1.0))
      >>> policy.exits(np.array([[0.95, 0.5], [0.9, 0.9], [0.9, 0.9]])).tolist()
      [0, 2]
    """

    thresholds: tuple[float | None, ...]
    measure: str = "max_softmax"
    temperatures: tuple[float, ...] = ()
    exit_shares: tuple[float, ...] | None = None
    falls_back: bool = True
    fitted_on: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        exits = len(self.thresholds) + 1
        temperatures = self.temperatures or (1.0,) * exits
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        object.__setattr__(self, "temperatures", tuple(temperatures))
        MEASURES.resolve(self.measure)
        _check("threshold", [t for t in self.thresholds if t is not None], low=-math.inf)
        _check("temperature", temperatures, low=0, count=exits)
        if self.exit_shares is not None:
            object.__setattr__(self, "exit_shares", tuple(self.exit_shares))
            _check("exit share", self.exit_shares, low=-ROUNDING, count=exits)

    @property
    def num_exits(self) -> int:
        """Number of exits of the network."""
        return len(self.thresholds) + 1

    @property
    def measure_function(self) -> Measure:
        """Measure named by the policy."""
        return MEASURES.resolve(self.measure)

    def all_thresholds(self) -> tuple[float, ...]:
        """Returns the threshold of every exit: `NOBODY` for None, `EVERYBODY` for the last."""
        return (*(NOBODY if t is None else float(t) for t in self.thresholds), EVERYBODY)

    def leaves(self, exit_index: int, confidence: np.ndarray) -> np.ndarray:
        """Returns which of the examples that reach an exit (0-based) exit there, `[n]` bool."""
        if exit_index == self.num_exits - 1:
            return np.ones(len(confidence), bool)
        return confidence >= np.float64(self.all_thresholds()[exit_index])

    def is_close(self, exit_index: int, confidence: np.ndarray) -> np.ndarray:
        """Returns which decisions at an exit lie within rounding of the threshold, `[n]` bool."""
        if exit_index == self.num_exits - 1:
            return np.zeros(len(confidence), bool)
        return np.abs(confidence - self.all_thresholds()[exit_index]) <= ROUNDING

    def exits(self, confidence: np.ndarray) -> np.ndarray:
        """Returns the exit (0-based) that answers each example, `[n]`, given `[exits, n]`."""
        return apply_thresholds(confidence, self.all_thresholds())

    def to_json(self) -> str:
        """Returns the policy as JSON."""
        content = {"version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def save(self, path: Path) -> Path:
        """Writes the policy as JSON, atomically."""
        return write_whole(path, self.to_json())


def apply_thresholds(
    confidence: np.ndarray, thresholds: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Returns the exit that answers each example, `[n]` int, 0-based.

    It is the first whose threshold the example's confidence reaches (`>=`), or the last.

    Args:
      confidence: confidence of each exit in each example, `[exits, n]`.
      thresholds: threshold of every exit; the last one is not used.

    Raises:
      ValueError: a number of thresholds other than that of the exits.

    Example:
      >>> apply_thresholds(np.array([[0.9, 0.5], [0.6, 0.6]]), [0.7, -1e8]).tolist()
      [0, 1]
    """
    confidence = np.asarray(confidence)
    num_exits, n = confidence.shape
    if len(thresholds) != num_exits:
        raise ValueError(f"{num_exits} exits take {num_exits} thresholds, got {len(thresholds)}")
    taken = np.full(n, num_exits - 1)
    for k in reversed(range(num_exits - 1)):
        # The comparison is in float64, so a threshold chosen in float32 meets itself exactly.
        np.copyto(taken, k, where=confidence[k] >= np.float64(thresholds[k]))
    return taken


def last_exit_only(num_exits: int) -> Policy:
    """Returns the policy under which no example exits before the last exit.

    >>> last_exit_only(3).thresholds
    (None, None)
    """
    return Policy((None,) * (num_exits - 1))


def read_policy(path: Path) -> Policy:
    """Reads a policy from JSON.

    Raises:
      UserError: the file is missing or not JSON, its version is unknown, or fields are missing,
        unknown or invalid.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the policy {path} cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise UserError(f"the policy {path} is not JSON: {error}") from error
    try:
        return _from_content(content)
    except UserError as error:
        raise UserError(f"the policy {path}: {error}") from error


def _from_content(content: Any) -> Policy:
    if not isinstance(content, dict) or content.get("version") != VERSION:
        version = content.get("version") if isinstance(content, dict) else None
        raise UserError(f'its "version" is {version!r}, this program reads {VERSION}')
    fields = {field.name for field in dataclasses.fields(Policy)}
    given = set(content) - {"version"}
    if given - fields or "thresholds" not in given:
        raise UserError(
            f"its fields are {', '.join(sorted(given))}: thresholds are needed, and "
            f"{', '.join(sorted(fields))} are known"
        )
    for name in ("thresholds", "temperatures", "exit_shares"):
        if not isinstance(content.get(name, []), list | None):
            raise UserError(f"{name} must be a list, got {content[name]!r}")
    for name, kind in (("fitted_on", dict), ("falls_back", bool)):
        if not isinstance(content.get(name, kind()), kind):
            raise UserError(f"{name} must be {_JSON_KINDS[kind]}, got {content[name]!r}")
    policy = Policy(**{name: content[name] for name in given})
    _check_as_fitted(policy)
    return policy


def _check_as_fitted(policy: Policy) -> None:
    """Raises UserError if a fitted value of the policy was edited, which its record contradicts.

    Thresholds may be edited by hand unless a guarantee depends on them.
    """
    fitted_on = policy.fitted_on
    given = {"measure": policy.measure, "temperatures": list(policy.temperatures)}
    if fitted_on.get("guarantee") is not None:
        given["thresholds"] = list(policy.thresholds)
    for name, value in given.items():
        if name in fitted_on and fitted_on[name] != value:
            raise UserError(
                f"its {name} were {fitted_on[name]!r} when it was fitted and are {value!r} now: "
                f"restore them, or choose again"
            )


def _check(what: str, values: Sequence[Any], *, low: float, count: int | None = None) -> None:
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= low:
            raise UserError(f"a {what} must be a finite number above {low}, got {value!r}")
    if count is not None and len(values) != count:
        raise UserError(f"{count - 1} thresholds go with {count} {what}s, got {len(values)}")
