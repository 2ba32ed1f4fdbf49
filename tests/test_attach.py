"""Attached and yet as before: inert without a shared cache, undone by ``detach``, and clean after any error."""

from __future__ import annotations

import copy
import gc
import io
import linecache
import pickle
import sys
import threading
import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lora_shared_cache
from lora_shared_cache import ATTENTION_NAME, SharedCacheError, SharedLoRACache, TrajectoryError, attach, detach
from lora_shared_cache.attachment import Attachment
from lora_shared_cache.digest import Digest, DigestReader

from .tiny import (
    SHAPE,
    activate,
    assert_equal_logits,
    difference,
    feed,
    fill_adapter,
    finish,
    logits,
    lora,
    lora_layers,
    ones,
    reference,
    tiny_llama,
    tokens,
    twin,
    with_adapters,
)

pytestmark = pytest.mark.integration

NAMES = ["plan", "act"]


def agents_model(**settings):
    return with_adapters(tiny_llama(**settings), NAMES)


def used(model):
    """Attach, and run with a shared cache."""
    cache = SharedLoRACache()
    activate(model, "plan")
    feed(model, tokens(9), cache, [6, 3])
    return cache


def state_of(model: nn.Module):
    """Everything that attaching could leave: attributes, hooks, attention implementation."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = {
        path: (type(m), sorted(m.__dict__), [len(getattr(m, h)) for h in hooks], sorted(m._buffers), sorted(m._modules))
        for path, m in model.named_modules()
    }
    return modules, model.config._attn_implementation, sorted(model.state_dict()), sorted(model.config.to_dict())


# ---- inert without the cache ----


@pytest.mark.parametrize("when", ["attached", "used", "failed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_without_the_cache_are_the_same_bit_for_bit(when, dtype):
    model = with_adapters(tiny_llama(dtype), NAMES)
    plain = twin(model)
    {"attached": attach, "used": used, "failed": fail_once}[when](model)
    for agent in ("plan", "act", None, NAMES):
        activate(model, agent)
        activate(plain, agent)
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens(9)).logits, plain(input_ids=tokens(9)).logits)
        assert torch.equal(reference(model, tokens(9)), reference(plain, tokens(9)))


def fail_once(model):
    activate(model, "plan")
    cache = SharedLoRACache()
    logits(model, tokens(5), cache)
    with raising_in(model, 1), pytest.raises(RuntimeError, match="on purpose"):
        logits(model, tokens(9), cache)


class raising_in:
    """An error in the middle of a forward pass: at the end of a layer's attention, or of one of its projections."""

    def __init__(self, model, layer: int, where: str = "self_attn", error: type[BaseException] = RuntimeError):
        self.module = next(m for path, m in model.named_modules() if path.endswith(f"layers.{layer}.{where}"))
        self.error = error

    def __enter__(self):
        def fail(module, args, output):
            raise self.error("on purpose")

        self.handle = self.module.register_forward_hook(fail)

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_gives_the_same_gradients_bit_for_bit(checkpointing):
    model = with_adapters(tiny_llama(torch.float32), {"plan": lora(lora_dropout=0.1), "act": lora()})
    plain = twin(model)
    used(model)
    gradients = []
    for m in (model, plain):
        activate(m, "plan")
        m.train()
        if checkpointing:
            m.enable_input_require_grads()
            root = m.get_base_model()
            # The name before Transformers 5.2x, and the one since.
            enable = getattr(root, "activation_checkpointing_enable", None) or root.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        torch.manual_seed(3)
        m(input_ids=tokens(9, rows=2), labels=tokens(9, rows=2)).loss.backward()
        gradients.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
    assert max(float(g.abs().max()) for g in gradients[0].values()) > 0


