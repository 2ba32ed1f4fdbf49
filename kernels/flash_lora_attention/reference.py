"""Attention over a split KV cache in plain PyTorch: what every kernel of this package has to compute.

It is the CPU implementation as well, so it is not naive: the low-rank part of V is never expanded, ``out = P V + (P a_v) B_v``
(LRAgent, arXiv 2602.01053, section 4.3), grouped query heads share one product per KV head, and queries are taken in
blocks so that no full (S, T) score matrix of a long prompt exists. It is a pure function and does not look at a cache.
"""

from __future__ import annotations

import torch

from .arguments import check_arguments
from .rope import apply_rope, half_width

# Scores held at once, in elements over all heads: 64 MiB in float32.
_SCORE_BLOCK = 1 << 24
# Queries taken at once where later keys can be left out: small enough that little is computed in vain.
_CAUSAL_BLOCK = 256


def flash_lora_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_low_rank: torch.Tensor | None = None,
    key_up: torch.Tensor | None = None,
    value_low_rank: torch.Tensor | None = None,
    value_up: torch.Tensor | None = None,
    adapter_index: torch.Tensor | None = None,
    low_rank_per_adapter: bool = False,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    rotary_interleaved: bool = False,
    key_gain: torch.Tensor | None = None,
    key_delta_gain: torch.Tensor | None = None,
    key_delta_weight: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    key_length: torch.Tensor | int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention whose keys and values are a base part plus a low-rank part that is expanded on the fly.

    For row b with adapter n = ``adapter_index[b]``, KV head h and key t::

        K[t] = key_gain[t] * key[t] + key_delta_gain[t] * key_delta_weight[h] * RoPE_t(key_low_rank[t] @ key_up[n, h])
        V[t] = value[t] + value_low_rank[t] @ value_up[n, h]
        out  = softmax(softcap(scale * query K^T) + mask) V          (the ups carry LoRA's scaling)

    Causality is aligned to the lower right, as in FlashAttention ≥ 2.1. With S = 2 queries on T = 5 keys::

        q0  1 1 1 1 0
        q1  1 1 1 1 1

    Args:
        query: (B, Hq, S, D).
        key, value: (B, Hk, T, D), base keys after RoPE and base values. Hq must be a multiple of Hk. Any strides; a batch
            stride of 0 lets rows share one trunk. T may be a capacity longer than ``key_length``.
        key_low_rank, value_low_rank: (B or 1, T, r), the down-projections ``A x`` of each token; with
            ``low_rank_per_adapter`` (n, T, r), row b reads ``[adapter_index[b]]``. May be absent, together with its up.
        key_up, value_up: (Hk, r, D) or (n, Hk, r, D), up-projections times scaling, split into heads.
        adapter_index: (B,) integer, the adapter of each row; -1 is the base model (no low-rank part). May be absent when
            n = 1.
        cos, sin: (B or 1, T, rotary_dim) or (B or 1, T, rotary_dim / 2), those of each *key's* position. Absent: the key's
            low-rank part is not rotated.
        rotary_dim: number of rotated columns of a head; absent: D. The remaining columns pass.
        rotary_interleaved: rotate pairs (2i, 2i+1) instead of (i, i + rotary_dim/2).
        key_gain, key_delta_gain: (B or 1, Hk, T), the two numbers of models that normalise keys:
            ``s(u)/s(u + delta)`` and ``1/s(u + delta)`` for the base key u. Given together or not at all.
        key_delta_weight: (Hk, D), what the low-rank part of keys is multiplied with after its rotation: the weights of a norm of
            rotated keys. Absent: 1.
        scale: factor of the scores; absent: ``D ** -0.5``.
        is_causal: query i sees keys up to ``key_length - S + i``.
        sliding_window: and only the last ``sliding_window`` of those (the token itself included).
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: (Hq,) one extra logit per head that takes probability and gives nothing (GPT-OSS).
        attention_mask: (B, T) bool, keys that may be seen; or (B or 1, Hq or 1, S, T) bool (True = may be seen) or floating
            (added to the scores). It is applied together with ``is_causal``.
        key_length: number of valid keys, one for all rows or (B,) integer; absent: T.
        return_lse: also return the log-sum-exp.

    Returns:
        (B, Hq, S, D) in the dtype of ``query``; with ``return_lse`` also (B, Hq, S) float32 (natural logarithm, sinks
        included). A query that sees no key gives 0 and -inf. Accumulated in float32 (float64 for float64 queries).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with both values.
    """
    if torch.is_autocast_enabled(query.device.type):
        # Autocast would compute the products in half precision.
        arguments = {name: value for name, value in locals().items() if name not in ("query", "key", "value")}
        with torch.autocast(query.device.type, enabled=False):
            return flash_lora_attention_reference(query, key, value, **arguments)
    problem = check_arguments(
        query, key, value, key_low_rank, key_up, value_low_rank, value_up, adapter_index, low_rank_per_adapter,
        cos, sin, rotary_dim, key_gain, key_delta_gain, key_delta_weight, sliding_window, softcap, sinks, attention_mask,
        key_length,
    )  # fmt: skip
    B, Hq, S, D = query.shape
    Hk, T = key.shape[1], key.shape[2]
    G = Hq // Hk
    acc = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = D**-0.5 if scale is None else scale

    def rows(up: torch.Tensor | None, low_rank: torch.Tensor | None):
        """The up-projection (B or 1, Hk, r, D) and low-rank entries (B or 1, T, r) of each row."""
        if up is None or low_rank is None:
            return None, None
        up = up.to(acc).reshape(-1, Hk, *up.shape[-2:])
        low_rank = low_rank.to(acc)
        if adapter_index is None:
            return up, low_rank
        index = adapter_index.to(up.device).long()
        # A base-model row has no low-rank part: its up-projection is zero.
        up = up[index.clamp(min=0)] * (index >= 0).to(acc)[:, None, None, None]
        return up, low_rank[index.clamp(min=0)] if low_rank_per_adapter else low_rank

    k = key.to(acc)
    if key_gain is not None:
        k = k * key_gain.to(acc).unsqueeze(-1)
    k_up, k_lr = rows(key_up, key_low_rank)
    if k_up is not None:
        delta = k_lr.unsqueeze(1) @ k_up  # (B, Hk, T, D)
        if cos is not None and sin is not None:
            cos, sin = (half_width(t.to(acc), problem.rotary_dim, rotary_interleaved) for t in (cos, sin))
            delta = apply_rope(delta, cos, sin, rotary_interleaved)
        if key_delta_weight is not None:
            delta = delta * key_delta_weight.to(acc)[:, None]
        if key_delta_gain is not None:
            delta = delta * key_delta_gain.to(acc).unsqueeze(-1)
        k = k + delta
    v = value.to(acc)
    v_up, v_lr = rows(value_up, value_low_rank)
    if isinstance(problem.key_length, torch.Tensor) or problem.key_length < T:
        # Unused capacity may hold anything, and a probability of zero does not silence a NaN.
        unused = torch.arange(T, device=key.device) >= torch.as_tensor(problem.key_length, device=key.device).view(
            -1, 1
        )
        v = v.masked_fill(unused[:, None, :, None], 0.0)
        v_lr = None if v_lr is None else v_lr.masked_fill(unused[:, :, None], 0.0)
    k_t = k.transpose(-1, -2)

    # Only causality: every query sees a key, and a block of queries sees no key past its last one.
    length = problem.key_length
    only_causal = (
        isinstance(length, int) and length >= S and attention_mask is None and sliding_window is None and sinks is None
    )
    out = query.new_empty(B, Hq, S, D)
    lse = query.new_empty(B, Hq, S, dtype=torch.float32) if return_lse else None
    step = max(1, _SCORE_BLOCK // max(1, B * Hq * T))
    if only_causal and is_causal:
        step = min(step, _CAUSAL_BLOCK)
    for start in range(0, S, step):
        stop = min(S, start + step)
        n = stop - start
        seen = T
        if only_causal:
            assert isinstance(length, int)
            seen = length - S + stop if is_causal else length
        # Query heads of one KV head side by side: (B, Hk, G * n, D), so that K and V are read once for all of them.
        q = (query[:, :, start:stop].to(acc) * scale).reshape(B, Hk, G * n, D)
        scores = (q @ k_t[..., :seen]).view(B, Hq, n, seen)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if only_causal:
            if is_causal and n > 1:
                later = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
                scores[..., seen - n :].masked_fill_(later, float("-inf"))
        else:
            allowed = _allowed(length, S, T, start, stop, is_causal, sliding_window, query.device)
            if attention_mask is not None and attention_mask.is_floating_point():
                scores = scores + attention_mask[:, :, start:stop].to(acc)
            elif attention_mask is not None:
                padding = attention_mask.dim() == 2
                visible = attention_mask.bool()
                visible = visible[:, None, None, :] if padding else visible[:, :, start:stop]
                allowed = visible if allowed is None else allowed & visible
            if allowed is not None:
                scores = scores.masked_fill(~allowed, float("-inf"))
        if only_causal:
            # The same numbers whether the log-sum-exp is asked for or not.
            p = scores.softmax(dim=-1)
            block_lse = None if lse is None else scores.logsumexp(dim=-1).float()
        else:
            p, block_lse = _softmax_and_lse(scores, sinks)
        if lse is not None and block_lse is not None:
            lse[:, :, start:stop] = block_lse
        o = p.view(B, Hk, G * n, seen) @ v[:, :, :seen]
        if v_up is not None:
            # (P a) B: r columns instead of an expanded V.
            pa = p.view(B, Hq * n, seen) @ v_lr[:, :seen]
            o = o + pa.view(B, Hk, G * n, -1) @ v_up
        out[:, :, start:stop] = o.view(B, Hq, n, D)
    return out if lse is None else (out, lse)


def _allowed(key_length, S, T, start, stop, is_causal, sliding_window, device) -> torch.Tensor | None:
    """(B or 1, 1, stop - start, T) bool of what causality, window and key length leave visible; None: everything."""
    full = isinstance(key_length, int) and key_length == T
    if full and sliding_window is None and (not is_causal or S == 1):
        return None
    length = torch.as_tensor(key_length, device=device).reshape(-1, 1, 1, 1)
    keys = torch.arange(T, device=device)
    last = length - S + torch.arange(start, stop, device=device)[:, None]  # position of each query
    allowed = keys < length
    if is_causal:
        allowed = allowed & (keys <= last)
    if sliding_window is not None:
        allowed = allowed & (keys > last - sliding_window)
    return allowed


def _softmax_and_lse(scores: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the last dimension with an optional sink logit; rows without any key give zeros and -inf."""
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        lse = torch.cat((scores, sink), dim=-1).logsumexp(dim=-1, keepdim=True)
    else:
        lse = scores.logsumexp(dim=-1, keepdim=True)
    p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0))
    return p, lse.squeeze(-1).float()
