"""Decode steps replayed from CUDA graphs: a step with LoRA adapters is bound by its many kernel launches, a replay is not.

One graph per set of active adapters and batch size, captured at the second step. Nothing in it depends on lengths that the
host knows: the new token's place is counted on the device, K/V and low-rank entries are written there, and the attention
kernel reads the length where it is (``forward.Slot``). Passes of some new tokens (a cue, a short observation) are bound by
launches as well; those that come again have graphs of their own, for so many tokens or up to four times as many: what is
written and computed behind the last token, later ones overwrite. A graph holds addresses only, so everything it was captured
for is compared at each replay: storage, adapters, weights. In the middle of ``generate`` most of that happens while the device
works already (``ahead.py``). What can't be captured runs as before, and the cache says why.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.utils import ModelOutput

from .adapters import rows_of
from .ahead import OWN_ARGUMENTS, Expected, StepsAhead, other_arguments
from .attachment import Attachment, call_original
from .attention import attention_backend
from .buffers import MIN_SLACK_ON_CUDA, NotReserved, TokenBuffer, WindowBuffer, allocations, with_slack
from .cuda_graph import CudaGraph, start_beside, wait_for
from .forward import ForwardPass, Slot
from .products import DownProducts
from .scopes import forward_scope

if TYPE_CHECKING:
    from .cache import SharedLoRACache

logger = logging.getLogger(__name__)

# Room that growing storage is given at once.
_MIN_ROOM = MIN_SLACK_ON_CUDA
_FIRST_ROOM = 128
# Captures of one graph that were each used for less than two steps, after which steps are no longer captured.
_MAX_USELESS_CAPTURES = 8
# Most tokens of a pass that is run as captured steps instead. A pass of few tokens of an 8B shape takes 60 to 100 ms on an
# H100, nearly all of it the host's; a captured step takes 11.
MAX_STEPS_OF_A_PASS = 4
# Tokens that graphs of blocks take. Up to some 500 a pass of an 8B shape keeps the host busy for longer than the device.
BLOCKS = (4, 16, 64, 256, 512)
# How often a block comes to the same storage before it is captured, which takes the host as long as a pass; and where the
# alternative is a few captured steps.
_BLOCK_COMES = 2
_SHORT_BLOCK_COMES = 3
# Modules whose hooks do nothing unless a step is refused for other reasons (hidden states or attentions asked for).
KNOWN_HOOKS = ("transformers.utils.output_capturing", "transformers.utils.generic")


_all_graphs: weakref.WeakSet[DecodeGraphs] = weakref.WeakSet()


def forget_graphs(attachment: Attachment) -> None:
    """Drop what was captured of a model that is being detached."""
    for graphs in list(_all_graphs):
        if graphs.cache._attachment is attachment:
            graphs.clear()


class CannotCapture(Exception):
    """A step can't be captured; the text says why."""


