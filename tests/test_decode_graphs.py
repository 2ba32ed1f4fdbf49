"""Captured decode steps give the tokens of eager ones: on CUDA with real graphs, on the CPU with an emulation of them.

The emulation runs the captured Python again with everything the host knew at the time of capture, so a length or an adapter
that leaked from the host into a captured step shows here too.
"""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from lora_shared_cache import SharedLoRACache, attach, buffers, detach, graphs, run
from lora_shared_cache.errors import SharedCacheError
from lora_shared_cache.scopes import forward_scope

from .conftest import emulate_graphs
from .tiny import SHAPE, VOCAB, fill_adapter, finish, share_a, tiny_llama, tiny_ministral, tiny_mistral, with_adapters

pytestmark = pytest.mark.integration

AGENTS = ("plan", "act", "reflect")
cuda = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.fixture(params=["cpu", cuda])
def device(request, monkeypatch):
    if request.param == "cpu":
        emulate_graphs(monkeypatch, graphs)
    else:
        count_graphs(monkeypatch)
    return request.param


def count_graphs(monkeypatch) -> None:
    class Counting(graphs.CudaGraph):
        captures = replays = 0

        def __init__(self, run, pool, device):
            super().__init__(run, pool, device)
            Counting.captures += 1

        def replay(self):
            Counting.replays += 1
            return super().replay()

    monkeypatch.setattr(graphs, "CudaGraph", Counting)


def model_on(device: str, build=tiny_llama, **settings):
    shape = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    dtype = torch.float64 if device == "cpu" else torch.float32
    return with_adapters(build(dtype, **{**shape, **settings}), AGENTS).to(device)


def prompt(device: str, rows: int = 1, n: int = 9, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (rows, n), generator=generator).to(device)


def generate(model, ids, cache, new: int = 20, **options):
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)


def both(**options) -> tuple[SharedLoRACache, SharedLoRACache]:
    return SharedLoRACache(**options), SharedLoRACache(**options, cuda_graphs=False)


def turns(model, cache, ids, agents, new: int = 20, between=lambda cache, ids: ids, **options) -> torch.Tensor:
    for agent in agents:
        model.set_adapter(agent)
        ids = generate(model, ids, cache, new, **options)
        ids = between(cache, ids)
    return ids


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
@pytest.mark.parametrize("max_cache_len", [None, 700])
def test_two_hundred_tokens_of_three_adapters_in_turn(device, sharing, max_cache_len):
    model = model_on(device)
    captured, eager = both(sharing=sharing, max_cache_len=max_cache_len)
    agents = (*AGENTS, *AGENTS)
    expected = turns(model, eager, prompt(device), agents, new=34)
    actual = turns(model, captured, prompt(device), agents, new=34)
    assert torch.equal(actual, expected) and actual.shape[1] > 200
    assert len(set(actual[0].tolist())) > 10, "a constant text would show nothing"
    assert captured.eager_reason is None
    # The first step of each agent runs by itself, every other token but the prompt's comes from a replay.
    assert graphs.CudaGraph.replays >= 6 * 33 - 3 - 6
    assert graphs.CudaGraph.captures == 3


@pytest.mark.parametrize("sharing", ["lr_precomputed", "base_shared"])
def test_joined_down_projections_that_all_agents_need_exist_once(device, sharing):
    model = model_on(device)
    captured, _ = both(sharing=sharing)
    turns(model, captured, prompt(device), AGENTS * 2)
    steps = list(captured._graphs._steps.values())
    assert len(steps) == 3
    attention = model.get_base_model().model.layers[0].self_attn
    groups = [step.products.groups for step in steps]
    k, v, q = (id(getattr(attention, name)) for name in ("k_proj", "v_proj", "q_proj"))
    joined = [step.products._stacked[id(g[k])][0] for step, g in zip(steps, groups, strict=True)]
    assert all(g[k] is g[v] for g in groups)
    assert all((g[q] is g[k]) == (sharing == "base_shared") for g in groups)
    assert len({weight.data_ptr() for weight in joined}) == (1 if sharing == "lr_precomputed" else 3)
    if sharing == "lr_precomputed":
        # Not a copy of what passes of several tokens multiply with, either.
        apart = {weight.untyped_storage().data_ptr() for _, weight in groups[0][k]}
        assert apart == {joined[0].untyped_storage().data_ptr()}


