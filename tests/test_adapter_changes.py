"""An adapter whose content changes after it filled its entries: what it processed is dropped, and never used."""

from __future__ import annotations

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter

from lora_shared_cache import SharedLoRACache

from .oracle import LlamaOracle
from .tiny import (
    EXACT,
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
    with_adapters,
)

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

NAMES = ["plan", "act"]
POLICIES = ["base_shared", "lr_precomputed", "base_lr_shared", "auto"]


def agents_model():
    model = with_adapters(tiny_llama(), NAMES)
    share_a(model, NAMES)
    return model


def take_turn(model, cache, name, ids):
    activate(model, name)
    return logits(model, ids, cache, attention_mask=torch.ones(1, ids.shape[1]))[0]


def agent_of(name):
    return () if name is None else (name,)


# ---- how content can change; each keeps A on k/v, so that base_lr_shared stays possible ----


def train(model, tmp_path):
    model.train()
    trained = [p for n, p in model.named_parameters() if "lora_B.act" in n]
    for p in trained:
        p.requires_grad_(True)
    optimiser = torch.optim.SGD(trained, lr=0.5)
    activate(model, "act")
    loss = model(input_ids=tokens(9, seed=5), labels=tokens(9, seed=5)).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    model.eval()


def copy_in_place(model, tmp_path):
    with torch.no_grad():
        for _, module in lora_layers(model):
            module.lora_B["act"].weight.copy_(module.lora_B["act"].weight * 1.5)


def copy_through_data(model, tmp_path):
    for _, module in lora_layers(model):
        module.lora_B["act"].weight.data.copy_(module.lora_B["act"].weight.data * 1.5)


def one_number_through_data(model, tmp_path):
    path, module = next((p, m) for p, m in lora_layers(model) if p.endswith("layers.1.self_attn.v_proj"))
    module.lora_B["act"].weight.data[0, 0] += 1.0


def two_numbers_exchanged(model, tmp_path):
    """A sum over the content would not notice."""
    path, module = next((p, m) for p, m in lora_layers(model) if p.endswith("layers.1.self_attn.k_proj"))
    weight = module.lora_B["act"].weight.data
    first, second = weight[0, 0].item(), weight[0, 1].item()
    weight[0, 0], weight[0, 1] = second, first


def sign_of_two_rows(model, tmp_path):
    path, module = next((p, m) for p, m in lora_layers(model) if p.endswith("layers.0.mlp.down_proj"))
    module.lora_B["act"].weight.data[:2] *= -1


def rescale(model, tmp_path):
    for _, module in lora_layers(model):
        module.scaling["act"] *= 2


def hotswap(model, tmp_path):
    other = with_adapters(tiny_llama(), {"act": lora()}, seed=40)
    with torch.no_grad():
        theirs = dict(lora_layers(other))
        for path, module in lora_layers(model):
            if path.split(".")[-1] in ("k_proj", "v_proj"):
                theirs[path].lora_A["act"].weight.copy_(module.lora_A["act"].weight)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, str(tmp_path / "act"), "act")


