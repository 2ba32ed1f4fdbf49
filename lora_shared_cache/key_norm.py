"""Models that normalise their keys (Qwen3, Gemma3, OLMo2, StableLM, Llama4, ...): what the norm does, found by trying it.

With u the output of ``k_proj`` without adapters, Delta = B a the adapter's part, and a norm ``g * u / s(u)`` before the rotation
(s is the root mean square, or the standard deviation of a LayerNorm, whose g also takes the mean away), the adapter's key is

    RoPE(g * (u + Delta)) / s(u + Delta) = gain * K_base + delta_gain * RoPE((g * B) a)

with ``gain = s(u) / s(u + Delta)`` and ``delta_gain = 1 / s(u + Delta)``: two numbers per token and head, everything else
as without a norm (DESIGN 5). They are kept in float32; in bfloat16 they would cost 3 % of a key.

A bias b of the norm (Persimmon, Phi) adds ``(1 - gain) RoPE(b)``, which is ``delta_gain * RoPE(shift * b)`` with
``shift = s(u + Delta) - s(u)``: one more low-rank entry per head (one in all where all heads are normalised together), whose
row of the up-projection is b.

A norm after the rotation (Llama4, nanochat, Hunyuan) is the same with s of rotated keys. Its weights don't commute with the
rotation and are applied to the rotated low-rank part: ``gain * K_base + delta_gain * g * RoPE(B a)``.
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
    """A norm of keys: ``weight * u / sqrt(mean(u^2) + eps) + bias``, of u less its mean if it is a LayerNorm.

    Attributes:
        weight: (Hk or 1, D).
        eps: added to the mean square.
        per_head: every head is normalised by itself, not all of them together.
        centred: the mean is taken away first.
        after_rotation: it is applied to rotated keys.
        bias: (Hk or 1, D), or None: it has none. Only of a norm before the rotation.
        rotated_weight: (Hk, D), weights that rotated keys are multiplied with, of a norm after the rotation; ``weight`` is
            ones then. None: ``weight`` is all there is, and commutes with the rotation.
    """

    weight: torch.Tensor
    eps: float
    per_head: bool = True
    centred: bool = False
    after_rotation: bool = False
    bias: torch.Tensor | None = None
    rotated_weight: torch.Tensor | None = None

    @property
    def head_dim(self) -> int:
        """D."""
        return self.weight.shape[-1]

    def is_of_the_kind_of(self, other: KeyNorm) -> bool:
        """Whether only the weights may differ."""
        mine, others = (
            (
                *(norm.eps, norm.per_head, norm.centred, norm.after_rotation, norm.head_dim),
                *(norm.bias is None, norm.rotated_weight is None),
            )
            for norm in (self, other)
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

    def with_bias(self, up: torch.Tensor) -> torch.Tensor:
        """Up-projections (..., Hk, r, D), and as further rows what the shifts are multiplied with: (..., Hk, r + shifts, D)."""
        if self.bias is None:
            return up
        heads = up.shape[-3]
        rows = self.bias.to(up.dtype).expand(heads, -1)[:, None]
        if self.per_head:
            # Each head reads the shift of its own.
            rows = torch.eye(heads, dtype=up.dtype, device=up.device)[..., None] * rows
        return torch.cat((up, rows.expand(*up.shape[:-3], -1, -1, -1)), dim=-2)

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """The norm itself, of (B, Hk, n, D); rotated keys for a norm after the rotation."""
        out = self.scaled(u) / self.rms(u).to(u.dtype)
        if self.rotated_weight is not None:
            out = out * self.rotated_weight.to(u.dtype)[:, None]
        return out if self.bias is None else out + self.bias.to(u.dtype)[:, None]


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
        weight = norm_before.weight
        if norm_before.centred or norm_before.bias is not None:
            continue  # neither commutes with a rotation
        if bool((weight == weight[0, 0]).all()):
            found.append(replace(norm_before, after_rotation=True))
        else:
            of_heads = weight.expand(heads, -1).contiguous()
            ones = torch.ones_like(weight)
            found.append(replace(norm_before, after_rotation=True, weight=ones, rotated_weight=of_heads))
    return found


def _tokens_first(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return norm(x.transpose(1, 2)).transpose(1, 2)


def _heads_first(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return norm(x)


def _all_heads(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return norm(x.transpose(1, 2).flatten(2)).unflatten(-1, (x.shape[1], x.shape[3])).transpose(1, 2)


def _explanations(x: torch.Tensor, out: torch.Tensor, eps: float, dtype: torch.dtype) -> list[KeyNorm]:
    """Norms that make ``out`` of ``x``, both (1, Hk, n, D) float64; weight and bias are fitted to all tokens."""
    found = []
    for per_head in (True, False):
        for centred in (False, True):
            plain = KeyNorm(x.new_ones(1, x.shape[-1]), eps, per_head, centred)(x)
            plain_mean, out_mean = (t.mean((0, 2)) for t in (plain, out))  # (Hk, D)
            deviation = plain - plain_mean[:, None]
            weight = (deviation * out).sum((0, 2)) / deviation.square().sum((0, 2))
            bias = out_mean - weight * plain_mean
            if bool(((weight[:, None] * plain + bias[:, None] - out).abs() <= _TOLERANCE * out.abs().max()).all()):
                largest = weight.abs().max()
                has_bias = bool(bias.abs().max() > 0.1 * _TOLERANCE * largest)
                weight, bias = (_common(t, _TOLERANCE * largest) for t in (weight, bias))
                if bool((weight - 1).abs().max() <= _TOLERANCE):
                    weight = torch.ones_like(weight)  # it has none
                found.append(
                    KeyNorm(weight.to(dtype), eps, per_head, centred, bias=bias.to(dtype) if has_bias else None)
                )
    return found


def _common(numbers: torch.Tensor, tolerance: torch.Tensor) -> torch.Tensor:
    """(Hk, D) as one row (1, D) where all heads have the same."""
    same = bool((numbers - numbers[:1]).abs().max() <= tolerance)
    return numbers.mean(0, keepdim=True) if same else numbers


def _equal(one: KeyNorm, other: KeyNorm) -> bool:
    same = (one.per_head, one.centred, one.weight.shape) == (other.per_head, other.centred, other.weight.shape)
    if not same or not torch.allclose(one.weight, other.weight, rtol=_TOLERANCE):
        return False
    if one.bias is None or other.bias is None:
        return one.bias is other.bias
    return one.bias.shape == other.bias.shape and torch.allclose(one.bias, other.bias, rtol=_TOLERANCE, atol=_TOLERANCE)
