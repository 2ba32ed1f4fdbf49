"""Queries folded into the up-projection of the keys: low-rank scores without ever expanding a key.

With rotary pairs p of angle (c, s) and the two columns 1, 2 of each pair,

    q . RoPE_t(a_t B) = sum_r a_t[r] (sum_p c_t[p] M1[p, r] + s_t[p] M2[p, r])
    M1 = q1 B1 + q2 B2,   M2 = q2 B1 - q1 B2         (with weights of rotated keys: q times those)

so one product ``cos M1 + sin M2`` gives a weight per key, query and rank, and the key's ``a_t`` is applied to it in registers.
Rows with different adapters are further columns of the same product. ``decode.py`` computes these scores beside those of the
base keys where the folded matrix of all rows of a program has room; ``low_rank_scores`` computes them ahead, where the rows of
one trunk are so many that the base would otherwise be read several times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .calls import empty
from .inputs import Inputs, launch
from .sizes import cdiv, next_power_of_2
from .tiles import aligned, pair_columns
from .tuning import ScoresConfig, num_sms


@triton.jit
def side_by_side(
    INDEX, o_c, i_b, zero, stride_b, B,
    R: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, PER_ADAPTER: tl.constexpr,
):  # fmt: skip
    """Low-rank entries of all rows of a program, side by side: column c belongs to row c // PAD, entry c % PAD.

    Returns the adapter of each column (int64), whether it holds an entry, and its offset in a low-rank cache. A column of a
    base-model row holds none: nothing of that row is read.
    """
    o_row = o_c // PAD
    o_r = o_c % PAD
    known = (o_row < ROWS) & (i_b + o_row < B)
    has = known & (o_r < R)  # conditions one by one: the compiler sees that each holds for whole vectors
    n = zero
    if INDEX is not None:
        n = tl.load(INDEX + i_b + o_row, mask=known, other=-1).to(tl.int64)
        n = tl.max_constancy(n, [PAD])
        has = has & (n >= 0)
        n = tl.maximum(n, 0)
    if PER_ADAPTER:
        offset = n * stride_b + o_r
    else:
        offset = (i_b + (o_row if ROWS > 1 else 0)) * stride_b + o_r
    return n, has, offset


@triton.jit
def _halves(x, N: tl.constexpr, P: tl.constexpr):
    """The two halves (N, P) of rows (N, 2 P)."""
    return tl.split(tl.permute(tl.reshape(x, [N, 2, P]), (0, 2, 1)))


@triton.jit
def fold_queries(
    Q, KUP, WEIGHT, n_k, has_k, stride_qb, stride_qh, stride_qs, stride_qd, i_b, i_h, i_m, B, S,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, RK: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_COS: tl.constexpr, FOLD: tl.constexpr, DELTA_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_RK: tl.constexpr,
):  # fmt: skip
    """M1 and M2 (columns, P) in the dtype of the queries, and the weights (columns,) that are the same at every key.

    Columns are ordered (row, upper part of r, query column, r % 2). In the layout of a wgmma accumulator one thread then holds
    all ranks of a query column (of four per KV head), and sums over them without shuffles. The third result holds the pairs that
    are not rotated, or all of them without RoPE; M1 and M2 hold the others.
    """
    COLUMNS: tl.constexpr = FOLD // DELTA_ROWS
    R_LOW: tl.constexpr = 2 if BLOCK_RK > 1 else 1
    R_HIGH: tl.constexpr = BLOCK_RK // R_LOW
    o_p = tl.arange(0, BLOCK_P)
    o_1, o_2 = pair_columns(o_p, D, ROTARY, INTERLEAVED)
    o_f = tl.arange(0, FOLD)
    o_fc = i_m * BLOCK_C + o_f % BLOCK_C
    o_fb = i_b + o_f // BLOCK_C
    p_f = Q + o_fb * stride_qb + (i_h * G + o_fc % G) * stride_qh + (o_fc // G).to(tl.int64) * stride_qs
    m_f = (o_fb < B) & (o_fc // G < S)
    o_rk = tl.arange(0, DELTA_ROWS * BLOCK_RK)
    p_up = KUP + (n_k * HK + i_h) * (RK * D) + (o_rk % BLOCK_RK) * D
    # (F, P) and (rows r, P), two each
    if ROTARY == D and not INTERLEAVED and 2 * BLOCK_P == D:
        # Whole rows, taken apart once all are on their way: the compiler waits for each load whose layout is changed at once.
        o_d = tl.arange(0, D)
        b_f = tl.load(p_f[:, None] + o_d[None, :] * stride_qd, mask=m_f[:, None], other=0.0)
        b_u = tl.load(p_up[:, None] + o_d[None, :], mask=has_k[:, None], other=0.0)
        b_f1, b_f2 = _halves(b_f, FOLD, BLOCK_P)
        b_u1, b_u2 = _halves(b_u, DELTA_ROWS * BLOCK_RK, BLOCK_P)
    else:
        pair = (o_p < D // 2)[None, :]
        b_f1 = tl.load(p_f[:, None] + o_1[None, :] * stride_qd, mask=m_f[:, None] & pair, other=0.0)
        b_f2 = tl.load(p_f[:, None] + o_2[None, :] * stride_qd, mask=m_f[:, None] & pair, other=0.0)
        b_u1 = tl.load(p_up[:, None] + o_1[None, :], mask=has_k[:, None] & pair, other=0.0)
        b_u2 = tl.load(p_up[:, None] + o_2[None, :], mask=has_k[:, None] & pair, other=0.0)
    if WEIGHT is not None:
        # The weights of rotated keys, on the other side of the scalar product.
        p_w = WEIGHT + i_h * D
        b_f1 = b_f1.to(tl.float32) * tl.load(p_w + o_1, mask=o_p < D // 2, other=0.0).to(tl.float32)[None, :]
        b_f2 = b_f2.to(tl.float32) * tl.load(p_w + o_2, mask=o_p < D // 2, other=0.0).to(tl.float32)[None, :]
    # (rows, upper r, columns, lower r, P)
    b_f1 = tl.reshape(b_f1, [DELTA_ROWS, COLUMNS, BLOCK_P])[:, None, :, None, :].to(tl.float32)
    b_f2 = tl.reshape(b_f2, [DELTA_ROWS, COLUMNS, BLOCK_P])[:, None, :, None, :].to(tl.float32)
    b_u1 = tl.reshape(b_u1, [DELTA_ROWS, R_HIGH, R_LOW, BLOCK_P])[:, :, None, :, :].to(tl.float32)
    b_u2 = tl.reshape(b_u2, [DELTA_ROWS, R_HIGH, R_LOW, BLOCK_P])[:, :, None, :, :].to(tl.float32)
    b_m1 = tl.reshape(b_f1 * b_u1 + b_f2 * b_u2, [FOLD * BLOCK_RK, BLOCK_P])
    b_m2 = tl.reshape(b_f2 * b_u1 - b_f1 * b_u2, [FOLD * BLOCK_RK, BLOCK_P])
    still = (o_p >= (ROTARY // 2 if HAS_COS else 0))[None, :]
    b_w0 = tl.sum(tl.where(still, b_m1, 0.0), axis=1)
    if ROTARY < D:
        b_m1 = tl.where(still, 0.0, b_m1)
    return b_m1.to(Q.dtype.element_ty), b_m2.to(Q.dtype.element_ty), b_w0


@triton.jit
def folded_scores(
    b_cos, b_sin, b_a, b_m1, b_m2, b_w0,
    HAS_COS: tl.constexpr, HAS_STILL: tl.constexpr, FOLD: tl.constexpr, DELTA_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_RK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Low-rank scores (N, FOLD) of one tile of keys: cos/sin (N, P), low-rank entries (N, rows r), and ``fold_queries``."""
    COLUMNS: tl.constexpr = FOLD // DELTA_ROWS
    R_LOW: tl.constexpr = 2 if BLOCK_RK > 1 else 1
    R_HIGH: tl.constexpr = BLOCK_RK // R_LOW
    if HAS_COS:
        b_w = tl.dot(b_cos.to(b_m1.dtype), tl.trans(b_m1), input_precision=PRECISION)
        b_w = tl.dot(b_sin.to(b_m1.dtype), tl.trans(b_m2), b_w, input_precision=PRECISION)
        if HAS_STILL:
            b_w += b_w0[None, :]
    else:
        b_w = tl.zeros([BLOCK_N, FOLD * BLOCK_RK], tl.float32) + b_w0[None, :]
    b_a = tl.reshape(b_a, [BLOCK_N, DELTA_ROWS, R_HIGH, R_LOW])[:, :, :, None, :].to(tl.float32)
    b_w = tl.reshape(b_w, [BLOCK_N, DELTA_ROWS, R_HIGH, COLUMNS, R_LOW]) * b_a
    return tl.reshape(tl.sum(tl.sum(b_w, axis=4), axis=2), [BLOCK_N, FOLD])


