"""Split-KV kernel for few queries on many keys: one pass over the base cache, low-rank parts applied on chip.

Every program takes one KV head, a range of keys and all queries of that head (grouped heads, query tokens and, where rows
share one trunk, several rows). Scores are computed transposed, ``S^T = K q^T``: the long side of the tile is then the keys,
so tensor cores are full however few queries there are.

The low-rank part of the keys is never expanded: the queries are folded into the up-projection once per program (``fold.py``),
cos and sin are left operands straight from shared memory, the K tile is not touched, and every adapter of the program has its
columns in the same product. That holds while queries times rank fit into one product; above, ``RoPE_t(a_k B_k)`` is computed
as it stands and multiplied by the queries. Where many rows share one trunk, their low-rank scores come ready-made from
``fold.low_rank_scores``. The two key-norm numbers are factors per key either way. V is not expanded at all: ``P a_v`` is
accumulated beside ``P V`` (LRAgent, arXiv 2602.01053, section 4.3).

It is not for long prompts: there the expansion is better done once (``expand.py``) than once per tile of queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .calls import empty
from .fold import fold_queries, folded_scores, low_rank_scores, side_by_side
from .inputs import Inputs, launch
from .merge_kernel import launches_dependents, merge_partials
from .sizes import cdiv, next_power_of_2
from .tiles import LOG2_E, aligned, log2_softcap, pair_columns, prefetch_rows, visible_range
from .tuning import DecodeConfig, ScoresConfig, num_sms

LN_2 = tl.constexpr(0.6931471805599453)


# A single row, query or group is worth a kernel of its own: half of its index arithmetic is gone.
@triton.jit(
    do_not_specialize=["T", "key_length", "window", "num_splits", "scores_keys"],
    do_not_specialize_on_alignment=["B", "S", "num_m", "num_groups"],
)
def split_kv_kernel(
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
    B, S, T, key_length, scale, softcap, window, num_m, num_groups, num_splits, SCORES, scores_keys,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, FLOAT_MASK: tl.constexpr, PER_ADAPTER: tl.constexpr,
    K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, KA_ALIGN: tl.constexpr, VA_ALIGN: tl.constexpr, C_ALIGN: tl.constexpr,
    C_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, DELTA_ROWS: tl.constexpr, FOLDED: tl.constexpr, PARTIAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_RK: tl.constexpr, BLOCK_RV: tl.constexpr, PAD_RV: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WAIT: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """One KV head, one range of keys, all its queries; arguments as in ``Inputs``, strides in elements.

    SCORES holds ready-made low-rank scores (B, Hk, scores_keys, BLOCK_C), in place of KA.
    """
    dtype = Q.dtype.element_ty
    stride_kt = aligned(stride_kt, K_ALIGN)
    stride_kh = aligned(stride_kh, K_ALIGN)
    stride_kb = aligned(stride_kb, K_ALIGN)
    stride_vt = aligned(stride_vt, V_ALIGN)
    stride_vh = aligned(stride_vh, V_ALIGN)
    stride_vb = aligned(stride_vb, V_ALIGN)
    stride_kat = aligned(stride_kat, KA_ALIGN)
    stride_kab = aligned(stride_kab, KA_ALIGN)
    stride_vat = aligned(stride_vat, VA_ALIGN)
    stride_vab = aligned(stride_vab, VA_ALIGN)
    stride_ct = aligned(stride_ct, C_ALIGN)
    stride_cb = aligned(stride_cb, C_ALIGN)
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

    # Column m of the tile: the row, and in it BLOCK_C of its query tokens and grouped heads, the head fastest.
    o_m = tl.arange(0, BLOCK_M)
    o_row = o_m // BLOCK_C
    o_c = i_m * BLOCK_C + o_m % BLOCK_C
    o_g = o_c % G
    o_s = o_c // G
    o_b = i_b + o_row
    valid = (o_row < ROWS) & (o_b < B) & (o_s < S)
    o_hq = i_h * G + o_g
    if LENGTH is None or ROWS == 1:
        length = key_length if LENGTH is None else tl.load(LENGTH + i_b * stride_nb).to(tl.int32)
        shortest = length
        b_length = tl.zeros([BLOCK_M], tl.int32) + length
    else:
        b_length = tl.load(LENGTH + o_b * stride_nb, mask=valid, other=0).to(tl.int32)
        length = tl.max(b_length, axis=0)
        shortest = tl.min(tl.where(valid, b_length, T), axis=0)
    first, last = visible_range(o_s, b_length, valid, S, window, IS_CAUSAL, HAS_WINDOW)

    # This program's keys: an equal share, in whole tiles, of what any of its queries sees. From scalars where that is possible:
    # a reduction costs barriers before the first load, and ptxas no longer sees that the loop is the same for all threads.
    hi = tl.minimum(length, T)
    lo = tl.maximum(shortest - S + (i_m * BLOCK_C) // G - window + 1, 0) // BLOCK_N if HAS_WINDOW else 0
    tiles = tl.maximum(tl.cdiv(hi, BLOCK_N) - lo, 0)
    begin = (lo + (i_split * tiles) // num_splits) * BLOCK_N
    end = tl.minimum((lo + ((i_split + 1) * tiles) // num_splits) * BLOCK_N, hi)

    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    if PREFETCH:
        # The first tile is on its way to L2 while the queries are folded, which takes longer than reading it.
        if begin < end:
            o_a = tl.minimum(begin + o_n, end - 1) + zero
            prefetch_rows(K + i_b * stride_kb + i_h * stride_kh + o_a * stride_kt, stride_kd, D, BLOCK_D)
            prefetch_rows(V + i_b * stride_vb + i_h * stride_vh + o_a * stride_vt, stride_vd, D, BLOCK_D)
    p_q = Q + o_b * stride_qb + o_hq * stride_qh + o_s.to(tl.int64) * stride_qs  # (M,)
    # (D, M)
    b_q = tl.load(p_q[None, :] + o_d[:, None] * stride_qd, mask=valid[None, :] & (o_d < D)[:, None], other=0.0)
    p_k = K + i_b * stride_kb + i_h * stride_kh
    p_v = V + i_b * stride_vb + i_h * stride_vh
    o_kn = o_n[:, None] * stride_kt + o_d[None, :] * stride_kd
    o_vn = o_n[:, None] * stride_vt + o_d[None, :] * stride_vd

    if KA is not None:
        if COS is not None:
            COS += i_b * stride_cb
            SIN += i_b * stride_cb
        o_p = tl.arange(0, BLOCK_P)
        o_1, o_2 = pair_columns(o_p, D, ROTARY, INTERLEAVED)
        if FOLDED:
            FOLD: tl.constexpr = ROWS * BLOCK_C
            o_rk = tl.arange(0, DELTA_ROWS * BLOCK_RK)
            n_k, has_k, o_ka = side_by_side(
                INDEX, o_rk, i_b, zero, stride_kab, B, RK, BLOCK_RK, DELTA_ROWS, PER_ADAPTER
            )
            b_m1, b_m2, b_w0 = fold_queries(
                Q, KUP, WEIGHT, n_k, has_k, stride_qb, stride_qh, stride_qs, stride_qd, i_b, i_h, i_m, B, S,
                HK, G, D, RK, ROTARY, INTERLEAVED, COS is not None, FOLD, DELTA_ROWS, BLOCK_C, BLOCK_P, BLOCK_RK,
            )  # fmt: skip
        else:
            CHUNK_RK: tl.constexpr = 64 if BLOCK_RK > 64 else BLOCK_RK
            o_rk = tl.arange(0, CHUNK_RK)
            n_k = tl.load(INDEX + i_b).to(tl.int64) if INDEX is not None else zero
            # A base-model row reads nothing: its low-rank entries may be anything.
            rank = tl.where(n_k >= 0, RK, 0)
            n_k = tl.maximum(n_k, 0)
            p_a = KA + (n_k if PER_ADAPTER else i_b) * stride_kab
            m_q = valid[None, :] & (o_p < D // 2)[:, None]
            # (P, M) each: the query's columns in the order of the pairs
            b_q1 = tl.load(p_q[None, :] + o_1[:, None] * stride_qd, mask=m_q, other=0.0)
            b_q2 = tl.load(p_q[None, :] + o_2[:, None] * stride_qd, mask=m_q, other=0.0)
    if VA is not None:
        o_rv = tl.arange(0, BLOCK_RV)
        n_v, has_v, o_va = side_by_side(INDEX, o_rv, i_b, zero, stride_vab, B, RV, PAD_RV, DELTA_ROWS, PER_ADAPTER)
        if PREFETCH:
            prefetch_rows(VUP + tl.where(has_v, (n_v * HK + i_h) * (RV * D) + (o_rv % PAD_RV) * D, 0), 1, D, BLOCK_D)
        b_pa = tl.zeros([BLOCK_RV, BLOCK_M], tl.float32)

    log2_scale = scale * LOG2_E
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # reduced over the keys once, after the loop
    b_o = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)

    if SCORES is not None:
        p_e = SCORES + (tl.minimum(o_b, B - 1) * HK + i_h) * (scores_keys * BLOCK_C) + o_m % BLOCK_C  # (M,)
    if WAIT:
        gdc_wait()  # for the scores, which the kernel before writes
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        o_t = start + o_n
        inside = o_t < end
        t = start + zero
        # (N, D)
        b_k = tl.load(p_k + t * stride_kt + o_kn, mask=inside[:, None] & (o_d < D)[None, :], other=0.0).to(dtype)
        # (N, M), in units of log2. Scaled here, so that the compiler does not make b_e below its accumulator: wgmma instructions
        # would be serialised (ptxas C7520).
        b_s = tl.dot(b_k, b_q, input_precision=PRECISION) * log2_scale
        if KA is not None:
            if COS is not None:
                o_cn = t * stride_ct + o_n[:, None] * stride_ct + o_p[None, :] * stride_cd
                m_c = inside[:, None] & (o_p < C_WIDTH)[None, :]
                # (N, P) each
                b_cos = tl.load(COS + o_cn, mask=m_c, other=0.0)
                b_sin = tl.load(SIN + o_cn, mask=m_c, other=0.0)
            if FOLDED:
                # (N, rows r)
                b_a = tl.load(
                    KA + o_ka[None, :] + t * stride_kat + o_n[:, None] * stride_kat,
                    mask=inside[:, None] & has_k[None, :], other=0.0,
                )  # fmt: skip
                b_e = folded_scores(
                    b_cos if COS is not None else 0, b_sin if COS is not None else 0, b_a, b_m1, b_m2, b_w0,
                    COS is not None, ROTARY < D, FOLD, DELTA_ROWS, BLOCK_N, BLOCK_RK, PRECISION,
                )  # fmt: skip
                if FOLD < BLOCK_M:
                    # The columns beyond are nobody's, and masked below: they may hold anything.
                    b_e = tl.broadcast_to(b_e[:, None, :], [BLOCK_N, BLOCK_M // FOLD, FOLD])
                    b_e = tl.reshape(b_e, [BLOCK_N, BLOCK_M])
            else:
                b_d1 = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
                b_d2 = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
                for c in tl.static_range(0, BLOCK_RK, CHUNK_RK):
                    # (N, r)
                    b_a = tl.load(
                        p_a + t * stride_kat + o_n[:, None] * stride_kat + (c + o_rk)[None, :],
                        mask=inside[:, None] & (c + o_rk < rank)[None, :], other=0.0,
                    ).to(dtype)  # fmt: skip
                    p_up = KUP + (n_k * HK + i_h) * (RK * D) + (c + o_rk)[:, None] * D
                    m_up = (c + o_rk < RK)[:, None] & (o_p < D // 2)[None, :]
                    # (r, P) each
                    b_u1 = tl.load(p_up + o_1[None, :], mask=m_up, other=0.0).to(dtype)
                    b_u2 = tl.load(p_up + o_2[None, :], mask=m_up, other=0.0).to(dtype)
                    b_d1 = tl.dot(b_a, b_u1, b_d1, input_precision=PRECISION)
                    b_d2 = tl.dot(b_a, b_u2, b_d2, input_precision=PRECISION)
                if COS is not None:
                    b_cos = b_cos.to(tl.float32)
                    b_sin = b_sin.to(tl.float32)
                    if ROTARY < D:
                        b_cos = tl.where((o_p < ROTARY // 2)[None, :], b_cos, 1.0)  # angle 0
                    b_e1 = b_d1 * b_cos - b_d2 * b_sin
                    b_e2 = b_d2 * b_cos + b_d1 * b_sin
                else:
                    b_e1 = b_d1
                    b_e2 = b_d2
                if WEIGHT is not None:
                    p_w = WEIGHT + i_h * D
                    b_e1 = b_e1 * tl.load(p_w + o_1, mask=o_p < D // 2, other=0.0).to(tl.float32)[None, :]
                    b_e2 = b_e2 * tl.load(p_w + o_2, mask=o_p < D // 2, other=0.0).to(tl.float32)[None, :]
                b_e = tl.dot(b_e1.to(dtype), b_q1, input_precision=PRECISION)
                b_e = tl.dot(b_e2.to(dtype), b_q2, b_e, input_precision=PRECISION)

        if SCORES is not None:
            # (N, M)
            b_e = tl.load(
                p_e[None, :] + (t * BLOCK_C + o_n[:, None] * BLOCK_C), mask=inside[:, None] & (o_row < ROWS)[None, :], other=0.0
            )  # fmt: skip

        if GAIN is not None:
            if ROWS == 1:
                p_g = i_b * stride_gb + i_h * stride_gh + o_t.to(tl.int64)[:, None] * stride_gt  # (N, 1)
                m_g = inside[:, None]
            else:
                p_g = (o_b * stride_gb)[None, :] + i_h * stride_gh + o_t.to(tl.int64)[:, None] * stride_gt  # (N, M)
                m_g = inside[:, None] & valid[None, :]
            b_s = b_s * tl.load(GAIN + p_g, mask=m_g, other=0.0).to(tl.float32)
            if KA is not None or SCORES is not None:
                b_e = b_e * tl.load(DELTA_GAIN + p_g, mask=m_g, other=0.0).to(tl.float32)
        if KA is not None or SCORES is not None:
            b_s += b_e * log2_scale
        if HAS_SOFTCAP:
            b_s = log2_softcap(b_s, softcap)
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
            # (N, rows r)
            b_a = tl.load(
                VA + o_va[None, :] + t * stride_vat + o_n[:, None] * stride_vat,
                mask=inside[:, None] & has_v[None, :], other=0.0,
            ).to(dtype)  # fmt: skip
            b_pa = tl.dot(tl.trans(b_a), b_p, b_pa * b_scale[None, :], input_precision=PRECISION)

    b_l = tl.sum(b_sum, axis=0)
    b_inv = 1.0 / tl.where(b_l > 0.0, b_l, 1.0)
    b_o = b_o * b_inv[None, :]
    if VA is not None:
        # Normalised first: a sum over a million keys would not fit into float16.
        b_pa = b_pa * b_inv[None, :]
        if DELTA_ROWS > 1:
            b_pa = tl.where((o_rv // PAD_RV)[:, None] == o_row[None, :], b_pa, 0.0)
        CHUNK: tl.constexpr = 64 if BLOCK_RV > 64 else BLOCK_RV
        for c in tl.static_range(0, BLOCK_RV // CHUNK):
            # The up-projections of a wide rank do not fit into shared memory at once.
            o_rv = c * CHUNK + tl.arange(0, CHUNK)
            n_v, has_v, o_va = side_by_side(INDEX, o_rv, i_b, zero, stride_vab, B, RV, PAD_RV, DELTA_ROWS, PER_ADAPTER)
            if CHUNK < BLOCK_RV:
                b_c = tl.reshape(b_pa, [BLOCK_RV // CHUNK, CHUNK, BLOCK_M])
                b_c = tl.sum(tl.where((tl.arange(0, BLOCK_RV // CHUNK) == c)[:, None, None], b_c, 0.0), axis=0)
            else:
                b_c = b_pa
            p_up = VUP + (n_v * HK + i_h) * (RV * D) + (o_rv % PAD_RV) * D
            # (D, rows r), the up-projections transposed
            b_up = tl.load(p_up[None, :] + o_d[:, None], mask=has_v[None, :] & (o_d < D)[:, None], other=0.0).to(dtype)
            # In two parts where dtype is 16 bits wide: with a small rank one rounding of P a_v would show in all columns.
            b_high = b_c.to(dtype)
            b_o = tl.dot(b_up, b_high, b_o, input_precision=PRECISION)
            if dtype != tl.float32:
                b_o = tl.dot(b_up, (b_c - b_high.to(tl.float32)).to(dtype), b_o, input_precision=PRECISION)
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
    return max(1, min(wanted, cdiv(keys, config.block_n * config.min_tiles), 128))


def _one_trunk(x: Inputs) -> bool:
    """Whether all rows read the same base cache and the same cos/sin."""
    if x.B == 1 or x.key.stride(0) != 0 or x.value.stride(0) != 0:
        return False
    return x.cos is None or x.cos.stride(0) == 0


def variant(x: Inputs) -> str | None:
    """Which of the tuned variants of the tiles fits the call; see ``tuning.decode_config``."""
    return "rows" if _one_trunk(x) else None


def rows_per_program(x: Inputs, config: DecodeConfig, fused: bool = True) -> int:
    """Rows of one trunk that one program takes: as many as its products have columns for.

    Args:
        fused: whether the low-rank scores, if there are any, are computed in the same program.
    """
    if not _one_trunk(x):
        return 1
    columns = next_power_of_2(x.G * x.S)
    fit = min(config.max_rows, config.block_m_rows // columns, 128 // next_power_of_2(x.rv))
    if fused and x.key_low_rank is not None:
        fit = min(fit, config.max_folded // (columns * next_power_of_2(x.rk)))
    rows = 1
    while rows * 2 <= fit and rows < x.B:
        rows *= 2
    return rows


def _same_entries(low_rank: torch.Tensor | None, adapter_index: torch.Tensor | None) -> bool:
    """Whether all rows have the same low-rank entries and the same adapter."""
    return low_rank is None or (adapter_index is None and low_rank.stride(0) == 0)


def _scores_ahead(x: Inputs, config: DecodeConfig, scores: ScoresConfig) -> bool:
    """Whether the low-rank scores are computed ahead: rows of one trunk, so many that fused ones would read it several times."""
    columns = next_power_of_2(x.S * x.G)
    if x.key_low_rank is None or x.B < scores.min_rows or not _one_trunk(x) or x.sliding_window is not None:
        return False
    if columns > config.max_block_m or columns * next_power_of_2(x.rk) > scores.max_folded:
        return False
    return rows_per_program(x, config) < rows_per_program(x, config, fused=False)


def split_kv_attention(
    x: Inputs, config: DecodeConfig, num_splits: int | None = None, scores: ScoresConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of few queries over the split cache.

    Args:
        x: the checked and normalised arguments.
        config: tile sizes; from ``tuning.decode_config``.
        num_splits: parts that the keys are split into; absent: from the shape and the number of multiprocessors.
        scores: tile sizes of the low-rank scores of many rows, from ``tuning.scores_config``; absent: always fused.

    Returns:
        out (B, Hq, S, D) in the dtype of the query, lse (B, Hq, S) float32.
    """
    columns = x.S * x.G
    block_c = min(config.max_block_m, next_power_of_2(columns))  # of each row
    e, scores_keys = None, 0
    if scores is not None and _scores_ahead(x, config, scores):
        e = low_rank_scores(x, scores, block_c, not _same_entries(x.key_low_rank, x.adapter_index))
        x, scores_keys = (
            x.replace(key_low_rank=None, key_up=None, cos=None, sin=None, key_delta_weight=None),
            e.shape[2],
        )
    rows = rows_per_program(x, config)
    shared_delta = rows == 1 or all(_same_entries(a, x.adapter_index) for a in (x.key_low_rank, x.value_low_rank))
    delta_rows = 1 if shared_delta else rows
    num_m = cdiv(columns, block_c)
    groups = cdiv(x.B, rows)
    programs = x.Hk * num_m * groups
    if num_splits is None:
        num_splits = _split_count(programs, x.visible_keys, config, x.query.device)
    partial = num_splits > 1
    shape = (num_splits, x.B, x.Hk * x.G, x.S)
    out = empty((*shape, x.D), torch.float32 if partial else x.query.dtype, x.query.device)
    lse = empty(shape, torch.float32, x.query.device)
    # The folded product has at least 16 columns.
    block_rk = max(next_power_of_2(x.rk), 16 // min(16, rows * block_c))
    folded = rows * block_c * block_rk <= config.max_folded
    if not folded:
        block_rk = max(16, block_rk)
    block_m = max(16, rows * block_c)
    if folded and block_m == rows * block_c and x.key_low_rank is not None:
        # Room to spare: else the compiler computes the whole softmax in the layout of the folded sums, every value many times.
        block_m *= 2
    pad_rv = max(16, next_power_of_2(x.rv))
    block_rv = delta_rows * pad_rv
    if x.query.dtype != torch.float32 and config.block_n >= 64:
        # Hopper's wgmma takes 64 rows at least; with fewer, P a_v would fall back to mma.sync, in another layout.
        block_rv = max(64, block_rv)
    dependent = e is not None and launches_dependents(x.query.device)
    launch(
        split_kv_kernel,
        (programs * num_splits,),
        x,
        out,
        lse,
        dict(num_m=num_m, num_groups=groups, num_splits=num_splits, SCORES=e, scores_keys=scores_keys),
        dict(
            ROWS=rows, DELTA_ROWS=delta_rows, FOLDED=folded, PARTIAL=partial, BLOCK_M=block_m, BLOCK_C=block_c,
            BLOCK_RK=block_rk, BLOCK_RV=block_rv, PAD_RV=pad_rv, WAIT=dependent,
            PREFETCH=x.query.is_cuda and torch.version.hip is None,
        ),
        config,
        **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip
    if partial:
        return merge_partials(out, lse, x.query.dtype, x.sinks)
    return out[0], lse[0]
