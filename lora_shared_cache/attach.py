"""``attach`` and ``detach``: instance-level ``forward`` methods on the decoder, its attention layers and k/v projections.

Nothing is patched on a class and nothing is stored in the model's weights; :func:`detach` removes every attribute
again. While no :class:`SharedLoRACache` is in play each replaced method calls the original at once.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from . import adapters as peft_adapters
from .attachment import (
    FUSED_PROJECTIONS,
    Attachment,
    AttentionLayer,
    ModuleRecord,
    call_original,
    copy_of,
    key_value_sources,
    record_of,
    replace_forward,
    restore_forward,
)
from .attention import register_attention
from .errors import SharedCacheError, UnsupportedModelError
from .generation import dropped_cache, run_generate
from .graphs import KNOWN_HOOKS, forget_graphs
from .run import clear_interrupted_pass, run_attention_layer, run_decoder, run_uncompiled, shared_cache_in
from .scopes import attach_scope, layer_scope
from .self_test import try_model

# Two threads may use their first cache on one model at the same time.
_attach_lock = threading.Lock()
_GENERATE_RECORD = "_lora_shared_cache_generate"


def attach(model: nn.Module) -> nn.Module:
    """Prepare a model for :class:`SharedLoRACache`. Called automatically at a cache's first use.

    Needed by hand only before ``torch.compile``. Idempotent; a model that runs without a :class:`SharedLoRACache`
    behaves as before. :func:`detach` undoes it.

    One attention layer of each kind is tried out with one adapter of each kind, in a forward pass of three tokens that ends
    with the last such layer: what the split gives for K and V is compared with PEFT's own. Where that is not possible now (no
    adapters yet, training mode, offloaded weights, forward hooks), and for adapters that come later, it is done in the first
    pass with a shared cache.

    Args:
        model: a ``PeftModel``, or a Transformers model with or without adapters of its own ``load_adapter``.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the model has attention layers whose keys and values do not come from ``k_proj`` and
            ``v_proj`` or from one fused projection, or none at all; or a layer can't be split, or its split K or V are not
            PEFT's. The model is then as before. ``SharedLoRACache(model, private_layers=...)`` leaves such layers whole.
    """
    attach_and_try(model)
    return model


def attach_and_try(model: nn.Module, private_layers: tuple[int, ...] = ()) -> None:
    """As :func:`attach`; ``private_layers`` need not be splittable, and are not tried out."""
    attached_before = attachment_of(model) is not None
    attach_untried(model)
    attachment = attachment_of(model)
    assert attachment is not None
    try:
        try_model(attachment, private_layers, KNOWN_HOOKS)
    except BaseException:
        if not attached_before:
            detach(model)
        raise


def attach_untried(model: nn.Module) -> None:
    """Attach in the middle of a call of the model: its layers are tried out as the pass comes to them."""
    register_attention()
    root = _unwrap(model)
    if isinstance(model, PeftModel):
        # The Transformers model inside does not know of them.
        peft_adapters.check_no_virtual_tokens(model.peft_config)
    with _attach_lock:
        _attach(root)


def _attach(root: Any) -> None:
    attachment = attachment_of(root)
    if attachment is not None:
        if not any(module is root for module in attachment.root.modules()):
            # A part of this model was attached before.
            attachment.root = root
            _replace_generate(root, attachment)
        attachment.refresh()
        return
    if getattr(root.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(root).__name__} is an encoder-decoder model; only decoders can share a cache. Use an "
            "EncoderDecoderCache per adapter"
        )
    _check_no_other_state(root)
    modules = _attention_layers(root)
    crossing = next(
        (path for path, module in modules.items() if "crossattention" in type(module).__name__.lower()), None
    )
    if crossing is not None:
        raise UnsupportedModelError(
            f"{crossing} ({type(modules[crossing]).__name__}) attends to something else than the trajectory (an encoder, "
            "images), which can't be shared. Use a DynamicCache per adapter"
        )
    sources = {path: key_value_sources(module) for path, module in modules.items()}
    unknown = [path for path in modules if sources[path] is None]
    if unknown or not modules:
        where = f"{unknown[0]} ({type(modules[unknown[0]]).__name__})" if unknown else type(root).__name__
        raise UnsupportedModelError(
            f"{where} has no attention with k_proj and v_proj or one of {', '.join(FUSED_PROJECTIONS)}, which "
            f"SharedLoRACache needs{_projections(modules[unknown[0]]) if unknown else ''}. Use a DynamicCache per adapter"
        )
    decoder = _decoder_of(root, modules)
    if not any(getattr(decoder, f"_supports_{what}", False) for what in ("attention_backend", "sdpa", "flash_attn")):
        # Its masks are made for its own attention, so it may break before its layers can be tried out.
        name = type(next(iter(modules.values()))).__name__
        raise UnsupportedModelError(
            f"{name}: {type(decoder).__name__} has eager attention only. It does not call its attention through Transformers' "
            "attention interface, so the low-rank part can't be applied inside it. Use a DynamicCache per adapter"
        )
    attachment = Attachment(root, decoder)
    layer_types = getattr(decoder.config, "layer_types", None)
    for path, module in modules.items():
        index = int(module.layer_idx)
        if index in attachment.layers:
            raise UnsupportedModelError(
                f"{path} and {attachment.layers[index].path} both write layer {index} of the cache. Use a "
                "DynamicCache per adapter"
            )
        rope_key = layer_types[index] if layer_types is not None and index < len(layer_types) else ""
        attachment.layers[index] = AttentionLayer(module, path, index, rope_key, attachment, sources[path] or {})
    if sorted(attachment.layers) != list(range(len(attachment.layers))):
        raise UnsupportedModelError(
            f"{type(root).__name__} has attention in layers {sorted(attachment.layers)} only; what the other layers keep can't "
            "be shared. Use a DynamicCache per adapter"
        )
    # Refuse before anything is changed.
    names = tuple(getattr(root, "peft_config", {}) or {})
    peft_adapters.check_model_wide(root, getattr(root, "peft_config", {}) or {}, names)
    _restore(root)  # what is left of an attachment that was pickled
    replace_forward(decoder, ModuleRecord(attachment), _decoder_forward)
    for layer in attachment.layers.values():
        replace_forward(layer.module, ModuleRecord(layer), _attention_forward)
    _replace_generate(root, attachment)
    attachment.refresh()


def _replace_generate(root: Any, attachment: Attachment) -> None:
    if hasattr(type(root), "generate"):
        root.__dict__[_GENERATE_RECORD] = ModuleRecord(attachment, root.__dict__.get("generate"))
        root.__dict__["generate"] = MethodType(functools.wraps(type(root).generate)(copy_of(_generate)), root)


def detach(model: nn.Module) -> nn.Module:
    """Restore a model as it was before :func:`attach`. A model that is not attached is left alone.

    Raises:
        SharedCacheError: while a forward pass with a shared cache is running in another thread.
    """
    root = _unwrap(model)
    attachment = attachment_of(root)
    if attachment is None:
        _restore(root)  # it may come out of a pickle
        return model
    clear_interrupted_pass()
    if any(who() is not None for who in attachment.active):
        raise SharedCacheError("detach was called while a forward pass with a SharedLoRACache is running")
    _restore(attachment.root)
    forget_graphs(attachment)
    attachment.layers.clear()
    return model


def _restore(root: nn.Module) -> None:
    for module in root.modules():
        restore_forward(module)
        record = module.__dict__.pop(_GENERATE_RECORD, None)
        if record is not None:
            module.__dict__.pop("generate", None)
            if record.original is not None:
                module.__dict__["generate"] = record.original


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model (or of a part of an attached model), or None if it is not attached."""
    root = _unwrap(model)
    for module in root.modules():
        record = record_of(module)
        if isinstance(record, ModuleRecord) and isinstance(record.owner, Attachment):
            return record.owner
    return None


