"""Private layers: each agent keeps its own K and V there. All layers private is exact; some are what the definition says."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, NanoChatConfig, NanoChatForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lora_shared_cache import SharedCacheError, SharedLoRACache, UnsupportedAdapterError, UnsupportedModelError, attach

from .oracle import LlamaOracle
from .test_policies import NAMES, TURNS, agent_of, agents_model, take_turn, turn_by_turn
from .tiny import (
    SHAPE,
    TokenCounter,
    activate,
    assert_equal_logits,
    difference,
    feed,
    fill_adapter,
    finish,
    logits,
    lora,
    reference,
    tiny_llama,
    tiny_mistral,
    tokens,
    twin,
    with_adapters,
)

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

ALL = range(3)
# With an agent of two adapters, and the base model's second turn.
MANY_TURNS = [*TURNS, (["plan", "act"], 22), (None, 23), ("reflect", 24), (["act", "plan"], 25)]


class OwnCaches:
    """PEFT with a ``DynamicCache`` for each agent, on a model that is not attached."""

    def __init__(self, model):
        self.model, self.caches = twin(model), {}

    def turn(self, name, ids, mask=None):
        """Logits of what the agent has not run yet, its last token at least; given the whole text (rows, n)."""
        activate(self.model, name)
        cache = self.caches.setdefault(agent_of(name), DynamicCache(config=self.model.config))
        covered = cache.get_seq_length()
        if covered == ids.shape[1]:
            cache.crop(-1)
            covered -= 1
        kwargs = {}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            kwargs = dict(attention_mask=mask, position_ids=positions[:, covered:])
        return logits(self.model, ids[:, covered:], cache, **kwargs)


# ---- exact: all layers private -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral, lambda: tiny_mistral(sliding_window=6)])
def test_all_layers_private_is_exact_for_every_agent(make):
    model = with_adapters(make(), NAMES)
    own, cache, ids = OwnCaches(model), SharedLoRACache(private_layers=ALL), tokens(25)
    counter = TokenCounter(model)
    for name, stop in MANY_TURNS:
        # A fresh cache and the whole text at once, too: a window's cache must not be the judge of itself.
        activate(own.model, name)
        expected = reference(own.model, ids[:, :stop])[0]
        n = own.turn(name, ids[:, :stop]).shape[1]
        actual = take_turn(model, cache, name, ids[:, :stop])
        assert counter.take() == [n], "tokens that were run"
        assert_equal_logits(actual, expected[-actual.shape[0] :])
    counter.handle.remove()
    assert cache.policy == "base_shared" and cache.trajectory_length == 25
    assert cache.memory_footprint()["base"] == 0 and cache.memory_footprint()["expanded_keys"] == 0


def test_chunks_and_single_tokens_with_all_layers_private():
    model = agents_model()
    own, ids = OwnCaches(model), tokens(30)
    cache = SharedLoRACache(private_layers=ALL)
    start = 0
    for name, sizes in [("plan", [5, 3, 1, 1]), ("act", [1, 1, 4]), (None, [2, 1]), ("plan", [1, 1, 1]), ("act", [2])]:
        stop = start + sum(sizes)
        expected = own.turn(name, ids[:, :stop])
        activate(model, name)
        # What the agent has not seen, then its own tokens in pieces.
        covered = cache.get_seq_length()
        assert covered == stop - expected.shape[1]
        if covered < start:
            feed(model, ids[:, covered:start], cache, [start - covered], torch.ones(1, start, dtype=torch.long))
        actual = feed(model, ids[:, start:stop], cache, sizes)
        assert_equal_logits(actual, expected[:, start - stop :])
        start = stop


def test_generated_turns_equal_those_of_own_caches():
    model = agents_model()
    plain = twin(model)
    cache, ids = SharedLoRACache(private_layers=ALL), tokens(6)
    options = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    for name in ("plan", "act", None, "plan", "reflect", "reflect", None):
        activate(plain, name)
        expected = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        activate(model, name)
        actual = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        assert torch.equal(actual.sequences, expected.sequences)
        # generate hands out float32.
        assert difference(torch.stack(actual.logits), torch.stack(expected.logits)) < 1e-5
        ids = actual.sequences


def test_rows_with_left_padding():
    model = agents_model()
    ids, padding = tokens(16, rows=3), (0, 3, 5)
    mask = torch.ones_like(ids)
    for row, n in enumerate(padding):
        mask[row, :n] = 0
    own, cache = OwnCaches(model), SharedLoRACache(private_layers=ALL)
    for name, stop in [("plan", 8), ("act", 11), ("act", 12), (None, 13), ("plan", 16), ("plan", 16)]:
        expected = own.turn(name, ids[:, :stop], mask[:, :stop])
        activate(model, name)
        positions = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)
        actual = logits(model, ids[:, :stop], cache, attention_mask=mask[:, :stop], position_ids=positions)
        for row, n in enumerate(padding):
            seen = min(stop - n, expected.shape[1])
            assert_equal_logits(actual[row, -seen:], expected[row, -seen:])


def test_rows_are_kept_reordered_and_repeated():
    model = agents_model()
    ids = tokens(12, rows=3)
    cache = SharedLoRACache(private_layers=ALL)
    for name, stop in [("plan", 5), ("act", 8), (None, 9)]:
        take_turn(model, cache, name, ids[:, :stop])
    order = torch.tensor([2, 0])
    cache.reorder_cache(order)
    cache.batch_repeat_interleave(2)
    chosen = ids[order].repeat_interleave(2, dim=0)
    own = OwnCaches(model)
    for name in ("plan", "act", None):
        activate(model, name)
        covered = cache.get_seq_length()
        assert covered == {"plan": 5, "act": 8, None: 9}[name]
        mask = torch.ones_like(chosen)
        assert_equal_logits(
            logits(model, chosen, cache, attention_mask=mask)[:, covered - 12 :],
            own.turn(name, chosen)[:, covered - 12 :],
        )


def test_crop_leaves_no_trace_of_what_was_there():
    model = agents_model()
    ids, other = tokens(14), tokens(14, seed=1)
    cache, own = SharedLoRACache(private_layers=ALL), OwnCaches(model)
    take_turn(model, cache, "plan", ids[:, :6])
    take_turn(model, cache, "act", torch.cat((ids[:, :6], other[:, 6:12]), dim=1))
    take_turn(model, cache, "plan", torch.cat((ids[:, :6], other[:, 6:12]), dim=1))
    cache.crop(-6)
    assert cache.coverage() == {"__base__": 0, "plan": 6, "act": 6, "reflect": 0}
    for name, stop in [("act", 9), ("plan", 11), (None, 11), ("act", 14)]:
        expected = own.turn(name, ids[:, :stop])[0]
        n = min(expected.shape[0], 3)
        assert_equal_logits(take_turn(model, cache, name, ids[:, :stop])[-n:], expected[-n:])


# ---- some layers private: against the definition, written by hand --------------------------------------------------


@pytest.mark.parametrize("private", [(0,), (1,), (2, 0), range(1, 3), ALL], ids=str)
@pytest.mark.parametrize("sharing", ["base_shared", "auto"])
def test_three_agents_on_one_trajectory(private, sharing):
    # With one A for all, "auto" would share entries, and nobody would run anything again.
    model = agents_model()
    cache = SharedLoRACache(sharing=sharing, private_layers=private)
    oracle = LlamaOracle(twin(model), "base_shared", NAMES, tuple(private))
    turn_by_turn(model, cache, oracle, TURNS, tokens(20))
    assert cache.policy == "base_shared" and cache.private_layers == tuple(sorted(private))


def test_combinations_and_the_base_model_have_their_own():
    model = agents_model()
    turns = [("plan", 5), (["plan", "act"], 8), ("act", 10), (["plan", "act"], 13), (None, 14), (["act", "plan"], 14)]
    oracle = LlamaOracle(twin(model), "base_shared", NAMES, (1,))
    cache = SharedLoRACache(private_layers=[1])
    turn_by_turn(model, cache, oracle, turns, tokens(20))
    assert cache.coverage() == {"__base__": 14, "plan": 5, "act": 10, "reflect": 0, "act+plan": 14}
    assert list(cache.memory_footprint()["private"]) == ["plan", "act+plan", "act", "__base__"]


def test_adapters_on_some_projections_and_layers_or_without_k_and_v():
    configs = {
        "plan": lora(target_modules=["k_proj", "q_proj"]),
        "act": lora(target_modules=["v_proj", "down_proj"], layers_to_transform=[1, 2]),
        "reflect": lora(target_modules=["o_proj", "up_proj"]),
    }
    for private in ((0,), (1, 2)):
        model = with_adapters(tiny_llama(), configs)
        oracle = LlamaOracle(twin(model), "base_shared", NAMES, private)
        turn_by_turn(model, SharedLoRACache(private_layers=private), oracle, TURNS, tokens(20))


def test_no_private_layers_is_as_before():
    model = attach(agents_model())
    ids = tokens(20)
    caches = SharedLoRACache(sharing="base_shared"), SharedLoRACache(sharing="base_shared", private_layers=[])
    for name, stop in TURNS:
        outs = [take_turn(model, cache, name, ids[:, :stop]) for cache in caches]
        assert torch.equal(*outs)
    footprints = [cache.memory_footprint() for cache in caches]
    assert footprints[0] == footprints[1] and footprints[0]["private"] == {}
    assert caches[0].coverage() == caches[1].coverage() and caches[1].private_layers == ()
    assert "private" not in repr(caches[0])


def test_get_seq_length_is_what_each_agent_has_run():
    model = agents_model()
    cache, ids = SharedLoRACache(private_layers=[2]), tokens(20)
    for name, stop in MANY_TURNS[:7]:
        take_turn(model, cache, name, ids[:, :stop])
        covered = cache.coverage()
        for other in [*NAMES, None]:
            activate(model, other)
            assert cache.get_seq_length() == covered[other or "__base__"]
    assert covered["__base__"] == 17
    assert "private_layers=(2,)" in repr(cache) and "__base__: 17" in repr(cache)


def test_two_caches_with_other_private_layers_on_one_model():
    model = agents_model()
    ids = tokens(20)
    caches = {private: SharedLoRACache(private_layers=private) for private in ((0, 1, 2), (1,))}
    caches[()] = SharedLoRACache(sharing="base_shared")
    oracles = {private: LlamaOracle(twin(model), "base_shared", NAMES, private) for private in caches}
    for name, stop in TURNS:
        for private, cache in caches.items():
            expected = oracles[private].turn(agent_of(name), ids[0, :stop].tolist())
            assert_equal_logits(take_turn(model, cache, name, ids[:, :stop])[-len(expected) :], expected)


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_memory_footprint_counts_private_layers_by_agent(rows):
    model = agents_model()
    ids = tokens(12, rows=rows)
    cache, split = SharedLoRACache(private_layers=[0, 2]), SharedLoRACache(sharing="base_shared")
    for name, stop in [("plan", 5), ("act", 9), (None, 12)]:
        for each in (cache, split):
            activate(model, name)
            logits(model, ids[:, :stop], each, attention_mask=torch.ones_like(ids[:, :stop]))
    layer = 2 * 2 * 8 * 8 * rows  # K and V, heads, size, bytes: of one token
    footprint, other = cache.memory_footprint(), split.memory_footprint()
    assert footprint["base"] == layer * 12 and other["base"] == 3 * layer * 12
    assert footprint["private"] == {"plan": 2 * layer * 5, "act": 2 * layer * 9, "__base__": 2 * layer * 12}
    assert 0 < footprint["low_rank"]["plan"] < other["low_rank"]["plan"]
    assert footprint["non_shared"] == other["non_shared"] == 3 * 3 * layer * 12
    parts = footprint["low_rank"], footprint["private"]
    assert footprint["total"] == footprint["base"] + footprint["expanded_keys"] + footprint["positions"] + sum(
        sum(part.values()) for part in parts
    )
    assert footprint["allocated"] >= footprint["total"]
    for layer_idx, layer_cache in enumerate(cache.layers):
        assert (layer_cache.keys is None) == (layer_cache.values is None) == (layer_idx != 1)
    cache.drop_adapter("plan")
    cache.drop_adapter("__base__")
    after = cache.memory_footprint()
    assert after["private"] == {"act": 2 * layer * 9} and list(after["low_rank"]) == ["act"]
    assert after["non_shared"] == 3 * layer * 12
    assert cache.coverage() == {"__base__": 0, "plan": 0, "act": 9, "reflect": 0}


def test_low_rank_dtype_is_not_that_of_private_keys_and_values():
    model = agents_model()
    cache = SharedLoRACache(private_layers=[1], low_rank_dtype=torch.float32)
    take_turn(model, cache, "plan", tokens(6))
    kinds = [{b.data.dtype for parts in layer.entries.values() for b in parts.values()} for layer in cache.layers]
    assert kinds == [{torch.float32}, {torch.float64}, {torch.float32}]


def test_reset_copies_and_moves():
    model = agents_model()
    cache, ids = SharedLoRACache(private_layers=[1, 2]), tokens(20)
    oracle = LlamaOracle(twin(model), "base_shared", NAMES, (1, 2))
    for name, stop in TURNS[:3]:
        oracle.turn(agent_of(name), ids[0, :stop].tolist())
        take_turn(model, cache, name, ids[:, :stop])
    fork, other = copy.deepcopy(cache), tokens(20, seed=3)
    assert fork.private_layers == (1, 2) and fork.memory_footprint() == dict(
        cache.memory_footprint(), expanded_keys=0, total=fork.memory_footprint()["total"],
        allocated=fork.memory_footprint()["allocated"],
    )  # fmt: skip
    take_turn(model, fork, "act", torch.cat((ids[:, :12], other[:, :5]), dim=1))
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    expected = oracle.turn(("act",), ids[0, :14].tolist())
    assert_equal_logits(take_turn(model, cache, "act", ids[:, :14])[-len(expected) :], expected)
    cache.reset()
    assert cache.coverage() == {"__base__": 0, "plan": 0, "act": 0, "reflect": 0}
    assert cache.memory_footprint()["total"] == cache.memory_footprint()["non_shared"] == 0
    turn_by_turn(model, cache, LlamaOracle(twin(model), "base_shared", NAMES, (1, 2)), TURNS[:4], tokens(20, seed=5))


# ---- adapters that change ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [(1,), (0, 1, 2)])
def test_a_deleted_adapters_private_layers_go_and_its_tokens_stay(private):
    model = agents_model()
    cache, ids = SharedLoRACache(private_layers=private), tokens(20)
    oracle = LlamaOracle(twin(model), "base_shared", NAMES, private)
    for name, stop in [("plan", 5), ("act", 8)]:
        oracle.turn(agent_of(name), ids[0, :stop].tolist())
        take_turn(model, cache, name, ids[:, :stop])
    model.delete_adapter("plan")
    activate(model, "act")
    assert cache.get_seq_length() == 8
    assert list(cache.memory_footprint()["private"]) == ["act"]
    assert all(("", "plan") not in layer.entries for layer in cache.layers)
    expected = oracle.turn(("act",), ids[0, :10].tolist())
    assert_equal_logits(take_turn(model, cache, "act", ids[:, :10])[-len(expected) :], expected)
    # Another one under the same name starts from nothing.
    model.add_adapter("plan", lora())
    fill_adapter(model, "plan", 9)
    model.eval()
    again = LlamaOracle(model, "base_shared", NAMES, private)
    again.ids, again.base, again.own = list(oracle.ids), oracle.base, oracle.own
    again.forget("plan")
    expected = again.turn(("plan",), ids[0, :12].tolist())
    assert len(expected) == 12
    assert_equal_logits(take_turn(model, cache, "plan", ids[:, :12]), expected)


def test_a_retrained_adapter_runs_again_what_its_old_weights_wrote():
    model = agents_model()
    cache, ids = SharedLoRACache(private_layers=ALL), tokens(20)
    for name, stop in [("plan", 5), ("act", 8), ("plan", 9)]:
        take_turn(model, cache, name, ids[:, :stop])
    fill_adapter(model, "act", 7)
    # "act" was the first on tokens 5 to 8; what "plan" has run of them goes with the trajectory.
    assert cache.coverage() == {"__base__": 0, "plan": 5, "act": 0, "reflect": 0}
    own = OwnCaches(model)
    for name, stop in [("act", 11), ("plan", 12)]:
        expected = own.turn(name, ids[:, :stop])[0]
        actual = take_turn(model, cache, name, ids[:, :stop])
        assert_equal_logits(actual, expected[-actual.shape[0] :])


def test_an_adapter_loaded_later_has_run_nothing_and_the_others_keep_theirs():
    model = with_adapters(tiny_llama(), ["plan", "act"])
    cache, ids = SharedLoRACache(private_layers=[1, 2]), tokens(20)
    oracle = LlamaOracle(model, "base_shared", ["plan", "act"], (1, 2))
    for name, stop in [("plan", 6), (None, 8)]:
        oracle.turn(agent_of(name), ids[0, :stop].tolist())
        take_turn(model, cache, name, ids[:, :stop])
    take_turn(model, cache, "plan", ids[:, :9])
    oracle.turn(("plan",), ids[0, :9].tolist())
    model.add_adapter("reflect", lora())
    fill_adapter(model, "reflect", 2)
    model.eval()
    assert cache.coverage() == {"__base__": 8, "plan": 9, "act": 0, "reflect": 0}
    oracle.names = NAMES
    for name, stop in [("reflect", 11), (None, 11), ("plan", 13)]:
        expected = oracle.turn(agent_of(name), ids[0, :stop].tolist())
        assert_equal_logits(take_turn(model, cache, name, ids[:, :stop])[-len(expected) :], expected)


def test_a_change_without_k_and_v_is_noticed():
    configs = {"plan": lora(), "act": lora(target_modules=["o_proj"])}
    model = with_adapters(tiny_llama(), configs)
    cache, ids = SharedLoRACache(private_layers=[1]), tokens(9)
    take_turn(model, cache, "plan", ids[:, :5])
    take_turn(model, cache, "act", ids[:, :5])
    assert cache.coverage() == {"__base__": 0, "plan": 5, "act": 5}
    fill_adapter(model, "act", 7)
    assert cache.coverage() == {"__base__": 0, "plan": 5, "act": 0}


# ---- what a layer that is not split can do besides -----------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(use_dora=True), dict(lora_bias=True), dict(use_rslora=True)], ids=str)
def test_settings_of_adapters_with_all_layers_private(settings):
    model = with_adapters(tiny_llama(), {"plan": lora(**settings), "act": lora()})
    own, cache, ids = OwnCaches(model), SharedLoRACache(private_layers=ALL), tokens(16)
    for name, stop in [("plan", 5), ("act", 7), ("plan", 10), ("plan", 11), ("plan", 12), ("act", 16)]:
        expected = own.turn(name, ids[:, :stop])[0]
        actual = take_turn(model, cache, name, ids[:, :stop])
        assert_equal_logits(actual, expected[-actual.shape[0] :])


def test_dora_needs_all_its_layers_private():
    def model():
        return with_adapters(tiny_llama(), {"plan": lora(use_dora=True, layers_to_transform=[1]), "act": lora()})

    attached, ids = model(), tokens(8)
    with pytest.raises(UnsupportedAdapterError, match="layers.1.self_attn.k_proj: adapter 'plan' uses DoRA"):
        take_turn(attached, SharedLoRACache(private_layers=[0, 2]), "plan", ids)
    own = OwnCaches(model())
    expected = own.turn("plan", ids)[0]
    assert_equal_logits(take_turn(attached, SharedLoRACache(private_layers=[1]), "plan", ids), expected)
    # And again with a cache that would have to split it.
    with pytest.raises(UnsupportedAdapterError, match="uses DoRA"):
        take_turn(attached, SharedLoRACache(sharing="base_shared"), "plan", ids)


def test_keys_that_the_model_normalises():
    """RMS norms are split on layers that are not private, and are PEFT's own on those that are."""
    model = finish(Qwen3ForCausalLM(Qwen3Config(**SHAPE)), torch.float64)
    model = with_adapters(model, NAMES)
    own, ids = OwnCaches(model), tokens(16)
    expected = own.turn("plan", ids)[0]
    for private in ([], [1], [0, 2], ALL):
        cache = SharedLoRACache(private_layers=private)
        parts = [take_turn(model, cache, "plan", ids[:, :stop]) for stop in (9, 10, 11, 16)]
        assert_equal_logits(torch.cat([part[-n:] for part, n in zip(parts, (9, 1, 1, 5), strict=True)]), expected)


