"""What is stored per attention layer: base K/V once, low-rank entries per adapter, and (on the CPU) expanded keys; on a private
layer K/V of each agent instead.

A layer is only storage. Which of its tokens are valid is the cache's business, so that a forward pass that fails leaves
nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from .buffers import TokenBuffer, WindowBuffer, note_release
from .policies import EntryKey

if TYPE_CHECKING:
    from .cache import SharedLoRACache


def sliding_windows(config: Any) -> dict[int, int]:
    """Windows (tokens that a token reads, itself included) of a decoder's sliding layers, by index.

    Those in which Transformers' own cache keeps no more than a window.
    """
    layers = list(DynamicCache(config=config).layers)
    # Layers that attend within chunks have such a cache too, but no window.
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["chunked_attention" if getattr(config, "sliding_window", None) is None else ""] * len(layers)
    return {
        index: int(layer.sliding_window)
        for index, (layer, kind) in enumerate(zip(layers, types, strict=True))
        if type(layer) is DynamicSlidingWindowLayer and kind != "chunked_attention"
    }


class SharedCacheBase(Cache):
    """What the replaced forwards recognise a :class:`SharedLoRACache` by; it has no behaviour of its own."""


@dataclass(frozen=True)
class Tail:
    """Base K/V of a sliding layer that one agent needs to go on where it stopped, and that the layer does not hold otherwise.

    Attributes:
        start: position of the first token.
        end: where the agent stopped. Tokens between the last one here and this are among those that the layer holds.
        keys, values: (B, Hk, n, D).
    """

    start: int
    end: int
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.keys.shape[-2]

    def view(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of tokens ``start ... stop``."""
        first, n = start - self.start, stop - start
        return self.keys.narrow(-2, first, n), self.values.narrow(-2, first, n)

    def nbytes(self) -> int:
        """Bytes."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values))

    def extended(self, keys: torch.Tensor, values: torch.Tensor) -> Tail:
        """With further tokens (B, Hk, n, D) behind it."""
        return replace(self, keys=torch.cat((self.keys, keys), -2), values=torch.cat((self.values, values), -2))

    def select_rows(self, rows: torch.Tensor) -> Tail:
        """The batch rows ``rows``."""
        rows = rows.to(self.keys.device)
        return replace(self, keys=self.keys.index_select(0, rows), values=self.values.index_select(0, rows))

    def to(self, device: torch.device | str) -> Tail:
        """The same on another device."""
        keys, values = (t.to(device, non_blocking=True) for t in (self.keys, self.values))
        return replace(self, keys=keys, values=values)


class SharedLoRALayer(CacheLayerMixin):
    """One attention layer of a :class:`SharedLoRACache`.

    Attributes:
        window: on a sliding layer, tokens that a token reads, itself included; None: all before it.
        trims: a sliding layer that keeps only what can still be read.
        base_keys, base_values: (B, Hk, T, D); keys after RoPE. Empty on a private layer.
        base_rms: (B, Hk or 1, T, 1), root mean square of base keys before their norm; only on models that normalise keys.
        entries: low-rank entries by key and projection, each (B, T, r); with a norm also the "gain" and "delta_gain" of keys,
            (B, Hk or 1, T, 1) float32. On a private layer an agent's own K and V, each (B, Hk, T, D), keys after RoPE.
        width: numbers of K and V of one token and row, Hk (D + D); 0 before the first write.
        expanded: (B, Hk, T, D), base plus low-rank keys of the agent that ran last; only on the CPU.
        expanded_length: up to which token they are valid.
        tails: on a sliding layer, by the entries of who has not seen the last tokens: base K/V that it needs to go on.
        staged_tail: what a pass leaves for its own entries; the cache takes it over when the pass is committed.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(
        self, cache: SharedLoRACache, max_tokens: int | None = None, window: int | None = None, trims: bool = True
    ):
        self._cache = cache
        self.max_tokens = max_tokens
        self.window = window
        self.is_sliding = window is not None
        self.trims = trims and window is not None
        self._clear()

    def _clear(self) -> None:
        note_release()
        self.base_keys = self._buffer()
        self.base_values = self._buffer()
        self.base_rms = self._buffer()
        self.entries: dict[EntryKey, dict[str, TokenBuffer]] = {}
        self.expanded = self._scratch()
        self.expanded_length = 0
        self.tails: dict[EntryKey, Tail] = {}
        self.staged_tail: Tail | None = None
        self.width = 0
        self.is_initialized = False

    # ---- the contract of CacheLayerMixin ---------------------------------------------------------------------------

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """Base keys (B, Hk, T, D) of the trajectory (of a sliding layer: what it holds), or None: empty, or a private layer."""
        return self._base(self.base_keys)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """Base values like :attr:`keys`."""
        return self._base(self.base_values)

    def _base(self, buffer: TokenBuffer) -> torch.Tensor | None:
        length = self._cache.trajectory_length
        return buffer.view(length, buffer.start) if length and buffer.data is not None else None

    def _buffer(self) -> TokenBuffer:
        if self.trims:
            assert self.window is not None
            return WindowBuffer(-2, self.window, self.max_tokens)
        return TokenBuffer(-2, self.max_tokens)

    def _scratch(self) -> TokenBuffer:
        # What can be computed again is never kept beyond the window.
        return (
            TokenBuffer(-2, self.max_tokens) if self.window is None else WindowBuffer(-2, self.window, self.max_tokens)
        )

    @property
    def batch_size(self) -> int:
        """B; -1 while empty."""
        return self._cache.rows or -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note dtype, device and width; storage comes with the first write."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.width = sum(states.shape[1] * states.shape[-1] for states in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Go through the cache: a layer alone does not know where the tokens belong."""
        return self._cache.update(key_states, value_states, self._cache.layers.index(self), *args, **kwargs)

    def get_seq_length(self) -> int:
        """Coverage of the active adapter."""
        return self._cache.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(kv_length, kv_offset) for the next ``query_length`` tokens."""
        return self._cache.get_mask_sizes(query_length, self._cache.layers.index(self))

    def get_max_length(self) -> int:
        """Capacity in tokens, -1 if it grows."""
        return -1 if self.max_tokens is None else self.max_tokens

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        if self.is_initialized:
            self._move(self.device)

    def reset(self) -> None:
        """Release all storage."""
        self._clear()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the batch rows ``beam_idx``, in that order."""
        for buffer in self.buffers():
            buffer.select_rows(beam_idx)
        self.tails = {key: tail.select_rows(beam_idx) for key, tail in self.tails.items()}

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch rows ``indices``."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch row ``repeats`` times in a row."""
        for buffer in self.buffers():
            buffer.repeat_rows(repeats)
        for key, tail in self.tails.items():
            rows = torch.arange(tail.keys.shape[0]).repeat_interleave(repeats)
            self.tails[key] = tail.select_rows(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Go through the cache: all layers and all adapters are cropped together."""
        self._cache.crop(tokens_to_remove)

    # ---- ours ------------------------------------------------------------------------------------------------------

    def write_base(self, start: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write base K/V (B, Hk, n, D) of tokens ``start ...``."""
        if start == 0 or not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.base_keys.write(start, key_states)
        self.base_values.write(start, value_states)

    def write_private(self, key: EntryKey, start: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write an agent's own K/V (B, Hk, n, D) of tokens ``start ...`` on a private layer."""
        if start == 0 or not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.write_entry(key, "k_proj", start, key_states)
        self.write_entry(key, "v_proj", start, value_states)

    def private(self, key: EntryKey) -> tuple[TokenBuffer, TokenBuffer] | None:
        """An agent's own K and V on a private layer, or None: it has none."""
        parts = self.entries.get(key)
        return None if parts is None else (parts["k_proj"], parts["v_proj"])

    def write_entry(self, key: EntryKey, which: str, start: int, a: torch.Tensor) -> None:
        """Write low-rank entries (B, n, r) of tokens ``start ...``."""
        self.entry(key, which).write(start, a)

    def entry(self, key: EntryKey, which: str) -> TokenBuffer:
        """Where entries of one kind are stored; an empty buffer if nothing was."""
        buffers = self.entries.setdefault(key, {})
        if which not in buffers:
            buffers[which] = self._buffer()
        return buffers[which]

    def base(self) -> list[WindowBuffer]:
        """Base K and V of a sliding layer that holds any, where it lets go of tokens."""
        return [b for b in (self.base_keys, self.base_values) if isinstance(b, WindowBuffer) and b.data is not None]

    def norm_windows(self) -> list[WindowBuffer]:
        """Likewise the norms of base keys."""
        return [b for b in (self.base_rms,) if isinstance(b, WindowBuffer) and b.data is not None]

    def entry_windows(self, key: EntryKey) -> list[WindowBuffer]:
        """Likewise the entries of one key."""
        return [b for b in self.entries.get(key, {}).values() if isinstance(b, WindowBuffer) and b.data is not None]

    def windows(self) -> list[WindowBuffer]:
        """All buffers of a pass that may have something to commit."""
        return [b for b in self.buffers() if isinstance(b, WindowBuffer) and b is not self.expanded]

    def discard(self) -> None:
        """Give back what a pass has left that was not committed."""
        self.staged_tail = None
        for buffer in self.windows():
            buffer.discard()

    def tails_nbytes(self) -> int:
        """Bytes of the tails; one that several agents need counts once."""
        return sum(tail.nbytes() for tail in {id(tail): tail for tail in self.tails.values()}.values())

    def save_tails(self, first: int, ends: dict[EntryKey, int]) -> None:
        """Before base tokens up to ``first`` are let go of: keep what the agents need who have stopped at ``ends``."""
        buffer = self.base_keys
        if not isinstance(buffer, WindowBuffer) or buffer.data is None:
            return
        saved: dict[object, Tail] = {}
        for key, end in ends.items():
            tail, lowest = self.tails.get(key), max(0, end - buffer.window)
            begin, stop = lowest if tail is None else tail.stop, min(end, first)
            if begin >= stop or (tail is None and not buffer.covers(end)):
                continue
            same = end if tail is None else id(tail)
            if same not in saved:
                keys, values = buffer.view(stop, begin), self.base_values.view(stop, begin)
                saved[same] = (
                    Tail(lowest, end, keys.clone(), values.clone()) if tail is None else tail.extended(keys, values)
                )
            self.tails[key] = saved[same]

    def tail_before(
        self, position: int, start: int, keys: Iterable[EntryKey]
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Base K and V of tokens ``start ... position`` kept for one of the entries ``keys``, or None twice."""
        for key in keys:
            tail = self.tails.get(key)
            if tail is None or start < tail.start or position > tail.end:
                continue
            if position <= tail.stop:
                return tail.view(start, position)
            first = max(start, tail.stop)
            rest = self.base_keys.view(position, first), self.base_values.view(position, first)
            if start >= tail.stop:
                return rest
            keys, values = (torch.cat(parts, -2) for parts in zip(tail.view(start, tail.stop), rest, strict=True))
            return keys, values
        return None, None

    def release_expanded(self) -> None:
        """Give back the expanded keys."""
        self.expanded = self._scratch()
        self.expanded_length = 0

    def buffers(self) -> list[TokenBuffer]:
        """All storage of the layer."""
        found = [self.base_keys, self.base_values, self.base_rms, self.expanded]
        return found + [buffer for parts in self.entries.values() for buffer in parts.values()]

    def clone(self, cache: SharedLoRACache) -> SharedLoRALayer:
        """An independent copy that belongs to ``cache``."""
        copy = SharedLoRALayer(cache, self.max_tokens, self.window, self.trims)
        copy.base_keys, copy.base_values = self.base_keys.clone(), self.base_values.clone()
        copy.base_rms = self.base_rms.clone()
        copy.entries = {k: {w: b.clone() for w, b in parts.items()} for k, parts in self.entries.items()}
        copy.tails = dict(self.tails)  # never written to
        copy.is_initialized, copy.width = self.is_initialized, self.width
        if self.is_initialized:
            copy.dtype, copy.device = self.dtype, self.device
        return copy

    def _move(self, device: torch.device | str) -> None:
        for buffer in self.buffers():
            buffer.to(device)
        self.tails = {key: tail.to(device) for key, tail in self.tails.items()}