@pytest.mark.parametrize(
    "settings", [dict(), dict(num_beams=2), dict(do_sample=True), dict(cache_implementation="static")]
)
def test_generation_with_other_caches_is_the_same(settings):
    model = with_adapters(tiny_llama(torch.float32), NAMES)
    plain = twin(model)
    used(model)
    out = []
    for m in (model, plain):
        activate(m, "act")
        torch.manual_seed(5)
        out.append(
            m.generate(
                input_ids=tokens(6),
                attention_mask=torch.ones_like(tokens(6)),
                max_new_tokens=6,
                return_dict_in_generate=True,
                output_logits=True,
                disable_compile=True,
                **settings,
            )
        )
    assert torch.equal(out[0].sequences, out[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(out[0].logits, out[1].logits, strict=True))


def test_output_attentions_and_hidden_states_without_the_cache():
    model = tiny_llama(torch.float32)
    model.set_attn_implementation("eager")
    model = with_adapters(model, NAMES)
    plain = twin(model)
    used(model)
    with torch.no_grad():
        ours = model(input_ids=tokens(6), output_attentions=True, output_hidden_states=True)
        theirs = plain(input_ids=tokens(6), output_attentions=True, output_hidden_states=True)
    assert len(ours.attentions) == len(ours.hidden_states) - 1 == 3
    assert all(torch.equal(a, b) for a, b in zip(ours.attentions, theirs.attentions, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))


def test_merging_saving_and_loading_work_on_an_attached_model(tmp_path):
    model = agents_model()
    plain = twin(model)
    used(model)
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "theirs")
    for name in NAMES:
        ours, theirs = (tmp_path / who / name / "adapter_model.safetensors" for who in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours" / "act", adapter_name="act").eval()
    activate(plain, "act")
    assert_equal_logits(reference(loaded, tokens(9)), reference(plain, tokens(9)))
    activate(model, "act")
    merged = model.merge_and_unload()
    assert_equal_logits(reference(merged, tokens(9)), reference(plain, tokens(9)))


# ---- attach and detach ----


def test_detach_restores_every_module():
    model = agents_model()
    before = state_of(model)
    assert attach(model) is model
    assert state_of(model) != before
    used(model)
    detach(model)
    assert state_of(model) == before
    assert not [p for p, m in model.named_modules() if "forward" in m.__dict__ or "generate" in m.__dict__]


def test_attach_is_idempotent():
    model = agents_model()
    before = state_of(model)
    attach(model)
    once = state_of(model)
    attach(model)
    attach(model.get_base_model())
    used(model)
    assert state_of(model) == once
    detach(model)
    assert state_of(model) == before
    assert detach(model) is model


def test_detach_and_attach_again():
    model = agents_model()
    expected = reference(twin(model), tokens(9))
    for _ in range(2):
        assert_equal_logits(feed(model, tokens(9), SharedLoRACache(model), [6, 3]), expected)
        detach(model)
        assert_equal_logits(reference(model, tokens(9)), expected)


def test_a_plain_transformers_model_can_be_attached():
    model = tiny_llama()
    before = state_of(model)
    attach(model)
    expected = reference(twin(model), tokens(9))
    assert_equal_logits(feed(model, tokens(9), SharedLoRACache(), [6, 3]), expected)
    model.add_adapter(LoraConfig(r=3, target_modules=["k_proj", "v_proj"]), adapter_name="one")
    fill_adapter(model, "one", 1)
    model.eval()
    # A new adapter replaces modules: the cache finds them by itself.
    actual = feed(model, tokens(9), SharedLoRACache(), [6, 3])
    assert difference(actual, expected) > 0.05
    detach(model)
    assert_equal_logits(actual, reference(model, tokens(9)))
    assert state_of(model)[1] == before[1]
    assert not [p for p, m in model.named_modules() if "forward" in m.__dict__ or "_lora_shared_cache" in m.__dict__]


def test_an_instance_level_forward_of_somebody_else_is_kept_and_called():
    """Accelerate's device hooks replace ``forward`` on the instance, too."""
    model = agents_model()
    expected = reference(twin(model), tokens(9))
    attention = model.get_base_model().model.layers[1].self_attn
    calls = []

    def forward(*args, **kwargs):
        calls.append(1)
        return type(attention).forward(attention, *args, **kwargs)

    attention.forward = forward
    assert_equal_logits(feed(model, tokens(9), SharedLoRACache(), [6, 3]), expected)
    # The layer is tried out twice, and called twice.
    assert len(calls) >= 2
    detach(model)
    assert attention.__dict__["forward"] is forward


def test_the_attention_implementation_of_the_config_is_switched_only_inside_of_a_pass():
    model = agents_model()
    before = model.config._attn_implementation
    seen = []
    model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(
        lambda *_: seen.append(model.config._attn_implementation)
    )
    used(model)
    assert seen == [ATTENTION_NAME] * 2
    assert model.config._attn_implementation == before


def test_a_model_loaded_with_our_attention_name_works_with_and_without_the_cache(tmp_path):
    model = agents_model()
    expected = reference(twin(model), tokens(9))
    model.get_base_model().set_attn_implementation(ATTENTION_NAME)
    mask = torch.ones(1, 9, dtype=torch.long)
    # Without a shared cache the name means SDPA; causality must not be lost.
    assert_equal_logits(reference(model, tokens(9)), expected)
    assert_equal_logits(logits(model, tokens(9), DynamicCache(), attention_mask=mask), expected)
    assert_equal_logits(feed(model, tokens(9), SharedLoRACache(), [6, 3]), expected)
    assert_equal_logits(reference(model, tokens(9)), expected)
    detach(model)
    assert model.config._attn_implementation == ATTENTION_NAME


def test_a_left_padded_batch_with_our_attention_name_and_no_shared_cache():
    model = agents_model()
    plain = twin(model)
    model.get_base_model().set_attn_implementation(ATTENTION_NAME)
    ids, mask = tokens(9, rows=2), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    ours, theirs = (reference(m, ids, attention_mask=mask) for m in (model, plain))
    assert_equal_logits(ours[mask.bool()], theirs[mask.bool()])


def test_registration_is_idempotent_and_changes_no_other_name():
    before = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS.valid_keys()}
    lora_shared_cache.register_attention()
    lora_shared_cache.register_attention()
    after = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS.valid_keys()}
    assert before == after
    assert ATTENTION_NAME in AttentionInterface().valid_keys()
    assert not any(word in ATTENTION_NAME for word in ("flash", "sdpa", "flex"))


