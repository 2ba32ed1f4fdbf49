"""A model that is spread over devices by Accelerate, or lies on another one than the current, gives what it gives on one.

Two GPUs, or Accelerate's hooks alone (both "devices" are the CPU).
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from accelerate import dispatch_model
from transformers import DynamicCache

from lora_shared_cache import SharedLoRACache, graphs

from .test_decode_graphs import count_graphs, generate, prompt, turns
from .test_families import FAMILIES, build
from .tiny import (
    activate,
    difference,
    feed,
    logits,
    lora_layers,
    share_a,
    tiny_llama,
    tiny_ministral,
    tokens,
    twin,
    with_adapters,
)

pytestmark = pytest.mark.integration
AGENTS = ["plan", "act", "reflect"]
SIZES = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
POLICIES = ["base_shared", "lr_precomputed", "base_lr_shared"]
two_gpus = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(params=["hooks alone", pytest.param("two GPUs", marks=two_gpus)])
def devices(request) -> tuple[str, str]:
    return ("cpu", "cpu") if request.param == "hooks alone" else ("cuda:0", "cuda:1")


def dtype_on(devices) -> torch.dtype:
    return torch.float64 if devices[0] == "cpu" else torch.float32


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = 1e-10 if actual.dtype == torch.float64 else 2e-4
    return bool(actual.isfinite().all()) and difference(actual.cpu(), expected.cpu()) <= tolerance


def spread(model: torch.nn.Module, devices: tuple[str, str]) -> torch.nn.Module:
    """The base model with its last layer, and what follows, on the second device."""
    last = len(model.model.layers) - 1
    places = {f"model.layers.{index}": devices[index == last] for index in range(last + 1)}
    places |= {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0]}
    # A head that is the embeddings' weight stays with them.
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    places |= {"model.norm": devices[1], "lm_head": devices[not tied]}
    return dispatch_model(
        model, places, main_device=devices[0], skip_keys=model._skip_keys_device_placement, force_hooks=True
    )


def agents(base: torch.nn.Module) -> torch.nn.Module:
    model = with_adapters(base, AGENTS)
    share_a(model, AGENTS)
    return model


def both_ways(devices, make=tiny_llama, **settings) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model spread over the devices, and the same one on the first."""
    dtype = dtype_on(devices)
    settings = {**SIZES, **settings}
    return agents(spread(make(dtype, **settings), devices)), agents(make(dtype, **settings)).to(devices[0])


def test_the_layers_are_where_they_were_put(devices):
    model, _ = both_ways(devices)
    found = [next(layer.parameters()).device for layer in model.get_base_model().model.layers]
    assert found == [torch.device(devices[0])] * 2 + [torch.device(devices[1])]
    assert hasattr(model.get_base_model().model.layers[2], "_hf_hook")
    adapters = {module.lora_A["act"].weight.device for path, module in lora_layers(model) if "layers.2" in path}
    assert adapters == {torch.device(devices[1])}


@pytest.mark.parametrize("sharing", POLICIES)
def test_agents_in_turn(devices, sharing):
    model, alone = both_ways(devices)
    cache, expected_cache = (SharedLoRACache(sharing=sharing) for _ in range(2))
    expected = turns(alone, expected_cache, prompt(devices[0]), AGENTS * 2, new=14)
    actual = turns(model, cache, prompt(devices[0]), AGENTS * 2, new=14)
    assert torch.equal(actual, expected) and len(set(actual[0].tolist())) > 10
    assert cache.coverage() == expected_cache.coverage()
    if devices[0] != devices[1]:
        assert cache.eager_reason == "the model is spread over 2 devices"


def test_the_agent_that_prefills_gets_what_peft_gives(devices):
    model, _ = both_ways(devices)
    peft, ids = twin(model), tokens(40).to(devices[0])
    for sizes in ([40], [25, 14, 1]):
        cache = SharedLoRACache()
        activate(model, "act"), activate(peft, "act")
        assert close(feed(model, ids, cache, sizes), feed(peft, ids, DynamicCache(config=peft.config), sizes))


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "Olmo2"])
def test_other_families(devices, family):
    alone, base = (build(family, dtype_on(devices), **FAMILIES.get(family, {})) for _ in range(2))
    model, alone = agents(spread(base, devices)), agents(alone).to(devices[0])
    ids = tokens(30).to(devices[0])
    caches = SharedLoRACache(), SharedLoRACache()
    for agent, start, sizes in (("plan", 0, [20]), ("act", 20, [6, 1]), ("plan", 27, [2, 1])):
        outs = []
        for one, cache in zip((model, alone), caches, strict=True):
            activate(one, agent)
            outs.append(feed(one, ids[:, start : start + sum(sizes)], cache, sizes))
        assert close(*outs)


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_rotations_that_change_and_windows(devices, sharing):
    rope = dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0)
    for make, settings in (
        (tiny_llama, dict(rope_parameters=rope, max_position_embeddings=24)),
        (tiny_ministral, dict(num_hidden_layers=4)),
    ):
        model, alone = both_ways(devices, make, **settings)
        expected = turns(alone, SharedLoRACache(sharing=sharing), prompt(devices[0], n=20), AGENTS * 2, new=12)
        cache = SharedLoRACache(sharing=sharing)
        assert torch.equal(turns(model, cache, prompt(devices[0], n=20), AGENTS * 2, new=12), expected)


