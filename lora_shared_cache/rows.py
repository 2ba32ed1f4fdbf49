"""Low-rank entries and up-projections of a batch whose rows have adapters of their own (PEFT's ``adapter_names=``).

All tensors here are (B, ...): row by row, what one adapter alone would have, with zeros up to the largest rank. Whose entries
a row reads is the policy's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from . import adapters as peft_adapters
from .adapters import BASE_MODEL


@dataclass(frozen=True, eq=False)
class RowColumns:
    """Which columns of ``A x``, computed with the A's of all adapters below each other, are those of each row.

    Attributes:
        columns: (B, r) int64, into the columns of ``A x``, one of zeros and one of ones (the one that carries ``lora_bias``).
    """

    columns: torch.Tensor

    def __call__(self, a: torch.Tensor) -> torch.Tensor:
        """(B, n, sum of ranks) -> (B, n, r)."""
        a = torch.cat((a, a.new_zeros(*a.shape[:-1], 1), a.new_ones(*a.shape[:-1], 1)), dim=-1)
        return a.gather(-1, self.columns[:, None].expand(-1, a.shape[1], -1))


def row_columns(module: Any, rows: Sequence[str], names: Sequence[str]) -> tuple[torch.Tensor, RowColumns]:
    """The A's of ``names`` (each on this layer) below each other, and the columns of each row.

    Args:
        module: PEFT's ``k_proj`` or ``v_proj``.
        rows: the adapter of each row; rows of others than ``names`` get zeros.
        names: adapters.
    """
    downs = {name: peft_adapters.down_projection(module, [name]) for name in names}
    weight = torch.cat([down.weight.to(downs[names[0]].weight.dtype) for down in downs.values()])
    zero, one = weight.shape[0], weight.shape[0] + 1
    width, first = max(down.rank for down in downs.values()), 0
    of_name = {}
    for name, down in downs.items():
        r = down.weight.shape[0]
        own = [*range(first, first + r), *([one] if down.ones else [])]
        of_name[name] = own + [zero] * (width - len(own))
        first += r
    columns = [of_name.get(name, [zero] * width) for name in rows]
    return weight, RowColumns(torch.tensor(columns, device=weight.device))


def adapter_index(rows: Sequence[str], names: Sequence[str], device: torch.device) -> torch.Tensor:
    """(B,) int64: the place of each row's adapter in ``names``; -1 for none of them."""
    place = {name: index for index, name in enumerate(names)}
    return torch.tensor([place.get(name, -1) for name in rows], device=device)


def stack_up_projections(ups: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Up-projections (Hk, r_i, D) or None (nothing) as one tensor (n, Hk, r, D), with rows of zeros up to the largest rank."""
    present = next(up for up in ups if up is not None)
    rank = max(up.shape[1] for up in ups if up is not None)
    none = present.new_zeros(present.shape[0], rank, present.shape[2])
    return torch.stack([none if up is None else F.pad(up, (0, 0, 0, rank - up.shape[1])) for up in ups])


def up_of_rows(up: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(n, Hk, r, D) -> (B, Hk, r, D), zeros for rows without an adapter."""
    return up[index.clamp(min=0)] * (index >= 0).to(up.dtype)[:, None, None, None]


def join_rows(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], width: int, fill: float = 0.0) -> torch.Tensor:
    """One tensor of rows that come from several.

    Args:
        parts: pairs of (B, ..., r_i) and the rows (b,) int64 that are taken from it.
        width: r, at least every r_i.
        fill: what other rows and columns hold.

    Returns:
        (B, ..., r).
    """
    like = parts[0][0]
    joined = like.new_full((*like.shape[:-1], width), fill)
    for tensor, rows in parts:
        joined.index_copy_(0, rows, F.pad(tensor.index_select(0, rows), (0, width - tensor.shape[-1]), value=fill))
    return joined


def rows_with(rows: Sequence[str], names: Sequence[str], device: torch.device) -> torch.Tensor:
    """(b,) int64: the rows whose adapter is one of ``names``."""
    return torch.tensor([i for i, name in enumerate(rows) if name != BASE_MODEL and name in names], device=device)
