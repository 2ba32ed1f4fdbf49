"""One adapter, any placement: the logits are those of PEFT with a ``DynamicCache``, in prefill, in chunks and in decode."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import DynamicCache

from lora_shared_cache import SharedLoRACache

from .tiny import (
    ALL_LINEAR,
    EXACT,
    activate,
    assert_equal_logits,
    copy_adapter,
    difference,
    feed,
    fill_adapter,
    logits,
    lora,
    reference,
    share_a,
    tiny_llama,
    tiny_mistral,
    tokens,
    twin,
    with_adapters,
)

pytestmark = [
    pytest.mark.integration,
    # Rank patterns that match nothing where a test adapts a few projections only.
    pytest.mark.filterwarnings("ignore:.*pattern keys did not match:RuntimeWarning"),
]

POLICIES = ["base_shared", "lr_precomputed", "base_lr_shared", "auto"]
# Prefill; two chunks; a prompt and single tokens; one by one from the start.
SPLITS = [[14], [5, 9], [9, 1, 1, 1, 2], [1] * 14]


def assert_exact(model, agent="one", sharing="auto", splits=SPLITS, tolerance=EXACT, ids=None, **cache_settings):
    """The shared cache gives what a twin without it gives, however the tokens are cut."""
    plain = twin(model)
    activate(plain, agent)
    activate(model, agent)
    ids = tokens(14) if ids is None else ids
    expected = reference(plain, ids)
    for sizes in splits:
        cache = SharedLoRACache(sharing=sharing, **cache_settings)
        assert_equal_logits(feed(model, ids, cache, sizes), expected, tolerance)
        assert cache.get_seq_length() == cache.trajectory_length == ids.shape[1]


def matters(model, agent="one"):
    """The adapter changes the logits (else equality would prove nothing)."""
    plain = twin(model)
    activate(plain, agent)
    with_adapter = reference(plain, tokens(14))
    activate(plain, None)
    return difference(with_adapter, reference(plain, tokens(14)))


@pytest.mark.parametrize("sharing", POLICIES)
@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral])
def test_one_adapter_equals_peft_with_dynamic_cache(make, sharing):
    model = with_adapters(make(), ["one"])
    assert matters(model) > 0.1
    assert_exact(model, sharing=sharing)


def test_the_delta_matters_on_keys_and_on_values():
    for which in ("k_proj", "v_proj"):
        model = with_adapters(tiny_llama(), {"one": lora(target_modules=[which])})
        assert matters(model) > 0.02, which


@pytest.mark.parametrize(
    "targets",
    [
        ["k_proj"],
        ["v_proj"],
        ["q_proj"],
        ["o_proj", "gate_proj", "up_proj", "down_proj"],
        ["k_proj", "v_proj"],
        ["q_proj", "v_proj"],
        ["q_proj", "k_proj", "o_proj"],
        ALL_LINEAR,
    ],
    ids="+".join,
)
@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed", "base_lr_shared"])
def test_any_subset_of_linears(targets, sharing):
    model = with_adapters(tiny_llama(), {"one": lora(target_modules=targets)})
    assert matters(model) > 0.005
    assert_exact(model, sharing=sharing, splits=[[14], [6, 4, 1, 1, 1, 1]])


def test_adapter_on_some_layers_only():
    model = with_adapters(tiny_llama(), {"one": lora(layers_to_transform=[1])})
    assert matters(model) > 0.02
    for sharing in POLICIES:
        assert_exact(model, sharing=sharing, splits=[[14], [6, 7, 1]])


@pytest.mark.parametrize(
    "settings",
    [
        dict(use_rslora=True),
        dict(lora_bias=True, target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern={}),
        dict(r=1, rank_pattern={}),
        dict(r=16, rank_pattern={}),
    ],
    ids=["rslora", "lora_bias", "rank_1", "rank_above_the_head"],
)
@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed", "base_lr_shared"])
@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
def test_lora_settings(settings, sharing):
    bias = "lora_bias" in settings
    model = with_adapters(tiny_llama(attention_bias=bias), {"one": lora(**settings)})
    if bias:
        assert any(m.lora_B["one"].bias is not None for _, m in _kv(model))
        with_bias = reference(twin(model), tokens(14))
        without = twin(model)
        for _, m in _kv(without):
            m.lora_B["one"].bias.data.zero_()
        assert difference(with_bias, reference(without, tokens(14))) > 0.01
    assert_exact(model, sharing=sharing, splits=[[14], [6, 7, 1]])


def _kv(model):
    from .tiny import lora_layers

    return [(path, m) for path, m in lora_layers(model) if path.split(".")[-1] in ("k_proj", "v_proj")]


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed", "auto"])
def test_several_active_adapters_add_up(sharing):
    model = with_adapters(tiny_llama(), {"one": lora(), "two": lora(r=2, rank_pattern={}), "three": lora()})
    plain = twin(model)
    activate(plain, ["one", "two"])
    both = reference(plain, tokens(14))
    for alone in ("one", "two"):
        activate(plain, alone)
        assert difference(both, reference(plain, tokens(14))) > 0.05
    assert_exact(model, agent=["one", "two"], sharing=sharing, splits=[[14], [6, 7, 1]])
    assert_exact(model, agent=["two", "one"], sharing=sharing, splits=[[14]])


def test_several_active_adapters_with_a_common_a():
    model = with_adapters(tiny_llama(), ["one", "two"])
    share_a(model, ["one", "two"])
    assert_exact(model, agent=["one", "two"], sharing="base_lr_shared", splits=[[14], [6, 7, 1]])


@pytest.mark.parametrize("sharing", POLICIES)
def test_the_base_model_is_an_agent(sharing):
    model = with_adapters(tiny_llama(), ["one"])
    plain = twin(model)
    expected = reference(plain.get_base_model(), tokens(14))
    cache = SharedLoRACache(sharing=sharing)
    with plain.disable_adapter():
        expected = reference(plain, tokens(14))
    with model.disable_adapter():
        actual = feed(model, tokens(14), cache, [6, 7, 1])
    assert_equal_logits(actual, expected)
    assert cache.coverage()["__base__"] == 14


def test_a_model_without_any_adapter():
    model = tiny_llama()
    expected = reference(twin(model), tokens(14))
    for sizes in SPLITS:
        assert_equal_logits(feed(model, tokens(14), SharedLoRACache(), sizes), expected)


def test_transformers_own_adapter_methods():
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"]), adapter_name="one")
    model.add_adapter(LoraConfig(r=2, target_modules=["k_proj", "v_proj", "o_proj"]), adapter_name="two")
    fill_adapter(model, "one", 1)
    fill_adapter(model, "two", 2)
    model.eval()
    plain = twin(model)
    seen = []
    for name in ("one", "two"):
        model.set_adapter(name)
        plain.set_adapter(name)
        seen.append(reference(plain, tokens(14)))
        assert_equal_logits(feed(model, tokens(14), SharedLoRACache(), [6, 7, 1]), seen[-1])
    model.disable_adapters()
    plain.disable_adapters()
    seen.append(reference(plain, tokens(14)))
    assert_equal_logits(feed(model, tokens(14), SharedLoRACache(), [6, 7, 1]), seen[-1])
    assert min(difference(seen[0], seen[1]), difference(seen[0], seen[2])) > 0.05


def test_transformers_load_adapter_from_a_folder(tmp_path):
    model = with_adapters(tiny_llama(), ["one"])
    model.save_pretrained(tmp_path, selected_adapters=["one"])
    plain = twin(model)
    fresh = tiny_llama()
    fresh.load_adapter(str(tmp_path / "one"), adapter_name="loaded")
    fresh.eval()
    # Saved in safetensors, nothing is lost.
    assert_equal_logits(feed(fresh, tokens(14), SharedLoRACache(), [6, 7, 1]), reference(plain, tokens(14)))


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_left_padded_batch_equals_peft(sharing):
    model = with_adapters(tiny_llama(), ["one"])
    plain = twin(model)
    ids, mask = tokens(14, rows=3), torch.ones(3, 14, dtype=torch.long)
    for row, padding in enumerate((0, 3, 5)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = reference(plain, ids, attention_mask=mask, position_ids=positions)
    assert difference(reference(plain, ids), expected) > 0.05, "the mask matters"
    seen = mask.bool()
    for sizes in SPLITS:
        cache = SharedLoRACache(sharing=sharing)
        actual = feed(model, ids, cache, sizes, mask=mask)
        # What a padding token gives is nobody's business (a query without keys has no defined answer).
        assert_equal_logits(actual[seen], expected[seen])


def test_batch_rows_are_independent():
    model = with_adapters(tiny_llama(), ["one"])
    ids = tokens(14, rows=3)
    together = feed(model, ids, SharedLoRACache(), [8, 5, 1])
    for row in range(3):
        assert_equal_logits(together[row : row + 1], feed(model, ids[row : row + 1], SharedLoRACache(), [8, 5, 1]))


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed", "base_lr_shared", "auto"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral])
def test_float32(make, sharing):
    model = with_adapters(make(torch.float32), ["one"])
    # Float32 sums in another order, through three layers: 1e-6 of logits of about 3.
    assert_exact(model, sharing=sharing, tolerance=2e-5)


@pytest.mark.parametrize("autocast", [True, False], ids=["adapters_in_float32", "adapters_in_the_base_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_half_precision_is_as_near_to_float32_as_peft_is(dtype, autocast, sharing):
    model = with_adapters(tiny_llama(dtype), ["one"])
    if not autocast:
        model = model.to(dtype)
    adapter_dtype = next(p.dtype for n, p in model.named_parameters() if "lora_A" in n)
    assert adapter_dtype == (torch.float32 if autocast else dtype)
    exact, plain = twin(model).double(), twin(model)
    ids = tokens(48, rows=4)
    truth = reference(exact, ids)
    peft = feed(plain, ids, DynamicCache(config=plain.config), [40, 1, 1, 6])
    ours = feed(model, ids, SharedLoRACache(sharing=sharing), [40, 1, 1, 6])

    def rms(x):
        return float((x.double() - truth).pow(2).mean().sqrt())

    assert rms(peft) > 1e-4, "half precision shows"
    # Both round at different places; over 4 x 48 x 64 numbers the two rms errors agree within a few percent.
    assert rms(ours) <= 1.3 * rms(peft)
    assert ours.dtype == dtype


def test_low_rank_dtype_can_be_finer_than_the_keys():
    model = with_adapters(tiny_llama(torch.bfloat16), ["one"])
    cache = SharedLoRACache(low_rank_dtype=torch.float32)
    feed(model, tokens(14), cache, [10, 4])
    fine = cache.memory_footprint()["low_rank"]["one"]
    cache = SharedLoRACache()
    feed(model, tokens(14), cache, [10, 4])
    assert fine == 2 * cache.memory_footprint()["low_rank"]["one"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_whatever_attention_the_model_was_loaded_with(implementation):
    model = tiny_llama(torch.float32)
    model.set_attn_implementation(implementation)
    model = with_adapters(model, ["one"])
    assert_exact(model, tolerance=2e-5, splits=[[14], [6, 7, 1]])
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed", "base_lr_shared", "auto"])
@pytest.mark.parametrize("turns", [[5, 3, 4, 2], [1, 1, 6, 1, 5]])
def test_identical_adapters_under_different_names_equal_a_cache_of_their_own(sharing, turns):
    model = with_adapters(tiny_llama(), ["one", "two", "three"])
    copy_adapter(model, "one", "two")
    copy_adapter(model, "one", "three")
    expected = reference(twin(model), tokens(14))
    cache, names = SharedLoRACache(sharing=sharing), ["one", "two", "three"]
    stop = 0
    for turn, size in enumerate(turns):
        activate(model, names[turn % 3])
        start, stop = stop, stop + size
        # The whole trajectory is given: what the agent has not seen is run again.
        out = logits(model, tokens(14)[:, :stop], cache, attention_mask=torch.ones(1, stop))
        assert_equal_logits(out[:, start - stop :], expected[:, start:stop])
    assert stop == 14


@pytest.mark.parametrize("sharing", ["base_shared", "base_lr_shared", "auto"])
def test_shared_a_adapters_with_equal_b_equal_a_cache_of_their_own(sharing):
    model = with_adapters(tiny_llama(), ["one", "two"])
    share_a(model, ["one", "two"])
    expected_different = difference(
        reference(twin(model), tokens(14)), _as(twin(model), "two", lambda m: reference(m, tokens(14)))
    )
    assert expected_different > 0.05
    copy_adapter(model, "one", "two")
    expected = reference(twin(model), tokens(14))
    cache = SharedLoRACache(sharing=sharing)
    for name, stop in (("one", 6), ("two", 9), ("one", 14)):
        activate(model, name)
        out = logits(model, tokens(14)[:, :stop], cache, attention_mask=torch.ones(1, stop))
        assert_equal_logits(out[:, -1], expected[:, stop - 1])


def _as(model, agent, function):
    activate(model, agent)
    return function(model)


def test_base_keys_and_values_of_layer_0_are_equal_whoever_ran():
    model = with_adapters(tiny_llama(), ["one", "two"])
    stored = {}
    for agent in ("one", "two", None):
        activate(model, agent)
        cache = SharedLoRACache()
        feed(model, tokens(14), cache, [9, 5])
        stored[agent] = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for agent in ("two", None):
        # Bit for bit: the base weights of layer 0 see the embeddings, which no adapter changed.
        assert torch.equal(stored["one"][0][0], stored[agent][0][0])
        assert torch.equal(stored["one"][0][1], stored[agent][0][1])
        assert difference(stored["one"][1][0], stored[agent][1][0]) > 0.01, "deeper layers do differ"


def test_base_keys_and_values_are_what_the_base_projections_gave():
    model = with_adapters(tiny_llama(), ["one"])
    plain = twin(model)
    activate(plain, None)
    dynamic = DynamicCache(config=plain.config)
    logits(plain, tokens(14), dynamic)
    activate(model, None)
    cache = SharedLoRACache()
    feed(model, tokens(14), cache, [9, 5])
    for ours, theirs in zip(cache.layers, dynamic.layers, strict=True):
        assert difference(ours.keys, theirs.keys) <= EXACT
        assert difference(ours.values, theirs.values) <= EXACT


@pytest.mark.parametrize("sizes", [[7, 7], [13, 1], [3, 1, 10], [1] * 14])
@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_chunked_equals_unchunked_in_what_is_stored(sizes, sharing):
    model = with_adapters(tiny_llama(), ["one", "two"])
    whole, cut = SharedLoRACache(sharing=sharing), SharedLoRACache(sharing=sharing)
    feed(model, tokens(14), whole, [14])
    feed(model, tokens(14), cut, sizes)
    for a, b in zip(whole.layers, cut.layers, strict=True):
        assert difference(a.keys, b.keys) <= EXACT and difference(a.values, b.values) <= EXACT
    assert whole.coverage() == cut.coverage()
    for agent in ("two", "one"):
        activate(model, agent)
        more = tokens(17, seed=1)
        more[:, :14] = tokens(14)
        mask = torch.ones(1, 17)
        assert_equal_logits(
            logits(model, more, cut, attention_mask=mask)[:, -3:],
            logits(model, more, whole, attention_mask=mask)[:, -3:],
        )


def test_block_diagonal_adapters_are_plain_lora():
    """MELoRA: a number of small adapters side by side, as one A and one B with blocks on the diagonal."""
    blocks, r = 2, 2
    model = with_adapters(tiny_llama(), {"one": lora(r=blocks * r, rank_pattern={})})
    full = reference(twin(model), tokens(14))
    with torch.no_grad():
        for _, module in _lora(model):
            for weight in (module.lora_A["one"].weight, module.lora_B["one"].weight):
                keep = torch.block_diag(*[torch.ones(w // blocks, h // blocks) for w, h in [weight.shape] * blocks])
                weight.mul_(keep)
    assert difference(full, reference(twin(model), tokens(14))) > 0.05 and matters(model) > 0.05
    for sharing in ("base_shared", "lr_precomputed"):
        assert_exact(model, sharing=sharing, splits=[[14], [6, 7, 1]])


def _lora(model):
    from .tiny import lora_layers

    return lora_layers(model)
