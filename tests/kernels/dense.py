"""A dense float64 attention over base plus low-rank keys and values, written from the definition.

It shares no code with ``flash_lora_attention``: rows and heads one at a time, rotation as a product of complex numbers,
everything expanded, every mask an explicit matrix.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def _rotate(x, cos, sin, rotary_dim, interleaved):
    """(T, D) rotated by the angles of (T, rotary_dim / 2)."""
    angle = torch.complex(cos, sin)
    turned, rest = x[:, :rotary_dim], x[:, rotary_dim:]
    if interleaved:
        z = torch.view_as_complex(turned.reshape(-1, rotary_dim // 2, 2).contiguous()) * angle
        turned = torch.view_as_real(z).reshape(-1, rotary_dim)
    else:
        z = torch.complex(turned[:, : rotary_dim // 2], turned[:, rotary_dim // 2 :]) * angle
        turned = torch.cat([z.real, z.imag], dim=1)
    return torch.cat([turned, rest], dim=1)


def expand_dense(key, value, acc=torch.float64, **a):
    """Keys and values (B, Hk, T, D) in ``acc`` as each row's adapter sees them."""
    B, Hk, T, D = key.shape
    K, V = key.to(acc, copy=True), value.to(acc, copy=True)
    rotary_dim = a.get("rotary_dim") or D
    index = a.get("adapter_index")
    for b in range(B):
        n = 0 if index is None else int(index[b])
        for h in range(Hk):
            delta = torch.zeros(T, D, dtype=acc, device=key.device)
            for part, up in (("key", a.get("key_up")), ("value", a.get("value_up"))):
                if up is None or n < 0:
                    continue
                low = a[f"{part}_low_rank"]
                low = low[n] if a.get("low_rank_per_adapter") else low[min(b, low.shape[0] - 1)]
                up = (up if up.dim() == 4 else up[None])[n, h]
                product = low.to(acc) @ up.to(acc)
                if part == "value":
                    V[b, h] += product
                else:
                    delta = product
            if a.get("cos") is not None:
                half = []
                for t in (a["cos"], a["sin"]):
                    t = t[min(b, t.shape[0] - 1)].to(acc)
                    if t.shape[1] == rotary_dim:
                        t = t[:, ::2] if a.get("rotary_interleaved") else t[:, : rotary_dim // 2]
                    half.append(t)
                delta = _rotate(delta, *half, rotary_dim, a.get("rotary_interleaved", False))
            if a.get("key_delta_weight") is not None:
                delta = delta * a["key_delta_weight"][h].to(acc)
            if a.get("key_gain") is not None:
                gain, dgain = (a[g][min(b, a[g].shape[0] - 1), h].to(acc) for g in ("key_gain", "key_delta_gain"))
                K[b, h] = K[b, h] * gain[:, None] + delta * dgain[:, None]
            else:
                K[b, h] = K[b, h] + delta
    return K, V


def bias_dense(query, key, **a):
    """(B, Hq, S, T) float64 added to the scores: 0 or the float mask where a query may look, else -inf."""
    B, Hq, S, _ = query.shape
    T = key.shape[2]
    bias = torch.zeros(B, Hq, S, T, dtype=torch.float64, device=query.device)
    length = a.get("key_length")
    t = torch.arange(T, device=query.device)
    for b in range(B):
        n = T if length is None else int(length if isinstance(length, int) or length.dim() == 0 else length[b])
        position = n - S + torch.arange(S, device=query.device)[:, None]
        hidden = (t >= n).expand(S, T).clone()
        if a.get("is_causal", True):
            hidden |= t > position
        if a.get("sliding_window") is not None:
            hidden |= t <= position - a["sliding_window"]
        bias[b].masked_fill_(hidden, -math.inf)
    mask = a.get("attention_mask")
    if mask is not None:
        if mask.dim() == 2:
            mask = mask.bool()[:, None, None, :]
        if mask.dtype == torch.bool:
            bias.masked_fill_(~mask, -math.inf)
        else:
            bias += mask.double()
    return bias


def attention_dense(query, key, value, **a):
    """(out, lse) in float64."""
    K, V = expand_dense(key, value, **a)
    bias = bias_dense(query, key, **a)
    B, Hq, S, D = query.shape
    G = Hq // key.shape[1]
    scale = a.get("scale") or D**-0.5
    out = torch.zeros(B, Hq, S, D, dtype=torch.float64, device=query.device)
    lse = torch.zeros(B, Hq, S, dtype=torch.float64, device=query.device)
    for b in range(B):
        for h in range(Hq):
            s = query[b, h].double() @ K[b, h // G].T * scale
            if a.get("softcap") is not None:
                s = a["softcap"] * torch.tanh(s / a["softcap"])
            s = s + bias[b, h]
            if a.get("sinks") is not None:
                s = torch.cat([s, a["sinks"][h].double().expand(S, 1)], dim=1)
            lse[b, h] = torch.logsumexp(s, dim=1)
            p = torch.softmax(s, dim=1)[:, : key.shape[2]]
            out[b, h] = torch.nan_to_num(p) @ V[b, h // G]
    return out, lse


def sdpa_peer(query, key, value, **a):
    """What PyTorch gives in the same dtype on ready-made keys and values.

    For 16-bit dtypes they are fused in float64 and rounded once. For float32 they are fused in float32, as PEFT does it:
    nothing that computes ``A x`` and ``B a`` in float32 can know the float64 keys.
    """
    dtype = query.dtype
    acc = torch.float32 if dtype == torch.float32 else torch.float64
    K, V = (t.to(dtype) for t in expand_dense(key, value, acc, **a))
    bias = bias_dense(query, key, **a)
    G = query.shape[1] // key.shape[1]
    K, V = K.repeat_interleave(G, 1), V.repeat_interleave(G, 1)
    scale = a.get("scale") or query.shape[-1] ** -0.5
    if a.get("softcap") is not None:
        # SDPA has no soft cap; this is the eager attention of Transformers.
        s = torch.tanh(query @ K.transpose(-1, -2) * scale / a["softcap"]) * a["softcap"] + bias.to(dtype)
        if a.get("sinks") is not None:
            s = torch.cat([s, a["sinks"].to(dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], dim=-1)
        p = torch.softmax(s.float(), dim=-1).to(dtype)[..., : K.shape[2]]
        return torch.nan_to_num(p) @ V
    if a.get("sinks") is not None:
        # A sink is a key of zeros with the sink's logit as bias and a value of zeros.
        K, V = (torch.cat([t, torch.zeros_like(t[:, :, :1])], dim=2) for t in (K, V))
        sink = a["sinks"].double().view(1, -1, 1, 1).expand(*bias.shape[:3], 1)
        bias = torch.cat([bias, sink], dim=-1)
    return torch.nan_to_num(F.scaled_dot_product_attention(query, K, V, attn_mask=bias.to(dtype), scale=scale))
