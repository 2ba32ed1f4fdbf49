"""Layers with a sliding window keep what can still be read, and nobody notices but the memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from lora_shared_cache import SharedCacheError, SharedLoRACache, buffers

from .test_families import FAMILIES, KV, ROUNDING, build
from .tiny import (
    EXACT,
    TokenCounter,
    activate,
    assert_equal_logits,
    copy_adapter,
    difference,
    feed,
    logits,
    lora,
    ones,
    reference,
    share_a,
    tiny_ministral,
    tiny_mistral,
    tokens,
    twin,
    with_adapters,
)

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

WINDOW = 6
MARGIN = 3
CONTEXT = 40
NAMES = ["plan", "act"]
POLICIES = ["base_shared", "lr_precomputed", "base_lr_shared"]
PIECES = [11, 1, 1, 1, 1, 1, 1, 7, 1, 1, 1, 13]  # a prefill, steps, chunks that are smaller and larger than the window
MODELS = {
    "Mistral": dict(),
    "Qwen2": dict(use_sliding_window=True, max_window_layers=1, layer_types=["full_attention", "sliding_attention"]),
    "Gemma2": FAMILIES["Gemma2"],
    "Gemma3": FAMILIES["Gemma3"],
    "GptOss": FAMILIES["GptOss"],
    "Cohere2": FAMILIES["Cohere2"],
    "Olmo3": FAMILIES["Olmo3"],
}


@pytest.fixture(autouse=True)
def little_margin(monkeypatch):
    """So little besides the window that it is let go of in a short trajectory."""
    monkeypatch.setattr(buffers, "MIN_MARGIN", MARGIN)


def model_of(family, names=("one",), **settings):
    model = build(family, **{**MODELS[family], "sliding_window": WINDOW, **settings})
    if family == "Gemma2":
        # SDPA of some versions drops the soft cap silently.
        model.set_attn_implementation("eager")
    return with_adapters(model, {name: lora(**KV, rank_pattern={}, alpha_pattern={}) for name in names})


def agents(make=tiny_ministral, **settings):
    model = with_adapters(make(**{"sliding_window": WINDOW, **settings}), NAMES)
    share_a(model, NAMES)
    return model


def take_turn(model, cache, name, ids, **kwargs):
    activate(model, name)
    return logits(model, ids, cache, attention_mask=ones(ids.shape[1], ids.shape[0]), **kwargs)


def held(cache, layer=0):
    buffer = cache.layers[layer].base_keys
    return cache.trajectory_length - buffer.start


# ---- right ----


@pytest.mark.parametrize(("family", "sharing"), [(name, POLICIES[i % 3]) for i, name in enumerate(MODELS)])
def test_as_peft_with_a_dynamic_cache(family, sharing, storage):
    model = model_of(family)
    plain = twin(model)
    ids = tokens(CONTEXT)
    expected = reference(plain, ids)
    activate(plain, None)
    assert difference(expected, reference(plain, ids)) > 0.005
    cache = SharedLoRACache(sharing=sharing)
    assert_equal_logits(feed(model, ids, cache, PIECES), expected, ROUNDING)
    sliding = cache.is_sliding.index(True)
    assert WINDOW < held(cache, sliding) <= WINDOW + 2 * MARGIN
    full = [layer for layer, slides in zip(cache.layers, cache.is_sliding, strict=True) if not slides]
    assert all(layer.keys.shape[2] == CONTEXT for layer in full) and bool(full) == (family != "Mistral")


@pytest.mark.parametrize("family", ["Mistral", "Gemma3", "GptOss"])
def test_a_padded_batch(family, storage):
    model = model_of(family)
    model.set_attn_implementation("eager")
    ids, mask = tokens(CONTEXT, rows=3), torch.ones(3, CONTEXT, dtype=torch.long)
    for row, n in enumerate((0, 4, 19)):
        ids[row, :n], mask[row, :n] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = reference(twin(model), ids, attention_mask=mask, position_ids=positions)
    # The longest padding is more than the first piece, and a window of nothing but padding.
    pieces = [20, 1, 1, 1, 1, 1, 1, 7, 1, 1, 5]
    actual = feed(model, ids, SharedLoRACache(), pieces, mask=mask)
    assert_equal_logits(actual[mask.bool()], expected[mask.bool()], ROUNDING)


@pytest.mark.parametrize("family", ["Mistral", "Gemma3", "GptOss"])
@pytest.mark.parametrize("sharing", POLICIES)
def test_identical_agents_are_exact_in_any_order_of_turns(family, sharing):
    """Turn by turn, an agent that comes late, chunks of what it has to run, going back and trying again."""
    model = model_of(family, ("one", "two"))
    copy_adapter(model, "one", "two")
    ids = tokens(CONTEXT)
    expected = reference(twin(model), ids)[0]
    cache = SharedLoRACache(sharing=sharing)

    def turn(name, stop, *pieces):
        out = take_turn(model, cache, name, ids[:, :stop])
        assert_equal_logits(out[0], expected[stop - out.shape[1] : stop], ROUNDING)
        for n in pieces:
            out = take_turn(model, cache, name, ids[:, : stop + n])[0]
            assert_equal_logits(out[-n:], expected[stop : stop + n], ROUNDING)
            stop += n

    turn("one", 9, 1, 1, 1, 1, 1)
    turn("two", 17, 1, 1, 1)
    turn("one", 22, 1, 1, 1, 1, 1, 1, 1)
    cache.crop(20 - 29)  # to where this agent took over
    turn("one", 23, 1, 1)
    turn("two", 27, 1, 1, 5)
    cache.crop(-5)
    turn("two", 37, 3)


@pytest.mark.parametrize("make", [tiny_mistral, tiny_ministral])
@pytest.mark.parametrize("sharing", POLICIES)
def test_as_a_cache_that_keeps_all_tokens(make, sharing, storage):
    model = agents(make)
    cache, all_tokens = SharedLoRACache(sharing=sharing), SharedLoRACache(sharing=sharing, keep_all_tokens=True)
    ids = tokens(60)
    turns = [("plan", 9), ("act", 13), ("plan", 14), ("plan", 15), (None, 31), ("act", 36), ("plan", 52)]
    for name, stop in turns:
        expected = take_turn(model, all_tokens, name, ids[:, :stop])
        assert_equal_logits(take_turn(model, cache, name, ids[:, :stop]), expected)
        assert cache.coverage() == all_tokens.coverage()
        for step in range(stop, stop + 4 * (stop > 20)):
            token = ids[:, step : step + 1]
            assert_equal_logits(logits(model, token, cache), logits(model, token, all_tokens))
    assert held(all_tokens) == 56 and held(cache) <= WINDOW + 2 * MARGIN
    sizes = [c.memory_footprint() for c in (cache, all_tokens)]
    assert sizes[0]["base"] < sizes[1]["base"] and sizes[0]["non_shared"] == sizes[1]["non_shared"]


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
@pytest.mark.parametrize("chunks", [[28], [3, 25], [9, 9, 10], [1] * 28])
@pytest.mark.parametrize("keep_all", [False, True])
def test_an_agent_that_comes_late_in_chunks(sharing, chunks, keep_all):
    """What it runs again it reads as it has run it, also where one chunk ends and the next begins."""
    model = agents()
    ids = tokens(28)

    def late(sizes):
        cache = SharedLoRACache(sharing=sharing, keep_all_tokens=keep_all)
        take_turn(model, cache, "plan", ids[:, :20])
        cache.drop_adapter("act")
        activate(model, "act")
        out, done = [], 0
        for n in sizes:
            done += n
            out.append(logits(model, ids[:, done - n : done], cache, attention_mask=ones(done)))
            assert cache.get_seq_length() == done
        return torch.cat(out, dim=1)

    assert_equal_logits(late(chunks), late([28]))


def test_an_agent_that_has_seen_nothing_is_closer_to_its_own_cache():
    """In sliding layers it reads its own keys and values of the tokens that are gone, not those of another."""
    model = agents(tiny_mistral)
    ids = tokens(30)
    plain = twin(model)
    activate(plain, "act")
    expected = reference(plain, ids)
    cache = SharedLoRACache(sharing="base_shared")
    take_turn(model, cache, "plan", ids[:, :20])
    actual = take_turn(model, cache, "act", ids)
    window = cache.layers[0].window
    # Tokens before the shared window are those of a cache of its own.
    assert_equal_logits(actual[:, : 20 - window], expected[:, : 20 - window])
    assert difference(actual[:, 20 - window :], expected[:, 20 - window :]) > 1e-3


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_several_adapters_of_which_one_is_new(sharing):
    """The other one's entries are no longer held for the tokens that are run again."""
    model = agents()
    ids = tokens(30)
    caches = [SharedLoRACache(sharing=sharing, keep_all_tokens=keep) for keep in (False, True)]
    outs = []
    for cache in caches:
        for name in NAMES:
            take_turn(model, cache, name, ids[:, :20])
        cache.drop_adapter("plan")
        outs.append(take_turn(model, cache, ["act", "plan"], ids))
        outs[-1] = torch.cat((outs[-1], take_turn(model, cache, "act", tokens(33))[:, -3:]), dim=1)
    assert outs[0].shape[1] == 33
    assert_equal_logits(*outs)


