"""The self-test: one tiny call of an attention layer with PEFT's own projections, against what the split makes of the same input.

``layout.py`` finds out how a layer turns the outputs of its projections into K and V, with made-up outputs. Here nothing is made
up but the input: PEFT's own forward gives keys and values, the attention module norms and rotates them, and what it would store
is compared with base K/V and low-rank entries as ``LayerPass`` computes, stores and expands them. It is done once for each kind
of attention layer and each kind of adapter on it. The adapter's weights are the real ones; where its effect is smaller than the
base's, B is taken a power of two larger (in a copy), so that what is wrong shows beside the roundings of the base. Where B or A
is zero (a new adapter) random numbers take its place in that copy: then the path is tested, and the numbers of that adapter are
not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache

from . import adapters as peft_adapters
from .attachment import RECORD, Attachment, AttentionLayer, call_original, has_forward_of_its_own
from .buffers import TokenBuffer
from .errors import UnsupportedAdapterError, UnsupportedModelError
from .forward import ForwardPass
from .layer_pass import LayerPass
from .layout import LayoutProbe, RotaryLayout, StopTrial, angles_of, trial_arguments
from .policies import Entry
from .scopes import attach_scope, forward_scope, layer_scope
from .storage import SharedLoRALayer

logger = logging.getLogger(__name__)
TOKENS = 3


def error_bound(dtypes: list[torch.dtype], terms: int, reduced: torch.dtype | None = None) -> float:
    """What the split may differ by, root mean square, relative to that of PEFT's own keys or values.

    The roundings of the two ways are others: some eight, each of 0.2 ``eps`` (half a unit at most, in the root mean square of
    numbers of any size), so 0.6 ``eps`` together, where ``eps`` is that of the coarsest dtype in play; measured 0.3 to 0.7. Twice
    ``eps`` leaves room for layers that round more often, and shows an adapter's part that is 3 % wrong in bfloat16. In float32
    sums in another order show too, which grows with the root of their length. Families compute norms and rotations in float32
    whatever the dtype, so float64 is no better.

    Args:
        dtypes: of keys or values, and of the adapter.
        terms: numbers that a product sums (hidden size).
        reduced: in which products of float32 are really computed, if not in that.
    """
    coarsest = max((*dtypes, torch.float32, *([reduced] if reduced else ())), key=lambda dtype: torch.finfo(dtype).eps)
    eps = float(torch.finfo(coarsest).eps)
    return 2 * eps if coarsest != torch.float32 else eps * (16 + math.sqrt(terms))


def try_layer(layer: AttentionLayer, kwargs: dict[str, Any]) -> None:
    """Try a layer out as far as that has not been done: its layout, then the self-test.

    Args:
        kwargs: keyword arguments of a real call.

    Raises:
        UnsupportedModelError: the layer can't be split, or the split gives other keys or values than PEFT.
    """
    if layer.tested != layer.attachment.version:
        layer.find_layout(kwargs)
        _self_test(layer, kwargs)


def try_model(attachment: Attachment, private: tuple[int, ...] = (), known_hooks: tuple[str, ...] = ()) -> None:
    """Try out each kind of layer that has LoRA on keys or values, in one pass of three tokens that ends with the last kind.

    Where a pass is not possible or would leave traces, nothing is done, and ``attachment.not_tried`` says why. The first pass
    with a shared cache tries out what was not tried yet in any case.

    Args:
        private: layers that are not split.
        known_hooks: Python modules whose forward hooks may be called.

    Raises:
        UnsupportedModelError: as :func:`try_layer`.
    """
    last: dict[tuple, int] = {}
    for index, layer in attachment.layers.items():
        if index not in private and layer.adapted() and layer.tested != attachment.version:
            last.setdefault((layer.kind_of_module(), *(kind for kind, _ in _adapters(layer))), index)
    if not last:
        return
    reason = _why_no_pass(attachment, known_hooks)
    if reason is None:
        # Any token but padding, which some models warn of.
        token = int(getattr(attachment.decoder.config, "pad_token_id", None) == 0)
        ids = torch.full((1, TOKENS), token, device=_device_of_inputs(attachment))
        first_pass = _FirstPass(set(last.values()))
        try:
            attachment.enter(first_pass)
            with attach_scope(first_pass), torch.no_grad():
                call_original(
                    attachment.decoder,
                    input_ids=ids,
                    past_key_values=DynamicCache(config=attachment.decoder.config),
                    use_cache=True,
                )
        except StopTrial:
            pass
        except UnsupportedModelError:
            raise
        except Exception as error:
            reason = f"{type(attachment.decoder).__name__} could not be called: {type(error).__name__}: {error}"
        finally:
            attachment.leave(first_pass)
    if reason is not None:
        _put_off(attachment, type(attachment.decoder).__name__, reason)
    else:
        attachment.not_tried.pop(type(attachment.decoder).__name__, None)


class _FirstPass:
    """Tries out certain attention layers as a pass comes to them, and ends the pass with the last one."""

    def __init__(self, indices: set[int]):
        self.indices = indices

    def __call__(self, layer: AttentionLayer, args: tuple, kwargs: dict[str, Any]) -> None:
        if layer.layer_idx in self.indices:
            if args:
                kwargs = {"hidden_states": args[0], **kwargs}
            with attach_scope(None):
                try_layer(layer, kwargs)
            self.indices.discard(layer.layer_idx)
        if not self.indices:
            raise StopTrial


def _why_no_pass(attachment: Attachment, known_hooks: tuple[str, ...]) -> str | None:
    if attachment.decoder.training:
        return "the model is in training mode"
    if any(t.is_meta for t in (*attachment.decoder.parameters(), *attachment.decoder.buffers())):
        return "weights are offloaded (meta device)"
    if attachment.has_hooks(known_hooks):
        return "modules of the model have forward hooks"
    return None


def _device_of_inputs(attachment: Attachment) -> torch.device:
    embeddings = attachment.decoder.get_input_embeddings()
    parameters = attachment.decoder.parameters() if embeddings is None else embeddings.parameters()
    return cast(torch.device, next(parameters).device)


def _put_off(attachment: Attachment, what: str, reason: str) -> None:
    if attachment.not_tried.get(what) != reason:
        attachment.not_tried[what] = reason
        logger.info("%s was not tried out yet: %s", what, reason)


# ---- one layer -----------------------------------------------------------------------------------------------------


def _self_test(layer: AttentionLayer, kwargs: dict[str, Any]) -> None:
    """Compare the split with PEFT for each kind of adapter on the layer that was not compared on a layer of its kind."""
    attachment = layer.attachment
    complete = True
    for of_adapter, name in _adapters(layer):
        kind = (layer.kind, of_adapter)
        if kind in attachment.tested:
            continue
        what = f"{layer.path}, adapter {name!r}"
        reason = _why_not_now(layer, name)
        if reason is None:
            reason = _compare(layer, name, kwargs)
            attachment.tested.add(kind)
        else:
            complete = False
        if reason is None:
            attachment.not_tried.pop(what, None)
        else:
            _put_off(attachment, what, reason)
    if complete:
        layer.tested = attachment.version


def _adapters(layer: AttentionLayer) -> list[tuple[tuple, str]]:
    """One adapter of each kind among those on the layer that can be split, with what makes the kind."""
    found: dict[tuple, str] = {}
    modules = {which: layer.projection(which) for which in layer.adapted()}
    for name in layer.attachment.adapters():
        parts = []
        try:
            for which, module in modules.items():
                peft_adapters.check_expressible(f"{layer.path}.{which}", module, [name])
                if name in module.lora_A:
                    down, up = module.lora_A[name], module.lora_B[name]
                    changed = bool(module._forward_hooks), has_forward_of_its_own(module)
                    parts.append(
                        (which, type(module), type(module.base_layer), *changed, type(down), type(up))
                        + (down.weight.dtype, up.weight.dtype, up.bias is not None, type(module.lora_variant.get(name)))
                    )
        except UnsupportedAdapterError:
            continue  # refused when its turn comes
        if parts:
            found.setdefault(tuple(parts), name)
    return list(found.items())


def _why_not_now(layer: AttentionLayer, name: str) -> str | None:
    for which in layer.adapted():
        module = layer.projection(which)
        if module.merged:
            return "adapters are merged"
        if name in module.lora_A and (module.lora_A[name].weight.is_meta or module.lora_B[name].weight.is_meta):
            return "the adapter's weights are offloaded (meta device)"
        if has_forward_of_its_own(module) and (module.disable_adapters or module.active_adapters != [name]):
            return f"{which} has a forward of its own, and the adapter is not active"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


@dataclass
class _TrialLayer(AttentionLayer):
    """An attention layer whose projections are stand-ins."""

    stand_ins: _StandIns | None = None

    def projection(self, which: str) -> Any:
        name = self.sources.get(which, which)
        made = {} if self.stand_ins is None else self.stand_ins.made
        return made.get(name, getattr(self.module, name))


class _TrialAttachment:
    """What a layer of a pass asks of its attachment; nothing is kept."""

    def cached_weights(self, key: Any, compute: Callable[[], Any]) -> Any:
        return compute()


class _TrialCache(Cache):
    """What a layer of a pass asks of its cache: storage for one layer."""

    private_layers: tuple[int, ...] = ()
    low_rank_dtype = None

    def __init__(self, layer_idx: int):
        super().__init__(layers=[])
        self.layers = {layer_idx: SharedLoRALayer(cast(Any, self))}  # type: ignore[assignment]
        self._rope_length: dict[str, int] = {}
        self._ropes: dict[str, tuple[TokenBuffer, TokenBuffer]] = {}

    def _rope_buffers(self, key: str) -> tuple[TokenBuffer, TokenBuffer]:
        return self._ropes.setdefault(key, (TokenBuffer(-2, broadcast_rows=True), TokenBuffer(-2, broadcast_rows=True)))

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return layer_scope.get().update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class _PeftProbe(LayoutProbe):
    """A call of the layer in which the projections give what PEFT gives."""

    def __init__(self, stand_ins: _StandIns):
        super().__init__({})
        self.stand_ins = stand_ins

    def project(self, which: str, module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.stand_ins.whole(which, module, x)


class _SplitTrial(LayerPass):
    """A call of the layer as in a pass with a shared cache, up to its attention."""

    trial = True
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __init__(self, forward_pass: ForwardPass, layer: AttentionLayer, stand_ins: _StandIns):
        super().__init__(forward_pass, layer)
        self.stand_ins = stand_ins

    def project(self, which: str, module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().project(which, self.stand_ins.of(which, module, x), x)

    def _plan(self, what: str, compute: Callable[[], Any]) -> Any:
        # Projections that were not asked yet have no stand-in yet.
        return compute()

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Note queries, and keys and values with the low-rank part; nothing after this matters."""
        low_rank, up, gain, delta_gain = self._low_rank_of_keys(key.shape[1])
        if low_rank is not None and up is not None:
            key = self._expanded_keys(key, low_rank, up, gain, delta_gain)
        low_rank, up = self._low_rank("v_proj")
        if low_rank is not None and up is not None:
            value = (value + low_rank[:, None].to(up.dtype) @ up).to(value.dtype)
        self.found = query, key, value
        raise StopTrial


