"""What a pass asks of the host: few Python calls per layer, and PEFT's own forward wherever somebody may want to see it."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_shared_cache import SharedLoRACache, attach, graphs, layer_pass
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


def test_the_benchmark_of_the_hosts_part(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples/benchmarks")
    import host_step

    # The script replaces these for its process.
    for owner, name in ((graphs, "CudaGraph"), (graphs.DecodeGraphs, "_why_not_on_this_device")):
        monkeypatch.setattr(owner, name, vars(owner)[name])
    rows = host_step.main(["--tokens", "6", "--turns", "1", "--rounds", "1", "--out", str(tmp_path / "rows.json")])
    variants = [row["variant"] for row in rows]
    assert variants[0] == "transformers" and len(variants) == 1 + 3 * 3
    assert all(row["before_ms"] > 0 and row["after_ms"] > 0 for row in rows)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