@pytest.mark.parametrize("private", [(0,), (1,), (0, 1, 2)])
def test_private_layers(private):
    model = agents()
    ids = tokens(CONTEXT)
    cache = SharedLoRACache(private_layers=private)
    everything = SharedLoRACache(private_layers=private, keep_all_tokens=True)
    for name, stop in [("plan", 12), ("act", 20), ("plan", 21), ("plan", 36), ("act", 37), ("act", 38), ("act", 40)]:
        expected = take_turn(model, everything, name, ids[:, :stop])
        assert_equal_logits(take_turn(model, cache, name, ids[:, :stop]), expected)
    assert cache.memory_footprint()["total"] < everything.memory_footprint()["total"]


@pytest.mark.parametrize(
    "rows", [lambda c: c.reorder_cache(torch.tensor([1, 0, 1])), lambda c: c.batch_repeat_interleave(2)]
)
def test_row_operations_reach_what_is_kept_for_others(rows):
    model = agents()
    ids = tokens(CONTEXT, rows=3)

    def run(cache, ids):
        out = [take_turn(model, cache, "plan", ids[:, :CONTEXT]), take_turn(model, cache, "act", ids)]
        return torch.cat([o[:, -3:] for o in out], dim=1)

    def before(cache):
        for name, stop in [("act", 9), ("plan", 25), ("plan", 26), ("plan", 36)]:
            take_turn(model, cache, name, ids[:, :stop])
        return cache

    cache, everything = (before(SharedLoRACache(sharing="base_shared", keep_all_tokens=keep)) for keep in (False, True))
    assert cache.layers[0].tails
    rows(cache)
    rows(everything)
    more = torch.cat((everything.token_ids, everything.token_ids.flip(1)[:, :8]), dim=1)
    assert_equal_logits(run(cache, more), run(everything, more))