class _StandIns:
    """Copies of a layer's LoRA modules in which one adapter alone is active, as strong as the base.

    All weights but B are PEFT's own; nothing is written to the modules.
    """

    def __init__(self, name: str):
        self.name = name
        self.made: dict[str, Any] = {}
        self.inputs: dict[str, torch.Tensor] = {}

    def of(self, which: str, module: Any, x: torch.Tensor) -> Any:
        """The stand-in for a projection; made when it is first called, with (1, n, in_features)."""
        if which not in self.made:
            self.made[which] = _alone(module, self.name)
            self.inputs[which] = x
            if self.name in module.lora_A and not has_forward_of_its_own(module):
                _strengthen(self.made[which], self.name, x)
        return self.made[which]

    def whole(self, which: str, module: Any, x: torch.Tensor) -> torch.Tensor:
        """What PEFT's own forward gives: base and adapter together."""
        stand_in = self.of(which, module, x)
        if has_forward_of_its_own(module):
            return cast(torch.Tensor, call_original(module, x))
        activated = self.name in stand_in.lora_variant  # of an aLoRA; it is active from the first token on
        return cast(
            torch.Tensor, type(module).forward(stand_in, x, **({"alora_offsets": [x.shape[1]]} if activated else {}))
        )

    def culprit(self, layer: AttentionLayer) -> str | None:
        """The projection whose own output is not base + s B A x, with its class; None: there is none, so it is the attention."""
        for which, stand_in in self.made.items():
            if self.name not in stand_in.lora_A:
                continue
            x = self.inputs[which]
            whole = self.whole(which, layer.projection(which), x)
            expected = stand_in.base_layer(x) + _delta(stand_in, self.name, x)
            terms, reduced = x.shape[-1], _reduced_precision(x.device)
            if not _relative(expected, whole) <= 2 * error_bound([whole.dtype, expected.dtype], terms, reduced):
                return f"{which} ({type(layer.projection(which)).__name__})"
        return None


