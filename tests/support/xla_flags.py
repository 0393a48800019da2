"""XLA's flags for a suite that compiles for longer than it runs."""

from __future__ import annotations

import mmap
from pathlib import Path

import jaxlib


def quick_to_compile() -> str:
    """Returns flags for unoptimised code, and the quicker emitter of fused loops."""
    flags = ["--xla_backend_optimization_level=0"]
    if _is_known("xla_cpu_use_fusion_emitters"):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)


def _is_known(flag: str) -> bool:
    """Returns whether this jaxlib has a flag; one that it does not know would end the process."""
    for library in Path(jaxlib.__file__).parent.glob("libjax_common.*"):
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            return text.find(flag.encode()) >= 0
    return False
