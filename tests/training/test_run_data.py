"""What a run knows of its data: changed directories, missing ones, and what may be accepted."""

from __future__ import annotations

import gzip
import json
import shutil

import numpy as np
import pytest

from dfs_jax.inference import load_exported
from dfs_jax.inference.export import export_run
from dfs_jax.inference.trained import load_staged
from dfs_jax.reports.run_report import report_run
from dfs_jax.training import loop
from dfs_jax.training.evaluate import evaluate_run
from dfs_jax.training.experiment import rebuild_experiment
from dfs_jax.training.loop import train
from dfs_jax.training.recorded import check_unchanged
from dfs_jax.training.run_data import FILE, files_fingerprint, read_run_data
from dfs_jax.types import UserError
from tests.support.folders import CLASSES, write_folder, write_image
from tests.support.helpers import tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs on 26 images, and the images."""
    root = tmp_path_factory.mktemp("trained")
    write_folder(root / "data")
    train(config_for(root), root / "run")
    return root


@pytest.fixture
def root(trained, tmp_path):
    """A copy of both, to be changed; the run refers to the new location of the images."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def config_for(root, **changes):
    data = {"data.name": "folder", "data.data_dir": str(root / "data")}
    network = {"model.name": "tests.support.helpers:TinyNetwork", "epochs": 2}
    return tiny_config(**{**data, **network, "data.validation_examples": 7, **changes})


def resume(root, *, accept=False, **changes):
    return train(config_for(root, **changes), root / "run", accept_data_changes=accept)


def rebuilt(root):
    return rebuild_experiment(root / "run", data_dir=str(root / "data"))


def evaluated(root, split="test"):
    return evaluate_run(root / "run", rebuilt(root), split=split)


def paths_of(dataset, part):
    return {file.path for file in dataset.origin.files[part]}


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def add_images(root):
    for number in range(20, 25):
        write_image(root / "data" / "train" / "cat" / f"{number}.png", shade=5)


def remove_images(root):
    for name in ("1.png", "2.png"):
        (root / "data" / "train" / "dog" / name).unlink()


def change_image(root):
    path = root / "data" / "train" / "dog" / "3.png"
    path.write_bytes(path.read_bytes() + b" ")


def add_class(root):
    for split in ("train", "test"):
        shutil.copytree(root / "data" / split / "dog", root / "data" / split / "wolf")


def remove_class(root):
    for split in ("train", "test"):
        shutil.rmtree(root / "data" / split / "dog")


def rename(root, old="fox", new="ant"):
    """Puts the class first in the alphabet, so that labels by position would be others."""
    for split in ("train", "test"):
        (root / "data" / split / old).rename(root / "data" / split / new)


def swap_for_another_class(root):
    remove_class(root)
    for split in ("train", "test"):
        for number in range(30, 41):
            write_image(root / "data" / split / "eel" / f"{number}.png")


def scale_images(root):
    for path in sorted((root / "data").rglob("*.png")):
        write_image(path, size=9)


ACCEPTABLE = {
    add_images: r"5 images were added \(such as train/cat/20.png\)",
    remove_images: r"2 images were removed \(such as train/dog/1.png\)",
    change_image: r"1 image was changed \(train/dog/3.png\)",
    rename: "class 'fox' was renamed to 'ant'",
}
IMPOSSIBLE = {
    add_class: "class 'wolf' was added",
    remove_class: "class 'dog' was removed",
    swap_for_another_class: "class 'dog' was removed; class 'eel' was added",
}
CHANGES = {**ACCEPTABLE, **IMPOSSIBLE}


def test_the_record_is_plain_and_whole(trained):
    content = json.loads((trained / "run" / FILE).read_text())
    assert content["class_names"] == list(CLASSES)
    assert content["image_shape"] == [8, 8, 3]
    sizes = {part: record["examples"] for part, record in content["splits"].items()}
    assert sizes == {"train": 26, "validation": 7, "test": 15}
    known = read_run_data(trained / "run")
    assert known is not None
    assert len(known.mean) == len(known.std) == 3
    for part, files in known.files.items():
        assert files_fingerprint(files) == known.splits[part].fingerprint
    everything = {file.path for part in ("train", "validation") for file in known.files[part]}
    assert everything == {f"train/{name}/{i}.png" for name in CLASSES for i in range(11)}