def test_a_deep_copy_of_an_attached_model_is_a_model_of_its_own():
    model = agents_model()
    cache = used(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    expected = reference(other, tokens(9))
    assert_equal_logits(feed(other, tokens(9), SharedLoRACache(), [6, 3]), expected)
    assert difference(expected, reference(model, tokens(9))) > 0.01
    # The original is untouched, and goes on with its cache.
    more = tokens(12)
    more[:, :9] = tokens(9)
    fresh = feed(model, more, SharedLoRACache(), [12])
    assert_equal_logits(feed(model, more[:, 9:], cache, [3]), fresh[:, 9:])
    detach(other)
    assert not [p for p, m in other.named_modules() if "forward" in m.__dict__]
    assert [p for p, m in model.named_modules() if "forward" in m.__dict__]


def test_a_pickled_model_comes_back_unattached_and_a_cache_is_not_pickled():
    model = agents_model()
    # With the package `kernels` Transformers 5.17 keeps modules of a local class here, with which no model can be pickled.
    for module in model.modules():
        module.__dict__.pop("_kernel_funcs", None)
    before, cache = state_of(model), used(model)
    with pytest.raises(SharedCacheError, match="deepcopy"):
        pickle.dumps(cache)
    with pytest.raises(SharedCacheError, match="deepcopy"):
        copy.copy(cache)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    expected = reference(model, tokens(9))
    assert torch.equal(reference(other, tokens(9)), expected)
    with pytest.raises(SharedCacheError, match="tokens of another"):
        logits(other, tokens(12)[:, 9:], cache)
    assert_equal_logits(logits(other, tokens(9), used(other), attention_mask=ones(9)), expected[:, -1:])
    assert state_of(detach(other)) == before
    assert state_of(detach(pickle.loads(pickle.dumps(model)))) == before
    layer = lora_layers(detach(model))[0][1]
    layer.forward = layer.forward
    attach(model)
    with pytest.raises(SharedCacheError, match="detach"):
        pickle.dumps(model)


def test_models_and_caches_are_released():
    """Looking for the calling model on the stack must not keep the callers' variables alive (``frame.f_locals`` does)."""
    model = agents_model()
    cache = used(model)
    references = [weakref.ref(model.get_base_model()), weakref.ref(cache), weakref.ref(cache.layers[0].base_keys.data)]
    del cache
    gc.collect()
    assert references[1]() is None and references[2]() is None
    del model
    gc.collect()
    assert references[0]() is None


# ---- errors in the middle ----


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit], ids=lambda e: e.__name__)
@pytest.mark.parametrize(
    "where", [(0, "self_attn.k_proj"), (1, "self_attn"), (1, "mlp"), (2, "self_attn.v_proj"), (2, "mlp")]
)
@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_an_error_in_the_middle_of_a_pass_leaves_cache_and_model_as_before(sharing, where, error):
    model = agents_model()
    plain = twin(model)
    undisturbed, disturbed = SharedLoRACache(model, sharing=sharing), SharedLoRACache(model, sharing=sharing)
    logits(model, tokens(3), undisturbed)
    logits(model, tokens(3), disturbed)
    for name, stop in [("plan", 6), ("act", 8), ("plan", 9), ("plan", 10), (None, 14), ("act", 14)]:
        activate(model, name)
        activate(plain, name)
        ids, mask = tokens(20)[:, :stop], torch.ones(1, stop, dtype=torch.long)
        covered, length, kept = disturbed.coverage(), disturbed.trajectory_length, disturbed.token_ids.clone()
        implementation = model.config._attn_implementation
        with raising_in(model, *where, error), pytest.raises(error, match="on purpose"):
            logits(model, ids, disturbed, attention_mask=mask)
        assert model.config._attn_implementation == implementation
        assert (disturbed.coverage(), disturbed.trajectory_length) == (covered, length)
        assert torch.equal(disturbed.token_ids, kept)
        assert torch.equal(reference(model, ids), reference(plain, ids))
        expected = logits(model, ids, undisturbed, attention_mask=mask)
        assert torch.equal(logits(model, ids, disturbed, attention_mask=mask), expected)


