"""The launch behind ``append.append_tokens``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from flash_lora_attention.calls import serve, start_kernel
from flash_lora_attention.sizes import next_power_of_2


@triton.jit
def _append_kernel(  # type: ignore[no-untyped-def]
    INDEX, TARGETS, SOURCES, target_b, target_h, target_t, source_b, source_h, source_t,
    N: tl.constexpr, HEADS: tl.constexpr, WIDTHS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One job, one row and one token per program; the tuples hold one element per job."""
    job = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    i_t = tl.program_id(2).to(tl.int64)
    t = tl.load(INDEX) + i_t
    for j in tl.static_range(N):
        if job == j:
            o = tl.arange(0, BLOCKS[j])
            o_h = (o // WIDTHS[j]).to(tl.int64)
            o_d = o % WIDTHS[j]
            m = o < HEADS[j] * WIDTHS[j]
            b_x = tl.load(SOURCES[j] + i_b * source_b[j] + o_h * source_h[j] + i_t * source_t[j] + o_d, mask=m)
            p_t = TARGETS[j] + i_b * target_b[j] + o_h * target_h[j] + t * target_t[j] + o_d
            tl.store(p_t, b_x.to(TARGETS[j].dtype.element_ty), mask=m)


# The kernel has a branch per job, so what the compiler needs grows with them; 20 adapters have 42.
MAX_JOBS = 16


def append_tokens_kernel(index: torch.Tensor, jobs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write tokens (B, H, n, D) or (B, n, r) into storage (B, H, T, D) or (B, T, r) at ``index`` and behind it."""
    for first in range(0, len(jobs), MAX_JOBS):
        _launch(index, jobs[first : first + MAX_JOBS])


def _launch(index: torch.Tensor, jobs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    tensors = (index, *(target for target, _ in jobs), *(new for _, new in jobs))
    serve(tensors, ("append",), lambda: _start(index, jobs))


def _start(index: torch.Tensor, jobs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[()]:
    four = [tuple(t if t.dim() == 4 else t[:, None] for t in job) for job in jobs]
    targets = tuple(target for target, _ in four)
    sources = tuple(new if new.stride(-1) == 1 else new.contiguous() for _, new in four)
    heads, widths = tuple(t.shape[1] for t in targets), tuple(t.shape[-1] for t in targets)
    start_kernel(
        _append_kernel, (len(jobs), sources[0].shape[0], sources[0].shape[2]), index, targets, sources,
        tuple(t.stride(0) for t in targets), tuple(t.stride(1) for t in targets), tuple(t.stride(2) for t in targets),
        tuple(s.stride(0) for s in sources), tuple(s.stride(1) for s in sources), tuple(s.stride(2) for s in sources),
        N=len(jobs), HEADS=heads, WIDTHS=widths,
        BLOCKS=tuple(next_power_of_2(h * w) for h, w in zip(heads, widths, strict=True)),
    )  # fmt: skip
    return ()