@pytest.mark.parametrize("sharing", POLICIES)
def test_rows_with_adapters_of_their_own(sharing, storage):
    """Against PEFT with a DynamicCache; then another batch of the same adapters, and rows that change places."""
    model = agents()
    plain = twin(model)
    ids, names = tokens(CONTEXT, rows=3), ["act", "__base__", "plan"]
    expected = logits(plain, ids, DynamicCache(config=plain.config), adapter_names=names)
    cache, done = SharedLoRACache(sharing=sharing), 0
    everything = SharedLoRACache(sharing=sharing, keep_all_tokens=True)
    for n in PIECES:
        given, done = dict(adapter_names=names, attention_mask=ones(done + n, 3)), done + n
        out = logits(model, ids[:, done - n : done], cache, **given)
        assert_equal_logits(out, expected[:, done - n : done])
        logits(model, ids[:, done - n : done], everything, **given)
    assert held(cache) <= WINDOW + 2 * MARGIN
    more = torch.cat((ids, tokens(30, rows=3, seed=2)), dim=1)
    take_turn(model, everything, "act", more[:, :60])
    take_turn(model, cache, "act", more[:, :60])
    outs = []
    for c in (cache, everything):
        c.reorder_cache(torch.tensor([2, 1, 0]))
        outs.append(logits(model, more.flip(0), c, adapter_names=names[::-1], attention_mask=ones(70, 3))[:, -10:])
    assert_equal_logits(*outs)