def test_storage_that_grows_is_captured_again(device, monkeypatch):
    monkeypatch.setattr(graphs, "_MIN_ROOM", 16)
    monkeypatch.setattr(buffers, "MIN_SLACK_ON_CUDA", 16)
    monkeypatch.setattr(graphs, "_FIRST_ROOM", 0)
    model = model_on(device)
    captured, eager = both()
    ids = prompt(device)
    expected = turns(model, eager, ids, AGENTS[:2], new=90)
    assert torch.equal(turns(model, captured, ids, AGENTS[:2], new=90), expected)
    assert 2 < graphs.CudaGraph.captures < 12
    assert captured.eager_reason is None


def test_crop_between_turns(device):
    model = model_on(device)

    def drop(cache, ids):
        cache.crop(-5)
        return torch.cat((ids[:, : cache.trajectory_length], prompt(device, n=3, seed=ids.shape[1])), dim=1)

    captured, eager = both(sharing="lr_precomputed")
    expected = turns(model, eager, prompt(device), AGENTS * 2, between=drop)
    assert torch.equal(turns(model, captured, prompt(device), AGENTS * 2, between=drop), expected)
    assert graphs.CudaGraph.captures == 3


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "build, sharing", [(tiny_llama, "lr_precomputed"), (tiny_ministral, "lr_precomputed"), (tiny_llama, "base_shared")]
)
def test_a_few_new_tokens_are_run_as_captured_steps(device, build, sharing, rows, monkeypatch):
    model = model_on(device, build)
    in_steps = []
    original = run._run_in_steps
    monkeypatch.setattr(run, "_run_in_steps", lambda now, kwargs: in_steps.append(now) or original(now, kwargs))
    ids = prompt(device, rows=rows, n=12)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :5] = 0

    def episode(cache):
        text, seen = ids, mask
        for agent in (*AGENTS, *AGENTS, "reflect"):
            model.set_adapter(agent)
            text = generate(model, text, cache, new=6, attention_mask=seen)
            text = torch.cat((text, prompt(device, rows=rows, n=3, seed=text.shape[1])), dim=1)
            seen = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
        with torch.no_grad():
            logits = model(text[:, -4:], attention_mask=seen, past_key_values=cache).logits
        return text, logits

    captured, eager = both(sharing=sharing, max_cache_len=200)
    expected = episode(eager)
    assert not in_steps
    text, logits = episode(captured)
    assert torch.equal(text, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=0, atol=1e-12 if device == "cpu" else 1e-4)
    # One token that is not cached yet and three new ones. Tokens that an agent must run again are run at once. The third time
    # such a pass of one agent is a block of its own, without padding and sliding layers.
    blocks = rows == 1 and build is tiny_llama
    expected = ([4, 4, 4] if blocks else [4, 4, 4, 4]) if sharing == "lr_precomputed" else [4]
    assert [now.stop - now.start for now in in_steps] == expected
    assert captured.coverage() == eager.coverage() and captured.eager_reason is None


class Blocks:
    """Which blocks ran, and how many were captured."""

    def __init__(self, monkeypatch):
        self.ran = []
        original = graphs.DecodeGraphs._step

        def step(graphs, now, kwargs):
            if now.block:
                self.ran.append((now.block, now.stop - now.start))
            return original(graphs, now, kwargs)

        monkeypatch.setattr(graphs.DecodeGraphs, "_step", step)


@pytest.fixture
def blocks(monkeypatch):
    return Blocks(monkeypatch)