def test_a_fingerprint_sees_every_path_and_size():
    files = [("train/a/1.png", 5), ("train/b/1.png", 7)]
    others = [files[:1], [("train/a/1.png", 5), ("train/b/2.png", 7)], [(*files[0][:1], 6)]]
    assert len({files_fingerprint(some) for some in (files, *others)}) == 4
    assert files_fingerprint(files[::-1]) == files_fingerprint(files)
    assert files_fingerprint([("\udcff", 3)]) != files_fingerprint([("\udcfe", 3)])


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_training_and_choosing_refuse_changed_data(root, change):
    resume(root)  # which notes where the images lie now
    before = contents(root / "run")
    change(root)
    for attempt in (
        lambda: resume(root),
        lambda: check_unchanged(root / "run", config_for(root).data),
    ):
        with pytest.raises(UserError, match=CHANGES[change]) as told:
            attempt()
        assert "\n" not in str(told.value)
        assert ("--accept_data_changes" in str(told.value)) == (change in ACCEPTABLE)
    assert contents(root / "run") == before


@pytest.mark.parametrize("change", [*IMPOSSIBLE, scale_images], ids=lambda change: change.__name__)
def test_what_the_network_has_no_outputs_for_cannot_be_accepted(root, change):
    change(root)
    with pytest.raises(
        UserError, match=r"the network('s| takes).* train anew in another --workdir"
    ):
        resume(root, accept=True)


def test_a_network_is_evaluated_with_its_own_statistics_whatever_lies_there_now(root):
    before = evaluated(root)
    add_images(root)
    after = evaluated(root)
    np.testing.assert_array_equal(after.reported.confidence, before.reported.confidence)
    np.testing.assert_array_equal(after.fitting.confidence, before.fitting.confidence)


def test_images_added_are_trained_on_and_nothing_moves_into_validation(root):
    known = read_run_data(root / "run")
    held_out = {file.path for file in known.files["validation"]}
    add_images(root)
    experiment = resume(root, accept=True).experiment
    for again in (experiment, resume(root).experiment, rebuilt(root)):
        dataset = again.dataset
        assert paths_of(dataset, "validation") == held_out
        assert len(paths_of(dataset, "train")) == 26 + 5
        assert (dataset.mean, dataset.std) == (known.mean, known.std)
    images = [split.take(np.arange(7)).images for split in validation_of(root, experiment)]
    np.testing.assert_array_equal(*images)


def validation_of(root, experiment):
    """The validation split as training has it, and as it is read for evaluation."""
    return experiment.dataset.validation, rebuilt(root).dataset.validation


def test_a_held_out_image_that_is_gone_leaves_the_others_where_they_were(root):
    known = read_run_data(root / "run")
    first, *others = (file.path for file in known.files["validation"])
    (root / "data" / first).unlink()
    dataset = resume(root, accept=True).experiment.dataset
    assert paths_of(dataset, "validation") == set(others)
    assert len(paths_of(dataset, "train")) == 26


def test_without_any_held_out_image_nothing_is_accepted(root):
    for file in read_run_data(root / "run").files["validation"]:
        (root / "data" / file.path).unlink()
    with pytest.raises(UserError, match="none of the images that the run held out is left"):
        resume(root, accept=True)


def test_a_renamed_class_keeps_its_output(root):
    before = evaluated(root)
    rename(root)
    with pytest.raises(UserError, match=r"class 'ant' .*'fox' is not there.* no output"):
        evaluated(root)
    assert resume(root, accept=True).experiment.dataset.class_names == ("cat", "dog", "ant")
    for after in (evaluated(root), evaluate_run(root / "run", resume(root).experiment)):
        assert after.reported.correct().sum() == before.reported.correct().sum()
        assert after.fitting.correct().sum() == before.fitting.correct().sum()


def test_classes_that_are_renamed_at_once_are_told_apart_by_their_files(root):
    """Files of two classes have the same names and sizes, and cannot be distinguished."""
    rename(root, "fox", "ant")
    rename(root, "cat", "yak")
    with pytest.raises(UserError, match="'cat' was removed; class 'fox' was removed; class 'ant'"):
        resume(root, accept=True)
    rename(root, "yak", "cat")
    for path in (root / "data" / "train" / "dog").iterdir():
        path.write_bytes(path.read_bytes() + b"  ")
    resume(root, accept=True)
    rename(root, "ant", "eel")
    rename(root, "dog", "bee")
    names = resume(root, accept=True).experiment.dataset.class_names
    assert names == ("cat", "bee", "eel")


