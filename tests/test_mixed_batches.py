"""Batches whose rows have different adapters (PEFT's ``adapter_names=``): each row is what it is alone with its adapter."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from transformers import DynamicCache

from lora_shared_cache import SharedLoRACache, TrajectoryError, UnsupportedAdapterError
from lora_shared_cache.attach import attachment_of

from .test_families import FAMILIES
from .test_families import build as build_family
from .tiny import (
    TokenCounter,
    activate,
    assert_equal_logits,
    difference,
    logits,
    lora,
    norms_in_float64,
    share_a,
    tiny_llama,
    tiny_mistral,
    tokens,
    twin,
    with_adapters,
)

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

# "plan" and "act" differ in rank, "act" lacks keys, "walk" lacks values, "other" both.
CONFIGS = {
    "plan": lora(lora_bias=True, rank_pattern={}),
    "act": lora(r=2, rank_pattern={}, target_modules=["v_proj", "q_proj", "down_proj"]),
    "walk": lora(target_modules=["k_proj", "o_proj"]),
    "other": lora(target_modules=["o_proj", "up_proj"]),
}
ROWS = ["plan", "__base__", "act", "walk", "other", "plan"]
POLICIES = ["base_shared", "lr_precomputed", "base_lr_shared", "auto"]


def agents_model(sharing: str = "base_shared"):
    if sharing not in ("base_shared", "lr_precomputed"):
        model = with_adapters(tiny_llama(), ["plan", "act", "walk", "other"])
        share_a(model, ["plan", "act", "walk", "other"])
        return model
    return with_adapters(tiny_llama(attention_bias=True), CONFIGS)


def agent_of(name: str) -> str | None:
    return None if name == "__base__" else name


class RowsAlone:
    """Each row with its adapter, PEFT and a ``DynamicCache`` of its own; padding as given."""

    def __init__(self, model, names):
        self.model, self.names = model, names
        self.caches = [DynamicCache(config=model.config) for _ in names]

    def feed(self, ids, mask=None):
        out = []
        for row, (name, cache) in enumerate(zip(self.names, self.caches, strict=True)):
            activate(self.model, agent_of(name))
            settings = {}
            if mask is not None:
                positions = (mask[row : row + 1].cumsum(-1) - 1).clamp(min=0)
                settings = dict(attention_mask=mask[row : row + 1], position_ids=positions[:, cache.get_seq_length() :])
            out.append(logits(self.model, ids[row : row + 1], cache, **settings))
        activate(self.model, next(name for name in self.names if name != "__base__"))
        return torch.cat(out)


def test_the_rows_differ():
    for sharing in ("base_shared", "auto"):
        model = agents_model(sharing)
        ids = tokens(9).expand(len(ROWS), -1)
        alone = RowsAlone(model, ROWS).feed(ids)
        for one in range(len(ROWS) - 1):
            for other in range(one + 1, len(ROWS) - 1):
                assert difference(alone[one], alone[other]) > 0.01, (ROWS[one], ROWS[other])


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
@pytest.mark.parametrize("padded", [False, True], ids=["", "left_padded"])
@pytest.mark.parametrize("sharing", POLICIES)
def test_each_row_is_what_it_is_alone(sharing, padded, storage):
    model = agents_model(sharing)
    alone = RowsAlone(twin(model), ROWS)
    ids, mask = tokens(18, rows=len(ROWS)), None
    if padded:
        mask = torch.ones_like(ids)
        for row in range(len(ROWS)):
            ids[row, :row], mask[row, :row] = 0, 0
    cache = SharedLoRACache(sharing=sharing)
    start = 0
    for size in (7, 4, 1, 1, 1, 4):
        seen = None if mask is None else mask[:, : start + size]
        settings = {}
        if seen is not None:
            positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, start:]
            settings = dict(attention_mask=seen, position_ids=positions)
        new = ids[:, start : start + size]
        actual = logits(model, new, cache, adapter_names=ROWS, **settings)
        expected = alone.feed(new, seen)
        real = torch.ones_like(new).bool() if mask is None else mask[:, start : start + size].bool()
        assert_equal_logits(actual[real], expected[real])
        start += size
    covered = cache.coverage()
    assert covered["[plan, __base__, act, walk, other, plan]"] == cache.trajectory_length == 18
    assert covered["plan"] == (0 if sharing == "base_shared" else 18)


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
@pytest.mark.parametrize("sharing", POLICIES)
def test_one_adapter_for_all_rows_and_back(sharing):
    """Turns of one adapter and turns of all: each row as a batch of one, whose agents take the same turns."""
    model = agents_model(sharing)
    ids = tokens(24, rows=len(ROWS))
    turns = [(ROWS, 6), ("plan", 9), (ROWS, 12), (None, 15), (ROWS[::-1], 18), (ROWS, 21)]
    cache, alone = SharedLoRACache(sharing=sharing), [SharedLoRACache(sharing=sharing) for _ in ROWS]
    counter = TokenCounter(model)
    for turn, (who, stop) in enumerate(turns):
        mixed = isinstance(who, list)
        counter.take()
        mask = torch.ones(len(ROWS), stop)
        if not mixed:
            activate(model, who)
        named = dict(adapter_names=who) if mixed else {}
        actual = logits(model, ids[:, :stop], cache, attention_mask=mask, **named)[:, -3:]
        ran = sum(counter.take())
        assert ran == (
            stop if turn == 0 else 3 if sharing != "base_shared" or who is None else 3 + _behind(turns, turn)
        )
        for row, own in enumerate(alone):
            activate(model, agent_of(who[row]) if mixed else who)
            expected = logits(model, ids[row : row + 1, :stop], own, attention_mask=mask[:1])
            assert_equal_logits(actual[row : row + 1], expected[:, -3:])
        activate(model, "plan")
    counter.handle.remove()


def _behind(turns, turn):
    """Tokens that an agent of base_shared has missed when its turn comes."""
    own = [stop for who, stop in turns[:turn] if who == turns[turn][0]]
    return turns[turn - 1][1] - (own[-1] if own else 0)


def generate(model, ids, cache, **settings):
    settings.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(
        input_ids=ids, past_key_values=cache, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True,
        **settings,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("sharing", POLICIES)
def test_generate(sharing, beams):
    """Two turns; PEFT repeats the names for beams, so does ``batch_repeat_interleave`` what is cached for the rows."""
    model = agents_model(sharing)
    plain, cache = twin(model), SharedLoRACache(sharing=sharing)
    names, ids = ROWS[:4], tokens(9, rows=4)
    logits(model, ids[:, :5], cache, adapter_names=names)
    cache.batch_repeat_interleave(beams)
    for turn in range(2):
        repeats = beams if turn == 0 else 1
        settings = dict(num_beams=repeats, adapter_names=names)
        ours, theirs = generate(model, ids, cache, **settings), generate(plain, ids, None, **settings)
        assert torch.equal(ours.sequences, theirs.sequences)
        for a, b in zip(ours.logits, theirs.logits, strict=True):
            assert_equal_logits(a, b, 1e-5)  # generate hands out float32
        assert cache.rows == 4 * beams
        if repeats > 1:
            # The beams of which the cache is, not the sequences that were chosen.
            ids, names = cache.token_ids, [name for name in names for _ in range(beams)]
        else:
            ids = ours.sequences
        ids = torch.cat((ids, tokens(2, rows=len(ids), seed=turn)), dim=1)


def test_rows_that_go_or_change_places():
    model = agents_model()
    cache, ids, names = SharedLoRACache(), tokens(12, rows=4), ["plan", "act", "__base__", "act"]
    everything = RowsAlone(twin(model), names).feed(ids)
    counter = TokenCounter(model)
    logits(model, ids[:, :7], cache, adapter_names=names)
    for keep, ran in (([0, 1, 2, 3], 2), ([1, 0, 2, 3], 1), ([1, 2, 0], 1), ([0, 1], 1 + 11)):
        names, ids, everything = [names[i] for i in keep], ids[keep], everything[keep]
        cache.batch_select_indices(torch.tensor(keep))
        counter.take()
        stop = cache.trajectory_length + (2 if ran == 2 else 1)
        out = logits(model, ids[:, :stop], cache, adapter_names=names, attention_mask=torch.ones(len(keep), stop))
        assert_equal_logits(out[:, -1], everything[:, stop - 1])
        # A row less of the same adapters is nothing to run again for; an adapter less is.
        assert sum(counter.take()) == ran


def test_the_same_adapter_for_every_row_is_that_agent():
    model = agents_model()
    ids = tokens(9, rows=2)
    activate(model, "act")
    expected = logits(twin(model), ids, DynamicCache(config=model.config))
    activate(model, "plan")
    cache = SharedLoRACache()
    first = logits(model, ids[:, :5], cache, adapter_names=["act", "act"])
    assert cache.coverage() == {"__base__": 5, "plan": 0, "act": 5, "walk": 0, "other": 5}
    activate(model, "act")
    assert_equal_logits(torch.cat((first, logits(model, ids[:, 5:], cache)), 1), expected)


def test_a_changed_or_dropped_adapter_of_one_row():
    model = agents_model()
    ids, names = tokens(9, rows=2), ["plan", "act"]
    for change in ("drop", "train"):
        cache = SharedLoRACache()
        logits(model, ids[:, :6], cache, adapter_names=names, attention_mask=torch.ones(2, 6))
        assert cache.coverage()["[plan, act]"] == 6
        if change == "drop":
            cache.drop_adapter("act")
            assert cache.trajectory_length == 6
        else:
            for name, parameter in model.named_parameters():
                if "lora_B.act" in name:
                    parameter.data.mul_(1.5)
        # Tokens of an adapter that is another one now are gone, in all rows.
        assert cache.coverage()["__base__"] == (6 if change == "drop" else 0)
        assert "[plan, act]" not in cache.coverage()
        expected = RowsAlone(twin(model), names).feed(ids)
        actual = logits(model, ids, cache, adapter_names=names, attention_mask=torch.ones(2, 9))
        assert_equal_logits(actual[:, -3:], expected[:, -3:])


def test_what_peft_refuses_is_refused_and_leaves_nothing_behind():
    model = agents_model()
    ids, names = tokens(7, rows=3), ["plan", "act", "__base__"]
    expected = logits(twin(model), ids, DynamicCache(config=model.config))
    cache = SharedLoRACache()
    call = dict(input_ids=ids, past_key_values=cache, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    with pytest.raises(UnsupportedAdapterError, match="3 names, the batch 6 rows"):
        model.generate(**call, adapter_names=names, num_return_sequences=2, do_sample=True)
    with pytest.raises(UnsupportedAdapterError, match="2 names, the batch 3 rows"):
        logits(model, ids, cache, adapter_names=names[:2])
    with pytest.raises(ValueError, match="nobody"):
        logits(model, ids, cache, adapter_names=["plan", "act", "nobody"])
    assert cache.trajectory_length == 0
    # PEFT leaves its hooks behind when a call raises; the next one would take them for its rows.
    logits(model, ids, cache, adapter_names=names)
    with pytest.raises(TrajectoryError, match="contradicts"):
        model.generate(**{**call, "input_ids": ids + 1}, adapter_names=names[::-1])
    assert_equal_logits(logits(model, ids, SharedLoRACache()), expected)
    with model.disable_adapter():
        base = logits(model, ids, SharedLoRACache())
        assert_equal_logits(logits(model, ids, SharedLoRACache(), adapter_names=names), base)


def test_an_output_embedding_of_each_adapter():
    """``modules_to_save`` of the output embedding is allowed; PEFT's hooks on it go too when a call raises."""
    configs = {"plan": lora(modules_to_save=["lm_head"]), "act": lora(modules_to_save=["lm_head"])}
    model = with_adapters(tiny_llama(), configs)
    head, names, ids = model.get_base_model().lm_head, ["plan", "act", "__base__"], tokens(7, rows=3)
    for saved in head.modules_to_save.values():
        saved.weight.data.mul_(torch.rand(64, 1, dtype=torch.float64))
    expected, cache = RowsAlone(twin(model), names).feed(ids), SharedLoRACache()
    assert_equal_logits(logits(model, ids, cache, adapter_names=names), expected)
    with pytest.raises(TrajectoryError, match="contradicts"):
        generate(model, ids + 1, cache, adapter_names=names)
    assert not head._forward_pre_hooks
    activate(model, "act")
    assert_equal_logits(logits(model, ids[1:2], SharedLoRACache()), expected[1:2])