def load_state(model, tmp_path):
    state = {k: v * 1.5 if "lora_B.act" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def delete_and_add_again(model, tmp_path):
    down = {path: module.lora_A["plan"].weight.clone() for path, module in lora_layers(model)}
    model.delete_adapter("act")
    model.add_adapter("act", lora())
    fill_adapter(model, "act", 77)
    with torch.no_grad():
        for path, module in lora_layers(model):
            if path.split(".")[-1] in ("k_proj", "v_proj"):
                module.lora_A["act"].weight.copy_(down[path])
    model.eval()


def parameters_replaced(model, tmp_path):
    for _, module in lora_layers(model):
        module.lora_B["act"].weight = torch.nn.Parameter(module.lora_B["act"].weight.detach() * 1.5)


CHANGES = [
    train,
    copy_in_place,
    copy_through_data,
    one_number_through_data,
    two_numbers_exchanged,
    sign_of_two_rows,
    rescale,
    hotswap,
    load_state,
    delete_and_add_again,
    parameters_replaced,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_each_change_matters(change, tmp_path):
    model = agents_model()
    activate(model, "act")
    before = reference(model, tokens(14))
    change(model, tmp_path)
    activate(model, "act")
    assert difference(before, reference(model, tokens(14))) > 1e-5


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sharing", POLICIES)
def test_what_a_changed_adapter_processed_is_dropped(sharing, change, tmp_path):
    model = agents_model()
    policy = "base_lr_shared" if sharing == "auto" else sharing
    cache, ids = SharedLoRACache(sharing=sharing), tokens(20)
    for name, stop in [("plan", 5), ("act", 9), ("plan", 12)]:
        take_turn(model, cache, name, ids[:, :stop])
    change(model, tmp_path)
    # Tokens from "act"'s first on are those of weights that no longer exist; "plan"'s own before them stay.
    activate(model, "act")
    own = 5 if policy == "base_lr_shared" or sharing == "lr_precomputed" else 0
    if sharing == "lr_precomputed":
        own = 0
    assert cache.coverage() == {"__base__": 5, "plan": 5, "act": own}
    assert cache.trajectory_length == 5
    assert cache.get_seq_length() == own
    # A trajectory that never had them, computed with the weights as they are now.
    oracle = LlamaOracle(model, policy, NAMES)
    oracle.turn(("plan",), ids[0, :5].tolist())
    oracle.forget("act")
    for name, stop in [("act", 9), ("plan", 12), ("act", 15), (None, 16), ("plan", 18)]:
        expected = oracle.turn(agent_of(name), ids[0, :stop].tolist())
        assert_equal_logits(take_turn(model, cache, name, ids[:, :stop])[-len(expected) :], expected)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("how", ["forward", "generate", "new_tokens"])
def test_a_change_is_noticed_without_asking_the_cache_first(how, change, tmp_path):
    """The next call is the turn of the changed adapter itself, or of another one that reads its tokens."""
    for speaker in ("act", "plan"):
        model = agents_model()
        cache, ids = SharedLoRACache(sharing="base_shared"), tokens(20)
        for name, stop in [("plan", 5), ("act", 9)]:
            take_turn(model, cache, name, ids[:, :stop])
        change(model, tmp_path / speaker)
        oracle = LlamaOracle(model, "base_shared", NAMES)
        oracle.turn(("plan",), ids[0, :5].tolist())
        oracle.forget("act")
        expected = oracle.turn((speaker,), ids[0, :12].tolist())
        activate(model, speaker)
        mask = torch.ones(1, 12, dtype=torch.long)
        if how == "forward":
            actual = logits(model, ids[:, :12], cache, attention_mask=mask)[0]
        elif how == "generate":
            out = model.generate(
                input_ids=ids[:, :12],
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
            # generate hands out float32.
            assert_equal_logits(out.logits[0][0], expected[-1].float(), 1e-5)
            continue
        else:
            actual = logits(model, ids[:, 9:12], cache, attention_mask=mask)[0]
        n = min(len(expected), len(actual))
        assert_equal_logits(actual[-n:], expected[-n:])


def test_training_between_two_decode_steps_is_noticed():
    """One token at a time, the cheap check has to see what an optimiser step does."""
    model = agents_model()
    cache, ids = SharedLoRACache(sharing="base_shared"), tokens(20)
    take_turn(model, cache, "plan", ids[:, :5])
    take_turn(model, cache, "act", ids[:, :9])
    copy_in_place(model, None)
    oracle = LlamaOracle(model, "base_shared", NAMES)
    oracle.turn(("plan",), ids[0, :5].tolist())
    oracle.forget("act")
    expected = oracle.turn(("act",), ids[0, :10].tolist())
    actual = logits(model, ids[:, 9:10], cache)[0]
    assert_equal_logits(actual[-1], expected[-1])


@pytest.mark.parametrize(
    "change", [hotswap, rescale, delete_and_add_again, parameters_replaced, load_state], ids=lambda f: f.__name__
)
def test_other_tensors_or_another_scaling_are_noticed_by_a_single_new_token(change, tmp_path):
    """A decode step has no time for a content checksum, but other tensors and numbers show without one."""
    model = agents_model()
    cache, ids = SharedLoRACache(sharing="base_shared"), tokens(20)
    take_turn(model, cache, "plan", ids[:, :5])
    take_turn(model, cache, "act", ids[:, :9])
    change(model, tmp_path)
    activate(model, "act")
    oracle = LlamaOracle(model, "base_shared", NAMES)
    oracle.turn(("plan",), ids[0, :5].tolist())
    oracle.forget("act")
    expected = oracle.turn(("act",), ids[0, :10].tolist())
    assert_equal_logits(logits(model, ids[:, 9:10], cache)[0, -1], expected[-1])


@pytest.mark.parametrize("change", [copy_in_place, copy_through_data, hotswap], ids=lambda f: f.__name__)
def test_a_change_of_an_adapter_that_never_ran_costs_nobody_anything(change, tmp_path):
    for sharing in POLICIES:
        model = agents_model()
        policy = "base_lr_shared" if sharing == "auto" else sharing
        cache, ids = SharedLoRACache(sharing=sharing), tokens(20)
        take_turn(model, cache, "plan", ids[:, :9])
        change(model, tmp_path / sharing)
        assert cache.trajectory_length == 9
        assert cache.coverage()["plan"] == 9
        oracle = LlamaOracle(model, policy, NAMES)
        oracle.turn(("plan",), ids[0, :9].tolist())
        if sharing == "lr_precomputed":
            # Its entries were computed with an A that may have changed.
            oracle.forget("act")
        for name, stop in [("plan", 10), ("act", 12)]:
            expected = oracle.turn(agent_of(name), ids[0, :stop].tolist())
            actual = take_turn(model, cache, name, ids[:, :stop])
            assert_equal_logits(actual[-1], expected[-1])


def test_a_change_of_the_common_a_is_refused_or_leaves_the_group():
    from lora_shared_cache import UnsupportedAdapterError

    def change_a(model):
        for path, module in lora_layers(model):
            if path.endswith(("k_proj", "v_proj")):
                module.lora_A["act"].weight.data *= 1.5

    ids = tokens(20)
    model = agents_model()
    cache = SharedLoRACache(sharing="base_lr_shared")
    take_turn(model, cache, "plan", ids[:, :5])
    change_a(model)
    with pytest.raises(UnsupportedAdapterError, match="'act' and 'plan' differ"):
        take_turn(model, cache, "plan", ids[:, :9])

    for speaker in ("act", "plan"):
        model = agents_model()
        cache = SharedLoRACache()
        take_turn(model, cache, "plan", ids[:, :5])
        change_a(model)
        oracle = LlamaOracle(model, "base_shared", NAMES)
        oracle.turn(("plan",), ids[0, :5].tolist())
        expected = oracle.turn((speaker,), ids[0, :9].tolist())
        assert_equal_logits(take_turn(model, cache, speaker, ids[:, :9])[-len(expected) :], expected)


@pytest.mark.parametrize("first", NAMES)
def test_a_change_of_the_a_of_the_one_that_stands_for_the_group(first):
    """Whichever adapter's A was read for the common entries: the other one goes on, the changed one starts anew."""
    other = NAMES[1 - NAMES.index(first)]
    model = agents_model()
    cache, ids = SharedLoRACache(), tokens(20)
    take_turn(model, cache, other, ids[:, :5])
    assert cache.policy == "base_lr_shared"
    for path, module in lora_layers(model):
        if path.endswith(("k_proj", "v_proj")):
            module.lora_A[first].weight.data *= 1.5
    oracle = LlamaOracle(model, "base_shared", NAMES)
    oracle.turn((other,), ids[0, :5].tolist())
    expected = oracle.turn((other,), ids[0, :9].tolist())
    assert_equal_logits(take_turn(model, cache, other, ids[:, :9])[-len(expected) :], expected)
    expected = oracle.turn((first,), ids[0, :11].tolist())
    assert_equal_logits(take_turn(model, cache, first, ids[:, :11])[-len(expected) :], expected)


@pytest.mark.parametrize("sharing", POLICIES)
def test_a_dropped_adapter_that_changes_is_noticed(sharing, tmp_path):
    """Its entries are gone; the base K/V of tokens that it processed are still those of its former weights."""
    model = agents_model()
    policy = "base_lr_shared" if sharing == "auto" else sharing
    cache, ids = SharedLoRACache(sharing=sharing), tokens(20)
    for name, stop in [("plan", 5), ("act", 9), ("plan", 12)]:
        take_turn(model, cache, name, ids[:, :stop])
    cache.drop_adapter("act")
    assert cache.trajectory_length == 12
    train(model, tmp_path)
    oracle = LlamaOracle(model, policy, NAMES)
    oracle.turn(("plan",), ids[0, :5].tolist())
    oracle.forget("act")
    for name, stop in [("plan", 14), ("act", 16)]:
        expected = oracle.turn(agent_of(name), ids[0, :stop].tolist())
        assert_equal_logits(take_turn(model, cache, name, ids[:, :stop])[-len(expected) :], expected)


@pytest.mark.parametrize("sharing", POLICIES)
def test_a_deleted_adapter_leaves_its_tokens_and_takes_its_entries(sharing):
    model = agents_model()
    policy = "base_lr_shared" if sharing == "auto" else sharing
    cache, ids = SharedLoRACache(sharing=sharing), tokens(20)
    oracle = LlamaOracle(model, policy, NAMES)
    for name, stop in [("plan", 5), ("act", 9)]:
        oracle.turn(agent_of(name), ids[0, :stop].tolist())
        take_turn(model, cache, name, ids[:, :stop])
    model.delete_adapter("act")
    # What "act" processed was right when it was processed, and its base part is the base model's.
    covered = cache.coverage()
    assert "act" not in covered
    assert "act" not in cache.memory_footprint()["low_rank"]
    assert cache.trajectory_length == 9
    oracle.names = ["plan"]
    for name, stop in [("plan", 12), (None, 13), ("plan", 15)]:
        expected = oracle.turn(agent_of(name), ids[0, :stop].tolist())
        assert_equal_logits(take_turn(model, cache, name, ids[:, :stop])[-len(expected) :], expected)


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_deleted_and_added_again_while_another_agent_went_on(sharing):
    model = agents_model()
    cache, ids = SharedLoRACache(sharing=sharing), tokens(20)
    oracle = LlamaOracle(model, sharing, NAMES)
    for name, stop in [("plan", 5), ("act", 9)]:
        oracle.turn(agent_of(name), ids[0, :stop].tolist())
        take_turn(model, cache, name, ids[:, :stop])
    model.delete_adapter("act")
    oracle.names, _ = ["plan"], oracle.forget("act")
    expected = oracle.turn(("plan",), ids[0, :12].tolist())
    assert_equal_logits(take_turn(model, cache, "plan", ids[:, :12])[-len(expected) :], expected)
    model.add_adapter("act", lora())
    fill_adapter(model, "act", 77)
    model.eval()
    oracle.names = NAMES
    assert cache.coverage()["act"] == 0
    for name, stop in [("act", 14), ("plan", 15)]:
        expected = oracle.turn(agent_of(name), ids[0, :stop].tolist())
        assert_equal_logits(take_turn(model, cache, name, ids[:, :stop])[-len(expected) :], expected)


def test_a_change_of_one_adapter_of_a_combination():
    model = agents_model()
    cache, ids = SharedLoRACache(sharing="base_shared"), tokens(20)
    activate(model, "plan")
    logits(model, ids[:, :4], cache)
    activate(model, NAMES)
    logits(model, ids[:, :9], cache, attention_mask=torch.ones(1, 9))
    copy_through_data(model, None)
    assert cache.coverage() == {"__base__": 4, "plan": 4, "act": 0}
    oracle = LlamaOracle(model, "base_shared", NAMES)
    oracle.turn(("plan",), ids[0, :4].tolist())
    expected = oracle.turn(("act", "plan"), ids[0, :9].tolist())
    actual = logits(model, ids[:, :9], cache, attention_mask=torch.ones(1, 9))[0]
    assert_equal_logits(actual[-len(expected) :], expected)


def test_set_scale_and_unscale_are_noticed():
    model = agents_model()
    cache, ids = SharedLoRACache(sharing="base_shared"), tokens(20)
    take_turn(model, cache, "act", ids[:, :5])
    for _, module in lora_layers(model):
        module.scale_layer(0.5)
    assert cache.trajectory_length == 5 and cache.coverage()["act"] == 0
    expected = reference_of_fresh(model, "act", ids[:, :9])
    assert_equal_logits(take_turn(model, cache, "act", ids[:, :9]), expected)


def reference_of_fresh(model, name, ids):
    activate(model, name)
    return reference(model, ids)[0]


def test_a_training_step_with_the_cache_attached_does_not_need_the_cache():
    """The same content after all: nothing is dropped."""
    model = agents_model()
    cache, ids = SharedLoRACache(sharing="base_shared"), tokens(20)
    take_turn(model, cache, "act", ids[:, :5])
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        for _, module in lora_layers(model):
            module.lora_B["act"].weight.add_(0)
    assert cache.coverage()["act"] == 5
    expected = reference_of_fresh(model, "act", ids[:, :9])
    assert_equal_logits(take_turn(model, cache, "act", ids[:, :9])[-4:], expected[-4:])


def test_the_first_adapter_on_keys_comes_after_tokens_that_needed_no_rotation():
    """Before it, nobody stored cos/sin; the base model then goes on, and the newcomer runs everything."""

    def run(late: bool) -> torch.Tensor:
        model = with_adapters(
            tiny_llama(), {"first": lora(target_modules=["v_proj"], rank_pattern={}, alpha_pattern={})}
        )

        def load():
            model.add_adapter("second", lora())
            fill_adapter(model, "second", 3)

        if not late:
            load()
        cache = SharedLoRACache()
        ids = tokens(14)
        with torch.no_grad():
            with model.disable_adapter():
                model(ids[:, :8], past_key_values=cache)
            if late:
                load()
            with model.disable_adapter():
                model(ids[:, 8:9], past_key_values=cache)
                model(ids[:, 9:11], past_key_values=cache)
            model.set_adapter("second")
            return model(ids, past_key_values=cache).logits

    torch.testing.assert_close(run(late=True), run(late=False), rtol=0, atol=EXACT)


def test_an_adapter_that_is_added_again_on_other_layers():
    model = with_adapters(tiny_llama(), {"act": lora(), "plan": lora(target_modules=["q_proj"])})
    cache, ids = SharedLoRACache(), tokens(9)
    take_turn(model, cache, "plan", ids[:, :5])
    model.delete_adapter("plan")
    model.add_adapter("plan", lora())
    fill_adapter(model, "plan", 7)
    out = take_turn(model, cache, "plan", ids)
    # The same names, the same modules on keys and values: what it processed is dropped all the same.
    assert_equal_logits(out, reference(model, ids)[0])


@pytest.mark.parametrize("sharing", ["base_shared", "base_lr_shared", "lr_precomputed"])
def test_the_whole_text_to_an_adapter_that_was_loaded_since(sharing):
    """Without a mask tokens begin at the coverage, which for a newcomer is 0, as ``get_seq_length`` says."""
    model, asked = (with_adapters(tiny_llama(), ["plan"]) for _ in range(2))
    ids, outs = tokens(9), []
    for m in (model, asked):
        cache = SharedLoRACache(sharing=sharing)
        logits(m, ids[:, :6], cache)
        m.add_adapter("act", lora())
        fill_adapter(m, "act", 7)
        share_a(m, NAMES)
        m.set_adapter("act")
        covered = cache.get_seq_length() if m is asked else 6 * (sharing == "base_lr_shared")
        outs.append(logits(m, ids[:, covered:], cache))
        assert cache.trajectory_length == 9
    assert_equal_logits(*outs)


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ["k_proj", "v_proj"]], ids="+".join)
@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_adapters_that_are_unloaded_or_merged(how, targets):
    """With the old cache and a new one: the base model goes on, or the trajectory starts over on the changed base weights."""
    configs = dict.fromkeys(NAMES, lora(target_modules=targets, rank_pattern={}, alpha_pattern={}))
    plain = with_adapters(tiny_llama(), configs)
    old = SharedLoRACache()
    for one, cache in [(plain, SharedLoRACache()), (with_adapters(tiny_llama(), configs), old)]:
        feed(one, tokens(9), cache, [7, 1, 1])
        if one is plain:
            activate(plain, None)
            expected = feed(plain, tokens(3, seed=1), cache, [1, 1, 1])
    model = getattr(one, how)()
    alone = reference(model, tokens(9))
    if how == "unload":
        assert_equal_logits(feed(model, tokens(3, seed=1), old, [1, 1, 1]), expected)
    else:
        assert_equal_logits(feed(model, tokens(9), SharedLoRACache(), [7, 1, 1]), alone)
        assert difference(alone, reference(plain, tokens(9))) > 0.01
        assert_equal_logits(logits(model, tokens(9), old, attention_mask=torch.ones(1, 9)), alone)
    assert_equal_logits(feed(model, tokens(9), SharedLoRACache(), [7, 1, 1]), alone)


@pytest.mark.parametrize("empties", ["change", "crop"])
def test_single_tokens_on_an_emptied_cache_are_written_for_known_content(empties):
    """A prompt of one token is checked like any other: what it writes for other adapters belongs to their present content."""
    model = with_adapters(tiny_llama(), NAMES)
    cache = SharedLoRACache(sharing="lr_precomputed")
    ids = torch.tensor([[5, 6, 7, 8]])
    first, last = NAMES[0], NAMES[-1]
    model.set_adapter(last)
    logits(model, ids, cache)
    model.set_adapter(first)
    logits(model, torch.cat((ids, ids[:, :1]), dim=1), cache)
    if empties == "crop":
        cache.crop(-5)
    fill_adapter(model, last, seed=91)
    assert cache.coverage()[last] == 0
    if empties == "change":
        assert cache.trajectory_length == 0  # the changed adapter had processed all of it
    logits(model, ids[:, :1], cache)
    assert cache.coverage()[last] == 1
    fill_adapter(model, last, seed=92)
    assert cache.coverage()[last] == 0  # what was written belongs to weights that are gone


def test_generate_on_an_emptied_cache_writes_for_known_content():
    """Weights that were changed while it was empty, and changed back after it: what was written in between is not theirs."""
    model = with_adapters(tiny_llama(), NAMES)
    cache, ids = SharedLoRACache(sharing="lr_precomputed"), tokens(6)
    first, last = NAMES[0], NAMES[-1]
    model.set_adapter(first)

    def write():
        return model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False, pad_token_id=0)

    write()
    cache.crop(-cache.trajectory_length)
    before = {path: parameter.clone() for path, parameter in model.named_parameters() if f".{last}." in path}
    fill_adapter(model, last, seed=91)
    write()
    assert cache.coverage()[last] == cache.trajectory_length == 7
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path in before:
                parameter.copy_(before[path])
    assert cache.coverage()[last] == 0