def _unwrap(model: Any) -> Any:
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(root, PreTrainedModel):
        raise UnsupportedModelError(
            f"attach needs a Transformers model or a PeftModel around one, got {type(model).__name__}"
        )
    return root


def _check_no_other_state(root: PreTrainedModel) -> None:
    """Refuse hybrid models: Transformers' own cache keeps more than keys and values for some of their layers.

    Raises:
        UnsupportedModelError: with the layers, what kind they are of, and what to do.
    """
    config = root.config.get_text_config(decoder=True)
    if not hasattr(config, "num_hidden_layers"):
        return
    types = getattr(config, "layer_types", None) or []
    others: dict[str, list[int]] = {}
    for index, layer in enumerate(DynamicCache(config=config).layers):
        # A layer without attention has a dummy, in newer versions.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) and type(layer).__name__ != "DummyLayer":
            kind = str(types[index]) if index < len(types) else type(layer).__name__
            others.setdefault(kind, []).append(index)
    if others:
        found = " and ".join(f"layers {indices} ({kind})" for kind, indices in others.items())
        raise UnsupportedModelError(
            f"{type(root).__name__}: {found} keep a state of their own besides keys and values, or in their place. It belongs to "
            "one adapter and can't be shared; use a DynamicCache per adapter"
        )


