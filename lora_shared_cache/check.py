"""``python -m lora_shared_cache check``: can this model and these adapters share a cache, how, and what does it take?

Only the model's config and the adapters' own files are read. The config is shrunk to the few layers that differ from each other,
with random weights, and tried: adapters of the given configs on it, once through PEFT with a ``DynamicCache`` and once through
the shared cache. What the library would refuse is refused here with the same message.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

from .adapters import check_model_wide
from .attach import attach, attachment_of, detach
from .attachment import FUSED_PROJECTIONS, PROJECTIONS
from .buffers import window_and_margin
from .cache import SharedLoRACache
from .digest import digest
from .errors import UnsupportedAdapterError, UnsupportedModelError
from .layout import RotaryLayout
from .storage import sliding_windows

CONTEXTS = (8192, 32768, 131072)
# Sizes that attention does not depend on, and what they are for the trial.
_SMALL = dict(
    vocab_size=64, intermediate_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=2,
    num_local_experts=2, n_routed_experts=2, num_experts_per_tok=1, num_experts_per_token=1, vocab_size_per_layer_input=64,
)  # fmt: skip
_TOKENS = 12
# Logits of the trial, relative to the largest: float32 through two or three layers. A wrong number is larger by orders.
_TOLERANCE = 1e-3


@dataclass
class CheckResult:
    """What :func:`check` found.

    Attributes:
        model, model_type: as given, and the config's.
        attention: classes of the attention layers, with how many of each.
        refused: messages of what can't share a cache; empty: everything can.
        error: largest difference of the trial's logits from PEFT with a ``DynamicCache``, relative to the largest logit; None
            if it was not tried.
        policies: what can be used.
        shared_a: the adapters have the same A's on k_proj and v_proj.
        ranks: by adapter, the numbers per token and layer that are stored (r_k + r_v), averaged over the layers.
        bytes_per_token: "base" (K and V of all layers), "low_rank" by adapter; in the config's dtype (bfloat16 if it names none).
            Where the model normalises keys that adapters change also "norms", by adapter, and "norms_of_base".
        window: tokens that layers with a sliding window read; None: there are no such layers.
        sliding_share: the part of "base" that is theirs (and of "low_rank", where adapters are alike on all layers).
        notes: what is worth knowing besides.
    """

    model: str
    model_type: str
    attention: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    error: float | None = None
    policies: list[str] = field(default_factory=list)
    shared_a: bool | None = None
    ranks: dict[str, float] = field(default_factory=dict)
    bytes_per_token: dict[str, Any] = field(default_factory=dict)
    window: int | None = None
    sliding_share: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def possible(self) -> bool:
        """Whether a shared cache works."""
        return not self.refused

    def memory(self, context: int) -> dict[str, float]:
        """Bytes for a context: "shared", and "non_shared" with one cache per adapter.

        Layers with a sliding window count with the most that they hold: the window and its margins, a window at the start of the
        turn, and, unless the adapters share A, one for each other agent to go on from; a ``DynamicCache`` with its window.
        """
        base, low_rank = self.bytes_per_token["base"], self.bytes_per_token["low_rank"]
        stored = max(low_rank.values(), default=0) if self.shared_a else sum(low_rank.values())
        # Norms belong to each adapter, also where A is shared.
        stored += sum(self.bytes_per_token.get("norms", {}).values()) + self.bytes_per_token.get("norms_of_base", 0)
        agents = max(1, len(low_rank))
        full, sliding = 1 - self.sliding_share, self.sliding_share
        held = seen = others = 0
        if self.window is not None:
            held = min(context, 2 * window_and_margin(self.window))
            seen = min(context, self.window - 1)
            others = 0 if self.shared_a else (agents - 1) * min(context, self.window)
        return dict(
            shared=(context * full + held * sliding) * (base + stored) + others * sliding * base,
            non_shared=(context * full + seen * sliding) * base * agents,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers and texts."""
        return asdict(self) | dict(possible=self.possible)

    def __str__(self) -> str:
        console = Console(width=110)
        with console.capture() as captured:
            console.print(self._table())
            for message in self.refused:
                # Messages have brackets of their own, which are no markup.
                console.print(f"[bold]refused:[/bold] {escape(message)}")
            for note in self.notes:
                console.print(f"note: {note}", markup=False)
        return captured.get()

    def _table(self) -> Table:
        layers = ", ".join(f"{n} {name}" for name, n in self.attention.items())
        table = Table(
            title=f"{self.model} ({self.model_type}): {'can share a cache' if self.possible else 'can not share'}"
        )
        table.add_column("")
        table.add_column("")
        table.add_row("attention layers", layers or "none found")
        if self.error is not None:
            table.add_row(
                "tried on its shape", f"logits equal PEFT's with a DynamicCache to {self.error:.1e} (relative)"
            )
        if not self.possible:
            return table
        table.add_row("policies", ", ".join(self.policies))
        if self.bytes_per_token:
            for context in CONTEXTS:
                memory = self.memory(context)
                table.add_row(
                    f"{context:,} tokens",
                    f"{memory['shared'] / 1e9:.2f} GB; one DynamicCache per adapter {memory['non_shared'] / 1e9:.2f} GB",
                )
        return table