@pytest.mark.parametrize("where", [(0, "self_attn"), (1, "self_attn.o_proj"), (2, "mlp")])
def test_an_error_in_the_first_pass_of_a_cache(where):
    model = agents_model()
    expected = reference(twin(model), tokens(9))
    implementation = model.config._attn_implementation
    attach(model)
    cache = SharedLoRACache()
    with raising_in(model, *where), pytest.raises(RuntimeError, match="on purpose"):
        logits(model, tokens(9), cache)
    assert model.config._attn_implementation == implementation
    assert cache.trajectory_length == 0
    assert torch.equal(reference(model, tokens(9)), expected)
    assert_equal_logits(feed(model, tokens(9), cache, [6, 3]), expected)


PLACES = [(0, "self_attn"), (1, "self_attn"), (0, "mlp"), (1, "mlp"), (1, "input_layernorm"), (1, "self_attn.o_proj")]


@pytest.mark.parametrize("then", ["dynamic", "shared", "no_cache", "same_cache", "generate"])
@pytest.mark.parametrize("where", PLACES, ids=str)
def test_an_error_in_the_pass_that_attached_is_forgotten_at_the_next_call(where, then):
    """The cache attached itself in the middle of a plain call, so no frame of ours sees the error."""
    model = agents_model()
    plain = twin(model)
    expected = reference(plain, tokens(9))
    implementation = model.config._attn_implementation
    cache = SharedLoRACache()
    with raising_in(model, *where), pytest.raises(RuntimeError, match="on purpose"):
        logits(model, tokens(9), cache)
    if then == "dynamic":
        assert torch.equal(reference(model, tokens(9)), expected)
    elif then == "no_cache":
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens(9), use_cache=False).logits, expected)
    elif then == "generate":
        settings = dict(input_ids=tokens(9), attention_mask=torch.ones_like(tokens(9)), max_new_tokens=4)
        assert torch.equal(model.generate(**settings), plain.generate(**settings))
    elif then == "shared":
        assert_equal_logits(feed(model, tokens(9), SharedLoRACache(), [6, 3]), expected)
    assert cache.trajectory_length == 0
    assert_equal_logits(feed(model, tokens(9), cache, [6, 3]), expected)
    assert model.config._attn_implementation == implementation
    assert torch.equal(reference(model, tokens(9)), expected)


