"""What the split can't express is refused by name before any wrong number, and leaves cache and model as before."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lora_shared_cache import (
    SharedCacheError,
    SharedLoRACache,
    TrajectoryError,
    UnsupportedAdapterError,
    UnsupportedModelError,
    attach,
    detach,
)

from .test_attach import state_of
from .tiny import (
    SHAPE,
    activate,
    assert_equal_logits,
    feed,
    fill_adapter,
    finish,
    logits,
    lora,
    lora_layers,
    reference,
    tiny_llama,
    tokens,
    with_adapters,
)

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]


def one_adapter(**settings):
    return with_adapters(tiny_llama(), {"one": lora(**settings)})


def refused(model, *parts, error=UnsupportedAdapterError, agent=None, **call):
    """Refused on an empty cache, in a plain call and in generate; nothing of the model has changed then."""
    implementation = model.config._attn_implementation
    before = reference(model, tokens(7), **{k: v for k, v in call.items() if k == "adapter_names"})
    cache = SharedLoRACache()
    for run in (
        lambda: logits(model, tokens(7), cache, **call),
        lambda: model.generate(
            input_ids=tokens(7),
            attention_mask=torch.ones_like(tokens(7)),
            past_key_values=cache,
            max_new_tokens=2,
            **call,
        ),
    ):
        with pytest.raises(error) as caught:
            run()
        for part in parts:
            assert part in str(caught.value), str(caught.value)
        assert isinstance(caught.value, ValueError)
        assert cache.trajectory_length == 0
        after = reference(model, tokens(7), **{k: v for k, v in call.items() if k == "adapter_names"})
        assert torch.equal(before, after)
        assert model.config._attn_implementation == implementation


# ---- adapters ----


def test_merged_adapters():
    model = one_adapter()
    model.merge_adapter()
    refused(model, "merged", "proj", "'one'", "unmerge_adapter")


def test_merged_in_the_middle_and_unmerged_again():
    model = one_adapter()
    cache = SharedLoRACache()
    expected = reference(model, tokens(9))
    logits(model, tokens(5), cache)
    model.merge_adapter()
    with pytest.raises(UnsupportedAdapterError, match="merged"):
        logits(model, tokens(9), cache, attention_mask=torch.ones(1, 9))
    assert cache.trajectory_length == 5
    with pytest.raises(UnsupportedAdapterError, match="merged"):
        logits(model, tokens(9)[:, 5:6], cache)
    model.unmerge_adapter()
    # Merging and unmerging rounds the base weights; in float64 that is below the tolerance.
    assert_equal_logits(feed(model, tokens(9)[:, 5:], cache, [1, 3]), expected[:, 5:])


def test_disable_adapter_while_merged_unmerges_and_is_the_base_model():
    model = one_adapter()
    with model.disable_adapter():
        expected = reference(model, tokens(9))
    model.merge_adapter()
    cache = SharedLoRACache()
    with model.disable_adapter():
        assert_equal_logits(feed(model, tokens(9), cache, [6, 3]), expected)


@pytest.mark.parametrize("targets", [["k_proj"], ["v_proj"], ["k_proj", "v_proj", "q_proj"]], ids="+".join)
def test_dora_on_keys_or_values(targets):
    refused(one_adapter(use_dora=True, target_modules=targets), targets[0], "'one'", "DoRA")


def test_dora_elsewhere_is_fine():
    model = with_adapters(
        tiny_llama(), {"one": lora(use_dora=True, target_modules=["q_proj", "o_proj", "up_proj"]), "two": lora()}
    )
    activate(model, "one")
    expected = reference(model, tokens(9))
    activate(model, None)
    assert (expected - reference(model, tokens(9))).abs().max() > 0.05
    activate(model, "one")
    assert_equal_logits(feed(model, tokens(9), SharedLoRACache(), [6, 3]), expected)


def test_dora_of_an_adapter_that_is_not_active_is_refused_when_its_turn_comes():
    model = with_adapters(tiny_llama(), {"one": lora(), "two": lora(use_dora=True)})
    cache = SharedLoRACache(sharing="base_shared")
    activate(model, "one")
    expected = reference(model, tokens(9))
    logits(model, tokens(6), cache)
    activate(model, "two")
    with pytest.raises(UnsupportedAdapterError, match="'two' uses DoRA"):
        logits(model, tokens(9), cache, attention_mask=torch.ones(1, 9))
    activate(model, "one")
    assert_equal_logits(feed(model, tokens(9)[:, 6:], cache, [3]), expected[:, 6:])


def test_dropout_in_training_mode():
    model = one_adapter(lora_dropout=0.1)
    model.train()
    cache = SharedLoRACache()
    with pytest.raises(UnsupportedAdapterError, match=r"'one'.*lora_dropout=0.1.*model.eval\(\)"):
        logits(model, tokens(7), cache)
    model.eval()
    assert_equal_logits(feed(model, tokens(9), cache, [6, 3]), reference(model, tokens(9)))
    model.train()
    for ids in (tokens(12)[:, 9:], tokens(12)[:, 9:10]):
        with pytest.raises(UnsupportedAdapterError, match="lora_dropout"):
            logits(model, ids, cache)
    model.eval()
    assert cache.trajectory_length == 9


def test_training_mode_without_dropout_is_exact():
    model = one_adapter()
    expected = reference(model, tokens(9))
    model.train()
    assert_equal_logits(feed(model, tokens(9), SharedLoRACache(), [6, 3]), expected)


def test_attention_dropout_in_training_mode():
    model = with_adapters(tiny_llama(attention_dropout=0.1), {"one": lora()})
    model.train()
    cache = SharedLoRACache()
    with pytest.raises(SharedCacheError, match="dropout"):
        logits(model, tokens(7), cache)
    model.eval()
    assert_equal_logits(feed(model, tokens(9), cache, [6, 3]), reference(model, tokens(9)))


def test_ia3():
    model = get_peft_model(
        tiny_llama(),
        peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.mul_(1.5)
    refused(model, "k_proj", "not LoRA")


@pytest.mark.parametrize(
    "config",
    [
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["prefix_tuning", "prompt_tuning"],
)
def test_adapters_that_add_tokens(config):
    model = get_peft_model(tiny_llama(torch.float32), config).eval()
    for call in (lambda: attach(model), lambda: SharedLoRACache(model)):
        with pytest.raises(UnsupportedAdapterError, match="virtual tokens"):
            call()


def test_prompt_tuning_is_refused_at_first_use():
    """Its virtual tokens reach the model as embeddings before the prompt's."""
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(torch.float32), config).eval()
    cache = SharedLoRACache()
    with pytest.raises(UnsupportedAdapterError, match="virtual tokens"):
        logits(model, tokens(7), cache)
    assert cache.trajectory_length == 0


