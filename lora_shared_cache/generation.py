"""What ``generate`` does with a non-empty shared cache: checks of the prompt as a whole, before anything is run.

``generate`` cuts its inputs by the cache's length in several ways (docs/design.md, section 5); inside the model only
what is left can be seen. Here the whole prompt is still there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationMixin, StoppingCriteriaList

from . import adapters as peft_adapters
from .ahead import NextStep
from .attachment import Attachment
from .errors import SharedCacheError, TrajectoryError, UnsupportedModelError
from .scopes import forward_scope, generate_scope

if TYPE_CHECKING:
    from .cache import SharedLoRACache

# Arguments that select assisted decoding, which feeds the whole prompt again.
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "custom_generate")


# Where `generate` has them among its positional arguments.
_STOPPING_CRITERIA = 3


def run_generate(
    attachment: Attachment, cache: SharedLoRACache, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """``model.generate`` with a shared cache.

    Raises:
        TrajectoryError: the prompt contradicts the trajectory or ends before its end, or ``generate`` could not feed it
            rightly.
        SharedCacheError: what may be generated does not fit into ``max_cache_len``.
    """
    cache._bind(attachment)
    try:
        if _setting(attachment, args, kwargs, "cache_implementation") == "paged":
            raise UnsupportedModelError(
                "cache_implementation='paged' is continuous batching, which has a cache of its own and would leave the "
                "SharedLoRACache out. Leave out one of the two; batches whose rows have different adapters: adapter_names="
            )
        _find_invocations(attachment, cache, args, kwargs)
        limit, length = _check_prompt(attachment, cache, args, kwargs)
        _check_room(attachment, cache, args, kwargs)
        with cache._prompt(length, limit):
            return original(*args, **_with_next_step(attachment, cache, args, kwargs))
    except BaseException:
        # PEFT leaves its own behind, and they would say what the next call's rows are.
        peft_adapters.remove_left_hooks(attachment.root)
        raise
    finally:
        cache._prompt_invocations = None


def _find_invocations(attachment: Attachment, cache: SharedLoRACache, args: tuple, kwargs: dict[str, Any]) -> None:
    """For an adapter that is active from an invocation on (aLoRA): where that is in this prompt, for the whole call."""
    attachment.refresh()
    agent = attachment.agent()
    inputs = _inputs(args, kwargs)
    name = cache._check_activated(attachment, agent)
    if name is None or inputs is None or inputs.is_floating_point():
        return
    mask = kwargs.get("attention_mask")
    before = mask.shape[1] - inputs.shape[1] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else 0
    recorded = cache.token_ids
    if before > 0 and recorded is not None and len(recorded) % len(inputs) == 0:
        # Rows are repeated already for several sequences.
        recorded = recorded[:: len(recorded) // len(inputs), :before]
        inputs = torch.cat((recorded.to(inputs.device), inputs), dim=1)
    offsets = peft_adapters.alora_offsets_argument(attachment.lora_layers)
    starts = cache._invocations([name], inputs, offsets)
    repeats = _setting(attachment, args, kwargs, "num_return_sequences") or 1
    cache._prompt_invocations = (offsets, tuple(start for start in starts for _ in range(repeats)))


def _inputs(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The prompt of ``generate``: ids (B, n), or embeddings (B, n, hidden size)."""
    given = (args[0] if args else None, *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
    return next((value for value in given if value is not None), None)


def _setting(attachment: Attachment, args: tuple, kwargs: dict[str, Any], name: str) -> Any:
    """A setting of ``generate``, given or from the configuration in force."""
    config = (
        kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or attachment.root.generation_config
    )
    value = kwargs.get(name)
    return value if value is not None else getattr(config, name, None)


def _check_prompt(
    attachment: Attachment, cache: SharedLoRACache, args: tuple, kwargs: dict[str, Any]
) -> tuple[int | None, int]:
    """The token from which on a prompt is run again, if there is one, and the length of the prompt that was checked."""
    if cache.trajectory_length == 0:
        return None, 0
    inputs = _inputs(args, kwargs)
    setting = partial(_setting, attachment, args, kwargs)
    if inputs is None:
        raise TrajectoryError(
            f"generate was called without a prompt, but the cache holds {cache.trajectory_length} tokens. Pass the whole "
            "trajectory"
        )
    agent = cache._start_turn(attachment, whole=True)
    repeats = (setting("num_beams") or 1) if (setting("num_beams") or 1) > 1 else (setting("num_return_sequences") or 1)
    rows, n = inputs.shape[0] * repeats, inputs.shape[1]
    cache._trajectory.check_rows(rows)
    mask = kwargs.get("attention_mask")
    mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    columns = n if mask is None else mask.shape[1]
    length = cache.trajectory_length
    embeds = kwargs.get("inputs_embeds")
    if embeds is not None and embeds.shape[1] != columns:
        # `generate` cuts them by the number of cached tokens, whatever the mask says.
        raise TrajectoryError(
            f"inputs_embeds has {embeds.shape[1]} tokens for a text of {columns}; generate takes embeddings of the whole "
            "trajectory only. Pass all of them, or the new tokens as input_ids with the attention_mask over the whole"
        )
    assisted = any(setting(name) for name in _ASSISTED)
    if columns == n:
        # The whole trajectory, as ids. Only a prefix of it was seen by this adapter; all of it is checked.
        if inputs.dtype in (torch.int32, torch.int64) and cache.check_tokens:
            cache._trajectory.check_tokens(inputs.long().repeat_interleave(repeats, dim=0), 0)
        if n < length:
            raise TrajectoryError(
                f"the prompt has {n} tokens, but the cached trajectory has {length}. If these are new tokens only, pass an "
                f"attention_mask over all {length + n}; to go back: cache.crop(-{length - n}); to start over: cache.reset()"
            )
    elif columns > n and assisted:
        raise TrajectoryError(
            "assisted decoding feeds the prompt again, so it needs the whole trajectory as input_ids, not only its new tokens"
        )
    if mask is not None and cache.check_tokens:
        cache._trajectory.check_padding(mask.repeat_interleave(repeats, dim=0))
    # `generate` runs `ids[:, -(n - cached):]`: with everything cached that is all of them. The last token is run again.
    limit = columns - 1 if cache._seen_length(agent) >= columns else None
    return limit, columns


def _check_room(attachment: Attachment, cache: SharedLoRACache, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse what may not fit before anything is run: in the middle of ``generate`` the generated text would be lost."""
    inputs, new = _inputs(args, kwargs), _setting(attachment, args, kwargs, "max_new_tokens")
    if cache.max_cache_len is None or inputs is None or new is None:
        return
    mask = kwargs.get("attention_mask")
    prompt = mask.shape[1] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else inputs.shape[1]
    # The last token is returned without having been in the model.
    if prompt + new - 1 > cache.max_cache_len:
        raise SharedCacheError(
            f"the trajectory would have up to {prompt + new - 1} tokens, {prompt} of the prompt and max_new_tokens={new} less "
            f"the last, but max_cache_len is {cache.max_cache_len}. Pass a smaller max_new_tokens, or make the cache larger"
        )


def _with_next_step(
    attachment: Attachment, cache: SharedLoRACache, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of ``generate`` with a last stopping criterion that starts each chosen token's step at once."""
    setting = partial(_setting, attachment, args, kwargs)
    # Beams are in another order when they come; assisted decoding feeds several tokens at once.
    if not cache.cuda_graphs or (setting("num_beams") or 1) > 1 or any(setting(name) for name in _ASSISTED):
        return kwargs
    if len(args) > _STOPPING_CRITERIA:
        return kwargs
    inputs, new = _inputs(args, kwargs), setting("max_new_tokens")
    length = setting("max_length")
    if new is not None:
        length = new + (0 if inputs is None or inputs.is_floating_point() else inputs.shape[1])
    criteria = [*(kwargs.get("stopping_criteria") or ()), NextStep(cache._graphs.ahead, length)]
    return dict(kwargs, stopping_criteria=StoppingCriteriaList(criteria))


def dropped_cache(attachment: Attachment, kwargs: dict[str, Any]) -> SharedLoRACache | None:
    """The cache that ``generate`` was given where the model's own ``prepare_inputs_for_generation`` has left it out, or None.

    Phi-3 does so once, when a text gets longer than ``original_max_position_embeddings``: the whole text is run again then, since
    its rotation may change there. Where the rotation does not, what is cached still holds.

    Raises:
        UnsupportedModelError: the rotation changes with the length of the text, so cached keys no longer fit.
    """
    cache: SharedLoRACache | None = generate_scope.get()
    if cache is None or cache._attachment is not attachment or forward_scope.get() is not None:
        return None
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache") is False:
        return None
    # Other calls without a cache are meant so: classifier-free guidance runs another prompt in the middle of `generate`.
    config, root = attachment.decoder.config, type(attachment.root)
    limit = getattr(config, "original_max_position_embeddings", None)
    if limit is None or root.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
        return None
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    text = next((t.shape[1] for t in (mask, ids) if isinstance(t, torch.Tensor) and t.dim() == 2), 0)
    if not cache._told_length() <= limit < text:
        return None
    if cache.trajectory_length and attachment.rotation_changes:
        raise UnsupportedModelError(
            f"{root.__name__} leaves the cache out here: beyond {limit} tokens its rotation is another one, and the "
            f"{cache.trajectory_length} cached tokens were rotated with the first. Go on with an empty cache: cache.reset()"
        )
    return cache
