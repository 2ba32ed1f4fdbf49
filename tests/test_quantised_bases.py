"""LoRA on a base whose weights are quantised; where the libraries are installed (they are no requirement of the tests).

The quantised weights are PEFT's base layer's business: base K and V are whatever it computes.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers

from lora_shared_cache import SharedLoRACache

from .tiny import (
    SHAPE,
    activate,
    assert_equal_logits,
    difference,
    feed,
    finish,
    logits,
    lora,
    reference,
    tokens,
    with_adapters,
)

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def load(path, device, config):
    return transformers.LlamaForCausalLM.from_pretrained(
        path, quantization_config=config, device_map=device, dtype=torch.float32
    )


def torchao_int8(path, device):
    from torchao.quantization import Int8WeightOnlyConfig

    return load(path, device, transformers.TorchAoConfig(Int8WeightOnlyConfig()))


def bitsandbytes_8bit(path, device):
    return load(path, device, transformers.BitsAndBytesConfig(load_in_8bit=True))


def bitsandbytes_4bit(path, device):
    settings = dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4")
    return load(path, device, transformers.BitsAndBytesConfig(**settings))


def hqq_4bit(path, device):
    """By HQQ itself: Transformers 5.23 does not quantise with it."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    model = load(path, device, None)
    settings = dict(compute_dtype=torch.float32, device=device)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, HQQLinear(child, BaseQuantizeConfig(nbits=4, group_size=16), **settings))
    return model


cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def kind(quantised, package, device="cpu"):
    missing = pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")
    marks = [missing, *(cuda if device == "cuda" else [])]
    return pytest.param(quantised, device, marks=marks, id=f"{quantised.__name__}-{device}")


@pytest.mark.parametrize(
    ("quantised", "device"),
    [
        kind(torchao_int8, "torchao"),
        kind(hqq_4bit, "hqq"),
        kind(bitsandbytes_4bit, "bitsandbytes"),
        kind(bitsandbytes_8bit, "bitsandbytes"),
        kind(bitsandbytes_4bit, "bitsandbytes", "cuda"),
        kind(bitsandbytes_8bit, "bitsandbytes", "cuda"),
    ],
)
def test_the_base_is_quantised(quantised, device, tmp_path):
    # Quantisation wants wider layers than the other tests have.
    shape = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    full = finish(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)), torch.float32)
    full.save_pretrained(tmp_path)
    model = quantised(tmp_path, device)
    ids = tokens(16).to(device)
    assert difference(reference(model, ids), reference(full.to(device), ids)) > 1e-3, "quantised"
    model = with_adapters(model, {"plan": lora(), "act": lora(r=2, rank_pattern={})})
    cut = [9, 4, 1, 1, 1]
    expected, in_chunks = {}, {}
    for name in ("plan", "act", None):
        activate(model, name)
        expected[name] = reference(model, ids)
        in_chunks[name] = feed(model, ids, transformers.DynamicCache(config=model.config), cut)
    # With 8-bit activations the least difference changes which integer one is rounded to: PEFT's own chunks show by how much.
    noise = max(difference(expected[name], in_chunks[name]) for name in expected)
    tolerance = max(1e-5, 2 * noise)
    assert min(difference(expected["plan"], expected[other]) for other in ("act", None)) > 5 * tolerance
    for name in expected:
        activate(model, name)
        assert_equal_logits(feed(model, ids, SharedLoRACache(), [16]), expected[name], tolerance)
        assert_equal_logits(feed(model, ids, SharedLoRACache(), cut), in_chunks[name], tolerance)
    activate(model, "plan")
    names, rows = ["plan", "act", "__base__"], ids.expand(3, -1)
    mixed = logits(model, rows, SharedLoRACache(), adapter_names=names)
    for row, name in enumerate(("plan", "act", None)):
        assert_equal_logits(mixed[row : row + 1], expected[name], tolerance)
