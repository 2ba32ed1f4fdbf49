"""``SharedLoRACache``: a Transformers cache that several LoRA agents share on one trajectory."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from . import adapters as peft_adapters
from .adapters import BASE_MODEL, Agent, agent_name, agent_of_rows, names_in, rows_of
from .attach import attach_and_try, attach_untried, attachment_of
from .attachment import AdapterWatch, Attachment
from .buffers import TokenBuffer, WindowBuffer, note_release, window_and_margin
from .errors import SharedCacheError, UnsupportedAdapterError, UnsupportedModelError
from .forward import NORMS, ForwardPass
from .graphs import DecodeGraphs
from .invocation import Starts, first_of, invocation_starts
from .policies import (
    SHARED_ENTRY,
    DownDigests,
    Entry,
    EntryKey,
    Policy,
    Sharing,
    check_private_layers,
    check_sharing,
    entry_name,
    first_difference,
    is_private,
    private_key,
    sharing_group,
)
from .reports import MemoryFootprint
from .run import enter_from_inside
from .scopes import forward_scope, generate_scope, layer_scope
from .storage import SharedCacheBase, SharedLoRALayer, sliding_windows
from .trajectory import Trajectory

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class SharedLoRACache(SharedCacheBase):
    """One KV cache for a base model and all its LoRA adapters.

    Pass it as ``past_key_values`` to ``model.generate`` or to the model. Keys and values of the pretrained weights are
    stored once per token, by whoever processes the token first; per adapter only ``A x`` of its ``k_proj`` and ``v_proj``
    is stored (LRAgent, arXiv 2602.01053). At first use the cache attaches itself to the model it is used with.

    Args:
        model: attach to this model at once; None: at first use.
        sharing: whose low-rank entries are filled by whom: "base_shared" (each agent runs the tokens it has not seen
            again, for its own entries), "base_lr_shared" (one set of entries for all; their A's must be equal),
            "lr_precomputed" (entries of every loaded adapter are computed whenever a token is processed) or "auto"
            ("base_lr_shared" where at least two adapters are loaded and share A, else "base_shared"; decided when the
            first token comes).
        private_layers: indices of attention layers in which nothing is shared and nothing is split: each agent, the base model
            included, keeps full keys and values of its own there. Well-chosen layers bring each agent closer to a cache of its
            own, at their memory once per agent (docs/quality.md; layer 0 is exact anyway). Every agent runs every token itself
            then, so only "base_shared" goes with it ("auto" is the same).
        max_cache_len: allocate room for this many tokens at once and never more; None: grow. Of layers with a sliding window: for
            the window and some more.
        keep_all_tokens: layers with a sliding window keep every token, as full layers do, so that ``crop`` can go back anywhere;
            else they keep what can still be read, and ``crop`` goes back to the start of the turn at least.
        low_rank_dtype: dtype of the low-rank entries, not of private keys and values; None: that of the keys and values.
        check_tokens: compare the model's input with the tokens that are cached, and refuse a contradiction.
        cuda_graphs: on CUDA, replay decode steps (one new token per row) from a captured graph; ``eager_reason`` says where
            that is not possible.

    Raises:
        ValueError: unknown ``sharing``, ``private_layers`` that are no indices or don't go with ``sharing``, ``max_cache_len``
            below 1, or ``low_rank_dtype`` that is not floating. Private layers that the model does not have are refused at
            first use.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        sharing: Sharing = "auto",
        private_layers: Iterable[int] = (),
        max_cache_len: int | None = None,
        keep_all_tokens: bool = False,
        low_rank_dtype: torch.dtype | None = None,
        check_tokens: bool = True,
        cuda_graphs: bool = True,
    ):
        check_sharing(sharing)
        private = check_private_layers(private_layers, sharing)
        if max_cache_len is not None and (not isinstance(max_cache_len, int) or max_cache_len < 1):
            raise SharedCacheError(f"max_cache_len is {max_cache_len!r}, expected a positive number of tokens or None")
        if low_rank_dtype is not None and low_rank_dtype not in _FLOATS:
            raise SharedCacheError(
                f"low_rank_dtype is {low_rank_dtype!r}, expected one of {', '.join(map(str, _FLOATS))}"
            )
        super().__init__(layers=[])
        self.layers: list[SharedLoRALayer] = []  # type: ignore[assignment]
        self.sharing = sharing
        self._private_layers = private
        self._max_cache_len = max_cache_len
        self._keep_all_tokens = bool(keep_all_tokens)
        self._window: int | None = None
        self.low_rank_dtype = low_rank_dtype
        self.check_tokens = check_tokens
        self._attachment: Attachment | None = None
        self._base_changes = 0
        self._graphs = DecodeGraphs(self, enabled=cuda_graphs)
        self._lock = threading.Lock()
        self._in_prompt = False
        # PEFT's offsets of the call under way or the last one, and where its invocations are.
        self._prompt_invocations: tuple[Any, Starts] | None = None
        self._prompt_length = 0
        self._limit: int | None = None
        self._new_turn = False
        # How often sliding layers may have let go of tokens.
        self._windows_at = 0
        self._forget()
        if model is not None:
            attach_and_try(model, private)
            self._bind(attachment_of(model))

    def _forget(self) -> None:
        self._trajectory = Trajectory()
        self._coverage: dict[EntryKey, int] = {}
        self._ropes: dict[str, tuple[TokenBuffer, TokenBuffer]] = {}
        self._rope_length: dict[str, int] = {}
        self._policy: Policy | None = None
        self._down_contents: dict[str, tuple] = {}
        self._down_difference: tuple[int, str, str, str] | None = None
        self._down_digests: dict[str, DownDigests] = {}
        self._shared_down: DownDigests = {}
        # Content of every adapter that processed tokens or has entries, and the first token each processed.
        self._identities: dict[str, tuple] = {}
        self._first_token: dict[str, int] = {}
        self._agents: dict[Agent, None] = {}
        # Where the invocations were with which an aLoRA's entries were computed.
        self._invoked: dict[EntryKey, Starts] = {}
        # Who ran last, with the adapters that matter to it, and how they were.
        self._last_agent: tuple[Agent, tuple[str, ...]] | None = None
        self._last_state: list[tuple[str, AdapterWatch, int]] = []
        # Sliding layers: where the turn began, at which length there is no room for a further token, and whether crop is to
        # be able to undo the passes since it was last called.
        self._mark = 0
        self._windows_at += 1
        self._last_runner: Agent | None = None
        self._full_at: int | None = None
        self._recording = False

    # ---- what users ask --------------------------------------------------------------------------------------------

    @property
    def policy(self) -> str | None:
        """The sharing policy in force; None until the first token decided it ("auto")."""
        return None if self._policy is None else self._policy.name

    @property
    def private_layers(self) -> tuple[int, ...]:
        """Layers in which each agent has keys and values of its own, sorted."""
        return self._private_layers

    @property
    def max_cache_len(self) -> int | None:
        """Capacity in tokens, or None if the cache grows."""
        return self._max_cache_len

    @property
    def keep_all_tokens(self) -> bool:
        """Whether layers with a sliding window keep every token."""
        return self._keep_all_tokens

    @property
    def cuda_graphs(self) -> bool:
        """Whether decode steps are replayed from CUDA graphs where that is possible."""
        return self._graphs.enabled

    @property
    def eager_reason(self) -> str | None:
        """Why the last decode step was not replayed from a CUDA graph; None: it was, there was none, or graphs are off."""
        return self._graphs.eager_reason

    @property
    def trajectory_length(self) -> int:
        """T: tokens that some agent has processed. All of them have base K/V (but on private layers)."""
        return self._trajectory.length

    @property
    def token_ids(self) -> torch.Tensor | None:
        """(B, T) int64, the tokens of the trajectory; -1 where only embeddings were given. None while empty."""
        return self._trajectory.token_ids

    @property
    def rows(self) -> int:
        """B, the batch size; 0 while empty."""
        return self._trajectory.rows

    def coverage(self) -> dict[str, int]:
        """Leading trajectory tokens that each agent need not run again.

        With private layers every agent covers only what it has run itself, the base model and adapters without k and v too.

        Returns:
            Tokens by adapter name; "__base__" is the base model, "a+b" a combination of adapters that has run, "[a, b, __base__]"
            a batch whose rows have run with adapters of their own.
        """
        if self._attachment is None:
            return {}
        self._look_for_changes()
        agents: list[Agent] = [(), *((name,) for name in self._attachment.adapters())]
        agents += [agent for agent in self._agents if len(agent) > 1]
        return {agent_name(agent): self._covered(agent) for agent in agents}

    def memory_footprint(self) -> MemoryFootprint:
        """Bytes in use, and what one ``DynamicCache`` per agent would take.

        Returns:
            A dict with "base", "low_rank" (by adapter; "*" is the one that adapters with a common A share, "*+name" what an
            adapter needs besides on a model that normalises keys), "private" (K/V of private layers, by agent; "__base__" is the
            base model), "expanded_keys" (kept on the CPU for the agent that ran last), "positions" (cos/sin, token ids, norms
            of base keys), "total" (their sum), "allocated" (with the slack of growing storage) and "non_shared" (as many
            ``DynamicCache`` of the trajectory as agents have run). Layers with a sliding window count with the tokens that are
            held there.
        """
        length = self.trajectory_length
        low_rank: dict[str, int] = {}
        private: dict[str, int] = {}
        base = expanded = allocated = full = 0
        for layer in self.layers:
            base += layer.base_keys.nbytes(length) + layer.base_values.nbytes(length) + layer.tails_nbytes()
            expanded += layer.expanded.nbytes(layer.expanded_length)
            allocated += sum(buffer.nbytes() for buffer in layer.buffers()) + layer.tails_nbytes()
            if layer.is_initialized:
                # DynamicCache keeps the window without the next token.
                tokens = length if layer.window is None else min(length, layer.window - 1)
                full += layer.width * layer.dtype.itemsize * self.rows * tokens
            for key, parts in layer.entries.items():
                tokens = self._coverage.get(key, 0)
                into, name = private if is_private(key) else low_rank, entry_name(key)
                into[name] = into.get(name, 0) + sum(b.nbytes(tokens) for b in parts.values())
        ropes = [buffer for pair in self._ropes.values() for buffer in pair]
        positions = sum(buffer.nbytes(length) for buffer in ropes) + self._trajectory.nbytes()
        positions += sum(layer.base_rms.nbytes(length) for layer in self.layers)
        allocated += sum(buffer.nbytes() for buffer in ropes) + self._trajectory.nbytes(allocated=True)
        return MemoryFootprint(
            base=base,
            low_rank=low_rank,
            private=private,
            expanded_keys=expanded,
            positions=positions,
            total=base + sum(low_rank.values()) + sum(private.values()) + expanded + positions,
            allocated=allocated,
            non_shared=full * max(1, len(self._agents)),
        )

    def drop_adapter(self, name: str) -> None:
        """Release the low-rank entries of an adapter, and its K/V of private layers; its next turn runs the trajectory again.

        Entries that adapters with a common A share are released with the last of them. Where there are private layers,
        "__base__" releases those of the base model.

        Raises:
            ValueError: neither the model nor the cache knows the adapter.
        """
        self._not_while_running("drop_adapter")
        if name == BASE_MODEL and self.private_layers:
            self._drop_keys([private_key(())])
            self._agents.pop((), None)
            return
        loaded = self._attachment.adapters() if self._attachment is not None else ()
        if name not in loaded and name not in self._identities and not any(name in key for key in self._coverage):
            known = ", ".join(map(repr, sorted({*loaded, *self._identities}))) or "none"
            raise SharedCacheError(f"drop_adapter: no adapter {name!r}; known are {known}")
        self._drop_entries(name)
        if name not in self._first_token:
            # Of who processed tokens the content stays known: should it change, those tokens are of weights that are gone.
            self._identities.pop(name, None)

    # ---- the contract of Cache -------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Coverage of the active adapter: tokens that the model need not be given again."""
        now = forward_scope.get()
        if now is not None and now.cache is self:
            # On the device where the host must not know; Transformers' StaticCache does the same.
            return now.start if now.slot is None else now.slot.index
        if self._first_use():
            return 0
        if self._attachment is None:
            return 0
        if not self._in_prompt:
            self._look_for_changes()
        return self._told_length()

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first query."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(kv_length, kv_offset) of what ``update`` will return; the offset is that of a sliding layer's window."""
        now = forward_scope.get()
        inside = now is not None and now.cache is self
        slides = layer_idx < len(self.layers) and self.layers[layer_idx].window is not None
        if inside and now.slot is not None:
            if slides and now.slot.window is not None:
                return now.slot.window.capacity, now.slot.window.first
            return now.slot.capacity, 0
        stop = self.get_seq_length() + query_length
        if not slides:
            return stop, 0
        first = now.window_start if inside else self._window_start(stop - query_length)
        return stop - first, first

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Capacity in tokens, -1 if it grows."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by attention layers with base K/V (B, Hk, n, D), K after RoPE; returns those of all tokens so far.

        Raises:
            UnsupportedModelError: the calling layer is not attached.
        """
        scope = layer_scope.get()
        if scope is None or getattr(scope, "forward_pass", None) is None or scope.forward_pass.cache is not self:
            raise UnsupportedModelError(
                f"layer {layer_idx} gave keys and values to a SharedLoRACache from outside of an attached attention layer. Call "
                "attach(model) before the model is compiled or wrapped"
            )
        return scope.update(key_states, value_states)

    def reset(self) -> None:
        """Forget the trajectory and all entries; the cache stays attached and can be filled again."""
        self._not_while_running("reset")
        for layer in self.layers:
            layer.reset()
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of the trajectory, for all agents.

        Layers with a sliding window keep no more than can still be read, so there it can go back some tokens (an eighth of the
        window, at least 64) or to the start of the turn: the last ``generate``, or outside of one the last call with several
        new tokens or with another agent than before. ``keep_all_tokens=True`` lifts that.

        Args:
            tokens_to_remove: zero or negative, as in Transformers: ``crop(-3)`` removes three tokens.

        Raises:
            ValueError: positive, more tokens than there are, or back to where a sliding layer no longer holds the window.
        """
        self._not_while_running("crop")
        # Assisted decoding brings a tensor (Transformers 5.17); lengths are the host's.
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise SharedCacheError(
                f"crop({tokens_to_remove}): pass the negative number of tokens to remove, e.g. crop(-{tokens_to_remove})"
            )
        if -tokens_to_remove > self.trajectory_length:
            raise SharedCacheError(
                f"crop({tokens_to_remove}): the trajectory has only {self.trajectory_length} tokens; reset() removes all"
            )
        length = self.trajectory_length + tokens_to_remove
        if not self._can_go_back(length):
            raise SharedCacheError(
                f"crop({tokens_to_remove}): layers with a sliding window no longer hold what comes before token {length}. It can "
                f"go back {self._way_back()}; reset() removes all, and SharedLoRACache(keep_all_tokens=True) can go back anywhere"
            )
        recorded, self._recording = self._recording, False
        self._truncate(length)
        self._recording = recorded

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the batch rows ``beam_idx`` (beam search), of all agents."""
        self._not_while_running("reorder_cache")
        with self._all_or_nothing():
            self._select_rows(beam_idx)
            self._trajectory.forget_padding_if_none()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch rows ``indices``, of all agents.

        Args:
            indices: of rows, or a bool for each row, as ``DynamicCache`` takes them.

        Raises:
            ValueError: there are no such rows, or none is kept.
        """
        self._not_while_running("batch_select_indices")
        if not self.trajectory_length:
            return
        try:
            chosen = torch.arange(self.rows)[torch.as_tensor(indices).cpu()].reshape(-1)
        except IndexError as error:
            raise SharedCacheError(f"batch_select_indices: the cache holds {self.rows} rows; {error}") from error
        if not len(chosen):
            raise SharedCacheError("batch_select_indices: no row is kept; reset() removes all")
        with self._all_or_nothing():
            self._select_rows(chosen)
            self._trajectory.forget_padding_if_none()

    def _select_rows(self, indices: torch.Tensor) -> None:
        for layer in self.layers:
            layer.batch_select_indices(indices)
        for buffer in self._rope_buffers_all():
            buffer.select_rows(indices)
        self._trajectory.select_rows(indices)
        self._invoked.clear()
        if self._has_rows_of_their_own():
            chosen = indices.tolist()
            self._rename_rows(lambda rows: [rows[index] for index in chosen])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch row ``repeats`` times in a row, of all agents.

        Raises:
            ValueError: ``repeats`` below 1.
        """
        self._not_while_running("batch_repeat_interleave")
        if repeats < 1:
            raise SharedCacheError(f"batch_repeat_interleave({repeats}): expected at least 1; reset() removes all")
        with self._all_or_nothing():
            for layer in self.layers:
                layer.batch_repeat_interleave(repeats)
            for buffer in self._rope_buffers_all():
                buffer.repeat_rows(repeats)
            self._trajectory.repeat_rows(repeats)
            self._invoked.clear()
            self._rename_rows(lambda rows: [name for name in rows for _ in range(repeats)])

    def _has_rows_of_their_own(self) -> bool:
        return any(rows_of(agent) for agent in self._agents)

    def _rename_rows(self, new_rows: Callable[[tuple[str, ...]], list[str]]) -> None:
        """After a change of the rows: what belongs to adapters by rows belongs to those of the rows as they are now.

        Where an adapter has no row any more, it is dropped: the agent that is left runs the trajectory again.
        """
        renamed: dict[Agent, Agent] = {}
        for agent in self._agents:
            rows = rows_of(agent)
            if rows is not None:
                new = agent_of_rows(new_rows(rows))
                renamed[agent] = new if set(rows_of(new) or ()) == set(rows) else ()
        if all(old == new for old, new in renamed.items()):
            return
        # Captured steps know entries by their keys and where they are.
        self._graphs.clear()
        keys: dict[EntryKey, EntryKey] = {}
        for old, new in renamed.items():
            keys.update({old: new, private_key(old): private_key(new) if new else ()})
        # Two agents may have become one: the one that covers more stays.
        order = sorted((key for key in keys if key in self._coverage), key=lambda key: self._coverage[key])
        taken = [(key, self._coverage.pop(key)) for key in order]
        self._coverage.update({keys[key]: tokens for key, tokens in taken if keys[key]})
        for layer in self.layers:
            parts = [(keys[key], layer.entries.pop(key)) for key in order if key in layer.entries]
            layer.entries.update({key: part for key, part in parts if key})
            tails = [(keys[key], layer.tails.pop(key)) for key in order if key in layer.tails]
            layer.tails.update({key: tail for key, tail in tails if tail.end == self._coverage.get(key)})
        self._agents = {
            renamed.get(agent, agent): None for agent in self._agents if renamed.get(agent, agent) or not agent
        }
        if self._expanded_agent in renamed:
            for layer in self.layers:
                layer.release_expanded()
            self._expanded_agent = None
        self._last_agent = self._last_runner = None

    def activate_past_recording(self) -> None:
        """Layers with a sliding window let go of nothing that comes in until ``crop`` is called; ends with ``generate``."""
        self._recording = True

    def _refuse_state(self, *args: Any, **kwargs: Any) -> Any:
        """Asked for by layers with linear attention, convolutions or state spaces.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            "a layer of this model keeps a recurrent or convolution state besides keys and values. It belongs to one adapter and "
            "can't be shared; use a DynamicCache per adapter"
        )

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = _refuse_state
    has_previous_state = _refuse_state

    @property
    def is_compileable(self) -> bool:
        """False: ``generate`` must not compile the model for this cache by itself."""
        self._first_use()
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """Which layers read a sliding window."""
        self._first_use()
        return [layer.is_sliding for layer in self.layers]

    @property
    def is_initialized(self) -> bool:
        """Whether anything is cached."""
        return self.trajectory_length > 0

    @property
    def is_croppable(self) -> bool:
        """True: ``crop`` leaves no trace."""
        return True

    @property
    def batch_size(self) -> int:
        """B; -1 while empty."""
        return self.rows or -1

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: storage is allocated with the first tokens."""

    def __repr__(self) -> str:
        covered = ", ".join(f"{agent_name(a)}: {self._covered(a)}" for a in self._agents)
        private = f"private_layers={self.private_layers}, " if self.private_layers else ""
        return (
            f"SharedLoRACache(sharing={self.sharing!r}, policy={self.policy!r}, {private}rows={self.rows}, "
            f"tokens={self.trajectory_length}, coverage={{{covered}}})"
        )

    def __deepcopy__(self, memo: dict) -> SharedLoRACache:
        """An independent copy of what is cached, attached to the same model."""
        self._not_while_running("deepcopy")
        copy = SharedLoRACache(
            sharing=self.sharing,
            private_layers=self.private_layers,
            max_cache_len=self.max_cache_len,
            keep_all_tokens=self.keep_all_tokens,
            low_rank_dtype=self.low_rank_dtype,
            check_tokens=self.check_tokens,
            cuda_graphs=self.cuda_graphs,
        )
        memo[id(self)] = copy
        copy._attachment, copy._base_changes = self._attachment, self._base_changes
        copy.layers = [layer.clone(copy) for layer in self.layers]
        copy._trajectory = self._trajectory.clone()
        copy._ropes = {key: (cos.clone(), sin.clone()) for key, (cos, sin) in self._ropes.items()}
        copy._policy, copy._last_agent, copy._last_state = self._policy, self._last_agent, self._last_state
        copy._window, copy._mark, copy._full_at = self._window, self._mark, self._full_at
        copy._last_runner, copy._recording = self._last_runner, self._recording
        for name in ("_coverage", "_rope_length", "_identities", "_first_token", "_agents", "_invoked"):
            setattr(copy, name, dict(getattr(self, name)))
        copy._down_difference = self._down_difference
        for name in ("_down_contents", "_down_digests", "_shared_down"):
            setattr(copy, name, dict(getattr(self, name)))
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Asked for by ``pickle``, ``torch.save`` and ``copy.copy``.

        Raises:
            SharedCacheError: always.
        """
        raise SharedCacheError(
            "a SharedLoRACache can't be pickled, saved or copied by copy.copy: it belongs to a model in this process. "
            "copy.deepcopy(cache) forks it; elsewhere make a new cache and run cache.token_ids with it"
        )

    # ---- first use -------------------------------------------------------------------------------------------------

    def _bind(self, attachment: Attachment | None) -> None:
        assert attachment is not None
        if self._attachment is attachment:
            return
        self._base_changes = attachment.base_changes
        if self._attachment is not None and self._attachment.decoder is attachment.decoder:
            # The model was detached and attached again; what is cached is still its own.
            self._attachment = attachment
            self._graphs.clear()
            return
        self._check_model(attachment.root)
        beyond = [index for index in self.private_layers if index not in attachment.layers]
        if beyond:
            raise SharedCacheError(
                f"private_layers has {beyond[0]}, but {type(attachment.root).__name__} has the attention layers 0 to "
                f"{len(attachment.layers) - 1}. Make a cache with indices of these"
            )
        self._graphs.clear()
        windows = sliding_windows(attachment.decoder.config)
        # One mask serves all sliding layers, so they hold the same tokens.
        self._window = max(windows.values(), default=None)
        self.layers = [
            SharedLoRALayer(
                self, self.max_cache_len, self._window if index in windows else None, not self.keep_all_tokens
            )
            for index in range(len(attachment.layers))
        ]
        self._forget()
        self._attachment = attachment

    def _check_model(self, root: nn.Module) -> None:
        if self._attachment is None or not self.trajectory_length:
            return
        if not any(module is self._attachment.decoder for module in root.modules()):
            raise SharedCacheError(
                f"this cache holds {self.trajectory_length} tokens of another {type(self._attachment.root).__name__}; use one "
                "SharedLoRACache per model, or cache.reset()"
            )

    def _first_use(self) -> bool:
        """Attach to the model that is calling, if it is not attached yet; True if a pass was entered from inside.

        No argument of the cache's methods names the model, so the callers' frames are asked: the innermost Transformers
        model on the stack that has this cache, and the outermost one that contains it.
        """
        now = forward_scope.get()
        if self._in_prompt or (now is not None and now.cache is self):
            return False
        if torch.compiler.is_compiling():
            raise UnsupportedModelError("call lora_shared_cache.attach(model) before torch.compile")
        inner, root, decoder_frame = self._calling_model(sys._getframe(2))
        if root is None or (self._attachment is not None and self._attachment.contains(inner)):
            return False
        self._check_model(root)
        attach_untried(root)
        attachment = attachment_of(root)
        assert attachment is not None
        self._bind(attachment)
        if decoder_frame is None:
            if self.trajectory_length:
                # Only what generate cuts off its prompt would be left to compare with the trajectory.
                raise SharedCacheError(
                    f"{type(root).__name__}.generate was called before the model was attached, with a cache that holds "
                    f"{self.trajectory_length} tokens already, so its prompt could not be checked. It is attached now: call "
                    "generate again"
                )
            return False
        if inner is not attachment.decoder:
            raise UnsupportedModelError(
                f"the cache was first used inside of {type(inner).__name__}; call lora_shared_cache.attach(model) before"
            )
        enter_from_inside(attachment, self, dict(decoder_frame.f_locals))
        return True

    def _calling_model(self, frame: FrameType | None) -> tuple[Any, Any, FrameType | None]:
        """The Transformers model that called, the outermost one around it, and the former's running forward, if any."""
        inner = root = decoder_frame = None
        while frame is not None:
            # Reading a frame's locals keeps them alive until it returns (before Python 3.13), so a user's are left alone.
            library = frame.f_globals.get("__name__", "").partition(".")[0] in ("transformers", "peft")
            if not (library or frame.f_code.co_name in ("forward", "generate")):
                frame = frame.f_back
                continue
            module = frame.f_locals.get("self")
            if isinstance(module, PeftModel):
                peft_adapters.check_no_virtual_tokens(module.peft_config)
            elif isinstance(module, PreTrainedModel):
                if inner is None:
                    if not _mentions(frame.f_locals, self):
                        break
                    inner = root = module
                elif module is not root and any(m is root for m in module.modules()):
                    root = module
                if frame.f_code.co_name == "forward" and module is inner:
                    decoder_frame = frame
            frame = frame.f_back
        return inner, root, decoder_frame

    # ---- turns -----------------------------------------------------------------------------------------------------

    def _start_turn(self, attachment: Attachment, whole: bool) -> Agent:
        """Look at the adapters before tokens are processed; returns the agent.

        Args:
            attachment: the model.
            whole: read the adapters' content anew, not only what shows without reading it (once per ``generate``).

        Raises:
            UnsupportedAdapterError: the split can't express the present state.
        """
        as_before = attachment.same_adapters()
        if not as_before:
            attachment.refresh()  # what is said of layers that are gone (merged and unloaded) is of no use
        agent = attachment.agent()
        peft_adapters.check_not_merged(attachment.lora_layers)
        if attachment.decoder.training:
            peft_adapters.check_no_dropout(attachment.lora_layers, agent)
        # Of an empty cache `generate` has not asked anything yet.
        if self.trajectory_length and (self._in_prompt or not whole):
            same = self._policy is not None and (agent, self._watched(agent)) == self._last_agent
            if same and as_before and attachment.unchanged(self._last_state):
                return agent
        self._graphs.start_turn()
        attachment.refresh()
        agent = attachment.agent()
        contents = self._read_contents(attachment, agent)
        self._drop_changed(attachment, contents)
        policy = self._resolve(attachment, contents)
        reads = {name for entry, _ in policy.readers(agent) for name in entry.names}
        writes = {name for entry in policy.writers(agent) for name in entry.names}
        attachment.check_adapters(agent, reads | writes, contents, self.private_layers)
        if policy.key_norm and policy.name != "base_shared":
            attachment.check_one_adapter_on_keys(agent, policy.name)
        self._policy = policy
        # Whose weights what is written depends on: with norms of keys also on the B's of those who share A.
        written_for = writes if policy.name == "lr_precomputed" or policy.key_norm else ()
        for name in {*names_in(agent), *written_for}:
            if name not in self._identities:
                self._identities[name] = (
                    contents[name] if name in contents else attachment.content_digests([name])[name]
                )
        self._last_agent = (agent, self._watched(agent))
        self._last_state = attachment.state(self._watched(agent))
        return agent

    def _watched(self, agent: Agent) -> tuple[str, ...]:
        """Adapters whose weights the agent's next token depends on."""
        group = () if self._policy is None else self._policy.group
        return tuple(sorted({*names_in(agent), *group}))

    def _look_for_changes(self) -> None:
        """Drop what a changed or deleted adapter left, when nothing is running."""
        now = forward_scope.get()
        if self._attachment is not None and self.trajectory_length and not (now is not None and now.cache is self):
            attachment, policy = self._attachment, self._policy
            attachment.refresh()
            contents = self._read_contents(attachment, ())
            self._drop_changed(attachment, contents)
            names = attachment.adapters_on_keys_or_values()
            if policy is not None and names != policy.adapters:
                # Whether a newcomer is refused is decided when it runs; until then it just has no entries.
                activated = tuple(name for name in names if name in attachment.invocation_tokens())
                if policy.name == "base_lr_shared":
                    plain = tuple(name for name in names if name not in activated)
                    self._read_down_projections(attachment, plain, contents)
                    group = self._regroup(self._down_digests)
                else:
                    group = ()
                norm = attachment.normalises_adapted_keys()
                self._policy = replace(policy, adapters=names, group=group, key_norm=norm, activated=activated)

    def _read_contents(self, attachment: Attachment, agent: Agent) -> dict[str, tuple]:
        """Content of all adapters that matter to what is cached and to who may read it."""
        names = {*self._identities, *names_in(agent)}
        if self.sharing in ("auto", "base_lr_shared") and not self.private_layers:
            names.update(attachment.adapters_on_keys_or_values())
        return attachment.content_digests(name for name in attachment.adapters() if name in names)

    def _drop_changed(self, attachment: Attachment, contents: dict[str, tuple]) -> None:
        loaded = attachment.adapters()
        if self._base_changes != attachment.base_changes:
            self._base_changes = attachment.base_changes
            self._truncate(0)
        for name, identity in list(self._identities.items()):
            if name not in loaded:
                # The agent has left: what it processed stays, its entries are of no use.
                self._drop_entries(name)
                self._forget_adapter(name)
            elif contents[name] != identity:
                first = self._first_token.get(name, self.trajectory_length)
                self._drop_entries(name)
                self._forget_adapter(name)
                # Keys and values of tokens that it processed, and of all that attended to them, are those of weights that
                # no longer exist.
                first = min(first, self.trajectory_length)
                # Where the window before it is gone, nothing of the trajectory can be gone on from.
                self._truncate(first if self._can_go_back(first) else 0)

    def _forget_adapter(self, name: str) -> None:
        self._identities.pop(name, None)
        self._first_token.pop(name, None)
        self._last_agent = None  # who is written for, and with which content, is to be looked at again

    def _drop_entries(self, name: str) -> None:
        gone = [key for key in self._coverage if name in key]
        if self._policy is not None and self._policy.group == (name,):
            gone.append(SHARED_ENTRY)
        self._drop_keys(gone)
        for agent in [a for a in self._agents if name in a]:
            del self._agents[agent]
        for layer in self.layers:
            layer.release_expanded()

    def _drop_keys(self, keys: Iterable[EntryKey]) -> None:
        for key in keys:
            note_release()
            self._coverage.pop(key, None)
            self._invoked.pop(key, None)
            for layer in self.layers:
                layer.entries.pop(key, None)
                layer.tails.pop(key, None)

    def _resolve(self, attachment: Attachment, contents: dict[str, tuple]) -> Policy:
        """The policy for the adapters that are loaded now.

        Raises:
            UnsupportedAdapterError: "base_lr_shared" with different A's.
        """
        names = attachment.adapters_on_keys_or_values()
        activated = tuple(name for name in names if name in attachment.invocation_tokens())
        if self.private_layers:
            return Policy("base_shared", names, private=True, activated=activated)
        if self.sharing in ("base_shared", "lr_precomputed"):
            norm = attachment.normalises_adapted_keys()
            return Policy(self.sharing, names, key_norm=norm, activated=activated)
        everybody, names = names, tuple(name for name in names if name not in activated)
        self._read_down_projections(attachment, names, contents)
        digests = self._down_digests
        empty = self.trajectory_length == 0
        difference = self._down_difference
        if self.sharing == "base_lr_shared" and difference is not None:
            layer_idx, which, one, other = difference
            raise UnsupportedAdapterError(
                f"base_lr_shared needs one A for all adapters, but {one!r} and {other!r} differ in "
                f"{attachment.layers[layer_idx].path}.{which}.lora_A. Use sharing='base_shared' or 'lr_precomputed'"
            )
        if empty:
            shared = self.sharing == "base_lr_shared" or (len(names) > 1 and difference is None)
            group = names if shared else ()
            self._shared_down = {place: d for name in group for place, d in digests[name].items()}
        elif self._policy is not None and self._policy.name == "base_lr_shared":
            shared = True
            group = self._regroup(digests)
        else:
            shared, group = False, ()
        norm = attachment.normalises_adapted_keys()
        return Policy("base_lr_shared" if shared else "base_shared", everybody, group, norm, activated=activated)

    def _regroup(self, digests: dict[str, DownDigests]) -> tuple[str, ...]:
        """Who can read the shared entries that exist, now that adapters were added, removed or changed."""
        (stored,) = SHARED_ENTRY
        group = [n for n in sharing_group({**digests, stored: self._shared_down}, (stored,)) if n != stored]
        places = {place for name in group for place in digests[name]}
        if places <= set(self._shared_down):
            return tuple(group)
        if self.sharing == "auto":
            # Nothing was written there; such a newcomer keeps entries of its own.
            return tuple(name for name in group if set(digests[name]) <= set(self._shared_down))
        self._coverage.pop(SHARED_ENTRY, None)
        self._shared_down = {place: d for name in group for place, d in digests[name].items()}
        return tuple(group)

    def _read_down_projections(
        self, attachment: Attachment, names: tuple[str, ...], contents: dict[str, tuple]
    ) -> None:
        """Content of every A, read again only where the adapter's content as a whole has changed."""
        wanted = {name: contents[name] for name in names}
        if self._down_contents == wanted:
            return
        before, self._down_digests = self._down_digests, {}
        for name in names:
            known = name in before and self._down_contents.get(name) == contents[name]
            self._down_digests[name] = before[name] if known else attachment.down_digests(name)
        self._down_contents, self._down_difference = wanted, first_difference(self._down_digests)

    # ---- lengths ---------------------------------------------------------------------------------------------------

    def _covered(self, agent: Agent, invocations: Starts | None = None) -> int:
        """Leading tokens that have everything the agent reads; of an aLoRA: if its invocations are there."""
        length = self.trajectory_length
        if self._policy is None:
            return 0 if agent else length
        readers = self._policy.readers(agent)
        everything = [self._coverage.get(entry.key, 0) for entry, _ in readers if not entry.activated]
        for entry, _ in readers:
            if entry.activated:
                starts = invocations
                if starts is None and self._prompt_invocations is not None and self._in_prompt:
                    starts = self._prompt_invocations[1]
                if starts is None:
                    starts = self._invocations(entry.names, self.token_ids)
                everything.append(max(self._written(entry, starts), first_of(starts, length)))
        covered = min([length, *everything])
        return covered if self._held_before(agent, covered) else 0

    def _written(self, entry: Entry, starts: Starts | None) -> int:
        """Leading tokens of which there are entries; of an aLoRA: for invocations that start there."""
        if entry.activated and self._invoked.get(entry.key) != starts:
            return 0
        return self._coverage.get(entry.key, 0)

    def _invocations(
        self, names: Iterable[str], ids: torch.Tensor | None, offsets: Sequence[int | None] | None = None
    ) -> Starts:
        """Where the invocation of an aLoRA is in each row of ids (B, T); see ``invocation_starts``."""
        assert self._attachment is not None
        if ids is None:
            return ()
        tokens = self._attachment.invocation_tokens()
        name = next(name for name in names if name in tokens)
        return invocation_starts(ids, tokens[name], [None] * len(ids) if offsets is None else offsets)

    def _invocations_of_call(self, agent: Agent, ids: torch.Tensor) -> Starts:
        """Where the invocations are in the tokens (B, T) up to the last of this call; the same in all steps of ``generate``."""
        assert self._attachment is not None
        offsets = peft_adapters.alora_offsets_argument(self._attachment.lora_layers)
        # PEFT looks for them once per call of it, so in later steps its numbers no longer count from the end.
        if self._prompt_invocations is None or self._prompt_invocations[0] is not offsets:
            self._prompt_invocations = (offsets, self._invocations(agent, ids, offsets))
        return self._prompt_invocations[1]

    def _check_activated(self, attachment: Attachment, agent: Agent) -> str | None:
        """The agent's adapter that is active from an invocation on, if there is one.

        Raises:
            UnsupportedAdapterError: together with other adapters; or PEFT does not know the ids.
        """
        activated = attachment.invocation_tokens()
        name = next((name for name in names_in(agent) if name in activated), None) if activated else None
        if name is None:
            return None
        if len(agent) > 1:
            raise UnsupportedAdapterError(
                f"adapter {name!r} is active from its alora_invocation_tokens on, and is used together with others "
                f"({agent_name(agent)}). Use model.set_adapter({name!r}), and one batch for each such adapter"
            )
        if peft_adapters.alora_offsets_argument(attachment.lora_layers) is None:
            raise UnsupportedAdapterError(
                f"adapter {name!r} is active from its alora_invocation_tokens on, but PEFT was not given the tokens and leaves "
                "it off. Call the PeftModel itself, with input_ids"
            )
        return name

    def _seen_length(self, agent: Agent, invocations: Starts | None = None) -> int:
        """Coverage, less a last token that is to be run again."""
        covered = self._covered(agent, invocations)
        return covered if self._limit is None else min(covered, self._limit)

    def _told_length(self) -> int:
        """What ``get_seq_length`` says now."""
        attachment, policy = self._attachment, self._policy
        if attachment is None:
            return 0
        if policy is not None and not (
            attachment.same_adapters() and policy.adapters == attachment.adapters_on_keys_or_values()
        ):
            # The policy does not know of a newcomer, and so would take it for an adapter that needs no entries.
            self._look_for_changes()
        return self._seen_length(attachment.agent())

    def _check_room(self, stop: int) -> None:
        if self.max_cache_len is not None and stop > self.max_cache_len:
            raise SharedCacheError(
                f"the trajectory would have {stop} tokens, but max_cache_len is {self.max_cache_len}. Make the cache larger, or "
                "crop it"
            )

    def _turn_state(self) -> tuple:
        return self._mark, self._last_runner, self._new_turn, dict(self._agents), self._limit

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A change of storage, buffer by buffer. Breaks it off half-way (memory runs out, say), nothing is kept.

        To make all of the new storage first would take the memory of a second cache.
        """
        try:
            yield
        except BaseException:
            for layer in self.layers:
                layer.reset()
            self._forget()
            raise

    def _undo_steps(self, length: int, state: tuple) -> None:
        """Take back the first tokens of a pass that failed later; ``state`` is :meth:`_turn_state` before it."""
        if self.trajectory_length < length:
            return  # a commit failed, and nothing was kept
        self._truncate(length)
        self._mark, self._last_runner, self._new_turn, self._agents, self._limit = state

    def _truncate(self, length: int) -> None:
        """Forget tokens from ``length`` on; :meth:`_can_go_back` has been asked."""
        with self._all_or_nothing():
            self._forget_from(length)

    def _forget_from(self, length: int) -> None:
        for layer in self._sliding_layers():
            for buffer in (*layer.base(), *layer.norm_windows()):
                buffer.go_back(length)
        gone = []
        for key, tokens in self._coverage.items():
            buffers = [buffer for layer in self._sliding_layers() for buffer in layer.entry_windows(key)]
            if tokens > length:
                for buffer in buffers:
                    buffer.go_back(length)
                if not all(buffer.covers(length) for buffer in buffers):
                    gone.append(key)
        self._drop_keys(gone)
        self._trajectory.truncate(length)
        self._coverage = {key: min(tokens, length) for key, tokens in self._coverage.items()}
        self._rope_length = {key: min(tokens, length) for key, tokens in self._rope_length.items()}
        self._first_token = {name: first for name, first in self._first_token.items() if first < length}
        self._mark = min(self._mark, length)
        for layer in self.layers:
            layer.expanded_length = min(layer.expanded_length, length)
            # Who has not stopped before the end goes on with what all have.
            layer.tails = {key: tail for key, tail in layer.tails.items() if self._coverage.get(key, length) < length}
            if length == 0:
                layer.reset()
        if length == 0:
            # The next text may have other rows.
            self._agents.clear()
            self._drop_keys(list(self._coverage))
        self._trim(self._mark)

    # ---- sliding layers --------------------------------------------------------------------------------------------

    def _sliding_layers(self) -> list[SharedLoRALayer]:
        """Layers that let go of tokens."""
        return [layer for layer in self.layers if layer.trims]

    def _window_start(self, position: int) -> int:
        """First token that a sliding layer reads for a token at ``position``."""
        return 0 if self._window is None else max(0, position - self._window + 1)

    def _window_before(self, agent: Agent, start: int) -> tuple[int, bool]:
        """First token that sliding layers read in a pass from ``start`` on, and whether what is before ``start`` is gone.

        Then the pass reads nothing of it. Only a pass through tokens that are covered can be so.
        """
        if start + 1 >= self.trajectory_length or self._held_before(agent, start):
            return self._window_start(start), False
        return start, True

    def _held_before(self, agent: Agent, position: int) -> bool:
        """Whether sliding layers hold what the agent reads for the token at ``position`` and those after it."""
        if self._window is None or self.keep_all_tokens or position in (0, self.trajectory_length):
            return True
        assert self._policy is not None
        keys = [entry.key for entry, _ in self._policy.readers(agent)]
        lowest = self._window_start(position)
        for layer in self._sliding_layers():
            if layer.tail_before(position, lowest, keys)[0] is None and not all(
                b.start <= lowest for b in layer.base()
            ):
                return False
            if not all(buffer.start <= lowest for key in keys for buffer in layer.entry_windows(key)):
                return False
        return True

    def _keep_from(self, stop: int) -> int:
        """The first token that sliding layers keep after a pass that ends at ``stop``."""
        return 0 if self._window is None or self._recording else max(0, stop - window_and_margin(self._window))

    def _next_mark(self, agent: Agent, stop: int) -> int:
        """Where the turn began that a pass up to token ``stop`` belongs to."""
        length = self.trajectory_length
        begins = self._new_turn if self._in_prompt else stop > length + 1 or agent != self._last_runner
        return length if begins else self._mark

    def _can_go_back(self, length: int) -> bool:
        """Whether every sliding layer holds the window before token ``length``."""
        if length in (0, self.trajectory_length):
            return True
        return all(b.covers(length) or b.keeps(length) for layer in self._sliding_layers() for b in layer.base())

    def _way_back(self) -> str:
        """How far ``crop`` can go, in words."""
        assert self._window is not None
        length = self.trajectory_length
        lowest = self._window + max(buffer.start for layer in self._sliding_layers() for buffer in layer.base())
        text = f"up to {length - lowest} tokens, crop(-{length - lowest})"
        if 0 < self._mark < lowest and self._can_go_back(self._mark):
            text += f", or to the start of the turn, crop(-{length - self._mark})"
        return text

    def _commit_windows(self, now: ForwardPass) -> None:
        """Sliding layers let go of what is needed no longer: not by agents that have stopped before the end, either."""
        length = self.trajectory_length
        for layer in self.layers:
            staged, layer.staged_tail = layer.staged_tail, None
            for entry, start in now.writers:
                if start < now.stop:
                    layer.tails.pop(entry.key, None)
                    if staged is not None and self._coverage[entry.key] < length:
                        layer.tails[entry.key] = staged
        for layer in self._sliding_layers():
            for buffer in layer.base():
                if buffer.staged_start is not None:
                    self._save_tails(layer, buffer.staged_start)
            for buffer in layer.windows():
                buffer.commit()
        self._trim(now.mark)

    def _save_tails(self, layer: SharedLoRALayer, first: int) -> None:
        length = self.trajectory_length
        layer.save_tails(first, {key: tokens for key, tokens in self._coverage.items() if 0 < tokens < length})

    def _trim(self, mark: int) -> None:
        """Let go of tokens where there is no room for a further one; find out when that will be the next time."""
        length, full = self.trajectory_length, []
        for layer in self._sliding_layers():
            held = [(buffer, length) for buffer in layer.base()]
            held += [(buffer, self._rope_length.get(NORMS, 0)) for buffer in layer.norm_windows()]
            held += [
                (buffer, self._coverage.get(key, 0)) for key in layer.entries for buffer in layer.entry_windows(key)
            ]
            for buffer, tokens in held:
                if tokens - buffer.start >= buffer.room and not self._recording:
                    if tokens == length:
                        self._save_tails(layer, tokens - buffer.keep)
                    buffer.trim(tokens, mark)
                buffer.forget_other_marks(mark)
                if tokens == length:
                    full.append(buffer.start + buffer.room)
        self._full_at = min(full, default=None)
        self._windows_at += 1

    def _align(self, windows: list[WindowBuffer]) -> int:
        """Make sliding layers, all of whose tokens up to the last one are valid, begin at the same token; returns it."""
        first = max(buffer.start for buffer in windows)
        if any(buffer.start != first for buffer in windows):
            for layer in self._sliding_layers():
                self._save_tails(layer, first)
            for buffer in windows:
                buffer.trim(self.trajectory_length, self._mark, first)
            self._trim(self._mark)
        return first

    # ---- passes ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise SharedCacheError(
                "this SharedLoRACache is used by another forward pass at the moment; use one cache per thread"
            )
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _prompt(self, length: int, limit: int | None) -> Iterator[None]:
        """A ``generate`` call whose prompt of ``length`` tokens was checked; ``limit``: run again from there."""
        self._in_prompt, self._prompt_length, self._limit, self._new_turn = True, length, limit, True
        self._graphs.start_turn()
        try:
            with generate_scope(self):
                yield
        finally:
            self._in_prompt, self._prompt_length, self._limit, self._new_turn = False, 0, None, False
            self._prompt_invocations = None
            self._graphs.ahead.forget()
            if self._recording:
                self._recording = False
                self._trim(self._mark)

    def _not_while_running(self, what: str) -> None:
        now = forward_scope.get()
        if self._lock.locked() or (now is not None and now.cache is self and not now.entered_from_inside):
            raise SharedCacheError(f"{what} was called while a forward pass with this cache is running")
        # From inside of `generate`: a step may be under way on a stream of its own.
        self._graphs.ahead.drop()

    def _rope_buffers(self, key: str) -> tuple[TokenBuffer, TokenBuffer]:
        if key not in self._ropes:
            cos, sin = (TokenBuffer(-2, self.max_cache_len, broadcast_rows=True) for _ in range(2))
            self._ropes[key] = (cos, sin)
        return self._ropes[key]

    def _rope_buffers_all(self) -> list[TokenBuffer]:
        return [buffer for pair in self._ropes.values() for buffer in pair]

    def _prepare_storage(self, now: ForwardPass) -> None:
        """The expanded keys are one agent's; another agent starts without."""
        if self._unfinished and self._window is not None:
            # What a pass that failed has left.
            for layer in self.layers:
                layer.discard()
        self._unfinished = True
        if self._expanded_agent != now.agent or now.blind:
            for layer in self.layers:
                layer.release_expanded()
            self._expanded_agent = now.agent

    _expanded_agent: Agent | None = None
    _unfinished = False

    def _commit(self, now: ForwardPass) -> None:
        """Make the tokens of a finished pass part of the cache."""
        if now.blind:
            self._unfinished = False
            return
        if self._window is None:
            self._add(now)
        else:
            with self._all_or_nothing():
                self._add(now)
                full = self._full_at is not None and self.trajectory_length >= self._full_at
                if full or now.staged or now.stop - now.start > 1 or now.stop < now.previous or now.mark != self._mark:
                    self._commit_windows(now)
        self._mark, self._last_runner, self._new_turn = now.mark, now.agent, False
        self._unfinished = False

    def _add(self, now: ForwardPass) -> None:
        """In this order: an agent that is not known to cover tokens runs them again, what it covers is not looked at again."""
        if now.stop > now.previous:
            new = now.previous - now.start
            ids, positions = now.ids[:, new:], now.positions
            if positions is None:
                positions = torch.arange(now.previous, now.stop, device=ids.device)[None]
            else:
                positions = positions[:, new:]
            self._trajectory.append(ids, positions, now.attention_mask, now.padded)
            for name in names_in(now.agent):
                self._first_token.setdefault(name, now.previous)
        for key, length in now.rope_lengths.items():
            self._rope_length[key] = length
        for entry, start in now.writers:
            if entry.activated and now.invocations is not None:
                self._invoked[entry.key] = now.invocations
            self._coverage[entry.key] = max(start, now.stop)
        self._agents.setdefault(now.agent)
        self._limit = None


def _mentions(frame_locals: dict[str, Any], cache: SharedLoRACache) -> bool:
    """Whether a frame has the cache among its variables or in a dict of arguments."""
    for value in frame_locals.values():
        if value is cache or (isinstance(value, dict) and any(v is cache for v in value.values())):
            return True
    return False