# ---- small ----


@pytest.mark.parametrize("sharing", POLICIES)
def test_memory_is_bounded(sharing):
    model = agents()
    cache = SharedLoRACache(sharing=sharing)
    ids, stop, most = tokens(220), 0, 0
    for turn in range(10):
        stop += 10
        take_turn(model, cache, NAMES[turn % 2], ids[:, :stop])
        for _ in range(10):
            logits(model, ids[:, stop : stop + 1], cache)
            stop += 1
        layer = cache.layers[0]
        most = max(most, layer.base_keys.capacity, *(b.capacity for e in layer.entries.values() for b in e.values()))
    assert stop == 200 and held(cache, 1) == 200 and held(cache) <= WINDOW + 2 * MARGIN
    assert most <= WINDOW + 2 * MARGIN
    # One more window for an agent that has stopped before, and one to go back to the start of the turn.
    tails = cache.layers[0].tails
    assert len(tails) == (sharing == "base_shared") and all(t.keys.shape[2] <= WINDOW for t in tails.values())
    assert cache.layers[0].base_keys.kept[1].shape[2] <= WINDOW


def test_a_long_prefill_leaves_a_window(storage):
    model = agents(tiny_mistral)
    for pieces in ([250], [100, 150], [1, 249]):
        cache = SharedLoRACache()
        feed(model, tokens(250), cache, pieces)
        for layer in cache.layers:
            for buffer in layer.buffers():
                assert buffer.data is None or buffer.capacity <= WINDOW + 2 * MARGIN
        assert cache.memory_footprint()["base"] <= 3 * 2 * 2 * 8 * 8 * (WINDOW + 2 * MARGIN + WINDOW)


def test_bytes_beside_a_dynamic_cache():
    """Of the base: no more than a DynamicCache but for the margin. Non-shared is what DynamicCaches really take."""
    model = agents()
    ids = tokens(200)
    cache, plain = SharedLoRACache(sharing="lr_precomputed"), DynamicCache(config=model.get_base_model().config)
    for c in (cache, plain):
        feed(model, ids, c, [190] + [1] * 10)
    theirs = sum(t.numel() * t.element_size() for layer in plain.layers for t in (layer.keys, layer.values))
    footprint = cache.memory_footprint()
    assert footprint["non_shared"] == theirs
    per_token = 2 * 2 * 8 * 8
    sliding = sum(cache.is_sliding)
    assert sliding == 2 and theirs == per_token * (200 + sliding * (WINDOW - 1))
    assert theirs <= footprint["base"] <= theirs + per_token * sliding * (1 + 2 * MARGIN)
    assert footprint["total"] <= footprint["allocated"]
    assert all(b <= 200 * (2 * 4 + 4 + 3) * 8 for b in footprint["low_rank"].values())


def test_the_margin_of_real_windows(monkeypatch):
    monkeypatch.setattr(buffers, "MIN_MARGIN", 64)
    assert [buffers.window_and_margin(w) for w in (128, 512, 4096)] == [192, 576, 4608]


# ---- crop ----


def state(cache):
    layers = [
        [(b.start, None if b.data is None else b.data.clone(), b.kept) for b in layer.windows()]
        for layer in cache.layers
    ]
    return cache.trajectory_length, cache.coverage(), layers


def assert_same_state(before, after):
    assert before[:2] == after[:2]
    for mine, theirs in zip(before[2], after[2], strict=True):
        for (start, data, kept), (other_start, other_data, other_kept) in zip(mine, theirs, strict=True):
            assert start == other_start and kept is other_kept
            assert data is other_data is None or torch.equal(data, other_data)