def test_an_interrupt_at_any_line_of_the_switch_of_the_attention_leaves_the_model_as_before(storage):
    if storage != "growing":
        return  # has nothing to do with it
    config = lora(rank_pattern={}, alpha_pattern={})
    model = with_adapters(tiny_llama(num_hidden_layers=1), {"plan": config})
    expected = reference(model, tokens(5))
    implementation = model.config._attn_implementation
    attach(model)
    method, lines = None, 0

    def trace(frame, event, arg):
        nonlocal lines
        if method.__code__ not in (frame.f_code, frame.f_back.f_code):
            return None
        # Python itself raises no interrupt where a `with` ends: the lock would stay.
        here = event == "line" and "with " not in linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        lines -= here
        if here and lines == 0:
            raise KeyboardInterrupt("on purpose")
        return trace

    def interrupted_at(a_method, line):
        nonlocal method, lines
        method, cache, before, lines = a_method, SharedLoRACache(model), sys.gettrace(), line
        sys.settrace(trace)
        try:
            logits(model, tokens(5), cache, attention_mask=ones(5))
        except KeyboardInterrupt:
            return cache
        finally:
            sys.settrace(before)
        return None

    for a_method, everywhere in ((Attachment.enter, True), (Attachment.leave, False)):
        line = 1
        while (cache := interrupted_at(a_method, line)) is not None:
            if everywhere:
                assert model.config._attn_implementation == implementation, line
            assert torch.equal(reference(model, tokens(5)), expected)
            last = logits(model, tokens(5), cache, attention_mask=ones(5))[:, -1]
            assert_equal_logits(last, expected[:, -1])
            assert model.config._attn_implementation == implementation, line
            line += 1
        assert line > 5


def test_an_error_after_the_last_attention_of_the_pass_that_attached():
    """Then the tokens are cached already; giving them again is an equal prompt, and right."""
    model = agents_model()
    expected = reference(twin(model), tokens(9))
    cache = SharedLoRACache()
    with raising_in(model, 2, "mlp"), pytest.raises(RuntimeError, match="on purpose"):
        logits(model, tokens(9), cache)
    again = logits(model, tokens(9), cache, attention_mask=torch.ones(1, 9))
    assert_equal_logits(again[:, -1], expected[:, -1])
    assert cache.trajectory_length == 9


def test_an_error_in_generate_leaves_the_turn_usable():
    model = agents_model()
    cache = used(model)
    ids = torch.cat((tokens(9), tokens(3, seed=8)), dim=1)
    mask = torch.ones_like(ids)
    calls = []

    def fail(module, args, output):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("on purpose")

    handle = model.get_base_model().model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6)
    handle.remove()
    # Two passes were finished: the prompt, and one generated token.
    assert cache.trajectory_length == 13
    cache.crop(-1)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False)
    expected = twin_generate(model, ids)
    assert torch.equal(out, expected)


def twin_generate(model, ids):
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)


# ---- threads ----


def run_threads(*functions):
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def meet_in_every_layer(model, parties):
    """Both threads have to be in the same layer before either goes on."""
    barrier = threading.Barrier(parties, timeout=60)
    handles = []
    for layer in model.get_base_model().model.layers:
        for module in (layer.self_attn.k_proj, layer.mlp):
            handles.append(module.register_forward_pre_hook(lambda *_: (barrier.wait(), None)[1]))
    return handles


def test_two_threads_with_two_caches_on_one_model():
    model = agents_model()
    attach(model)
    ids = [tokens(12, seed=1), tokens(12, seed=2)]
    expected = [feed(model, i, SharedLoRACache(), [8, 1, 1, 2]) for i in ids]
    handles = meet_in_every_layer(model, 2)
    caches, actual = [SharedLoRACache(), SharedLoRACache()], [None, None]

    def work(k):
        actual[k] = feed(model, ids[k], caches[k], [8, 1, 1, 2])

    run_threads(lambda: work(0), lambda: work(1))
    for handle in handles:
        handle.remove()
    for a, e in zip(actual, expected, strict=True):
        assert_equal_logits(a, e)
    assert [c.token_ids.tolist() for c in caches] == [i.tolist() for i in ids]
    assert model.config._attn_implementation != ATTENTION_NAME


