"""Numbers for users: what a cache takes."""

from __future__ import annotations

from typing import TypedDict


class MemoryFootprint(TypedDict):
    """Bytes; see :meth:`SharedLoRACache.memory_footprint`."""

    base: int
    low_rank: dict[str, int]
    private: dict[str, int]
    expanded_keys: int
    positions: int
    total: int
    allocated: int
    non_shared: int
