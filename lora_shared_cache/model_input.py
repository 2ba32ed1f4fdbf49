"""The model's input against the trajectory: checked, and cut or completed so that it starts at the coverage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import adapters as peft_adapters
from .attachment import Attachment
from .errors import TrajectoryError, UnsupportedAdapterError
from .forward import ForwardPass
from .policies import SHARED_ENTRY
from .trajectory import UNKNOWN_TOKEN

if TYPE_CHECKING:
    from .cache import SharedLoRACache

# Arguments of a decoder that are aligned with the trajectory by name.
_ALIGNED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values")


def begin(attachment: Attachment, cache: SharedLoRACache, kwargs: dict[str, Any]) -> tuple[ForwardPass, dict[str, Any]]:
    """Check the decoder's input against the trajectory and cut or complete it so that it starts at the coverage.

    Args:
        kwargs: the decoder's keyword arguments.

    Returns:
        The pass, and the arguments to run the decoder with.

    Raises:
        TrajectoryError: the input does not continue the trajectory.
        UnsupportedAdapterError, UnsupportedModelError: the split can't express the model's present state.
    """
    cache._bind(attachment)
    inputs = kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs.get("inputs_embeds")
    if inputs is None:
        raise TrajectoryError("the model was called without input_ids and inputs_embeds")
    rows, n = inputs.shape[:2]
    if rows == 0:
        raise TrajectoryError("the model was called with a batch of no rows; pass at least one")
    if n == 0:
        raise TrajectoryError(
            "the model was called with no tokens: the prompt is shorter than what is cached. Pass the whole trajectory; "
            "cache.crop(-n) goes back n tokens"
        )
    trajectory = cache._trajectory
    trajectory.check_rows(rows)
    names = peft_adapters.adapter_names_argument(attachment.lora_layers)
    if names is not None and len(names) != rows:
        raise UnsupportedAdapterError(
            f"adapter_names has {len(names)} names, the batch {rows} rows; pass one name per row. PEFT repeats them for "
            "num_beams= given to generate, but neither for num_return_sequences nor for beams from a generation config"
        )
    # What the caller was told before adapters are looked at: inputs are cut by it.
    told = cache._told_length()
    remembered = trajectory.token_ids
    remembered_positions = trajectory.positions(0, trajectory.length) if trajectory.length else None
    agent = cache._start_turn(attachment, whole=n > 1)

    mask = kwargs.get("attention_mask")
    mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    position_ids = kwargs.get("position_ids")
    if not isinstance(position_ids, torch.Tensor) or position_ids.dim() != 2:
        position_ids = None
    start = _start_of(n, told, mask, position_ids, trajectory.length, trajectory.attention_mask is not None)
    if start < 0:
        assert mask is not None
        raise TrajectoryError(
            f"the attention_mask has {mask.shape[1]} columns for {n} tokens; it must cover the {told} cached tokens and the "
            f"new ones, {told + n} columns, or leave it out"
        )
    ids = kwargs.get("input_ids")
    known = inputs.new_full((rows, n), UNKNOWN_TOKEN, dtype=torch.long) if ids is None else ids.long()
    if cache.check_tokens:
        trajectory.check_tokens(known, start)
    # A token that generate made follows a prompt that was checked; looking again would make the host wait for the device.
    looks = n > 1 or not cache._in_prompt or start < cache._prompt_length
    if cache.check_tokens and (looks or mask is None):
        trajectory.check_padding(mask)
    counted = kwargs.get("position_ids") is None and attachment.takes_position_ids
    if cache.check_tokens and (counted or position_ids is not None):
        trajectory.check_positions(position_ids, start, n)
    invocations = None
    if cache._check_activated(attachment, agent):
        whole = known if remembered is None else torch.cat((remembered[:, :start].to(known.device), known), dim=1)
        invocations = cache._invocations_of_call(agent, whole)
    covered = cache._seen_length(agent, invocations)
    if start < covered:
        drop = _tokens_to_drop(start, n, covered, cache)
        kwargs, known, start, n = _drop_tokens(kwargs, known, drop), known[:, drop:], start + drop, n - drop
        position_ids = None if position_ids is None else position_ids[:, drop:]
    elif start > covered:
        kwargs, known, position_ids = _prepend_tokens(
            kwargs, known, position_ids, covered, start, remembered, remembered_positions, counted
        )
        n, start = n + start - covered, covered
    stop = start + n
    cache._check_room(stop)
    padded = looks and mask is not None and not bool(mask.all())
    policy = cache._policy
    assert policy is not None
    window_start, blind = cache._window_before(agent, start)
    writers = []
    zeros_from = {}
    for entry in () if blind else policy.writers(agent):
        written = cache._written(entry, invocations)
        if entry.gains and cache._coverage.get(SHARED_ENTRY, 0) < start:
            continue  # they are computed from the shared entries, which are not there
        if entry.activated:
            # What was computed for another invocation is about to be overwritten.
            cache._coverage[entry.key] = written if written >= start else 0
            if written < start:
                # Tokens before the invocation: whoever ran them, the adapter had no part in them.
                zeros_from[entry.key], written = written, start
        if written >= start:
            # A cache with a gap before `start` can't be appended to; its adapter fills it on its own turn.
            writers.append((entry, max(written, start)))
    now = ForwardPass(
        attachment=attachment,
        cache=cache,
        agent=agent,
        start=start,
        stop=stop,
        previous=trajectory.length,
        writers=writers,
        # An aLoRA may have no entries yet for what it walks through.
        readers=[] if blind else policy.readers(agent),
        group=policy.group,
        zeros_from=zeros_from,
        invocations=invocations,
        ids=known,
        positions=position_ids,
        attention_mask=mask,
        padded=padded,
        lengths={**cache._coverage, **dict.fromkeys(zeros_from, start)},
        window_start=window_start,
        keep_from=cache._keep_from(stop),
        mark=cache._next_mark(agent, stop),
        blind=blind,
    )
    cache._prepare_storage(now)
    return now, kwargs


def _start_of(
    n: int, told: int, mask: torch.Tensor | None, position_ids: torch.Tensor | None, length: int, padded: bool
) -> int:
    """Trajectory position of the first of ``n`` input tokens."""
    if mask is not None:
        # Transformers' rule: a 2D mask covers the cached tokens and the new ones.
        return mask.shape[1] - n
    if n > 1 and length and position_ids is not None and not padded and position_ids.shape[1] == n:
        # generate drops a mask of ones but keeps the positions that it made of it.
        first = int(position_ids[0, 0])
        if first <= length:
            return first
    return told


def _tokens_to_drop(start: int, n: int, covered: int, cache: SharedLoRACache) -> int:
    """How many leading tokens are cached already; at least one token is always run."""
    stop = start + n
    # generate's chunked prefill may walk through the cached part of a prompt that was checked as a whole.
    if stop < covered and not stop <= cache._prompt_length:
        raise TrajectoryError(
            f"the input ends at token {stop}, but {covered} are cached for this adapter. To go back to it: "
            f"cache.crop(-{cache.trajectory_length - stop}); to go on: pass the whole trajectory"
        )
    return min(covered - start, n - 1)


def _drop_tokens(kwargs: dict[str, Any], known: torch.Tensor, drop: int) -> dict[str, Any]:
    if drop == 0:
        return kwargs
    n = known.shape[1]
    kwargs = dict(kwargs)
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            kwargs[name] = kwargs[name][:, drop:]
    position_ids = kwargs.get("position_ids")
    if isinstance(position_ids, torch.Tensor):
        if position_ids.shape[-1] == n:
            kwargs["position_ids"] = position_ids[..., drop:]
        else:
            kwargs["position_ids"] = None
    for name in _numbers_per_token(kwargs, known):
        kwargs[name] = kwargs[name][:, drop:]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        kwargs["attention_mask"] = {kind: _drop_queries(part, drop) for kind, part in mask.items()}
    else:
        kwargs["attention_mask"] = _drop_queries(mask, drop)
    return kwargs


def _drop_queries(mask: Any, drop: int) -> Any:
    return mask[:, :, drop:] if isinstance(mask, torch.Tensor) and mask.dim() == 4 else mask


def _numbers_per_token(kwargs: dict[str, Any], known: torch.Tensor) -> list[str]:
    """Other arguments that have an entry for each token of the input (B, n): ``token_type_ids``, for example."""
    rows, n = known.shape
    others = [
        (name, value) for name, value in kwargs.items() if name not in _ALIGNED and isinstance(value, torch.Tensor)
    ]
    return [name for name, t in others if t.dim() > 1 and t.shape[0] in (1, rows) and t.shape[1] == n]


def _prepend_tokens(
    kwargs: dict[str, Any],
    known: torch.Tensor,
    position_ids: torch.Tensor | None,
    covered: int,
    start: int,
    remembered: torch.Tensor | None,
    remembered_positions: torch.Tensor | None,
    counted: bool,
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor | None]:
    """Put recorded tokens ``covered ... start`` before the input: the adapter has not seen them yet."""
    length = 0 if remembered is None else remembered.shape[1]
    if start > length:
        raise TrajectoryError(
            f"the input starts at token {start}, but the trajectory has {length}: {start - length} tokens are missing between "
            "them. Pass the whole trajectory, or an attention_mask that covers cached and new tokens"
        )
    assert remembered is not None and remembered_positions is not None
    missing = remembered[:, covered:start]
    mask = kwargs.get("attention_mask")
    if kwargs.get("input_ids") is None or bool((missing == UNKNOWN_TOKEN).any()):
        raise TrajectoryError(
            f"this adapter has not seen tokens {covered} to {start}, and they are known only as embeddings. Pass the whole "
            "trajectory"
        )
    what = _numbers_per_token(kwargs, known)
    if isinstance(mask, dict) or (isinstance(mask, torch.Tensor) and mask.dim() == 4):
        what.insert(0, "a mask")
    if position_ids is None and not counted and kwargs.get("position_ids") is not None:
        what.append("position_ids")
    if what:
        raise TrajectoryError(
            f"this adapter has not seen tokens {covered} to {start}; pass them, with {what[0]} for them"
        )
    n = known.shape[1]
    known = torch.cat((missing.to(known.device), known), dim=1)
    kwargs = dict(kwargs, input_ids=known)
    if counted and not torch.equal(remembered_positions, torch.arange(length, device=missing.device)[None]):
        # The model counts from the first token, which is right for new ones only.
        position_ids = torch.arange(start, start + n, device=known.device)[None]
    if position_ids is not None:
        before = remembered_positions[:, covered:start].to(position_ids.device)
        if before.shape[0] != position_ids.shape[0]:
            rows = max(before.shape[0], position_ids.shape[0])
            before, position_ids = before.expand(rows, -1), position_ids.expand(rows, -1)
        position_ids = torch.cat((before, position_ids), dim=1)
        kwargs["position_ids"] = position_ids
    return kwargs, known, position_ids