@pytest.mark.parametrize("sharing", POLICIES)
def test_crop_to_the_start_of_the_turn_and_retry(sharing, storage):
    model = agents()
    ids = tokens(60)
    cache, never = SharedLoRACache(sharing=sharing), SharedLoRACache(sharing=sharing)
    for c in (cache, never):
        take_turn(model, c, "plan", ids[:, :10])
        take_turn(model, c, "act", ids[:, :24])
    out = model.generate(
        input_ids=ids[:, :27], attention_mask=ones(27), past_key_values=cache, max_new_tokens=18, do_sample=False
    )
    assert cache.trajectory_length == 44 and held(cache) <= WINDOW + 2 * MARGIN
    with pytest.raises(
        SharedCacheError, match=r"crop\(-15\).*up to \d+ tokens, crop\(-\d\), or .*crop\(-20\).*keep_all_tokens"
    ):
        cache.crop(-15)
    cache.crop(-20)
    assert cache.trajectory_length == 24 and cache.coverage() == never.coverage()
    for c in (cache, never):
        again = model.generate(
            input_ids=ids[:, :27], attention_mask=ones(27), past_key_values=c, max_new_tokens=18, do_sample=False
        )
        assert torch.equal(again, out)
    assert_equal_logits(take_turn(model, cache, "plan", out)[:, -1], take_turn(model, never, "plan", out)[:, -1])


def test_crop_refuses_before_anything_changes():
    model = agents()
    cache = SharedLoRACache()
    feed(model, tokens(40), cache, [20, 12, *[1] * 8])
    before = state(cache)
    with pytest.raises(
        ValueError, match=r"crop\(-16\): layers with a sliding window no longer hold what comes before token 24"
    ):
        cache.crop(-16)
    assert_same_state(before, state(cache))
    cache.crop(-MARGIN)
    cache.crop(-cache.trajectory_length)
    assert cache.trajectory_length == 0
    assert_equal_logits(feed(model, tokens(30), cache, [25, 5]), reference(twin_of(model), tokens(30)))
    everything = SharedLoRACache(keep_all_tokens=True)
    feed(model, tokens(40), everything, [20, 12, *[1] * 8])
    everything.crop(-35)
    assert_equal_logits(feed(model, tokens(40)[:, 5:], everything, [35]), reference(twin_of(model), tokens(40))[:, 5:])


def twin_of(model):
    from lora_shared_cache import attach, detach

    detach(model)
    copy_of = twin(model)
    attach(model)
    return copy_of


@pytest.mark.parametrize("n", range(1, MARGIN + 1))
def test_crop_within_the_margin_and_go_on(n):
    model = agents()
    ids, other = tokens(60), tokens(60, seed=1)
    expected = reference(twin(model), torch.cat((ids[:, : 45 - n], other), dim=1))
    cache = SharedLoRACache()
    feed(model, ids[:, :45], cache, [20, 12, *[1] * 13])
    cache.crop(-n)
    assert_equal_logits(feed(model, other, cache, [1, 1, 4, 54]), expected[:, 45 - n :])


def test_a_changed_adapter_goes_back_to_nothing_where_the_window_is_gone():
    model = agents()
    ids = tokens(60)
    cache = SharedLoRACache()
    take_turn(model, cache, "plan", ids[:, :20])
    take_turn(model, cache, "act", ids[:, :22])
    take_turn(model, cache, "plan", ids[:, :50])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".act." in name and "lora_B" in name:
                parameter.mul_(-1)
    assert cache.coverage() == dict(__base__=0, plan=0, act=0)
    assert_equal_logits(take_turn(model, cache, "act", ids), reference(twin_of(model), ids))