@pytest.mark.parametrize("family", ["Phi with norms", "HunYuanDenseV1"])
@pytest.mark.parametrize("sharing", POLICIES)
def test_models_that_normalise_keys(family, sharing, storage):
    """The numbers per key are those of each row's adapter."""
    names = ["plan", "__base__", "act", "plan"]
    model = build_family(family, torch.float64, **FAMILIES[family])
    if sharing in ("base_lr_shared", "auto"):
        model = with_adapters(model, ["plan", "act"])
        share_a(model, ["plan", "act"])
    else:
        model = with_adapters(
            model,
            {"plan": lora(), "act": lora(target_modules=["v_proj", "q_proj"], rank_pattern={}), "walk": lora(r=2)},
        )
        names[-1] = "walk"
    alone, cache, ids = RowsAlone(twin(model), names), SharedLoRACache(sharing=sharing), tokens(12, rows=4)
    for part in ids.split((6, 4, 1, 1), dim=1):
        assert_equal_logits(logits(model, part, cache, adapter_names=names), alone.feed(part))


def test_private_layers():
    model = agents_model()
    alone, cache, ids = RowsAlone(twin(model), ROWS), SharedLoRACache(private_layers=[1]), tokens(12, rows=len(ROWS))
    for part in ids.split((6, 4, 1, 1), dim=1):
        assert_equal_logits(logits(model, part, cache, adapter_names=ROWS), alone.feed(part))


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_sliding_windows(sharing, storage):
    """Longer than a window and what is kept besides."""
    model = with_adapters(tiny_mistral(sliding_window=5, attention_bias=True), CONFIGS)
    alone, cache, ids = RowsAlone(twin(model), ROWS), SharedLoRACache(sharing=sharing), tokens(190, rows=len(ROWS))
    for part in ids.split((150, 1, 1, 38), dim=1):
        assert_equal_logits(logits(model, part, cache, adapter_names=ROWS), alone.feed(part))


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_fused_projections(sharing):
    """Ranks that differ on one layer for queries, keys and values."""
    targets = dict(target_modules=["qkv_proj"], rank_pattern={}, alpha_pattern={})
    model = with_adapters(build_family("Phi3", torch.float64), {"plan": lora(**targets), "act": lora(r=2, **targets)})
    names = ["plan", "act", "__base__", "plan"]
    alone, cache, ids = RowsAlone(twin(model), names), SharedLoRACache(sharing=sharing), tokens(12, rows=4)
    for part in ids.split((6, 4, 1, 1), dim=1):
        assert_equal_logits(logits(model, part, cache, adapter_names=names), alone.feed(part))