def passes(model, cache, lengths, agents, rows: int = 1, **options) -> list[torch.Tensor]:
    """Hidden states' logits of passes of so many new tokens, by agents in turn."""
    text, found = prompt("cpu", rows, 12).to(model.device), []
    with torch.no_grad():
        for i, n in enumerate([0, *lengths]):
            model.set_adapter(agents[i % len(agents)])
            new = prompt("cpu", rows, n, seed=i).to(model.device) if n else text
            text = torch.cat((text, new), dim=1) if n else text
            found.append(model(new, past_key_values=cache, attention_mask=torch.ones_like(text), **options).logits)
    return found


def tiny_qwen3(dtype: torch.dtype, **settings) -> Qwen3ForCausalLM:
    return finish(Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, **settings})), dtype)


@pytest.mark.parametrize(
    "build, sharing, rows",
    [(tiny_llama, "lr_precomputed", 1), (tiny_llama, "base_lr_shared", 2), (tiny_llama, "base_shared", 1),
     (tiny_qwen3, "lr_precomputed", 2)],
)  # fmt: skip
def test_blocks_of_tokens_that_come_again(device, build, sharing, rows, blocks):
    model = model_on(device, build)
    agents = AGENTS if sharing == "lr_precomputed" else ("plan",)
    if sharing == "base_lr_shared":
        share_a(model, AGENTS)
        agents = AGENTS
    lengths = [5, 9, 16, 7, 7, 6, 1, 3, 2, 13, 11, 10, 20, 4]
    captured, eager = both(sharing=sharing, max_cache_len=300)
    expected = passes(model, eager, lengths, agents, rows)
    assert not blocks.ran
    found = passes(model, captured, lengths, agents, rows)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 if device == "cpu" else 1e-4)
    of_sixteen = [n for size, n in blocks.ran if size == 16]
    assert of_sixteen == ([7, 7, 6, 13, 11, 10] if len(agents) == 3 else [9, 16, 7, 7, 6, 13, 11, 10])
    assert captured.coverage() == eager.coverage()
    # Decode steps and other lengths go on from where a block ended, not from where its graph did.
    text = captured.token_ids
    assert torch.equal(generate(model, text, captured), generate(model, text, eager))


def test_blocks_of_private_layers_and_back_again(device, blocks):
    model = model_on(device)
    captured, eager = both(sharing="base_shared", private_layers=[0], max_cache_len=200)
    lengths = [5, 6, 7, 8]
    for cache in (captured, eager):
        passes(model, cache, lengths, ("act",))
        cache.crop(-9)
    assert [n for _, n in blocks.ran] == [6, 7, 8]
    text = torch.cat((captured.token_ids, prompt(device, n=6)), dim=1)
    assert torch.equal(generate(model, text, captured), generate(model, text, eager))


def test_blocks_are_not_captured_where_the_storage_moves(device, blocks):
    model = model_on(device)
    captured, eager = both(sharing="lr_precomputed")
    n = 100 if device == "cpu" else 300  # more than growing storage has to spare
    found, expected = (passes(model, cache, [n] * 4, ("plan",)) for cache in (captured, eager))
    torch.testing.assert_close(found[-1], expected[-1], rtol=0, atol=1e-12 if device == "cpu" else 1e-4)
    assert not blocks.ran


def test_no_block_beyond_the_end_of_the_storage(device, blocks):
    model = model_on(device)
    captured, eager = both(sharing="lr_precomputed", max_cache_len=12 + 5 * 5 + 3)
    found, expected = (passes(model, cache, [5] * 5, ("plan",)) for cache in (captured, eager))
    torch.testing.assert_close(found[-1], expected[-1], rtol=0, atol=1e-12 if device == "cpu" else 1e-4)
    assert blocks.ran == [(16, 5), (16, 5)]  # 22 + 16 tokens fit, 27 + 16 do not


