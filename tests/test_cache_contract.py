"""What Transformers asks of a ``Cache``, and what the storage promises: rows, lengths, memory, growth."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Cache, DynamicCache

from lora_shared_cache import SharedLoRACache
from lora_shared_cache.buffers import MAX_SLACK, MIN_SLACK, TokenBuffer

from .oracle import LlamaOracle
from .tiny import (
    EXACT,
    activate,
    agents_model,
    assert_equal_logits,
    difference,
    feed,
    logits,
    lora,
    lora_layers,
    ones,
    reference,
    tiny_llama,
    tokens,
    with_adapters,
)

pytestmark = pytest.mark.integration

NAMES = ["plan", "act"]
POLICIES = ["base_shared", "lr_precomputed", "base_lr_shared"]


def take_turn(model, cache, name, ids):
    activate(model, name)
    return logits(model, ids, cache, attention_mask=ones(ids.shape[1], ids.shape[0]))


def used(model, sharing="base_shared", rows=1, **settings):
    """ "plan" has 5 tokens and then 3 more, after 4 of "act"."""
    cache = SharedLoRACache(sharing=sharing, **settings)
    for name, stop in [("plan", 5), ("act", 9), ("plan", 12)]:
        take_turn(model, cache, name, tokens(20, rows=rows)[:, :stop])
    return cache


# ---- the contract ----


def test_an_unused_cache():
    cache = SharedLoRACache()
    assert isinstance(cache, Cache)
    assert cache.get_seq_length() == 0 and cache.get_max_length() == -1
    assert cache.coverage() == {} and cache.policy is None and not cache.is_initialized
    assert cache.memory_footprint()["total"] == 0
    assert "tokens=0" in repr(cache)
    cache.reset()
    cache.crop(0)
    assert len(cache) == 0


def test_what_generate_asks():
    cache = used(agents_model())
    assert cache.is_compileable is False
    assert list(cache.is_sliding) == [False] * 3 and len(cache) == 3
    assert cache.is_initialized and cache.batch_size == 1
    assert cache.get_seq_length() == 12
    assert tuple(cache.get_mask_sizes(4, 0)) == (16, 0)
    for layer in cache.layers:
        assert layer.get_seq_length() == 12 and tuple(layer.get_mask_sizes(4)) == (16, 0)
        assert layer.keys.shape == layer.values.shape == (1, 2, 12, 8)
        assert layer.get_max_length() == -1
    cache.activate_past_recording()
    assert "plan: 12" in repr(cache)


def test_attach_at_construction():
    model = agents_model()
    cache = SharedLoRACache(model)
    assert len(cache.layers) == 3 and cache.get_seq_length() == 0
    assert cache.coverage() == {"__base__": 0, "plan": 0, "act": 0}
    assert_equal_logits(feed(model, tokens(9), cache, [6, 3]), reference(model, tokens(9)))


@pytest.mark.parametrize("n", [1, 13, -13])
def test_crop_refuses_what_it_can_not_mean(n):
    cache = used(agents_model())
    with pytest.raises(ValueError, match=f"crop\\({n}\\)"):
        cache.crop(n)
    assert cache.trajectory_length == 12


def test_layer_crop_and_update_go_through_the_cache():
    model = agents_model()
    cache = used(model)
    cache.layers[0].crop(-2)
    assert cache.trajectory_length == 10
    with pytest.raises(ValueError, match="outside"):
        cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    assert cache.trajectory_length == 10


# ---- rows ----


@pytest.mark.parametrize("sharing", POLICIES)
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["select", "reorder", "repeat"],
)
def test_row_operations_keep_all_agents_right(sharing, change, rows):
    model = agents_model()
    cache = used(model, sharing, rows=3)
    change(cache)
    assert cache.rows == cache.batch_size == len(rows)
    ids = tokens(20, rows=3)
    singles = [SharedLoRACache(sharing=sharing) for _ in range(3)]
    for row, single in enumerate(singles):
        for name, stop in [("plan", 5), ("act", 9), ("plan", 12)]:
            take_turn(model, single, name, ids[row : row + 1, :stop])
    assert torch.equal(cache.token_ids, ids[rows, :12])
    for name, stop in [("plan", 13), ("act", 16), ("plan", 17)]:
        out = take_turn(model, cache, name, ids[rows, :stop])
        expected = [take_turn(model, single, name, ids[r : r + 1, :stop]) for r, single in enumerate(singles)]
        for position, row in enumerate(rows):
            assert_equal_logits(out[position, -1], expected[row][0, -1])


# ---- fork ----


@pytest.mark.parametrize("sharing", POLICIES)
def test_a_deep_copy_is_a_fork(sharing):
    model = agents_model()
    cache = used(model, sharing)
    oracle = LlamaOracle(model, sharing, NAMES)
    for name, stop in [("plan", 5), ("act", 9), ("plan", 12)]:
        oracle.turn((name,), tokens(20)[0, :stop].tolist())
    fork, other_oracle = copy.deepcopy(cache), oracle.fork()
    assert fork.coverage() == cache.coverage() and torch.equal(fork.token_ids, cache.token_ids)
    branches = []
    for seed in (5, 6):
        ids = tokens(20, seed=seed)
        ids[:, :12] = tokens(20)[:, :12]
        branches.append(ids)
    for name, stop in [("act", 14), ("plan", 15), ("act", 18)]:
        for c, o, ids in ((cache, oracle, branches[0]), (fork, other_oracle, branches[1])):
            expected = o.turn((name,), ids[0, :stop].tolist())
            assert_equal_logits(take_turn(model, c, name, ids[:, :stop])[0, -len(expected) :], expected)
    fork.crop(-10)
    fork.reset()
    assert cache.trajectory_length == 18


# ---- dropping adapters ----


def test_drop_adapter_releases_its_entries_and_runs_again():
    model = agents_model()
    for sharing in ("base_shared", "lr_precomputed"):
        cache = used(model, sharing)
        before = cache.memory_footprint()
        assert before["low_rank"]["act"] > 0
        cache.drop_adapter("act")
        after = cache.memory_footprint()
        assert after["low_rank"].get("act", 0) == 0 and after["low_rank"]["plan"] == before["low_rank"]["plan"]
        assert after["base"] == before["base"] and after["allocated"] < before["allocated"]
        assert cache.coverage() == {"__base__": 12, "plan": 12, "act": 0}
        oracle = LlamaOracle(model, sharing, NAMES)
        for name, stop in [("plan", 5), ("act", 9), ("plan", 12)]:
            oracle.turn((name,), tokens(20)[0, :stop].tolist())
        oracle.forget("act")
        expected = oracle.turn(("act",), tokens(20)[0, :14].tolist())
        assert_equal_logits(take_turn(model, cache, "act", tokens(20)[:, :14])[0], expected)


def test_drop_adapter_refuses_an_unknown_name():
    cache = used(agents_model())
    with pytest.raises(ValueError, match="no adapter 'reflect'; known are 'act', 'plan'"):
        cache.drop_adapter("reflect")


def test_drop_adapter_keeps_what_others_share():
    model = agents_model()
    cache = used(model, "base_lr_shared")
    cache.drop_adapter("act")
    assert cache.coverage()["plan"] == 12
    assert_equal_logits(
        take_turn(model, cache, "plan", tokens(20)[:, :14])[0, -2:],
        take_turn(model, used(model, "base_lr_shared"), "plan", tokens(20)[:, :14])[0, -2:],
    )


# ---- memory ----


def ranks(model, name):
    """Columns of ``a`` over all layers, k and v."""
    return sum(
        module.lora_A[name].weight.shape[0]
        for path, module in lora_layers(model)
        if path.endswith(("k_proj", "v_proj")) and name in module.lora_A
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_memory_footprint_counts_what_the_design_says(rows):
    model = agents_model()
    base = 3 * 2 * 2 * 8 * 12 * 8 * rows  # layers, K and V, heads, size, tokens, bytes
    footprint = used(model, "base_shared", rows).memory_footprint()
    assert footprint["base"] == base
    assert footprint["low_rank"] == {
        "plan": ranks(model, "plan") * 12 * 8 * rows,
        "act": ranks(model, "act") * 9 * 8 * rows,
    }
    assert footprint["expanded_keys"] == base // 2
    assert footprint["non_shared"] == 2 * base
    assert footprint["total"] == sum(
        (base, *footprint["low_rank"].values(), footprint["expanded_keys"], footprint["positions"])
    )
    assert footprint["allocated"] >= footprint["total"]
    footprint = used(model, "base_lr_shared", rows).memory_footprint()
    assert footprint["low_rank"] == {"*": ranks(model, "plan") * 12 * 8 * rows}
    footprint = used(model, "lr_precomputed", rows).memory_footprint()
    assert footprint["low_rank"] == {name: ranks(model, name) * 12 * 8 * rows for name in NAMES}


def test_non_shared_is_what_dynamic_caches_take():
    model = agents_model()
    dynamic = DynamicCache(config=model.config)
    logits(model, tokens(12), dynamic)
    one = sum(t.nbytes for layer in dynamic.layers for t in (layer.keys, layer.values))
    assert used(model).memory_footprint()["non_shared"] == 2 * one


def test_expanded_keys_are_released_on_a_switch_to_the_base_model():
    model = agents_model()
    cache = used(model)
    assert cache.memory_footprint()["expanded_keys"] > 0
    activate(model, None)
    logits(model, tokens(20)[:, 12:13], cache)
    assert cache.memory_footprint()["expanded_keys"] == 0


def test_low_rank_dtype_is_that_of_the_entries():
    model = agents_model()
    cache = used(model, low_rank_dtype=torch.float32)
    entries = [b.data.dtype for layer in cache.layers for parts in layer.entries.values() for b in parts.values()]
    assert set(entries) == {torch.float32}
    # Entries rounded to 24 bits, logits of about 3.
    assert 0 < difference(logits(model, tokens(20)[:, 12:14], cache), _fine(model)) < 1e-5


def _fine(model):
    cache = used(model)
    return logits(model, tokens(20)[:, 12:14], cache)


# ---- growth ----


def test_max_cache_len_allocates_once():
    model = agents_model()
    cache = used(model, max_cache_len=20)
    data = [b.data for layer in cache.layers for b in layer.buffers() if b.data is not None]
    pointers = {d.data_ptr() for d in data if d.dim() == 4 and d.shape[-1] == 8}
    assert all(d.shape[-2] == 20 for d in data)
    logits(model, tokens(20)[:, 12:20], cache)
    layers = cache.layers
    assert {b.data.data_ptr() for layer in layers for b in (layer.base_keys, layer.base_values)} <= pointers
    with pytest.raises(ValueError, match="21 tokens, but max_cache_len is 20"):
        logits(model, tokens(1), cache)
    assert cache.trajectory_length == 20 and cache.get_max_length() == 20
    cache.crop(-1)
    logits(model, tokens(20)[:, 19:], cache)
    assert cache.trajectory_length == 20


@pytest.mark.parametrize("length", [1, 10, 500, 5000, 100_000])
def test_slack_is_bounded(length):
    buffer = TokenBuffer(-2)
    buffer.write(0, torch.zeros(1, 1, length, 1))
    assert length <= buffer.capacity <= length + min(max(MIN_SLACK, length // 32), MAX_SLACK)
    assert MAX_SLACK <= 2048 and MIN_SLACK <= 64


def test_growing_copies_rarely(monkeypatch):
    """One token at a time: beside what attention reads meanwhile, what growing copies is little."""
    copied = 0
    original = torch.Tensor.copy_

    def counting(self, source, *args, **kwargs):
        nonlocal copied
        copied += source.numel()
        return original(self, source, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", counting)
    buffer = TokenBuffer(-2)
    n = 4000
    token = torch.zeros(1, 2, 1, 4)
    for position in range(n):
        buffer.write(position, token)
    read = 8 * n * (n + 1) // 2
    assert n * 8 <= copied <= n * 8 + read // 32


@pytest.mark.parametrize("sharing", POLICIES)
def test_decoding_allocates_nothing_of_the_size_of_the_cache(sharing):
    model = agents_model()
    cache = SharedLoRACache(sharing=sharing)
    ids = tokens(300)
    take_turn(model, cache, "plan", ids[:, :260])
    logits(model, ids[:, 260:261], cache)
    pointers = [b.data.data_ptr() for layer in cache.layers for b in layer.buffers() if b.data is not None]
    for position in range(261, 270):
        logits(model, ids[:, position : position + 1], cache)
    assert pointers == [b.data.data_ptr() for layer in cache.layers for b in layer.buffers() if b.data is not None]


def test_buffers_keep_what_was_written_before():
    buffer, generator = TokenBuffer(-2), torch.Generator().manual_seed(0)
    whole = torch.randn(2, 3, 700, 5, generator=generator)
    start = 0
    for size in (1, 2, 60, 1, 1, 100, 535):
        buffer.write(start, whole[:, :, start : start + size])
        start += size
        assert torch.equal(buffer.view(start), whole[:, :, :start])
    buffer.write(10, whole[:, :, 100:120])
    assert torch.equal(buffer.view(30, 10), whole[:, :, 100:120])


def test_offload_and_prefetch_change_no_number():
    model = agents_model()
    cache, other = used(model), used(model)
    for layer in range(3):
        cache.layers[layer].offload()
        cache.layers[layer].prefetch()
    a, b = (logits(model, tokens(20)[:, 12:14], c) for c in (cache, other))
    assert difference(a, b) <= EXACT


def test_a_rank_that_grows_between_adapters():
    """Entries of adapters with different ranks live side by side."""
    model = with_adapters(tiny_llama(), {"plan": lora(r=1, rank_pattern={}), "act": lora(r=9, rank_pattern={})})
    for sharing in ("base_shared", "lr_precomputed"):
        footprint = used(model, sharing).memory_footprint()["low_rank"]
        assert footprint["plan"] == 6 * 12 * 8
        assert footprint["act"] == 9 * 6 * (12 if sharing == "lr_precomputed" else 9) * 8