@pytest.mark.parametrize("sharing", POLICIES)
@pytest.mark.parametrize("empties", ["crop", "reset"])
def test_another_number_of_rows_after_the_text_is_gone(sharing, empties, storage):
    """Rows of a text that was cropped away are no rows of the next one."""
    model = agents_model(sharing)
    alone = RowsAlone(twin(model), ["plan", "act", "plan"])
    cache, ids = SharedLoRACache(sharing=sharing), tokens(9, rows=3)
    logits(model, ids[:2], cache, adapter_names=["plan", "__base__"])
    cache.crop(-9) if empties == "crop" else cache.reset()
    assert "[plan, __base__]" not in cache.coverage()
    logits(model, ids[:, :6], cache, adapter_names=["plan", "act", "act"])
    cache.reset()
    chosen = torch.tensor([2, 0, 1])
    logits(model, ids[:, :6], cache, adapter_names=["plan", "act", "plan"])
    cache.batch_select_indices(chosen)
    alone.feed(ids[:, :6])
    alone.caches = [alone.caches[row] for row in chosen]
    alone.names = [alone.names[row] for row in chosen]
    actual = logits(model, ids[chosen, 6:], cache, adapter_names=alone.names)
    assert_equal_logits(actual, alone.feed(ids[chosen, 6:]))