def test_norms_of_keys_that_can_not_be_split():
    """LayerNorms after the rotation: private layers do without a split."""
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    model = NanoChatForCausalLM(NanoChatConfig(**shape))
    for layer in model.model.layers:
        layer.self_attn.k_norm = torch.nn.LayerNorm(8)
    model = finish(model, torch.float64)
    model = with_adapters(model, NAMES)
    own, ids = OwnCaches(model), tokens(16)
    with pytest.raises(UnsupportedModelError, match=r"layers.1.*NanoChatAttention"):
        take_turn(model, SharedLoRACache(private_layers=[0, 2]), "plan", ids)
    cache = SharedLoRACache(private_layers=ALL)
    for name, stop in [("plan", 5), ("act", 9), (None, 9), ("plan", 16)]:
        expected = own.turn(name, ids[:, :stop])[0]
        actual = take_turn(model, cache, name, ids[:, :stop])
        assert_equal_logits(actual, expected[-actual.shape[0] :])


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[-1], [True], ["8"], "8-21", [1.0], 8, [0, None]], ids=str)
def test_what_is_no_index_is_refused(layers):
    with pytest.raises(SharedCacheError, match=r"private_layers .* expected indices .* range\(8, 22\)"):
        SharedLoRACache(private_layers=layers)