def test_a_test_class_without_an_output_is_named(root):
    write_image(root / "data" / "test" / "wolf" / "1.png")
    with pytest.raises(UserError, match=r"the test split .* has the class 'wolf'.* no output"):
        evaluated(root)


def test_a_test_class_that_is_absent_leaves_the_others_their_labels(root):
    before = evaluated(root).reported
    shutil.rmtree(root / "data" / "test" / "cat")
    after = evaluated(root).reported
    assert set(after.labels.tolist()) == {1, 2}
    np.testing.assert_array_equal(after.labels, before.labels[5:])
    np.testing.assert_allclose(after.confidence, before.confidence[:, 5:], rtol=1e-5)


def test_test_images_that_changed_are_reported_on_and_said(root, caplog):
    write_image(root / "data" / "test" / "dog" / "77.png")
    assert evaluated(root).reported.num_examples == 16
    assert "16 examples now, 15 then" in caplog.text


def test_a_report_needs_no_training_images(root, caplog):
    shutil.rmtree(root / "data" / "train")
    report = report_run(root / "run", experiment=rebuilt(root))
    assert report["budgeted"] == []
    assert report["run"]["thresholds_from"] is None
    assert report["anytime"][1]["accuracy"] == pytest.approx(
        float(evaluated(root).reported.correct()[1].mean())
    )
    assert "7 of the 7 images of the run's validation split are not in" in caplog.text
    assert "Budgeted" not in (root / "run" / "report.md").read_text()
    with pytest.raises(UserError, match="26 of the 26 images of the run's train split"):
        evaluated(root, "train")


def test_a_network_is_exported_without_any_data(root):
    shutil.rmtree(root / "data")
    with pytest.raises(UserError, match=r"test images are not in .*data/test: put them there, or"):
        evaluated(root)
    with pytest.raises(UserError, match=r"train images are not in .*data/train: put them there"):
        check_unchanged(root / "run", config_for(root).data)
    export_run(root / "run", root / "exported")
    network = load_exported(root / "exported")
    known = read_run_data(root / "run")
    assert network.labels == CLASSES
    assert network.manifest["about"]["mean"] == list(known.mean)
    assert load_staged(root / "run").example.shape == (8, 8, 3)


def test_images_of_another_size_do_not_reach_the_network(root):
    scale_images(root)
    with pytest.raises(UserError, match="images of 9x9 pixels, the network takes 8x8"):
        evaluated(root)


def test_a_run_from_before_the_record_goes_on_and_gets_one(root):
    record = (root / "run" / FILE).read_bytes()
    (root / "run" / FILE).unlink()
    assert evaluated(root).reported.num_examples == 15
    resume(root)
    assert (root / "run" / FILE).read_bytes() == record


def test_a_damaged_record_is_named(root):
    (root / "run" / FILE).write_text('{"version": 1, "name": ')
    for attempt in (lambda: resume(root), lambda: evaluated(root)):
        with pytest.raises(UserError, match=r"data.json is damaged .* delete data.json"):
            attempt()
    (root / "run" / FILE).write_text('{"version": 7}')
    with pytest.raises(UserError, match='its "version" is 7'):
        evaluated(root)


def test_a_listing_of_another_run_is_noticed(root):
    listing = root / "run" / "data_files.json.gz"
    files = json.loads(gzip.decompress(listing.read_bytes()))
    files["train"][0][1] += 1
    listing.write_bytes(gzip.compress(json.dumps(files).encode()))
    with pytest.raises(UserError, match=r"data_files.json.gz belongs to another run"):
        resume(root)


def test_the_data_is_recorded_before_the_first_step(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", train=5)

    class Killed(BaseException):
        pass

    def kill(experiment, takes, **when):
        raise Killed

    monkeypatch.setattr(loop, "training_step", kill)
    with pytest.raises(Killed):
        resume(tmp_path)
    assert read_run_data(tmp_path / "run").splits["train"].examples == 8
