"""One forward pass with a shared cache: what it runs, reads and writes, committed only at its end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch

from .adapters import Agent, rows_of
from .attachment import Attachment, AttentionLayer
from .errors import UnsupportedModelError
from .invocation import Starts
from .layout import angles_of
from .policies import Entry, EntryKey
from .products import DownProducts

if TYPE_CHECKING:
    from .cache import SharedLoRACache

# Stands beside the layer types in the table of what is known of how many tokens.
NORMS = "norms of base keys"


@dataclass(frozen=True)
class Slot:
    """Where a decode step's new token, or a block of them, goes, for steps whose lengths only the device knows (``graphs.py``).

    Attributes:
        index: () int64, position of the first one in the trajectory.
        length: (B,) int64, tokens including them; the same for all rows.
        capacity: tokens that fit into every buffer; what the layers see has this length.
        first: () int64, trajectory position of the buffers' first token; None: 0.
        window: the same for sliding layers that keep only their last tokens; None: there are none.
    """

    index: torch.Tensor
    length: torch.Tensor
    capacity: int
    first: torch.Tensor | None = None
    window: Slot | None = None


@dataclass
class ForwardPass:
    """A forward pass under way.

    Attributes:
        attachment, cache, agent: which model, cache and adapters.
        start, stop: the tokens that are run, as positions in the trajectory.
        previous: T before the pass; tokens from there on get base K/V.
        writers: low-rank caches (and the agent's own K and V) that are written, with the position from which tokens are new
            to them.
        readers: those that the agent reads, with the adapters that read them in low rank.
        group: adapters that have one A in common; see ``Policy``.
        zeros_from: tokens from there up to ``start`` get entries that are zeros.
        invocations: where an adapter that is active from an invocation on (aLoRA) starts in each row; None: another agent.
        ids: (B, n) of tokens ``start ... stop``, -1 where unknown.
        positions: (B or 1, n) position ids of them, or None: consecutive.
        attention_mask: (B, m) bool or None, as given.
        padded: whether it holds padding.
        entered_from_inside: the model was attached in the middle of this very pass, so its end is the last layer's.
        first_ropes: by :meth:`rope_key` cos/sin of the pass's tokens as they were when these were run first, (B or 1, n, width).
        rope_lengths: the :meth:`rope_key` of cos/sin that were stored in this pass (and ``NORMS``, if those of base keys were),
            with the tokens that are then known.
        slot: set in a step whose lengths only the device knows.
        products: set with it, how such a step computes its down-projections.
        lengths: tokens of each entry before the pass.
        window_start: first token that sliding layers read.
        keep_from: sliding layers need not store tokens before this one.
        mark: start of the turn, to which ``crop`` can always go back.
        blind: the tokens before the pass are no longer held by sliding layers. Such a pass only walks through tokens that are
            covered; nothing of it is stored, and its output is made unusable.
        staged: a sliding layer has something to let go of when the pass is committed.
        stored: attention layers that have given K and V to the cache.
        block: tokens of the captured block that the pass runs as, at least its own; 0: it does not.
    """

    attachment: Attachment
    cache: SharedLoRACache
    agent: Agent
    start: int
    stop: int
    previous: int
    writers: list[tuple[Entry, int]]
    readers: list[tuple[Entry, tuple[str, ...]]]
    group: tuple[str, ...]
    zeros_from: dict[EntryKey, int]
    invocations: Starts | None
    ids: torch.Tensor
    positions: torch.Tensor | None
    attention_mask: torch.Tensor | None
    padded: bool
    entered_from_inside: bool = False
    rope_lengths: dict[str, int] = field(default_factory=dict)
    slot: Slot | None = None
    products: DownProducts | None = None
    lengths: dict[EntryKey, int] = field(default_factory=dict)
    window_start: int = 0
    keep_from: int = 0
    mark: int = 0
    blind: bool = False
    staged: bool = False
    stored: int = 0
    block: int = 0
    ropes: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    first_ropes: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> tuple[str, ...] | None:
        """The adapter of each row, or None: all rows have the same."""
        return rows_of(self.agent)

    @cached_property
    def pending(self) -> list[tuple[Entry, int]]:
        """The entries of which numbers are computed in this pass, and from which token on; sliding layers may have more."""
        return [(entry, start) for entry, start in self.writers if start < self.stop]

    @cached_property
    def plans(self) -> dict[Any, Any]:
        """:meth:`plans_for` the pending entries."""
        return self.plans_for(self.pending)

    def plans_for(self, pending: list[tuple[Entry, int]]) -> dict[Any, Any]:
        """What layers have worked out for passes of this agent that write these entries; forgotten when weights change."""
        key = ("plans", self.agent, tuple(self.readers), tuple([entry for entry, _ in pending]))
        return cast(dict[Any, Any], self.attachment.cached_weights(key, dict))

    @property
    def alora_offsets(self) -> list[int | None]:
        """The same as PEFT's argument: counted from the last token that is run."""
        starts = self.invocations or ()
        return [self.stop - start if start is not None and start < self.stop else None for start in starts]

    def only(self, column: int) -> ForwardPass:
        """One of its tokens as a pass of its own, once those before it are part of the cache."""
        at = self.start + column
        window_start, blind = self.cache._window_before(self.agent, at)
        return replace(
            self,
            start=at,
            stop=at + 1,
            previous=at,
            writers=[(entry, at) for entry, _ in self.writers],
            ids=self.ids[:, column : column + 1],
            positions=None if self.positions is None else self.positions[:, column : column + 1],
            lengths=dict(self.cache._coverage),
            window_start=window_start,
            blind=blind,
            keep_from=self.cache._keep_from(at + 1),
            rope_lengths={},
            ropes={},
            first_ropes={},
            stored=0,
            block=0,
        )

    def check_layers(self) -> None:
        """Refuse a pass in which some attention layers have not stored their tokens.

        Raises:
            UnsupportedModelError: with how many.
        """
        if self.stored != len(self.attachment.layers):
            raise UnsupportedModelError(
                f"{self.stored} of {len(self.attachment.layers)} attention layers gave keys and values to the SharedLoRACache: "
                "gradient checkpointing in training mode keeps it from them, or layers were skipped. Call model.eval(), or run "
                "the whole model"
            )

    def commit(self) -> None:
        """Make the pass's tokens part of the cache."""
        self.cache._commit(self)

    def rope_key(self, layer: AttentionLayer, device: torch.device) -> str:
        """Under which name cos/sin of a layer on this device are stored: each device of a spread model has its own."""
        return layer.rope_key if device == self.ids.device else f"{layer.rope_key} on {device}"

    def first_rope(self, layer: AttentionLayer, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The layer's arguments with the cos/sin that tokens had when they were run first, where the model would take others now.

        A rotation that changes with the length of the text (dynamic, longrope) gives tokens that are run again another one than
        cached keys have.
        """
        if not self.attachment.rotation_changes:
            return kwargs
        embeddings = kwargs.get("position_embeddings")
        if not isinstance(embeddings, tuple | list) or len(embeddings) != 2:
            return kwargs
        key = f"{self.rope_key(layer, embeddings[0].device)}, as the model gives it"
        if key not in self.first_ropes:
            stored = self.start if self.slot is not None else self.cache._rope_length.get(key, 0)
            known = min(stored, self.stop) - self.start
            buffers = self.cache._rope_buffers(key)
            given: list[torch.Tensor] = list(embeddings)
            for index, (buffer, angles) in enumerate(zip(buffers, embeddings, strict=True)):
                if self.slot is not None:
                    buffer.put(self.slot.index, angles)
                    continue
                if known > 0:
                    before = buffer.view(self.start + known, self.start)
                    rows = max(before.shape[0], angles.shape[0])
                    given[index] = torch.cat(
                        (before.expand(rows, -1, -1), angles[:, known:].expand(rows, -1, -1)), dim=1
                    )
                if stored < self.stop:
                    buffer.write(stored, angles[:, stored - self.start :])
            self.rope_lengths[key] = max(stored, self.stop)
            self.first_ropes[key] = (given[0], given[1])
        return dict(kwargs, position_embeddings=self.first_ropes[key])

    def store_rope(self, layer: AttentionLayer, kwargs: dict[str, Any]) -> None:
        """Keep cos/sin of new tokens, once for all layers of one type."""
        layout = layer.layout
        embeddings = angles_of(kwargs)
        if embeddings is None or layout is None or layout.rotary_dim == 0:
            return
        key = self.rope_key(layer, embeddings[0].device)
        if key in self.rope_lengths:
            return
        if self.slot is not None:
            # Whether there is something to store was decided before; the host's numbers are not for a captured step.
            self.rope_lengths[key] = self.stop
            for buffer, angles in zip(self.cache._rope_buffers(key), layout.angles(*embeddings), strict=True):
                buffer.put(self.slot.index, angles)
            return
        stored = self.cache._rope_length.get(key, 0)
        if stored < self.start:
            # Nobody needed them for the tokens before; whoever will runs those tokens, and stores them then.
            return
        self.rope_lengths[key] = max(stored, self.stop)
        if stored < self.stop:
            for buffer, angles in zip(self.cache._rope_buffers(key), layout.angles(*embeddings), strict=True):
                buffer.write(stored, angles[:, stored - self.start :])
