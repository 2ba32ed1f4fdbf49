"""Captured steps that are replayed before they are checked: whatever happens inside of ``generate``, the text is the same.

Somebody interferes from inside (a stopping criterion is called after each token); the cache without graphs shows what then
is right, tokens or an error.
"""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lora_shared_cache import SharedLoRACache, attach, graphs
from lora_shared_cache.ahead import StepsAhead

from .test_decode_graphs import both, device, generate, model_on, prompt, turns  # noqa: F401
from .tiny import fill_adapter, tiny_ministral, with_adapters

pytestmark = pytest.mark.integration


class Interference(StoppingCriteria):
    """Calls ``act`` after the n-th token of a ``generate`` call, and ``undo`` two tokens later."""

    def __init__(self, act, at: int, undo=lambda: None):
        self.act, self.undo, self.at, self.tokens = act, undo, at, 0

    def __call__(self, input_ids, scores, **options):
        self.tokens += 1
        if self.tokens == self.at:
            self.act()
        if self.tokens == self.at + 2:
            self.undo()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Listener(BaseStreamer):
    """The same between two steps: a streamer is told a token after the stopping criteria, before its pass is prepared."""

    def __init__(self, act, at: int, undo=lambda: None):
        self.interference = Interference(act, at + 1, undo)  # it is given the prompt first

    @property
    def tokens(self):
        return self.interference.tokens - 1

    def put(self, value):
        self.interference(torch.zeros(1, 1), None)

    def end(self):
        pass


@pytest.fixture
def ahead(monkeypatch):
    """For each step that was replayed ahead, whether it was used."""
    used = []
    replay, take = StepsAhead._replay, StepsAhead.take

    def counted(self, *args, **options):
        replay(self, *args, **options)
        used.append(False)

    def taken(self, *args):
        found = take(self, *args)
        if found is not None:
            used[-1] = True
        return found

    monkeypatch.setattr(StepsAhead, "_replay", counted)
    monkeypatch.setattr(StepsAhead, "take", taken)
    return used


@pytest.fixture(params=["from the choice of a token on", "once its pass is there"])
def moment(request, monkeypatch):
    """When steps are replayed; a call that gives stopping criteria by position has no other choice than the second."""
    if request.param == "once its pass is there":
        monkeypatch.setattr(StepsAhead, "start", lambda *_: None)
    return request.param