def _alone(module: Any, name: str) -> Any:
    """A copy of a LoRA module, with the same weights, in which only one adapter is active, and without dropout."""
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    for own in ("forward", RECORD):
        copy.__dict__.pop(own, None)
    copy.__dict__.update(_disable_adapters=False, _active_adapter=[name], merged_adapters=[])
    copy.__dict__["_modules"] = dict(
        module._modules, lora_dropout=nn.ModuleDict({name: nn.Identity()} if name in module.lora_A else {})
    )
    return copy


def _strengthen(stand_in: Any, name: str, x: torch.Tensor) -> None:
    """Make the adapter's part of a stand-in as large as the base's: B times a power of two; random numbers where it is zero."""
    modules = stand_in._modules
    for container in ("lora_B", "lora_A"):
        if _rms(_delta(stand_in, name, x)) == 0:
            linear = modules[container][name]
            noise = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(1)).to(linear.weight)
            modules[container] = nn.ModuleDict({name: _with_weights(linear, noise, linear.bias)})
    size, base = _rms(_delta(stand_in, name, x)), _rms(stand_in.base_layer(x))
    if 0 < size < base and math.isfinite(base):
        factor, up = 2.0 ** round(math.log2(base / size)), modules["lora_B"][name]
        bias = None if up.bias is None else up.bias.detach() * factor
        modules["lora_B"] = nn.ModuleDict({name: _with_weights(up, up.weight.detach() * factor, bias)})


