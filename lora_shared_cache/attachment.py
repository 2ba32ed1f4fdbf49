"""What is known of an attached model: its decoder, attention layers and adapters, and how a ``forward`` is replaced.

Replaced are instance attributes only, never a class. Who replaces what is in ``attach.py``; what a forward pass does
with a shared cache is in ``run.py``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import re
import threading
import weakref
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from . import adapters as peft_adapters
from .adapters import Agent, is_lora
from .attention import ATTENTION_NAME, forget_original, remember_original
from .digest import Digest, DigestReader, digest
from .errors import SharedCacheError, UnsupportedAdapterError, UnsupportedModelError
from .key_norm import KeyNorm, find_key_norms, has_key_norm
from .layout import NO_ROTATION, NotTried, RotaryLayout, find_layout
from .policies import DownDigests
from .products import linear_of_rows, linear_with_adapters, plain_adapters, plain_lora
from .scopes import forward_scope, layer_scope

# The attribute that marks an attached module and holds its record.
RECORD = "_lora_shared_cache"
# The two roles; what plays them is `AttentionLayer.sources`.
PROJECTIONS = ("k_proj", "v_proj")
# Names of projections that give queries, keys and values at once; which columns are what is found by trying.
FUSED_PROJECTIONS = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")

# Guards the switch of a config's attention implementation; module level, so that models stay copyable.
_switch_lock = threading.Lock()


# Dicts, and the keys in them: two lists, since this is gone through at every decode step.
_Places = tuple[list[dict], list[str]]
_version = operator.attrgetter("_version")


def _append(places: _Places, owner: dict, key: str) -> None:
    places[0].append(owner)
    places[1].append(key)


@dataclass(eq=False)
class AdapterWatch:
    """What an adapter consists of, and how it was when it was last looked at: tensors, their addresses, PyTorch's count of
    in-place changes, and the scalings. All that shows without reading the weights.

    Attributes:
        scalings: where the scaling of each layer is.
        modules: where each A and B is.
        places: where each weight of an A or B is.
        partial: there are weights besides (of embeddings, say), which are not watched.
        digest: reads the content of its weights, or None: not yet.
        changes: how often counts or scalings were found to be others than before.
        tensors: the weights.
    """

    scalings: _Places = field(default_factory=lambda: ([], []))
    modules: _Places = field(default_factory=lambda: ([], []))
    places: _Places = field(default_factory=lambda: ([], []))
    partial: bool = False
    digest: Digest | None = None
    changes: int = 0
    tensors: list[Any] = field(default_factory=list)
    _layers: list[Any] = field(default_factory=list)
    _addresses: list[int] = field(default_factory=list)
    _versions: list[int] = field(default_factory=list)
    _scalings: tuple = ()

    def add(self, module: Any, scaling: dict, lora_a: dict, lora_b: dict, name: str) -> None:
        """Watch one LoRA layer that has the adapter."""
        _append(self.scalings, scaling, name)
        for container in (lora_a, lora_b):
            _append(self.modules, container, name)
            linear = container.get(name)
            # A shared, frozen A is a buffer.
            for owner in () if linear is None else (linear._parameters, linear._buffers):
                for key in (key for key, tensor in owner.items() if tensor is not None):
                    _append(self.places, owner, key)
        for rest in (module.lora_magnitude_vector, module.lora_embedding_A, module.lora_embedding_B):
            if name in rest:
                self.partial = True

    def take(self) -> None:
        """Note how everything is now."""
        self.tensors, self._layers = list(map(dict.get, *self.places)), list(map(dict.get, *self.modules))
        self._addresses, (self._versions, self._scalings) = self._address(), self._numbers()

    def consists_of_the_same(self) -> bool:
        """Whether the adapter consists of the same tensors at the same addresses, and of nothing that is not watched."""
        # Not equality: that of tensors is another thing.
        same = not self.partial and bool(self.tensors)
        same = same and all(map(operator.is_, map(dict.get, *self.modules), self._layers))
        same = same and all(map(operator.is_, map(dict.get, *self.places), self.tensors))
        return same and self._addresses == self._address()

    def numbers_hold(self) -> bool:
        """Whether nothing was changed in place; of an adapter that still consists of the same."""
        return (self._versions, self._scalings) == self._numbers()

    def take_numbers(self) -> tuple:
        """Note the counts and scalings as they are now; returns the scalings."""
        numbers = self._numbers()
        if numbers != (self._versions, self._scalings):
            self._versions, self._scalings = numbers
            self.changes += 1
        return self._scalings

    def _address(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self.tensors))

    def _numbers(self) -> tuple[list[int], tuple]:
        try:
            versions = list(map(_version, self.tensors))
        except RuntimeError:
            versions = []  # inference tensors keep no count
        return versions, tuple(map(dict.get, *self.scalings))


@dataclass
class AttentionLayer:
    """What is known of one attention layer.

    Attributes:
        module: the attention module.
        path: its name in the top model.
        layer_idx: its index in the cache.
        rope_key: layers with the same key get the same cos/sin (the layer type).
        attachment: the model's attachment.
        sources: the name of the module that gives "k_proj" and "v_proj": these themselves, or one fused projection for both.
        layout: how keys are rotated; None until the first shared forward pass tried it out.
        probed: the adapted projections when it was tried out.
        kind: what makes a layer behave as others, when it was tried out.
        tested: the attachment's version for which the split was compared with PEFT (``self_test.py``).
    """

    module: Any
    path: str
    layer_idx: int
    rope_key: str
    attachment: Attachment
    sources: dict[str, str]
    layout: RotaryLayout | None = None
    probed: tuple[str, ...] = ()
    kind: tuple = ()
    tested: int = -1

    @property
    def name(self) -> str:
        """Path and class, for messages."""
        return f"{self.path} ({type(self.module).__name__})"

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the projections that give keys or values, each once. Low-rank entries are stored under these names."""
        return tuple(dict.fromkeys(self.sources.values()))

    def projection(self, which: str) -> Any:
        """The module that gives "k_proj" or "v_proj", or that of a name in :attr:`modules`, as it is now (PEFT replaces it when
        the first adapter comes)."""
        return getattr(self.module, self.sources.get(which, which))

    def columns(self, which: str) -> torch.Tensor | None:
        """The output columns of a fused projection that are the keys ("k_proj") or values ("v_proj"); None: all."""
        fused = None if self.layout is None else self.layout.fused
        return None if fused is None else fused.key if which == "k_proj" else fused.value

    def adapted(self) -> tuple[str, ...]:
        """Those of :attr:`modules` that have LoRA."""
        return tuple(which for which in self.modules if is_lora(self.projection(which)))

    def find_layout(self, kwargs: dict[str, Any]) -> None:
        """Try the layer out, once for each kind of layer and set of adapted projections.

        Raises:
            UnsupportedModelError: the layer can't be expressed as base + low-rank part.
        """
        adapted = self.adapted()
        if self.layout is not None and self.probed == adapted:
            return
        if not adapted:
            self.layout, self.probed = NO_ROTATION, adapted
            return
        widths = {which: int(self.projection(which).out_features) for which in adapted}
        forward = functools.partial(call_original, self.module)
        device = kwargs["hidden_states"].device

        def norms(heads: int, head_dim: int) -> list[KeyNorm]:
            return find_key_norms(self.module, heads, head_dim, device)

        kind = (*self.kind_of_module(), adapted, tuple(widths.items()), device, kwargs["hidden_states"].dtype)
        layout = self._as_layers_of_this_kind(self.attachment.layouts.get(kind), norms)
        if layout is None:
            try:
                layout = find_layout(self.name, forward, kwargs, self.sources, widths, norms, self._multipliers())
            except NotTried as error:
                if _dispatches(self.module):
                    raise
                raise UnsupportedModelError(
                    f"{self.name}: it does not call its attention through Transformers' attention interface, so the low-rank "
                    "part can't be applied inside it. Use a DynamicCache per adapter"
                ) from error
            self.attachment.layouts[kind] = layout
        self.layout, self.probed, self.kind = layout, adapted, kind

    def _multipliers(self) -> list[str]:
        """What a layer has by whose name keys or values may be clipped, scaled or normalised."""
        found: dict[str, None] = {}
        for owner in (self.module, getattr(self.module, "config", None)):
            for key, value in vars(owner).items() if owner is not None else ():
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if number and re.search(r"clip_(qkv|kv)|key_multiplier|(^|_)(v|value|k|key)_scale", key):
                    found[f"{key}={value:g}"] = None
        found.update((name, None) for name, _ in self.module.named_children() if name in ("v_norm", "value_norm"))
        return list(found)

    def kind_of_module(self) -> tuple:
        """All that may make a layer behave as others of its class do not: settings, parts, what the config says of it."""
        module = self.module
        settings = {
            k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k != "layer_idx"
        }
        parts = tuple((name, type(child)) for name, child in module.named_children())
        per_layer = [
            (name, str(values[self.layer_idx]))
            for name, values in vars(self.attachment.decoder.config).items()
            if isinstance(values, list | tuple) and len(values) >= len(self.attachment.layers) > 1
        ]
        changed = has_forward_of_its_own(module), bool(module._forward_hooks)
        return type(module), tuple(settings.items()), parts, tuple(per_layer), self.rope_key, changed

    @staticmethod
    def _as_layers_of_this_kind(
        layout: RotaryLayout | None, norms: Callable[[int, int], list[KeyNorm]]
    ) -> RotaryLayout | None:
        """The layout with the weights of this layer's own norm; None: the layer has to be tried out itself."""
        if layout is None or layout.key_norm is None:
            return layout
        before = layout.key_norm
        own = [norm for norm in norms(layout.key_heads, layout.head_dim) if norm.is_of_the_kind_of(before)]
        return replace(layout, key_norm=own[0]) if len(own) == 1 else None


