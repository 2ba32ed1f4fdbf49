"""The norm of a layer's keys, recognised by what it does, and the two numbers that split it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from lora_shared_cache import SharedLoRACache, UnsupportedAdapterError, UnsupportedModelError, attachment
from lora_shared_cache.key_norm import KeyNorm, find_key_norms
from lora_shared_cache.policies import SHARED_ENTRY

from .test_families import FAMILIES, build
from .tiny import (
    EXACT,
    activate,
    assert_equal_logits,
    copy_adapter,
    difference,
    feed,
    fill_adapter,
    finish,
    logits,
    lora,
    lora_layers,
    reference,
    share_a,
    tokens,
    twin,
    with_adapters,
)

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
    norm, after = find_key_norms(layer, 2, 8, CPU)
    assert after.after_rotation and after.rotated_weight.shape == (2, 8) and norm.bias is None
    assert norm.per_head == per_head and not norm.centred and norm.eps > 0
    u = torch.randn(2, 5, 16, dtype=torch.float64)
    module = layer.k_norm.to(torch.float64)
    expected = module(u.view(2, 5, 2, 8)) if per_head else module(u).view(2, 5, 2, 8)
    tolerance = 1e-6 if dtype == torch.float64 else 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(
        norm(u.view(2, 5, 2, 8).transpose(1, 2)),
        expected.transpose(1, 2).to(torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("module", [nn.Linear(8, 8), nn.GroupNorm(1, 2), nn.Tanh()])
def test_other_kinds_are_not_taken_for_one(module):
    layer = nn.Module()
    layer.k_norm = module
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    assert find_key_norms(layer, 2, 8, CPU) == find_key_norms(nn.Module(), 2, 8, CPU) == []


@pytest.mark.parametrize("width", [8, 16])
def test_a_layer_norm_with_a_bias(width):
    """Of each head, and of both heads together, where each has a bias of its own."""
    layer, module = nn.Module(), nn.LayerNorm(width)
    layer.k_norm = module
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    (norm,) = find_key_norms(layer, 2, 8, CPU)
    assert norm.centred and norm.per_head == (width == 8) and not norm.after_rotation
    assert norm.bias.shape == (width // 8, 8)
    u = torch.randn(1, 5, 16)
    expected = module(u.view(1, 5, -1, width)).reshape(1, 5, 2, 8).transpose(1, 2)
    torch.testing.assert_close(norm(u.view(1, 5, 2, 8).transpose(1, 2)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("heads, per_head", [(1, True), (2, True), (2, False)])
def test_two_numbers_split_the_norm(heads, per_head, centred, biased):
    """The identity of the module's docstring, without a rotation, in float64."""
    torch.manual_seed(0)
    weight, bias = torch.randn(2, heads, 6, dtype=torch.float64)
    norm = KeyNorm(weight, 1e-3, per_head, centred, bias=bias if biased else None)
    u, a, up = (torch.randn(*s, dtype=torch.float64) for s in ((2, 2, 5, 6), (2, 5, 3), (2, 3, 6)))
    delta = a[:, None] @ up
    adapted = norm.rms(u + delta)
    entries, ups = a, norm.with_bias(norm.scaled(up))
    if biased:
        # The norm's bias is read as further low-rank columns.
        entries = torch.cat((a, (adapted - norm.rms(u)).squeeze(-1).transpose(1, 2)), dim=-1)
        assert ups.shape == (2, 3 + (2 if per_head else 1), 6)
    split = norm(u) * norm.rms(u) / adapted + (entries[:, None] @ ups) / adapted
    torch.testing.assert_close(split, norm(u + delta), rtol=1e-12, atol=1e-12)


# ---- in the cache --------------------------------------------------------------------------------------------------

NAMES = ["plan", "act"]
KV = dict(rank_pattern={}, alpha_pattern={})


def normed(family: str = "Qwen3", names=NAMES, **settings):
    """Float64, with norms that compute in float64: all but the order of additions shows."""
    return with_adapters(build(family, torch.float64, **FAMILIES[family]), {n: lora(**KV, **settings) for n in names})


