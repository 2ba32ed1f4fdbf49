"""Write new tokens into several buffers at a place that only the device knows: one launch per layer instead of many."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from .buffers import NotReserved, TokenBuffer

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def append_tokens(index: torch.Tensor, jobs: Sequence[tuple[TokenBuffer, torch.Tensor]]) -> None:
    """Write each job's tokens (B, H, n, D) or (B, n, r) into its buffer.

    Args:
        index: () int64 on the buffers' device, the place of the first.
        jobs: buffers with room for them, and the tokens in any floating dtype; all have the same n.

    Raises:
        NotReserved: a buffer has no room; nothing was written.
    """
    for buffer, new in jobs:
        if buffer.data is None or new.shape[0] > buffer.data.shape[0]:
            raise NotReserved
    on_device = all(b.data is not None and b.data.is_cuda and b.data.shape[0] == new.shape[0] for b, new in jobs)
    if _HAS_TRITON and jobs and on_device:
        from .append_kernel import append_tokens_kernel

        append_tokens_kernel(index, [(b.data, new) for b, new in jobs if b.data is not None])
        return
    for buffer, new in jobs:
        buffer.put(index, new)
