"""Split-KV kernel for few queries on many keys: one pass over the base cache, low-rank parts expanded on chip.

Every program takes one KV head, a range of keys and all queries of that head (grouped heads, query tokens and, where rows
share one trunk, several rows). Scores are computed transposed, ``S^T = K q^T``: the long side of the tile is then the keys,
so tensor cores are full however few queries there are, and the expanded ``RoPE_t(a_k B_k)`` leaves one matrix product as
the accumulator of (keys, pairs) and enters the next as its left operand, without a trip through shared memory. It never
touches the K tile itself: ``K q + RoPE(a B) q`` are two products, which makes the two key-norm numbers plain factors per
key. V is not expanded at all: ``P a_v`` is accumulated beside ``P V`` (LRAgent, arXiv 2602.01053, section 4.3).

It is not for long prompts: there the expansion is better done once (``expand.py``) than once per tile of queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .inputs import Inputs, launch
from .merge_kernel import merge_partials
from .tiles import LOG2_E, log2_scores, pair_columns, visible_range
from .tuning import SHORT_HEAD_KEYS, WIDE_RANK, DecodeConfig, num_sms

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["B", "S", "T", "key_length", "window", "num_m", "num_groups", "num_splits"])
def split_kv_kernel(
    Q, K, V, KA, KUP, VA, VUP, INDEX, COS, SIN, GAIN, DELTA_GAIN, SINKS, MASK, LENGTH, OUT, LSE,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_kab, stride_kat,
    stride_vab, stride_vat,
    stride_cb, stride_ct, stride_cd,
    stride_gb, stride_gh, stride_gt,
    stride_mb, stride_mh, stride_ms, stride_mt,
    stride_nb,
    B, S, T, key_length, scale, softcap, window, num_m, num_groups, num_splits,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, FLOAT_MASK: tl.constexpr, PER_ADAPTER: tl.constexpr,
    ROWS: tl.constexpr, DELTA_ROWS: tl.constexpr, UP_ONCE: tl.constexpr, KEY_IN_PAIRS: tl.constexpr,
    HALVES: tl.constexpr, PARTIAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_RK: tl.constexpr, BLOCK_RV: tl.constexpr, PAD_RV: tl.constexpr, CHUNK_RK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One KV head, one range of keys, all its queries; arguments as in ``Inputs``, strides in elements."""
    dtype = Q.dtype.element_ty
    # Heads are the fastest index: the programs that read the same cos/sin and low-rank entries run side by side, and so
    # do the row groups that read the same trunk.
    i = tl.program_id(0)
    i_h = (i % HK).to(tl.int64)
    i = i // HK
    i_m = i % num_m
    i = i // num_m
    i_b = (i % num_groups).to(tl.int64) * ROWS  # first row of the group
    zero = i_b * 0  # int64: what is added to it is addressed in 64 bits
    i_split = i // num_groups

    # Column m of the tile: row, query token and grouped head, the head fastest.
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_g = o_m % G
    o_s = (o_m // G) % S
    o_row = o_m // (G * S)
    o_b = i_b + o_row
    valid = (o_row < ROWS) & (o_b < B)
    o_hq = i_h * G + o_g
    if LENGTH is not None:
        b_length = tl.load(LENGTH + o_b * stride_nb, mask=valid, other=0).to(tl.int32)
    else:
        b_length = tl.zeros([BLOCK_M], tl.int32) + key_length
    first, last = visible_range(o_s, b_length, valid, S, window, IS_CAUSAL, HAS_WINDOW)

    # This program's keys: an equal share, in whole tiles, of what any of its queries sees.
    hi = tl.minimum(tl.max(last, axis=0) + 1, T)
    lo = tl.maximum(tl.min(tl.where(valid, first, T), axis=0), 0) // BLOCK_N if HAS_WINDOW else 0
    tiles = tl.maximum(tl.cdiv(hi, BLOCK_N) - lo, 0)
    begin = (lo + (i_split * tiles) // num_splits) * BLOCK_N
    end = tl.minimum((lo + ((i_split + 1) * tiles) // num_splits) * BLOCK_N, hi)

    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    p_q = Q + o_b * stride_qb + o_hq * stride_qh + o_s * stride_qs  # (M,)
    if not KEY_IN_PAIRS:
        # (D, M)
        b_q = tl.load(p_q[None, :] + o_d[:, None] * stride_qd, mask=valid[None, :] & (o_d < D)[:, None], other=0.0)
        o_kn = o_n[:, None] * stride_kt + o_d[None, :] * stride_kd
    p_k = K + i_b * stride_kb + i_h * stride_kh
    p_v = V + i_b * stride_vb + i_h * stride_vh
    o_vn = o_n[:, None] * stride_vt + o_d[None, :] * stride_vd

    if KA is not None:
        # The rotary pairs are taken in one or two halves, so that only half of the expansion is in registers at a time.
        o_p = tl.arange(0, BLOCK_P // HALVES)
        m_q = valid[None, :] & (o_p < D // 2)[:, None]
        o_1, o_2 = pair_columns(o_p, D, ROTARY, INTERLEAVED)
        # (P, M) each: the query's columns in the order of the pairs
        b_q1 = tl.load(p_q[None, :] + o_1[:, None] * stride_qd, mask=m_q, other=0.0)
        b_q2 = tl.load(p_q[None, :] + o_2[:, None] * stride_qd, mask=m_q, other=0.0)
        if HALVES == 2:
            o_p_high = o_p + BLOCK_P // 2
            m_q = valid[None, :] & (o_p_high < D // 2)[:, None]
            o_1_high, o_2_high = pair_columns(o_p_high, D, ROTARY, INTERLEAVED)
            b_q1_high = tl.load(p_q[None, :] + o_1_high[:, None] * stride_qd, mask=m_q, other=0.0)
            b_q2_high = tl.load(p_q[None, :] + o_2_high[:, None] * stride_qd, mask=m_q, other=0.0)
        o_rk = tl.arange(0, CHUNK_RK)
        if UP_ONCE:
            n_0 = tl.load(INDEX + i_b).to(tl.int64) if INDEX is not None else zero
            p_up = KUP + (tl.maximum(n_0, 0) * HK + i_h) * (RK * D) + o_rk[:, None] * D
            m_up = (o_rk < RK)[:, None] & (o_p < D // 2)[None, :]
            # (r, P) each: one adapter for the whole program, read once
            b_up1 = tl.load(p_up + o_1[None, :], mask=m_up, other=0.0).to(dtype)
            b_up2 = tl.load(p_up + o_2[None, :], mask=m_up, other=0.0).to(dtype)
            if HALVES == 2:
                m_up = (o_rk < RK)[:, None] & (o_p_high < D // 2)[None, :]
                b_up1_high = tl.load(p_up + o_1_high[None, :], mask=m_up, other=0.0).to(dtype)
                b_up2_high = tl.load(p_up + o_2_high[None, :], mask=m_up, other=0.0).to(dtype)
    if VA is not None:
        # The low-rank entries of all adapters of the program stand side by side: column c belongs to row c // PAD_RV.
        o_rv = tl.arange(0, BLOCK_RV)
        o_vrow = o_rv // PAD_RV
        o_vr = o_rv % PAD_RV
        has = (o_vrow < DELTA_ROWS) & (i_b + o_vrow < B) & (o_vr < RV)
        n_v = zero
        if INDEX is not None:
            if DELTA_ROWS == 1:
                n_v = tl.load(INDEX + i_b).to(tl.int64)
            else:
                n_v = tl.load(INDEX + i_b + o_vrow, mask=(o_vrow < DELTA_ROWS) & (i_b + o_vrow < B), other=-1)
                n_v = tl.max_constancy(n_v.to(tl.int64), [PAD_RV])
            has = has & (o_vr < tl.where(n_v >= 0, RV, 0))
            n_v = tl.maximum(n_v, 0)
        if PER_ADAPTER:
            o_va = n_v * stride_vab + o_vr
        else:
            o_va = (i_b + (o_vrow if DELTA_ROWS > 1 else 0)) * stride_vab + o_vr
        b_pa = tl.zeros([BLOCK_RV, BLOCK_M], tl.float32)

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # reduced over the keys once, after the loop
    b_o = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)

    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        o_t = start + o_n
        inside = o_t < end
        t = start + zero
        if KEY_IN_PAIRS:
            b_s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for half in tl.static_range(HALVES):
                o_h = o_p + half * (BLOCK_P // HALVES)
                p_h = p_k + t * stride_kt + o_n[:, None] * stride_kt + o_h[None, :] * stride_kd
                m_k = inside[:, None] & (o_h < D // 2)[None, :]
                # (N, P) each: the same columns as those of the query's pairs, so the query is in shared memory once
                b_k1 = tl.load(p_h, mask=m_k, other=0.0).to(dtype)
                b_k2 = tl.load(p_h + D // 2 * stride_kd, mask=m_k, other=0.0).to(dtype)
                b_s = tl.dot(b_k1, b_q1 if half == 0 else b_q1_high, b_s, input_precision=PRECISION)
                b_s = tl.dot(b_k2, b_q2 if half == 0 else b_q2_high, b_s, input_precision=PRECISION)
        else:
            # (N, D)
            b_k = tl.load(p_k + t * stride_kt + o_kn, mask=inside[:, None] & (o_d < D)[None, :], other=0.0).to(dtype)
            b_s = tl.dot(b_k, b_q, input_precision=PRECISION)  # (N, M)
        if GAIN is not None:
            if ROWS == 1:
                p_g = i_b * stride_gb + i_h * stride_gh + o_t.to(tl.int64)[:, None] * stride_gt  # (N, 1)
                b_gain = tl.load(GAIN + p_g, mask=inside[:, None], other=0.0).to(tl.float32)
                b_dgain = tl.load(DELTA_GAIN + p_g, mask=inside[:, None], other=0.0).to(tl.float32)
            else:
                p_g = (o_b * stride_gb)[None, :] + i_h * stride_gh + o_t.to(tl.int64)[:, None] * stride_gt  # (N, M)
                b_gain = tl.load(GAIN + p_g, mask=inside[:, None] & valid[None, :], other=0.0).to(tl.float32)
                b_dgain = tl.load(DELTA_GAIN + p_g, mask=inside[:, None] & valid[None, :], other=0.0).to(tl.float32)
            b_s = b_s * b_gain
        if KA is not None:
            for half in tl.static_range(HALVES):
                o_h = o_p + half * (BLOCK_P // HALVES)
                o_h1 = o_1 if half == 0 else o_1_high
                o_h2 = o_2 if half == 0 else o_2_high
                if COS is not None:
                    p_c = i_b * stride_cb + t * stride_ct + o_n[:, None] * stride_ct + o_h[None, :] * stride_cd
                    m_c = inside[:, None] & (o_h < ROTARY // 2)[None, :]
                    # (N, P) each; columns that are not rotated have angle 0
                    b_cos = tl.load(COS + p_c, mask=m_c, other=1.0).to(tl.float32)
                    b_sin = tl.load(SIN + p_c, mask=m_c, other=0.0).to(tl.float32)
                for j in tl.static_range(DELTA_ROWS):
                    row = i_b + j
                    known = row < B
                    n = tl.load(INDEX + row, mask=known, other=-1).to(tl.int64) if INDEX is not None else zero
                    # A base-model row reads nothing: its low-rank entries may be anything.
                    rank = tl.where(known & (n >= 0), RK, 0)
                    n = tl.maximum(n, 0)
                    p_a = KA + (n if PER_ADAPTER else row) * stride_kab + t * stride_kat
                    b_d1 = tl.zeros([BLOCK_N, BLOCK_P // HALVES], tl.float32)
                    b_d2 = tl.zeros([BLOCK_N, BLOCK_P // HALVES], tl.float32)
                    for c in tl.static_range(0, BLOCK_RK, CHUNK_RK):
                        # (N, r)
                        b_a = tl.load(
                            p_a + o_n[:, None] * stride_kat + (c + o_rk)[None, :],
                            mask=inside[:, None] & (c + o_rk < rank)[None, :],
                            other=0.0,
                        ).to(dtype)
                        if UP_ONCE:
                            b_u1 = b_up1 if half == 0 else b_up1_high
                            b_u2 = b_up2 if half == 0 else b_up2_high
                        else:
                            p_up = KUP + (n * HK + i_h) * (RK * D) + (c + o_rk)[:, None] * D
                            m_up = (c + o_rk < RK)[:, None] & (o_h < D // 2)[None, :]
                            # (r, P) each
                            b_u1 = tl.load(p_up + o_h1[None, :], mask=m_up, other=0.0).to(dtype)
                            b_u2 = tl.load(p_up + o_h2[None, :], mask=m_up, other=0.0).to(dtype)
                        b_d1 = tl.dot(b_a, b_u1, b_d1, input_precision=PRECISION)
                        b_d2 = tl.dot(b_a, b_u2, b_d2, input_precision=PRECISION)
                    if COS is not None:
                        b_e1 = b_d1 * b_cos - b_d2 * b_sin
                        b_e2 = b_d2 * b_cos + b_d1 * b_sin
                    else:
                        b_e1 = b_d1
                        b_e2 = b_d2
                    b_r1 = b_q1 if half == 0 else b_q1_high
                    b_r2 = b_q2 if half == 0 else b_q2_high
                    if DELTA_ROWS > 1:
                        # The other rows' columns are 0: their scores get nothing from this adapter.
                        b_r1 = tl.where((o_row == j)[None, :], b_r1, 0.0)
                        b_r2 = tl.where((o_row == j)[None, :], b_r2, 0.0)
                    if GAIN is not None:
                        b_e = tl.dot(b_e1.to(dtype), b_r1, input_precision=PRECISION)
                        b_e = tl.dot(b_e2.to(dtype), b_r2, b_e, input_precision=PRECISION)
                        b_s += b_e * b_dgain
                    else:
                        b_s = tl.dot(b_e1.to(dtype), b_r1, b_s, input_precision=PRECISION)
                        b_s = tl.dot(b_e2.to(dtype), b_r2, b_s, input_precision=PRECISION)

        b_s = log2_scores(b_s, scale, softcap, HAS_SOFTCAP)
        seen = inside[:, None] & (o_t[:, None] <= last[None, :])
        if HAS_WINDOW:
            seen = seen & (o_t[:, None] >= first[None, :])
        if MASK is not None:
            p_m = (o_b * stride_mb + o_hq * stride_mh + o_s * stride_ms)[None, :] + o_t.to(tl.int64)[
                :, None
            ] * stride_mt
            b_m = tl.load(MASK + p_m, mask=seen, other=0)
            if FLOAT_MASK:
                b_s += b_m.to(tl.float32) * LOG2_E
            else:
                seen = seen & (b_m != 0)
        b_s = tl.where(seen, b_s, float("-inf"))

        b_new = tl.maximum(b_max, tl.max(b_s, axis=0))
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen yet: exp2(-inf - 0), not -inf - -inf
        b_p = tl.exp2(b_s - b_ref[None, :])
        b_scale = tl.exp2(b_max - b_ref)
        b_max = b_new
        b_sum = b_sum * b_scale[None, :] + b_p
        b_p = b_p.to(dtype)
        # (N, D)
        b_v = tl.load(p_v + t * stride_vt + o_vn, mask=inside[:, None] & (o_d < D)[None, :], other=0.0).to(dtype)
        b_o = tl.dot(tl.trans(b_v), b_p, b_o * b_scale[None, :], input_precision=PRECISION)
        if VA is not None:
            p_a = VA + o_va[None, :] + t * stride_vat + o_n[:, None] * stride_vat
            # (N, r)
            b_a = tl.load(p_a, mask=inside[:, None] & has[None, :], other=0.0).to(dtype)
            b_pa = tl.dot(tl.trans(b_a), b_p, b_pa * b_scale[None, :], input_precision=PRECISION)

    b_l = tl.sum(b_sum, axis=0)
    b_inv = 1.0 / tl.where(b_l > 0.0, b_l, 1.0)
    b_o = b_o * b_inv[None, :]
    if VA is not None:
        # Normalised first: a sum over a million keys would not fit into float16.
        b_pa = b_pa * b_inv[None, :]
        if DELTA_ROWS > 1:
            b_pa = tl.where(o_vrow[:, None] == o_row[None, :], b_pa, 0.0)
        o_up = (n_v * HK + i_h) * (RV * D) + o_vr * D
        # (D, r), the up-projections transposed
        b_up = tl.load(VUP + o_up[None, :] + o_d[:, None], mask=has[None, :] & (o_d < D)[:, None], other=0.0).to(dtype)
        # In two parts where dtype is 16 bits wide: with a small rank one rounding of P a_v would show in all columns.
        b_high = b_pa.to(dtype)
        b_o = tl.dot(b_up, b_high, b_o, input_precision=PRECISION)
        if dtype != tl.float32:
            b_o = tl.dot(b_up, (b_pa - b_high.to(tl.float32)).to(dtype), b_o, input_precision=PRECISION)
    b_lse = tl.where(b_l > 0.0, b_max * LN_2 + tl.log(tl.where(b_l > 0.0, b_l, 1.0)), float("-inf"))
    if not PARTIAL and SINKS is not None:
        b_sink = tl.load(SINKS + o_hq).to(tl.float32)
        b_both = tl.maximum(b_lse, b_sink)
        b_both = b_both + tl.log(tl.exp(b_lse - b_both) + tl.exp(b_sink - b_both))
        b_o = b_o * tl.exp(b_lse - b_both)[None, :]
        b_lse = b_both

    # OUT is (splits, B, Hq, S, D) and LSE (splits, B, Hq, S), contiguous.
    o_row_out = ((i_split.to(tl.int64) * B + o_b) * (HK * G) + o_hq) * S + o_s
    p_o = OUT + o_row_out[None, :] * D + o_d[:, None]
    tl.store(p_o, b_o.to(OUT.dtype.element_ty), mask=valid[None, :] & (o_d < D)[:, None])
    if LSE is not None:
        tl.store(LSE + o_row_out, b_lse, mask=valid)


def _split_count(programs: int, keys: int, config: DecodeConfig, device: torch.device) -> int:
    """Splits that fill the device once, each with a few tiles; from shapes alone, so that nothing waits for the GPU."""
    wanted = max(1, (num_sms(device) * config.programs_per_sm) // programs)
    return max(1, min(wanted, triton.cdiv(keys, config.block_n * config.min_tiles), 128))


def _one_trunk(x: Inputs) -> bool:
    """Whether all rows read the same base cache and the same cos/sin."""
    if x.B == 1 or x.key.stride(0) != 0 or x.value.stride(0) != 0:
        return False
    return x.cos is None or x.cos.stride(0) == 0


def variant(x: Inputs) -> str | None:
    """Which of the tuned variants of the tiles fits the call; see ``tuning.decode_config``."""
    if _one_trunk(x):
        return "rows"
    if max(x.rk, x.rv) > WIDE_RANK:
        return "wide"
    return "short" if x.visible_keys * x.Hk * x.B <= SHORT_HEAD_KEYS else None


def rows_per_program(x: Inputs, config: DecodeConfig) -> int:
    """Rows of one trunk that one program takes."""
    if not _one_trunk(x):
        return 1
    # At most 128 low-rank columns of V side by side.
    fit = min(config.block_m_rows // (x.G * x.S), max(1, 128 // triton.next_power_of_2(x.rv)))
    rows = 1
    while rows * 2 <= min(fit, config.max_rows) and rows < x.B:
        rows *= 2
    return rows


def split_kv_attention(
    x: Inputs, config: DecodeConfig, num_splits: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of few queries over the split cache.

    Args:
        x: the checked and normalised arguments.
        config: tile sizes; from ``tuning.decode_config``.
        num_splits: parts that the keys are split into; absent: from the shape and the number of multiprocessors.

    Returns:
        out (B, Hq, S, D) in the dtype of the query, lse (B, Hq, S) float32.
    """
    rows = rows_per_program(x, config)
    shared_delta = x.adapter_index is None and all(
        a is None or a.stride(0) == 0 or rows == 1 for a in (x.key_low_rank, x.value_low_rank)
    )
    columns = rows * x.S * x.G
    block_m = max(16, min(config.max_block_m, triton.next_power_of_2(columns)))
    num_m = triton.cdiv(columns, block_m)
    groups = triton.cdiv(x.B, rows)
    programs = x.Hk * num_m * groups
    if num_splits is None:
        num_splits = _split_count(programs, x.visible_keys, config, x.query.device)
    partial = num_splits > 1
    shape = (num_splits, x.B, x.Hk * x.G, x.S)
    out = torch.empty((*shape, x.D), dtype=torch.float32 if partial else x.query.dtype, device=x.query.device)
    lse = torch.empty(shape, dtype=torch.float32, device=x.query.device)
    block_rk, pad_rv = (max(16, triton.next_power_of_2(r)) for r in (x.rk, x.rv))
    chunk_rk = min(block_rk, 64)
    delta_rows = 1 if shared_delta else rows
    block_rv = delta_rows * pad_rv
    if x.query.dtype != torch.float32 and config.block_n >= 64:
        # Hopper's wgmma takes 64 rows at least; with fewer, P a_v would fall back to mma.sync, in another layout.
        block_rv = max(64, block_rv)
    launch(
        split_kv_kernel,
        (programs * num_splits,),
        x,
        out,
        lse,
        dict(num_m=num_m, num_groups=groups, num_splits=num_splits),
        dict(
            ROWS=rows, DELTA_ROWS=delta_rows, UP_ONCE=delta_rows == 1 and chunk_rk == block_rk,
            KEY_IN_PAIRS=x.key_low_rank is not None and not x.rotary_interleaved and x.rotary_dim == x.D,
            HALVES=2 if x.D >= 128 else 1, PARTIAL=partial, BLOCK_M=block_m, BLOCK_RK=block_rk,
            BLOCK_RV=block_rv, PAD_RV=pad_rv, CHUNK_RK=chunk_rk,
        ),
        config,
    )  # fmt: skip
    if partial:
        return merge_partials(out, lse, x.query.dtype, x.sinks)
    return out[0], lse[0]
