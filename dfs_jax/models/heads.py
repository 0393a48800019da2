"""Classifiers shared by several backbones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfs_jax.types import HeadOutput


class PooledLinearHead(nn.Module):
    """Global average pool over all positions, then a linear classifier.

    The classifier reads the pooled feature; the adapted feature is for feature distillation only.
    From the pool on, the computation is in float32 or wider, whatever the type of the map.

    Attributes:
      num_classes: number of classes, the width of the logits.
      use_bias: whether the classifier has a bias (VGG's has none).
      adapted_width: width of the adapted feature; None for no adaptation layer.
      dropout: dropout rate between the pooled feature and the classifier.
    """

    num_classes: int
    use_bias: bool = True
    adapted_width: int | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> HeadOutput:
        """Classifies `x` `[batch, height, width, channels]`."""
        pooled = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        classifier = nn.Dense(self.num_classes, use_bias=self.use_bias, name="classifier")
        logits = classifier(nn.Dropout(self.dropout, deterministic=not train)(pooled))
        if self.adapted_width is None:
            return HeadOutput(logits, pooled)
        return HeadOutput(logits, nn.Dense(self.adapted_width, name="adaptation")(pooled))