@pytest.mark.parametrize("module", ["embed_tokens", "norm", "input_layernorm"])
def test_modules_to_save(module):
    refused(one_adapter(modules_to_save=[module]), module, "modules_to_save")


def test_modules_to_save_of_the_output_embedding_does_not_touch_keys():
    model = one_adapter(modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    expected = reference(model, tokens(9))
    assert_equal_logits(feed(model, tokens(9), SharedLoRACache(), [6, 3]), expected)


def test_trainable_tokens():
    refused(one_adapter(trainable_token_indices=[1, 2]), "trainable_token_indices")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_bias(bias):
    model = with_adapters(tiny_llama(attention_bias=True), {"one": lora(bias=bias)})
    refused(model, "'one'", f"bias='{bias}'", "lora_bias")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_change_the_base_weights(init):
    model = get_peft_model(tiny_llama(torch.float32), LoraConfig(target_modules=["k_proj", "v_proj"]), "one")
    model.add_adapter("two", LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=init))
    refused(model.eval(), "'two'", init)


def test_arrow():
    """A router over other adapters: what it adds to a key belongs to no A."""
    model = get_peft_model(tiny_llama(torch.float32), LoraConfig(r=2, target_modules=["k_proj", "v_proj"]), "one")
    arrow = peft.ArrowConfig(top_k=1)
    arrow.task_adapter_names = ["one"]
    config = LoraConfig(r=2, target_modules=["k_proj", "v_proj"], arrow_config=arrow)
    model.add_adapter("router", config)
    model.set_adapter("router")
    cache = SharedLoRACache()
    with pytest.raises(UnsupportedAdapterError, match="'router' uses ArrowLinearVariant"):
        logits(model.eval(), tokens(7), cache)
    assert cache.trajectory_length == 0


