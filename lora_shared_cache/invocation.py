"""Activated LoRA (PEFT's ``alora_invocation_tokens``): from which token on an adapter is active in each row.

PEFT looks for the last invocation in the ids that it is given, and counts from their end. It sees the prompt of ``generate``, or
the tokens of one call, but not what is cached. Here the whole trajectory is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import TrajectoryError

Starts = tuple[int | None, ...]
"""For each row the first token of the invocation, as a position in the trajectory; None: the adapter is not active in it."""


def invocation_starts(ids: torch.Tensor, tokens: Sequence[int], offsets: Sequence[int | None]) -> Starts:
    """Where each row's invocation starts.

    Args:
        ids: (B, T) the trajectory up to the last token of the call.
        tokens: of the invocation.
        offsets: what PEFT found, counted from the end; where it found nothing, the whole trajectory is looked through.

    Raises:
        TrajectoryError: an offset does not point to the invocation.
    """
    total, n = ids.shape[1], len(tokens)
    if len(offsets) != ids.shape[0]:
        # PEFT does not repeat them for num_return_sequences.
        offsets = [None] * ids.shape[0]
    found: list[int | None] = [None] * ids.shape[0]
    if None in offsets and total >= n:
        same = (ids.unfold(1, n, 1) == torch.tensor(list(tokens), device=ids.device)).all(dim=-1)
        for row, places in enumerate(same.tolist()):
            found[row] = max((place for place, here in enumerate(places) if here), default=None)
    for row, offset in enumerate(offsets):
        if offset is not None:
            found[row] = start = total - int(offset)
            if start < 0 or ids[row, start : start + n].tolist() != list(tokens):
                raise TrajectoryError(
                    f"alora_offsets has {offset} for row {row}, but {offset} tokens before the end of the {total} there is no "
                    f"invocation {list(tokens)}. Call attach(model) before generate, and leave alora_offsets to PEFT"
                )
    return tuple(found)


def first_of(starts: Starts, default: int) -> int:
    """The first token at which the adapter is active in some row, at most ``default``."""
    return min([default, *(start for start in starts if start is not None)])


def active(starts: Starts, first: int, stop: int, device: torch.device) -> torch.Tensor:
    """(B, stop - first, 1) bool: whether the adapter is active at tokens ``first ... stop``."""
    of_row = torch.tensor([stop if start is None else start for start in starts], device=device)
    return (torch.arange(first, stop, device=device) >= of_row[:, None]).unsqueeze(-1)
