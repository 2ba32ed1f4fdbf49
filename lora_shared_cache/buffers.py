"""Storage along the token axis that grows without copying everything at every token.

A buffer does not know how many of its tokens are valid; the cache does. Writing past the committed length is therefore
free to fail half-way: what was not committed is not there.
"""

from __future__ import annotations

from typing import Any

import torch

# Tokens of unused capacity that growing leaves: a 32nd of what is needed, so that slack stays within 5 % of a long trajectory.
# Copying all tokens every 64 tokens, or every 32nd, is a few percent of what attention reads meanwhile.
SLACK_PART = 32
MAX_SLACK = 2048
MIN_SLACK = 64
# On CUDA each growth means another capture of a decode step besides.
MIN_SLACK_ON_CUDA = 256
# Tokens that a sliding layer keeps besides its window, and as much room again: one copy serves that many decode steps. At
# least this many, and an eighth of the window.
MIN_MARGIN = 64

_allocations = 0


def allocations() -> int:
    """How often any buffer's storage was replaced or given up: while it stays the same, so do the addresses of all buffers."""
    return _allocations


def note_release() -> None:
    """Buffers are given up, with their storage."""
    global _allocations
    _allocations += 1


def with_slack(needed: int, at_least: int = MIN_SLACK) -> int:
    """The capacity that growing storage takes for ``needed`` tokens."""
    return needed + max(at_least, min(needed // SLACK_PART, MAX_SLACK))


def window_and_margin(window: int) -> int:
    """Tokens that stay of a layer that reads a window of them."""
    return window + max(MIN_MARGIN, window // 8)


class NotReserved(Exception):
    """A token was to be written by address where there is no room for it."""


class TokenBuffer:
    """A tensor with a growing token axis.

    Args:
        token_dim: the token axis, negative (``-2`` for (B, H, T, D) and (B, T, r), ``-1`` for (B, T)).
        max_tokens: allocate this capacity at once and never more; None: grow as needed.
        broadcast_rows: a single batch row may stand for all rows of the batch.

    Attributes:
        start: position in the trajectory of the first token that is held.
    """

    start = 0

    def __init__(self, token_dim: int, max_tokens: int | None = None, broadcast_rows: bool = False):
        self.token_dim = token_dim
        self.max_tokens = max_tokens
        self.broadcast_rows = broadcast_rows
        self._after: tuple[slice, ...] = (slice(None),) * (-1 - token_dim)
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
        """Write tokens (B, ..., n, ...) at ``index`` and behind, () int64 on the buffer's device: the host does not learn where.

        The capacity must suffice; see :meth:`reserve`.
        """
        if self.data is None or new.shape[0] > self.data.shape[0]:
            raise NotReserved
        rows = [self.data.shape[0], *new.shape[1:]]
        n = new.shape[self.token_dim]
        places = index.view(1) if n == 1 else index + torch.arange(n, device=index.device)
        self.data.index_copy_(self.data.dim() + self.token_dim, places, new.to(self.data.dtype).expand(rows))

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens``, keeping what is there."""
        if self.data is not None and tokens > self.capacity:
            self._grow(self.capacity, tokens, self.data)

    def write(self, start: int, new: torch.Tensor) -> None:
        """Write ``new`` at tokens ``start ...``, keeping the ``start`` tokens before; grows when needed."""
        stop = start + new.size(self.token_dim)
        if start == 0 and self.data is not None and not self._fits(new):
            # Nothing before it is valid: what is there came from a pass that failed, or was cropped away.
            self._replace(None)
        data = self.data
        if data is None or stop > data.size(self.token_dim) or new.size(0) > data.size(0):
            data = self._grow(start, stop, new)
        # Not `narrow` and `copy_`: every entry of every layer is written here, and a view costs the host as much as a copy.
        place: tuple[Any, ...] = (..., slice(start, stop), *self._after)
        data[place] = new.detach() if new.requires_grad else new

    def append(self, position: int, new: torch.Tensor, keep_from: int, mark: int) -> bool:
        """:meth:`write`, of a layer with a sliding window; see :meth:`WindowBuffer.append`."""
        self.write(position, new)
        return False

    def commit(self) -> None:
        """Nothing to do: all that was written stays."""

    def view(self, length: int, start: int = 0) -> torch.Tensor:
        """Tokens ``start`` to ``length``, a view."""
        if self.data is None:
            raise RuntimeError("nothing was written to this buffer")
        return self.data.narrow(self.token_dim, start, length - start)

    def slots(self, capacity: int) -> torch.Tensor:
        """The first ``capacity`` places, whatever is in them, a view."""
        if self.data is None:
            raise NotReserved
        return self.data.narrow(self.token_dim, 0, capacity)

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

    def _grow(self, valid: int, needed: int, like: torch.Tensor) -> torch.Tensor:
        data = self._empty(like, self._capacity_for(needed, like.device))
        if self.data is not None and valid:
            data.narrow(self.token_dim, 0, valid).copy_(self.data.narrow(self.token_dim, 0, valid))
        self._replace(data)
        return data

    def _capacity_for(self, needed: int, device: torch.device) -> int:
        if self.max_tokens is not None:
            return self.max_tokens
        if needed <= self.capacity:
            return self.capacity
        return with_slack(needed, MIN_SLACK_ON_CUDA if device.type == "cuda" else MIN_SLACK)

    def _empty(self, like: torch.Tensor, capacity: int) -> torch.Tensor:
        shape = list(like.shape)
        shape[self.token_dim] = capacity
        if self.data is not None:
            shape[0] = max(shape[0], self.data.shape[0])
        # A normal tensor even under torch.inference_mode(), so that a later turn without it can write.
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=like.dtype if self.data is None else self.data.dtype, device=like.device)

    def _replace(self, data: torch.Tensor | None) -> None:
        global _allocations
        _allocations += 1
        self.data = data


class WindowBuffer(TokenBuffer):
    """The last tokens of a layer that reads no more than a window of them.

    Positions are those of the trajectory. Tokens before :attr:`start` are gone; at least :attr:`keep` of the last ones stay. What
    a pass leaves out is only let go of when it is committed (:meth:`commit`, :meth:`trim`).

    Args:
        token_dim, max_tokens: as for :class:`TokenBuffer`.
        window: tokens that are read besides the new one, and one more, so that the last one can be run again.

    Attributes:
        kept: of the window before a certain position, the mark, what is no longer among the last tokens: (mark, tokens).
    """

    def __init__(self, token_dim: int, window: int, max_tokens: int | None = None):
        super().__init__(token_dim, max_tokens)
        self.window = window
        self.start = 0
        self.kept: tuple[int, torch.Tensor] | None = None
        self._staged: tuple[int, torch.Tensor, tuple[int, torch.Tensor] | None] | None = None

    @property
    def keep(self) -> int:
        """Tokens that stay."""
        return window_and_margin(self.window)

    @property
    def room(self) -> int:
        """Tokens at which those before the last :attr:`keep` are let go of."""
        return 2 * self.keep - self.window

    @property
    def staged_start(self) -> int | None:
        """Where the buffer will begin when it is committed; None: nothing is to be committed."""
        return None if self._staged is None else self._staged[0]

    def keeps(self, position: int) -> bool:
        """Whether the window before ``position`` is kept apart from the last tokens."""
        return self.kept is not None and self.kept[0] == position

    def covers(self, position: int) -> bool:
        """Whether the window before ``position`` is among the last tokens."""
        return self.data is not None and self.start <= max(0, position - self.window)

    def view(self, length: int, start: int = 0) -> torch.Tensor:
        """Tokens ``start`` to ``length`` of the trajectory, a view."""
        if start < self.start:
            raise RuntimeError(f"token {start} was let go of; this buffer begins at {self.start}")
        return super().view(length - self.start, start - self.start)

    def append(self, position: int, new: torch.Tensor, keep_from: int, mark: int) -> bool:
        """Write tokens ``position ...``, which follow all that is valid; what is valid stays until :meth:`commit`.

        Args:
            position: of the first new token.
            new: the tokens.
            keep_from: tokens before this one need not be stored where there is no room.
            mark: the window before this position is to be kept besides.

        Returns:
            Whether :meth:`commit` has something to do.
        """
        self._staged = None
        if self.data is None or position < self.start:
            # Whatever is there is valid for nobody.
            self.start, self.kept = position, None
        stop = position + new.shape[self.token_dim]
        if stop - self.start <= max(self.room, self.capacity):
            self.write(position - self.start, new)
            return False
        first = min(max(keep_from, self.start), stop)
        kept = self._window_before(mark, first, position, new)
        data = self._empty(new, self._capacity_for(stop - first, new.device))
        data.narrow(self.token_dim, 0, stop - first).copy_(self._tokens(first, stop, position, new))
        self._staged = (first, data, kept)
        return True

    def restart(self, position: int) -> None:
        """Forget everything; the next token is that at ``position``."""
        self.start, self.kept, self._staged = position, None, None
        self._replace(None)

    def commit(self) -> None:
        """Let go of what the last :meth:`append` left out."""
        if self._staged is not None:
            self.start, data, self.kept = self._staged
            self._staged = None
            self._replace(data)

    def discard(self) -> None:
        """Give back what an :meth:`append` has left that was not committed."""
        self._staged = None

    def trim(self, length: int, mark: int, first: int | None = None) -> None:
        """Let go of tokens before the last :attr:`keep` of ``length`` (or before ``first``), in place where that is possible."""
        first = max(self.start, length - self.keep if first is None else first)
        if self.data is None or first == self.start:
            return
        self.kept = self._window_before(mark, first, length, None)
        tokens = self.view(length, first).clone()
        if self.capacity > self.room:
            self._replace(self._empty(self.data, min(self.room, self.capacity)))
        assert self.data is not None
        self.data.narrow(self.token_dim, 0, length - first).copy_(tokens)
        self.start = first

    def go_back(self, position: int) -> None:
        """Make the window before ``position``, which was kept, the last tokens, if it is not among them."""
        if self.kept is not None and self.kept[0] == position and not self.covers(position):
            tokens = self.kept[1]
            if self.start < position:
                with torch.inference_mode(False):
                    tokens = torch.cat((tokens, self.view(position, self.start)), self.token_dim)
            self.start = max(0, position - self.window)
            self._replace(tokens)
        if self.kept is not None and self.kept[0] >= position:
            self.kept = None

    def forget_other_marks(self, mark: int) -> None:
        """Give back what was kept for another mark than this one."""
        if self.kept is not None and self.kept[0] != mark:
            self.kept = None

    def nbytes(self, length: int | None = None) -> int:
        """Bytes of the tokens up to ``length`` that are held; None: of the whole allocation."""
        extra = 0 if self.kept is None else self.kept[1].numel() * self.kept[1].element_size()
        return super().nbytes(None if length is None else max(0, length - self.start)) + extra

    @torch.inference_mode(False)
    def select_rows(self, rows: torch.Tensor) -> None:
        """See :meth:`TokenBuffer.select_rows`."""
        super().select_rows(rows)
        if self.kept is not None:
            self.kept = (self.kept[0], self.kept[1].index_select(0, rows.to(self.kept[1].device)))

    @torch.inference_mode(False)
    def repeat_rows(self, repeats: int) -> None:
        """See :meth:`TokenBuffer.repeat_rows`."""
        super().repeat_rows(repeats)
        if self.kept is not None:
            self.kept = (self.kept[0], self.kept[1].repeat_interleave(repeats, dim=0))

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> None:
        """See :meth:`TokenBuffer.to`."""
        super().to(device)
        if self.kept is not None:
            self.kept = (self.kept[0], self.kept[1].to(device, non_blocking=True))

    @torch.inference_mode(False)
    def clone(self) -> WindowBuffer:
        """An independent copy."""
        copy = WindowBuffer(self.token_dim, self.window, self.max_tokens)
        copy.data = None if self.data is None else self.data.clone()
        copy.start = self.start
        copy.kept = None if self.kept is None else (self.kept[0], self.kept[1].clone())
        return copy

    def _capacity_for(self, needed: int, device: torch.device) -> int:
        if needed > self.room:
            return needed + self.keep - self.window  # what crop may be asked to undo
        if self.max_tokens is not None:
            return min(self.room, self.max_tokens)
        return min(self.room, super()._capacity_for(needed, device))

    def _window_before(
        self, mark: int, first: int, position: int, new: torch.Tensor | None
    ) -> tuple[int, torch.Tensor] | None:
        """What is to be kept for a mark when tokens from ``first`` on are the last ones."""
        lowest = max(0, mark - self.window)
        stop = position + (0 if new is None else new.shape[self.token_dim])
        before = self.kept[1] if self.kept is not None and self.kept[0] == mark else None
        if mark == 0 or lowest >= first or mark > stop or (before is None and lowest < self.start):
            return None
        begin, end = lowest if before is None else self.start, min(mark, first)
        # A normal tensor even under torch.inference_mode(): it may be written to after going back.
        with torch.inference_mode(False):
            if begin >= end:
                return self.kept
            tokens = self._tokens(begin, end, position, new)
            return mark, tokens.clone() if before is None else torch.cat((before, tokens), self.token_dim)

    def _tokens(self, start: int, stop: int, position: int, new: torch.Tensor | None) -> torch.Tensor:
        """Tokens ``start`` to ``stop`` of those that are held, followed by new ones from ``position`` on."""
        parts = []
        if start < position:
            parts.append(self.view(min(stop, position), start))
        if new is not None and stop > position:
            begin = max(start, position)
            parts.append(new.detach().narrow(self.token_dim, begin - position, stop - begin))
        return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].dtype) for part in parts], self.token_dim)
