"""Attention of a long block of queries over K and V that stand ready in memory, for Hopper.

FlashAttention-2's algorithm (Dao, arXiv 2307.08691) with tiles copied by the tensor memory accelerator, from tensor maps that
the host makes. It takes any lengths at once: cuDNN's attention is a fifth faster, once it has a plan for a pair of lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .calls import TensorMap, empty, start_kernel, tensor_map
from .merge_kernel import merge_partials
from .sizes import cdiv, next_power_of_2
from .tiles import LOG2_E
from .tuning import DenseConfig, num_sms


@triton.jit
def _tile(
    K, V, i_kb, i_vb, i_kh, start, b_q, b_max, b_sum, b_o, last, scale,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys: what the queries have seen so far, with it. ``scale`` is in units of log2."""
    b_k = tl.reshape(K.load([i_kb, i_kh, start, 0]), [BLOCK_N, BLOCK_D])
    b_s = tl.dot(b_q, tl.trans(b_k))
    if MASKED:
        o_t = start + tl.arange(0, BLOCK_N)
        b_s = tl.where(o_t[None, :] <= last[:, None], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1) * scale)
    b_p = tl.exp2(b_s * scale - b_new[:, None])
    b_scale = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_scale + tl.sum(b_p, axis=1)
    b_v = tl.reshape(V.load([i_vb, i_kh, start, 0]), [BLOCK_N, BLOCK_D])
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_scale[:, None])
    return b_new, b_sum, b_o


