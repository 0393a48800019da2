"""One image at a time: as in a batch, whatever ran before, and nobody's arrays are written over."""

import numpy as np
import pytest

from dfs_jax.inference import EarlyExitPredictor, Policy, onnx_models, quantize
from tests.inference.test_exported import EXAMPLE, median_at_first, some_images, tiny_stages

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

IMAGES = some_images(11)


@pytest.fixture(scope="module")
def stages():
    return tiny_stages()


@pytest.fixture(scope="module", params=["jax", "onnx"])
def in_runtime(request, stages):
    if request.param == "jax":
        return stages
    return quantize.opened(*onnx_models.written(stages, EXAMPLE))


@pytest.mark.parametrize("measure", ["max_softmax", "patience"])
def test_single_images_are_answered_as_in_a_batch(in_runtime, stages, measure):
    threshold = median_at_first(stages) if measure == "max_softmax" else 1.5
    predictor = EarlyExitPredictor(
        in_runtime,
        EXAMPLE,
        Policy((threshold,), measure, (1.25, 0.75)),
        batch_size=11,
        shapes=(1, 11),
        fall_back=False,
    )
    other = predictor.with_policy(Policy((-1.0,), measure))
    expected, alone = predictor(IMAGES), []
    for image in IMAGES:
        alone.append(predictor(image[None]))
        other(255 - image[None])
    for field in ("predicted", "exit_index"):
        got = np.concatenate([getattr(a, field) for a in alone])
        np.testing.assert_array_equal(got, getattr(expected, field))
    for field in ("probabilities", "confidence"):
        got = np.concatenate([getattr(a, field) for a in alone])
        np.testing.assert_allclose(got, getattr(expected, field), rtol=1e-5, atol=1e-6)
    assert len({*expected.exit_index.tolist()}) == (2 if measure == "max_softmax" else 1)


def test_the_whole_network_on_a_single_image(in_runtime):
    predictor = EarlyExitPredictor(in_runtime, EXAMPLE, batch_size=3)
    expected = predictor(IMAGES[:3]).probabilities
    alone = [predictor(image[None]).probabilities[0] for image in IMAGES[:3]]
    assert predictor.counts.whole == 6
    np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-6)


def test_a_network_without_a_program_of_its_own(stages):
    """Such as the part of a network up to an exit."""
    found = quantize.opened(*onnx_models.written(stages, EXAMPLE))
    found.whole = None
    predictor = EarlyExitPredictor(found, EXAMPLE, batch_size=3)
    expected = EarlyExitPredictor(stages, EXAMPLE, batch_size=3)(IMAGES[:1])
    got = predictor(IMAGES[:1])
    np.testing.assert_allclose(got.probabilities, expected.probabilities, rtol=1e-5, atol=1e-6)
