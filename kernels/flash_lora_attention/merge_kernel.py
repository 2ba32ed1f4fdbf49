"""The kernel of ``merge_states``: the second stage of split-KV attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit(do_not_specialize=["num_parts", "rows", "S"])
def merge_kernel(
    PARTS, PART_LSE, SINKS, OUT, LSE, num_parts, rows, S,
    HQ: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """``merge_states`` on contiguous (n, rows, D) parts, rows = B Hq S."""
    # One program per (row, head, query); parts are merged in blocks, in a fixed order.
    i = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    o_p = tl.arange(0, BLOCK_S)
    b_max = tl.full([], float("-inf"), tl.float32)
    b_sum = tl.zeros([], tl.float32)
    b_o = tl.zeros([BLOCK_D], tl.float32)
    if SINKS is not None:
        b_max = tl.load(SINKS + (i // S) % HQ).to(tl.float32)
        b_sum += 1.0
    if DEPENDENT:
        gdc_wait()
    for start in range(0, num_parts, BLOCK_S):
        part = (start + o_p).to(tl.int64)
        # (parts,)
        b_lse = tl.load(PART_LSE + part * rows + i, mask=part < num_parts, other=float("-inf"))
        # (parts, D)
        p_o = PARTS + (part[:, None] * rows + i) * D + o_d[None, :]
        b_part = tl.load(p_o, mask=(b_lse > float("-inf"))[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
        b_new = tl.maximum(b_max, tl.max(b_lse, axis=0))
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_scale = tl.exp(b_max - b_ref)
        b_w = tl.exp(b_lse - b_ref)
        b_o = b_o * b_scale + tl.sum(b_part * b_w[:, None], axis=0)
        b_sum = b_sum * b_scale + tl.sum(b_w, axis=0)
        b_max = b_new
    seen = b_sum > 0.0
    b_div = tl.where(seen, b_sum, 1.0)
    tl.store(OUT + i * D + o_d, (b_o / b_div).to(OUT.dtype.element_ty), mask=o_d < D)
    tl.store(LSE + i, tl.where(seen, b_max + tl.log(b_div), float("-inf")))


def merge_partials(
    out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge contiguous parts (n, B, Hq, S, D) and (n, B, Hq, S) in one kernel; ``merge_states`` checks and dispatches."""
    parts, B, Hq, S, D = out.shape
    merged = torch.empty((B, Hq, S, D), dtype=dtype, device=out.device)
    total = torch.empty((B, Hq, S), dtype=torch.float32, device=out.device)
    rows = B * Hq * S
    if rows:
        # Launched while the parts are still being written, it waits for them on the device (Hopper and later).
        dependent = out.is_cuda and torch.cuda.get_device_capability(out.device)[0] >= 9
        merge_kernel[(rows,)](
            out, lse, sinks, merged, total, parts, rows, S, HQ=Hq, D=D, BLOCK_D=triton.next_power_of_2(D),
            BLOCK_S=min(32, triton.next_power_of_2(parts)), DEPENDENT=dependent, num_warps=4,
            **({"launch_pdl": True} if dependent else {}),
        )  # fmt: skip
    return merged, total
