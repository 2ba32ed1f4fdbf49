"""Device functions that the kernels of this package share: rotary pairs, visible keys, scores in base 2.

They are plain ``triton.jit`` functions on tiles that are already in registers; loads and loops belong to the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def pair_columns(i, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two columns of a head that rotary pair ``i`` consists of.

    Pairs from ``ROTARY / 2`` on stand for the columns that are not rotated: all D columns appear exactly once, so a dot
    product over the pairs is a dot product over the head.
    """
    if INTERLEAVED:
        first = 2 * i
        second = 2 * i + 1
    elif ROTARY == D:
        first = i
        second = i + ROTARY // 2
    else:
        first = tl.where(i < ROTARY // 2, i, i + ROTARY // 2)
        second = tl.where(i < ROTARY // 2, i + ROTARY // 2, i + D // 2)
    return first, second


@triton.jit
def visible_range(o_s, b_length, valid, S, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """First and last key (inclusive) that each query may see; invalid queries see none.

    Causality is aligned to the lower right: query s stands at position ``length - S + s``.
    """
    position = b_length - S + o_s
    last = position if IS_CAUSAL else b_length - 1
    last = tl.where(valid, last, -1)
    first = position - window + 1 if HAS_WINDOW else tl.zeros_like(position)
    return first, last


@triton.jit
def log2_softcap(b_s, softcap):
    """``softcap * tanh(scores / softcap)`` of scores in units of log2, so that the softmax is an exp2."""
    b_x = tl.abs(b_s) * (1.0 / (LOG2_E * softcap))
    b_u = tl.exp2(b_x * (-2.0 * LOG2_E))
    b_tanh = (1.0 - b_u) / (1.0 + b_u)
    # 1 - u loses digits where the scores are small beside the cap, as most are: there the series, to 1e-9.
    b_x2 = b_x * b_x
    b_series = b_x * (1.0 - b_x2 * (1.0 / 3.0 - b_x2 * (2.0 / 15.0 - b_x2 * (17.0 / 315.0))))
    b_tanh = tl.where(b_x < 0.125, b_series, b_tanh)
    return tl.where(b_s < 0.0, -b_tanh, b_tanh) * (softcap * LOG2_E)


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """The stride, as a number of which the compiler knows that ALIGN divides it.

    It finds out about divisibility by 16 elements on its own. Rows of 8 or of 40 entries of 16 bits can be copied to shared
    memory asynchronously as well, and must be: see ``inputs.prepare``.
    """
    return stride // ALIGN * ALIGN


@triton.jit
def prefetch_rows(p_row, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Ask for rows of D entries (pointers to their first) to be brought into L2, in lines of 64 bytes; CUDA only."""
    LINE: tl.constexpr = 512 // p_row.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = BLOCK_D // LINE if BLOCK_D > LINE else 1
    o_line = tl.minimum(tl.arange(0, LINES) * LINE, D - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [p_row[:, None] + o_line[None, :] * stride],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
