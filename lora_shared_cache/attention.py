"""The attention implementation ``"shared_lora"`` and its mask function, registered together.

Within a forward pass with a :class:`SharedLoRACache` it attends over base plus low-rank entries; anywhere else it hands
over to the model's own implementation. Registering attention without the mask function would drop causality silently.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import SharedCacheError
from .layout import LayoutProbe
from .scopes import forward_scope, layer_scope

# No "flash", "sdpa" or "flex_attention" in it: Transformers special-cases such names by substring.
ATTENTION_NAME = "shared_lora"
BACKEND_VARIABLE = "LORA_SHARED_CACHE_BACKEND"

# Implementation that a config had before ours was switched on for a forward pass, by id of the config.
_originals: dict[int, str] = {}


def attention_backend() -> str | None:
    """ "reference" or "triton", from the environment variable LORA_SHARED_CACHE_BACKEND; absent: None.

    None takes the Triton kernels on CUDA for every call that they serve, and the reference for all others.

    Raises:
        SharedCacheError: the variable holds anything else.
    """
    chosen = os.environ.get(BACKEND_VARIABLE) or None
    if chosen not in (None, "reference", "triton"):
        raise SharedCacheError(f"{BACKEND_VARIABLE} is {chosen!r}, expected 'reference', 'triton' or nothing")
    return chosen


def register_attention() -> None:
    """Register ``"shared_lora"`` as attention and as mask function. Idempotent."""
    AttentionInterface.register(ATTENTION_NAME, shared_lora_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, shared_lora_mask)


def remember_original(config: Any, implementation: str) -> None:
    """Note which implementation ``config`` had, for forward passes of other threads that run without a shared cache."""
    _originals[id(config)] = implementation


def forget_original(config: Any) -> None:
    """Undo :func:`remember_original`."""
    _originals.pop(id(config), None)


def _original_implementation(config: Any) -> str:
    name = _originals.get(id(config), ATTENTION_NAME)
    # The user chose "shared_lora" for the model itself: without a shared cache it is SDPA.
    return "sdpa" if name in (ATTENTION_NAME, None) else name


def shared_lora_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in Transformers' interface.

    Args:
        module: the attention layer.
        query: (B, Hq, S, D).
        key, value: (B, Hk, T, D), what the cache's ``update`` returned: base keys after RoPE and base values.
        attention_mask: None (causal to the lower right), bool or additive (B or 1, 1, S, T).
        kwargs: ``scaling``, ``dropout``, ``sliding_window``, ``softcap``, ``s_aux`` (sinks), ``is_causal`` ...

    Returns:
        (B, S, Hq, D) and None: attention weights are never formed.

    Raises:
        SharedCacheError: attention dropout or attention weights were asked for.
    """
    scope = layer_scope.get()
    if scope is None:
        return _original_attention(module)(module, query, key, value, attention_mask, **kwargs)
    if isinstance(scope, LayoutProbe):
        scope.attention(query, key, value, attention_mask)
    if kwargs.get("dropout"):
        raise SharedCacheError(
            f"attention dropout {kwargs['dropout']} in training mode can't be used with a SharedLoRACache. Call model.eval()"
        )
    if kwargs.get("output_attentions"):
        raise SharedCacheError(
            "output_attentions=True: attention weights are never formed with a SharedLoRACache. Use a DynamicCache and "
            "attn_implementation='eager' to look at them"
        )
    out = scope.attend(
        query,
        key,
        value,
        attention_mask=attention_mask,
        scale=kwargs.get("scaling"),
        # A mask from Transformers holds causality, window and padding already.
        is_causal=attention_mask is None
        and kwargs.get("is_causal") is not False
        and getattr(module, "is_causal", True),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return out.transpose(1, 2).contiguous(), None


def _original_attention(module: nn.Module) -> Callable[..., Any]:
    name = _original_implementation(getattr(module, "config", None))
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def shared_lora_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask in Transformers' interface: None where causality aligned to the lower right is all that is needed.

    Unlike SDPA's, None serves new tokens on a non-empty cache too: no (S, T) mask is made for them.

    Returns:
        None, or bool (B or 1, 1, q_length, kv_length), True where attention is allowed.
    """
    arguments = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )
    if forward_scope.get() is None:
        original = ALL_MASK_ATTENTION_FUNCTIONS.get(_original_implementation(config))
        # Without a mask function of its own Transformers passes no mask to that implementation.
        return original(**arguments, allow_is_causal_skip=allow_is_causal_skip, config=config) if original else None
    slot = forward_scope.get().slot
    everything_visible = local_size is None or kv_length <= local_size
    if slot is not None and slot.window is not None and kv_offset is slot.window.first:
        # A sliding layer holds its last tokens only; from which one on, the device knows. Counted from that one, all is as usual.
        arguments.update(q_offset=slot.window.index, kv_offset=0)
        if attention_mask is not None:
            places = torch.arange(kv_length, device=attention_mask.device) + slot.window.first
            attention_mask = attention_mask.index_select(1, places.clamp_(max=attention_mask.shape[1] - 1))
            arguments["attention_mask"] = attention_mask
    plain = mask_function is causal_mask_function or (local_size is not None and everything_visible)
    if plain and slot is not None:
        # The new token sees all of the ``slot.length`` tokens but padding.
        return None if attention_mask is None else attention_mask[:, None, None, :]
    ends_together = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if plain and allow_is_causal_skip and everything_visible and ends_together:
        if attention_mask is None:
            return None
        visible = attention_mask[:, kv_offset : kv_offset + kv_length]
        if visible.shape[-1] == kv_length and bool(visible.all()):
            return None
    return sdpa_mask(**arguments, allow_is_causal_skip=False)
