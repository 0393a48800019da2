"""Checkpoints: best and latest kept, damage found and named, the one before used."""

from __future__ import annotations

import shutil
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.training.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    has_steps,
    leaf_checksums,
)
from dfs_jax.types import UserError


def make_state(step):
    draw = np.random.default_rng(step)
    return {
        "w": jnp.asarray(draw.standard_normal((53, 59)), jnp.float32),
        "step": jnp.int32(step),
        "nothing": None,
    }


def target_of(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path)
    yield opened
    opened.close()


def kept(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def save_all(checkpoints, scores):
    for step, score in scores.items():
        checkpoints.save(make_state(step), step, score)


def data_files(workdir, step):
    paths = (workdir / "checkpoints" / str(step)).rglob("*")
    return [path for path in paths if path.is_file() and "/d/" in path.as_posix()]


def flip_bytes(workdir, step):
    """Flips one byte in the middle of each data file of a checkpoint."""
    for path in data_files(workdir, step):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)


def truncate(workdir, step):
    for path in data_files(workdir, step):
        path.write_bytes(path.read_bytes()[:11])


def test_best_and_two_latest_are_kept(checkpoints, tmp_path):
    save_all(checkpoints, {1: 0.2, 2: 0.9, 3: 0.5, 5: 0.4, 7: 0.3})
    assert kept(tmp_path) == [2, 5, 7]
    assert (checkpoints.best_step(), checkpoints.latest_step()) == (2, 7)


def test_the_latest_of_equals_is_best(checkpoints):
    save_all(checkpoints, {1: 0.7, 2: 0.7, 3: 0.1})
    assert checkpoints.best_step() == 2


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None])
def test_scores_that_are_no_number_harm_nothing(checkpoints, tmp_path, score):
    save_all(checkpoints, {1: 0.4, 2: score, 3: score, 5: score})
    assert checkpoints.best_step() == 1
    assert kept(tmp_path) == [1, 3, 5]


def test_a_state_comes_back_as_it_was(checkpoints, tmp_path):
    state = make_state(3)
    checkpoints.save(state, 3, 0.1)
    restored, step = Checkpoints(tmp_path).restore_latest(target_of(state))
    assert step == 3
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)


def test_nothing_saved_restores_nothing(checkpoints):
    assert checkpoints.restore_latest(target_of(make_state(0))) is None


@pytest.mark.parametrize("has_manifest", [True, False])  # False: killed just after the save
@pytest.mark.parametrize("harm", [flip_bytes, truncate])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    checkpoints, tmp_path, caplog, harm, has_manifest
):
    save_all(checkpoints, {1: 0.1, 2: 0.2, 3: 0.3})
    if not has_manifest:
        (tmp_path / "checkpoints" / "3" / "files.json").unlink()
    harm(tmp_path, 3)
    again = Checkpoints(tmp_path)
    restored, step = again.restore_latest(target_of(make_state(0)))
    assert step == 2
    chex.assert_trees_all_equal(restored, make_state(2))
    assert "step 3" in caplog.text
    assert "damaged" in caplog.text
    assert (tmp_path / "damaged_checkpoints" / "3").is_dir()
    again.save(make_state(3), 3, 0.3)  # its step can be reached, and saved, again
    assert Checkpoints(tmp_path).restore_latest(target_of(make_state(0)))[1] == 3


@pytest.mark.parametrize("harm", [flip_bytes, truncate])
def test_a_damaged_checkpoint_is_seen_before_other_libraries_read_it(
    checkpoints, tmp_path, monkeypatch, harm
):
    save_all(checkpoints, {1: 0.1})
    harm(tmp_path, 1)
    again = Checkpoints(tmp_path, read_only=True)
    monkeypatch.setattr(again, "_manager", None)  # any use of it would fail otherwise
    with pytest.raises(DamagedCheckpoint, match=r"step 1 is damaged .* of its files changed"):
        again._restore(1, target_of(make_state(0)))


def test_when_all_are_damaged_the_run_does_not_start_over_unasked(checkpoints, tmp_path):
    save_all(checkpoints, {1: 0.1, 2: 0.2})
    flip_bytes(tmp_path, 1)
    flip_bytes(tmp_path, 2)
    with pytest.raises(UserError, match=r"every checkpoint .* damaged \(steps \[2, 1\]\)"):
        Checkpoints(tmp_path).restore_latest(target_of(make_state(0)))


def test_evaluation_names_a_damaged_checkpoint_and_leaves_it(checkpoints, tmp_path):
    save_all(checkpoints, {1: 0.1, 2: 0.2})
    flip_bytes(tmp_path, 2)
    reader = Checkpoints(tmp_path, read_only=True)
    with pytest.raises(UserError, match=r"step 2 is damaged .* others here: \[1\]"):
        reader.restore("best", target_of(make_state(0)))
    assert kept(tmp_path) == [1, 2]
    assert reader.restore("1", target_of(make_state(0)))[1] == 1


@pytest.mark.parametrize("which", ["17", "worst", "-1"])
def test_a_checkpoint_that_is_not_there(checkpoints, tmp_path, which):
    save_all(checkpoints, {1: 0.1})
    with pytest.raises(
        UserError, match=rf"no checkpoint '{which}' .* best, latest or one of \[1\]"
    ):
        Checkpoints(tmp_path, read_only=True).restore(which, target_of(make_state(0)))


