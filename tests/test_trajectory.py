"""The recorded trajectory: what is compared, what is refused, and that going back leaves no trace."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache

from lora_shared_cache import SharedLoRACache, TrajectoryError

from .oracle import LlamaOracle
from .tiny import (
    TokenCounter,
    activate,
    agents_model,
    assert_equal_logits,
    copy_adapter,
    difference,
    feed,
    finish,
    logits,
    lora,
    ones,
    reference,
    share_a,
    tiny_llama,
    tokens,
    twin,
    with_adapters,
)

pytestmark = pytest.mark.integration

NAMES = ["plan", "act"]
POLICIES = ["base_shared", "lr_precomputed", "base_lr_shared"]


def take_turn(model, cache, name, ids):
    activate(model, name)
    return logits(model, ids, cache, attention_mask=ones(ids.shape[1]))[0]


# ---- what is recorded ----


def test_token_ids_are_those_that_the_model_was_given():
    model = agents_model()
    cache = SharedLoRACache()
    assert cache.token_ids is None and cache.trajectory_length == 0 and cache.rows == 0
    ids = tokens(9, rows=2)
    feed(model, ids, cache, [4, 1, 4])
    assert torch.equal(cache.token_ids, ids) and cache.rows == 2
    take_turn(model, cache, "act", ids)
    assert torch.equal(cache.token_ids, ids)


def test_tokens_given_as_embeddings_are_unknown_and_equal_to_anything():
    model = agents_model()
    expected = reference(twin(model), tokens(9))
    embeddings = model.get_input_embeddings()(tokens(9)).detach()
    cache = SharedLoRACache()
    with torch.no_grad():
        first = model(inputs_embeds=embeddings[:, :4], past_key_values=cache).logits
        second = model(inputs_embeds=embeddings[:, 4:6], past_key_values=cache).logits
    assert cache.token_ids.tolist() == [[-1] * 6]
    third = logits(model, tokens(9), cache, attention_mask=ones(9))
    assert_equal_logits(torch.cat((first, second, third[:, -3:]), dim=1), expected)
    assert cache.token_ids.tolist() == [[-1] * 6 + tokens(9)[0, 6:].tolist()]


def test_embeddings_that_an_agent_has_not_seen_can_not_be_run_again_by_the_cache():
    model = agents_model()
    cache = SharedLoRACache(sharing="base_shared")
    embeddings = model.get_input_embeddings()(tokens(9)).detach()
    activate(model, "plan")
    with torch.no_grad():
        model(inputs_embeds=embeddings[:, :6], past_key_values=cache)
    oracle = LlamaOracle(model, "base_shared", NAMES)
    oracle.turn(("plan",), tokens(9)[0, :6].tolist())
    activate(model, "act")
    with pytest.raises(TrajectoryError, match="only as embeddings"):
        logits(model, tokens(9)[:, 6:], cache, attention_mask=ones(9))
    assert cache.coverage() == {"__base__": 6, "plan": 6, "act": 0}
    with torch.no_grad():
        out = model(inputs_embeds=embeddings, past_key_values=cache, attention_mask=ones(9)).logits[0]
    assert_equal_logits(out, oracle.turn(("act",), tokens(9)[0].tolist()))


# ---- contradictions ----


@pytest.mark.parametrize("position", [0, 2, 5])
@pytest.mark.parametrize("row", [0, 1])
def test_a_contradiction_is_refused_with_position_tokens_and_remedy(position, row):
    model = agents_model()
    ids = tokens(9, rows=2)
    cache, undisturbed = SharedLoRACache(), SharedLoRACache()
    for c in (cache, undisturbed):
        logits(model, ids[:, :6], c)
    other = ids.clone()
    held = int(ids[row, position])
    other[row, position] = held % 60 + 1
    with pytest.raises(TrajectoryError) as error:
        logits(model, other, cache, attention_mask=ones(9, 2))
    text = str(error.value)
    for part in (
        f"position {position} in row {row}",
        f"token {held},",
        f"has {held % 60 + 1}.",
        f"crop(-{6 - position})",
    ):
        assert part in text, text
    assert torch.equal(cache.token_ids, ids[:, :6])
    assert torch.equal(
        logits(model, ids, cache, attention_mask=ones(9, 2)), logits(model, ids, undisturbed, attention_mask=ones(9, 2))
    )


def test_a_contradiction_in_what_only_another_agent_has_seen_is_found_too():
    model = agents_model()
    for sharing in POLICIES:
        cache = SharedLoRACache(sharing=sharing)
        take_turn(model, cache, "plan", tokens(9)[:, :6])
        other = tokens(9)
        other[0, 4] = int(other[0, 4]) % 60 + 1
        with pytest.raises(TrajectoryError, match="position 4"):
            take_turn(model, cache, "act", other)
        oracle = LlamaOracle(model, sharing, NAMES)
        oracle.turn(("plan",), tokens(9)[0, :6].tolist())
        expected = oracle.turn(("act",), tokens(9)[0].tolist())
        assert_equal_logits(take_turn(model, cache, "act", tokens(9))[-len(expected) :], expected)


def test_an_equal_prompt_runs_the_last_token_again_and_duplicates_nothing():
    model = agents_model()
    counter = TokenCounter(model)
    for sharing in POLICIES:
        cache = SharedLoRACache(sharing=sharing)
        first = take_turn(model, cache, "plan", tokens(9))
        counter.take()
        for _ in range(3):
            again = take_turn(model, cache, "plan", tokens(9))
            assert counter.take() == [1]
            assert_equal_logits(again[-1], first[-1])
            assert cache.trajectory_length == 9 and cache.coverage()["plan"] == 9
        more = tokens(12)
        more[:, :9] = tokens(9)
        assert_equal_logits(take_turn(model, cache, "plan", more)[-3:], reference_of(model, "plan", more)[-3:])
        counter.take()


def reference_of(model, name, ids):
    activate(model, name)
    return reference(model, ids)[0]


def test_a_prompt_that_ends_inside_of_what_is_cached_is_refused():
    model = agents_model()
    cache = SharedLoRACache()
    take_turn(model, cache, "plan", tokens(9))
    with pytest.raises(TrajectoryError, match=r"crop\(-3\)"):
        take_turn(model, cache, "plan", tokens(9)[:, :6])
    assert cache.trajectory_length == 9
    cache.crop(-3)
    assert_equal_logits(
        take_turn(model, cache, "plan", tokens(9)[:, :6])[-1], reference_of(model, "plan", tokens(9))[5]
    )


def test_a_gap_is_refused():
    model = agents_model()
    cache = SharedLoRACache()
    take_turn(model, cache, "plan", tokens(12)[:, :6])
    with pytest.raises(TrajectoryError, match="2 tokens are missing"):
        logits(model, tokens(12)[:, 8:], cache, attention_mask=ones(12))
    assert cache.trajectory_length == 6


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_another_batch_size_is_refused(rows):
    model = agents_model()
    cache = SharedLoRACache()
    ids = tokens(9, rows=2)
    logits(model, ids[:, :6], cache)
    with pytest.raises(TrajectoryError) as error:
        logits(model, tokens(9, rows=rows), cache, attention_mask=ones(9, rows))
    assert f"{rows} rows, the cache holds 2" in str(error.value)
    assert ("batch_repeat_interleave(2)" in str(error.value)) == (rows == 4)
    assert_equal_logits(logits(model, ids, cache, attention_mask=ones(9, 2))[:, -3:], reference(model, ids)[:, -3:])


# ---- padding ----


def padded():
    ids, mask = tokens(9, rows=2), ones(9, 2)
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def test_changed_padding_is_refused():
    model = agents_model()
    ids, mask = padded()
    expected = reference(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    cache = SharedLoRACache()
    feed(model, ids[:, :6], cache, [6], mask=mask)
    other = mask.clone()
    other[1, 2] = 1
    for wrong, part in ((other, "position 2"), (ones(9, 2), "position 0"), (None, "attention_mask over the whole")):
        with pytest.raises(TrajectoryError, match=part):
            logits(model, ids[:, 6:], cache, attention_mask=wrong)
        assert cache.trajectory_length == 6
    actual = logits(model, ids[:, 6:], cache, attention_mask=mask, position_ids=positions_of(mask)[:, 6:])
    assert_equal_logits(actual, expected[:, 6:])


def test_padding_that_comes_later_is_refused():
    model = agents_model()
    ids, mask = tokens(9, rows=2), ones(9, 2)
    cache = SharedLoRACache()
    logits(model, ids[:, :6], cache)
    mask[1, :2] = 0
    with pytest.raises(TrajectoryError, match="padding"):
        logits(model, ids, cache, attention_mask=mask)
    assert cache.trajectory_length == 6


def test_other_positions_for_cached_tokens_are_refused():
    model = agents_model()
    cache = SharedLoRACache()
    logits(model, tokens(9)[:, :6], cache)
    with pytest.raises(TrajectoryError, match="position"):
        logits(model, tokens(9), cache, attention_mask=ones(9), position_ids=torch.arange(9)[None] + 3)
    assert cache.trajectory_length == 6


@pytest.mark.parametrize("sharing", POLICIES)
def test_left_padded_agents_with_switches_equal_each_row_alone(sharing):
    model = agents_model()
    ids, mask = padded()
    together = SharedLoRACache(sharing=sharing)
    alone = [SharedLoRACache(sharing=sharing) for _ in range(2)]
    for name, stop in [("plan", 5), ("act", 7), ("plan", 8), ("act", 9)]:
        activate(model, name)
        out = logits(
            model,
            ids[:, :stop],
            together,
            attention_mask=mask[:, :stop],
            position_ids=positions_of(mask)[:, :stop],
        )
        for row, padding in enumerate((0, 3)):
            single = logits(model, ids[row : row + 1, padding:stop], alone[row], attention_mask=ones(stop - padding))
            # The padding moves the keys to other places of the sums, nothing else.
            assert_equal_logits(out[row, -1], single[0, -1])


# ---- going back ----


@pytest.mark.parametrize("sharing", POLICIES)
@pytest.mark.parametrize("n", [0, 1, 4, 8])
def test_crop_then_replay_is_never_having_had_the_tokens(sharing, n):
    model = agents_model()
    oracle = LlamaOracle(model, sharing, NAMES)
    cache, ids = SharedLoRACache(sharing=sharing), tokens(20)
    for name, stop in [("plan", 5), ("act", 9), ("plan", 12)]:
        oracle.turn((name,), ids[0, :stop].tolist())
        take_turn(model, cache, name, ids[:, :stop])
    cache.crop(-n)
    oracle.crop(n)
    assert cache.trajectory_length == 12 - n
    assert torch.equal(cache.token_ids, ids[:, : 12 - n])
    assert {k: v for k, v in cache.coverage().items() if k in NAMES} == {a: oracle.coverage((a,)) for a in NAMES}
    other = tokens(20, seed=7)
    other[:, : 12 - n] = ids[:, : 12 - n]
    for name, stop in [("act", 14), ("plan", 16), ("act", 17)]:
        expected = oracle.turn((name,), other[0, :stop].tolist())
        assert_equal_logits(take_turn(model, cache, name, other[:, :stop])[-len(expected) :], expected)


def single_token_calls(model, cache, ids, mask):
    """The ways in which one new token comes with another mask than before."""
    whole = dict(input_ids=ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
    return {
        "forward": lambda: logits(model, ids[:, -1:], cache, attention_mask=mask),
        "whole forward": lambda: logits(model, ids, cache, attention_mask=mask),
        "generate": lambda: model.generate(**whole, attention_mask=mask),
    }


@pytest.mark.parametrize("how", ["forward", "whole forward", "generate"])
@pytest.mark.parametrize("was_padded", [False, True])
def test_other_padding_is_noticed_with_a_single_new_token(how, was_padded):
    model = agents_model()
    ids, mask = padded()
    other = mask.clone() if not was_padded else torch.ones_like(mask)
    before = mask if was_padded else torch.ones_like(mask)
    assert not torch.equal(before[:, :-1], other[:, :-1])
    cache = SharedLoRACache()
    logits(model, ids[:, :-1], cache, attention_mask=before[:, :-1], position_ids=positions_of(before)[:, :-1])
    with pytest.raises(TrajectoryError, match="padding"):
        single_token_calls(model, cache, ids, other)[how]()
    assert cache.trajectory_length == ids.shape[1] - 1


def test_a_single_new_token_without_a_mask_on_a_padded_trajectory_is_refused():
    model = agents_model()
    ids, mask = padded()
    cache = SharedLoRACache()
    logits(model, ids[:, :-1], cache, attention_mask=mask[:, :-1], position_ids=positions_of(mask)[:, :-1])
    with pytest.raises(TrajectoryError, match="has padding"):
        logits(model, ids[:, -1:], cache)


def test_crop_to_nothing_and_reset_start_over():
    model = agents_model()
    for clear in (lambda c: c.crop(-6), lambda c: c.reset()):
        cache = SharedLoRACache()
        logits(model, tokens(6, rows=2), cache)
        clear(cache)
        assert cache.trajectory_length == 0 and cache.token_ids is None
        assert cache.get_seq_length() == 0
        # Another batch size, other tokens, another agent.
        other = tokens(9, seed=3)
        assert_equal_logits(feed(model, other, cache, [6, 3]), reference(model, other))


def test_reset_lets_auto_decide_again():
    model = with_adapters(tiny_llama(), NAMES)
    cache = SharedLoRACache()
    logits(model, tokens(6), cache)
    assert cache.policy == "base_shared"
    share_a(model, NAMES)
    cache.reset()
    assert cache.policy is None
    logits(model, tokens(6), cache)
    assert cache.policy == "base_lr_shared"


def test_crop_of_padding_is_forgotten():
    model = agents_model()
    ids, mask = padded()
    cache = SharedLoRACache()
    feed(model, ids, cache, [9], mask=mask)
    cache.crop(-9)
    fresh = tokens(9, rows=2)
    assert_equal_logits(feed(model, fresh, cache, [6, 3]), reference(model, fresh))
    assert difference(reference(model, fresh), reference(model, ids)) > 0.01


@pytest.mark.parametrize(
    "drop_padding",
    [
        lambda c: c.batch_select_indices(torch.tensor([0])),
        lambda c: c.crop(-2),
        lambda c: c.reorder_cache(torch.tensor([0, 0])),
    ],
    ids=["select", "crop", "reorder"],
)
def test_padding_that_is_gone_is_no_padding(drop_padding):
    """``generate`` passes no mask of ones to the model, so a cache without padding must not ask for one."""
    model = agents_model()
    ids, mask = tokens(9, rows=2), ones(9, 2)
    mask[1, 4] = 0
    cache = SharedLoRACache()
    logits(model, ids[:, :6], cache, attention_mask=mask[:, :6])
    drop_padding(cache)
    rows, length = cache.rows, cache.trajectory_length
    ids = torch.cat((cache.token_ids, ids[:rows, length:]), dim=1)
    expected = reference(model, ids)[:, length:]
    assert_equal_logits(logits(model, ids[:, length:], cache), expected)


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_without_position_ids_cached_tokens_keep_their_positions(sharing):
    model = agents_model()
    ids, positions = tokens(9), torch.tensor([[0, 1, 2, 10, 11, 12, 13, 7, 8]])
    outs = []
    for given in (dict(position_ids=positions), {}):
        cache = SharedLoRACache(sharing=sharing)
        activate(model, "plan")
        logits(model, ids[:, :7], cache, position_ids=positions[:, :7])
        for name in NAMES:
            activate(model, name)
            with pytest.raises(TrajectoryError, match="without position_ids the model gives .*first for token 3"):
                logits(model, ids, cache, attention_mask=ones(9))
        # New tokens alone are counted from 7 on; those before them keep theirs when they are run again.
        start = 0 if given else 7
        outs.append(logits(model, ids[:, start:], cache, attention_mask=ones(9), **given)[:, -1])
    assert_equal_logits(*outs)


def test_embeddings_of_known_tokens_contradict_nothing():
    model = agents_model()
    ids = tokens(9)
    cache, by_ids = SharedLoRACache(sharing="base_shared"), SharedLoRACache(sharing="base_shared")
    for c in (cache, by_ids):
        activate(model, "plan")
        logits(model, ids[:, :6].int(), c)
        assert c.token_ids.dtype == torch.int64
    activate(model, "act")
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        out = model(inputs_embeds=embeddings, past_key_values=cache, attention_mask=ones(9)).logits
    assert_equal_logits(out, logits(model, ids, by_ids, attention_mask=ones(9)))
    assert cache.token_ids.tolist() == [[*ids[0, :6].tolist(), -1, -1, -1]]


def test_a_batch_of_no_rows_is_refused():
    model, cache = agents_model(), SharedLoRACache()
    logits(model, tokens(3), cache)
    with pytest.raises(TrajectoryError, match="a batch of no rows"):
        logits(model, tokens(3)[:0], cache)
    cache.reset()
    with pytest.raises(TrajectoryError, match="a batch of no rows"):
        logits(model, tokens(3)[:0], cache)


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
@pytest.mark.parametrize("family", ["OPT", "BioGpt"])
def test_positions_that_are_learned_embeddings(family):
    """Positions of the caller reach the hidden states, not the keys; who comes late gets those of the tokens it runs again."""
    sizes = dict(OPT=dict(ffn_dim=48, word_embed_proj_dim=32), BioGpt=dict(intermediate_size=48))[family]
    shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    config = getattr(transformers, f"{family}Config")(**shape, **sizes, pad_token_id=0, eos_token_id=None)
    model = finish(getattr(transformers, f"{family}ForCausalLM")(config), torch.float64)
    settings = lora(target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern={}, alpha_pattern={})
    model = with_adapters(model, dict.fromkeys(NAMES, settings))
    copy_adapter(model, "plan", "act")
    plain, ids, cache, dynamic = twin(model), tokens(11), SharedLoRACache(sharing="base_shared"), DynamicCache()
    positions = torch.tensor([[2, 3, 4, 7, 8, 9, 10, 20, 21, 22, 23]])
    assert difference(reference(plain, ids), reference(plain, ids, position_ids=positions)) > 0.01
    for name, start, stop in [("plan", 0, 6), ("plan", 6, 7), ("plan", 7, 8), ("act", 8, 10), ("act", 10, 11)]:
        activate(model, name)
        given = dict(position_ids=positions[:, start:stop], attention_mask=ones(stop))
        expected = logits(plain, ids[:, start:stop], dynamic, **given)
        assert_equal_logits(logits(model, ids[:, start:stop], cache, **given)[:, start - stop :], expected)
    activate(model, "plan")
    with pytest.raises(TrajectoryError, match="position"):
        logits(model, ids, cache, attention_mask=ones(11))
