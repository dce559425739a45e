"""The memory of this process, on any system."""

from __future__ import annotations

import sys

import psutil  # type: ignore[import-untyped]


try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]


def peak_bytes() -> int:
    """The most memory that this process has held so far; where the system does not tell, what it holds now."""
    if resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux kilobytes
    held = psutil.Process().memory_info()
    return int(getattr(held, "peak_wset", held.rss))
