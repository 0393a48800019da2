"""Programs that measure this project; nothing in `dfs_jax` needs them."""
