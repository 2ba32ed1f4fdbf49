"""Projections that give queries, keys and values at once: queries keep the whole adapter, keys and values are split."""

from __future__ import annotations

import pytest
import torch
import transformers

from lora_shared_cache import (
    SharedLoRACache,
    TrajectoryError,
    UnsupportedModelError,
    attach,
    project_to_shared_a,
    share_down_projections,
    sharing_report,
)

from .tiny import (
    EXACT,
    SHAPE,
    activate,
    assert_equal_logits,
    copy_adapter,
    difference,
    feed,
    finish,
    logits,
    lora,
    lora_layers,
    ones,
    reference,
    tokens,
    twin,
    with_adapters,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
    # In the oldest Transformers' GPT-BigCode.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]
N = 16
# Columns of queries, keys and values: one after the other with fewer heads of keys; per head; one after the other in a Conv1D.
FAMILIES = {
    "phi3": ("qkv_proj", dict()),
    "gpt_neox": ("query_key_value", dict(head_dim=None, num_key_value_heads=None)),
    "gpt2": ("c_attn", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "gpt_bigcode": ("c_attn", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)),
}


def build(family: str, names=("one", "two"), seed: int = 0, **settings):
    module, shape = FAMILIES[family]
    # Transformers 5.17 to 5.23 computes the norms of Phi-3 in float32; `finish` replaces them.
    config = transformers.AutoConfig.for_model(
        family, **{k: v for k, v in {**SHAPE, "num_hidden_layers": 2, **shape}.items() if v is not None}
    )
    model = finish(transformers.AutoModelForCausalLM.from_config(config), torch.float64)
    return with_adapters(
        model, {name: lora(target_modules=[module], rank_pattern={}, alpha_pattern={}, **settings) for name in names}
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed", "base_lr_shared"])
def test_agents_take_turns(family, sharing, storage):
    """Prefill, chunk, single tokens, a switch to an adapter of the same content, padding on the left; all exact."""
    model = build(family)
    copy_adapter(model, "one", "two")
    plain = twin(model)
    ids, mask = tokens(N, rows=2), ones(N, rows=2)
    ids[1, :4], mask[1, :4] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = reference(plain, ids, attention_mask=mask, position_ids=positions)
    activate(plain, None)
    assert difference(expected, reference(plain, ids, attention_mask=mask, position_ids=positions)) > 0.01
    cache = SharedLoRACache(sharing=sharing)
    done = 0
    for name, stop in (("one", 6), ("two", 9), ("one", 10), *(("two", n) for n in range(11, N + 1))):
        activate(model, name)
        out = logits(model, ids[:, :stop], cache, attention_mask=mask[:, :stop], position_ids=positions[:, :stop])
        real = mask[:, done:stop].bool()
        assert_equal_logits(out[:, done - stop :][real], expected[:, done:stop][real], EXACT)
        done = stop


@pytest.mark.parametrize("family", FAMILIES)
def test_the_down_projection_is_stored_once(family):
    model = build(family)
    cache = SharedLoRACache()
    feed(model, tokens(N), cache, [N])
    module = FAMILIES[family][0]
    assert all(set(layer.entries[("one",)]) == {module} for layer in cache.layers)
    # Two layers, rank 3, eight bytes.
    assert cache.memory_footprint()["low_rank"] == {"one": 2 * N * 3 * 8}


@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_several_adapters_biases_and_private_layers(family, storage):
    model = build(family, lora_bias=True)
    plain = twin(model)
    for agent in (["one", "two"], "two", None):
        activate(plain, agent)
        activate(model, agent)
        expected = reference(plain, tokens(N))
        for settings in (dict(sharing="base_shared"), dict(sharing="lr_precomputed"), dict(private_layers=[1])):
            assert_equal_logits(feed(model, tokens(N), SharedLoRACache(**settings), [9, 1, 1, 5]), expected, EXACT)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_rows_with_different_adapters(family, sharing, storage):
    model = build(family, lora_bias=True)
    names = ["two", "__base__", "one"]
    plain = twin(model)
    ids = tokens(N, rows=3)
    expected = reference(plain, ids, adapter_names=names)
    cache = SharedLoRACache(sharing=sharing)
    start = 0
    for size in (9, 1, 1, 5):
        out = logits(model, ids[:, start : start + size], cache, adapter_names=names)
        assert_equal_logits(out, expected[:, start : start + size], EXACT)
        start += size


def phi3_of_few_positions(**settings):
    config = transformers.AutoConfig.for_model(
        "phi3", **{**SHAPE, "num_hidden_layers": 2, "original_max_position_embeddings": 12, **settings}
    )
    model = finish(transformers.AutoModelForCausalLM.from_config(config), torch.float64)
    plain = dict(target_modules=["qkv_proj"], rank_pattern={}, alpha_pattern={})
    return with_adapters(model, {name: lora(**plain) for name in ("one", "two")})


def continued(model, cache, prompt, new, **settings):
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )


def greedy(model, text, new):
    """What greedy decoding gives without any cache."""
    with torch.no_grad():
        for _ in range(new):
            text = torch.cat((text, model(text, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return text


def test_a_model_that_leaves_the_cache_out(storage):
    """Phi-3's generate does, once a text is longer than original_max_position_embeddings. Transformers 5.17 then gives the model
    its last token alone, so with a DynamicCache it goes on wrongly."""
    model = phi3_of_few_positions()
    copy_adapter(model, "one", "two")
    prompt = tokens(9)
    expected = greedy(twin(model), prompt, 12)
    attach(model)
    cache = SharedLoRACache(sharing="lr_precomputed")
    text = continued(model, cache, prompt, 7)
    assert torch.equal(text, expected[:, :16]) and cache.trajectory_length == 15
    activate(model, "two")
    assert torch.equal(continued(model, cache, text, 5), expected) and cache.trajectory_length == 20
    # A long prompt on an empty cache.
    cache = SharedLoRACache()
    assert torch.equal(continued(model, cache, text, 5), expected) and cache.trajectory_length == 20


def test_other_calls_without_a_cache_are_left_alone():
    model = attach(phi3_of_few_positions())
    plain = twin(model)
    text = continued(model, SharedLoRACache(), tokens(5), 2, guidance_scale=1.5)
    assert torch.equal(text, continued(plain, transformers.DynamicCache(), tokens(5), 2, guidance_scale=1.5))


def test_a_model_whose_rotation_changes_with_the_length():
    half = SHAPE["head_dim"] // 2
    rope = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * half, long_factor=[2.0] * half)
    rope |= dict(original_max_position_embeddings=12, factor=8.0, partial_rotary_factor=1.0)
    model = attach(phi3_of_few_positions(rope_parameters=rope, max_position_embeddings=96))
    plain = twin(model)
    cache = SharedLoRACache()
    text = continued(model, cache, tokens(9), 2)
    with pytest.raises(
        UnsupportedModelError, match=r"beyond 12 tokens its rotation is another one, and the 1[0-9] cached"
    ):
        continued(model, cache, text, 8)
    cache.reset()
    long = tokens(15)
    assert torch.equal(continued(model, cache, long, 4), greedy(plain, long, 4))
    assert cache.trajectory_length == 18


def test_layer_0_belongs_to_whoever_reads(storage):
    """Different adapters: entries of the reader, whoever processed the token."""
    model = build("phi3")
    cache, own = SharedLoRACache(sharing="lr_precomputed"), SharedLoRACache()
    feed(model, tokens(N), cache, [9, 1, 1, 5])
    activate(model, "two")
    feed(model, tokens(N), own, [N])
    one, two = (cache.layers[0].entries[(name,)]["qkv_proj"].view(N) for name in ("one", "two"))
    torch.testing.assert_close(two, own.layers[0].entries[("two",)]["qkv_proj"].view(N), rtol=1e-12, atol=1e-12)
    assert (one - two).abs().max() > 0.1
    assert cache.coverage()["two"] == N


def test_a_shared_a_of_a_fused_projection():
    model = build("phi3")
    before = reference(twin(model), tokens(N))
    projection = project_to_shared_a(model)
    assert projection.largest < 1e-12 and model.peft_config["one"].rank_pattern == {"qkv_proj": 6}
    assert_equal_logits(reference(twin(model), tokens(N)), before, EXACT)
    cache = SharedLoRACache()
    assert_equal_logits(feed(model, tokens(N), cache, [9, 7]), before, EXACT)
    assert cache.policy == "base_lr_shared" and cache.coverage()["two"] == N
    fresh = build("gpt_neox")
    with torch.no_grad():
        for _, module in lora_layers(fresh):
            for name in ("one", "two"):
                module.lora_B[name].weight.zero_()
    assert [path.rpartition(".")[2] for path in share_down_projections(fresh)] == ["query_key_value"] * 2


def test_the_report_tells_keys_from_values():
    model = build("phi3")
    with torch.no_grad():
        # Nothing but values is changed: 32 columns of queries, 16 of keys, 16 of values.
        for _, module in lora_layers(model):
            for name in ("one", "two"):
                module.lora_B[name].weight[:48] = 0
    report = sharing_report(model, tokens(24), progress=False)
    assert all(layer.key_low_rank == 0 and layer.value_low_rank > 0.01 for layer in report.layers)
    assert report.policies["base_shared"].kl > 0


def test_clipped_projections_are_refused_by_name():
    """What is clipped far from the base's usual size is found too."""
    config = transformers.OlmoConfig(
        **{k: v for k, v in SHAPE.items() if k != "head_dim"} | dict(num_hidden_layers=2, clip_qkv=50.0)
    )
    model = finish(transformers.OlmoForCausalLM(config), torch.float32)
    model = with_adapters(model, {"one": lora(target_modules=["k_proj", "v_proj"], rank_pattern={}, alpha_pattern={})})
    with pytest.raises(UnsupportedModelError, match="OlmoAttention"):
        logits(model, tokens(5), SharedLoRACache())


@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_an_activated_lora_starts_at_its_invocation(family, storage):
    """Queries before it are the base model's too."""
    model = build(family, names=("one",), alora_invocation_tokens=[61, 60])
    plain = twin(model)
    ids = torch.cat((tokens(9) % 59 + 1, torch.tensor([[61, 60, 5, 7]])), dim=1)
    arguments = dict(input_ids=ids, attention_mask=ones(13), max_new_tokens=5, do_sample=False, pad_token_id=0)
    arguments |= dict(return_dict_in_generate=True, output_logits=True)
    expected = plain.generate(**arguments)
    everywhere = build(family, names=("one",)).generate(**arguments)
    assert difference(expected.logits[0], everywhere.logits[0]) > 0.01
    actual = model.generate(**arguments, past_key_values=SharedLoRACache())
    for one, other in zip(actual.logits, expected.logits, strict=True):
        assert_equal_logits(one, other, 1e-5)  # generate hands out float32
    assert torch.equal(actual.sequences, expected.sequences)


@pytest.mark.parametrize("cached", [5, 7])
def test_token_types_are_cut_with_the_tokens(cached):
    model = build("gpt2")
    plain, ids, types = twin(model), tokens(8), tokens(8, seed=3)
    cache = SharedLoRACache(sharing="base_shared")
    logits(model, ids[:, :cached], cache, token_type_ids=types[:, :cached])
    out = logits(model, ids, cache, attention_mask=ones(8), token_type_ids=types)
    assert_equal_logits(out, reference(plain, ids, token_type_ids=types)[:, cached:])
    activate(model, "two")
    with pytest.raises(TrajectoryError, match="tokens 0 to 7; pass them, with token_type_ids for them"):
        logits(model, ids[:, 7:], cache, attention_mask=ones(8), token_type_ids=types[:, 7:])