def check(model: str | Path, adapters: dict[str, str | Path] | None = None) -> CheckResult:
    """See whether a model and its adapters can share a cache, from the config and the adapters' files alone.

    Args:
        model: path or id of the base model.
        adapters: paths or ids of PEFT adapters by name; None: a LoRA of rank 16 on q, k, v and o is assumed.

    Returns:
        What was found, refusals included.

    Raises:
        OSError: a config or an adapter can't be read.
        ValueError: what was given is no config of a model that Transformers knows, or no PEFT adapter.
    """
    config = AutoConfig.from_pretrained(model)
    result = CheckResult(str(model), str(config.model_type))
    if getattr(config, "is_encoder_decoder", False):
        result.refused.append(f"{config.model_type} is an encoder-decoder model; only decoders can share a cache")
        return result
    text_config = config.get_text_config(decoder=True)
    # Of a model of images and text, the text model if it can stand alone.
    text_config = text_config if type(text_config) in MODEL_FOR_CAUSAL_LM_MAPPING else config
    configs = {name: PeftConfig.from_pretrained(str(path)) for name, path in (adapters or {}).items()}
    try:
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(text_config)
        if not configs:
            linear = (path for path, module in whole.named_modules() if isinstance(module, nn.Linear | Conv1D))
            there = {path.rpartition(".")[2] for path in linear}
            wanted = [name for name in ("q_proj", "k_proj", "v_proj", *FUSED_PROJECTIONS, "o_proj") if name in there]
            result.notes.append(
                f"no adapter was given: a LoRA with r=16 on {', '.join(wanted) or 'q_proj, k_proj and v_proj'} is assumed, twice"
            )
            configs = {name: LoraConfig(r=16, target_modules=wanted, task_type="CAUSAL_LM") for name in ("one", "two")}
        fused, on_keys = _describe(whole, text_config, configs, result)
        widths, layouts = _try(text_config, configs, result)
        size = (getattr(text_config, "dtype", None) or torch.bfloat16).itemsize
        if fused:
            result.bytes_per_token["base"] += sum(widths[name] * n * size for name, n in fused.items())
        _count_norms(layouts, on_keys, size, result)
        weights = {name: load_peft_weights(str(path), device="cpu") for name, path in (adapters or {}).items()}
        result.shared_a = _share_a(weights) if len(weights) > 1 else None
    except (UnsupportedModelError, UnsupportedAdapterError) as error:
        result.refused.append(str(error))
    if result.possible:
        result.policies = ["base_shared", "lr_precomputed"]
        if result.shared_a:
            result.policies.insert(0, "base_lr_shared")
        elif result.shared_a is False:
            result.notes.append(
                "base_lr_shared needs adapters with one A on k and v; project_to_shared_a rewrites these"
            )
        result.notes += _notes(result)
    return result