@pytest.mark.parametrize("rows, padded", [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("build", [None, tiny_ministral])
def test_most_steps_are_replayed_ahead(device, ahead, moment, rows, padded, build):  # noqa: F811
    model = model_on(device) if build is None else model_on(device, build)
    ids = prompt(device, rows=rows)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0

    def run(cache):
        text, seen = ids, mask
        for agent in ("plan", "act", "plan"):
            model.set_adapter(agent)
            text = generate(model, text, cache, new=12, attention_mask=seen)
            seen = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
        return text

    captured, eager = both(sharing="lr_precomputed", max_cache_len=100)
    expected = run(eager)
    assert not ahead
    assert torch.equal(run(captured), expected)
    # An agent's first step runs, its second is captured. In later turns the prompt's pass is a step as well: one new token.
    # Once the window's layers let go of tokens, after which their first one has to be asked for.
    assert all(ahead) and len(ahead) == (11 - 2) + (12 - 2) + (12 - 1) - (build is not None)


def test_nothing_is_replayed_ahead_outside_of_generate(device, ahead):  # noqa: F811
    """There anything may have happened between two calls."""
    model = model_on(device)
    cache = SharedLoRACache(max_cache_len=100)
    ids = prompt(device)
    with torch.no_grad():
        for start, stop in ((0, 4), *((n, n + 1) for n in range(4, 9))):
            model(input_ids=ids[:, start:stop], past_key_values=cache)
    assert graphs.CudaGraph.replays == 4 and not ahead
    ids = generate(model, ids, cache, new=6)
    assert ahead and all(ahead)
    before = len(ahead)
    with torch.no_grad():
        model(input_ids=ids[:, -1:], past_key_values=cache)
    assert len(ahead) == before and cache._graphs.ahead.expected is None


def scale(model, factor, name="plan"):
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".{name}." in path and "lora_B" in path:
                parameter.mul_(factor)


def move(model):
    """The same weights at other addresses, and nothing that could be read where they were."""
    for path, parameter in model.named_parameters():
        if ".plan." in path:
            old = parameter.data
            parameter.data = old.clone()
            old.fill_(float("nan"))


def interferences(model, cache):
    o_proj = model.get_base_model().model.layers[1].self_attn.o_proj
    hooks = []
    return {
        "another adapter": (lambda: model.set_adapter("act"), lambda: model.set_adapter("plan")),
        "no adapter": (model.base_model.disable_adapter_layers, model.base_model.enable_adapter_layers),
        "changed in place": (lambda: scale(model, 1.5), lambda: None),
        "changed and back": (lambda: scale(model, 2.0), lambda: scale(model, 0.5)),
        "scaling": (lambda: o_proj.scaling.update(plan=3.0), lambda: o_proj.scaling.update(plan=1.0)),
        "moved": (lambda: move(model), lambda: None),
        "hook": (
            lambda: hooks.append(o_proj.register_forward_hook(lambda module, args, out: 2 * out)),
            lambda: hooks.pop().remove(),
        ),
        "training": (model.train, model.eval),
        "merged": (lambda: model.merge_adapter(["plan"]), model.unmerge_adapter),
        "newcomer": (lambda: model.add_adapter("new", model.peft_config["plan"]), lambda: None),
        "deleted": (lambda: model.delete_adapter("reflect"), lambda: None),
        "dropped": (lambda: cache.drop_adapter("act"), lambda: None),
        "cropped": (lambda: cache.crop(-2), lambda: None),
        "emptied": (cache.reset, lambda: None),
    }


KINDS = (
    "another adapter", "no adapter", "changed in place", "changed and back", "scaling", "moved", "hook", "training", "merged",
    "newcomer", "deleted", "dropped", "cropped", "emptied",
)  # fmt: skip


@pytest.mark.parametrize(
    "kind, sharing",
    [
        *((kind, "lr_precomputed") for kind in KINDS),
        *((kind, "base_shared") for kind in KINDS[:3]),
        ("moved", "base_shared"),
    ],
)
@pytest.mark.parametrize("when", ["as a criterion", "as a streamer"])
def test_interference(device, ahead, kind, sharing, when):  # noqa: F811
    def run(cache):
        torch.manual_seed(1)
        model = model_on(device)
        text = turns(model, cache, prompt(device), ["plan", "act", "plan"], new=8)
        act, undo = interferences(model, cache)[kind]
        if when == "as a criterion":
            stop = Interference(act, 5, undo)
            options = dict(stopping_criteria=StoppingCriteriaList([stop]))
        else:
            stop = Listener(act, 5, undo)
            options = dict(streamer=stop)
        try:
            text = generate(model, text, cache, new=12, **options)
            error = None
        except ValueError as refused:
            error = f"{type(refused).__name__}: {refused}"
        if stop.tokens == 5:
            undo()
        state = cache.trajectory_length, cache.coverage()
        if error is None and kind not in ("cropped", "emptied"):
            assert torch.equal(cache.token_ids, text[:, :-1])
        # It goes on from where it is, with the device's own count of tokens.
        text = prompt(device, n=2, seed=3)
        if cache.token_ids is not None:
            text = torch.cat((cache.token_ids, text), dim=1)
        return error, state, turns(model, cache, text, ["plan", "act"], new=8), text

    captured, eager = both(sharing=sharing, max_cache_len=150)
    expected = run(eager)
    assert not ahead
    found = run(captured)
    assert found[:2] == expected[:2]
    assert torch.equal(found[2], expected[2]) and torch.equal(found[3], expected[3])
    if kind == "dropped":
        # A graph that writes the entries that were dropped must not run again: their memory may be somebody else's by now.
        assert ahead.count(False) == (when == "as a streamer")
    elif kind not in ("cropped", "emptied") or when == "as a streamer":
        assert ahead.count(False) >= 1, "the step after the interference was replayed, and not used"
    if kind == "moved":
        # One capture an agent, and again where the weights are now: a graph would read where they were.
        assert graphs.CudaGraph.captures > 2


def test_memory_of_weights_that_moved_is_kept_during_generate(device):  # noqa: F811
    model = model_on(device)
    cache = SharedLoRACache(max_cache_len=100)
    text = turns(model, cache, prompt(device), ["plan"])
    weight = model.get_base_model().model.layers[0].self_attn.o_proj.lora_A["plan"].weight
    held = []

    def look():
        held.extend(cache._graphs.ahead.expected.held)

    generate(model, text, cache, new=8, stopping_criteria=StoppingCriteriaList([Interference(look, 5)]))
    assert weight.data_ptr() in {memory.data_ptr() for memory in held}
    assert cache._graphs.ahead.expected is None


def test_storage_that_another_cache_moves_is_not_written_to(device, ahead):  # noqa: F811
    """Growing storage, and another cache that grows in the middle of a turn."""
    model = with_adapters(model_on(device).unload(), ("plan", "act")).to(device)
    fill_adapter(model, "plan", 3)
    other = SharedLoRACache(sharing="lr_precomputed")

    def elsewhere():
        with torch.no_grad():
            model(input_ids=prompt(device, n=40, seed=7), past_key_values=other)

    def run(cache):
        other.reset()
        text = turns(model, cache, prompt(device), ["plan", "act", "plan"], new=8)
        stop = StoppingCriteriaList([Interference(elsewhere, 4, elsewhere)])
        return generate(model, text, cache, new=30, stopping_criteria=stop)

    captured, eager = both(sharing="lr_precomputed")
    expected = run(eager)
    assert torch.equal(run(captured), expected) and any(ahead)


def test_a_model_that_is_given_another_token_than_was_chosen(device, ahead):  # noqa: F811
    """Whoever prepares the inputs may change them: the pass counts, not what was started for it."""

    def run(cache):
        torch.manual_seed(1)
        model = model_on(device)
        text = turns(model, cache, prompt(device), ["plan", "plan"], new=6)
        root, calls = model.get_base_model(), []
        prepare = root.prepare_inputs_for_generation

        def another(*args, **kwargs):
            inputs = prepare(*args, **kwargs)
            calls.append(0)
            if len(calls) in (4, 7):
                inputs["input_ids"] = inputs["input_ids"] % 60 + 1
            if len(calls) == 9:
                inputs["position_ids"] = inputs["position_ids"] + 5
            return inputs

        root.prepare_inputs_for_generation = another
        text = generate(model, text, cache, new=14)
        return text, cache.token_ids

    captured, eager = both(max_cache_len=100)
    expected = run(eager)
    found = run(captured)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    # After other positions the next ones do not follow either.
    assert ahead.count(False) == 4


@pytest.mark.parametrize("rows", [1, 3])
def test_the_step_after_the_end_is_dropped(device, ahead, rows):  # noqa: F811
    """Only the device knows that a text has ended when the step of its last token is started."""
    model = model_on(device)
    captured, eager = both(sharing="lr_precomputed", max_cache_len=100)
    model.set_adapter("plan")
    ids = prompt(device, rows=rows)
    free = generate(model, ids, SharedLoRACache(cuda_graphs=False), new=20)
    end = sorted({int(token) for token in free[:, ids.shape[1] + 5]})

    def run(cache):
        text, whole = ids, []
        for agent in ("plan", "act", "plan"):
            model.set_adapter(agent)
            text = generate(model, text, cache, new=20, eos_token_id=end)
            whole.append(text)
            text = torch.cat((text, prompt(device, rows=rows, n=2, seed=4)), dim=1)
        return whole

    expected = run(eager)
    found = run(captured)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(captured.token_ids, eager.token_ids)
    assert 1 <= ahead.count(False) <= 3 < ahead.count(True)


def test_sampling_and_criteria_by_position(device, ahead):  # noqa: F811
    model = attach(model_on(device))
    texts = []
    for cache in both(max_cache_len=100):
        torch.manual_seed(3)
        ids = prompt(device)
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=12, do_sample=True, top_k=20,
            pad_token_id=0,
        )  # fmt: skip
        root = model.get_base_model()
        options = dict(attention_mask=torch.ones_like(text), past_key_values=cache, max_new_tokens=8, pad_token_id=0)
        texts.append(root.generate(text, None, None, StoppingCriteriaList(), **options))
        if cache.cuda_graphs:
            assert all(ahead) and len(ahead) == 9 + 8 - 1
    assert torch.equal(*texts)


def test_two_caches_take_turns_within_one_call(device, ahead):  # noqa: F811
    """Another cache's captured steps run while one is under way."""
    model = model_on(device)
    inner_texts = []

    def run(cache, inner):
        texts = []

        def elsewhere(value):
            with torch.no_grad():
                out = model(input_ids=value.view(1, -1)[:, -1:].to(device), past_key_values=inner).logits
            texts.append(out.argmax(-1).item())

        class Streamer(Listener):
            def put(self, value):
                elsewhere(value)

        text = turns(model, cache, prompt(device), ["plan"], new=16, streamer=Streamer(None, 0))
        inner_texts.append(texts)
        return text

    expected = run(*(SharedLoRACache(max_cache_len=60, cuda_graphs=False) for _ in range(2)))
    assert torch.equal(run(*(SharedLoRACache(max_cache_len=60) for _ in range(2))), expected)
    assert inner_texts[0] == inner_texts[1] and len(inner_texts[0]) == 17
    assert ahead.count(True) >= 13
