"""What a pass asks of the host: few Python calls per layer, and PEFT's own forward wherever somebody may want to see it."""

import sys
from collections import Counter

import pytest
import torch
from torch import nn

from lora_shared_cache import SharedLoRACache, attach, layer_pass
from tests.tiny import agents_model, logits, tokens

# Of functions of this package in one attention layer; measured 96 (Python 3.11). Time can't be tested, this can.
MOST_CALLS = 110


def test_few_python_calls_per_layer(monkeypatch):
    monkeypatch.setattr(layer_pass, "attention_backend", lambda: "triton")
    monkeypatch.setattr(layer_pass, "flash_lora_attention", lambda query, *_, **__: query)
    model = attach(agents_model())
    cache, calls, inside = SharedLoRACache(sharing="lr_precomputed"), Counter(), [False]
    logits(model, tokens(6), cache)
    logits(model, tokens(5), cache)  # what is worked out once is known now

    def count(frame, event, _):
        name = frame.f_code.co_name
        if name == "run_attention_layer" and event in ("call", "return"):
            inside[0] = event == "call"
        if inside[0] and event == "call" and frame.f_globals["__name__"].startswith("lora_shared_cache."):
            calls[name] += 1

    sys.setprofile(count)
    try:
        logits(model, tokens(5), cache)
    finally:
        sys.setprofile(None)
    layers = calls["run_attention_layer"]
    assert layers == len(cache.layers) and calls["project"] == 2 * layers
    assert calls.total() <= MOST_CALLS * layers, calls


@pytest.mark.parametrize("part", ["base_layer", "lora_A.plan", "lora_B.plan", "lora_dropout.plan"])
def test_hooks_of_the_parts_of_a_lora_layer_are_called(part):
    model, cache, seen = attach(agents_model()), SharedLoRACache(), []
    logits(model, tokens(4), cache)
    o_proj = model.get_base_model().model.layers[1].self_attn.o_proj
    handle = o_proj.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    logits(model, tokens(3), cache)
    assert seen == [1]
    handle.remove()
    logits(model, tokens(3), cache)
    assert seen == [1]


def test_another_module_in_the_place_of_a_lora_a_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = attach(agents_model())
    cache = SharedLoRACache()
    logits(model, tokens(4), cache)
    container = model.get_base_model().model.layers[1].mlp.down_proj.lora_A
    container["plan"].__class__ = Doubled
    other = SharedLoRACache()
    doubled = logits(model, tokens(4), other)
    container["plan"].__class__ = nn.Linear
    with torch.no_grad():
        container["plan"].weight *= 2
    torch.testing.assert_close(logits(model, tokens(4), SharedLoRACache()), doubled, rtol=1e-4, atol=1e-5)
