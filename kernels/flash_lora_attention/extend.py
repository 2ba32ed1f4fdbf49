"""Fused kernel for blocks of queries (extend, chunked prefill, masks that SDPA cannot express).

FlashAttention-2's tiling with the grouped heads of a KV head packed beside the query tokens, so that a key tile is expanded
once for all of them: ``K += RoPE_t(a_k B_k)`` in registers, as the two halves of each rotary pair. V is not expanded,
``P a_v`` is accumulated beside ``P V``. Keys may be split over programs as in ``decode.py``; parts are merged the same way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .calls import empty
from .inputs import Inputs, launch
from .merge_kernel import launches_dependents, merge_partials
from .sizes import cdiv, next_power_of_2
from .tiles import LOG2_E, aligned, log2_softcap, pair_columns, visible_range
from .tuning import ExtendConfig, num_sms

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["B", "S", "T", "key_length", "window", "num_m", "num_splits"])
def extend_kernel(
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
    B, S, T, key_length, scale, softcap, window, num_m, num_splits,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, FLOAT_MASK: tl.constexpr, PER_ADAPTER: tl.constexpr,
    K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, KA_ALIGN: tl.constexpr, VA_ALIGN: tl.constexpr, C_ALIGN: tl.constexpr,
    C_WIDTH: tl.constexpr, PARTIAL: tl.constexpr, RAW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_RK: tl.constexpr, BLOCK_RV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """One KV head, one block of its queries, one range of keys; arguments as in ``Inputs``, strides in elements."""
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
    i = tl.program_id(0)
    i_h = (i % HK).to(tl.int64)
    i = i // HK
    # The last queries see the most keys: their tiles start first.
    i_m = num_m - 1 - i % num_m
    i = i // num_m
    i_b = (i % B).to(tl.int64)
    i_split = i // B
    zero = i_b * 0  # int64: what is added to it is addressed in 64 bits

    # Row m of the tile: query token and grouped head, the head fastest, so that a tile spans few tokens.
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_s = o_m // G
    valid = o_s < S
    o_hq = i_h * G + o_m % G
    length = tl.load(LENGTH + i_b * stride_nb).to(tl.int32) if LENGTH is not None else key_length
    first, last = visible_range(o_s, length, valid, S, window, IS_CAUSAL, HAS_WINDOW)

    # What the first and the last query token of the tile see, from scalars: as in decode.py.
    lowest = length - S + (i_m * BLOCK_M) // G
    highest = length - S + tl.minimum(S - 1, (i_m * BLOCK_M + BLOCK_M - 1) // G)
    hi = tl.minimum(highest + 1 if IS_CAUSAL else length, T)
    lo = tl.maximum(lowest - window + 1, 0) // BLOCK_N if HAS_WINDOW else 0
    tiles = tl.maximum(tl.cdiv(hi, BLOCK_N) - lo, 0)
    begin = (lo + (i_split * tiles) // num_splits) * BLOCK_N
    end = tl.minimum((lo + ((i_split + 1) * tiles) // num_splits) * BLOCK_N, hi)
    end = tl.maximum(begin, end)
    if HAS_WINDOW or MASK is not None:
        middle = begin
    else:
        # Whole tiles that every query of this program sees need no mask.
        seen_by_all = lowest + 1 if IS_CAUSAL else length
        middle = tl.maximum(begin, tl.minimum(end, seen_by_all) // BLOCK_N * BLOCK_N)

    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    p_q = Q + i_b * stride_qb + o_hq * stride_qh + o_s.to(tl.int64) * stride_qs  # (M,)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n = tl.load(INDEX + i_b).to(tl.int64) if INDEX is not None else zero
    # A base-model row reads nothing: its low-rank entries may be anything.
    rank_k = tl.where(n >= 0, RK, 0)
    rank_v = tl.where(n >= 0, RV, 0)
    n = tl.maximum(n, 0)
    K += i_b * stride_kb + i_h * stride_kh
    V += i_b * stride_vb + i_h * stride_vh
    if GAIN is not None:
        GAIN += i_b * stride_gb + i_h * stride_gh
        DELTA_GAIN += i_b * stride_gb + i_h * stride_gh
    if COS is not None:
        COS += i_b * stride_cb
        SIN += i_b * stride_cb
    if MASK is not None:
        p_mask = MASK + i_b * stride_mb + o_hq * stride_mh + o_s.to(tl.int64) * stride_ms
    # (M, D)
    b_q = tl.load(p_q[:, None] + o_d[None, :] * stride_qd, mask=valid[:, None] & (o_d < D)[None, :], other=0.0)
    o_p = tl.arange(0, BLOCK_P)
    o_1, o_2 = pair_columns(o_p, D, ROTARY, INTERLEAVED)
    if KA is not None:
        KA += (n if PER_ADAPTER else i_b) * stride_kab
        pair = o_p < D // 2
        # (M, P) each
        b_q1 = tl.load(p_q[:, None] + o_1[None, :] * stride_qd, mask=valid[:, None] & pair[None, :], other=0.0)
        b_q2 = tl.load(p_q[:, None] + o_2[None, :] * stride_qd, mask=valid[:, None] & pair[None, :], other=0.0)
        o_rk = tl.arange(0, BLOCK_RK)
        p_up = KUP + (n * HK + i_h) * (RK * D) + o_rk[:, None] * D
        # (r, P) each
        b_up1 = tl.load(p_up + o_1[None, :], mask=(o_rk < RK)[:, None] & pair[None, :], other=0.0).to(dtype)
        b_up2 = tl.load(p_up + o_2[None, :], mask=(o_rk < RK)[:, None] & pair[None, :], other=0.0).to(dtype)
    if VA is not None:
        VA += (n if PER_ADAPTER else i_b) * stride_vab
        o_rv = tl.arange(0, BLOCK_RV)
        b_pa = tl.zeros([BLOCK_M, BLOCK_RV], tl.float32)

    if WAIT:
        gdc_wait()  # for expanded keys, which the kernel before writes
    # One loop, in which few tiles are masked: with a second one for them ptxas serialises the wgmma instructions of both (C7515),
    # and products in a loop without asynchronous copies, or unrolled after it, came out wrong on Hopper (Triton 3.6).
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        o_t = start + o_n
        inside = o_t < end
        t = start + zero
        p_k = K + t * stride_kt
        if KA is None:
            # (D, N)
            b_k = tl.load(
                p_k + o_d[:, None] * stride_kd + o_n[None, :] * stride_kt,
                mask=(o_d < D)[:, None] & inside[None, :], other=0.0,
            ).to(dtype)  # fmt: skip
            b_s = tl.dot(b_q, b_k, input_precision=PRECISION)  # (M, N)
            if GAIN is not None:
                b_s = b_s * tl.load(GAIN + o_t.to(tl.int64) * stride_gt, mask=inside, other=0.0).to(tl.float32)[None, :]
        else:
            m_k = inside[:, None] & (o_p < D // 2)[None, :]
            # (N, P) each: the columns of the rotary pairs
            b_k1 = tl.load(p_k + o_n[:, None] * stride_kt + o_1[None, :] * stride_kd, mask=m_k, other=0.0).to(
                tl.float32
            )
            b_k2 = tl.load(p_k + o_n[:, None] * stride_kt + o_2[None, :] * stride_kd, mask=m_k, other=0.0).to(
                tl.float32
            )
            # (N, r)
            b_a = tl.load(
                KA + t * stride_kat + o_n[:, None] * stride_kat + o_rk[None, :],
                mask=inside[:, None] & (o_rk < rank_k)[None, :], other=0.0,
            ).to(dtype)  # fmt: skip
            b_d1 = tl.dot(b_a, b_up1, input_precision=PRECISION)
            b_d2 = tl.dot(b_a, b_up2, input_precision=PRECISION)
            if COS is not None:
                o_c = t * stride_ct + o_n[:, None] * stride_ct + o_p[None, :] * stride_cd
                m_c = inside[:, None] & (o_p < C_WIDTH)[None, :]
                b_cos = tl.load(COS + o_c, mask=m_c, other=0.0).to(tl.float32)
                b_sin = tl.load(SIN + o_c, mask=m_c, other=0.0).to(tl.float32)
                if ROTARY < D:
                    # Columns that are not rotated have angle 0.
                    b_cos = tl.where((o_p < ROTARY // 2)[None, :], b_cos, 1.0)
                b_e1 = b_d1 * b_cos - b_d2 * b_sin
                b_e2 = b_d2 * b_cos + b_d1 * b_sin
            else:
                b_e1 = b_d1
                b_e2 = b_d2
            if WEIGHT is not None:
                p_w = WEIGHT + i_h * D
                b_e1 = b_e1 * tl.load(p_w + o_1, mask=pair, other=0.0).to(tl.float32)[None, :]
                b_e2 = b_e2 * tl.load(p_w + o_2, mask=pair, other=0.0).to(tl.float32)[None, :]
            if GAIN is not None:
                o_g = o_t.to(tl.int64) * stride_gt
                b_gain = tl.load(GAIN + o_g, mask=inside, other=0.0).to(tl.float32)[:, None]
                b_dgain = tl.load(DELTA_GAIN + o_g, mask=inside, other=0.0).to(tl.float32)[:, None]
                b_k1 = b_k1 * b_gain + b_e1 * b_dgain
                b_k2 = b_k2 * b_gain + b_e2 * b_dgain
            else:
                b_k1 = b_k1 + b_e1
                b_k2 = b_k2 + b_e2
            b_s = tl.dot(b_q1, tl.trans(b_k1.to(dtype)), input_precision=PRECISION)  # (M, N)
            b_s = tl.dot(b_q2, tl.trans(b_k2.to(dtype)), b_s, input_precision=PRECISION)

        if not RAW:
            b_s = b_s * (scale * LOG2_E)
        if HAS_SOFTCAP:
            b_s = log2_softcap(b_s, softcap)
        if start >= middle:
            seen = o_t[None, :] <= tl.minimum(last, end - 1)[:, None]
            if HAS_WINDOW:
                seen = seen & (o_t[None, :] >= first[:, None])
            if MASK is not None:
                b_m = tl.load(p_mask[:, None] + o_t.to(tl.int64)[None, :] * stride_mt, mask=seen, other=0)
                if FLOAT_MASK:
                    b_s += b_m.to(tl.float32) * LOG2_E
                else:
                    seen = seen & (b_m != 0)
            b_s = tl.where(seen, b_s, float("-inf"))

        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen yet: exp2(-inf - 0), not -inf - -inf
        if RAW:
            # Scaled within the exponent, where it costs nothing: one fused multiply-add per score.
            b_p = tl.exp2(b_s * (scale * LOG2_E) - (b_ref * (scale * LOG2_E))[:, None])
            b_scale = tl.exp2((b_max - b_ref) * (scale * LOG2_E))
        else:
            b_p = tl.exp2(b_s - b_ref[:, None])
            b_scale = tl.exp2(b_max - b_ref)
        b_max = b_new
        b_sum = b_sum * b_scale + tl.sum(b_p, axis=1)
        b_p = b_p.to(dtype)
        # Both accumulators are scaled before the first of the two products starts: between them they must not be touched.
        b_o = b_o * b_scale[:, None]
        if VA is not None:
            b_pa = b_pa * b_scale[:, None]
        # (N, D)
        b_v = tl.load(
            V + t * stride_vt + o_n[:, None] * stride_vt + o_d[None, :] * stride_vd,
            mask=inside[:, None] & (o_d < D)[None, :], other=0.0,
        ).to(dtype)  # fmt: skip
        b_o = tl.dot(b_p, b_v, b_o, input_precision=PRECISION)
        if VA is not None:
            # (N, r)
            b_a = tl.load(
                VA + t * stride_vat + o_n[:, None] * stride_vat + o_rv[None, :],
                mask=inside[:, None] & (o_rv < rank_v)[None, :], other=0.0,
            ).to(dtype)  # fmt: skip
            b_pa = tl.dot(b_p, b_a, b_pa, input_precision=PRECISION)

    b_div = tl.where(b_sum > 0.0, b_sum, 1.0)
    b_o = b_o / b_div[:, None]
    if VA is not None:
        # (r, D)
        p_up = VUP + (n * HK + i_h) * (RV * D) + o_rv[:, None] * D + o_d[None, :]
        b_up = tl.load(p_up, mask=(o_rv < RV)[:, None] & (o_d < D)[None, :], other=0.0).to(dtype)
        # In two parts where dtype is 16 bits wide: with a small rank one rounding of P a_v would show in all columns.
        b_pa = b_pa / b_div[:, None]
        b_high = b_pa.to(dtype)
        b_o = tl.dot(b_high, b_up, b_o, input_precision=PRECISION)
        if dtype != tl.float32:
            b_o = tl.dot((b_pa - b_high.to(tl.float32)).to(dtype), b_up, b_o, input_precision=PRECISION)
    b_lse = tl.where(b_sum > 0.0, b_max * (scale if RAW else LN_2) + tl.log(b_div), float("-inf"))
    if not PARTIAL and SINKS is not None:
        b_sink = tl.load(SINKS + o_hq).to(tl.float32)
        b_both = tl.maximum(b_lse, b_sink)
        b_both = b_both + tl.log(tl.exp(b_lse - b_both) + tl.exp(b_sink - b_both))
        b_o = b_o * tl.exp(b_lse - b_both)[:, None]
        b_lse = b_both
    o_out = ((i_split.to(tl.int64) * B + i_b) * (HK * G) + o_hq) * S + o_s
    p_o = OUT + o_out[:, None] * D + o_d[None, :]
    tl.store(p_o, b_o.to(OUT.dtype.element_ty), mask=valid[:, None] & (o_d < D)[None, :])
    if LSE is not None:
        tl.store(LSE + o_out, b_lse, mask=valid)


def extend_attention(
    x: Inputs, config: ExtendConfig, num_splits: int | None = None, after_expansion: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a block of queries over the split cache, or over ready-made keys and values.

    Args:
        x: the checked and normalised arguments.
        config: tile sizes; from ``tuning.extend_config``.
        num_splits: parts that the keys are split into; absent: as many as fill the device.
        after_expansion: the kernel queued last writes the keys (or values), and nothing else that is read here; this one is
            launched while it still runs, and waits for it on the device.

    Returns:
        out (B, Hq, S, D) in the dtype of the query, lse (B, Hq, S) float32.
    """
    num_m = cdiv(x.S * x.G, config.block_m)
    programs = x.Hk * num_m * x.B
    if num_splits is None:
        wanted = num_sms(x.query.device) * config.programs_per_sm // programs
        num_splits = max(1, min(wanted, cdiv(x.visible_keys, config.block_n * config.min_tiles), 32))
    partial = num_splits > 1
    shape = (num_splits, x.B, x.Hk * x.G, x.S)
    out = empty((*shape, x.D), torch.float32 if partial else x.query.dtype, x.query.device)
    lse = empty(shape, torch.float32, x.query.device)
    block_rk, block_rv = (max(16, next_power_of_2(r)) for r in (x.rk, x.rv))
    # Maxima of unscaled scores are those of the scaled ones.
    float_mask = x.attention_mask is not None and x.attention_mask.is_floating_point()
    raw = x.scale > 0 and x.softcap is None and not float_mask
    dependent = after_expansion and launches_dependents(x.query.device)
    launch(
        extend_kernel,
        (programs * num_splits,),
        x,
        out,
        lse,
        dict(num_m=num_m, num_splits=num_splits),
        dict(PARTIAL=partial, BLOCK_M=config.block_m, BLOCK_RK=block_rk, BLOCK_RV=block_rv, WAIT=dependent, RAW=raw),
        config,
        **({"launch_pdl": True} if dependent else {}),
    )
    if partial:
        return merge_partials(out, lse, x.query.dtype, x.sinks)
    return out[0], lse[0]
