"""Training: configuration, the step, the loop, checkpoints and what a run records."""

from dfs_jax.extras import require

require("ml_collections", "tqdm")
