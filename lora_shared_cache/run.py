"""The forwards of decoder and attention layers with a shared cache."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch

from . import adapters as peft_adapters
from .attachment import Attachment, AttentionLayer, call_original
from .errors import UnsupportedModelError
from .forward import ForwardPass
from .layer_pass import LayerPass
from .layout import angles_of
from .model_input import begin
from .scopes import forward_scope, layer_scope
from .self_test import try_layer
from .storage import SharedCacheBase

if TYPE_CHECKING:
    from .cache import SharedLoRACache

_AS_IT_IS = nullcontext()


def shared_cache_in(args: tuple, kwargs: dict[str, Any]) -> SharedLoRACache | None:
    """The :class:`SharedLoRACache` among a call's arguments, or None."""
    # GPT-NeoX and its kin call their attention's argument `layer_past`.
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    if cache is None and args:
        cache = next((a for a in args if isinstance(a, SharedCacheBase)), None)
    return cast("SharedLoRACache", cache) if isinstance(cache, SharedCacheBase) else None


def run_attention_layer(layer: AttentionLayer, cache: SharedLoRACache, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The attention layer's forward with a shared cache."""
    now = forward_scope.get()
    if now is None or now.cache is not cache:
        raise UnsupportedModelError(
            f"{layer.name} was called with a SharedLoRACache outside of its model's forward pass; call the model"
        )
    if args:
        # Decoder layers pass keywords; only the hidden states are sometimes positional.
        kwargs = {"hidden_states": args[0], **kwargs}
        args = args[1:]
    if args:
        raise UnsupportedModelError(
            f"{layer.name} is called with {len(args) + 1} positional arguments, which is not supported"
        )
    try:
        layer_pass = LayerPass(now, layer)
        kwargs = now.first_rope(layer, kwargs)
        if layer_pass.private is None:
            try_layer(layer, kwargs)
            now.store_rope(layer, kwargs)
            layer_pass.angles = angles_of(kwargs)
        # `run_decoder` has switched gradients off already, for all layers.
        with layer_scope(layer_pass), torch.no_grad() if torch.is_grad_enabled() else _AS_IT_IS:
            out = call_original(layer.module, **kwargs)
        if not (layer_pass.stored and layer_pass.attended):
            # A private layer was not tried out; of any other the attention implementation was changed meanwhile.
            raise UnsupportedModelError(
                f"{layer.name}: it does not give its own keys and values to the cache and call its attention through "
                "Transformers' attention interface. Use a DynamicCache per adapter"
            )
    except BaseException:
        if now.entered_from_inside:
            peft_adapters.remove_left_hooks(now.attachment.root)
            _leave_from_inside(now)
        raise
    if now.entered_from_inside and layer.layer_idx == len(now.attachment.layers) - 1:
        try:
            now.check_layers()
            now.commit()
        finally:
            _leave_from_inside(now)
    return out


# The same for a compiled model, whose graph breaks here.
run_uncompiled = torch.compiler.disable(run_attention_layer)


@torch.compiler.disable
def run_decoder(attachment: Attachment, cache: SharedLoRACache, kwargs: dict[str, Any]) -> Any:
    """The decoder's forward with a shared cache. A compiled model breaks its graph here; decode steps have their own."""
    outer = forward_scope.get()
    if outer is not None and outer.cache is cache:
        return call_original(attachment.decoder, **kwargs)
    with cache._exclusive():
        try:
            try:
                attachment.enter(cache)
                # What is cached carries no gradient; a gradient through the rest alone would be silently wrong.
                with torch.no_grad():
                    cache._graphs.ahead.claim(attachment, kwargs)
                    now, kwargs = begin(attachment, cache, kwargs)
                    now.block = cache._graphs.block_of(now, kwargs)
                    in_steps = not now.block and cache._graphs.takes_in_steps(now, kwargs)
                    out = _run_in_steps(now, kwargs) if in_steps else _run(now, kwargs)
            finally:
                attachment.leave(cache)
        except BaseException:
            peft_adapters.remove_left_hooks(attachment.root)
            raise
    return out


def _run(now: ForwardPass, kwargs: dict[str, Any]) -> Any:
    out = now.cache._graphs.run(now, kwargs)
    if out is None:
        with forward_scope(now):
            out = call_original(now.attachment.decoder, **kwargs)
        now.check_layers()
    if now.blind:
        # Generate throws it away; nobody shall take it for an answer.
        out[0].fill_(float("nan"))
    now.commit()
    return out


def _run_in_steps(now: ForwardPass, kwargs: dict[str, Any]) -> Any:
    """A pass of a few new tokens, one by one; returns what it returns at once."""
    cache = now.cache
    before = cache._turn_state()
    outs = []
    try:
        for column in range(now.stop - now.start):
            step = now.only(column)
            cache._prepare_storage(step)
            one = dict(kwargs)
            for name in ("input_ids", "position_ids"):
                if isinstance(one.get(name), torch.Tensor):
                    one[name] = one[name][:, column : column + 1]
            if isinstance(one.get("attention_mask"), torch.Tensor):
                one["attention_mask"] = one["attention_mask"][:, : step.stop]
            outs.append(_run(step, one))
    except BaseException:
        cache._undo_steps(now.previous, before)
        raise
    fields = {
        name: torch.cat([out[name] for out in outs], dim=1) if isinstance(value, torch.Tensor) else value
        for name, value in outs[-1].items()
    }
    return type(outs[-1])(**fields)


def enter_from_inside(attachment: Attachment, cache: SharedLoRACache, frame_locals: dict[str, Any]) -> None:
    """Begin a pass for a decoder whose forward already runs: the cache's first use in a plain call of the model."""
    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    kwargs = {name: frame_locals.get(name) for name in names}
    if kwargs["input_ids"] is not None:
        kwargs["inputs_embeds"] = None
    try:
        now, _ = begin(attachment, cache, kwargs)
    except BaseException:
        peft_adapters.remove_left_hooks(attachment.root)
        raise
    now.entered_from_inside = True
    try:
        forward_scope.set(now)
        attachment.enter(cache)
    except BaseException:
        _leave_from_inside(now)
        raise


def clear_interrupted_pass() -> None:
    """End a pass that was entered from inside and then broke off between two attention layers.

    Nothing wraps such a pass, so the next call of the decoder in this thread cleans up. Nothing of it was committed.
    """
    now = forward_scope.get()
    if now is not None and now.entered_from_inside:
        _leave_from_inside(now)


def _leave_from_inside(now: ForwardPass) -> None:
    now.attachment.leave(now.cache)
    forward_scope.set(None)
    now.entered_from_inside = False