def test_reading_where_nothing_was_saved(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoints in .*train there first"):
        Checkpoints(tmp_path, read_only=True)


def test_checksums_see_every_leaf_and_every_bit():
    state = make_state(5)
    sums = leaf_checksums(state)
    assert len(sums) == 2
    changed = {**state, "w": state["w"].at[2, 4].add(1e-7)}
    assert [name for name in sums if leaf_checksums(changed)[name] != sums[name]] == ["['w']"]


def test_a_checkpoint_is_written_while_the_caller_goes_on(checkpoints, tmp_path, monkeypatch):
    may_write, write = threading.Event(), checkpoints._write

    def wait_and_write(*args):
        assert may_write.wait(60)
        write(*args)

    monkeypatch.setattr(checkpoints, "_write", wait_and_write)
    checkpoints.start_saving(make_state(1), 1, 0.1)
    assert kept(tmp_path) == []
    may_write.set()
    assert checkpoints.latest_step() == 1  # who asks waits
    assert checkpoints.restore_latest(target_of(make_state(1)))[1] == 1


@pytest.mark.parametrize("ask", ["wait", "latest_step", "close"])
def test_a_write_that_fails_meanwhile_is_told_to_who_asks_next(tmp_path, monkeypatch, ask):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1), 1, 0.1)

    def fail(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", fail)
        checkpoints.start_saving(make_state(2), 2, 0.2)
        with pytest.raises(UserError, match=r"step 2 could not be written .*the last good .* 1: "):
            getattr(checkpoints, ask)()
    assert kept(tmp_path) == [1]
    checkpoints.close()


def test_a_full_disk_is_noticed_before_anything_is_written(checkpoints, tmp_path, monkeypatch):
    checkpoints.save(make_state(1), 1, 0.1)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**19)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = r"step 2 needs 1.0 MiB .* 0.5 MiB left; the last good one is step 1: make room"
    with pytest.raises(UserError, match=message):
        checkpoints.save(make_state(2), 2, 0.2)
    assert kept(tmp_path) == [1]


OTHERS = {
    "shape": (lambda s: {**s, "w": s["w"][:, :5]}, r"w is float32 \[53, 59\] there .*\[53, 5\] in"),
    "type": (lambda s: {**s, "w": s["w"].astype(jnp.bfloat16)}, r"w is float32 .* and bfloat16 \["),
    "more": (lambda s: {**s, "nothing": s["w"]}, r"nothing is absent there and float32 \[53, 59\]"),
    "fewer": (
        lambda s: {"step": s["step"], "nothing": None},
        r"w is float32 .* and absent in this",
    ),
    "deeper": (lambda s: {**s, "w": {"v": s["w"]}}, r"w is float32 .*absent in this run \(1 more"),
    "renamed": (lambda s: {"v": s["w"], "step": s["step"], "nothing": None}, "v is absent there"),
}


@pytest.mark.parametrize(
    ("name", "has_manifest"), [*((name, True) for name in OTHERS), ("shape", False)]
)
def test_a_checkpoint_of_another_network_is_a_mismatch_and_nothing_is_moved(
    checkpoints, tmp_path, name, has_manifest
):
    save_all(checkpoints, {1: 0.1, 2: 0.2})
    if not has_manifest:
        (tmp_path / "checkpoints" / "2" / "files.json").unlink()
    change, message = OTHERS[name]
    target = target_of(change(make_state(0)))
    with pytest.raises(
        UserError, match=rf"2 is a checkpoint of another network.*{message}"
    ) as told:
        Checkpoints(tmp_path).restore_latest(target)
    assert "damaged" not in str(told.value)
    with pytest.raises(UserError, match=rf"1 is a checkpoint of another network.*{message}"):
        Checkpoints(tmp_path, read_only=True).restore("1", target)
    assert kept(tmp_path) == [1, 2]
    assert not (tmp_path / "damaged_checkpoints").exists()
    assert Checkpoints(tmp_path).restore_latest(target_of(make_state(0)))[1] == 2


def test_damage_before_a_mismatch_moves_nothing(checkpoints, tmp_path):
    save_all(checkpoints, {1: 0.1, 2: 0.2})
    flip_bytes(tmp_path, 2)
    other = target_of({**make_state(0), "w": jnp.zeros((3, 5))})
    with pytest.raises(UserError, match="1 is a checkpoint of another network"):
        Checkpoints(tmp_path).restore_latest(other)
    assert kept(tmp_path) == [1, 2]


def test_damaged_metadata_is_damage(checkpoints, tmp_path):
    save_all(checkpoints, {1: 0.1, 2: 0.2})
    (tmp_path / "checkpoints" / "2" / "files.json").unlink()
    (tmp_path / "checkpoints" / "2" / "state" / "_METADATA").write_text("{")
    assert Checkpoints(tmp_path).restore_latest(target_of(make_state(0)))[1] == 1


def test_a_run_whose_checkpoints_were_all_set_aside_does_not_start_over(checkpoints, tmp_path):
    save_all(checkpoints, {1: 0.1, 2: 0.2})
    flip_bytes(tmp_path, 1)
    flip_bytes(tmp_path, 2)
    for _ in range(2):
        with pytest.raises(UserError, match=r"every checkpoint .* damaged \(steps \[2, 1\]\)"):
            Checkpoints(tmp_path).restore_latest(target_of(make_state(0)))
    (tmp_path / "damaged_checkpoints").mkdir()
    for step in ("1", "2"):
        shutil.move(tmp_path / "checkpoints" / step, tmp_path / "damaged_checkpoints" / step)
    assert has_steps(tmp_path)
    with pytest.raises(UserError, match=r"was set aside as damaged: delete .*damaged_checkpoints"):
        Checkpoints(tmp_path).restore_latest(target_of(make_state(0)))