def _describe(
    whole: Any, config: Any, configs: dict[str, PeftConfig], result: CheckResult
) -> tuple[dict[str, int], list[tuple[str, set[str]]]]:
    """Attention classes and bytes per token, on the meta device.

    Returns:
        Classes with a fused projection, with how many of each: what part of its width is K and V only a trial shows. And of each
        layer its class and the adapters on its keys.
    """
    check_model_wide(whole, configs, tuple(configs))
    attach(whole)
    attachment = attachment_of(whole)
    assert attachment is not None
    for layer in attachment.layers.values():
        name = type(layer.module).__name__
        result.attention[name] = result.attention.get(name, 0) + 1
    detach(whole)
    config = config.get_text_config(decoder=True)
    size = (getattr(config, "dtype", None) or torch.bfloat16).itemsize
    numbers = {name: 0 for name in configs}
    with torch.device("meta"):
        peft_model = _with_adapters(whole, configs)
    attach(peft_model)
    attachment = attachment_of(peft_model)
    assert attachment is not None
    base = sliding = whole = 0
    fused: dict[str, int] = {}
    on_keys: list[tuple[str, set[str]]] = []
    windows = sliding_windows(config)
    for index, layer in attachment.layers.items():
        name = type(layer.module).__name__
        on_keys.append((name, set(getattr(layer.projection("k_proj"), "lora_A", {}).keys())))
        if len(layer.modules) == 1:
            fused[name] = fused.get(name, 0) + 1
        for which in layer.modules:
            projection = layer.projection(which)
            whole += projection.out_features
            sliding += projection.out_features if index in windows else 0
            base += projection.out_features if len(layer.modules) > 1 else 0
            for name in configs:
                if hasattr(projection, "lora_A") and name in projection.lora_A:
                    numbers[name] += projection.lora_A[name].weight.shape[0]
    result.ranks = {name: n / len(attachment.layers) for name, n in numbers.items()}
    result.window, result.sliding_share = max(windows.values(), default=None), sliding / whole
    result.bytes_per_token = dict(base=base * size, low_rank={name: n * size for name, n in numbers.items()})
    detach(peft_model)
    return fused, on_keys


def _count_norms(
    layouts: dict[str, RotaryLayout], on_keys: list[tuple[str, set[str]]], size: int, result: CheckResult
) -> None:
    """Bytes per token of the numbers that split norms of keys: float32, of a bias ``size`` bytes each."""
    of_base, of_adapters = 0, dict.fromkeys(result.bytes_per_token["low_rank"], 0)
    for attention, names in on_keys:
        norm = layouts[attention].key_norm if names and attention in layouts else None
        if norm is None:
            continue
        numbers = layouts[attention].key_heads if norm.per_head else 1
        of_base += 4 * numbers
        for name in names:
            of_adapters[name] += numbers * (2 * 4 + (0 if norm.bias is None else size))
    if of_base:
        result.bytes_per_token |= dict(norms=of_adapters, norms_of_base=of_base)


def _with_adapters(model: Any, configs: dict[str, PeftConfig]) -> PeftModel:
    (first, config), *others = configs.items()
    try:
        peft_model = get_peft_model(model, _trial_config(config), adapter_name=first)
        for name, other in others:
            peft_model.add_adapter(name, _trial_config(other))
    except (ValueError, NotImplementedError) as error:
        raise UnsupportedAdapterError(f"PEFT makes no such adapters for {type(model).__name__}: {error}") from error
    return peft_model


def _trial_config(config: PeftConfig) -> PeftConfig:
    config = copy.deepcopy(config)
    config.inference_mode = False
    if isinstance(getattr(config, "init_lora_weights", None), str):
        # Some initialisations look at the base weights, which are made up here; `check_model_wide` has seen them.
        config.init_lora_weights = True  # type: ignore[attr-defined]
    return config


