"""Shared fixtures: a compilation cache, and the optional directory of golden files and images."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import jaxlib


def _xla_knows(flag: str) -> bool:
    """Whether this jaxlib has a flag; one that it does not know ends the process."""
    for library in Path(jaxlib.__file__).parent.glob("libjax_common.*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
            return text.find(flag.encode()) >= 0
    return False


# Compilation dominates the suite: cheap code is enough here, and what compiled once stays on disk.
# Fused loops by the older emitter compile in half the time. Set before jax starts its backend.
_FLAGS = ["--xla_backend_optimization_level=0"]
if _xla_knows("xla_cpu_use_fusion_emitters"):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"

jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".cache" / "tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """What a file compiled is of no use to the next one: kept, it adds up to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The directory of golden files and real images beside the repository; skips where absent."""
    if not SHARED.is_dir():
        pytest.skip("no directory of golden files and images beside the repository")
    return SHARED
