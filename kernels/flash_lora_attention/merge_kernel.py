"""The kernel of ``merge_states``: the second stage of split-KV attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .calls import empty, serve, start_kernel
from .sizes import cdiv, next_power_of_2
from .tuning import num_sms


@triton.jit(do_not_specialize=["num_parts", "rows", "S"])
def merge_kernel(
    PARTS, PART_LSE, SINKS, OUT, LSE, num_parts, rows, S,
    HQ: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """``merge_states`` on contiguous (n, rows, D) parts, rows = B Hq S; one program per BLOCK_R rows."""
    # Parts are merged in blocks, in a fixed order.
    o_i = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    o_p = tl.arange(0, BLOCK_S)
    inside = o_i < rows
    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_o = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if SINKS is not None:
        b_max = tl.load(SINKS + (o_i // S) % HQ).to(tl.float32)
        b_sum += 1.0
    if DEPENDENT:
        gdc_wait()
    for start in range(0, num_parts, BLOCK_S):
        part = (start + o_p).to(tl.int64)
        o_part = part[None, :] * rows + o_i[:, None]
        # (rows, parts)
        b_lse = tl.load(
            PART_LSE + o_part, mask=(part < num_parts)[None, :] & inside[:, None], other=float("-inf")
        )  # fmt: skip
        # (rows, parts, D): what no key of a part contributed to may hold anything, and is not read
        b_part = tl.load(
            PARTS + o_part[:, :, None] * D + o_d[None, None, :],
            mask=(b_lse > float("-inf"))[:, :, None] & (o_d < D)[None, None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        b_new = tl.maximum(b_max, tl.max(b_lse, axis=1))
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_scale = tl.exp(b_max - b_ref)
        b_w = tl.exp(b_lse - b_ref[:, None])
        b_o = b_o * b_scale[:, None] + tl.sum(b_part * b_w[:, :, None], axis=1)
        b_sum = b_sum * b_scale + tl.sum(b_w, axis=1)
        b_max = b_new
    seen = b_sum > 0.0
    b_div = tl.where(seen, b_sum, 1.0)
    p_o = OUT + o_i[:, None] * D + o_d[None, :]
    tl.store(p_o, (b_o / b_div[:, None]).to(OUT.dtype.element_ty), mask=inside[:, None] & (o_d < D)[None, :])
    tl.store(LSE + o_i, tl.where(seen, b_max + tl.log(b_div), float("-inf")), mask=inside)


def launches_dependents(device: torch.device) -> bool:
    """Whether kernels can be launched while the one before still runs (programmatic dependent launch, since Hopper)."""
    if device.type != "cuda" or torch.version.hip is not None:  # ROCm's devices are "cuda" too
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def merge_partials(
    out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge contiguous parts (n, B, Hq, S, D) and (n, B, Hq, S) in one kernel; ``merge_states`` checks and dispatches."""
    merged, total = serve((out, lse, sinks), ("merge", dtype), lambda: _merge(out, lse, dtype, sinks))
    return merged, total


def _merge(
    out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    parts, B, Hq, S, D = out.shape
    merged = empty((B, Hq, S, D), dtype, out.device)
    total = empty((B, Hq, S), torch.float32, out.device)
    rows = B * Hq * S
    if rows:
        # Launched while the parts are still being written, it waits for them on the device.
        dependent = launches_dependents(out.device)
        block_s = min(32, next_power_of_2(parts))
        block_d = next_power_of_2(D)
        # Some 4,096 elements in flight per program, as long as there are programs for the whole device.
        block_r = next_power_of_2(max(1, min(4096 // (block_s * block_d), rows // (2 * num_sms(out.device)))))
        start_kernel(
            merge_kernel, (cdiv(rows, block_r),),
            out, lse, sinks, merged, total, parts, rows, S, HQ=Hq, D=D, BLOCK_D=block_d, BLOCK_R=block_r,
            BLOCK_S=block_s, DEPENDENT=dependent, num_warps=4, **({"launch_pdl": True} if dependent else {}),
        )  # fmt: skip
    return merged, total