def test_two_threads_that_read_the_content_of_different_adapters_at_once():
    """Which adapters those are depends on the policy of each thread's cache."""
    digests = [Digest([torch.arange(8) * k]) for k in range(1, 5)]
    reader = DigestReader()
    expected = [DigestReader().read([one])[0] for one in digests]

    class Interrupted(dict):
        def __iter__(self):
            digests[0].words = dict(self)
            run_threads(lambda: reader.read(digests[3:]))
            return super().__iter__()

    digests[0].words = Interrupted(digests[0].words)
    assert reader.read(digests[:3]) == expected[:3]
    assert reader.read(digests[3:]) == expected[3:]


def test_one_thread_with_a_shared_cache_and_one_with_a_dynamic_cache():
    model = with_adapters(tiny_llama(torch.float32), NAMES)
    # In a pass that attaches the model the last MLP comes after its end, and rounds as PEFT does.
    attach(model)
    expected_ours = feed(model, tokens(12, seed=1), SharedLoRACache(), [8, 1, 1, 2])
    expected_theirs = feed(model, tokens(12, seed=2), DynamicCache(), [8, 1, 1, 2])
    padded = torch.ones(2, 12, dtype=torch.long)
    padded[1, :5] = 0
    handles = meet_in_every_layer(model, 2)
    actual = [None, None]

    def ours():
        actual[0] = feed(model, tokens(12, seed=1), SharedLoRACache(), [8, 1, 1, 2])

    def theirs():
        actual[1] = feed(model, tokens(12, seed=2), DynamicCache(), [8, 1, 1, 2])

    run_threads(ours, theirs)
    for handle in handles:
        handle.remove()
    assert torch.equal(actual[0], expected_ours)
    assert torch.equal(actual[1], expected_theirs)


def test_one_cache_in_two_threads_at_once_is_refused():
    model = agents_model()
    attach(model)
    cache = SharedLoRACache()
    logits(model, tokens(5), cache)
    inside, leave = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        leave.wait(60)

    handle = model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(wait)
    done = []
    thread = threading.Thread(
        target=lambda: done.append(logits(model, tokens(9), cache, attention_mask=torch.ones(1, 9)))
    )
    thread.start()
    assert inside.wait(60)
    handle.remove()
    try:
        with pytest.raises(SharedCacheError, match="one cache per thread"):
            logits(model, tokens(9), cache, attention_mask=torch.ones(1, 9))
        for call in (
            cache.reset,
            lambda: cache.crop(-1),
            lambda: copy.deepcopy(cache),
            lambda: cache.drop_adapter("plan"),
        ):
            with pytest.raises(SharedCacheError, match="while a forward pass"):
                call()
        with pytest.raises(SharedCacheError, match="detach was called while"):
            detach(model)
    finally:
        leave.set()
        thread.join()
    assert_equal_logits(done[0][:, -4:], reference(model, tokens(9))[:, -4:])
    assert cache.trajectory_length == 9


# ---- autograd modes ----


def test_inference_mode_then_no_grad_then_grad():
    model = agents_model()
    ids = tokens(14)
    expected = reference(model, ids)
    cache = SharedLoRACache()
    with torch.inference_mode():
        first = model(input_ids=ids[:, :5], past_key_values=cache).logits
    with torch.no_grad():
        second = model(input_ids=ids[:, 5:9], past_key_values=cache).logits
    third = model(input_ids=ids[:, 9:10], past_key_values=cache).logits
    with torch.inference_mode():
        fourth = model(input_ids=ids[:, 10:14], past_key_values=cache).logits
    cache.crop(-2)
    fifth = model(input_ids=ids[:, 12:], past_key_values=cache).logits
    whole = torch.cat([t.detach() for t in (first, second, third, fourth[:, :2], fifth)], dim=1)
    assert_equal_logits(whole, expected)


