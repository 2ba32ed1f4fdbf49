"""Merge of attention over disjoint sets of keys, from each part's output and log-sum-exp.

It is the second stage of split-KV attention, and the primitive for shared prefixes: attend to a trunk and to a row's own
suffix separately, then merge. It is exact, associative and commutative up to rounding (Ye et al., Cascade Inference, 2024).
"""

from __future__ import annotations

import importlib.util

import torch


def merge_states_reference(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``merge_states`` in plain PyTorch, for any device."""
    acc = torch.float64 if out.dtype == torch.float64 else torch.float32
    total = lse.to(acc).logsumexp(dim=0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(acc).view(-1, 1).expand(total.shape))
    weight = torch.exp(lse.to(acc) - total.masked_fill(total == float("-inf"), 0.0))
    # A part that saw no key may hold anything: its weight is 0, and 0 * NaN would be NaN.
    parts = out.to(acc).masked_fill((weight == 0).unsqueeze(-1), 0.0)
    return (parts * weight.unsqueeze(-1)).sum(dim=0).to(out.dtype), total.float()


def merge_states(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over n disjoint sets of keys into attention over their union.

    ``lse = log(sum_i exp(lse_i)); out = sum_i exp(lse_i - lse) out_i``

    Args:
        out: (n, B, Hq, S, D), the normalised output over each set.
        lse: (n, B, Hq, S) float32, its log-sum-exp (natural logarithm). A set that a query does not see has -inf there, and
            its output is not read.
        sinks: (Hq,) one extra logit per head; the parts must have been computed without it.

    Returns:
        out (B, Hq, S, D) in the dtype of ``out``, lse (B, Hq, S) float32.

    Raises:
        ValueError: shapes or devices that do not fit.
    """
    if out.dim() != 5 or tuple(lse.shape) != tuple(out.shape[:-1]) or out.shape[0] == 0:
        raise ValueError(
            f"merge_states: out is {tuple(out.shape)} and lse {tuple(lse.shape)}, expected (n, B, Hq, S, D) and (n, B, Hq, S)"
        )
    if lse.device != out.device or (sinks is not None and sinks.device != out.device):
        raise ValueError(f"merge_states: out is on {out.device}, lse on {lse.device}; expected one device for all")
    if sinks is not None and tuple(sinks.shape) != (out.shape[2],):
        raise ValueError(f"merge_states: sinks are {tuple(sinks.shape)}, expected ({out.shape[2]},)")
    if not out.is_cuda or out.dtype == torch.float64 or importlib.util.find_spec("triton") is None:
        return merge_states_reference(out, lse, sinks)
    from .merge_kernel import merge_partials

    sinks = None if sinks is None else sinks.contiguous()
    return merge_partials(out.contiguous(), lse.float().contiguous(), out.dtype, sinks)
