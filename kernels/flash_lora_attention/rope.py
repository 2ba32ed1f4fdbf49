"""Rotary position embedding for the low-rank part of the keys, in plain PyTorch.

It rotates ``a_k @ key_up`` with the cos/sin that the *model* computed for each token, so YaRN, Llama-3 or dynamic scaling
and left padding need no knowledge here. It is not a source of positions: nothing in this package computes an angle.
"""

from __future__ import annotations

import torch


def half_width(cos: torch.Tensor, rotary_dim: int, interleaved: bool) -> torch.Tensor:
    """One angle per rotated pair.

    Args:
        cos: (..., rotary_dim) or (..., rotary_dim / 2). At full width each angle stands twice: at ``i`` and
            ``i + rotary_dim / 2`` for half rotation, at ``2 i`` and ``2 i + 1`` for interleaved rotation.
        rotary_dim: the number of leading columns of a head that are rotated.
        interleaved: pairs are ``(2 i, 2 i + 1)`` instead of ``(i, i + rotary_dim / 2)``.

    Returns:
        (..., rotary_dim / 2), a view.
    """
    width = cos.shape[-1]
    if width == rotary_dim // 2:
        return cos
    if width != rotary_dim:
        raise ValueError(
            f"cos/sin have {width} columns, expected rotary_dim={rotary_dim} or rotary_dim/2={rotary_dim // 2}"
        )
    return cos[..., ::2] if interleaved else cos[..., : rotary_dim // 2]


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotate the leading ``2 * cos.shape[-1]`` columns of ``x``; the remaining columns pass (partial rotary).

    Args:
        x: (B, H, T, D).
        cos, sin: (B or 1, T, rotary_dim / 2), one angle per pair.
        interleaved: pairs are ``(2 i, 2 i + 1)`` (GPT-J style) instead of ``(i, i + rotary_dim / 2)`` (NeoX style).

    Returns:
        (B, H, T, D) in the promoted dtype of ``x`` and ``cos``. Source: RoFormer (arXiv 2104.09864), equation 34.
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return out if 2 * half == x.shape[-1] else torch.cat((out, x[..., 2 * half :]), dim=-1)
