"""What is stored per attention layer: base K/V once, low-rank entries per adapter, and (on the CPU) expanded keys; on a private
layer K/V of each agent instead.

A layer is only storage. Which of its tokens are valid is the cache's business, so that a forward pass that fails leaves
nothing behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .buffers import TokenBuffer
from .policies import EntryKey

if TYPE_CHECKING:
    from .cache import SharedLoRACache


class SharedCacheBase(Cache):
    """What the replaced forwards recognise a :class:`SharedLoRACache` by; it has no behaviour of its own."""


class SharedLoRALayer(CacheLayerMixin):
    """One attention layer of a :class:`SharedLoRACache`.

    Attributes:
        base_keys, base_values: (B, Hk, T, D); keys after RoPE. Empty on a private layer.
        base_rms: (B, Hk or 1, T, 1), root mean square of base keys before their norm; only on models that normalise keys.
        entries: low-rank entries by key and projection, each (B, T, r); with a norm also the "gain" and "delta_gain" of keys,
            (B, Hk or 1, T, 1) float32. On a private layer an agent's own K and V, each (B, Hk, T, D), keys after RoPE.
        width: numbers of K and V of one token and row, Hk (D + D); 0 before the first write.
        expanded: (B, Hk, T, D), base plus low-rank keys of the agent that ran last; only on the CPU.
        expanded_length: how many of its tokens are valid.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: SharedLoRACache, max_tokens: int | None = None):
        self._cache = cache
        self.max_tokens = max_tokens
        self._clear()

    def _clear(self) -> None:
        self.base_keys = TokenBuffer(-2, self.max_tokens)
        self.base_values = TokenBuffer(-2, self.max_tokens)
        self.base_rms = TokenBuffer(-2, self.max_tokens)
        self.entries: dict[EntryKey, dict[str, TokenBuffer]] = {}
        self.expanded = TokenBuffer(-2, self.max_tokens)
        self.expanded_length = 0
        self.width = 0
        self.is_initialized = False

    # ---- the contract of CacheLayerMixin ---------------------------------------------------------------------------

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """Base keys (B, Hk, T, D) of the whole trajectory, or None: empty, or a private layer."""
        return self._base(self.base_keys)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """Base values (B, Hk, T, D) of the whole trajectory, or None: empty, or a private layer."""
        return self._base(self.base_values)

    def _base(self, buffer: TokenBuffer) -> torch.Tensor | None:
        length = self._cache.trajectory_length
        return buffer.view(length) if length and buffer.data is not None else None

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
        return self.get_seq_length() + query_length, 0

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

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch rows ``indices``."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch row ``repeats`` times in a row."""
        for buffer in self.buffers():
            buffer.repeat_rows(repeats)

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
        buffers = self.entries.setdefault(key, {})
        if which not in buffers:
            buffers[which] = TokenBuffer(-2, self.max_tokens)
        buffers[which].write(start, a)

    def release_expanded(self) -> None:
        """Give back the expanded keys."""
        self.expanded = TokenBuffer(-2, self.max_tokens)
        self.expanded_length = 0

    def buffers(self) -> list[TokenBuffer]:
        """All storage of the layer."""
        found = [self.base_keys, self.base_values, self.base_rms, self.expanded]
        return found + [buffer for parts in self.entries.values() for buffer in parts.values()]

    def clone(self, cache: SharedLoRACache) -> SharedLoRALayer:
        """An independent copy that belongs to ``cache``."""
        copy = SharedLoRALayer(cache, self.max_tokens)
        copy.base_keys, copy.base_values = self.base_keys.clone(), self.base_values.clone()
        copy.base_rms = self.base_rms.clone()
        copy.entries = {k: {w: b.clone() for w, b in parts.items()} for k, parts in self.entries.items()}
        copy.is_initialized, copy.width = self.is_initialized, self.width
        if self.is_initialized:
            copy.dtype, copy.device = self.dtype, self.device
        return copy

    def _move(self, device: torch.device | str) -> None:
        for buffer in self.buffers():
            buffer.to(device)