@triton.jit(do_not_specialize=["B", "S", "T", "key_length", "window", "num_groups", "num_splits"])
def low_rank_scores_kernel(
    Q, K, V, KA, KUP, VA, VUP, INDEX, COS, SIN, GAIN, DELTA_GAIN, WEIGHT, SINKS, MASK, LENGTH, OUT, LSE,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_kab, stride_kat,
    stride_vab, stride_vat,
    stride_cb, stride_ct, stride_cd,
    stride_gb, stride_gh, stride_gt,
    stride_mb, stride_mh, stride_ms, stride_mt,
    stride_nb,
    B, S, T, key_length, scale, softcap, window, num_groups, num_splits,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, FLOAT_MASK: tl.constexpr, PER_ADAPTER: tl.constexpr,
    K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, KA_ALIGN: tl.constexpr, VA_ALIGN: tl.constexpr, C_ALIGN: tl.constexpr,
    C_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, DELTA_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_RK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One KV head, a group of rows, one range of keys: writes ``q . RoPE_t(a_t B)`` to OUT (B, Hk, T, BLOCK_C) float32."""
    stride_kat = aligned(stride_kat, KA_ALIGN)
    stride_kab = aligned(stride_kab, KA_ALIGN)
    stride_ct = aligned(stride_ct, C_ALIGN)
    i = tl.program_id(0)
    i_h = (i % HK).to(tl.int64)
    i = i // HK
    i_b = (i % num_groups).to(tl.int64) * ROWS  # first row of the group
    zero = i_b * 0  # int64: what is added to it is addressed in 64 bits
    i_split = i // num_groups
    tiles = tl.cdiv(key_length, BLOCK_N)
    begin = (i_split * tiles) // num_splits * BLOCK_N
    end = tl.minimum(((i_split + 1) * tiles) // num_splits * BLOCK_N, key_length)

    FOLD: tl.constexpr = ROWS * BLOCK_C
    o_n = tl.arange(0, BLOCK_N)
    o_p = tl.arange(0, BLOCK_P)
    o_rk = tl.arange(0, DELTA_ROWS * BLOCK_RK)
    n_k, has_k, o_ka = side_by_side(INDEX, o_rk, i_b, zero, stride_kab, B, RK, BLOCK_RK, DELTA_ROWS, PER_ADAPTER)
    b_m1, b_m2, b_w0 = fold_queries(
        Q, KUP, WEIGHT, n_k, has_k, stride_qb, stride_qh, stride_qs, stride_qd, i_b, i_h, 0, B, S,
        HK, G, D, RK, ROTARY, INTERLEAVED, COS is not None, FOLD, DELTA_ROWS, BLOCK_C, BLOCK_P, BLOCK_RK,
    )  # fmt: skip
    o_f = tl.arange(0, FOLD)
    p_out = OUT + ((i_b + o_f // BLOCK_C) * HK + i_h) * (key_length * BLOCK_C) + o_f % BLOCK_C
    valid = i_b + o_f // BLOCK_C < B
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        inside = start + o_n < end
        t = start + zero
        b_cos = 0
        b_sin = 0
        if COS is not None:
            o_cn = t * stride_ct + o_n[:, None] * stride_ct + o_p[None, :] * stride_cd
            m_c = inside[:, None] & (o_p < C_WIDTH)[None, :]
            # (N, P) each
            b_cos = tl.load(COS + o_cn, mask=m_c, other=0.0)
            b_sin = tl.load(SIN + o_cn, mask=m_c, other=0.0)
        # (N, rows r)
        b_a = tl.load(
            KA + o_ka[None, :] + t * stride_kat + o_n[:, None] * stride_kat,
            mask=inside[:, None] & has_k[None, :], other=0.0,
        )  # fmt: skip
        b_e = folded_scores(
            b_cos, b_sin, b_a, b_m1, b_m2, b_w0,
            COS is not None, ROTARY < D, FOLD, DELTA_ROWS, BLOCK_N, BLOCK_RK, PRECISION,
        )  # fmt: skip
        p_e = p_out[None, :] + (t * BLOCK_C + o_n[:, None] * BLOCK_C)
        tl.store(p_e, b_e, mask=inside[:, None] & valid[None, :])


def low_rank_scores(x: Inputs, config: ScoresConfig, columns: int, per_row: bool) -> torch.Tensor:
    """Low-rank part of the scores, unscaled: ``q . RoPE_t(a_t B)`` of all rows of one trunk.

    Args:
        x: the checked and normalised arguments; all rows read the same cos/sin.
        config: tile sizes; from ``tuning.scores_config``.
        columns: power of two, at least the query columns (tokens x grouped heads) of a row.
        per_row: whether each row has low-rank entries or an adapter of its own.

    Returns:
        (B, Hk, T, columns) float32, the head fastest in a column; T ends with the longest row where the host knows it.
    """
    rows = max(1, min(next_power_of_2(x.B), config.max_folded // (columns * next_power_of_2(x.rk))))
    # The folded product has at least 16 columns.
    block_rk = max(next_power_of_2(x.rk), 16 // min(16, rows * columns))
    keys = x.visible_keys
    groups = cdiv(x.B, rows)
    wanted = max(1, num_sms(x.query.device) * config.programs_per_sm // (x.Hk * groups))
    num_splits = max(1, min(wanted, cdiv(keys, config.block_n)))
    out = empty((x.B, x.Hk, keys, columns), torch.float32, x.query.device)
    launch(
        low_rank_scores_kernel,
        (x.Hk * groups * num_splits,),
        x.replace(key_length=keys),
        out,
        None,
        dict(num_groups=groups, num_splits=num_splits),
        dict(ROWS=rows, DELTA_ROWS=rows if per_row else 1, BLOCK_C=columns, BLOCK_RK=block_rk),
        config,
    )
    return out
