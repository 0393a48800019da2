"""scikit-learn's handwritten digits: a real data set that needs no download."""

from __future__ import annotations

import numpy as np

from dfs_jax.data.dataset import RawDataset, Split
from dfs_jax.data.images import decode_images

_SPLIT_SEED = 1797
_HELD_OUT_A_CLASS = 30


def load_digits(image_size: int = 32) -> RawDataset:
    """Returns 1,197 training, 300 validation and 300 test images of 10 classes.

    The 1,797 images of 8x8 pixels and 17 levels (Alpaydin and Kaynak, UCI, 1998) are scaled to
    `image_size`, with three equal channels. The split is fixed, with 30 images of each class in
    validation and in test.

    Args:
      image_size: side in pixels.
    """
    # Imported here because scikit-learn is slow to import.
    from sklearn import datasets

    grey, labels = datasets.load_digits(return_X_y=True)
    levels = np.round(grey.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    images = decode_images(list(levels), len(levels), image_size, lambda i: f"digit {i}")
    random = np.random.Generator(np.random.Philox(_SPLIT_SEED))
    by_class = [random.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    cuts = (_HELD_OUT_A_CLASS, 2 * _HELD_OUT_A_CLASS)
    parts = zip(*(np.split(indices, cuts) for indices in by_class), strict=True)
    test, validation, train = (np.sort(np.concatenate(part)) for part in parts)
    whole = Split(images, labels.astype(np.int32))
    return RawDataset(
        whole.take(train),
        whole.take(test),
        tuple(str(digit) for digit in range(10)),
        whole.take(validation),
    )
