"""Different adapters on one trajectory: every policy computes what its definition says, and runs again what it must."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from lora_shared_cache import SharedLoRACache, UnsupportedAdapterError

from .oracle import LlamaOracle
from .tiny import (
    EXACT,
    TokenCounter,
    activate,
    assert_equal_logits,
    difference,
    feed,
    fill_adapter,
    logits,
    lora,
    lora_layers,
    reference,
    share_a,
    tiny_llama,
    tokens,
    twin,
    with_adapters,
)

pytestmark = [
    pytest.mark.integration,
    # Rank patterns that match nothing where a test adapts a few projections only.
    pytest.mark.filterwarnings("ignore:.*pattern keys did not match:RuntimeWarning"),
]

NAMES = ["plan", "act", "reflect"]
POLICIES = ["base_shared", "lr_precomputed", "base_lr_shared"]
# Who speaks, and how long the trajectory is afterwards.
TURNS = [("plan", 5), ("act", 8), ("reflect", 12), ("plan", 15), (None, 17), ("act", 20), ("plan", 20)]


def agents_model(shared: bool = True, **settings):
    model = with_adapters(tiny_llama(**settings), NAMES)
    if shared:
        share_a(model, NAMES)
    return model


def agent_of(name) -> tuple[str, ...]:
    return () if name is None else tuple(sorted([name] if isinstance(name, str) else name))


def take_turn(model, cache, name, ids):
    """The logits of what the agent ran, given the whole trajectory."""
    activate(model, name)
    mask = torch.ones(1, ids.shape[1], dtype=torch.long)
    return logits(model, ids, cache, attention_mask=mask)[0]


def turn_by_turn(model, cache, oracle, turns, ids):
    counter = TokenCounter(model)
    for name, stop in turns:
        expected = oracle.turn(agent_of(name), ids[0, :stop].tolist())
        actual = take_turn(model, cache, name, ids[:, :stop])
        assert counter.take() == [len(expected)], "tokens that were run"
        assert_equal_logits(actual[-len(expected) :], expected)
        assert cache.trajectory_length == len(oracle.ids)
        covered = cache.coverage()
        for other in [*NAMES, None]:
            assert covered[other or "__base__"] == oracle.coverage(agent_of(other)), other
    counter.handle.remove()


def test_the_oracle_itself_agrees_with_peft():
    model = agents_model()
    ids = tokens(12)
    for name in [*NAMES, None]:
        activate(model, name)
        expected = reference(model, ids)[0]
        for sharing in POLICIES:
            oracle = LlamaOracle(model, sharing, NAMES)
            first = oracle.turn(agent_of(name), ids[0, :7].tolist())
            second = oracle.turn(agent_of(name), ids[0].tolist())
            assert_equal_logits(torch.cat((first, second)), expected)


def test_policies_differ_from_each_other_and_from_both_bounds():
    model = agents_model()
    ids = tokens(20)
    last = {}
    for sharing in POLICIES:
        oracle = LlamaOracle(twin(model), sharing, NAMES)
        for name, stop in TURNS[:4]:
            last[sharing] = oracle.turn(agent_of(name), ids[0, :stop].tolist())[-1]
    plain = twin(model)
    activate(plain, "plan")
    last["non-shared"] = reference(plain, ids[:, :15])[0, -1]
    dynamic = DynamicCache(config=plain.config)
    start = 0
    for name, stop in TURNS[:4]:
        activate(plain, name)
        last["fully shared"] = logits(plain, ids[:, start:stop], dynamic)[0, -1]
        start = stop
    names = sorted(last)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if {one, other} == {"lr_precomputed", "base_lr_shared"}:
                # With equal A's they store the same numbers: who processes a token computes A x of its own states.
                assert difference(last[one], last[other]) < EXACT
            else:
                assert difference(last[one], last[other]) > 1e-3, (one, other)


@pytest.mark.parametrize(
    ("sharing", "shared"),
    [(policy, True) for policy in POLICIES] + [("base_shared", False), ("lr_precomputed", False)],
)
def test_three_agents_on_one_trajectory(sharing, shared):
    model = agents_model(shared)
    turn_by_turn(model, SharedLoRACache(sharing=sharing), LlamaOracle(twin(model), sharing, NAMES), TURNS, tokens(20))


@pytest.mark.parametrize("sharing", POLICIES)
def test_agents_that_come_early_late_or_never(sharing):
    model = agents_model()
    turns = [(None, 4), ("reflect", 4), ("plan", 5), ("plan", 5), ("plan", 9), (None, 12), ("act", 13), ("reflect", 13)]
    turn_by_turn(model, SharedLoRACache(sharing=sharing), LlamaOracle(twin(model), sharing, NAMES), turns, tokens(20))


@pytest.mark.parametrize("sharing", POLICIES)
def test_combinations_of_adapters_are_agents_of_their_own(sharing):
    model = agents_model()
    turns = [("plan", 5), (["plan", "act"], 8), ("act", 10), (["plan", "act"], 13), (None, 14), (["act", "plan"], 14)]
    turn_by_turn(model, SharedLoRACache(sharing=sharing), LlamaOracle(twin(model), sharing, NAMES), turns, tokens(20))


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_adapters_on_different_projections_and_layers(sharing):
    configs = {
        "plan": lora(target_modules=["k_proj", "q_proj"]),
        "act": lora(target_modules=["v_proj", "down_proj"], layers_to_transform=[1, 2]),
        "reflect": lora(target_modules=["o_proj", "up_proj"]),
    }
    model = with_adapters(tiny_llama(), configs)
    oracle = LlamaOracle(twin(model), sharing, NAMES)
    # "reflect" changes neither keys nor values: there is nothing that it would have to run again.
    oracle.coverage = lambda agent, ask=oracle.coverage: ask(tuple(a for a in agent if a != "reflect"))
    turn_by_turn(model, SharedLoRACache(sharing=sharing), oracle, TURNS, tokens(20))


@pytest.mark.parametrize("sharing", POLICIES)
def test_new_tokens_alone_are_enough(sharing):
    """Without a mask or ids of what is cached, the cache runs again by itself what the agent has not seen."""
    model = agents_model()
    oracle = LlamaOracle(twin(model), sharing, NAMES)
    cache, ids = SharedLoRACache(sharing=sharing), tokens(20)
    start = 0
    for name, stop in [("plan", 5), ("act", 8), ("reflect", 9), ("plan", 15)]:
        expected = oracle.turn(agent_of(name), ids[0, :stop].tolist())
        activate(model, name)
        mask = torch.ones(1, stop, dtype=torch.long)
        actual = logits(model, ids[:, start:stop], cache, attention_mask=mask)[0]
        assert_equal_logits(actual[start - stop :], expected[start - stop :])
        start = stop


@pytest.mark.parametrize("sharing", POLICIES)
def test_generated_turns(sharing):
    model = agents_model()
    oracle = LlamaOracle(twin(model), sharing, NAMES)
    cache, ids = SharedLoRACache(sharing=sharing), tokens(6)
    for name in ("plan", "act", None, "plan", "reflect"):
        activate(model, name)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for step in range(4):
            known = ids.shape[1] + step
            expected = oracle.turn(agent_of(name), out.sequences[0, :known].tolist())
            # generate hands out float32.
            assert_equal_logits(out.logits[step][0], expected[-1].float(), 1e-5)
        ids = out.sequences


@pytest.mark.parametrize(
    ("shared", "policy"), [(True, "base_lr_shared"), (False, "base_shared")], ids=["equal_a", "different_a"]
)
def test_auto_shares_entries_where_all_have_the_same_a(shared, policy):
    model = agents_model(shared)
    cache = SharedLoRACache()
    assert cache.policy is None
    turn_by_turn(model, cache, LlamaOracle(twin(model), policy, NAMES), TURNS, tokens(20))
    assert cache.policy == policy


def test_auto_is_base_shared_where_one_a_differs_in_one_place():
    model = agents_model()
    modules = dict(lora_layers(model))
    path = next(p for p in modules if p.endswith("layers.2.self_attn.v_proj"))
    with torch.no_grad():
        modules[path].lora_A["act"].weight[0, 0] += 1e-3
    cache = SharedLoRACache()
    turn_by_turn(model, cache, LlamaOracle(twin(model), "base_shared", NAMES), TURNS[:4], tokens(20))
    assert cache.policy == "base_shared"


def test_base_lr_shared_refuses_different_as_by_layer_and_adapters():
    model = agents_model()
    modules = dict(lora_layers(model))
    path = next(p for p in modules if p.endswith("layers.1.self_attn.v_proj"))
    with torch.no_grad():
        modules[path].lora_A["act"].weight[0, 0] += 1e-3
    cache = SharedLoRACache(sharing="base_lr_shared")
    with pytest.raises(UnsupportedAdapterError) as error:
        take_turn(model, cache, "plan", tokens(5))
    for part in ("layers.1.self_attn.v_proj", "'act'", "base_shared", "lr_precomputed"):
        assert part in str(error.value)
    assert cache.trajectory_length == 0
    with torch.no_grad():
        modules[path].lora_A["act"].weight.copy_(modules[path].lora_A["plan"].weight)
    oracle = LlamaOracle(twin(model), "base_lr_shared", NAMES)
    turn_by_turn(model, cache, oracle, TURNS[:3], tokens(20))


def test_base_lr_shared_refuses_different_ranks():
    model = with_adapters(tiny_llama(), {"plan": lora(rank_pattern={}), "act": lora(r=2, rank_pattern={})})
    with pytest.raises(UnsupportedAdapterError, match="'act' and 'plan'"):
        take_turn(model, SharedLoRACache(sharing="base_lr_shared"), "plan", tokens(5))


@pytest.mark.parametrize("sharing", POLICIES)
def test_set_adapter_without_a_forward_pass_changes_nothing(sharing):
    model = agents_model()
    oracle = LlamaOracle(twin(model), sharing, NAMES)
    cache, ids = SharedLoRACache(sharing=sharing), tokens(20)
    for name, stop in TURNS:
        for other in ("reflect", None, "plan", ["act", "plan"], "act"):
            activate(model, other)
            cache.get_seq_length()
            cache.coverage()
        expected = oracle.turn(agent_of(name), ids[0, :stop].tolist())
        assert_equal_logits(take_turn(model, cache, name, ids[:, :stop])[-len(expected) :], expected)


@pytest.mark.parametrize("sharing", POLICIES)
def test_base_keys_and_values_are_never_rewritten(sharing):
    model = agents_model()
    cache, ids = SharedLoRACache(sharing=sharing), tokens(20)
    stored = None
    for name, stop in TURNS:
        take_turn(model, cache, name, ids[:, :stop])
        now = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        for before, after in zip(stored or [], now, strict=bool(stored)):
            for old, new in zip(before, after, strict=True):
                assert torch.equal(old, new[:, :, : old.shape[2]])
        stored = now


@pytest.mark.parametrize("sharing", POLICIES)
def test_get_seq_length_is_the_coverage_of_the_active_adapter(sharing):
    model = agents_model()
    cache, ids = SharedLoRACache(sharing=sharing), tokens(20)
    for name, stop in TURNS:
        take_turn(model, cache, name, ids[:, :stop])
        covered = cache.coverage()
        for other in [*NAMES, None]:
            activate(model, other)
            assert cache.get_seq_length() == covered[other or "__base__"]


def test_an_adapter_loaded_later_joins():
    for sharing in ("base_shared", "lr_precomputed", "auto"):
        model = with_adapters(tiny_llama(), ["plan", "act"])
        cache, ids = SharedLoRACache(sharing=sharing), tokens(20)
        take_turn(model, cache, "plan", ids[:, :6])
        model.add_adapter("reflect", lora())
        fill_adapter(model, "reflect", 2)
        model.eval()
        policy = cache.policy
        oracle = LlamaOracle(model, policy, ["plan", "act"])
        oracle.turn(("plan",), ids[0, :6].tolist())
        oracle.names = NAMES
        for name, stop in [("reflect", 9), ("act", 11), ("plan", 13), ("reflect", 15)]:
            expected = oracle.turn(agent_of(name), ids[0, :stop].tolist())
            assert_equal_logits(take_turn(model, cache, name, ids[:, :stop])[-len(expected) :], expected)
            assert cache.coverage()["reflect"] == oracle.coverage(("reflect",))


def test_an_adapter_loaded_later_with_the_common_a_reads_what_is_there():
    for sharing in ("base_lr_shared", "auto"):
        model = agents_model()
        model.delete_adapter("reflect")
        cache, ids = SharedLoRACache(sharing=sharing), tokens(20)
        take_turn(model, cache, "plan", ids[:, :6])
        model.add_adapter("reflect", lora())
        fill_adapter(model, "reflect", 2)
        share_a(model, NAMES)
        model.eval()
        oracle = LlamaOracle(model, "base_lr_shared", NAMES)
        oracle.turn(("plan",), ids[0, :6].tolist())
        for name, stop in [("reflect", 9), ("act", 11), ("plan", 13)]:
            expected = oracle.turn(agent_of(name), ids[0, :stop].tolist())
            assert_equal_logits(take_turn(model, cache, name, ids[:, :stop])[-len(expected) :], expected)


def test_auto_gives_a_newcomer_with_its_own_a_entries_of_its_own():
    model = agents_model()
    model.delete_adapter("reflect")
    cache, ids = SharedLoRACache(), tokens(20)
    take_turn(model, cache, "plan", ids[:, :6])
    assert cache.policy == "base_lr_shared"
    model.add_adapter("reflect", lora())
    fill_adapter(model, "reflect", 2)
    model.eval()
    # For the newcomer alone the definition is base_shared's; tokens that it appends are everybody's.
    common = LlamaOracle(model, "base_lr_shared", ["plan", "act"])
    common.turn(("plan",), ids[0, :6].tolist())
    take_turn(model, cache, "reflect", ids[:, :9])
    assert cache.coverage() == {"__base__": 9, "plan": 9, "act": 9, "reflect": 9}
    take_turn(model, cache, "act", ids[:, :11])
    assert cache.coverage() == {"__base__": 11, "plan": 11, "act": 11, "reflect": 9}


def test_auto_decided_with_one_adapter_and_more_later():
    """With one adapter loaded there is nothing to share; adapters that come later do not change the policy."""
    model = with_adapters(tiny_llama(), ["plan"])
    cache, ids = SharedLoRACache(), tokens(20)
    feed(model, ids[:, :5], cache, [5])
    assert cache.policy == "base_shared"
    model.add_adapter("act", lora())
    fill_adapter(model, "act", 1)
    share_a(model, ["plan", "act"])
    model.eval()
    oracle = LlamaOracle(model, "base_shared", ["plan", "act"])
    oracle.turn(("plan",), ids[0, :5].tolist())
    for name, stop in [("act", 9), ("plan", 12)]:
        expected = oracle.turn(agent_of(name), ids[0, :stop].tolist())
        assert_equal_logits(take_turn(model, cache, name, ids[:, :stop])[-len(expected) :], expected)


def test_an_adapter_may_have_any_name():
    """Entries that adapters share have a key of their own, which is no adapter's."""
    outs = []
    for name in ("late", "*", "shared"):
        model = with_adapters(tiny_llama(), ["plan", "act"])
        share_a(model, ["plan", "act"])
        cache, ids = SharedLoRACache(), tokens(12)
        logits(model, ids[:, :5], cache)
        model.add_adapter(name, lora())
        fill_adapter(model, name, 9)
        turns = []
        for agent, stop in ((name, 8), ("act", 12)):
            activate(model, agent)
            turns.append(
                logits(model, ids[:, :stop], cache, attention_mask=torch.ones(1, stop, dtype=torch.long))[:, -1]
            )
        assert cache.coverage() == {"__base__": 12, "plan": 12, "act": 12, name: 8}
        outs.append(torch.cat(turns))
    assert_equal_logits(outs[1], outs[0])
    assert_equal_logits(outs[2], outs[0])