@pytest.mark.parametrize("sharing", ["base_lr_shared", "lr_precomputed"])
def test_policies_without_own_runs_are_refused(sharing):
    with pytest.raises(SharedCacheError, match=f"sharing is '{sharing}' with private_layers, expected 'base_shared'"):
        SharedLoRACache(sharing=sharing, private_layers=[1])
    assert SharedLoRACache(sharing=sharing, private_layers=range(0)).private_layers == ()


def test_layers_that_the_model_does_not_have_are_refused_at_first_use():
    model = agents_model()
    cache, ids = SharedLoRACache(private_layers=range(2, 5)), tokens(6)
    for run in (
        lambda: take_turn(model, cache, "plan", ids),
        lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache),
        lambda: SharedLoRACache(attach(model), private_layers=[3]),
    ):
        with pytest.raises(
            SharedCacheError, match="private_layers has 3, but LlamaForCausalLM has the attention layers 0 to 2"
        ):
            run()
    assert cache.trajectory_length == 0
    take_turn(model, SharedLoRACache(private_layers=(2, 0, 2)), "plan", ids)


def test_a_layer_that_does_not_dispatch_its_attention_is_refused(monkeypatch):
    model = agents_model()
    attention = type(model.get_base_model().model.layers[1].self_attn)
    original = attention.forward

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        if self.layer_idx != 1 or past_key_values is None:
            return original(self, hidden_states, past_key_values=past_key_values, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projected = (self.k_proj(hidden_states), self.v_proj(hidden_states))
        past_key_values.update(*(x.view(shape).transpose(1, 2) for x in projected), 1)
        return hidden_states, None

    monkeypatch.setattr(attention, "forward", forward)
    cache = SharedLoRACache(private_layers=[1])
    with pytest.raises(UnsupportedModelError, match="layers.1.*attention interface"):
        take_turn(model, cache, "plan", tokens(6))
    assert cache.trajectory_length == 0 and cache.coverage()["plan"] == 0