def test_target_parameters():
    config = LoraConfig(target_modules=[], target_parameters=["k_proj.weight", "v_proj.weight"])
    model = get_peft_model(tiny_llama(torch.float32), config, "one").eval()
    refused(model, "target_parameters")


def test_layers_with_different_active_adapters():
    model = with_adapters(tiny_llama(), ["one", "two"])
    activate(model, "one")
    next(m for p, m in lora_layers(model) if p.endswith("layers.1.self_attn.k_proj")).set_adapter("two")
    refused(model, "layers.1.self_attn.k_proj", "set_adapter")


def test_replaced_base_weights_or_an_adapter_type_mixed_in_later():
    model = one_adapter()
    cache = SharedLoRACache()
    expected = reference(model, tokens(9))
    logits(model, tokens(6), cache)
    model.add_adapter("dora", lora(use_dora=True))
    fill_adapter(model, "dora", 5)
    model.eval()
    activate(model, "dora")
    with pytest.raises(UnsupportedAdapterError, match="'dora' uses DoRA"):
        logits(model, tokens(9), cache, attention_mask=torch.ones(1, 9))
    activate(model, "one")
    assert_equal_logits(feed(model, tokens(9)[:, 6:], cache, [3]), expected[:, 6:])


# ---- models ----


def check_model_refused(model, *parts):
    before = state_of(model)
    for call in (lambda: attach(model), lambda: SharedLoRACache(model)):
        with pytest.raises(UnsupportedModelError) as error:
            call()
        for part in parts:
            assert part in str(error.value), str(error.value)
        assert state_of(model) == before


def test_a_model_without_known_projections_is_refused_at_first_use():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, is_decoder=True,
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.BertLMHeadModel(config).eval()
    check_model_refused(model, "BertSelfAttention", "k_proj", "qkv_proj")
    before = state_of(model)
    for call in (
        lambda: model(input_ids=tokens(7), past_key_values=SharedLoRACache()),
        lambda: model.generate(
            input_ids=tokens(7), attention_mask=torch.ones_like(tokens(7)), past_key_values=SharedLoRACache()
        ),
    ):
        with pytest.raises(UnsupportedModelError, match="BertSelfAttention"):
            call()
    assert state_of(model) == before


def test_encoder_decoder_models_are_refused_by_name():
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    check_model_refused(transformers.BartForConditionalGeneration(config).eval(), "encoder-decoder", "Bart")


def test_latent_attention_is_refused_by_name():
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, pad_token_id=0,
    )  # fmt: skip
    check_model_refused(transformers.DeepseekV3ForCausalLM(config).eval(), "DeepseekV3Attention")


def test_unknown_norms_of_keys_are_refused_by_name_and_values_work():
    """A LayerNorm after the rotation; others are split (test_key_norm.py)."""
    settings = {k: v for k, v in SHAPE.items() if k != "head_dim"} | dict(num_hidden_layers=2)

    def model():
        made = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**settings))
        for layer in made.model.layers:
            layer.self_attn.k_norm = torch.nn.LayerNorm(8)
        return finish(made, torch.float32)

    with_keys = with_adapters(model(), {"one": lora(target_modules=["k_proj", "v_proj"], rank_pattern={})})
    refused(with_keys, "NanoChatAttention", "normalised", "without k_proj", error=UnsupportedModelError)
    without = with_adapters(model(), {"one": lora(target_modules=["q_proj", "v_proj", "fc1"], rank_pattern={})})
    expected = reference(without, tokens(9))
    activate(without, None)
    assert (reference(without, tokens(9)) - expected).abs().max() > 0.02
    activate(without, "one")
    # Float32 through two layers.
    assert_equal_logits(feed(without, tokens(9), SharedLoRACache(), [6, 3]), expected, 2e-5)


def test_attention_to_other_values_than_those_cached_is_refused():
    settings = {**SHAPE, "num_hidden_layers": 2}
    model = finish(transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**settings)), torch.float32)
    model = with_adapters(model, {"one": lora(target_modules=["v_proj"], rank_pattern={}, alpha_pattern={})})
    refused(model, "DiffLlamaAttention", "other keys or values", error=UnsupportedModelError)


