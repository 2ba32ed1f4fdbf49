"""Other attention layouts than plain Llama: each tiny model equals PEFT with a ``DynamicCache``, or is refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache

from lora_shared_cache import SharedLoRACache

from .tiny import (
    SHAPE,
    TokenCounter,
    activate,
    assert_equal_logits,
    copy_adapter,
    difference,
    feed,
    finish,
    logits,
    lora,
    reference,
    tiny_mistral,
    tokens,
    twin,
    with_adapters,
)

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

N = 14
# Float32 through two or three layers, logits of a few units.
ROUNDING = 5e-5
KV = dict(target_modules=["q_proj", "k_proj", "v_proj", "query_key_value"])


def build(name, dtype=torch.float32, **settings):
    name = name.partition(" ")[0]
    config_class = getattr(transformers, f"{name}TextConfig" if name in ("Gemma3", "Llama4") else f"{name}Config")
    shape = {**SHAPE, "num_hidden_layers": 2, **settings}
    shape = {k: v for k, v in shape.items() if v != "absent"}
    return finish(getattr(transformers, f"{name}ForCausalLM")(config_class(**shape)), dtype)


GPT_OSS = dict(
    num_local_experts=2, num_experts_per_tok=1, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
)
FAMILIES = {
    "Qwen2": dict(),
    "Glm": dict(),  # interleaved, half of the head rotated
    "StableLm": dict(head_dim="absent"),  # partial, sliced by the layer
    "Phi": dict(head_dim="absent"),
    "Cohere": dict(head_dim="absent"),  # interleaved
    "Cohere2": dict(
        sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),  # and layers without rotation
    "Gemma": dict(),
    "Gemma2": dict(sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
    "Granite": dict(head_dim="absent", attention_multiplier=0.3),
    "GptOss": GPT_OSS,  # sinks, cos/sin at half width
    "SmolLM3": dict(head_dim="absent", no_rope_layers=[1, 0]),
    "Starcoder2": dict(head_dim="absent"),
    "Mixtral": dict(num_local_experts=2),
    # Keys are normalised: per head, with 1 + w, two thetas and windows, over all heads at once
    "Qwen3": dict(),
    "Qwen3Moe": dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16),
    "Gemma3": dict(sliding_window=6, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]),
    "Olmo2": dict(head_dim="absent"),
    "Olmo3": dict(head_dim="absent", sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "Glm4Moe": dict(
        use_qk_norm=True, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, n_group=1, topk_group=1
    ),
    # LayerNorms: a module per head, weights of all heads
    "StableLm with norms": dict(head_dim="absent", qk_layernorm=True),
    "Cohere with norms": dict(head_dim="absent", use_qk_norm=True),
    # LayerNorms with a bias; in a fused projection
    "Phi with norms": dict(head_dim="absent", qk_layernorm=True),
    "Persimmon": dict(head_dim="absent", num_key_value_heads="absent", qk_layernorm=True),
    # Normalised after the rotation, with weights
    "HunYuanDenseV1": dict(),
    "HunYuanMoEV1": dict(num_experts=2, moe_topk=1, moe_intermediate_size=16),
    # and without; rotated the other way, and as complex numbers
    "NanoChat": dict(head_dim="absent"),
    "Llama4": dict(
        num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48, use_qk_norm=True, no_rope_layers=[1, 0],
        attention_chunk_size=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_private_layers(family):
    model = build(family, **FAMILIES[family])
    if family == "Gemma2":
        model.set_attn_implementation("eager")
    model = with_adapters(model, {name: lora(**KV, rank_pattern={}, alpha_pattern={}) for name in ("one", "two")})
    plain = twin(model)
    for private in ((0,), (1,), (0, 1)):
        # Layer 0 is exact without being private.
        exact = 1 in private
        cache = SharedLoRACache(private_layers=private)
        for name, sizes in [("one", [9, 1]), ("two", [2, 1, 1])]:
            activate(plain, name)
            activate(model, name)
            before = cache.trajectory_length
            ids = tokens(before + sum(sizes))
            expected = reference(plain, ids)[:, before:]
            if before:
                logits(model, ids[:, :before], cache, attention_mask=torch.ones(1, before, dtype=torch.long))
            actual = feed(model, ids[:, before:], cache, sizes)
            if exact or not before:
                assert_equal_logits(actual, expected, ROUNDING)
            else:
                assert difference(actual, expected) > ROUNDING


def test_soft_cap_and_sinks_matter():
    model = with_adapters(build("Gemma2", **FAMILIES["Gemma2"]), {"one": lora(**KV, rank_pattern={}, alpha_pattern={})})
    capped = feed(model, tokens(N), SharedLoRACache(), [N])
    for layer in model.get_base_model().model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert difference(capped, feed(model, tokens(N), SharedLoRACache(), [N])) > 1e-3
    model = with_adapters(build("GptOss", **GPT_OSS), {"one": lora(**KV, rank_pattern={}, alpha_pattern={})})
    with_sinks = feed(model, tokens(N), SharedLoRACache(), [N])
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            layer.self_attn.sinks.fill_(-1e4)
    assert difference(with_sinks, feed(model, tokens(N), SharedLoRACache(), [N])) > 1e-3


YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)


def test_a_norm_after_a_rotation_that_stretches():
    """YaRN multiplies cos and sin, so the norm of a rotated key is another than that of the key."""
    model = build("NanoChat", head_dim="absent", rope_parameters=YARN)
    model = with_adapters(model, {"one": lora(**KV, rank_pattern={}, alpha_pattern={})})
    expected = reference(twin(model), tokens(30))
    for sharing in ("base_shared", "lr_precomputed"):
        assert_equal_logits(feed(model, tokens(30), SharedLoRACache(sharing=sharing), [20, 1, 9]), expected, ROUNDING)


@pytest.mark.parametrize("window", [1, 4, 9])
@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_a_sliding_window_smaller_than_the_context(window, sharing):
    model = with_adapters(tiny_mistral(sliding_window=window), ["one", "two"])
    copy_adapter(model, "one", "two")
    plain = twin(model)
    assert (
        difference(reference(plain, tokens(30)), reference(with_adapters(tiny_mistral(), ["one", "two"]), tokens(30)))
        > 0.01
    )
    expected = feed(plain, tokens(30), DynamicCache(config=plain.config), [30])
    cache = SharedLoRACache(sharing=sharing)
    assert_equal_logits(feed(model, tokens(30), cache, [11, 1, 1, 9, 8]), expected)
    # An agent that comes later needs the keys that have left the window of the last token.
    activate(model, "two")
    counter = TokenCounter(model)
    again = logits(model, tokens(30), cache, attention_mask=torch.ones(1, 30))
    rerun = counter.take()[0]
    assert rerun == (30 if sharing == "base_shared" else 1)
    assert_equal_logits(again[:, -rerun:], expected[:, -rerun:])


def test_a_padded_batch_with_a_sliding_window():
    model = with_adapters(tiny_mistral(sliding_window=4), ["one"])
    ids, mask = tokens(N, rows=2), torch.ones(2, N, dtype=torch.long)
    ids[1, :5], mask[1, :5] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = reference(twin(model), ids, attention_mask=mask, position_ids=positions)
    actual = feed(model, ids, SharedLoRACache(), [9, 1, 4], mask=mask)
    assert_equal_logits(actual[mask.bool()], expected[mask.bool()])