def key_value_sources(attention: Any) -> dict[str, str] | None:
    """Which modules of an attention layer give "k_proj" and "v_proj", or None: no known ones."""
    if all(isinstance(getattr(attention, which, None), nn.Module) for which in PROJECTIONS):
        return {which: which for which in PROJECTIONS}
    fused = next((name for name in FUSED_PROJECTIONS if isinstance(getattr(attention, name, None), nn.Module)), None)
    return None if fused is None else dict.fromkeys(PROJECTIONS, fused)


@dataclass
class Attachment:
    """One attached model.

    Attributes:
        root: the outermost Transformers model (what ``generate`` is called on).
        decoder: the innermost model that holds the attention layers and creates their masks.
        layers: the attention layers by cache index.
        layouts: what was found of the attention layers, by kind of layer.
        version: counts changes of which adapters there are.
        base_changes: how often adapters were left in the base weights (``merge_and_unload``).
        tested: (kind of layer, kind of adapter) for which the split was compared with PEFT.
        not_tried: why a layer or the model could not be tried out yet.
        lora_layers: (path, layer) of every LoRA layer of the model.
        originals: (config, attention implementation) as they were.
        active: who has a shared forward pass under way; the attention implementation is ours while somebody has.
        weights_version: counts changes of the adapters, after which nothing that was made of their weights holds.
    """

    root: Any
    decoder: Any
    layers: dict[int, AttentionLayer] = field(default_factory=dict)
    layouts: dict[tuple, RotaryLayout] = field(default_factory=dict)
    version: int = 0
    base_changes: int = 0
    tested: set[tuple] = field(default_factory=set)
    not_tried: dict[str, str] = field(default_factory=dict)
    lora_layers: list[tuple[str, Any]] = field(default_factory=list)
    originals: list[tuple[Any, str]] = field(default_factory=list)
    active: set[weakref.ref] = field(default_factory=set)
    weights_version: int = 0
    _structure: Any = None
    _projections: _Places = field(default_factory=lambda: ([], []))
    _checked: Any = None
    _watched: list[tuple[Any, dict, dict, dict]] = field(default_factory=list)
    _expressible: dict[tuple, list[AdapterWatch]] = field(default_factory=dict)
    _watches: dict[str, AdapterWatch] = field(default_factory=dict)
    _reader: DigestReader = field(default_factory=DigestReader)
    _names: tuple[str, ...] = ()
    _names_on_keys_or_values: tuple[str, ...] = ()
    _normalises: bool = False
    _weights: dict[Any, Any] = field(default_factory=dict)
    _digests: dict[str, Any] = field(default_factory=dict)
    _addresses: tuple = ()
    _hooks: list[dict] | None = None
    _tensors: list[dict] | None = None

    # ---- structure -------------------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Look again at the model's adapters if any was added, deleted or replaced; returns whether that was so."""
        if self._look() == self._structure:
            return False
        before = self.lora_layers
        self.lora_layers = [(path, m) for path, m in self.root.named_modules() if is_lora(m)]
        there = {id(m) for _, m in self.lora_layers}
        self.base_changes += any(m.merged and id(m) not in there for _, m in before)
        # The dicts themselves: going through nn.Module's attributes costs more than all the rest of a stamp.
        self._watched = [(m, m.scaling, m.lora_A._modules, m.lora_B._modules) for _, m in self.lora_layers]
        self._watches.clear()
        self._expressible.clear()
        self._names = tuple(sorted({name for _, module in self.lora_layers for name in module.scaling}))
        names: set[str] = set()
        for layer in self.layers.values():
            for which in layer.modules:
                projection = layer.projection(which)
                if is_lora(projection):
                    names.update(projection.lora_A)
                    replace_forward(projection, ProjectionRecord(layer, which), _projection_forward)
        self._names_on_keys_or_values = tuple(sorted(names))
        self._normalises = any(
            has_key_norm(layer.module) and is_lora(layer.projection("k_proj")) for layer in self.layers.values()
        )
        inside = {id(m) for m in self.decoder.modules()}
        queries = {id(getattr(layer.module, "q_proj", None)) for layer in self.layers.values()}
        for _, module in self.lora_layers:
            if id(module) in inside and not isinstance(record_of(module), ProjectionRecord):
                replace_forward(module, ModuleRecord(self, gives_queries=id(module) in queries), lora_forward)
        self._structure = self._look()
        self.version += 1
        self._forget_weights()
        self._digests.clear()
        self._hooks = self._tensors = None
        return True

    def same_adapters(self) -> bool:
        """Whether the model has adapters of the same names as when :meth:`refresh` last looked."""
        return self._structure is not None and self._structure[0] == self._configured()

    def _configured(self) -> tuple[str, ...]:
        return tuple(getattr(self.root, "peft_config", None) or ())

    def _look(self) -> tuple:
        if not self._projections[0]:
            # Where the projections are; their modules change, these dicts do not.
            for layer in self.layers.values():
                for which in layer.modules:
                    _append(self._projections, layer.module._modules, which)
        configs = getattr(self.root, "peft_config", None) or {}
        return (
            self._configured(),
            # An adapter that was deleted and added again under its name may be on other layers.
            tuple(configs.values()),
            tuple(map(id, map(dict.get, *self._projections))),
            tuple([tuple(scaling) for _, scaling, _, _ in self._watched]),
        )

    def contains(self, module: nn.Module) -> bool:
        """Whether this attachment is in force and ``module`` a part of its model."""
        return bool(self.layers) and (
            module in (self.root, self.decoder) or any(m is module for m in self.root.modules())
        )

    def adapters(self) -> tuple[str, ...]:
        """Names of all adapters that have a LoRA layer, sorted."""
        return self._names

    def adapters_on_keys_or_values(self) -> tuple[str, ...]:
        """Names of the adapters with a LoRA on some ``k_proj`` or ``v_proj``, sorted."""
        return self._names_on_keys_or_values

    def invocation_tokens(self) -> dict[str, list[int]]:
        """Of the adapters that are active from an invocation on (aLoRA), by name."""
        configs = getattr(self.root, "peft_config", None) or {}
        tokens = ((name, getattr(config, "alora_invocation_tokens", None)) for name, config in configs.items())
        return {name: list(found) for name, found in tokens if found}

    def normalises_adapted_keys(self) -> bool:
        """Whether some layer has a norm for its keys and a LoRA on its ``k_proj``."""
        return self._normalises

    def agent(self) -> Agent:
        """Who is active now: sorted adapter names, () for the base model, or by rows where PEFT was given ``adapter_names=``."""
        for _, module in self.lora_layers:
            if module.disable_adapters:
                return ()
            rows = peft_adapters.adapter_names_argument(self.lora_layers)
            if rows is not None:
                return peft_adapters.agent_of_rows(rows)
            active = module.active_adapters
            if not all(name in module.scaling for name in active):
                # Some adapters may not be on this layer, and a deleted one may still be named.
                active = [name for name in active if name in self.adapters()]
            return tuple(sorted(set(active)))
        return ()

    # ---- content ---------------------------------------------------------------------------------------------------

    def watch(self, name: str) -> AdapterWatch:
        """What is known of an adapter; made anew if it consists of other tensors than when last looked at."""
        watch = self._watches.get(name)
        if watch is None or not watch.consists_of_the_same():
            watch = self._watches[name] = AdapterWatch()
            for module, scaling, lora_a, lora_b in self._watched:
                if name in scaling:
                    watch.add(module, scaling, lora_a, lora_b, name)
            watch.take()
        return watch

    def state(self, names: Iterable[str]) -> list[tuple[str, AdapterWatch, int]]:
        """How these adapters are now, for :meth:`unchanged`."""
        watches = [(name, self._watches[name]) for name in names if name in self._watches]
        return [(name, watch, watch.changes) for name, watch in watches]

    def unchanged(self, state: Iterable[tuple[str, AdapterWatch, int]]) -> bool:
        """Whether these adapters are as they were, as far as that shows without reading their weights. Cheap enough for every
        decode step."""
        return all(
            self._watches.get(name) is watch
            and watch.changes == changes
            and watch.consists_of_the_same()
            and watch.numbers_hold()
            for name, watch, changes in state
        )

    def memory_of(self, names: Iterable[str]) -> list[Any]:
        """The memory in which the weights of these adapters lie, as far as they have been looked at. Who holds it keeps it."""
        watches = [self._watches[name] for name in names if name in self._watches]
        return [tensor.untyped_storage() for watch in watches for tensor in watch.tensors]

    def content_digests(self, names: Iterable[str]) -> dict[str, tuple]:
        """Content of adapters: every weight and scaling. Read anew at each call; this is what notices a hot-swap."""
        watches = {name: self.watch(name) for name in names}
        for name, watch in watches.items():
            if watch.digest is None or not watch.digest.lasts:
                watch.digest = Digest(peft_adapters.content_tensors(self.lora_layers, name))
        found = {}
        values = self._reader.read([watch.digest for watch in watches.values() if watch.digest is not None])
        for (name, watch), value in zip(watches.items(), values, strict=True):
            found[name] = current = (*value, watch.take_numbers())
            if self._digests.setdefault(name, current) != current:
                self._digests[name] = current
                self._forget_weights()
        return found

    def _forget_weights(self) -> None:
        self._weights.clear()
        self.weights_version += 1

    def down_digests(self, name: str) -> DownDigests:
        """Content of an adapter's A on each ``k_proj`` and ``v_proj`` it adapts."""
        places: DownDigests = {}
        for index, layer in self.layers.items():
            for which in layer.modules:
                projection = layer.projection(which)
                if is_lora(projection) and name in projection.lora_A:
                    down = peft_adapters.down_projection(projection, [name])
                    places[index, which] = (*digest([down.weight]), down.rank, int(down.ones))
        return places

    def cached_weights(self, key: Any, compute: Callable[[], Any]) -> Any:
        """A tensor made of adapter weights, kept until :meth:`content_digests` or :meth:`refresh` sees a change."""
        value = self._weights.get(key)
        if value is None:
            value = self._weights[key] = compute()
        return value

    def weights_identity(self, whole: bool) -> tuple:
        """Changes with everything by which captured work finds the model's weights.

        Args:
            whole: look at the address of every weight and buffer; False: only at what changes with adapters.
        """
        if whole or not self._addresses or self.weights_version != self._addresses[0]:
            tensors = [t for owned in self._owned() for t in owned.values() if t is not None]
            self._addresses = (self.weights_version, tuple([t.data_ptr() for t in tensors]))
        return self._addresses

    def _owned(self) -> list[dict]:
        """The dicts in which the decoder's modules keep their weights and buffers; going through the modules takes longer."""
        if self._tensors is None:
            self._tensors = [d for m in self.decoder.modules() for d in (m._parameters, m._buffers) if d]
        return self._tensors

    @functools.cached_property
    def takes_position_ids(self) -> bool:
        """Whether the decoder has the argument ``position_ids``."""
        return "position_ids" in inspect.signature(type(self.decoder).forward).parameters

    @functools.cached_property
    def rotation_changes(self) -> bool:
        """Whether the model rotates keys otherwise once the text has grown longer."""
        rope = getattr(self.decoder.config, "rope_parameters", None) or {}
        kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
        return any(kind == "longrope" or "dynamic" in kind for kind in kinds)

    def has_hooks(self, known: tuple[str, ...]) -> bool:
        """Whether any module of the decoder has forward hooks, other than of the Python modules ``known`` and those that bring
        PEFT's ``adapter_names=``, which say who the agent is."""
        if self._hooks is None:
            modules = list(self.decoder.modules())
            self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
            self._hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        if not any(self._hooks):
            return False
        found = (hook for hooks in self._hooks for hook in hooks.values())
        return any(
            getattr(h, "__module__", "") not in known and not peft_adapters.brings_adapter_names(h) for h in found
        )

    def check_adapters(
        self, agent: Agent, names: Iterable[str], looked_at: Container[str] = (), private: tuple[int, ...] = ()
    ) -> None:
        """Refuse what the split can't express, at the start of a turn.

        Args:
            agent: the active adapters.
            names: all adapters whose entries will be read or written.
            looked_at: adapters that :meth:`content_digests` was just asked about.
            private: layers whose K and V are not split.

        Raises:
            UnsupportedAdapterError: with the layer, the adapter and the feature.
        """
        loaded = self.adapters()
        if self._checked != self._structure:
            peft_adapters.check_model_wide(self.root, getattr(self.root, "peft_config", {}) or {}, loaded)
            self._checked = self._structure
        wanted = tuple(sorted({*names, *peft_adapters.names_in(agent)}))
        known = (name for name in wanted if name in loaded)
        watches = [self._watches[name] if name in looked_at else self.watch(name) for name in known]
        if self._expressible.get((wanted, private)) != watches:
            for index, layer in self.layers.items():
                for which in layer.modules:
                    peft_adapters.check_expressible(
                        f"{layer.path}.{which}", layer.projection(which), wanted, split=index not in private
                    )
            self._expressible[wanted, private] = watches
        seen: tuple | None = None
        by_rows = peft_adapters.adapter_names_argument(self.lora_layers) is not None
        for path, module in self.lora_layers:
            if by_rows and not module._disable_adapters:
                continue  # whichever are active, PEFT takes those of the rows
            state = (module._disable_adapters, module._active_adapter)
            if state == seen:
                continue  # as on the layer before
            seen = state
            active = () if module.disable_adapters else tuple(sorted(module.active_adapters))
            if set(active) & set(loaded) != set(agent) & set(loaded):
                raise UnsupportedAdapterError(
                    f"{path} has {list(active) or 'no'} active adapters, other layers have {list(agent) or 'none'}. "
                    "Use model.set_adapter(...) on the whole model"
                )

    def check_one_adapter_on_keys(self, agent: Agent, policy: str) -> None:
        """Refuse several active adapters on keys that are normalised, where each adapter's numbers were computed for it alone.

        Raises:
            UnsupportedAdapterError: with the layer, the adapters and what to do.
        """
        for layer in self.layers.values():
            names = peft_adapters.names_on(layer.projection("k_proj"), agent)
            if peft_adapters.rows_of(agent) is None and len(names) > 1 and has_key_norm(layer.module):
                raise UnsupportedAdapterError(
                    f"{layer.name} normalises its keys, and the active adapters {names} change them together; {policy} keeps the "
                    "norms of single adapters only. Use SharedLoRACache(sharing='base_shared')"
                )

    # ---- attention implementation ----------------------------------------------------------------------------------

    def enter(self, who: Any) -> None:
        """Switch the model's attention to ours, for a forward pass of ``who``; call it in the ``try`` that ends with leave."""
        with _switch_lock:
            # Of a cache that is gone an interrupt has kept `leave` from running.
            self.active = {ref for ref in self.active if ref() is not None}
            first = not self.active
            if first:
                self._switch_back()
                # Attention without a config asks no interface either; its layer is refused when it is tried out.
                found = (getattr(layer.module, "config", None) for layer in self.layers.values())
                configs = {id(config): config for config in (self.decoder.config, *found) if config is not None}
                self.originals = [(config, config._attn_implementation) for config in configs.values()]
            self.active.add(weakref.ref(who))
            if first:
                for config, original in self.originals:
                    remember_original(config, original)
                    config._attn_implementation_internal = ATTENTION_NAME

    def leave(self, who: Any) -> None:
        """Undo :meth:`enter`, also one that broke off anywhere; a second time nothing happens."""
        with _switch_lock:
            self.active.discard(weakref.ref(who))
            if not self.active:
                self._switch_back()

    def _switch_back(self) -> None:
        for config, original in self.originals:
            config._attn_implementation_internal = original
            forget_original(config)
        self.originals = []