def test_a_mask_made_of_the_values_is_refused():
    settings = {**SHAPE, "num_hidden_layers": 2}
    model = finish(transformers.DogeForCausalLM(transformers.DogeConfig(**settings)), torch.float32)
    model = with_adapters(model, {"one": lora(target_modules=["v_proj"], rank_pattern={}, alpha_pattern={})})
    refused(model, "DogeAttention", "mask of its own", error=UnsupportedModelError)


def test_attention_that_asks_no_interface_is_refused():
    config = transformers.XGLMConfig(
        vocab_size=64, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = finish(transformers.XGLMForCausalLM(config), torch.float32)
    model = with_adapters(model, {"one": lora(target_modules=["v_proj"], rank_pattern={}, alpha_pattern={})})
    refused(model, "XGLMAttention", "attention interface", error=UnsupportedModelError)
    detach(model)


def test_layers_with_a_recurrent_state_are_refused():
    """Falcon-H1 has attention and a state space in every layer."""
    config = transformers.FalconH1Config(
        **{**SHAPE, "num_hidden_layers": 2}, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8,
    )  # fmt: skip
    model = finish(transformers.FalconH1ForCausalLM(config), torch.float32)
    model = with_adapters(model, {"one": lora(target_modules=["v_proj"], rank_pattern={}, alpha_pattern={})})
    refused(
        model, "layers [0, 1] (hybrid) keep a state of their own", "use a DynamicCache", error=UnsupportedModelError
    )
    with pytest.raises(UnsupportedModelError, match="recurrent or convolution state"):
        SharedLoRACache().update_conv_state(None, 0)


def test_clipped_keys_are_refused():
    settings = {k: v for k, v in SHAPE.items() if k != "head_dim"}
    config = transformers.OlmoConfig(**settings, clip_qkv=0.1)
    model = finish(transformers.OlmoForCausalLM(config), torch.float32)
    refused(with_adapters(model, ["one"]), "OlmoAttention", error=UnsupportedModelError)


def test_something_that_is_no_transformers_model():
    with pytest.raises(UnsupportedModelError, match="Linear"):
        attach(torch.nn.Linear(2, 2))


def test_a_cache_of_another_model():
    one, other = one_adapter(), with_adapters(tiny_llama(seed=3), {"one": lora()})
    cache = SharedLoRACache()
    alone = reference(other, tokens(9))
    logits(one, tokens(6), cache)
    for call in (
        lambda: logits(other, tokens(9), cache, attention_mask=torch.ones(1, 9)),
        lambda: logits(other, tokens(9)[:, 6:], cache),
        lambda: other.generate(
            input_ids=tokens(9), attention_mask=torch.ones_like(tokens(9)), past_key_values=cache, max_new_tokens=2
        ),
    ):
        with pytest.raises(SharedCacheError, match="one SharedLoRACache per model"):
            call()
        assert_equal_logits(reference(other, tokens(9)), alone)
    assert_equal_logits(feed(one, tokens(9)[:, 6:], cache, [3]), reference(one, tokens(9))[:, 6:])
    cache.reset()
    assert_equal_logits(feed(other, tokens(9), cache, [6, 3]), reference(other, tokens(9)))


def test_output_attentions():
    model = one_adapter()
    cache = SharedLoRACache()
    with pytest.raises(SharedCacheError, match="output_attentions"):
        logits(model, tokens(6), cache, output_attentions=True)
    assert_equal_logits(feed(model, tokens(9), cache, [6, 3]), reference(model, tokens(9)))


def test_a_model_compiled_before_it_was_attached():
    model = with_adapters(tiny_llama(torch.float32), ["one"])
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"attach\(model\) before torch.compile|attach"):
        compiled(input_ids=tokens(6), past_key_values=SharedLoRACache())
    torch._dynamo.reset()


# ---- what the cache is made with ----


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (dict(sharing="everything"), "'base_lr_shared'"),
        (dict(max_cache_len=0), "max_cache_len"),
        (dict(max_cache_len=2.5), "max_cache_len"),
        (dict(low_rank_dtype=torch.int8), "low_rank_dtype"),
    ],
)
def test_wrong_settings(settings, part):
    with pytest.raises(ValueError, match=part):
        SharedLoRACache(**settings)


def test_the_errors_are_value_errors():
    for error in (SharedCacheError, TrajectoryError, UnsupportedAdapterError, UnsupportedModelError):
        assert issubclass(error, SharedCacheError) and issubclass(error, ValueError)