@pytest.mark.parametrize("why", ["padding", "window", "rows", "off"])
def test_passes_that_are_no_blocks(device, why, blocks):
    model = model_on(device, tiny_ministral if why == "window" else tiny_llama)
    cache = SharedLoRACache(sharing="base_shared", max_cache_len=200, cuda_graphs=why != "off")
    text = prompt(device, 2, 12)
    mask = torch.ones_like(text)
    if why == "padding":
        mask[0, :3] = 0
    options = dict(adapter_names=["plan", "act"]) if why == "rows" else {}
    for i in range(4):
        text = generate(model, text, cache, 2, attention_mask=mask, **options)
        text = torch.cat((text, prompt(device, 2, 6, seed=i)), dim=1)
        mask = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
    assert not blocks.ran


def test_a_block_that_fails_leaves_nothing_behind(device, monkeypatch):
    model = model_on(device)
    captured, eager = both(sharing="lr_precomputed", max_cache_len=300)
    lengths = [6, 7, 8, 6]
    for cache in (captured, eager):
        passes(model, cache, lengths, ("plan",))
    before = captured.trajectory_length, captured.coverage(), captured.memory_footprint()
    text = torch.cat((captured.token_ids, prompt(device, n=7)), dim=1)

    def fails(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(graphs.DecodeGraphs, "_fresh", fails)
        with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad():
            model(text[:, -7:], attention_mask=torch.ones_like(text), past_key_values=captured)
    assert (captured.trajectory_length, captured.coverage(), captured.memory_footprint()) == before
    assert torch.equal(generate(model, text, captured), generate(model, text, eager))


def test_a_few_new_tokens_that_fail_leave_nothing_behind(device, monkeypatch):
    model = model_on(device)
    captured, eager = both(sharing="lr_precomputed", max_cache_len=200)
    ids = turns(model, captured, prompt(device), AGENTS)
    assert torch.equal(turns(model, eager, prompt(device), AGENTS), ids)
    text = torch.cat((ids, prompt(device, n=3)), dim=1)
    before = captured.trajectory_length, captured.coverage(), captured.memory_footprint()
    original = graphs.DecodeGraphs._step

    def fails(self, now, kwargs):
        if now.start == text.shape[1] - 2:
            raise RuntimeError("out of memory")
        return original(self, now, kwargs)

    monkeypatch.setattr(graphs.DecodeGraphs, "_step", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, text, captured)
    assert (captured.trajectory_length, captured.coverage(), captured.memory_footprint()) == before
    monkeypatch.setattr(graphs.DecodeGraphs, "_step", original)
    assert torch.equal(generate(model, text, captured), generate(model, text, eager))


def test_two_caches_alternate_on_one_model(device):
    model = model_on(device)
    pairs = [both(max_cache_len=200), both()]
    texts = [[prompt(device, n=7, seed=s)] * 2 for s in (1, 2)]
    for agent in AGENTS:
        model.set_adapter(agent)
        for pair, text in zip(pairs, texts, strict=True):
            text[:] = [generate(model, ids, cache) for cache, ids in zip(pair, text, strict=True)]
    for captured, eager in texts:
        assert torch.equal(captured, eager)
    assert graphs.CudaGraph.captures == 6


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_rows_with_adapters_of_their_own(device, sharing):
    model = model_on(device)
    captured, eager = both(sharing=sharing)
    texts = []
    for cache in (captured, eager):
        ids = prompt(device, rows=4)
        for names in (["plan", "act", "__base__", "plan"], ["act"] * 4, ["plan", "act", "__base__", "plan"]):
            ids = generate(model, ids, cache, adapter_names=names)
        texts.append(ids)
    assert torch.equal(*texts)
    assert captured.eager_reason is None
    assert graphs.CudaGraph.captures == 2 and graphs.CudaGraph.replays >= 3 * 18 - 2


@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_four_rows_with_left_padding(device, sharing):
    model = model_on(device)
    ids = prompt(device, rows=4, n=12)
    mask = torch.ones_like(ids)
    for row, n in enumerate((0, 3, 7, 1)):
        mask[row, :n] = 0
        ids[row, :n] = 0

    def run(cache):
        text, seen = ids, mask
        for agent in AGENTS:
            model.set_adapter(agent)
            text = generate(model, text, cache, attention_mask=seen)
            seen = torch.cat((seen, seen.new_ones(4, text.shape[1] - seen.shape[1])), dim=1)
        return text

    captured, eager = both(sharing=sharing)
    expected = run(eager)
    assert torch.equal(run(captured), expected)
    assert captured.eager_reason is None and graphs.CudaGraph.captures == 3
    assert len({tuple(row) for row in expected[:, 12:].tolist()}) == 4


def test_a_short_padded_prompt_on_a_cache_that_was_emptied(device):
    """Steps that were captured for another padded text are no steps of one that begins."""
    model = model_on(device)
    ids = prompt(device, rows=3, n=3)
    mask = torch.ones_like(ids)
    mask[2, :2] = 0

    def run(cache):
        text = generate(model, ids, cache, new=5, attention_mask=mask)
        cache.reset()
        generate(model, ids[:2], cache, new=5)
        cache.reset()
        return torch.cat((text, generate(model, ids, cache, new=5, attention_mask=mask)))

    captured, eager = both(max_cache_len=50)
    assert torch.equal(run(captured), run(eager)) and captured.eager_reason is None


def test_weights_changed_between_turns(device):
    """In place, behind PyTorch's back; what the old weights left is dropped and the step captured again."""
    model = model_on(device)
    captured, eager = both()

    def run(cache):
        fill_adapter(model, "plan", 0)
        text = turns(model, cache, prompt(device), ["plan"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".plan." in name and "lora_B" in name:
                    parameter.data.mul_(-1.5)
        return turns(model, cache, text, ["plan"])

    expected = run(eager)
    assert torch.equal(run(captured), expected)
    assert graphs.CudaGraph.captures == 2


def test_base_weights_that_moved_are_noticed(device):
    model = model_on(device)
    captured, eager = both()
    ids = turns(model, captured, prompt(device), ["plan"])
    assert torch.equal(turns(model, eager, prompt(device), ["plan"]), ids)
    layer = model.get_base_model().model.layers[0].mlp.gate_proj.base_layer
    old = layer.weight.data
    layer.weight.data = old * 1.1
    old.fill_(float("nan"))
    assert torch.equal(generate(model, ids, captured), generate(model, ids, eager))


def test_base_model_and_several_adapters_are_agents_too(device):
    model = model_on(device)

    def run(cache):
        model.set_adapter("plan")
        text = generate(model, prompt(device), cache)
        with model.disable_adapter():
            text = generate(model, text, cache)
        model.base_model.set_adapter(["act", "reflect"])
        text = generate(model, text, cache)
        model.set_adapter("plan")
        return generate(model, text, cache)

    captured, eager = both()
    assert torch.equal(run(captured), run(eager))
    assert graphs.CudaGraph.captures == 3


@pytest.mark.parametrize("private", [(1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("max_cache_len", [None, 300])
def test_private_layers(device, private, max_cache_len):
    model = model_on(device)

    def run(cache):
        text = turns(model, cache, prompt(device), AGENTS)
        with model.disable_adapter():
            text = generate(model, text, cache)
        return turns(model, cache, text, AGENTS[:2])

    captured, eager = both(private_layers=private, max_cache_len=max_cache_len)
    expected = run(eager)
    assert torch.equal(run(captured), expected) and len(set(expected[0].tolist())) > 10
    assert captured.eager_reason is None and graphs.CudaGraph.captures == 4
    assert graphs.CudaGraph.replays >= 6 * 19 - 4 - 6
    # In a private layer k_proj and v_proj are computed as any other LoRA layer of such a step, with q_proj.
    attention = model.get_base_model().model.layers[1].self_attn
    projections = [id(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj")]
    for key, step in captured._graphs._steps.items():
        group = step.products.groups.get(projections[1], [])
        assert [module for module, _ in group] == (projections if key[0] else [])
        if key[0]:
            # The active adapter's own A, not those of all whose entries would be written.
            assert group[1][1] is attention.k_proj.lora_A[key[0][0]].weight


def test_private_layers_with_four_rows_and_padding(device):
    model = model_on(device)
    ids = prompt(device, rows=4, n=12)
    mask = torch.ones_like(ids)
    for row, n in enumerate((0, 3, 7, 1)):
        mask[row, :n] = 0

    def run(cache):
        text, seen = ids, mask
        for agent in (*AGENTS[:2], AGENTS[0]):
            model.set_adapter(agent)
            text = generate(model, text, cache, attention_mask=seen)
            seen = torch.cat((seen, seen.new_ones(4, text.shape[1] - seen.shape[1])), dim=1)
        return text

    captured, eager = both(private_layers=[0, 2])
    expected = run(eager)
    assert torch.equal(run(captured), expected)
    assert captured.eager_reason is None and graphs.CudaGraph.captures == 2


def test_sliding_window_and_loops_without_generate(device):
    model = model_on(device, tiny_mistral, sliding_window=6)
    captured, eager = both(max_cache_len=100)
    with torch.no_grad():
        for cache in (captured, eager):
            model(prompt(device), past_key_values=cache)
        for step in range(12):
            ids = prompt(device, n=1, seed=step)
            expected = model(ids, past_key_values=eager).logits
            torch.testing.assert_close(model(ids, past_key_values=captured).logits, expected, atol=2e-4, rtol=2e-4)
    assert graphs.CudaGraph.captures == 1 and graphs.CudaGraph.replays == 11


@pytest.mark.parametrize("max_cache_len", [None, 100])
def test_sliding_layers_let_go_of_tokens_between_captured_steps(device, max_cache_len, monkeypatch):
    """In place: nothing is captured again for it. An agent that comes back finds its last tokens elsewhere."""
    monkeypatch.setattr(buffers, "MIN_MARGIN", 3)
    model = model_on(device, tiny_ministral, sliding_window=6)
    captured, eager = both(max_cache_len=max_cache_len, sharing="base_shared")
    ids = prompt(device, rows=2, n=12)
    mask = torch.ones_like(ids)
    mask[1, :5] = ids[1, :5] = 0

    def run(cache):
        text, seen = ids, mask
        for agent in ("plan", "act", "plan"):
            model.set_adapter(agent)
            text = generate(model, text, cache, attention_mask=seen, new=20)
            seen = torch.cat((seen, seen.new_ones(2, text.shape[1] - seen.shape[1])), dim=1)
        return text

    expected = run(eager)
    assert torch.equal(run(captured), expected)
    assert captured.eager_reason is None and graphs.CudaGraph.replays >= 3 * 16
    assert graphs.CudaGraph.captures <= 3
    for cache in (captured, eager):
        assert all(layer.keys.shape[2] <= 12 for layer in cache.layers if layer.is_sliding)


def test_logits_of_a_step_survive_the_next(device):
    model = model_on(device)
    captured, eager = both()
    ids = prompt(device)
    options = dict(return_dict_in_generate=True, output_logits=True, new=8)
    ours, expected = generate(model, ids, captured, **options), generate(model, ids, eager, **options)
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), atol=2e-4, rtol=2e-4)
    assert ours.past_key_values is captured
    with torch.no_grad():
        steps = [model(prompt(device, n=1, seed=s), past_key_values=captured, use_cache=True) for s in range(3)]
        kept = [step.logits.clone() for step in steps]
        model(prompt(device, n=1, seed=9), past_key_values=captured)
    assert all(torch.equal(step.logits, logits) for step, logits in zip(steps, kept, strict=True))


def test_sampling_streaming_and_stopping(device):
    model = model_on(device)

    class Tokenizer:
        def decode(self, ids, **options):
            return " ".join(map(str, ids)) + " "

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **options):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 21, device=input_ids.device)

    def run(cache):
        torch.manual_seed(5)
        streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True)
        ids = prompt(device)
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=40, do_sample=True, top_k=20,
            streamer=streamer, stopping_criteria=StoppingCriteriaList([Stop()]), pad_token_id=0,
        )  # fmt: skip
        return text, "".join(streamer)

    (ours, streamed), (expected, _) = (run(cache) for cache in both())
    assert torch.equal(ours, expected) and ours.shape[1] == 21
    assert streamed.split() == [str(t) for t in ours[0, 9:].tolist()]
    assert graphs.CudaGraph.replays == 10


def test_beam_search(device):
    model = model_on(device)
    ids = prompt(device)
    captured, eager = (generate(model, ids, cache, num_beams=3) for cache in both())
    assert torch.equal(captured, eager)


def test_a_full_cache_refuses_before_anything_is_overwritten(device):
    model = model_on(device)
    cache = SharedLoRACache(max_cache_len=20)
    ids = prompt(device, n=9)
    last = generate(model, ids, cache, new=12)[:, -1:]
    with pytest.raises(SharedCacheError, match="21 tokens, but max_cache_len is 20"):
        model(input_ids=last, past_key_values=cache)
    assert cache.trajectory_length == 20
    text = torch.cat((ids, prompt(device, n=1)), dim=1)
    fresh = SharedLoRACache(cuda_graphs=False)
    cache.crop(-11)
    assert torch.equal(generate(model, text, cache, new=8), generate(model, text, fresh, new=8))


def test_reset_and_copies(device):
    model = model_on(device)
    captured, eager = both(max_cache_len=100)
    ids = turns(model, captured, prompt(device), ["plan", "act"])
    clone = copy.deepcopy(captured)
    assert clone.cuda_graphs and not copy.deepcopy(eager).cuda_graphs
    assert torch.equal(generate(model, ids, clone), generate(model, ids, captured))
    captured.reset()
    assert torch.equal(turns(model, captured, prompt(device), ["plan", "act"]), ids)


def test_detaching_drops_the_graphs(device):
    model = model_on(device)
    cache = SharedLoRACache()
    ids = turns(model, cache, prompt(device), ["plan"])
    assert cache._graphs._steps
    detach(model)
    assert not cache._graphs._steps
    attach(model)
    fresh = SharedLoRACache(cuda_graphs=False)
    assert torch.equal(generate(model, ids, cache), generate(model, ids, fresh))


# ---- where steps are not captured ----------------------------------------------------------------------------------


def refusal(model, cache, caplog, **options) -> str:
    with caplog.at_level(logging.INFO, logger="lora_shared_cache.graphs"):
        ids = generate(model, prompt(str(model.device)), cache, new=6, **options)
        ids = ids if isinstance(ids, torch.Tensor) else ids.sequences
        generate(model, ids, cache, new=6, **options)
    messages = [r.getMessage() for r in caplog.records if r.name == "lora_shared_cache.graphs"]
    assert len(messages) <= 1, "said once"
    assert graphs.CudaGraph.replays == 0 or not messages
    return messages[0] if messages else ""


def test_says_once_that_the_model_is_not_on_cuda(caplog, monkeypatch):
    monkeypatch.setattr(graphs.CudaGraph, "replays", 0, raising=False)
    model = model_on("cpu")
    cache = SharedLoRACache()
    assert "CUDA graphs need the model on CUDA, it is on cpu" in refusal(model, cache, caplog)
    assert caplog.records[-1].levelno == logging.INFO
    assert "on cpu" in cache.eager_reason
    assert SharedLoRACache(cuda_graphs=False).eager_reason is None


def test_switched_off(device, caplog):
    cache = SharedLoRACache(cuda_graphs=False)
    assert refusal(model_on(device), cache, caplog) == ""
    assert cache.eager_reason is None and graphs.CudaGraph.captures == 0


def test_hooks_of_others_are_called(device, caplog):
    model = model_on(device)
    calls = []
    handle = model.get_base_model().model.layers[1].register_forward_hook(lambda *a: calls.append(1))
    cache = SharedLoRACache()
    assert "hooks" in refusal(model, cache, caplog)
    assert len(calls) == 12
    handle.remove()
    generate(model, cache.token_ids.clone(), cache, new=6)
    assert cache.eager_reason is None and graphs.CudaGraph.replays > 0


def test_hidden_states(device, caplog):
    model = model_on(device)
    cache = SharedLoRACache()
    options = dict(return_dict_in_generate=True, output_hidden_states=True)
    assert "output_hidden_states was asked for" in refusal(model, cache, caplog, **options)
    ids = cache.token_ids.clone()
    assert len(generate(model, ids, cache, new=6, **options).hidden_states[1]) == 4
    # Transformers' own hooks, which are there from then on, do nothing and are no obstacle.
    generate(model, cache.token_ids.clone(), cache, new=6)
    assert cache.eager_reason is None


def test_a_model_that_asks_the_device_for_a_number(device, caplog, monkeypatch):
    model = model_on(device)
    norm = model.get_base_model().model.norm
    original = type(norm).forward

    def forward(self, x):
        return original(self, x) + 0 * float(x.abs().max() > 1e9)

    class CannotBeCaptured:
        replays = 0

        def __init__(self, run, pool, device):
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    works = graphs.CudaGraph
    if device == "cpu":
        monkeypatch.setattr(graphs, "CudaGraph", CannotBeCaptured)
    monkeypatch.setattr(type(norm), "forward", forward)
    cache = SharedLoRACache()
    message = refusal(model, cache, caplog)
    assert "the model can't be captured" in message and "capturing" in message
    monkeypatch.setattr(type(norm), "forward", original)
    fresh = SharedLoRACache(cuda_graphs=False)
    ids = turns(model, fresh, prompt(device), ["plan", "plan"], new=6)
    assert torch.equal(cache.token_ids, ids[:, :-1])
    # A capture that broke off leaves nothing behind: another agent's step is captured.
    monkeypatch.setattr(graphs, "CudaGraph", works)
    expected, text = (turns(model, c, ids, ["act"], new=6) for c in (fresh, cache))
    assert torch.equal(text, expected) and cache.eager_reason is None and works.captures == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_garbage_is_collected_during_a_capture(monkeypatch):
    # What is collected may be another cache's graph, and freeing one breaks the capture off.
    original, seen = graphs.DecodeGraphs._static_pass, []

    def looking(self, *args):
        seen.append((torch.cuda.is_current_stream_capturing(), gc.isenabled()))
        return original(self, *args)

    monkeypatch.setattr(graphs.DecodeGraphs, "_static_pass", looking)
    model = model_on("cuda")
    generate(model, prompt("cuda"), SharedLoRACache(), new=6)
    assert seen == [(False, True), (True, False)]
    assert gc.isenabled()


@pytest.mark.parametrize("returns", [tuple, dict])
def test_outputs_that_are_not_known(device, caplog, monkeypatch, returns):
    """A tuple, or a field that is no tensor: said once, and no step runs twice after that."""
    model = model_on(device)
    decoder = type(model.get_base_model().model)
    original, runs = decoder.forward, []

    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        runs.append(1)
        if returns is dict:
            out["hidden_states"] = (out.last_hidden_state,)
            return out
        return out if forward_scope.get() is None or forward_scope.get().slot is None else out.to_tuple()

    monkeypatch.setattr(decoder, "forward", forward)
    cache = SharedLoRACache()
    message = refusal(model, cache, caplog)
    assert "the model returns" in message
    # Two turns of six tokens, of which the first step was tried and run again.
    assert len(runs) == 13


def test_storage_that_changes_at_every_step_is_given_up(device, caplog):
    model = model_on(device)
    cache = SharedLoRACache()
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="lora_shared_cache.graphs"):
        model(prompt(device, rows=2), past_key_values=cache)
        for step in range(30):
            model(prompt(device, rows=2, n=1, seed=step), past_key_values=cache)
            for layer in cache.layers:
                for buffer in layer.buffers():
                    if buffer.data is not None:
                        buffer._replace(buffer.data.clone())
    assert graphs.CudaGraph.captures < 12
    assert "change at every step" in cache.eager_reason
