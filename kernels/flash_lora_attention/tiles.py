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
def log2_scores(b_s, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scaled (and soft-capped) scores in units of log2, so that the softmax is an exp2."""
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + e^(2x)): exact at both ends, where e^(2x) is inf or 0.
        e = tl.exp2(b_s * (2.0 * LOG2_E * scale / softcap))
        return (softcap * LOG2_E) * (1.0 - 2.0 / (1.0 + e))
    else:
        return b_s * (scale * LOG2_E)