class _Record:
    """A model that comes out of a pickle is not attached (bound methods come back as the class's); a deep copy is, to itself."""

    original: Any

    def __reduce__(self) -> Any:
        if self.original is not None:
            raise SharedCacheError(
                "an attached model can't be pickled where modules have a forward of their own besides (Accelerate's device "
                "hooks, say). Call detach(model) before, and attach it again after"
            )
        return ModuleRecord, (None,)

    def __deepcopy__(self, memo: dict) -> Any:
        memo[id(self)] = other = object.__new__(type(self))
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other


@dataclass
class ProjectionRecord(_Record):
    """What a replaced projection of keys or values knows."""

    layer: AttentionLayer
    which: str
    original: Any = None


@dataclass
class ModuleRecord(_Record):
    """What a replaced decoder, attention layer or ``generate`` knows."""

    owner: Any
    original: Any = None
    gives_queries: bool = False


def call_original(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward that the module had before it was attached."""
    original = getattr(module, RECORD).original
    return type(module).forward(module, *args, **kwargs) if original is None else original(*args, **kwargs)


def record_of(module: nn.Module) -> Any:
    """The record of an attached module, or None."""
    return module.__dict__.get(RECORD)


def _dispatches(module: Any) -> bool:
    """Whether a module's forward mentions Transformers' attention interface; only for the wording of an error."""
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def has_forward_of_its_own(module: Any) -> bool:
    """Whether somebody gave this one module another forward before it was attached; Accelerate's, which moves weights, aside."""
    record = record_of(module)
    return record is not None and record.original is not None and not hasattr(module, "_hf_hook")


def replace_forward(module: nn.Module, record: Any, function: Callable[..., Any]) -> None:
    """Give one module (not its class) another forward: ``function(module, *args, **kwargs)``.

    A module that was replaced before gets the new record only.
    """
    if record_of(module) is not None:
        setattr(module, RECORD, _keep_original(record, record_of(module)))
        return
    # An instance-level forward of somebody else (Accelerate's device hooks) is kept and called.
    record.original = module.__dict__.get("forward")
    setattr(module, RECORD, record)
    # `wraps` keeps the signature, which Transformers inspects; a bound method survives copy.deepcopy of the model.
    module.forward = MethodType(functools.wraps(type(module).forward)(copy_of(function)), module)


def copy_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Another function object of the same code, for ``functools.wraps`` to write on."""
    return FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)


def _keep_original(record: Any, previous: Any) -> Any:
    record.original = previous.original
    return record


def restore_forward(module: nn.Module) -> None:
    """Undo :func:`replace_forward`; other modules are left alone."""
    record = module.__dict__.pop(RECORD, None)
    if record is None:
        return
    if record.original is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = record.original


# ---- the replaced methods ------------------------------------------------------------------------------------------


def lora_forward(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A LoRA layer's forward: PEFT's, or in passes with a shared cache the same in fewer launches."""
    now = forward_scope.get()
    if now is not None and now.invocations is not None and "alora_offsets" in kwargs:
        kwargs = dict(kwargs, alora_offsets=now.alora_offsets)
    scope = layer_scope.get()
    if scope is not None and getattr(scope, "trial", False):
        if record_of(self).gives_queries:
            # The largest product of the layer, and nothing asks for it.
            width: Any = self.out_features
            queries = torch.linspace(-1, 1, width, dtype=x.dtype, device=x.device)
            return queries.repeat(*x.shape[:-1], 1)
        # Of the batch's rows, of which a layer that is tried out knows nothing.
        kwargs = {name: value for name, value in kwargs.items() if name not in peft_adapters.PEFT_ARGUMENTS}
    if now is None or args or record_of(self).original is not None:
        return call_original(self, x, *args, **kwargs)
    products, rows = now.products, kwargs.get("adapter_names")
    if len(kwargs) > (rows is not None) or (rows is not None and products is None):
        return call_original(self, x, **kwargs)
    if rows is not None and len(set(rows)) > 1:
        names = plain_adapters(self, x, rows)
        return (
            call_original(self, x, **kwargs) if names is None else linear_of_rows(self, tuple(rows), names, x, products)
        )
    plan = plain_lora(self, x, now.attachment, rows)
    # The A's of several adapters are stacked for all steps, not for a pass.
    if not plan.serves() or (products is None and len(plan.weights) > 1):
        return call_original(self, x, **kwargs)
    return linear_with_adapters(plan, self, x, products)


def _projection_forward(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    scope = layer_scope.get()
    if scope is None:
        return call_original(self, x, *args, **kwargs)
    record = record_of(self)
    return scope.project(record.which, self, x, *args, **kwargs)
