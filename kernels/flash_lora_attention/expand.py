"""Expansion of one layer's K and V into a transient buffer, and ordinary attention over it: by PyTorch's own SDPA kernels, or by
``dense.py`` where cuDNN's plans do not pay.

For a long block of queries the expansion (one pass over the base cache) costs little beside the attention, and cuDNN's
attention on Hopper is faster than any Triton kernel once it has plans for the lengths. Keys before the block are seen by all
of its queries, so they need no mask: cuDNN attends to them in equal pieces folded into the batch dimension (a split-KV for
free), to the block itself causally, and the parts are merged by log-sum-exp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .calls import empty, perform, start_kernel
from .dense import dense_attention, dense_serves
from .inputs import Inputs, alignments
from .merge_kernel import merge_partials
from .sizes import cdiv, next_power_of_2
from .tiles import aligned, pair_columns
from .tuning import DispatchConfig, ExpandConfig, dense_config, num_sms


@triton.jit(do_not_specialize=["length", "num_t", "num_groups"])
def expand_kernel(
    K, V, KA, KUP, VA, VUP, INDEX, COS, SIN, GAIN, DELTA_GAIN, WEIGHT, OUT_K, OUT_V,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_kab, stride_kat,
    stride_vab, stride_vat,
    stride_cb, stride_ct, stride_cd,
    stride_gb, stride_gh, stride_gt,
    length, num_t, num_groups,
    HK: tl.constexpr, D: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PER_ADAPTER: tl.constexpr,
    K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, KA_ALIGN: tl.constexpr, VA_ALIGN: tl.constexpr, C_ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    CHUNK_RK: tl.constexpr, CHUNK_RV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of tokens of one row and a group of KV heads: reads the base once, writes K and V as the row's adapter sees them.

    The heads are the loop: cos/sin and the low-rank entries of the tokens are read once for all of them, and stay in registers.
    """
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
    i_t = i % num_t
    i = i // num_t
    i_group = i % num_groups
    i_b = (i // num_groups).to(tl.int64)
    zero = i_b * 0  # int64: what is added to it is addressed in 64 bits
    n = tl.load(INDEX + i_b).to(tl.int64) if INDEX is not None else zero
    # A base-model row reads nothing: its low-rank entries may be anything.
    rank_k = tl.where(n >= 0, RK, 0)
    rank_v = tl.where(n >= 0, RV, 0)
    n = tl.maximum(n, 0)
    o_t = (i_t + zero) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = o_t < length
    o_p = tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D)
    o_rk = tl.arange(0, CHUNK_RK)
    o_rv = tl.arange(0, CHUNK_RV)
    o_1, o_2 = pair_columns(o_p, D, ROTARY, INTERLEAVED)
    pair = o_p < D // 2
    if KA is not None:
        KA += (n if PER_ADAPTER else i_b) * stride_kab
        if RK <= CHUNK_RK:
            # (T, r)
            b_ka = tl.load(
                KA + o_t[:, None] * stride_kat + o_rk[None, :], mask=inside[:, None] & (o_rk < rank_k)[None, :], other=0.0
            ).to(OUT_K.dtype.element_ty)  # fmt: skip
        if COS is not None:
            p_c = i_b * stride_cb + o_t[:, None] * stride_ct + o_p[None, :] * stride_cd
            m_c = inside[:, None] & (o_p < ROTARY // 2)[None, :]
            # (T, P) each; columns that are not rotated have angle 0
            b_cos = tl.load(COS + p_c, mask=m_c, other=0.0)
            b_sin = tl.load(SIN + p_c, mask=m_c, other=0.0)
            if ROTARY < D:
                b_cos = tl.where((o_p < ROTARY // 2)[None, :], b_cos, 1.0)
    if VA is not None:
        VA += (n if PER_ADAPTER else i_b) * stride_vab
        if RV <= CHUNK_RV:
            b_va = tl.load(
                VA + o_t[:, None] * stride_vat + o_rv[None, :], mask=inside[:, None] & (o_rv < rank_v)[None, :], other=0.0
            ).to(OUT_V.dtype.element_ty)  # fmt: skip

    for i_h in tl.range(i_group * HK // num_groups, (i_group + 1) * HK // num_groups, num_stages=STAGES):
        h = i_h + zero
        out = ((i_b * HK + h) * length + o_t)[:, None] * D  # (B, Hk, length, D), contiguous
        if OUT_K is not None:
            m_k = inside[:, None] & pair[None, :]
            p_k = K + i_b * stride_kb + h * stride_kh + o_t[:, None] * stride_kt
            # (T, P) each
            b_k1 = tl.load(p_k + o_1[None, :] * stride_kd, mask=m_k, other=0.0).to(tl.float32)
            b_k2 = tl.load(p_k + o_2[None, :] * stride_kd, mask=m_k, other=0.0).to(tl.float32)
            if GAIN is not None:
                p_g = i_b * stride_gb + h * stride_gh + o_t[:, None] * stride_gt
                b_gain = tl.load(GAIN + p_g, mask=inside[:, None], other=0.0).to(tl.float32)
                b_k1 = b_k1 * b_gain
                b_k2 = b_k2 * b_gain
            if KA is not None:
                b_d1 = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
                b_d2 = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
                for c in tl.static_range(0, RK, CHUNK_RK):
                    if RK > CHUNK_RK:
                        b_ka = tl.load(
                            KA + o_t[:, None] * stride_kat + (c + o_rk)[None, :],
                            mask=inside[:, None] & (c + o_rk < rank_k)[None, :], other=0.0,
                        ).to(OUT_K.dtype.element_ty)  # fmt: skip
                    p_up = KUP + (n * HK + h) * (RK * D) + (c + o_rk)[:, None] * D
                    m_up = (c + o_rk < RK)[:, None] & pair[None, :]
                    # (r, P) each
                    b_up1 = tl.load(p_up + o_1[None, :], mask=m_up, other=0.0).to(OUT_K.dtype.element_ty)
                    b_up2 = tl.load(p_up + o_2[None, :], mask=m_up, other=0.0).to(OUT_K.dtype.element_ty)
                    b_d1 = tl.dot(b_ka, b_up1, b_d1, input_precision=PRECISION)
                    b_d2 = tl.dot(b_ka, b_up2, b_d2, input_precision=PRECISION)
                if COS is not None:
                    b_e1 = b_d1 * b_cos.to(tl.float32) - b_d2 * b_sin.to(tl.float32)
                    b_e2 = b_d2 * b_cos.to(tl.float32) + b_d1 * b_sin.to(tl.float32)
                else:
                    b_e1 = b_d1
                    b_e2 = b_d2
                if WEIGHT is not None:
                    p_w = WEIGHT + h * D
                    b_e1 = b_e1 * tl.load(p_w + o_1, mask=pair, other=0.0).to(tl.float32)[None, :]
                    b_e2 = b_e2 * tl.load(p_w + o_2, mask=pair, other=0.0).to(tl.float32)[None, :]
                if GAIN is not None:
                    b_dgain = tl.load(DELTA_GAIN + p_g, mask=inside[:, None], other=0.0).to(tl.float32)
                    b_e1 = b_e1 * b_dgain
                    b_e2 = b_e2 * b_dgain
                b_k1 = b_k1 + b_e1
                b_k2 = b_k2 + b_e2
            b_k1 = b_k1.to(OUT_K.dtype.element_ty)
            b_k2 = b_k2.to(OUT_K.dtype.element_ty)
            if ROTARY == D and BLOCK_D == D and 2 * BLOCK_P == D:
                # One store of whole rows: one change of layout instead of two.
                b_k = tl.join(b_k1, b_k2)  # (T, P, 2)
                if not INTERLEAVED:
                    b_k = tl.permute(b_k, (0, 2, 1))
                b_k = tl.reshape(b_k, [BLOCK_T, BLOCK_D])
                tl.store(OUT_K + out + o_d[None, :], b_k, mask=inside[:, None] & (o_d < D)[None, :])
            else:
                tl.store(OUT_K + out + o_1[None, :], b_k1, mask=m_k)
                tl.store(OUT_K + out + o_2[None, :], b_k2, mask=m_k)

        if OUT_V is not None:
            m_v = inside[:, None] & (o_d < D)[None, :]
            p_v = V + i_b * stride_vb + h * stride_vh + o_t[:, None] * stride_vt + o_d[None, :] * stride_vd
            # (T, D)
            b_v = tl.load(p_v, mask=m_v, other=0.0).to(tl.float32)
            for c in tl.static_range(0, RV, CHUNK_RV):
                if RV > CHUNK_RV:
                    b_va = tl.load(
                        VA + o_t[:, None] * stride_vat + (c + o_rv)[None, :],
                        mask=inside[:, None] & (c + o_rv < rank_v)[None, :], other=0.0,
                    ).to(OUT_V.dtype.element_ty)  # fmt: skip
                p_up = VUP + (n * HK + h) * (RV * D) + (c + o_rv)[:, None] * D + o_d[None, :]
                m_up = (c + o_rv < RV)[:, None] & (o_d < D)[None, :]
                # (r, D)
                b_up = tl.load(p_up, mask=m_up, other=0.0).to(OUT_V.dtype.element_ty)
                b_v = tl.dot(b_va, b_up, b_v, input_precision=PRECISION)
            tl.store(OUT_V + out + o_d[None, :], b_v.to(OUT_V.dtype.element_ty), mask=m_v)


def expand(x: Inputs, length: int, config: ExpandConfig, with_value: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the first ``length`` tokens as each row's adapter sees them.

    Args:
        with_value: False leaves the values as they are.

    Returns:
        key, value (B, Hk, length, D): contiguous and new where there is something to expand, else a view of the base.
    """
    shape = (x.B, x.Hk, length, x.D)
    key, value = x.key[:, :, :length], x.value[:, :, :length]
    out_k = out_v = None
    if x.key_low_rank is not None or x.key_gain is not None:
        out_k = empty(shape, x.query.dtype, x.query.device)
    if x.value_low_rank is not None and with_value:
        out_v = empty(shape, x.query.dtype, x.query.device)
    if (out_k is not None or out_v is not None) and length and x.B:
        num_t = cdiv(length, config.block_t)
        # All heads in one program, as long as there are enough programs.
        num_groups = max(1, min(x.Hk, num_sms(x.query.device) * config.programs_per_sm // (x.B * num_t)))
        value_low_rank = x.value_low_rank if with_value else None

        def strides(tensor: torch.Tensor | None, n: int) -> tuple[int, ...]:
            return (0,) * n if tensor is None else tensor.stride()[:n]

        start_kernel(
            expand_kernel, (num_t * num_groups * x.B,),
            x.key, x.value, x.key_low_rank, x.key_up, value_low_rank, x.value_up, x.adapter_index, x.cos, x.sin,
            x.key_gain, x.key_delta_gain, x.key_delta_weight, out_k, out_v,
            *x.key.stride(), *x.value.stride(), *strides(x.key_low_rank, 2), *strides(value_low_rank, 2),
            *strides(x.cos, 3), *strides(x.key_gain, 3), length, num_t, num_groups,
            HK=x.Hk, D=x.D, RK=x.rk, RV=x.rv, ROTARY=x.rotary_dim, INTERLEAVED=x.rotary_interleaved,
            PER_ADAPTER=x.low_rank_per_adapter and x.adapter_index is not None,
            **alignments(x),
            BLOCK_T=config.block_t, BLOCK_D=max(16, next_power_of_2(x.D)),
            BLOCK_P=max(16, next_power_of_2(x.D // 2)),
            CHUNK_RK=min(64, max(16, next_power_of_2(x.rk))),
            CHUNK_RV=min(64, max(16, next_power_of_2(x.rv))),
            # Above a rank of 64 the up-projections are read within the loop, and pipelined would not fit into shared memory.
            PRECISION="ieee", STAGES=config.num_stages if max(x.rk, x.rv) <= 64 else 1, num_warps=config.num_warps,
        )  # fmt: skip
    return (key if out_k is None else out_k), (value if out_v is None else out_v)


def expanded(x: Inputs, length: int, config: ExpandConfig, with_value: bool = True) -> Inputs:
    """The same attention over expanded keys (and values): for tiles of queries that would expand the same keys each."""
    key, value = expand(x, length, config, with_value)
    x = x.replace(
        key=key, value=value, key_low_rank=None, key_up=None, cos=None, sin=None, key_gain=None, key_delta_gain=None,
        key_delta_weight=None,
        attention_mask=None if x.attention_mask is None else x.attention_mask[..., :length],
    )  # fmt: skip
    if with_value or x.value_low_rank is None:
        return x.replace(value_low_rank=None, value_up=None, adapter_index=None)
    return x.replace(value_low_rank=x.value_low_rank[:, :length])


def sdpa_can_express(x: Inputs) -> bool:
    """Whether causality alone describes who sees whom, with one length for all rows, known without asking the device."""
    if not isinstance(x.key_length, int) or x.softcap is not None or x.attention_mask is not None:
        return False
    if x.D % 8:
        return False
    return x.S <= x.key_length and (x.sliding_window is None or x.sliding_window >= x.key_length)


def _flash(query, key, value, is_causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-2 as shipped with PyTorch; called below the SDPA front end, its causality is lower-right."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[:2]


def _cudnn(query, key, value, is_causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN's attention; its causality is upper-left, so ``is_causal`` is for S = T alone."""
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, is_causal, False, scale=scale
    )[:2]
    return out, lse.reshape(out.shape[:-1])


def _efficient(query, key, value, is_causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory-efficient kernel, SDPA's choice for float32; it has no grouped heads and no lower-right causality."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scale
    )[:2]
    return out, lse[..., : query.shape[2]]


def _bucket(n: int) -> int:
    """The next length of five significant bits and whole 64s: cuDNN builds a plan per shape, so shapes must be few."""
    unit = max(64, 1 << max(0, n.bit_length() - 5))
    return cdiv(n, unit) * unit


def _padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """(..., T, D) with zeros up to ``length`` tokens."""
    return tensor if tensor.shape[2] == length else F.pad(tensor, (0, 0, 0, length - tensor.shape[2]))


def _cudnn_square(query, key, value, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal S = T with cuDNN; rows of padding come last, so that no real query sees them."""
    S = query.shape[2]
    query, key, value = (_padded(t, _bucket(S)) for t in (query, key, value))
    out, lse = _cudnn(query, key, value, True, scale)
    return out[:, :, :S], lse[..., :S]


def _cudnn_folded(query, key, value, num_splits: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Unmasked attention with cuDNN, the keys of a single row cut into pieces that become batch rows.

    Returns:
        out (num_splits, B, Hq, S, D), lse (num_splits, B, Hq, S).
    """
    S, cut = query.shape[2], key.shape[2]
    query = _padded(query, _bucket(S))
    if num_splits > 1:
        query = query.expand(num_splits, -1, -1, -1)
        key, value = (t[0].unflatten(1, (num_splits, cut // num_splits)).transpose(0, 1) for t in (key, value))
    out, lse = _cudnn(query, key, value, False, scale)
    out, lse = out[:, :, :S], lse[..., :S]
    return (out.unsqueeze(1), lse.unsqueeze(1)) if num_splits > 1 else (out.unsqueeze(0), lse.unsqueeze(0))


# Floating-point operations of a call from which on cuDNN gains as much in one pass of some 32 layers as its plans take (50 to
# 80 ms): 622 TFLOP/s against 504 of the kernel for ready-made K and V (docs/benchmarks/flash_lora_attention_h200.csv).
_LONG_CALL = 6e12


def _plans_pay(x: Inputs, length: int) -> bool:
    """Whether cuDNN's plans pay in a single pass."""
    return 4 * x.B * x.Hk * x.G * x.D * x.S * (length - x.S / 2 if x.is_causal else length) >= _LONG_CALL


def sdpa_attention(
    x: Inputs,
    expand_config: ExpandConfig,
    config: DispatchConfig,
    num_splits: int | None = None,
    cudnn_plans: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expand, then attend as ordinary attention does; only where :func:`sdpa_can_express` holds.

    Args:
        x: the checked and normalised arguments.
        expand_config, config: from ``tuning``.
        num_splits: pieces that cuDNN takes the keys before the block in; absent: as many as fill the device.
        cudnn_plans: as in ``flash_lora_attention``.

    Returns:
        out (B, Hq, S, D) in the dtype of the query, lse (B, Hq, S) float32.
    """
    length = x.key_length
    if not isinstance(length, int):
        raise TypeError("sdpa_attention needs one length for all rows, known to the host: see sdpa_can_express")
    key, value = expand(x, length, expand_config)
    hopper = torch.cuda.get_device_capability(x.query.device)[0] >= 9
    cudnn = x.query.dtype != torch.float32 and x.S >= config.cudnn_queries and x.D <= (256 if hopper else 128)
    cudnn = cudnn and (cudnn_plans or _plans_pay(x, length))
    if not cudnn and dense_serves(x.query, key, value, x.scale):
        dense = dense_config(x.query.device, x.query.dtype, x.D)
        return dense_attention(
            x.query, key, value, scale=x.scale, is_causal=x.is_causal, sinks=x.sinks, config=dense
        )  # fmt: skip
    if num_splits is None:
        tiles = cdiv(x.S, 128) * x.B * x.Hk * x.G
        num_splits = 1
        past = length - x.S if x.is_causal else length
        while x.B == 1 and 2 * num_splits * tiles <= num_sms(x.query.device) and num_splits * 2048 <= past:
            num_splits *= 2
    out, lse = perform(_sdpa, x.query, key, value, x.sinks, cudnn, num_splits, x.is_causal, x.scale)
    return out, lse


def _sdpa(query, key, value, sinks, cudnn, num_splits, is_causal, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`sdpa_attention` over ready-made K and V (B, Hk, length, D) by PyTorch's kernels."""
    S, length = query.shape[2], key.shape[2]
    past = length - S if is_causal else length  # keys that every query sees
    half = query.dtype != torch.float32
    parts: list[tuple[torch.Tensor, torch.Tensor]]
    if is_causal and past == 0:
        square = _cudnn_square(query, key, value, scale) if cudnn else None
        parts = [square or (_flash if half else _efficient)(query, key, value, True, scale)]
    elif half and not cudnn:
        parts = [_flash(query, key, value, is_causal, scale)]
    elif not half:
        parts = []
        if past:
            parts += [_efficient(query, key[:, :, :past], value[:, :, :past], False, scale)]
        if is_causal:
            parts += [_efficient(query, key[:, :, past:], value[:, :, past:], True, scale)]
    else:
        # What a piece of few significant bits leaves over joins the block in the lower-right causal part.
        unit = max(64 * num_splits, 1 << max(0, past.bit_length() - 5))
        cut = past // unit * unit
        parts = []
        if cut:
            parts += [_cudnn_folded(query, key[:, :, :cut], value[:, :, :cut], num_splits, scale)]
        if cut < length:
            key, value = key[:, :, cut:], value[:, :, cut:]
            if is_causal and length - cut == S:
                parts += [_cudnn_square(query, key, value, scale)]
            else:
                parts += [_flash(query, key, value, is_causal, scale)]
    if len(parts) == 1 and sinks is None and (parts[0][0].dim() == 4 or parts[0][0].shape[0] == 1):
        out, lse = parts[0]
        return (out, lse) if out.dim() == 4 else (out[0], lse[0])
    out = torch.cat([o if o.dim() == 5 else o.unsqueeze(0) for o, _ in parts])
    lse = torch.cat([s if s.dim() == 4 else s.unsqueeze(0) for _, s in parts])
    return merge_partials(out.contiguous(), lse.float().contiguous(), query.dtype, sinks)