def test_assisted_decoding():
    model = agents(tiny_mistral)
    draft = tiny_mistral(seed=5, sliding_window=None)
    ids = tokens(20)
    ids = torch.cat((ids, ids[:, 4:16]), dim=1)  # something to look up
    options = dict(max_new_tokens=20, do_sample=False)
    for known in (0, 30):
        expected = None
        for assistance in ({}, dict(prompt_lookup_num_tokens=9), dict(assistant_model=draft)):
            cache = SharedLoRACache(model)
            if known:
                take_turn(model, cache, "plan", ids[:, :known])
            activate(model, "plan")
            out = model.generate(
                input_ids=ids, attention_mask=ones(ids.shape[1]), past_key_values=cache, **options, **assistance
            )
            expected = out if expected is None else expected
            assert torch.equal(out, expected)
            assert held(cache) <= WINDOW + 2 * MARGIN


def test_past_recording_keeps_what_comes_in_until_crop():
    model = agents()
    ids = tokens(50)
    cache = SharedLoRACache()
    feed(model, ids[:, :20], cache, [20])
    cache.activate_past_recording()
    feed(model, ids[:, 20:50], cache, [20, 1, 9])
    cache.crop(-30)
    assert cache.trajectory_length == 20 and held(cache) <= WINDOW + 2 * MARGIN
    assert_equal_logits(feed(model, ids[:, 20:], cache, [30]), reference(twin_of(model), ids)[:, 20:])


# ---- passes that are not as others ----


def test_an_error_in_the_middle_changes_nothing():
    model = agents()
    caches = [SharedLoRACache(sharing="base_shared") for _ in range(2)]
    ids = tokens(60)
    for c in caches:
        for name, stop in [("act", 12), ("plan", 30)]:
            take_turn(model, c, name, ids[:, :stop])
    cache, untouched = caches
    last = model.get_base_model().model.layers[-1].mlp

    def fail(*args):
        raise RuntimeError("in the middle")

    before = state(cache)
    for name, stop in [("plan", 60), ("plan", 31), ("act", 40), ("act", 30), (None, 60)]:
        last.forward = fail
        with pytest.raises(RuntimeError, match="in the middle"):
            take_turn(model, cache, name, ids[:, :stop])
        del last.forward
        after = state(cache)
        assert before[:2] == after[:2]
        for mine, theirs in zip(before[2], after[2], strict=True):
            for (start, data, kept), (other_start, other, other_kept) in zip(mine, theirs, strict=True):
                assert start == other_start and kept is other_kept
                # Past what is valid (12 tokens of "act", 30 of others) there may be what the pass left.
                assert data is other is None or torch.equal(data[..., : 12 - start, :], other[..., : 12 - start, :])
        for layer, other in zip(cache.layers, untouched.layers, strict=True):
            assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
            assert layer.staged_tail is None or layer.window is not None
    for name, stop in [("plan", 31), ("act", 40), ("plan", 60)]:
        out = take_turn(model, cache, name, ids[:, :stop])
        assert_equal_logits(out, take_turn(model, untouched, name, ids[:, :stop]))