def _shrunk(config: Any) -> Any:
    """The config with as few layers as show every kind of layer, and small wherever attention does not look."""
    small = copy.deepcopy(config)
    config = config.get_text_config(decoder=True)
    whole, small = small, small.get_text_config(decoder=True)
    layers = int(config.num_hidden_layers)
    kinds = list(zip(*(v for v in _lists_per_layer(config).values()), strict=True)) or [()] * layers
    keep = next(n for n in range(min(2, layers), layers + 1) if set(map(str, kinds[:n])) == set(map(str, kinds)))
    for name, values in _lists_per_layer(config).items():
        setattr(small, name, list(values)[:keep])
    small.num_hidden_layers = keep
    for name, value in _SMALL.items():
        if isinstance(getattr(config, name, None), int):
            setattr(small, name, min(value, getattr(config, name)))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 0)
    return whole


def _lists_per_layer(config: Any) -> dict[str, list[Any]]:
    layers = int(config.num_hidden_layers)
    return {
        name: list(value)
        for name, value in config.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == layers and hasattr(config, name)
    }


@torch.no_grad()
def _try(
    config: Any, configs: dict[str, PeftConfig], result: CheckResult
) -> tuple[dict[str, int], dict[str, RotaryLayout]]:
    """The first adapter on the small model, through PEFT alone and through the shared cache.

    Returns:
        By attention class: numbers of K and V per token and layer, and what was found of it.
    """
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(_shrunk(config), dtype=torch.float32).eval()
        peft_model = _with_adapters(model, configs)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5 / parameter.shape[-1] ** 0.5)
            elif parameter.dim() == 1:
                # Biases and weights of norms: 0 and 1 would show nothing of what they do.
                parameter.add_(0.2 * torch.randn_like(parameter))
        peft_model = peft_model.eval()
        peft_model.set_adapter(next(iter(configs)))
        ids = torch.randint(1, 60, (1, _TOKENS))
        pieces = ids.split([_TOKENS - 2, 1, 1], dim=1)
        plain = DynamicCache(config=model.config)
        expected = torch.cat([peft_model(piece, past_key_values=plain).logits for piece in pieces], dim=1)
        shared = SharedLoRACache(peft_model)
        actual = torch.cat([peft_model(piece, past_key_values=shared).logits for piece in pieces], dim=1)
        attachment = attachment_of(peft_model)
        assert attachment is not None
        names = {i: type(layer.module).__name__ for i, layer in attachment.layers.items()}
        widths = {names[i]: layer.width for i, layer in enumerate(shared.layers)}
        layouts = {names[i]: layer.layout for i, layer in attachment.layers.items() if layer.layout is not None}
        detach(peft_model)
    finally:
        torch.random.set_rng_state(torch_state)
    result.error = ((actual - expected).abs().max() / expected.abs().max()).item()
    if not result.error <= _TOLERANCE:
        classes = ", ".join(result.attention)
        raise UnsupportedModelError(
            f"{classes}: on a model of this shape the shared cache gave logits that differ from PEFT's by {result.error:.1e} "
            "of the largest. Please report this model"
        )
    return widths, layouts


def _share_a(weights: dict[str, dict[str, torch.Tensor]]) -> bool:
    """Whether all adapters have the same A on each projection of keys and values that they have in common."""
    seen: dict[str, tuple[int, int]] = {}
    for tensors in weights.values():
        for key, tensor in tensors.items():
            if "lora_A" in key and any(f".{which}." in key for which in (*PROJECTIONS, *FUSED_PROJECTIONS)):
                content = digest([tensor])
                if seen.setdefault(key, content) != content:
                    return False
    return bool(seen)


def _notes(result: CheckResult) -> list[str]:
    notes = []
    if "norms" in result.bytes_per_token:
        norms, base = result.bytes_per_token["norms"], result.bytes_per_token["norms_of_base"]
        each = ", ".join(f"{name} {n}" for name, n in norms.items())
        notes.append(
            f"keys are normalised, which takes numbers of their own (counted above): {each} bytes per token, and {base} for all"
        )
    if result.window is None:
        return notes
    more = 2 * (window_and_margin(result.window) - result.window)
    return [
        *notes,
        f"{result.sliding_share:.0%} of K and V are in layers with a sliding window of {result.window} tokens, which keep those "
        f"and up to {more} more",
    ]