def test_private_layers_on_the_second_device(devices):
    model, alone = both_ways(devices)
    outs = [turns(m, SharedLoRACache(private_layers=[2]), prompt(devices[0]), AGENTS * 2) for m in (model, alone)]
    assert torch.equal(*outs)


def test_batches_padding_beams_and_crops(devices):
    model, alone = both_ways(devices)
    ids = prompt(devices[0], rows=3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    outs = []
    for one in (model, alone):
        cache = SharedLoRACache()
        one.set_adapter("plan")
        text = generate(one, ids, cache, 6, attention_mask=mask)
        whole = torch.cat((mask, torch.ones_like(text[:, mask.shape[1] :])), dim=1)
        cache.crop(-3)
        one.set_adapter("act")
        outs.append(generate(one, text, cache, 6, attention_mask=whole))
        one.set_adapter("plan")
        outs.append(generate(one, ids[:1], SharedLoRACache(), 6, num_beams=3))
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])


def test_an_adapter_for_each_row(devices):
    model, alone = both_ways(devices)
    ids, names = prompt(devices[0], rows=3), ["reflect", "plan", "__base__"]
    outs = [generate(m, ids, SharedLoRACache(), 8, adapter_names=names) for m in (model, alone)]
    assert torch.equal(*outs)
    assert len({tuple(row.tolist()) for row in outs[0]}) == 3


def test_weights_written_on_the_second_device_are_noticed(devices):
    outs = []
    for model in both_ways(devices):
        ids, cache = tokens(24).to(devices[0]), SharedLoRACache(sharing="lr_precomputed")
        activate(model, "plan")
        feed(model, ids[:, :20], cache, [20])
        assert cache.coverage()["act"] == 20
        for module in (m for path, m in lora_layers(model) if "layers.2" in path):
            module.lora_B["act"].weight.data.mul_(1.5)
        activate(model, "act")
        outs.append(logits(model, ids[:, 20:], cache))
    # Its entries were those of other weights: all tokens are run again.
    assert outs[0].shape[1] == 24 and close(*outs)


def test_a_copy_and_selected_rows(devices):
    model, _ = both_ways(devices)
    model.set_adapter("plan")
    ids, cache = prompt(devices[0], rows=2), SharedLoRACache()
    text = generate(model, ids, cache, 5)
    fork = copy.deepcopy(cache)
    model.set_adapter("act")
    expected = generate(model, text, cache, 5)
    fork.batch_select_indices(torch.tensor([1]))
    assert torch.equal(generate(model, text[1:], fork, 5), expected[1:])


# ---- another device than the current one ---------------------------------------------------------------------------


@pytest.fixture
def second() -> str:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return "cuda:1"


@pytest.mark.gpu
@pytest.mark.parametrize("sharing", POLICIES)
def test_captured_steps_on_a_device_that_is_not_the_current_one(second, sharing, monkeypatch):
    count_graphs(monkeypatch)
    model = agents(tiny_llama(torch.float32, **SIZES)).to(second)
    expected = turns(model, SharedLoRACache(sharing=sharing, cuda_graphs=False), prompt(second), AGENTS * 2)
    cache = SharedLoRACache(sharing=sharing)
    assert torch.cuda.current_device() == 0
    assert torch.equal(turns(model, cache, prompt(second), AGENTS * 2), expected)
    assert len(set(expected[0].tolist())) > 10
    assert cache.eager_reason is None and graphs.CudaGraph.captures == 3 and graphs.CudaGraph.replays > 60
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_replicas_in_threads_have_caches_of_their_own(second):
    names = ("cuda:0", second)
    models = [agents(tiny_llama(torch.float32, **SIZES)).to(name) for name in names]
    texts: dict[str, torch.Tensor] = {}

    def run(model, name):
        texts[name] = turns(model, SharedLoRACache(), prompt(name), AGENTS * 3).cpu()

    threads = [threading.Thread(target=run, args=pair) for pair in zip(models, names, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(texts[names[0]], texts[second])
    eager = turns(models[0], SharedLoRACache(cuda_graphs=False), prompt(names[0]), AGENTS * 3).cpu()
    assert torch.equal(texts[second], eager)