@triton.jit(do_not_specialize=["S", "length", "split_keys", "num_splits"])
def dense_kernel(
    Q, K, V, OUT, LSE, SINKS, S, length, split_keys, num_splits, scale,
    HQ: tl.constexpr, G: tl.constexpr, KEY_ROWS: tl.constexpr, VALUE_ROWS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head over one piece of the keys, of which every query sees the first.

    Q (B, Hq, S, D), K and V (B, Hk, length, D), OUT (num_splits B, Hq, S, D) are tensor maps, LSE (num_splits, B, Hq, S).
    """
    # The blocks that see most keys first.
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.program_id(1) % HQ
    i_b = tl.program_id(1) // HQ
    i_split = tl.program_id(2)
    num_b = tl.num_programs(1) // HQ
    start = i_split * split_keys
    stop = tl.where(i_split == num_splits - 1, length, start + split_keys)
    o_s = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    last = tl.zeros_like(o_s) + length - 1
    unmasked = stop
    if IS_CAUSAL:
        past = length - S
        last = tl.minimum(last, past + o_s)
        unmasked = tl.minimum(stop, past + i_m * BLOCK_M + 1)
        stop = tl.minimum(stop, past + (i_m + 1) * BLOCK_M)
    unmasked = start + (unmasked - start) // BLOCK_N * BLOCK_N

    b_q = tl.reshape(Q.load([i_b, i_h, i_m * BLOCK_M, 0]), [BLOCK_M, BLOCK_D])
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if SINKS is not None:
        if i_split == 0:
            b_max = tl.zeros_like(b_sum) + tl.load(SINKS + i_h).to(tl.float32) * LOG2_E
            b_sum += 1.0
    for n in tl.range(start, unmasked, BLOCK_N, num_stages=STAGES):
        b_max, b_sum, b_o = _tile(
            K, V, i_b * KEY_ROWS, i_b * VALUE_ROWS, i_h // G, n, b_q, b_max, b_sum, b_o, last, scale,
            False, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for n in tl.range(unmasked, stop, BLOCK_N, num_stages=STAGES):
        b_max, b_sum, b_o = _tile(
            K, V, i_b * KEY_ROWS, i_b * VALUE_ROWS, i_h // G, n, b_q, b_max, b_sum, b_o, last, scale,
            True, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    row = i_split * num_b + i_b
    p_lse = LSE + (row.to(tl.int64) * HQ + i_h) * S + o_s
    tl.store(p_lse, b_max / LOG2_E + tl.log(b_sum), mask=o_s < S)
    b_out = (b_o / b_sum[:, None]).to(OUT.dtype)
    OUT.store([row, i_h, i_m * BLOCK_M, 0], tl.reshape(b_out, [1, 1, BLOCK_M, BLOCK_D]))


def dense_serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> bool:
    """Whether this device has the accelerator and the tensors can be described to it: 16 bits, D in units of 16 bytes."""
    if not query.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(query.device)[0] != 9:
        return False
    return can_be_mapped(query, key, value) and scale > 0


def can_be_mapped(*tensors: torch.Tensor) -> bool:
    """Whether tensor maps can describe these (B, H, T, D): 16 bits, rows of whole 16 bytes, D at most 256."""
    return all(
        t.dtype in (torch.bfloat16, torch.float16) and t.dtype == tensors[0].dtype and 0 < t.shape[-1] <= 256
        and t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and 0 not in t.shape
        and all(stride % 8 == 0 for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size > 1)
        and all(stride > 0 for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True) if size > 1)
        for t in tensors
    )  # fmt: skip


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    is_causal: bool,
    sinks: torch.Tensor | None,
    config: DenseConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a mask but causality, which is aligned to the lower right.

    Args:
        query: (B, Hq, S, D) in 16 bits, as ``can_be_mapped`` asks for; so are the next two.
        key, value: (B, Hk, T, D), T >= S if causal; batch stride 0 where all rows have the same.
        scale: of the scores, positive.
        sinks: (Hq,) one extra logit per head.
        config: from ``tuning``.

    Returns:
        out (B, Hq, S, D) in the dtype of the query, lse (B, Hq, S) float32.
    """
    B, Hq, S, D = query.shape
    Hk, T = key.shape[1:3]
    num_m = cdiv(S, config.block_m)
    num_splits, split_keys = 1, cdiv(T, config.block_n) * config.block_n
    # Every query sees the first key of the last piece: pieces are cut from what all of them see.
    common = T - S if is_causal else T - 1
    while 2 * num_splits * num_m * B * Hq <= config.programs_per_sm * num_sms(query.device):
        keys = common // (2 * num_splits) // config.block_n * config.block_n
        if keys < config.min_keys:
            break
        num_splits, split_keys = 2 * num_splits, keys
    block_d = max(16, next_power_of_2(D))
    one = num_splits == 1
    out = empty((B, Hq, S, D) if one else (num_splits, B, Hq, S, D), query.dtype, query.device, tokens_first=one)
    lse = empty((B, Hq, S) if one else (num_splits, B, Hq, S), torch.float32, query.device)

    def mapped(tensor: torch.Tensor, rows: int, block: int) -> TensorMap:
        sizes, strides = (rows, *tensor.shape[-3:]), [*tensor.stride()[-4:]]
        # What is never stepped over may have any stride; the accelerator wants one of whole 16 bytes.
        strides = [
            stride if size > 1 or i == 3 else 8 for i, (size, stride) in enumerate(zip(sizes, strides, strict=True))
        ]
        return tensor_map(tensor, sizes, tuple(strides), (1, 1, block, block_d))

    rows = [1 if t.stride(0) == 0 else B for t in (key, value)]
    start_kernel(
        dense_kernel, (num_m, B * Hq, num_splits),
        mapped(query, B, config.block_m), mapped(key, rows[0], config.block_n), mapped(value, rows[1], config.block_n),
        mapped(out, num_splits * B, config.block_m), lse, sinks, S, T, split_keys, num_splits, scale * LOG2_E.value,
        HQ=Hq, G=Hq // Hk, KEY_ROWS=int(rows[0] > 1), VALUE_ROWS=int(rows[1] > 1), IS_CAUSAL=is_causal,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    return (out, lse) if one else merge_partials(out, lse, query.dtype, None)