def test_nothing_that_is_cached_carries_a_gradient():
    model = agents_model()
    model.train()
    activate(model, "plan")
    cache = SharedLoRACache()
    with torch.enable_grad():
        model(input_ids=tokens(5), past_key_values=cache)
    assert not any(
        buffer.data.requires_grad for layer in cache.layers for buffer in layer.buffers() if buffer.data is not None
    )
    model.eval()
    # Gradients without the cache are still there.
    model(input_ids=tokens(5), labels=tokens(5)).loss.backward()
    assert any(p.grad is not None for p in model.parameters())


# ---- torch.compile ----


def test_an_attached_model_compiles_without_graph_breaks():
    model = with_adapters(tiny_llama(torch.float32), NAMES)
    expected = reference(twin(model), tokens(9))
    attach(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model().forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=tokens(9), use_cache=False).logits, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("attached", [True, False])
def test_a_compiled_model_runs_with_a_shared_cache(attached):
    """Its passes are left out of the compiled graphs; decode steps on CUDA have captured ones."""
    model = with_adapters(tiny_llama(torch.float32), NAMES)
    if attached:
        attach(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    results = []
    with torch.no_grad():
        for run in (compiled, model):
            cache = SharedLoRACache()
            results.append([run(part, past_key_values=cache).logits for part in tokens(12).split([9, 1, 2], dim=1)])
    torch._dynamo.reset()
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert model.config._attn_implementation != "shared_lora"


def test_a_cache_first_used_with_the_decoder_alone_goes_on_with_the_whole_model():
    model = with_adapters(tiny_llama(), NAMES)
    ids = tokens(12)
    cache = SharedLoRACache()
    with torch.no_grad():
        model.base_model.model.model(input_ids=ids[:, :7], past_key_values=cache)
    assert cache.trajectory_length == 7
    wrong = ids.clone()
    wrong[0, 3] += 1
    call = dict(attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3, do_sample=False)
    # Nothing led from the decoder to the model around it: generate was not replaced, and its prompt not checked.
    with pytest.raises(SharedCacheError, match="call generate again"):
        model.generate(input_ids=wrong, **call)
    with pytest.raises(TrajectoryError, match="position 3"):
        model.generate(input_ids=wrong, **call)
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(input_ids=ids, **call), expected)
    detach(model)
    assert not any(key.startswith("_lora_shared_cache") for m in model.modules() for key in m.__dict__)
    assert not any("generate" in m.__dict__ or "forward" in m.__dict__ for m in model.modules())


def test_a_cache_outlives_detach_and_its_prompts_are_still_checked():
    model = with_adapters(tiny_llama(), NAMES)
    ids = tokens(12)
    cache = SharedLoRACache()
    logits(model, ids[:, :7], cache)
    detach(model)
    call = dict(attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3, do_sample=False)
    with pytest.raises(SharedCacheError, match="call generate again"):
        model.generate(input_ids=ids, **call)
    assert cache.trajectory_length == 7
    wrong = ids.clone()
    wrong[0, 3] += 1
    with pytest.raises(TrajectoryError, match="position 3"):
        model.generate(input_ids=wrong, **call)
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(input_ids=ids, **call), expected)


def test_one_layer_of_each_kind_is_tried_out(monkeypatch):
    """Of many equal layers one; of layers that the config tells apart one of each."""
    from lora_shared_cache import attachment

    tried = []
    original = attachment.find_layout
    monkeypatch.setattr(attachment, "find_layout", lambda name, *a: (tried.append(name), original(name, *a))[1])
    for settings, expected in ((dict(no_rope_layers=[1] * 12), 1), (dict(no_rope_layers=[1, 1, 0] * 4), 2)):
        shape = {k: v for k, v in SHAPE.items() if k != "head_dim"} | dict(num_hidden_layers=12)
        model = finish(transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**shape, **settings)), torch.float64)
        model = with_adapters(model, ["one"])
        want = reference(twin(model), tokens(9))
        tried.clear()
        assert_equal_logits(feed(model, tokens(9), SharedLoRACache(), [5, 1, 3]), want)
        assert len(tried) == expected
