"""Other programs to measure this one against; nothing in `dfs_jax` needs them."""