def _projections(attention: nn.Module) -> str:
    """What an attention layer without known projections has instead."""
    children = [
        name
        for name, child in attention.named_children()
        if isinstance(getattr(child, "weight", None), torch.Tensor) and not name.endswith("norm")
    ]
    if any("kv_a" in name or "kv_b" in name for name in children):
        return f" (latent attention: its keys and values come from {', '.join(n for n in children if 'kv_' in n)})"
    if getattr(attention, "is_kv_shared_layer", False):
        return " (it reads the keys and values of another layer)"
    return f" (it has {', '.join(children)})" if children else ""


def _attention_layers(root: PreTrainedModel) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, module in root.named_modules():
        if isinstance(getattr(module, "layer_idx", None), int) and "attention" in type(module).__name__.lower():
            found[path] = module
    # A decoder layer or a block with its norms may be called attention as well.
    return {path: m for path, m in found.items() if not any(other.startswith(f"{path}.") for other in found)}


def _decoder_of(root: PreTrainedModel, paths: Iterable[str]) -> PreTrainedModel:
    decoder, depth = root, -1
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, PreTrainedModel) and all(p.startswith(prefix) for p in paths) and len(prefix) > depth:
            decoder, depth = module, len(prefix)
    return decoder


def _attention_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    cache = shared_cache_in(args, kwargs)
    if cache is None:
        first_pass = attach_scope.get()
        if first_pass is not None:
            first_pass(record_of(self).owner, args, kwargs)
        if layer_scope.get() is None:
            return call_original(self, *args, **kwargs)
        with layer_scope(None):
            return call_original(self, *args, **kwargs)
    run = run_uncompiled if torch.compiler.is_compiling() else run_attention_layer
    return run(record_of(self).owner, cache, args, kwargs)


def _decoder_forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    clear_interrupted_pass()
    cache = shared_cache_in(args, kwargs)
    if cache is None and not args:
        cache = dropped_cache(record_of(self).owner, kwargs)
        if cache is not None:
            kwargs["past_key_values"] = cache
    if cache is None:
        return call_original(self, *args, **kwargs)
    if args:
        parameters = list(inspect.signature(type(self).forward).parameters)[1:]
        kwargs = {**dict(zip(parameters, args, strict=False)), **kwargs}
    return run_decoder(record_of(self).owner, cache, kwargs)


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    record = self.__dict__[_GENERATE_RECORD]
    original = type(self).generate.__get__(self) if record.original is None else record.original
    cache = shared_cache_in((), kwargs)
    if cache is None:
        return original(*args, **kwargs)
    return run_generate(record.owner, cache, original, args, kwargs)
