"""Storage along the token axis that grows without copying everything at every token.

A buffer does not know how many of its tokens are valid; the cache does. Writing past the committed length is therefore
free to fail half-way: what was not committed is not there.
"""

from __future__ import annotations

import torch

# Tokens of unused capacity that growing may leave: large enough that copies are rare, small against a trajectory.
MAX_SLACK = 2048
MIN_SLACK = 64

_allocations = 0


def allocations() -> int:
    """How often any buffer's storage was replaced: while it stays the same, so do the addresses of all buffers."""
    return _allocations


class NotReserved(Exception):
    """A token was to be written by address where there is no room for it."""


class TokenBuffer:
    """A tensor with a growing token axis.

    Args:
        token_dim: the token axis, negative (``-2`` for (B, H, T, D) and (B, T, r), ``-1`` for (B, T)).
        max_tokens: allocate this capacity at once and never more; None: grow as needed.
        broadcast_rows: a single batch row may stand for all rows of the batch.
    """

    def __init__(self, token_dim: int, max_tokens: int | None = None, broadcast_rows: bool = False):
        self.token_dim = token_dim
        self.max_tokens = max_tokens
        self.broadcast_rows = broadcast_rows
        self.data: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return 0 if self.data is None else self.data.shape[self.token_dim]

    @property
    def device(self) -> torch.device | None:
        """Where the storage is; None before the first write."""
        return None if self.data is None else self.data.device

    def put(self, index: torch.Tensor, new: torch.Tensor) -> None:
        """Write one token (B, ..., 1, ...) at ``index``, () int64 on the buffer's device: the host learns nothing of where.

        The capacity must suffice; see :meth:`reserve`.
        """
        if self.data is None or new.shape[0] > self.data.shape[0]:
            raise NotReserved
        rows = [self.data.shape[0], *new.shape[1:]]
        self.data.index_copy_(self.data.dim() + self.token_dim, index.view(1), new.to(self.data.dtype).expand(rows))

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens``, keeping what is there."""
        if self.data is not None and tokens > self.capacity:
            self._grow(self.capacity, tokens, self.data)

    def write(self, start: int, new: torch.Tensor) -> None:
        """Write ``new`` at tokens ``start ...``, keeping the ``start`` tokens before; grows when needed."""
        n = new.shape[self.token_dim]
        stop = start + n
        if start == 0 and self.data is not None and not self._fits(new):
            # Nothing before it is valid: what is there came from a pass that failed, or was cropped away.
            self._replace(None)
        if self.data is None or stop > self.capacity or new.shape[0] > self.data.shape[0]:
            self._grow(start, stop, new)
        assert self.data is not None
        self.data.narrow(self.token_dim, start, n).copy_(new.detach())

    def view(self, length: int, start: int = 0) -> torch.Tensor:
        """Tokens ``start`` to ``length``, a view."""
        if self.data is None:
            raise RuntimeError("nothing was written to this buffer")
        return self.data.narrow(self.token_dim, start, length - start)

    def nbytes(self, length: int | None = None) -> int:
        """Bytes of the first ``length`` tokens; None: of the whole allocation."""
        if self.data is None:
            return 0
        tokens = self.capacity if length is None else min(length, self.capacity)
        return self.data.numel() // max(1, self.capacity) * tokens * self.data.element_size()

    @torch.inference_mode(False)
    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the batch rows ``rows``, in that order."""
        if self.data is not None and not self._one_row_for_all:
            selected = self.data.index_select(0, rows.to(self.data.device))
            if self.data.is_cuda and selected.shape == self.data.shape:
                # In place: beam search does this at every step, and captured decode steps know the address.
                self.data.copy_(selected)
            else:
                self._replace(selected)

    @torch.inference_mode(False)
    def repeat_rows(self, repeats: int) -> None:
        """Each batch row ``repeats`` times in a row."""
        if self.data is not None and not self._one_row_for_all:
            self._replace(self.data.repeat_interleave(repeats, dim=0))

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> None:
        """Move the storage."""
        if self.data is not None:
            self._replace(self.data.to(device, non_blocking=True))

    @torch.inference_mode(False)
    def clone(self) -> TokenBuffer:
        """An independent copy."""
        copy = TokenBuffer(self.token_dim, self.max_tokens, self.broadcast_rows)
        copy.data = None if self.data is None else self.data.clone()
        return copy

    def _fits(self, new: torch.Tensor) -> bool:
        assert self.data is not None
        same = (self.data.dtype, self.data.device) == (new.dtype, new.device)
        others = [size for dim, size in enumerate(self.data.shape) if dim != self.data.dim() + self.token_dim]
        return same and others == [size for dim, size in enumerate(new.shape) if dim != new.dim() + self.token_dim]

    @property
    def _one_row_for_all(self) -> bool:
        return self.broadcast_rows and self.data is not None and self.data.shape[0] == 1

    def _grow(self, valid: int, needed: int, like: torch.Tensor) -> None:
        if self.max_tokens is not None:
            capacity = self.max_tokens
        elif needed <= self.capacity:
            capacity = self.capacity
        else:
            capacity = needed + max(MIN_SLACK, min(needed // 2, MAX_SLACK))
        shape = list(like.shape)
        shape[self.token_dim] = capacity
        if self.data is not None:
            shape[0] = max(shape[0], self.data.shape[0])
        # A normal tensor even under torch.inference_mode(), so that a later turn without it can write.
        with torch.inference_mode(False):
            data = torch.empty(shape, dtype=like.dtype if self.data is None else self.data.dtype, device=like.device)
        if self.data is not None and valid:
            data.narrow(self.token_dim, 0, valid).copy_(self.view(valid))
        self._replace(data)

    def _replace(self, data: torch.Tensor | None) -> None:
        global _allocations
        _allocations += 1
        self.data = data
