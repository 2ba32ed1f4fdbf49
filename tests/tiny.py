"""Tiny random models with adapters that matter, and what PEFT with a ``DynamicCache`` gives for them.

In float64 the norms are replaced by ones that compute in float64 (the families' own go through float32), so that a
comparison fails on anything but the order of additions: errors are about 1e-15, and ``EXACT`` leaves a wide margin.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

VOCAB = 64
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Logits are about 1; float64 sums of a few hundred terms differ by 1e-14 when reordered, a wrong number by 1e-3 or more.
EXACT = 1e-10


class RMSNorm64(nn.Module):
    def __init__(self, weight: torch.Tensor, eps: float):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def norms_in_float64(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                setattr(parent, name, RMSNorm64(child.weight, child.variance_epsilon))
    return model


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() >= 2:
                parameter.copy_(noise * (1.0 if "embed" in name else parameter.shape[-1] ** -0.5))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model


SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)


def finish(model: nn.Module, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    model = randomise(model, seed).to(dtype).eval()
    return norms_in_float64(model) if dtype == torch.float64 else model


def tiny_llama(dtype: torch.dtype = torch.float64, seed: int = 0, **settings) -> LlamaForCausalLM:
    return finish(LlamaForCausalLM(LlamaConfig(**{**SHAPE, **settings})), dtype, seed)


def tiny_mistral(dtype: torch.dtype = torch.float64, seed: int = 0, **settings) -> MistralForCausalLM:
    return finish(MistralForCausalLM(MistralConfig(**{"sliding_window": None, **SHAPE, **settings})), dtype, seed)


def tiny_ministral(dtype: torch.dtype = torch.float64, seed: int = 0, **settings) -> MinistralForCausalLM:
    """A Llama with layers that slide and layers that don't."""
    layers = settings.get("num_hidden_layers", SHAPE["num_hidden_layers"])
    types = [("sliding_attention", "full_attention")[index % 2] for index in range(layers)]
    config = MinistralConfig(**{**SHAPE, "sliding_window": 6, "layer_types": types, **settings})
    return finish(MinistralForCausalLM(config), dtype, seed)


def lora(**settings) -> LoraConfig:
    """A LoRA on everything whose rank and scaling differ per layer and per projection."""
    default = dict(
        r=3,
        lora_alpha=5,
        target_modules=ALL_LINEAR,
        rank_pattern={r"layers\.1\..*k_proj": 4, r"layers\.2\..*": 2},
        alpha_pattern={r"layers\.0\..*v_proj": 7, r"layers\.2\..*k_proj": 1},
        task_type="CAUSAL_LM",
    )
    return LoraConfig(**{**default, **settings})


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]


def fill_adapter(model: nn.Module, name: str, seed: int, strength: float = 0.4) -> None:
    """Random A and B of one adapter (PEFT starts with B = 0), so that its delta is comparable to the base."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for _, module in lora_layers(model):
            for container, factor in ((module.lora_A, 1.0), (module.lora_B, strength)):
                if name in container:
                    for parameter in container[name].parameters():
                        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                        size = parameter.shape[-1] if parameter.dim() > 1 else 4
                        parameter.copy_(factor * noise * size**-0.5)


def with_adapters(model: nn.Module, adapters: dict[str, LoraConfig] | Iterable[str], seed: int = 0) -> PeftModel:
    """A ``PeftModel`` with filled adapters; the first is active."""
    configs = adapters if isinstance(adapters, dict) else {name: lora() for name in adapters}
    peft_model = None
    for name, config in configs.items():
        if peft_model is None:
            peft_model = get_peft_model(model, config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
    for index, name in enumerate(configs):
        fill_adapter(peft_model, name, seed + index)
    return peft_model.eval()


def share_a(model: nn.Module, names: Iterable[str], projections: Iterable[str] = ("k_proj", "v_proj")) -> None:
    """Give all adapters the A of the first on the given projections."""
    first, *others = names
    with torch.no_grad():
        for path, module in lora_layers(model):
            if path.split(".")[-1] in projections:
                for other in others:
                    module.lora_A[other].weight.copy_(module.lora_A[first].weight)


def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Make one adapter's content that of another."""
    with torch.no_grad():
        for _, module in lora_layers(model):
            for container in (module.lora_A, module.lora_B):
                for a, b in zip(container[source].parameters(), container[target].parameters(), strict=True):
                    b.copy_(a)


def tokens(n: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """(rows, n) random token ids, none of them the padding token."""
    return torch.randint(1, VOCAB, (rows, n), generator=torch.Generator().manual_seed(seed))


def twin(model: nn.Module) -> nn.Module:
    """An independent copy, to be run by PEFT alone; take it before the model is attached."""
    return copy.deepcopy(model)


def activate(model: nn.Module, agent: str | list[str] | None) -> None:
    """Make an agent active on a ``PeftModel``; None is the base model (until :func:`activate` is called again)."""
    if agent is None:
        model.base_model.disable_adapter_layers()
        return
    model.base_model.enable_adapter_layers()
    if isinstance(agent, str):
        model.set_adapter(agent)
    else:
        model.base_model.set_adapter(agent)


def logits(model: nn.Module, ids: torch.Tensor, cache=None, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **kwargs).logits


def feed(model: nn.Module, ids: torch.Tensor, cache, sizes: Iterable[int], mask=None) -> torch.Tensor:
    """Feed ids in pieces; the logits of all of them. ``mask`` (rows, n) covers all ids."""
    out, position = [], cache.get_seq_length()
    start = 0
    for size in sizes:
        kwargs = {}
        if mask is not None:
            kwargs["attention_mask"] = mask[:, : position + start + size]
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            kwargs["position_ids"] = positions[:, position + start : position + start + size]
        out.append(logits(model, ids[:, start : start + size], cache, **kwargs))
        start += size
    assert start == ids.shape[1]
    return torch.cat(out, dim=1)


def reference(model: nn.Module, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """PEFT with a fresh ``DynamicCache``, all tokens at once."""
    return logits(model, ids, DynamicCache(config=model.config), **kwargs)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


def assert_equal_logits(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = EXACT) -> None:
    assert actual.shape == expected.shape
    assert bool(actual.isfinite().all())
    assert difference(actual, expected) <= tolerance


class TokenCounter:
    """Counts the tokens that go through the first decoder layer."""

    def __init__(self, model: nn.Module):
        layer = next(m for path, m in model.named_modules() if path.endswith("layers.0"))
        self.sizes: list[int] = []
        self.handle = layer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        self.sizes.append(hidden.shape[1])

    def take(self) -> list[int]:
        sizes, self.sizes = self.sizes, []
        return sizes


def agents_model(names: Iterable[str] = ("plan", "act")) -> PeftModel:
    """A tiny Llama in float64 whose adapters differ but share A."""
    model = with_adapters(tiny_llama(), list(names))
    share_a(model, list(names))
    return model


def ones(n: int, rows: int = 1) -> torch.Tensor:
    """An attention mask without padding."""
    return torch.ones(rows, n, dtype=torch.long)
