"""Policies: decisions by hand, JSON there and back, and what cannot be read."""

import json

import numpy as np
import pytest

from dfs_jax.inference.policy import Policy, last_exit_only, read_policy
from dfs_jax.types import UserError

CONFIDENCE = np.array([[0.9, 0.5, 0.7, np.nan], [0.6, 0.8, 0.2, 0.8], [0.3, 0.3, 0.3, 0.3]])
POLICY = Policy(
    (0.7, None),
    "margin",
    (1.5, 1.0, 0.5),
    (0.5, 0.0, 0.5),
    falls_back=False,
    fitted_on={"data": "digits", "examples": 4},
)


def test_decisions_by_hand():
    assert POLICY.exits(CONFIDENCE).tolist() == [0, 2, 0, 2]
    assert Policy((0.95, 0.8)).exits(CONFIDENCE).tolist() == [2, 1, 2, 1]
    assert last_exit_only(3).exits(CONFIDENCE).tolist() == [2] * 4


def test_exit_by_exit_decides_alike():
    for policy in (POLICY, Policy((0.95, 0.8)), last_exit_only(3)):
        waiting = np.arange(4)
        for k in range(3):
            leaves = policy.leaves(k, CONFIDENCE[k][waiting])
            assert policy.exits(CONFIDENCE)[waiting[leaves]].tolist() == [k] * leaves.sum()
            waiting = waiting[~leaves]
        assert not len(waiting)


def test_a_float32_confidence_meets_its_own_value():
    third = np.float32([1 / 3])
    assert Policy((float(third[0]),)).leaves(0, third).all()
    assert not Policy((float(third[0]) + 1e-12,)).leaves(0, third).any()


def test_close_calls():
    policy = Policy((0.5, None))
    near = np.array([0.5, 0.5 + 9e-7, 0.5 - 9e-7, 0.5 + 2e-6, 0.4])
    assert policy.is_close(0, near).tolist() == [True, True, True, False, False]
    assert not policy.is_close(1, near).any()
    assert not policy.is_close(2, near).any()


def test_json_there_and_back(tmp_path):
    path = POLICY.save(tmp_path / "model" / "policy.json")
    assert read_policy(path) == POLICY
    content = json.loads(path.read_text())
    assert content["version"] == 1
    assert content["thresholds"] == [0.7, None]
    assert "null" in path.read_text()


def test_little_is_needed(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text('{"version": 1, "thresholds": [0.5, null]}')
    assert read_policy(path) == Policy((0.5, None), "max_softmax", (1.0, 1.0, 1.0))


BAD = {
    '{"version": 2, "thresholds": [0.5]}': 'its "version" is 2, this program reads 1',
    "[1]": 'its "version" is None',
    "{": "is not JSON",
    '{"version": 1}': "thresholds are needed",
    '{"version": 1, "thresholds": [0.5], "treshold": 3}': "treshold: thresholds are needed, and",
    '{"version": 1, "thresholds": 0.5}': "thresholds must be a list, got 0.5",
    '{"version": 1, "thresholds": ["high"]}': "threshold must be a finite number above -inf",
    '{"version": 1, "thresholds": [true]}': "threshold must be a finite number",
    '{"version": 1, "thresholds": [NaN]}': "threshold must be a finite number",
    '{"version": 1, "thresholds": [0.5], "temperatures": [1.0]}': "go with 2 temperatures, got 1",
    '{"version": 1, "thresholds": [0.5], "temperatures": [1.0, 0]}': "finite number above 0, got 0",
    '{"version": 1, "thresholds": [0.5], "exit_shares": [1.0]}': "go with 2 exit shares, got 1",
    '{"version": 1, "thresholds": [0.5], "measure": "luck"}': "unknown confidence measure 'luck'",
    '{"version": 1, "thresholds": [0.5], "fitted_on": "x"}': "fitted_on must be an object",
    '{"version": 1, "thresholds": [0.5], "falls_back": 1}': "falls_back must be true or false",
}


@pytest.mark.parametrize("content", BAD)
def test_what_cannot_be_read_is_told(tmp_path, content):
    path = tmp_path / "policy.json"
    path.write_text(content)
    with pytest.raises(UserError, match=BAD[content]) as told:
        read_policy(path)
    assert str(path) in str(told.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_policy(tmp_path / "policy.json")
