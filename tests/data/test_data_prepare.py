"""Preparing TFDS sets: what can be tried without a network, and the whole with TensorFlow."""

from __future__ import annotations

import importlib.util
import io
import time
import types
import urllib.error
import urllib.request
from email.message import Message

import numpy as np
import pytest

from dfs_jax.data import load_dataset
from dfs_jax.data import prepare as prepare_module
from dfs_jax.data.prepare import main, prepare
from dfs_jax.types import UserError


def _pretend(monkeypatch, installed: bool) -> None:
    find_spec = importlib.util.find_spec
    spec = types.SimpleNamespace() if installed else None
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: spec if name == "tensorflow" else find_spec(name, *a),
    )


@pytest.fixture
def with_tensorflow(monkeypatch):
    _pretend(monkeypatch, installed=True)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(request, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_says_that_it_needs_tensorflow(monkeypatch, tmp_path, capsys):
    _pretend(monkeypatch, installed=False)
    assert main(["cifar10", f"--data_dir={tmp_path}"]) == 2
    assert "pip install -r requirements-prepare.txt" in capsys.readouterr().err


def test_a_set_that_is_there_needs_no_tensorflow(monkeypatch, shared_dir, capsys):
    _pretend(monkeypatch, installed=False)
    assert main(["cifar10", f"--data_dir={shared_dir / 'tfds'}"]) == 0
    assert capsys.readouterr().out.startswith("cifar10 is ready in ")


def test_imagenet_is_explained_without_tensorflow_too(monkeypatch, tmp_path):
    _pretend(monkeypatch, installed=False)
    with pytest.raises(UserError) as caught:
        prepare("imagenet2012", str(tmp_path))
    for part in (
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
        str(tmp_path / "downloads" / "manual"),
        f"`python -m dfs_jax.data.prepare imagenet2012 --data_dir={tmp_path}`",
    ):
        assert part in str(caught.value)


def test_unknown_set_is_told_before_anything_else(tmp_path, capsys):
    assert main(["cifer10", f"--data_dir={tmp_path / 'new'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown data set 'cifer10'")
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("with_tensorflow", "no_network")
def test_without_a_network_it_fails_at_once(tmp_path):
    prepare_module.check_registered("cifar10")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"kriz/cifar-100-binary.*cannot be reached"):
        prepare("cifar100", str(tmp_path / "new"))
    assert time.monotonic() - start < 2


@pytest.mark.usefixtures("with_tensorflow", "no_network")
def test_loading_an_absent_set_prepares_it(tmp_path):
    with pytest.raises(UserError, match=r"cannot be reached.*prepare cifar10 --data_dir="):
        load_dataset("cifar10", data_dir=str(tmp_path))


@pytest.mark.usefixtures("with_tensorflow")
@pytest.mark.parametrize("answer", ["refuses", "unreachable but downloaded"])
def test_what_is_reachable_or_there_is_downloaded(tmp_path, monkeypatch, answer):
    import tensorflow_datasets as tfds

    def urlopen(request, timeout):
        if answer == "refuses":
            raise urllib.error.HTTPError(
                request.full_url, 403, "Forbidden", Message(), io.BytesIO()
            )
        raise urllib.error.URLError("no network")

    if answer != "refuses":
        (tmp_path / "downloads").mkdir()
        urls = ", ".join(f'"{url}"' for url in tfds.builder_cls("cifar10").url_infos)
        (tmp_path / "downloads" / "cifar.INFO").write_text(f'{{"urls": [{urls}]}}')
    asked = {}

    def download_and_prepare(self, **options):
        asked.update(options)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    builder = tfds.core.DatasetBuilder
    monkeypatch.setattr(builder, "download_and_prepare", download_and_prepare)
    assert prepare("cifar10", str(tmp_path)) == tmp_path / "cifar10" / "3.0.2"
    assert asked["download_dir"] == str(tmp_path / "downloads")
    assert not asked["download_config"].try_download_gcs


@pytest.mark.usefixtures("with_tensorflow")
@pytest.mark.parametrize("kind", ["connection", "checksum", "disk"])
def test_download_that_fails_is_told_in_a_sentence(tmp_path, monkeypatch, kind):
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    error = {
        "connection": requests.ConnectionError("it broke off"),
        "checksum": NonMatchingChecksumError("it broke off"),
        "disk": OSError("it broke off"),
    }[kind]

    def fail(self, **options):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: io.BytesIO())
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(UserError, match=r"'cifar10'.*it broke off"):
        prepare("cifar10", str(tmp_path))


@pytest.mark.usefixtures("with_tensorflow")
def test_imagenet_says_which_archives_go_where(tmp_path, capsys):
    manual = tmp_path / "downloads" / "manual"
    assert main(["imagenet2012", f"--data_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar" in error
    assert str(manual) in error
    manual.mkdir(parents=True)
    (manual / "ILSVRC2012_img_train.tar").touch()
    with pytest.raises(UserError, match=r"put ILSVRC2012_img_val\.tar into"):
        prepare("imagenet2012", str(tmp_path))


@pytest.mark.usefixtures("with_tensorflow")
def test_other_sets_by_hand_give_their_own_instructions(tmp_path):
    with pytest.raises(UserError, match=r"by hand into .*manual"):
        prepare("chexpert", str(tmp_path))


@pytest.mark.usefixtures("with_tensorflow")
def test_data_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data_dir .*file, which is a file: name another"):
        prepare("cifar10", str(tmp_path / "file" / "below"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_prepares_converts_and_loads(tmp_path):
    """The whole way for a set that needs no download; runs where TensorFlow is installed."""
    pytest.importorskip("tensorflow")
    import tensorflow_datasets as tfds

    class LevelSet(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(5, 7, 1)),
                    "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(23), "test": self._generate_examples(7)}

        def _generate_examples(self, count):
            for level in range(count):
                yield level, {"image": np.full((5, 7, 1), level, np.uint8), "label": level % 3}

    def check(directory):
        dataset = load_dataset("level_set", data_dir=str(directory), validation_examples=0)
        levels = dataset.train.images[:, 2, 3, 1]
        np.testing.assert_array_equal(np.sort(levels), np.arange(23))
        np.testing.assert_array_equal(levels % 3, dataset.train.labels)

    (tmp_path / "downloaded").mkdir()
    check(tmp_path / "downloaded")
    old = tfds.builder("level_set", data_dir=str(tmp_path / "old"), file_format="tfrecord")
    old.download_and_prepare()
    with pytest.raises(UserError, match="tfrecord format"):
        check(tmp_path / "old")
    for _ in range(2):
        assert main(["level_set", f"--data_dir={tmp_path / 'old'}"]) == 0
        check(tmp_path / "old")
