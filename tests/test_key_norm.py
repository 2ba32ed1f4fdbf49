"""The norm of a layer's keys, recognised by what it does, and the two numbers that split it."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lora_shared_cache.key_norm import KeyNorm, find_key_norm

from .test_families import build

CPU = torch.device("cpu")


def attention(model):
    return next(m for m in model.modules() if type(m).__name__.endswith("Attention"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family, per_head", [("Qwen3", True), ("Gemma3", True), ("Olmo2", False), ("Olmo3", False)])
def test_norms_of_families(family, per_head, dtype):
    settings = dict(head_dim="absent") if family.startswith("Olmo") else {}
    if family == "Gemma3":
        config = transformers.Gemma3TextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8,
        )  # fmt: skip
        model = transformers.Gemma3ForCausalLM(config).to(dtype)
        nn.init.normal_(attention(model).k_norm.weight)
    else:
        model = build(family, dtype, **settings)
    layer = attention(model)
    norm = find_key_norm(layer, 16, 8, CPU)
    assert norm is not None and norm.per_head == per_head and norm.eps > 0
    u = torch.randn(2, 5, 16, dtype=torch.float64)
    module = layer.k_norm.to(torch.float64)
    expected = module(u.view(2, 5, 2, 8)) if per_head else module(u).view(2, 5, 2, 8)
    tolerance = 1e-6 if dtype == torch.float64 else 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(norm(u), expected.transpose(1, 2).to(torch.float64), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("module", [nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8, bias=False), nn.Tanh()])
def test_other_kinds_are_not_taken_for_one(module):
    layer = nn.Module()
    layer.k_norm = module
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    assert find_key_norm(layer, 16, 8, CPU) is None
    assert find_key_norm(nn.Module(), 16, 8, CPU) is None


@pytest.mark.parametrize("width", [6, 12])
def test_two_numbers_split_the_norm(width):
    """The identity of the module's docstring, without a rotation, in float64."""
    torch.manual_seed(0)
    norm = KeyNorm(torch.randn(width, dtype=torch.float64), 1e-3, 6)
    u, a, up = (torch.randn(*s, dtype=torch.float64) for s in ((2, 5, 12), (2, 5, 3), (2, 3, 6)))
    delta = (a[:, None] @ up).transpose(1, 2).reshape(2, 5, 12)
    adapted = norm.rms(u + delta)
    split = norm(u) * norm.rms(u) / adapted + (a[:, None] @ norm.scaled(up)) / adapted
    torch.testing.assert_close(split, norm(u + delta), rtol=1e-12, atol=1e-12)