def test_float32_adapters_on_a_narrower_base_round_as_in_peft(storage):
    """In captured steps ``s B a`` is added in float32 and rounded once; the measure is the same weights in float64."""
    names, ids, start = ["plan", "__base__", "act", "plan"], tokens(12, rows=4), 0
    model = with_adapters(tiny_llama(torch.float32), ["plan", "act"])
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    in_peft, in_float64 = RowsAlone(twin(model), names), RowsAlone(norms_in_float64(twin(model).double()), names)
    ours, peft, exact, cache = [], [], [], SharedLoRACache(sharing="lr_precomputed")
    for size in (7, 1, 1, 1, 1, 1):
        new = ids[:, start : start + size]
        exact.append(in_float64.feed(new))
        peft.append(in_peft.feed(new).double())
        ours.append(logits(model, new, cache, adapter_names=names).double())
        start += size
    assert storage != "captured" or cache.eager_reason is None
    exact, peft, ours = torch.cat(exact, 1), torch.cat(peft, 1), torch.cat(ours, 1)
    for row in range(len(names)):
        assert (ours[row] - exact[row]).norm() < 1.5 * (peft[row] - exact[row]).norm() < 0.03 * exact[row].norm()


def test_assignments_of_adapters_to_rows_leave_nothing_large_behind(storage):
    """A server sees new ones all the time; what is made of the adapters' weights for captured steps does not depend on them."""
    model = with_adapters(tiny_llama(), ["plan", "act", "walk"])
    sizes = []
    for rows in itertools.permutations(["plan", "act", "walk"]):
        cache = SharedLoRACache(model, sharing="lr_precomputed")
        alone, start = RowsAlone(model, rows), 0
        for size in (5, 1, 1, 1):
            new = tokens(8, rows=3)[:, start : start + size]
            ours = logits(model, new, cache, adapter_names=list(rows))
            assert_equal_logits(ours, alone.feed(new))
            start += size
        kept = pickle.dumps(list(attachment_of(model)._weights.values()))
        sizes.append(len(kept))
    assert sizes[-1] < 1.2 * sizes[0], sizes