def test_chunks_that_walk_through_what_is_covered():
    """generate with prefill_chunk_size may feed a covered prompt again; the first chunks' outputs are nobody's."""
    model = agents()
    cache = SharedLoRACache()
    ids = tokens(40)
    take_turn(model, cache, "plan", ids[:, :30])
    counter = TokenCounter(model)
    out = model.generate(
        input_ids=ids, attention_mask=ones(40), past_key_values=cache, max_new_tokens=2, do_sample=False,
        prefill_chunk_size=7, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert sum(counter.take()) <= 20
    assert_equal_logits(out.logits[0], reference(twin_of(model), ids)[:, -1].float(), 1e-5)
    # The same by hand: such a pass stores nothing and can't be taken for an answer.
    before = state(cache)
    with cache._prompt(41, None):
        assert bool(logits(model, ids[:, :7], cache, attention_mask=ones(7)).isnan().all())
    assert_same_state(before, state(cache))


def test_masks_of_ones_own():
    model = agents()
    ids = tokens(30)
    expected = reference(twin(model), ids)
    cache = SharedLoRACache()
    feed(model, ids[:, :26], cache, [26])
    distance = torch.arange(26, 30)[:, None] - torch.arange(30)
    causal = (distance >= 0)[None, None]
    with pytest.raises(ValueError, match="sliding window of 6"):
        logits(model, ids[:, 26:], cache, attention_mask=causal, position_ids=torch.arange(26, 30)[None])
    window = (causal[0, 0] & (distance < WINDOW))[None, None]
    masks = dict(sliding_attention=window, full_attention=causal)
    out = logits(model, ids[:, 26:], cache, attention_mask=masks, position_ids=torch.arange(26, 30)[None])
    assert_equal_logits(out, expected[:, 26:])


def test_forks_go_their_own_ways():
    model = agents()
    ids = tokens(60)
    cache, again = (SharedLoRACache(sharing="base_shared") for _ in range(2))
    for c in (cache, again):
        for name, stop in [("act", 12), ("plan", 30)]:
            take_turn(model, c, name, ids[:, :stop])
    fork = copy.deepcopy(cache)
    other = torch.cat((ids[:, :30], tokens(30, seed=3)), dim=1)
    for name in ("plan", "act"):
        take_turn(model, fork, name, other)
    fork.crop(-1)
    for stop in (31, 50):
        for name in ("plan", "act"):
            assert_equal_logits(
                take_turn(model, cache, name, ids[:, :stop]), take_turn(model, again, name, ids[:, :stop]), EXACT
            )


# ---- memory that runs out ----


class OutOfMemoryAt(TorchDispatchMode):
    """The operation number ``at`` that may allocate fails."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in (
            "cat",
            "clone",
            "empty",
            "empty_like",
            "index",
            "index_select",
            "new_empty",
        ):
            self.count += 1
            if self.count - 1 == self.at:
                raise torch.OutOfMemoryError("no memory left")
        return func(*args, **(kwargs or {}))


CHANGES = {
    "reorder_cache": lambda model, cache, ids: cache.reorder_cache(torch.tensor([1, 0])),
    "batch_select_indices": lambda model, cache, ids: cache.batch_select_indices(torch.tensor([1, 0])),
    "batch_repeat_interleave": lambda model, cache, ids: cache.batch_repeat_interleave(2),
    "crop": lambda model, cache, ids: cache.crop(-7),  # to the start of the turn
    "commit": lambda model, cache, ids: take_turn(model, cache, "plan", ids),
}


@pytest.mark.parametrize("change", CHANGES)
def test_memory_runs_out_in_a_change_of_storage(change, monkeypatch):
    """Then the cache is as it was or empty, and can be used; never a mixture."""
    model, ids = agents(), tokens(30, rows=2)
    start = SharedLoRACache(sharing="base_shared")
    take_turn(model, start, "act", ids[:, :9])
    for stop in [11] if change == "commit" else [15, 22]:
        take_turn(model, start, "plan", ids[:, :stop])
    commit, place = SharedLoRACache._commit, OutOfMemoryAt

    def failing(cache, now):
        with place:
            commit(cache, now)

    def run(cache):
        if change == "commit":
            with monkeypatch.context() as patch:
                patch.setattr(SharedLoRACache, "_commit", failing)
                CHANGES[change](model, cache, ids)
        else:
            with place:
                CHANGES[change](model, cache, ids)

    def goes_on(cache):
        return torch.cat([take_turn(model, cache, name, ids)[:, -1] for name in ("plan", "act")])

    as_it_was, from_nothing = goes_on(copy.deepcopy(start)), goes_on(SharedLoRACache(sharing="base_shared"))
    place = OutOfMemoryAt()
    run(copy.deepcopy(start))
    operations = place.count
    assert operations > 3
    for at in {0, 1, operations // 2, operations - 1}:
        cache, place = copy.deepcopy(start), OutOfMemoryAt(at)
        with pytest.raises(torch.OutOfMemoryError):
            run(cache)
        kept = cache.trajectory_length
        assert kept in (0, start.trajectory_length)
        assert_equal_logits(goes_on(cache), as_it_was if kept else from_nothing)
