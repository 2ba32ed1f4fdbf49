"""Models that normalise their keys (Qwen3, Gemma3, OLMo2, StableLM, Llama4, ...): what the norm does, found by trying it.

With u the output of ``k_proj`` without adapters, Delta = B a the adapter's part, and a norm ``g * u / s(u)`` before the rotation
(s is the root mean square, or the standard deviation of a LayerNorm, whose g also takes the mean away), the adapter's key is

    RoPE(g * (u + Delta)) / s(u + Delta) = gain * K_base + delta_gain * RoPE((g * B) a)

with ``gain = s(u) / s(u + Delta)`` and ``delta_gain = 1 / s(u + Delta)``: two numbers per token and head, everything else
as without a norm (DESIGN 5). They are kept in float32; in bfloat16 they would cost 3 % of a key. A norm without weights after the
rotation (Llama4, nanochat) is the same with s of rotated keys; weights after a rotation do not commute with it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

# Names under which attention layers have the norm of their keys.
_NAMES = ("k_norm", "k_layernorm", "key_layernorm", "qk_norm")
_ROWS = 8
_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class KeyNorm:
    """A norm of keys: ``weight * u / sqrt(mean(u^2) + eps)``, of u less its mean if it is a LayerNorm.

    Attributes:
        weight: (Hk or 1, D).
        eps: added to the mean square.
        per_head: every head is normalised by itself, not all of them together.
        centred: the mean is taken away first.
        after_rotation: it is applied to rotated keys.
    """

    weight: torch.Tensor
    eps: float
    per_head: bool = True
    centred: bool = False
    after_rotation: bool = False

    @property
    def head_dim(self) -> int:
        """D."""
        return self.weight.shape[-1]

    def is_of_the_kind_of(self, other: KeyNorm) -> bool:
        """Whether only the weights may differ."""
        mine, others = (
            (norm.eps, norm.per_head, norm.centred, norm.after_rotation, norm.head_dim) for norm in (self, other)
        )
        return mine == others

    def rms(self, u: torch.Tensor) -> torch.Tensor:
        """s of keys (B, Hk, n, D), rotated ones for a norm after the rotation, in float32 (float64 for float64):
        (B, Hk or 1, n, 1)."""
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        if not self.per_head:
            u = u.transpose(1, 2).flatten(2).unsqueeze(1)
        if self.centred:
            u = u - u.mean(-1, keepdim=True)
        return (u.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def scaled(self, up: torch.Tensor) -> torch.Tensor:
        """The norm's linear part: (..., Hk, r, D) times the weight, for a LayerNorm less the mean."""
        if self.centred:
            up = up - up.mean((-1,) if self.per_head else (-3, -1), keepdim=True)
        return up * self.weight.to(up.dtype)[:, None]

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """The norm itself, of (B, Hk, n, D)."""
        return self.scaled(u) / self.rms(u).to(u.dtype)


def _norm_of(attention: Any) -> nn.Module | None:
    return next((m for m in (getattr(attention, name, None) for name in _NAMES) if isinstance(m, nn.Module)), None)


def has_key_norm(attention: Any) -> bool:
    """Whether an attention layer has a norm of any kind for its keys."""
    return _norm_of(attention) is not None


def find_key_norms(attention: Any, heads: int, head_dim: int, device: torch.device) -> list[KeyNorm]:
    """What the norm that an attention layer has for its keys may be, of the kinds that can be split; empty: none of them.

    Which of them it is, and whether it is before or after the rotation, only the layer as a whole shows.

    Args:
        attention: the attention module.
        heads, head_dim: Hk and D.
        device: where the layer runs.
    """
    norm = _norm_of(attention)
    if norm is None:
        return []
    sources = [norm, *norm.modules()]
    eps = next(
        (float(v) for m in sources for v in (getattr(m, n, None) for n in ("variance_epsilon", "eps")) if v), 0.0
    )
    dtype = next((p.dtype for p in norm.parameters()), torch.float32)
    if dtype not in (torch.float32, torch.float64):
        # As exactly as the numbers are computed that go with it; some norms take no other dtype than their own.
        dtype, norm = torch.float32, copy.deepcopy(norm).to(torch.float32)
    n = heads + _ROWS
    x = torch.randn(1, heads, n, head_dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    # Some far above eps, some of its size: both must be explained.
    x[:, :, n // 2 :] *= max(eps, 1e-12) ** 0.5
    found: list[KeyNorm] = []
    for arrangement in (_tokens_first, _heads_first, _all_heads):
        try:
            with torch.no_grad():
                out = arrangement(norm, x).double()
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue  # made for another shape
        if out.shape == x.shape:
            found += [
                norm for norm in _explanations(x.double(), out, eps, dtype) if not any(_equal(norm, f) for f in found)
            ]
    for norm_before in list(found):
        uniform = bool((norm_before.weight == norm_before.weight[0, 0]).all())
        if uniform and not norm_before.centred:
            found.append(replace(norm_before, after_rotation=True))
    return found


def _tokens_first(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return norm(x.transpose(1, 2)).transpose(1, 2)


def _heads_first(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return norm(x)


def _all_heads(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return norm(x.transpose(1, 2).flatten(2)).unflatten(-1, (x.shape[1], x.shape[3])).transpose(1, 2)


def _explanations(x: torch.Tensor, out: torch.Tensor, eps: float, dtype: torch.dtype) -> list[KeyNorm]:
    """Norms that make ``out`` of ``x``, both (1, Hk, n, D) float64; the weight is fitted to all tokens."""
    found = []
    for per_head in (True, False):
        for centred in (False, True):
            plain = KeyNorm(x.new_ones(1, x.shape[-1]), eps, per_head, centred)(x)
            weight = (plain * out).sum((0, 2)) / plain.square().sum((0, 2))  # (Hk, D)
            if bool(((plain * weight[:, None] - out).abs() <= _TOLERANCE * out.abs().max()).all()):
                if bool((weight - weight[:1]).abs().max() <= _TOLERANCE * weight.abs().max()):
                    weight = weight.mean(0, keepdim=True)
                if bool((weight - 1).abs().max() <= _TOLERANCE):
                    weight = torch.ones_like(weight)  # it has none
                found.append(KeyNorm(weight.to(dtype), eps, per_head, centred))
    return found


def _equal(one: KeyNorm, other: KeyNorm) -> bool:
    same = (one.per_head, one.centred, one.weight.shape) == (other.per_head, other.centred, other.weight.shape)
    return same and bool(torch.allclose(one.weight, other.weight, rtol=_TOLERANCE))
