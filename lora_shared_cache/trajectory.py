"""The token sequence that the agents share, as the model saw it: ids, padding and positions, and the checks against it."""

from __future__ import annotations

import torch

from .buffers import TokenBuffer
from .errors import TrajectoryError

UNKNOWN_TOKEN = -1
"""Recorded where the model was given ``inputs_embeds`` instead of ids; compares equal to anything."""


class Trajectory:
    """What was fed to the model so far.

    Attributes:
        length: T, tokens per row.
        rows: B; 0 while empty.
    """

    def __init__(self) -> None:
        self.length = 0
        self.rows = 0
        self._ids = TokenBuffer(-1)
        self._positions = TokenBuffer(-1, broadcast_rows=True)
        # Only once padding was seen; before, every token counts.
        self._padding: TokenBuffer | None = None

    @property
    def token_ids(self) -> torch.Tensor | None:
        """(B, T) int64; -1 where only embeddings were given. None while empty."""
        return self._ids.view(self.length) if self.length else None

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """(B or 1, stop - start) position ids."""
        return self._positions.view(stop, start)

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """(B, T) bool, False at padding; None: no padding."""
        return None if self._padding is None or not self.length else self._padding.view(self.length)

    @property
    def padding_buffer(self) -> TokenBuffer:
        """Storage of :attr:`attention_mask`, (B, capacity) bool."""
        assert self._padding is not None
        return self._padding

    def write_padding(self, start: int, new: torch.Tensor) -> None:
        """Write the padding (B, n) bool of tokens ``start ...`` ahead of :meth:`append`."""
        if self._padding is None:
            self._padding = TokenBuffer(-1)
            if self.length:
                self._padding.write(0, torch.ones(new.shape[0], self.length, dtype=torch.bool, device=new.device))
        self._padding.write(start, new)

    def check_rows(self, rows: int) -> None:
        """Refuse another batch size than the cache's.

        Raises:
            TrajectoryError: with both and the remedy.
        """
        if self.length and rows != self.rows:
            remedy = (
                f"call cache.batch_repeat_interleave({rows // self.rows}) first (beams and num_return_sequences repeat every row)"
                if rows > self.rows and rows % self.rows == 0
                else "use one SharedLoRACache per batch, or cache.batch_select_indices(...)"
            )
            raise TrajectoryError(f"the input has {rows} rows, the cache holds {self.rows}: {remedy}")

    def check_tokens(self, ids: torch.Tensor, start: int) -> None:
        """Refuse ids (B, n) at positions ``start ...`` that contradict the recorded ones.

        Raises:
            TrajectoryError: with the first position, both tokens and the remedy.
        """
        stop = min(self.length, start + ids.shape[1])
        if stop <= start:
            return
        recorded = self._ids.view(stop, start)
        given = ids[:, : stop - start].to(recorded.device)
        differs = (recorded != given) & (recorded != UNKNOWN_TOKEN) & (given != UNKNOWN_TOKEN)
        columns = differs.any(dim=0)
        if not bool(columns.any()):
            return
        column = int(columns.int().argmax())
        row = int(differs[:, column].int().argmax())
        position = start + column
        where = f" in row {row}" if self.rows > 1 else ""
        raise TrajectoryError(
            f"the input contradicts the cached trajectory at position {position}{where}: the cache holds token "
            f"{int(recorded[row, column])}, the input has {int(given[row, column])}. Pass the whole trajectory, or its new "
            f"tokens with an attention_mask over the whole; cache.crop(-{self.length - position}) goes back to before this "
            "position, cache.reset() starts over"
        )

    def check_padding(self, attention_mask: torch.Tensor | None) -> None:
        """Refuse an attention mask (B, m) that marks other cached tokens as padding than before.

        Raises:
            TrajectoryError: with the first position.
        """
        if not self.length or (attention_mask is None and self._padding is None):
            return
        if attention_mask is None:
            raise TrajectoryError(
                "the cached trajectory has padding; pass the attention_mask over the whole trajectory (cached and new tokens)"
            )
        given = attention_mask[:, : self.length].bool()
        recorded = self.attention_mask
        recorded = torch.ones_like(given) if recorded is None else recorded[:, : given.shape[1]].to(given.device)
        differs = (given != recorded).any(dim=0)
        if bool(differs.any()):
            raise TrajectoryError(
                f"the attention_mask marks other tokens as padding than when they were cached (first at position "
                f"{int(differs.int().argmax())}). Keep the padding of earlier turns, or use cache.reset()"
            )

    def check_positions(self, position_ids: torch.Tensor | None, start: int, n: int) -> None:
        """Refuse other positions for cached tokens than those their keys were rotated with.

        Args:
            position_ids: (B or 1, n) of tokens ``start ...``; None: the model counts from the first token.

        Raises:
            TrajectoryError: with the first token.
        """
        stop = min(self.length, start + n)
        if stop <= start:
            return
        recorded = self._positions.view(stop, start)
        if position_ids is None:
            given, who = torch.arange(start, stop, device=recorded.device)[None], "without position_ids the model gives"
        else:
            given, who = position_ids[:, : stop - start].to(recorded.device), "position_ids give"
        differs = (recorded != given).any(dim=0)
        if bool(differs.any()):
            raise TrajectoryError(
                f"{who} cached tokens another position than before (first for token {start + int(differs.int().argmax())}); "
                "their keys are rotated already. Pass position_ids as at earlier turns"
            )

    def append(
        self, ids: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None, padded: bool
    ) -> None:
        """Record new tokens.

        Args:
            ids: (B, n) int64.
            positions: (B or 1, n) int64.
            attention_mask: (B, m) over all tokens including the new ones, or None.
            padded: whether that mask holds any padding.
        """
        n = ids.shape[1]
        if n == 0:
            return
        stop = self.length + n
        self._ids.write(self.length, ids)
        self._positions.write(self.length, positions)
        if self._padding is not None or padded:
            new = torch.ones_like(ids, dtype=torch.bool)
            if attention_mask is not None:
                new = attention_mask[:, self.length : stop].bool()
            self.write_padding(self.length, new)
        self.rows, self.length = ids.shape[0], stop

    def truncate(self, length: int) -> None:
        """Forget everything from token ``length`` on."""
        self.length = min(self.length, length)
        if self.length == 0:
            self.__init__()  # type: ignore[misc]
        self.forget_padding_if_none()

    def forget_padding_if_none(self) -> None:
        """Where no token is padding any more: as if there never was any. ``generate`` passes no mask of ones to the model."""
        if self._padding is not None and self.length and bool(self._padding.view(self.length).all()):
            self._padding = None

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the rows ``rows``, in that order."""
        for buffer in self._buffers():
            buffer.select_rows(rows)
        if self.length:
            self.rows = len(rows)

    def repeat_rows(self, repeats: int) -> None:
        """Each row ``repeats`` times in a row."""
        for buffer in self._buffers():
            buffer.repeat_rows(repeats)
        self.rows *= repeats

    def nbytes(self, allocated: bool = False) -> int:
        """Bytes in use, or allocated."""
        return sum(buffer.nbytes(None if allocated else self.length) for buffer in self._buffers())

    def clone(self) -> Trajectory:
        """An independent copy."""
        copy = Trajectory()
        copy.length, copy.rows = self.length, self.rows
        copy._ids, copy._positions = self._ids.clone(), self._positions.clone()
        copy._padding = None if self._padding is None else self._padding.clone()
        return copy

    def _buffers(self) -> list[TokenBuffer]:
        return [b for b in (self._ids, self._positions, self._padding) if b is not None]