@dataclass
class Step:
    """One captured decode step or block of tokens, or one that is to be captured.

    Attributes:
        ids, positions: (B, n) and (B or 1, n) int64, its inputs.
        slot: where the tokens go.
        capacities: of the buffers, and of those of sliding layers that let go of tokens, if there are any.
        products: how its down-projections are computed.
        graph: None until it is captured.
        fingerprint: all addresses and versions it was captured for.
        allocations: ``buffers.allocations()`` when they were last compared.
        rope_keys: layer types whose cos/sin it stores.
        useless: captures in a row that served less than two steps.
        served: steps since the last capture.
        ran_with: identity of the weights with which it has run uncaptured.
        first, windows_at: the first token that sliding layers held, and the cache's count of when that was.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slot: Slot
    capacities: tuple[int, int | None]
    products: DownProducts
    graph: Any = None
    fingerprint: tuple = ()
    allocations: int = -1
    rope_keys: tuple[str, ...] = ()
    useless: int = 0
    served: int = 0
    ran_with: tuple = ()
    first: int = 0
    windows_at: int = -1

    def has_room(self, stop: int) -> bool:
        """Whether all buffers have room for the trajectory up to token ``stop``."""
        window = self.slot.window
        return stop <= self.slot.capacity and (window is None or stop - self.first <= window.capacity)

    def take_in(self, ids: torch.Tensor, positions: torch.Tensor | None, start: int) -> None:
        """Copy a pass's tokens and positions, or those that count from ``start``. Tokens of a block that the pass does not have
        may be any; positions go on."""
        size, tokens = self.ids.shape[1], ids.shape[1]
        self.ids[:, :tokens].copy_(ids)
        if positions is not None:
            self.positions[:, :tokens].copy_(positions)
            if tokens < size:
                further = torch.arange(1, size - tokens + 1, device=self.positions.device)
                self.positions[:, tokens:] = positions[:, -1:] + further
        elif size == 1:
            self.positions.fill_(start)
        else:
            torch.arange(start, start + size, out=self.positions[0])


@dataclass
class _Came:
    """How often a block came to the storage that was found with so many ``buffers.allocations()``."""

    allocations: int
    addresses: tuple
    capacity: int
    times: int = 0


@dataclass(eq=False)
class DecodeGraphs:
    """The captured decode steps of one cache.

    Attributes:
        eager_reason: why the last decode step was not replayed; None: it was, or there was none.
    """

    cache: SharedLoRACache
    enabled: bool = True
    eager_reason: str | None = None
    _steps: dict[tuple, Step] = field(default_factory=dict)
    _came: dict[tuple, _Came] = field(default_factory=dict)
    _refused: dict[tuple, str] = field(default_factory=dict)
    _state: torch.Tensor | None = None
    device_at: tuple[int, int] | None = None
    _pool: Any = None
    weights: tuple = ()
    _told: set[str] = field(default_factory=set)
    _new_turn: bool = True

    def __post_init__(self) -> None:
        self.ahead = StepsAhead(self)
        _all_graphs.add(self)

    def start_turn(self) -> None:
        """Look at everything again that a user may have changed: at the start of ``generate``, and where a change has shown."""
        self._new_turn, self.ahead.expected = True, None

    def clear(self) -> None:
        """Forget all graphs."""
        self.ahead.forget()
        self._steps.clear()
        self._came.clear()
        self._refused.clear()
        self._pool = self._state = None
        self.device_at = None

    # ---- one step --------------------------------------------------------------------------------------------------
    # With graphs switched off a step on CUDA runs the same way, only uncaptured: it gives the very same numbers.

    def run(self, now: ForwardPass, kwargs: dict[str, Any]) -> Any:
        """The decoder's output for a decode step or a block (``now.block``), or None: run it as any other pass."""
        try:
            return self._run(now, kwargs)
        finally:
            self.ahead.replayed = None  # taken, or of no use

    def _run(self, now: ForwardPass, kwargs: dict[str, Any]) -> Any:
        if not (now.block or now.stop - now.start == 1) or now.start != now.previous or now.previous == 0:
            return None
        if not self.enabled and not now.ids.is_cuda:
            return None
        try:
            self._check(now, kwargs)
            out = self._step(now, kwargs)
        except (CannotCapture, NotReserved) as reason:
            # Nothing was committed; the step is run again as a whole.
            now.rope_lengths.clear()
            now.first_ropes.clear()
            now.stored = 0
            if self.enabled and isinstance(reason, CannotCapture) and not now.block:
                self._explain(str(reason))
            return None
        if not now.block:
            self.eager_reason = None
        return out

    def block_of(self, now: ForwardPass, kwargs: dict[str, Any]) -> int:
        """Tokens of the graph that a pass of several new tokens takes; 0: it has none and gets none.

        A graph pays where the same agent's blocks come again and the storage stays where it is.
        """
        tokens = now.stop - now.start
        if not self.enabled or not 1 < tokens <= BLOCKS[-1] or not 0 < now.previous == now.start:
            return 0
        if now.blind or now.zeros_from or now.attachment.rotation_changes or self._padded(now):
            return 0
        if rows_of(now.agent) is not None or any(layer.window is not None for layer in self.cache.layers):
            return 0
        try:
            self._check(now, kwargs)
        except CannotCapture:
            return 0
        size = next(size for size in BLOCKS if size >= tokens)
        key = self._key(now, kwargs, size)
        if key in self._refused:
            return 0
        came = self._came.get(key)
        if came is None or came.allocations != allocations():
            addresses, before = self._addresses(now, False), came
            capacity = min((buffer.capacity for buffer in self._buffers(now, False)), default=0)
            came = self._came[key] = _Came(allocations(), addresses, capacity)
            if before is not None and before.addresses == addresses:
                came.times = before.times
        if now.start + size > came.capacity:
            return 0  # storage does not grow for what no token fills
        came.times += 1
        return size if came.times >= (_SHORT_BLOCK_COMES if self.takes_in_steps(now, kwargs) else _BLOCK_COMES) else 0

    def takes_in_steps(self, now: ForwardPass, kwargs: dict[str, Any]) -> bool:
        """Whether a pass of a few new tokens (a cue between two turns, say) is faster as so many captured steps.

        The agent's step must be captured already: a pass without a graph takes the host as long as a handful of replays.
        """
        if not self.enabled or not 1 < now.stop - now.start <= MAX_STEPS_OF_A_PASS:
            return False
        if not 0 < now.previous == now.start or now.blind or now.zeros_from:
            return False
        if now.padded and self.cache._trajectory.attention_mask is None:
            return False  # the first padding of the text
        if any(length != now.start for length in self.cache._rope_length.values()):
            return False
        try:
            self._check(now, kwargs)
        except CannotCapture:
            return False
        step = self._steps.get(self._key(now, kwargs, 0))
        if step is None or step.graph is None or step.ran_with != self.weights:
            return False
        in_place = step.allocations == allocations() or step.fingerprint[0] == self._addresses(now, self._padded(now))
        return in_place and now.stop <= step.slot.capacity

    def _key(self, now: ForwardPass, kwargs: dict[str, Any], block: int) -> tuple:
        return (
            now.agent, now.ids.shape[0], 1 if now.positions is None else now.positions.shape[0], self._padded(now),
            tuple(entry for entry, _ in now.writers), tuple(now.readers), other_arguments(kwargs), block,
        )  # fmt: skip

    def _padded(self, now: ForwardPass) -> bool:
        return now.padded or self.cache._trajectory.attention_mask is not None

    def _step(self, now: ForwardPass, kwargs: dict[str, Any]) -> Any:
        padded = self._padded(now)
        size = now.block or 1
        stop = now.start + size
        if any(length != now.start for length in self.cache._rope_length.values()):
            raise NotReserved
        key = self._key(now, kwargs, now.block)
        if key in self._refused:
            raise CannotCapture(self._refused[key])
        step = self._steps.get(key)
        replayed = self.ahead.replayed is not None  # which has written the padding
        if padded and not replayed:
            self.write_padding(now.start, now.attention_mask, now.ids)
        first = self._first_held(now, step)
        if step is not None:
            step.first, step.windows_at = first, self.cache._windows_at
        if step is None or step.allocations != allocations() or not step.has_room(stop):
            more = 0 if step is not None or now.block else _FIRST_ROOM
            capacities = self._reserve(now, padded, stop + more), self._reserve_windows(now, first, more)
            if step is None or step.capacities != capacities:
                step = self._steps[key] = self._new_step(now, capacities, step)
                step.first, step.windows_at = first, self.cache._windows_at
        addresses = self._addresses(now, padded) if step.allocations != allocations() else step.fingerprint[0]
        fingerprint = (addresses, self.weights)
        ahead = self.ahead.take(step, now.start, fingerprint)
        if ahead is None:
            if padded and replayed:
                self.write_padding(now.start, now.attention_mask, now.ids)
            step.take_in(now.ids, now.positions, now.start)
        if now.block or (ahead is None and self.device_at != (now.start, first)):
            assert self._state is not None
            for place, number in zip(
                self._state, (now.start, stop, now.start - first, stop - first, first), strict=True
            ):
                place.fill_(number)
        self.device_at = None  # unknown, should anything go wrong from here on
        arguments = dict(
            other_arguments(kwargs), input_ids=step.ids, past_key_values=self.cache,
            attention_mask=self._padding_mask(step.slot.capacity) if padded else None,
        )  # fmt: skip
        if now.attachment.takes_position_ids:
            arguments["position_ids"] = step.positions
        whole = now
        if now.block:
            whole = replace(now, stop=stop, ids=step.ids, positions=step.positions, rope_lengths={})
        if not self.enabled or step.ran_with != self.weights:
            # The first step only runs: what libraries and kernels load or compile, and what is made of the adapters' weights,
            # must not come to be in a capture.
            if step.ran_with != self.weights:
                step.products = self._products(key, now.attachment)
            step.graph, step.ran_with = None, ()
            out = self._attempt(key, lambda: self._static_pass(whole, arguments, step))
            step.rope_keys, step.ran_with = tuple(whole.rope_lengths), self.weights
        else:
            if step.graph is None or fingerprint != step.fingerprint:
                self._capture(key, step, whole, arguments)
            out = self._replay(step) if ahead is None else ahead.out
            step.served += 1
        now.rope_lengths.update(dict.fromkeys(step.rope_keys, now.stop))
        step.fingerprint, step.allocations = fingerprint, allocations()
        if not now.block:
            self.device_at = (now.stop, first)
            self.ahead.positions = now.positions
            expected = self.ahead.expected
            if self.cache._in_prompt and (expected is None or expected.step is not step):
                held = now.attachment.memory_of(self.cache._watched(now.agent))
                self.ahead.expected = Expected(step, other_arguments(kwargs), padded, held)
        return self._fresh(key, out, now.stop - now.start)

    def _replay(self, step: Step) -> Any:
        out, done = start_beside(step.ids.device, step.graph.replay)
        wait_for(step.ids.device, done)
        return out

    def _products(self, key: tuple, attachment: Attachment) -> DownProducts:
        """A step's or block's: those of the same agent's others, so that joined weights exist once."""
        for other, step in self._steps.items():
            if other[:-1] == key[:-1] and step.ran_with == self.weights:
                return step.products
        return DownProducts(attachment)

    def _static_pass(self, now: ForwardPass, arguments: dict[str, Any], step: Step) -> Any:
        now.slot, now.products = step.slot, step.products
        now.rope_lengths.clear()
        now.ropes.clear()
        now.first_ropes.clear()
        now.stored = 0
        step.products.restart()
        try:
            with forward_scope(now):
                out = call_original(now.attachment.decoder, **arguments)
        finally:
            now.slot = now.products = None
        now.check_layers()
        step.products.finish()
        assert self._state is not None
        if not now.block:
            self._state[:4].add_(1)  # the next token's place
        return out

    def _capture(self, key: tuple, step: Step, now: ForwardPass, arguments: dict[str, Any]) -> None:
        step.useless = step.useless + 1 if step.graph is not None and step.served < 2 else 0
        step.graph, step.served = None, 0  # its memory serves the next capture
        if step.useless > _MAX_USELESS_CAPTURES:
            self._refuse(key, "the cache's storage or the adapters change at every step")
        if now.ids.is_cuda and not any(other.graph for other in self._steps.values()):
            # A pool ends with its last graph.
            self._pool = torch.cuda.graph_pool_handle()
        try:
            step.graph = self._attempt(
                key, lambda: CudaGraph(lambda: self._static_pass(now, arguments, step), self._pool, now.ids.device)
            )
        except BaseException:
            self._pool = None  # a capture that broke off leaves it unusable
            raise

    def _attempt(self, key: tuple, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except NotReserved:
            raise
        except Exception as error:
            # Whatever a model does that can't be captured (it asks the device for a number, say) shows here. If the error has
            # another cause, the step that is run instead raises it again.
            cause: BaseException = error
            while cause.__context__ is not None:
                # That a capture has failed is said by another error after the one that made it fail.
                cause = cause.__context__
            text = str(cause).splitlines()[0] if str(cause) else repr(cause)
            self._refuse(key, f"the model can't be captured: {text}", error)

    def _refuse(self, key: tuple, reason: str, error: Exception | None = None) -> NoReturn:
        self._refused[key] = reason
        self._steps.pop(key, None)
        raise CannotCapture(reason) from error

    def _fresh(self, key: tuple, out: Any, tokens: int) -> Any:
        """The decoder's output of the first ``tokens`` tokens, in tensors that the next step leaves alone."""
        if not isinstance(out, ModelOutput):
            self._refuse(key, f"the model returns a {type(out).__name__}, not a ModelOutput")
        fields = {}
        for name, value in out.items():
            if isinstance(value, torch.Tensor):
                value = value[:, :tokens].clone()
            elif value is not None and value is not self.cache:
                self._refuse(key, f"the model returns {name}, which is not a tensor")
            fields[name] = value
        return type(out)(**fields)

    # ---- what a graph depends on -----------------------------------------------------------------------------------

    def _new_step(self, now: ForwardPass, capacities: tuple[int, int | None], before: Step | None) -> Step:
        device = now.ids.device
        if self._state is None or self._state.device != device:
            with torch.inference_mode(False):
                # Place and length, the same within sliding layers, and the first token that those hold.
                self._state = torch.zeros(5, dtype=torch.int64, device=device)
        rows = 1 if now.positions is None else now.positions.shape[0]
        capacity, window = capacities
        index, length, window_index, window_length, first = self._state.unbind()
        rows_here = now.ids.shape[0]
        sliding = None if window is None else Slot(window_index, window_length.expand(rows_here), window, first)
        slot = Slot(index, length.expand(rows_here), capacity, window=sliding)
        with torch.inference_mode(False):
            ids, positions = (
                torch.zeros(n, now.block or 1, dtype=torch.int64, device=device) for n in (rows_here, rows)
            )
        step = Step(
            ids, positions, slot, capacities, DownProducts(now.attachment) if before is None else before.products
        )
        if before is not None:
            # Storage has grown: everything is loaded, only addresses and the capacity are new.
            step.ran_with, step.rope_keys, step.useless = before.ran_with, before.rope_keys, before.useless
            step.served, step.graph = before.served, before.graph
        return step

    def _buffers(self, now: ForwardPass, padded: bool) -> list[TokenBuffer]:
        cache = self.cache
        keys = {entry.key for entry, _ in (*now.writers, *now.readers)}
        found = [buffer for buffer in cache._rope_buffers_all() if buffer.data is not None]
        for index, layer in enumerate(cache.layers):
            if index not in cache.private_layers:
                found += (layer.base_keys, layer.base_values)
            if layer.base_rms.data is not None:
                found.append(layer.base_rms)
            for key in keys:
                found += layer.entries.get(key, {}).values()
        if padded:
            found.append(cache._trajectory.padding_buffer)
        return found

    def _reserve(self, now: ForwardPass, padded: bool, needed: int) -> int:
        """Room for ``needed`` tokens in every buffer; returns the tokens that fit into all of them."""
        buffers = [buffer for buffer in self._buffers(now, padded) if not isinstance(buffer, WindowBuffer)]
        limit = self.cache.max_cache_len
        if not buffers:
            return sys.maxsize  # all layers slide, and no positions are needed
        enough = needed if limit is None else min(needed, limit)
        if short := [buffer for buffer in buffers if buffer.capacity < enough]:
            # No more than the others have: other agents' steps were captured for where those are.
            others = [buffer.capacity for buffer in buffers if buffer.capacity >= enough]
            wanted = min(others, default=with_slack(now.stop, _MIN_ROOM)) if limit is None else limit
            for buffer in short:
                buffer.reserve(wanted)
        return min(buffer.capacity for buffer in buffers)

    def _windows(self, now: ForwardPass) -> list[WindowBuffer]:
        return [buffer for buffer in self._buffers(now, False) if isinstance(buffer, WindowBuffer)]

    def _first_held(self, now: ForwardPass, step: Step | None) -> int:
        """The first token that the step's sliding layers hold, made the same for all of them; 0: there are none."""
        cache = self.cache
        if step is not None and step.windows_at == cache._windows_at:
            return step.first
        windows = self._windows(now)
        return cache._align(windows) if windows else 0

    def _reserve_windows(self, now: ForwardPass, first: int, more: int) -> int | None:
        """As :meth:`_reserve`, in sliding layers that let go of tokens; None: there are none."""
        windows = self._windows(now)
        if not windows:
            return None
        needed = now.stop - first
        if any(buffer.capacity < max(needed, min(needed + more, buffer.room)) for buffer in windows):
            wanted = with_slack(needed, _MIN_ROOM)
            for buffer in windows:
                buffer.reserve(max(needed, min(wanted, buffer.room)))
        return min(buffer.capacity for buffer in windows)

    def _addresses(self, now: ForwardPass, padded: bool) -> tuple:
        return tuple((b.data.data_ptr(), b.data.shape) for b in self._buffers(now, padded) if b.data is not None)

    def write_padding(self, start: int, mask: torch.Tensor | None, ids: torch.Tensor) -> None:
        """Write the padding of tokens ``start ...`` (B, n) where captured steps read it; mask (B, m) of all, None: ones."""
        new = mask[:, start : start + ids.shape[1]] if mask is not None else torch.ones_like(ids)
        self.cache._trajectory.write_padding(start, new.bool())

    def _padding_mask(self, capacity: int) -> torch.Tensor:
        return self.cache._trajectory.padding_buffer.view(capacity)

    # ---- what can be captured --------------------------------------------------------------------------------------

    def _check(self, now: ForwardPass, kwargs: dict[str, Any]) -> None:
        attachment = now.attachment
        weights = attachment.weights_identity(whole=self._new_turn or not self.cache._in_prompt)
        self._new_turn = False
        if weights != self.weights:
            self.weights = weights
            self._device_reason = self._why_not_on_this_device(attachment)
            # What was refused may go now.
            self._refused.clear()
        if self._device_reason is not None:
            raise CannotCapture(self._device_reason)
        if attachment.decoder.training:
            raise CannotCapture("the model is in training mode")
        if torch.compiler.is_compiling() or (now.ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            raise CannotCapture("the model is being compiled or captured by the caller")
        if attention_backend() == "reference":
            raise CannotCapture("the reference attention was chosen")
        if kwargs.get("input_ids") is None:
            raise CannotCapture("the step was given as inputs_embeds")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict) or (isinstance(mask, torch.Tensor) and mask.dim() != 2):
            raise CannotCapture("the step has an attention mask of its own, not one entry per token")
        for name, value in kwargs.items():
            if name in OWN_ARGUMENTS or value is None:
                continue
            if name.startswith("output_") and value:
                raise CannotCapture(f"{name} was asked for")
            if name == "return_dict" and not value:
                raise CannotCapture("return_dict=False")
            if not isinstance(value, bool | int | float | str):
                raise CannotCapture(f"the model was called with {name}, which a captured step does not know")
        position_ids = kwargs.get("position_ids")
        if isinstance(position_ids, torch.Tensor) and position_ids.dim() != 2:
            raise CannotCapture("position_ids have more than two dimensions")
        if now.invocations is not None:
            raise CannotCapture("the adapter is active from an invocation on (aLoRA)")
        if attachment.has_hooks(KNOWN_HOOKS):
            raise CannotCapture("modules of the model have hooks, which a replay would not call")
        config = attachment.decoder.config
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name, False) and kwargs.get(name) is not False:
                raise CannotCapture(f"{name} was asked for in the model's config")

    _device_reason: str | None = None

    @staticmethod
    def _why_not_on_this_device(attachment: Attachment) -> str | None:
        devices = {t.device for t in (*attachment.decoder.parameters(), *attachment.decoder.buffers())}
        kinds = {device.type for device in devices}
        if "meta" in kinds:
            return "weights are offloaded"
        if kinds != {"cuda"}:
            return f"CUDA graphs need the model on CUDA, it is on {', '.join(sorted(kinds))}"
        if len(devices) > 1:
            return f"the model is spread over {len(devices)} devices"
        return None

    def _explain(self, reason: str) -> None:
        self.eager_reason = reason
        if reason not in self._told:
            self._told.add(reason)
            expected = reason.startswith("CUDA graphs need")
            logger.log(
                logging.INFO if expected else logging.WARNING,
                "SharedLoRACache: decode steps are not replayed from a CUDA graph: %s. They run as without graphs "
                "(cuda_graphs=False turns this message off)",
                reason,
            )
