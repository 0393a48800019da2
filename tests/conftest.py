"""Shared fixtures: a compilation cache, and the optional directory of golden files and images."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

from tests.support.xla_flags import quick_to_compile

# Compilation dominates the suite: what compiled once stays on disk. Set before its backend starts.
os.environ.setdefault("XLA_FLAGS", quick_to_compile())
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"

jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".cache" / "tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# A shell ignores SIGINT for a command in the background and `nohup` SIGHUP; the tests send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """What a file compiled is of no use to the next one: kept, it adds up to gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


# Tracing makes millions of objects, and collecting them while it does takes a quarter of the time.
gc.disable()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The directory of golden files and real images next to the repository; skips if absent."""
    if not SHARED.is_dir():
        pytest.skip("no directory of golden files and images beside the repository")
    return SHARED
