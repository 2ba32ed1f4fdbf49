"""Attention on a CPU over keys that are expanded already, where ``flash_lora_attention_reference`` would do the same more slowly.

A block of S tokens reads each value S times, so expanding it once costs little (r multiplications for each of its numbers, beside
S), and PyTorch's fused attention does the rest. A single token multiplies its probabilities with the low-rank entries, as the
reference does, in a handful of operations: what the reference asks and covers besides takes as long as these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# From so many tokens on it is at least as fast as with scores in memory, at any length of text.
MIN_TOKENS = 16
# Queries that share one mask: keys behind the last of them are left out, so that causality saves half of a prompt.
_BLOCK = 256


def step_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    value_low_rank: torch.Tensor | None,
    value_up: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """``softmax(scale * query key^T) (value + value_low_rank value_up)`` of one token per row that sees all keys.

    Args:
        query: (B, Hq, 1, D), on the CPU.
        key: (B, Hk, T, D), with the low-rank part.
        value: (B, Hk, T, D), the base part.
        value_low_rank, value_up: (B, T, r) and (Hk, r, D) or (B, Hk, r, D), or None twice. All in float32, or in float64.
        scale: of the scores; None: ``D ** -0.5``.

    Returns:
        (B, Hq, 1, D).
    """
    B, Hq, _, D = query.shape
    Hk, T = key.shape[1:3]
    with torch.autocast(query.device.type, enabled=False):
        scores = query.reshape(B, Hk, Hq // Hk, D) @ key.transpose(-1, -2)
        p = scores.mul_(D**-0.5 if scale is None else scale).softmax(dim=-1)
        out = p @ value
        if value_low_rank is not None and value_up is not None:
            out += (p.view(B, Hq, T) @ value_low_rank).view(B, Hk, Hq // Hk, -1) @ value_up
    return out.view(B, Hq, 1, D)


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    value_low_rank: torch.Tensor | None,
    value_up: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    scale: float | None,
    is_causal: bool,
) -> torch.Tensor:
    """``softmax(scale * query key^T + mask) (value + value_low_rank value_up)``, causality aligned to the lower right.

    Args:
        query: (B, Hq, S, D), on the CPU.
        key: (B, Hk, T, D), with the low-rank part.
        value: (B, Hk, T, D), the base part.
        value_low_rank, value_up: (B, T, r) and (Hk, r, D) or (B, Hk, r, D), or None twice.
        attention_mask: bool or additive, (B or 1, 1, S, T), or None.
        scale: of the scores; None: ``D ** -0.5``.
        is_causal: query i sees keys up to ``T - S + i``.

    Returns:
        (B, Hq, S, D) in the dtype of ``query``. A query that sees no key gives 0.
    """
    S, T = query.shape[2], key.shape[2]
    with torch.autocast(query.device.type, enabled=False):
        if value_low_rank is not None and value_up is not None:
            value = (value_low_rank[:, None].to(value_up.dtype) @ value_up + value).to(query.dtype)
        key, value = key.to(query.dtype), value.to(query.dtype)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(query.dtype)
        if not is_causal:
            return F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scale, enable_gqa=True)
        out = torch.empty_like(query)
        for start in range(0, S, _BLOCK):
            stop = min(S, start + _BLOCK)
            seen = T - S + stop
            mask = torch.ones(stop - start, seen, dtype=torch.bool).tril(T - S + start)
            if attention_mask is not None:
                part = attention_mask[:, :, start:stop, :seen]
                mask = part & mask if part.dtype == torch.bool else part.masked_fill(~mask, float("-inf"))
            out[:, :, start:stop] = F.scaled_dot_product_attention(
                query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], mask, scale=scale, enable_gqa=True
            )
        return out