def _with_weights(linear: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """A copy of a linear layer with another weight and bias. A shared A is a buffer, so it may be one here."""
    copy = object.__new__(type(linear))
    copy.__dict__.update(linear.__dict__)
    copy.__dict__["_buffers"] = {key: t for key, t in linear._buffers.items() if key not in ("weight", "bias")}
    copy.__dict__["_parameters"] = dict(
        linear._parameters,
        weight=nn.Parameter(weight, requires_grad=False),
        bias=None if bias is None else nn.Parameter(bias.detach(), requires_grad=False),
    )
    return copy


def _delta(module: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """``s B A x`` by PEFT's modules."""
    down, up = module.lora_A[name], module.lora_B[name]
    return cast(torch.Tensor, up(down(x.to(down.weight.dtype)).to(up.weight.dtype)) * module.scaling[name])


def _rms(x: torch.Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    return _rms(actual.double() - expected.double()) / max(_rms(expected), torch.finfo(torch.float32).tiny)


def _reduced_precision(device: torch.device) -> torch.dtype | None:
    """The dtype in which products are really computed, where that is coarser than the tensors'."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch won't say, since it was set in two ways
        precision = "high"
    # TF32 has the mantissa of float16; "medium" may be bfloat16.
    return {"highest": None, "high": torch.float16}.get(precision, torch.bfloat16)


def _made_up_angles(
    layout: RotaryLayout, kwargs: dict[str, Any], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """cos and sin (1, TOKENS, width) of any angles, in the dtype, form and length (YaRN) of the model's."""
    real = angles_of(kwargs)
    if real is None:
        return None
    pairs = layout.rotary_dim // 2 or real[0].shape[-1]
    angles = torch.rand(1, TOKENS, pairs, generator=generator, dtype=torch.float64) * 2 * math.pi
    if layout.columns == "even":
        angles = angles.repeat_interleave(2, dim=-1)
    elif layout.columns == "first":
        angles = torch.cat((angles, angles), dim=-1)
    stretch = math.hypot(*(float(t.flatten()[0]) for t in real))
    cos, sin = (t.to(real[0].device, real[0].dtype) for t in (angles.cos() * stretch, angles.sin() * stretch))
    return cos, sin


def _compare(layer: AttentionLayer, name: str, kwargs: dict[str, Any]) -> str | None:
    """One tiny call with PEFT's projections, and one that is split.

    Returns:
        None, or why nothing could be compared.

    Raises:
        UnsupportedModelError: keys or values (or the queries of a fused projection) differ.
    """
    hidden, layout = kwargs["hidden_states"], layer.layout
    assert layout is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, hidden.shape[-1], generator=generator).to(hidden)
    call, cache_argument = trial_arguments(kwargs, x, _made_up_angles(layout, kwargs, generator))
    stand_ins = _StandIns(name)
    trial = _TrialLayer(**{f.name: getattr(layer, f.name) for f in fields(layer)}, stand_ins=stand_ins)
    cache = _TrialCache(layer.layer_idx)
    entry = Entry((name,), (name,))
    now = ForwardPass(
        attachment=cast(Any, _TrialAttachment()),
        cache=cast(Any, cache),
        agent=(name,),
        start=0,
        stop=TOKENS,
        previous=0,
        writers=[(entry, 0)],
        readers=[(entry, (name,))],
        group=(),
        zeros_from={},
        invocations=None,
        ids=torch.zeros(1, TOKENS, dtype=torch.long),
        positions=None,
        attention_mask=None,
        padded=False,
    )

    def run(scope: Any, cache: Cache) -> None:
        try:
            with layer_scope(scope), forward_scope(now), torch.no_grad(), _same_random_state(layer, x.device):
                call_original(layer.module, **call, **{cache_argument: cache})
        except StopTrial:
            pass
        except torch.OutOfMemoryError:
            raise
        except (TypeError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            raise UnsupportedModelError(
                f"{layer.name}: its attention could not be tried out with adapter {name!r}: {error}"
            ) from error

    probe = _PeftProbe(stand_ins)
    run(probe, probe)
    split = _SplitTrial(now, trial, stand_ins)
    now.store_rope(trial, call)
    split.angles = angles_of(call)
    run(split, cast(Cache, cache))
    assert probe.states is not None and probe.query is not None and split.found is not None
    own = dict(zip(("queries", "keys", "values"), (probe.query, *probe.states), strict=True))
    if layout.fused is None:
        del own["queries"]  # nothing of theirs is split
    found = dict(zip(("queries", "keys", "values"), split.found, strict=True))
    if not all(bool(t.isfinite().all()) for t in own.values()):
        return "PEFT's own keys or values are not finite"
    dtypes = [
        stand_ins.made[which].lora_B[name].weight.dtype
        for which in stand_ins.made
        if name in stand_ins.made[which].lora_B
    ]
    for what, expected in own.items():
        bound = error_bound([expected.dtype, *dtypes], x.shape[-1], _reduced_precision(x.device))
        error = _relative(found[what], expected)
        if not error <= bound:
            culprit = stand_ins.culprit(layer)
            why = (
                f"{culprit} does not return its base_layer's output plus lora_B(lora_A(x)) times scaling"
                if culprit
                else f"{type(layer.module).__name__} makes something else of base and adapter than of their sum"
            )
            raise UnsupportedModelError(
                f"{layer.name}: split into base and low-rank part, its {what} with adapter {name!r} differ from PEFT's own by "
                f"{error:.1e} (relative, root mean square), expected {bound:.1e} at most: {why}. Use PEFT's own LoRA layers and "
                f"Transformers' own attention without hooks that change their outputs, private_layers=[{layer.layer_idx}, ...], "
                "or a DynamicCache per adapter"
            )
    return None


@contextmanager
def _same_random_state(layer: AttentionLayer, device: torch.device) -> Iterator[None]:
    """In training mode other adapters' dropout may draw random numbers."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=bool(layer.module.training)):
        yield
