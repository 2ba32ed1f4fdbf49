"""Models that normalise their keys (Qwen3, Gemma3, OLMo2, ...): what the norm does, found by trying it.

With u the output of ``k_proj`` without adapters, Delta = B a the adapter's part, and a norm ``g * u / rms(u)`` before
the rotation, the adapter's key is

    RoPE(g * (u + Delta)) / rms(u + Delta) = gain * K_base + delta_gain * RoPE((g * B) a)

with ``gain = rms(u) / rms(u + Delta)`` and ``delta_gain = 1 / rms(u + Delta)``: two numbers per token and head, everything else
as without a norm (DESIGN 5). They are kept in float32; in bfloat16 they would cost 3 % of a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Names under which attention layers have the norm of their keys.
_NAMES = ("k_norm", "k_layernorm", "key_layernorm")
_ROWS = 4


@dataclass(frozen=True, eq=False)
class KeyNorm:
    """An RMS norm of keys: ``weight * u / sqrt(mean(u^2) + eps)``.

    Attributes:
        weight: (D,), or (Hk * D,) where all heads are normalised together.
        eps: added to the mean square.
        head_dim: D.
    """

    weight: torch.Tensor
    eps: float
    head_dim: int

    @property
    def per_head(self) -> bool:
        """Whether every head is normalised by itself."""
        return self.weight.numel() == self.head_dim

    def rms(self, u: torch.Tensor) -> torch.Tensor:
        """Root mean square of keys (B, n, Hk * D) in float32 (float64 for float64): (B, Hk or 1, n, 1)."""
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        heads = u.unflatten(-1, (-1, self.head_dim)) if self.per_head else u.unsqueeze(-2)
        return (heads.square().mean(-1) + self.eps).sqrt().transpose(1, 2).unsqueeze(-1)

    def scaled(self, up: torch.Tensor) -> torch.Tensor:
        """Up-projections (Hk, r, D) times the norm's weight."""
        weight = self.weight.to(up.dtype)
        return up * (weight if self.per_head else weight.view(-1, 1, self.head_dim))

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """The norm itself, of (B, n, Hk * D), split into heads: (B, Hk, n, D)."""
        heads = u.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        weight = self.weight.to(u.dtype)
        weight = weight if self.per_head else weight.view(-1, 1, self.head_dim)
        return heads * weight / self.rms(u).to(u.dtype)


def _norm_of(attention: Any) -> nn.Module | None:
    return next((m for m in (getattr(attention, name, None) for name in _NAMES) if isinstance(m, nn.Module)), None)


def has_key_norm(attention: Any) -> bool:
    """Whether an attention layer has a norm of any kind for its keys."""
    return _norm_of(attention) is not None


def find_key_norm(attention: Any, width: int, head_dim: int, device: torch.device) -> KeyNorm | None:
    """The RMS norm that an attention layer has for its keys, or None if it has none or one of another kind.

    Args:
        attention: the attention module.
        width: Hk * D.
        head_dim: D.
        device: where the layer runs.
    """
    norm = _norm_of(attention)
    if norm is None:
        return None
    eps = next((float(v) for v in (getattr(norm, n, None) for n in ("variance_epsilon", "eps")) if v is not None), 0.0)
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in norm.parameters()), torch.float32)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for size in (head_dim, width):
        try:
            with torch.no_grad():
                # Ones have a mean square of one.
                weight = norm(torch.ones(1, 1, 1, size, dtype=dtype, device=device)).reshape(-1) * (1 + eps) ** 0.5
                found = KeyNorm(weight.to(dtype), eps, head_dim)
                # Some far above eps, some of its size: both must be explained.
                x = torch.randn(1, _ROWS, 1, size, generator=generator).to(device, dtype)
                x[:, _ROWS // 2 :] *= max(eps, 1e-12) ** 0.5
                expected = x * weight / (x.square().mean(-1, keepdim=True) + eps).sqrt()
                actual = norm(x).to(dtype)
        except (RuntimeError, ValueError, TypeError):
            continue  # made for another width
        if actual.shape == x.shape and torch.allclose(actual, expected, rtol=1e-4, atol=1e-5):
            return found
    return None