def replaced_norms(family: str, width: int):
    """Layers that slide, and norms of another kind: a LayerNorm of ``width`` columns with a bias."""
    model = build(family, torch.float32, **FAMILIES[family])
    for layer in model.model.layers:
        layer.self_attn.k_norm = nn.LayerNorm(width)
    return with_adapters(finish(model, torch.float64), {n: lora(**KV) for n in NAMES})


# Norms before the rotation and after it, and with a bias: in a fused projection, and of each head or over all
KINDS = {name: lambda name=name: normed(name) for name in ("Qwen3", "HunYuanDenseV1")}
KINDS["Persimmon"] = lambda: normed("Persimmon", target_modules=["query_key_value", "dense"])
KINDS["a bias and windows"] = lambda: replaced_norms("Gemma3", 8)
KINDS["a bias over all heads"] = lambda: replaced_norms("Olmo3", 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed", "base_lr_shared"])
def test_equal_adapters_take_turns_exactly(kind, sharing, storage):
    """Every policy is exact then; chunks, single tokens and the base model as writer of entries for others come along."""
    model = KINDS[kind]()
    copy_adapter(model, "plan", "act")
    plain = twin(model)
    activate(plain, "plan")
    expected = reference(plain, tokens(16))
    activate(plain, None)
    assert difference(expected, reference(plain, tokens(16))) > 0.01
    cache = SharedLoRACache(sharing=sharing)
    mask = torch.ones(1, 16, dtype=torch.long)
    done = 0
    for name, stop in (
        ("plan", 6),
        ("act", 7),
        ("plan", 8),
        ("plan", 9),
        ("act", 13),
        ("plan", 14),
        ("plan", 15),
        ("act", 16),
    ):
        activate(model, name)
        out = logits(model, tokens(16)[:, :stop], cache, attention_mask=mask[:, :stop])
        assert_equal_logits(out[:, done - stop :], expected[:, done:stop], EXACT)
        done = stop
    cache.crop(-5)
    activate(model, "act")
    out = logits(model, tokens(16), cache, attention_mask=mask)
    assert_equal_logits(out[:, -5:], expected[:, -5:], EXACT)


@pytest.mark.parametrize("family", ["Phi with norms", "HunYuanDenseV1"])
@pytest.mark.parametrize("sharing", ["base_lr_shared", "lr_precomputed"])
def test_norms_of_all_adapters_are_computed_by_whoever_runs(family, sharing, storage):
    """Two different adapters and a layer-0 look: gains are those of the adapter that reads, whoever processed the token."""
    model = normed(family, r=3)
    share_a(model, NAMES)
    activate(model, "plan")
    cache, own = SharedLoRACache(sharing=sharing), SharedLoRACache(sharing="base_shared")
    ids, mask = tokens(12), torch.ones(1, 12, dtype=torch.long)
    logits(model, ids[:, :9], cache, attention_mask=mask[:, :9])
    for step in range(9, 12):
        logits(model, ids[:, step : step + 1], cache, attention_mask=mask[:, : step + 1])
    activate(model, "act")
    assert cache.get_seq_length() == 12
    logits(model, ids, own, attention_mask=mask)
    key = {"base_lr_shared": (*SHARED_ENTRY, "act"), "lr_precomputed": ("act",)}[sharing]
    for which in ("gain", "delta_gain", "shift")[: 3 if family == "Phi with norms" else 2]:
        # Hidden states of layer 0 are those of the embedding, whoever is active.
        expected = own.layers[0].entries[("act",)][which].view(12)
        torch.testing.assert_close(cache.layers[0].entries[key][which].view(12), expected, rtol=1e-12, atol=0)
        assert (expected - cache.layers[0].entries[key[:-1] + ("plan",)][which].view(12)).abs().max() > 1e-3


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_a_bias_where_layers_let_go_of_tokens(sharing, storage):
    """Longer than a window and what is kept besides."""
    model = KINDS["a bias and windows"]()
    copy_adapter(model, "plan", "act")
    ids, mask = tokens(160), torch.ones(1, 160, dtype=torch.long)
    expected, cache, done = reference(twin(model), ids), SharedLoRACache(sharing=sharing), 0
    for name, stop in (
        ("plan", 120),
        ("plan", 121),
        ("act", 130),
        ("act", 131),
        ("plan", 158),
        ("plan", 159),
        ("act", 160),
    ):
        activate(model, name)
        out = logits(model, ids[:, :stop], cache, attention_mask=mask[:, :stop])
        assert_equal_logits(out[:, done - stop :], expected[:, done:stop], EXACT)
        done = stop


@pytest.mark.parametrize("family, which, none", [("Qwen3", "gain", 1.0), ("Phi with norms", "shift", 0.0)])
def test_the_numbers_matter(family, which, none):
    model = normed(family)
    cache = SharedLoRACache()
    right = feed(model, tokens(10), cache, [9, 1])
    cache.reset()
    feed(model, tokens(10)[:, :9], cache, [9])
    for layer in cache.layers:
        layer.entries[("plan",)][which].data.fill_(none)
        layer.release_expanded()
    assert difference(logits(model, tokens(10)[:, 9:], cache), right[:, 9:]) > 0.01


def test_adapters_that_change_or_come_late_get_norms_of_their_own(storage):
    model = normed(r=3)
    share_a(model, NAMES)
    cache = SharedLoRACache(sharing="base_lr_shared")
    ids, mask = tokens(12), torch.ones(1, 12, dtype=torch.long)
    activate(model, "plan")
    logits(model, ids[:, :10], cache, attention_mask=mask[:, :10])
    assert cache.coverage()["act"] == 10
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.act" in name:
                parameter.mul_(0.5)
    activate(model, "act")
    late = logits(model, ids, cache, attention_mask=mask)
    # B has changed and A has not: the shared entries stand, but the norms are another's, and "act" runs the tokens for them.
    fresh = SharedLoRACache(sharing="base_lr_shared")
    activate(model, "plan")
    logits(model, ids[:, :10], fresh, attention_mask=mask[:, :10])
    fresh.drop_adapter("act")
    activate(model, "act")
    assert late.shape[1] == 12
    assert_equal_logits(late, logits(model, ids, fresh, attention_mask=mask), EXACT)
    model.add_adapter("late", lora(**KV, r=3))
    fill_adapter(model, "late", 9)
    share_a(model, [*NAMES, "late"])
    assert cache.coverage()["late"] == 0 and cache.coverage()["act"] == 12


@pytest.mark.parametrize("family", ["Phi with norms", "HunYuanDenseV1"])
def test_several_adapters_at_once(family, storage):
    model = normed(family)
    plain = twin(model)
    activate(plain, NAMES)
    expected = reference(plain, tokens(12))
    activate(model, NAMES)
    assert_equal_logits(feed(model, tokens(12), SharedLoRACache(sharing="base_shared"), [9, 1, 2]), expected, EXACT)
    cache = SharedLoRACache(sharing="lr_precomputed")
    with pytest.raises(UnsupportedAdapterError, match="normalises its keys.*sharing='base_shared'"):
        logits(model, tokens(12), cache)
    assert cache.trajectory_length == 0


def test_adapters_without_keys_and_the_base_model(storage):
    model = normed(target_modules=["q_proj", "v_proj"])
    expected = reference(twin(model), tokens(12))
    assert_equal_logits(feed(model, tokens(12), SharedLoRACache(), [9, 1, 2]), expected, EXACT)
    model = normed()
    activate(model, None)
    expected = reference(twin(model), tokens(12))
    assert_equal_logits(feed(model, tokens(12), SharedLoRACache(), [9, 1, 2]), expected, EXACT)


def test_memory_says_what_the_norms_take():
    model = normed(family="Qwen3", r=3).float()
    cache = SharedLoRACache()
    feed(model, tokens(10), cache, [10])
    footprint = cache.memory_footprint()
    # Two layers; r_k + r_v = 6 and two numbers for each of two heads, in float32; one number per head of the base.
    assert footprint["low_rank"] == {"plan": 2 * 10 * (6 + 4) * 4}
    assert footprint["positions"] >= 2 * 10 * 2 * 4
    model = normed(family="Phi with norms", r=3).float()
    cache = SharedLoRACache()
    feed(model, tokens(10), cache, [10])
    # And a third for the bias.
    assert cache.memory_footprint()["low_rank"] == {"plan": 2 * 10 * (6 + 4 + 2) * 4}


MISTAKES = {
    "no bias": ("Phi with norms", lambda norm: replace(norm, bias=None)),
    "half the bias": ("Phi with norms", lambda norm: replace(norm, bias=norm.bias / 2)),
    "weights before the rotation": (
        "HunYuanDenseV1",
        lambda norm: replace(norm, after_rotation=False, weight=norm.rotated_weight, rotated_weight=None),
    ),
    "no weights": ("HunYuanDenseV1", lambda norm: replace(norm, rotated_weight=None)),
    "weights after the rotation": (
        "Qwen3",
        lambda norm: replace(
            norm, after_rotation=True, weight=torch.ones_like(norm.weight), rotated_weight=norm.weight.expand(2, -1)
        ),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_norm_taken_for_another_is_noticed(mistake, monkeypatch):
    """By the trial of the layer."""
    family, wrong = MISTAKES[mistake]

    def find(*args):
        right = [norm for norm in find_key_norms(*args) if norm.after_rotation == (family == "HunYuanDenseV1")]
        return list(map(wrong, right))

    monkeypatch.setattr(attachment, "find_key_norms", find)
    with pytest.raises(UnsupportedModelError, match="normalised"):
        logits(normed(family), tokens(5), SharedLoRACache())


@pytest.mark.parametrize("family", ["StableLm with norms", "Phi with norms", "Persimmon", "HunYuanDenseV1"])
def test_bfloat16(family):
    """nn.LayerNorm in bfloat16 is tried in bfloat16."""
    model = build(family, torch.float32, **FAMILIES[family])
    model = with_adapters(model, {"one": lora(target_modules=["q_proj", "k_proj", "v_proj", "query_key_value"], **KV)})
    expected = reference(twin(model), tokens(12))
    model = model.to(torch.bfloat16)
    theirs = (reference(twin(model), tokens(12)).float() - expected).norm()
    ours = (feed(model, tokens(12), SharedLoRACache(), [9, 1, 2]).float() - expected).norm()
    assert 0 < ours <= 1.5 * theirs


def test_norms_wait_for_the_shared_entries_that_they_are_computed_from():
    """A newcomer on more layers makes all shared entries start anew; until then nobody has norms to compute."""
    narrow = {name: lora(layers_to_transform=[0], rank_pattern={}, alpha_pattern={}) for name in NAMES}
    outs = []
    for sharing in ("base_lr_shared", "base_shared"):
        model = with_adapters(build("Qwen3", torch.float64), narrow)
        share_a(model, NAMES)
        cache, ids, mask = SharedLoRACache(sharing=sharing), tokens(12), torch.ones(1, 12, dtype=torch.long)
        logits(model, ids[:, :5], cache)
        model.add_adapter("wide", lora(rank_pattern={}, alpha_pattern={}))
        fill_adapter(model, "wide", 9)
        with torch.no_grad():
            for path, module in lora_layers(model):
                if "plan" in module.lora_A and path.endswith(("k_proj", "v_proj")):
                    module.lora_A["wide"].weight.copy_(module.lora_A["plan"].weight)
        activate(model, None)
        logits(model, ids[:, :9], cache, attention_mask=mask[:, :9])
        activate(model, "plan")
        outs.append(logits(model, ids, cache, attention_mask=mask)[:, -1])
    assert_equal_logits(*outs)
