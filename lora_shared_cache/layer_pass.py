"""One attention layer of a forward pass: splits the projections, stores, and attends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional as F

from flash_lora_attention import flash_lora_attention, flash_lora_attention_reference

from . import adapters as peft_adapters
from .append import append_tokens
from .attachment import AttentionLayer, lora_forward
from .attention import attention_backend
from .buffers import NotReserved, TokenBuffer, WindowBuffer
from .cpu_attention import MIN_TOKENS, block_attention, step_attention
from .errors import TrajectoryError, UnsupportedModelError
from .forward import NORMS, ForwardPass
from .invocation import active
from .key_norm import KeyNorm
from .layout import NO_ROTATION
from .policies import SHARED_ENTRY, Entry, EntryKey, private_key
from .products import base_linear
from .rows import (
    RowColumns,
    adapter_index,
    join_rows,
    row_columns,
    rows_with,
    stack_up_projections,
    up_of_rows,
)
from .storage import SharedLoRALayer, Tail


class LayerPass:
    """One attention layer of a forward pass: splits the projections, stores, and attends.

    Attributes:
        private: on a private layer, the key of the agent's own K and V; nothing is split there.
        angles: cos and sin of the pass's tokens, as the model gives them, (B or 1, n, width) each.
        device: of the layer's hidden states, once a projection has seen them.
        stored, attended: whether the layer has given K and V to the cache, and has called its attention.
    """

    def __init__(self, forward_pass: ForwardPass, layer: AttentionLayer):
        self.forward_pass = forward_pass
        self.layer = layer
        self.storage: SharedLoRALayer = forward_pass.cache.layers[layer.layer_idx]
        self.private: EntryKey | None = None
        if layer.layer_idx in forward_pass.cache.private_layers:
            self.private = private_key(forward_pass.agent)
        self.stored = self.attended = False
        self.angles: tuple[torch.Tensor, torch.Tensor] | None = None
        self.slides = self.storage.window is not None
        self.device: torch.device | None = None
        # A sliding layer that keeps all tokens has no slot of its own.
        self.slot = forward_pass.slot
        if self.slot is not None and self.storage.trims:
            self.slot = self.slot.window
        # On a sliding layer: what this pass reads of each kind of entries, and what it has computed itself, from which token on.
        self._read: dict[tuple[EntryKey, str], torch.Tensor] = {}
        self._computed: dict[tuple[EntryKey, str], tuple[int, torch.Tensor]] = {}
        # With a slot: what is to be written for the new token, and its low-rank entries until then.
        self._tokens: list[tuple[TokenBuffer, torch.Tensor]] = []
        self._fresh: dict[EntryKey, torch.Tensor] = {}
        # What the product of one projection has computed for the other: of which input, from which token on, `A x`.
        self._ahead: tuple[torch.Tensor, int, tuple[torch.Tensor, ...]] | None = None

    # ---- sliding layers --------------------------------------------------------------------------------------------
    # Of ``length`` stored tokens the last ``window`` are what a sliding layer shares: a pass that runs tokens again reads those
    # from the storage, and takes what it computes itself for those before. So its numbers don't depend on what happens to be
    # held still, and tokens outside of the window are needed by nobody.

    @property
    def start(self) -> int:
        """First token that the layer reads."""
        return self.forward_pass.window_start if self.slides else 0

    @property
    def seen(self) -> int:
        """Tokens of the buffers that the layer is shown in a step whose lengths only the device knows."""
        assert self.slot is not None
        return self.slot.capacity

    def _own_until(self, length: int) -> int:
        """The token from which on stored numbers are read, where ``length`` are stored."""
        now, window = self.forward_pass, self.storage.window
        assert window is not None
        return min(max(length - window, now.start), now.stop)

    def _store(self, buffer: TokenBuffer, length: int, new: torch.Tensor, first: int) -> bool:
        """Append what is new of tokens ``first ... stop``; returns whether the storage has to be committed."""
        now = self.forward_pass
        if length >= now.stop:
            return False
        n = now.stop - length
        staged = buffer.append(length, new.narrow(buffer.token_dim, length - first, n), now.keep_from, now.mark)
        now.staged |= staged
        return staged

    def _slide(
        self,
        buffer: TokenBuffer,
        length: int,
        new: torch.Tensor,
        first: int,
        start: int,
        past: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store what is new of one kind of numbers, and return what this pass reads of it.

        Args:
            buffer, length: where it is stored, and how many tokens were stored before the pass.
            new: that of tokens ``first ... stop``, computed in this pass.
            start: first token to return.
            past: that of tokens ``start ...`` up to the pass; None: as stored.

        Returns:
            That of tokens ``start ... stop``.
        """
        now, dim = self.forward_pass, buffer.token_dim
        own = self._own_until(length)
        staged = self._store(buffer, length, new, first)
        if own == now.start and past is None and not staged:
            return buffer.view(now.stop, start)
        parts = []
        if start < now.start:
            parts.append(buffer.view(now.start, start) if past is None else past)
        if now.start < own:
            parts.append(new.narrow(dim, now.start - first, own - now.start))
        if own < min(length, now.stop):
            parts.append(buffer.view(min(length, now.stop), own))
        if length < now.stop:
            parts.append(new.narrow(dim, max(length, own) - first, now.stop - max(length, own)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    @cached_property
    def _pending(self) -> list[tuple[Entry, int]]:
        """The entries of which numbers are computed in this pass, and from which token on."""
        now = self.forward_pass
        if not self.slides:
            return now.pending
        found = dict(now.pending)
        found.update(
            (entry, now.start) for entry, _ in now.readers if self._own_until(now.lengths.get(entry.key, 0)) > now.start
        )
        return list(found.items())

    @cached_property
    def _plans(self) -> dict[Any, Any]:
        now = self.forward_pass
        return now.plans_for(self._pending) if self.slides else now.plans

    def _plan(self, what: str, compute: Callable[[], Any]) -> Any:
        """What the layer does in all passes of this agent that write the same entries: worked out once, for a device."""
        key = (what, self.layer.layer_idx, self.device)
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = compute()
        return found

    def _take(self, entry: Entry, which: str, first: int, new: torch.Tensor) -> None:
        """Store numbers of an entry for tokens ``first ... stop``; on a sliding layer they are also kept for this pass."""
        now = self.forward_pass
        if not self.slides:
            self.storage.entry(entry.key, which).write(first, new)
            return
        buffer, length = self.storage.entry(entry.key, which), now.lengths.get(entry.key, 0)
        self._computed[entry.key, which] = first, new
        if any(entry == reader for reader, _ in now.readers):
            self._read[entry.key, which] = self._slide(buffer, length, new, first, self.start)
        else:
            self._store(buffer, length, new, first)

    def _numbers(self, key: EntryKey, which: str, start: int) -> torch.Tensor:
        """Numbers of an entry for tokens ``start ... stop`` of this pass."""
        now, buffer = self.forward_pass, self.storage.entries[key][which]
        if (key, which) in self._read:
            return self._read[key, which].narrow(buffer.token_dim, start - self.start, now.stop - start)
        first, new = self._computed.get((key, which), (now.stop, None))
        if new is None:
            return buffer.view(now.stop, start)
        if first <= start:
            return new.narrow(buffer.token_dim, start - first, now.stop - start)
        return torch.cat((buffer.view(first, start), new), buffer.token_dim)

    def _entries(self, key: EntryKey, which: str) -> torch.Tensor:
        """What the layer reads of an entry."""
        buffer = self.storage.entries[key][which]
        if self.slot is not None:
            return buffer.slots(self.seen)
        if (key, which) in self._read:
            return self._read[key, which]
        return buffer.view(self.forward_pass.stop, self.start)

    # ---- projections -----------------------------------------------------------------------------------------------

    def project(self, which: str, module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What a projection of keys or values returns during the pass: the base alone; ``A x`` goes to the storage.

        A fused projection: the base for keys and values, what PEFT returns for queries. On a private layer: what PEFT returns.

        Args:
            x: (B, n, in_features).

        Returns:
            (B, n, out_features).
        """
        if self.private is not None:
            return lora_forward(module, x, *args, **kwargs)
        if module.disable_adapters and module.merged:
            # PEFT's own forward does this too: a disabled adapter must not stay in the base weights.
            module.unmerge()
        if kwargs:
            kwargs = {k: v for k, v in kwargs.items() if k not in peft_adapters.PEFT_ARGUMENTS}
        base = base_linear(module.base_layer, x, *args, **kwargs)
        self.device = x.device
        out = self._write_entries(which, module, x, base)
        norm = None if self.layer.layout is None else self.layer.layout.key_norm
        if norm is not None and which == self.layer.sources["k_proj"]:
            columns = self.layer.columns("k_proj")
            self._write_gains(module, base if columns is None else base[..., columns], norm)
        return out

    def _write_entries(self, which: str, module: Any, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Store the entries of all writers; returns ``base``, to whose queries the adapters are added if there are any."""
        now, pending = self.forward_pass, self._pending
        plan: DownPlan | None = self._plan("down", self._down_plans)[which]
        if plan is None:
            return base
        # Queries need `A x` of every token, whether or not it is stored too.
        first = now.start if plan.queries else min([pending[part.place][1] for part in plan.parts])
        dtype = now.cache.low_rank_dtype or base.dtype
        # One product for all adapters; each then keeps the tokens that are new to it.
        if now.products is not None:
            columns = now.products.down(module, plan.weight, x, plan.common).split_with_sizes(plan.ranks, -1)
        elif self._ahead is not None and self._ahead[0] is x and self._ahead[1] == first:
            columns, self._ahead = self._ahead[2], None
        else:
            weight = plan.weight if plan.joint is None else plan.joint
            new_to_some = x if first == now.start else x[:, first - now.start :]
            a = F.linear(new_to_some if x.dtype == weight.dtype else new_to_some.to(weight.dtype), weight)
            if a.dtype != dtype and not plan.queries:
                a = a.to(dtype)
            columns = a.split_with_sizes(plan.ranks if plan.joint is None else plan.joint_ranks, -1)
            self._ahead = None if plan.joint is None else (x, first, columns[len(plan.ranks) :])
        if plan.queries:
            base = self._add_to_queries(module, plan.queries, columns[-1], base)
        for (place, ones, of_rows), new in zip(plan.parts, columns, strict=False):
            entry, start = pending[place]
            if start > first:
                new = new[:, start - first :]
            if of_rows is not None:
                new = of_rows(new)
            elif ones:
                new = torch.cat((new, new.new_ones(*new.shape[:-1], 1)), dim=-1)
            if entry.activated:
                new = self._from_invocation(entry, which, start, new.to(dtype))
            if now.slot is None:
                self._take(entry, which, start, new if new.dtype == dtype else new.to(dtype))
            else:
                self._put(entry.key, which, new)
                if which == self.layer.sources["k_proj"]:
                    self._fresh[entry.key] = new
        return base

    def _down_plans(self) -> dict[str, DownPlan | None]:
        """What is computed of each projection's input. Other agents' passes have the same plans for the same entries."""
        now, layer = self.forward_pass, self.layer
        entries = [entry for entry, _ in self._pending]
        fused = layer.layout is not None and layer.layout.fused is not None
        agent = peft_adapters.names_in(now.agent) if fused else ()
        key = ("down", self.device, layer.layer_idx, agent, *entries)
        found = now.attachment.cached_weights(key, lambda: _down_plans(layer, entries, agent))
        return cast("dict[str, DownPlan | None]", found)

    def _add_to_queries(self, module: Any, names: tuple[str, ...], a: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """``base`` (B, n, out) plus the part of active adapters, from ``a`` (B, n, sum of ranks), in its columns of queries."""
        now = self.forward_pass
        rows = now.rows
        fused = self.layer.layout.fused if self.layer.layout is not None else None
        assert fused is not None
        columns = fused.query

        def queries_only(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
            up = module.lora_B[name]
            kept = torch.zeros_like(up.weight[:, :1], dtype=torch.bool)
            kept[columns.to(kept.device)] = True
            return up.weight.detach() * kept, None if up.bias is None else up.bias.detach() * kept[:, 0]

        out, first = base, 0
        for name in names:
            key = ("queries", base.device, id(module), name)
            weight, bias = now.attachment.cached_weights(key, partial(queries_only, name))
            scaling: Any = module.scaling[name]
            if rows is not None:
                of = ("rows of", base.device, rows, name)
                of_rows = now.attachment.cached_weights(of, partial(rows_with, rows, (name,), base.device))
                scaling = weight.new_zeros(len(rows), 1, 1).index_fill_(0, of_rows, scaling)
            part = a[..., first : first + weight.shape[1]].to(weight.dtype)
            first += weight.shape[1]
            # In PEFT's order and dtypes.
            delta = F.linear(part, weight, bias) * scaling
            if now.invocations is not None:
                delta = delta * active(now.invocations, now.start, now.stop, delta.device)
            out = out + delta
        return out.to(base.dtype)

    def _from_invocation(self, entry: Entry, which: str, start: int, part: torch.Tensor) -> torch.Tensor:
        """Entries (B, n, r) of tokens ``start ...``, zeros before each row's invocation; so are those that are missing yet."""
        now = self.forward_pass
        assert now.invocations is not None
        self._fill(entry, which, part, 0.0)
        return part * active(now.invocations, start, now.stop, part.device)

    def _fill(self, entry: Entry, which: str, like: torch.Tensor, number: float) -> None:
        """Of tokens that others ran before an invocation: the same number everywhere; on a sliding layer as far as it is read."""
        now = self.forward_pass
        before = now.zeros_from.get(entry.key, now.start)
        if before >= now.start:
            return
        buffer = self.storage.entry(entry.key, which)
        if isinstance(buffer, WindowBuffer) and before <= self.start:
            buffer.restart(self.start)
            before = self.start
        if before == now.start:
            return
        shape = list(like.shape)
        shape[buffer.token_dim] = now.start - before
        buffer.write(before - buffer.start, like.new_full(shape, number))

    def _put(self, key: EntryKey, which: str, new: torch.Tensor) -> None:
        if which not in self.storage.entries.get(key, {}):
            raise NotReserved
        self._tokens.append((self.storage.entries[key][which], new))

    def _rms(self, norm: KeyNorm, keys: torch.Tensor, first: int) -> torch.Tensor:
        """What the norm divides keys (B, n, Hk * D) by, those of the pass from its token ``first`` on: (B, Hk or 1, n, 1)."""
        layout = self.layer.layout
        assert layout is not None
        keys = keys.unflatten(-1, (-1, layout.head_dim)).transpose(1, 2)
        if norm.after_rotation and self.angles is not None:
            keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
            keys = layout.rotate(keys, *(t[:, first:].to(keys.dtype) for t in layout.angles(*self.angles)))
        return norm.rms(keys)

    def _write_gains(self, module: Any, base: torch.Tensor, norm: KeyNorm) -> None:
        """The numbers per key of each adapter whose entries are written, from what ``k_proj`` gives (B, n, Hk * D)."""
        now, storage = self.forward_pass, self.storage
        own = self._rms(norm, base, 0)
        known = now.start if now.slot is not None else now.cache._rope_length.get(NORMS, 0)
        if known < now.start:
            # As with cos/sin: whoever needs the norms of the tokens before will run them.
            return
        now.rope_lengths[NORMS] = max(known, now.stop)
        if now.slot is not None:
            shared = own
            self._tokens.append((storage.base_rms, own))
        elif self.slides:
            shared = self._slide(storage.base_rms, known, own, now.start, now.start)
        else:
            if known < now.stop:
                storage.base_rms.write(known, own[:, :, known - now.start :])
            shared = storage.base_rms.view(now.stop, now.start)
        for entry, start in self._pending:
            names = tuple(peft_adapters.names_on(module, entry.names))
            if not names or entry.shared:
                continue
            source = Entry(SHARED_ENTRY, now.group, shared=True) if entry.gains else entry
            if now.slot is None:
                a = self._numbers(source.key, self.layer.sources["k_proj"], start)
            elif source.key in self._fresh:
                a = self._fresh[source.key]
            else:
                raise NotReserved
            if entry.rows is None:
                up = self._up("k_proj", module, source, names)
            else:
                up = up_of_rows(self._ups_of_rows("k_proj", module), self._index_of_rows(base.device))
            delta = (a[:, None].to(up.dtype) @ up).transpose(1, 2).flatten(2)
            adapted = self._rms(norm, base[:, start - now.start :].to(up.dtype) + delta, start - now.start)
            of_base = shared[:, :, start - now.start :]
            gains = dict(gain=of_base / adapted, delta_gain=1 / adapted)
            # Without an adapter the key is the base's.
            self._fill(entry, "gain", gains["gain"], 1.0)
            self._fill(entry, "delta_gain", gains["gain"], 0.0)
            if norm.bias is not None:
                shift = (adapted - of_base).squeeze(-1).transpose(1, 2)
                gains["shift"] = shift.to(now.cache.low_rank_dtype or base.dtype)
                self._fill(entry, "shift", gains["shift"], 0.0)
            for which, numbers in gains.items():
                if now.slot is None:
                    self._take(entry, which, start, numbers)
                else:
                    self._put(entry.key, which, numbers)

    # ---- storage ---------------------------------------------------------------------------------------------------

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store what is new of the base K/V (B, Hk, n, D); return tokens 0 ... stop (with a slot: the whole capacity).

        On a private layer: of the agent's own K/V. On a sliding layer: tokens from the window of the first one on.
        """
        now = self.forward_pass
        rows, n = key_states.shape[0], key_states.shape[-2]
        if (rows, n) != (now.ids.shape[0], now.stop - now.start):
            raise UnsupportedModelError(
                f"{self.layer.name} gave keys of {rows} rows and {n} tokens to the cache, expected {now.ids.shape[0]} and "
                f"{now.stop - now.start}: an argument of the model was not cut to the tokens that are run. Pass new tokens only"
            )
        if not self.stored:
            self.stored = True
            now.stored += 1
        if self.private is not None:
            return self._update_private(self.private, key_states, value_states)
        if self.slot is not None:
            # The entries of this token, which the projections left, go with it.
            self._tokens += [(self.storage.base_keys, key_states), (self.storage.base_values, value_states)]
            append_tokens(self.slot.index, self._tokens)
            self._tokens = []
            return self.storage.base_keys.slots(self.seen), self.storage.base_values.slots(self.seen)
        if self.slides:
            return self._update_sliding(key_states, value_states)
        if now.stop > now.previous:
            if new := now.previous - now.start:
                key_states, value_states = key_states[:, :, new:], value_states[:, :, new:]
            self.storage.write_base(now.previous, key_states, value_states)
        return self.storage.base_keys.view(now.stop), self.storage.base_values.view(now.stop)

    def _update_sliding(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        now, storage = self.forward_pass, self.storage
        if now.previous == 0 or not storage.is_initialized:
            storage.lazy_initialization(key_states, value_states)
        past: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if self.start < now.start < now.previous:
            past = storage.tail_before(now.start, self.start, (entry.key for entry, _ in now.readers))
        keys, values = (
            self._slide(buffer, now.previous, states, now.start, self.start, before)
            for buffer, states, before in zip(
                (storage.base_keys, storage.base_values), (key_states, value_states), past, strict=True
            )
        )
        storage.staged_tail = None
        if now.stop < now.previous and not now.blind:
            # The agent is not there yet: what its next token needs is held by nobody else.
            assert storage.window is not None
            first = max(0, now.stop - storage.window)
            storage.staged_tail = Tail(
                first, now.stop, keys[:, :, first - self.start :].clone(), values[:, :, first - self.start :].clone()
            )
        return keys, values

    def _update_private(
        self, key: EntryKey, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        now, storage = self.forward_pass, self.storage
        if self.slot is None and self.slides:
            if now.previous == 0 or not storage.is_initialized:
                storage.lazy_initialization(key_states, value_states)
            length = now.lengths.get(key, 0)
            parts = (storage.entry(key, "k_proj"), key_states), (storage.entry(key, "v_proj"), value_states)
            keys, values = (self._slide(buffer, length, states, now.start, self.start) for buffer, states in parts)
            return keys, values
        if self.slot is None:
            for entry, start in now.writers:
                if entry.key == key and start < now.stop:
                    new = start - now.start
                    storage.write_private(key, start, key_states[:, :, new:], value_states[:, :, new:])
        buffers = storage.private(key)
        if buffers is None:
            raise NotReserved
        own_keys, own_values = buffers
        if self.slot is not None:
            append_tokens(self.slot.index, [(own_keys, key_states), (own_values, value_states)])
            return own_keys.slots(self.seen), own_values.slots(self.seen)
        return own_keys.view(now.stop), own_values.view(now.stop)

    # ---- attention -------------------------------------------------------------------------------------------------

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Attention of (B, Hq, S, D) over base K/V (B, Hk, T, D) plus the agent's low-rank part; (B, Hq, S, D).

        On a private layer K/V are the agent's own, and there is no low-rank part.
        """
        self.attended = True
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = self._mask_of_window(kwargs["attention_mask"], key.shape[2])
        key_low_rank, key_up, gain, delta_gain = self._low_rank_of_keys(key.shape[1])
        value_low_rank, value_up = self._low_rank("v_proj")
        index = None
        if self.forward_pass.rows is not None and not (key_up is None and value_up is None):
            index = self._index_of_rows(query.device)
        layout, slot = self.layer.layout if self.private is None else NO_ROTATION, self.slot
        assert layout is not None
        backend = attention_backend()
        if backend is None and not query.is_cuda:
            backend = "reference"
        norm = layout.key_norm
        keeps_expanded = backend == "reference" and query.device.type == "cpu" and slot is None
        if key_low_rank is not None and key_up is not None and keeps_expanded:
            # Expanding is a matrix product over all tokens; on the CPU the agent's expanded keys are kept and appended to.
            up = key_up if index is None else up_of_rows(key_up, index)
            key = self._expanded_keys(key, key_low_rank, up, gain, delta_gain)
            key_low_rank = key_up = gain = delta_gain = None
        if key_low_rank is None and backend == "reference" and attention_backend() is None and slot is None:
            out = self._attend_on_cpu(query, key, value, value_low_rank, value_up, index, kwargs)
            if out is not None:
                return out
        cos = sin = weight = None
        if key_low_rank is not None and norm is not None:
            weight = norm.rotated_weight
        if key_low_rank is not None and layout.rotary_dim:
            cos, sin = self._rope(query.device)
        if backend == "reference":
            attention: Callable[..., Any] = flash_lora_attention_reference
        else:
            # A length of text rarely comes twice, and cuDNN's plans for it cost a pass more than they gain in it.
            attention = partial(flash_lora_attention, backend=backend, cudnn_plans=False)
        out = attention(
            query,
            key,
            value,
            key_low_rank=key_low_rank,
            key_up=key_up,
            value_low_rank=value_low_rank,
            value_up=value_up,
            adapter_index=index,
            cos=cos,
            sin=sin,
            rotary_dim=layout.rotary_dim or None,
            rotary_interleaved=layout.interleaved,
            key_gain=gain,
            key_delta_gain=delta_gain,
            key_delta_weight=weight,
            key_length=None if slot is None else slot.length,
            **kwargs,
        )
        return cast(torch.Tensor, out)

    def _attend_on_cpu(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        value_low_rank: torch.Tensor | None,
        value_up: torch.Tensor | None,
        index: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """Attention with expanded keys by ``cpu_attention.py``, or None where the reference serves."""
        mask, tokens = kwargs["attention_mask"], query.shape[2]
        if (mask is not None and mask.dim() != 4) or any(kwargs.get(name) is not None for name in ("softcap", "sinks")):
            return None
        if 1 < tokens < MIN_TOKENS or (tokens == 1 and mask is not None):
            return None
        if value_up is not None and index is not None:
            value_up = up_of_rows(value_up, index)
        options = dict(value_low_rank=value_low_rank, value_up=value_up, scale=kwargs["scale"])
        if tokens >= MIN_TOKENS:
            return block_attention(query, key, value, attention_mask=mask, is_causal=kwargs["is_causal"], **options)
        if _same_wide_dtype(query, key, value, value_low_rank, value_up):
            return step_attention(query, key, value, **options)
        return None

    def _low_rank_of_keys(self, heads: int) -> tuple[torch.Tensor | None, ...]:
        """:meth:`_low_rank` of keys, and the "gain" and "delta_gain" (B, Hk, T) of a norm that they have, or None twice."""
        low_rank, up = self._low_rank("k_proj")
        norm = None if self.layer.layout is None else self.layer.layout.key_norm
        if low_rank is None or up is None or norm is None:
            return low_rank, up, None, None
        numbers = (
            self._numbers_of_norm(which, 1.0).squeeze(-1).expand(-1, heads, -1) for which in ("gain", "delta_gain")
        )
        return *self._with_shifts(low_rank, up, norm), *numbers

    def _low_rank(self, which: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The agent's entries (B, stop, r) and up-projections (Hk, r, D) for "k_proj" or "v_proj", or None twice.

        Where rows have adapters of their own: up-projections (n, Hk, r, D) of all their adapters.
        """
        if self.private is not None:
            return None, None
        if self.forward_pass.rows is not None:
            return self._low_rank_of_rows(which, self.layer.projection(which))
        keys, ups = self._plan(which, partial(self._up_plan, which))
        if not ups:
            return None, None
        source = self.layer.sources[which]
        if len(ups) == 1:
            return self._entries(keys[0], source), ups[0]
        return torch.cat([self._entries(key, source) for key in keys], dim=-1), torch.cat(ups, dim=-2)

    def _up_plan(self, which: str) -> tuple[list[EntryKey], list[torch.Tensor]]:
        """The keys of the entries that the agent reads here, and the up-projections (Hk, r, D) of each."""
        module = self.layer.projection(which)
        keys, ups = [], []
        for entry, names in self.forward_pass.readers:
            names_here = tuple(peft_adapters.names_on(module, names))
            if names_here and not entry.gains:
                keys.append(entry.key)
                ups.append(self._up(which, module, entry, names_here, normed=which == "k_proj"))
        return keys, ups

    def _low_rank_of_rows(self, which: str, module: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """As :meth:`_low_rank`; each row's entries are those of its adapter."""
        sources = self._sources_of_rows(module, lambda entry: not entry.gains)
        if not sources:
            return None, None
        ups = self._ups_of_rows(which, module, normed=which == "k_proj")
        stored = [self._entries(entry.key, self.layer.sources[which]) for entry, _ in sources]
        if len(stored) == 1 and stored[0].shape[-1] == ups.shape[2]:
            # Rows that do not read it have no up-projection.
            return stored[0], ups
        return join_rows([(t, rows) for t, (_, rows) in zip(stored, sources, strict=True)], ups.shape[2]), ups

    def _sources_of_rows(self, module: Any, wanted: Callable[[Entry], bool]) -> list[tuple[Entry, torch.Tensor]]:
        """The entries that rows read on this layer, with the rows (b,) int64 that read each."""
        now = self.forward_pass
        rows, found = now.rows or (), []
        for entry, names in now.readers:
            here = tuple(peft_adapters.names_on(module, names))
            if here and wanted(entry):
                device = module.lora_A[here[0]].weight.device
                key = ("rows", device, now.agent, here)
                found.append((entry, now.attachment.cached_weights(key, partial(rows_with, rows, here, device))))
        return found

    def _ups_of_rows(self, which: str, module: Any, normed: bool = False) -> torch.Tensor:
        """Up-projections (n, Hk, r, D) of the adapters of all rows, kept while the weights stay as they are; see :meth:`_up`."""
        now = self.forward_pass
        names = peft_adapters.names_in(now.agent)
        entries = {name: entry for entry, readers in now.readers for name in readers if not entry.gains}
        key = ("ups", self.layer.layer_idx, which, names, tuple(entries.items()), normed)

        def up(name: str) -> torch.Tensor | None:
            if name not in entries or not peft_adapters.names_on(module, [name]):
                return None
            # In what belongs to rows each adapter has columns of its own.
            entry = entries[name] if entries[name].rows is None else Entry((name,), (name,))
            return self._up(which, module, entry, (name,), normed)

        return cast(torch.Tensor, now.attachment.cached_weights(key, lambda: stack_up_projections([*map(up, names)])))

    def _index_of_rows(self, device: torch.device) -> torch.Tensor:
        """(B,) int64: each row's place among the adapters of all rows, -1 for the base model."""
        now = self.forward_pass
        rows, names = now.rows or (), peft_adapters.names_in(now.agent)
        key = ("index", device, now.agent)
        return cast(torch.Tensor, now.attachment.cached_weights(key, partial(adapter_index, rows, names, device)))

    def _up(self, which: str, module: Any, entry: Entry, names: tuple[str, ...], normed: bool = False) -> torch.Tensor:
        """The up-projections (Hk, r, D) of adapters ``names`` that read an entry, kept while the weights stay as they are.

        Args:
            normed: times the weight of the norm that keys may have.
        """
        norm = self.layer.layout.key_norm if normed and self.layer.layout is not None else None
        device = module.lora_A[names[0]].weight.device
        key = ("up", device, self.layer.layer_idx, which, entry, names, norm is not None)

        def compute() -> torch.Tensor:
            assert self.layer.layout is not None
            up = _up_projection(module, entry, names, self.layer.layout.head_dim, self.layer.columns(which))
            return up if norm is None else norm.scaled(up)

        return cast(torch.Tensor, self.forward_pass.attachment.cached_weights(key, compute))

    def _numbers_of_norm(self, which: str, none: float) -> torch.Tensor:
        """The agent's "gain" or "delta_gain" (B, Hk or 1, T, 1), or its "shift" (B, T, Hk or 1); there is one adapter, or one
        entry for several. Rows without an adapter, which read the base key as it is, have ``none``."""
        now = self.forward_pass
        module = self.layer.projection("k_proj")
        if now.rows is not None:
            sources = self._sources_of_rows(module, lambda entry: not entry.shared)
            parts = [(self._entries(entry.key, which), rows) for entry, rows in sources]
            return join_rows(parts, parts[0][0].shape[-1], fill=none)
        for entry, names in now.readers:
            if not entry.shared and peft_adapters.names_on(module, names):
                return self._entries(entry.key, which)
        raise RuntimeError(f"{self.layer.name}: nobody computed the norms of its keys")

    def _with_shifts(
        self, low_rank: torch.Tensor, up: torch.Tensor, norm: KeyNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries (B, T, r) and up-projections ([n,] Hk, r, D) of keys, and behind them those of the norm's bias."""
        if norm.bias is None:
            return low_rank, up
        now = self.forward_pass
        key = ("with bias", up.device, self.layer.layer_idx, now.agent, tuple(now.readers))
        shift = self._numbers_of_norm("shift", 0.0).to(low_rank.dtype)
        return torch.cat((low_rank, shift), dim=-1), now.attachment.cached_weights(key, partial(norm.with_bias, up))

    def _rope(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos/sin of the tokens that the layer reads."""
        now, slot = self.forward_pass, self.slot
        name = now.rope_key(self.layer, device)
        key = (name, self.start, None if slot is None else id(slot))
        found = now.ropes.get(key)
        if found is None:
            cos, sin = now.cache._rope_buffers(name)
            if slot is None:
                found = cos.view(now.stop, self.start), sin.view(now.stop, self.start)
            elif slot.first is None:
                found = cos.view(self.seen), sin.view(self.seen)
            else:
                # They are few numbers, once for all layers, so those of all tokens are kept; a window of them begins anywhere.
                assert cos.data is not None and sin.data is not None
                places = torch.arange(self.seen, device=cos.device) + slot.first
                places = places.clamp_(max=cos.capacity - 1)
                found = cos.data.index_select(-2, places), sin.data.index_select(-2, places)
            now.ropes[key] = found
        return found

    def _mask_of_window(self, mask: torch.Tensor, keys: int) -> torch.Tensor:
        """A mask of the caller's own covers all tokens; a sliding layer has only its last ones."""
        now = self.forward_pass
        if self.slot is not None or mask.dim() != 4 or mask.shape[-1] == keys:
            return mask
        if mask.shape[-1] != now.stop:
            window = f", or {keys}, one for each that {self.layer.name} reads" if self.slides else ""
            raise TrajectoryError(
                f"the attention_mask has {mask.shape[-1]} columns, expected {now.stop}, one for each token, cached or new{window}"
            )
        hidden = mask[..., : now.stop - keys]
        visible = hidden if hidden.dtype == torch.bool else hidden > torch.finfo(hidden.dtype).min / 2
        if bool(visible.any()):
            raise TrajectoryError(
                f"the attention_mask shows {self.layer.name} tokens before {now.stop - keys}, which are outside of its sliding "
                f"window of {self.storage.window} and not kept. Mask them, or leave the attention_mask to the model"
            )
        return mask[..., now.stop - keys :]

    def _expanded_keys(
        self,
        key: torch.Tensor,
        low_rank: torch.Tensor,
        up: torch.Tensor,
        gain: torch.Tensor | None,
        delta_gain: torch.Tensor | None,
    ) -> torch.Tensor:
        """Base plus low-rank keys (B, Hk, T, D) of the tokens that the layer reads; only those not yet expanded are computed."""
        now, storage, layout = self.forward_pass, self.storage, self.layer.layout
        assert layout is not None
        first = self.start
        if storage.expanded.start > first or storage.expanded_length < first:
            storage.release_expanded()
        expanded, start = storage.expanded, max(first, min(storage.expanded_length, now.start))
        low_rank, base = low_rank[:, start - first :], key[:, :, start - first :]
        delta = low_rank[:, None].to(up.dtype) @ up
        if layout.rotary_dim:
            cos, sin = (t[:, start - first :].to(up.dtype) for t in self._rope(key.device))
            delta = layout.rotate(delta, cos, sin)
        if layout.key_norm is not None and layout.key_norm.rotated_weight is not None:
            delta = delta * layout.key_norm.rotated_weight.to(delta.dtype)[:, None]
        if gain is not None and delta_gain is not None:
            base = base * gain[:, :, start - first :, None]
            delta = delta * delta_gain[:, :, start - first :, None]
        new = (delta + base).to(key.dtype)
        # What is kept for speed alone is never needed back.
        if expanded.append(start, new, now.keep_from, 0):
            out = new if start == first else torch.cat((expanded.view(start, first), new), dim=2)
            expanded.commit()
        else:
            out = expanded.view(now.stop, first)
        storage.expanded_length = now.stop
        return out


def _same_wide_dtype(*tensors: Any) -> bool:
    """Whether all tensors among these are float32, or float64: sums in 16 bits would round more than the reference's."""
    dtypes = {t.dtype for t in tensors if isinstance(t, torch.Tensor)}
    return dtypes in ({torch.float32}, {torch.float64})


class DownPart(NamedTuple):
    """The columns of ``A x`` that become one entry: its place among those pending, whether a column of ones follows, and which
    columns are those of each row."""

    place: int
    ones: bool
    of_rows: RowColumns | None


@dataclass(eq=False)
class DownPlan:
    """The down-projections of one layer input.

    Attributes:
        weight: (sum of ranks, in_features), the A's of all entries below each other, and those of queries.
        ranks: rows of each.
        parts: what becomes of each; queries have none.
        queries: adapters of a fused projection whose part is added to the queries.
        joint, joint_ranks: on the first of two projections, which may well be given the same input: both weights, both's ranks.
        common: whoever runs writes these entries for others too: the same products in everybody's steps.
    """

    weight: torch.Tensor
    ranks: list[int]
    parts: list[DownPart]
    queries: tuple[str, ...]
    common: bool
    joint: torch.Tensor | None = None
    joint_ranks: list[int] = field(default_factory=list)


def _down_plans(layer: AttentionLayer, entries: list[Entry], agent: tuple[str, ...]) -> dict[str, DownPlan | None]:
    """For each projection :func:`_down_plan`; A's that had to be stacked, of keys and of values, in one piece of memory."""
    plans = {which: _down_plan(layer.projection(which), entries, agent) for which in layer.modules}
    stacked = [plan for plan in plans.values() if plan is not None and len(plan.ranks) > 1]
    if len({(plan.weight.dtype, plan.weight.device, plan.weight.shape[1]) for plan in stacked}) == 1:
        joint = torch.cat([plan.weight for plan in stacked])
        for plan, piece in zip(stacked, joint.split([len(plan.weight) for plan in stacked]), strict=True):
            plan.weight = piece
        if len(stacked) > 1:
            stacked[0].joint, stacked[0].joint_ranks = joint, [rank for plan in stacked for rank in plan.ranks]
    return plans


def _down_plan(module: Any, entries: list[Entry], agent: tuple[str, ...]) -> DownPlan | None:
    """The plan of one projection for the entries that are pending; None: nothing is computed of its input.

    Args:
        agent: of a fused projection: the active adapters, whose part is added to the queries.
    """
    queries = tuple(peft_adapters.names_on(module, agent))
    weights: list[torch.Tensor] = []
    parts: list[DownPart] = []
    stored = [entry for entry in entries if not entry.gains]
    for place, entry in enumerate(entries):
        names = peft_adapters.names_on(module, entry.names)
        if entry.gains or not names:
            continue
        if entry.rows is not None:
            weight, columns = row_columns(module, entry.rows, names)
            parts.append(DownPart(place, False, columns))
        else:
            # Adapters that share A are represented by the first that adapts this layer.
            down = peft_adapters.down_projection(module, names[:1] if entry.shared else names)
            weight = down.weight
            parts.append(DownPart(place, down.ones, None))
        weights.append(weight)
    if queries:
        weights.append(peft_adapters.down_projection(module, queries).weight)
    if not weights:
        return None
    common = not queries and (len(stored) > 1 or stored[0].shared) and all(entry.rows is None for entry in stored)
    joint = weights[0] if len(weights) == 1 else torch.cat([w.to(weights[0].dtype) for w in weights])
    return DownPlan(joint, [len(w) for w in weights], parts, queries, common)


def _up_projection(
    module: Any, entry: Entry, names: tuple[str, ...], head_dim: int, columns: torch.Tensor | None
) -> torch.Tensor:
    on_module = peft_adapters.names_on(module, entry.names)
    computed_with = on_module[:1] if entry.shared else on_module
    ones = any(module.lora_bias.get(name, False) for name in computed_with)
    return peft_adapters.up_projection(module, names, head_dim, entry.shared, ones, columns)
