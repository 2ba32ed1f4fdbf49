"""Activated LoRA (``alora_invocation_tokens``): tokens before the invocation are the base model's, and are never run again."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache

from lora_shared_cache import SharedLoRACache, TrajectoryError, UnsupportedAdapterError

from .test_families import FAMILIES, build
from .tiny import (
    TokenCounter,
    activate,
    assert_equal_logits,
    difference,
    logits,
    lora,
    tiny_llama,
    tiny_mistral,
    tokens,
    twin,
    with_adapters,
)

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

# Tokens 60 to 63 are left to invocations.
INVOCATIONS = {"check": [61, 60], "judge": [62, 60, 63]}
POLICIES = ["base_shared", "lr_precomputed", "auto"]


def agents_model(model=None):
    settings = {name: lora(alora_invocation_tokens=ids) for name, ids in INVOCATIONS.items()}
    return with_adapters(tiny_llama() if model is None else model, {"plan": lora(), **settings})


def text(n: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return tokens(n, rows=rows, seed=seed) % 59 + 1


def asked(ids: torch.Tensor, name: str) -> torch.Tensor:
    return torch.cat((ids, torch.tensor([INVOCATIONS[name]]).expand(len(ids), -1), text(2, len(ids), seed=9)), dim=1)


def generate(model, ids, cache, **settings):
    settings = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6) | settings
    return model.generate(
        input_ids=ids, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **settings
    )


def assert_same(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert_equal_logits(a, b, 1e-5)  # generate hands out float32


def test_it_matters_where_the_adapter_starts():
    model = agents_model()
    ids = asked(text(12), "check")
    activate(model, "check")
    right = generate(model, ids, None).logits[0]
    activate(model, None)
    assert difference(right, generate(model, ids, None).logits[0]) > 0.05, "not at all"
    activate(model, "check")
    for _, module in model.named_modules():
        getattr(module, "lora_variant", {}).pop("check", None)
    assert difference(right, generate(model, ids, None).logits[0]) > 0.05, "everywhere"


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sharing", POLICIES)
def test_all_go_on_from_what_the_base_model_processed(sharing, window, storage):
    model = agents_model(tiny_mistral(sliding_window=window))
    plain, counter, cache = twin(model), TokenCounter(model), SharedLoRACache(sharing=sharing)
    ids = text(12 if window is None else 150)
    n = ids.shape[1]
    activate(model, None)
    logits(model, ids, cache)
    for name in INVOCATIONS:
        for m in (model, plain):
            activate(m, name)
        counter.take()
        question = asked(ids, name)
        ours = generate(model, question, cache)
        assert_same(ours, generate(plain, question, None))
        # Not one token of the base model's was run again.
        assert sum(counter.take()) == question.shape[1] - n + 5
        assert cache.coverage()[name] == cache.trajectory_length == question.shape[1] + 5
        # The next one goes on from where the base model was.
        cache.crop(n - cache.trajectory_length)
    activate(model, None)
    activate(plain, None)
    assert_same(generate(model, ids, cache), generate(plain, ids, None))
    counter.handle.remove()


@pytest.mark.parametrize("sharing", POLICIES)
def test_turns_after_each_other_run_nothing_again(sharing):
    """What an aLoRA wrote is then shared as any other agent's tokens are, so this is the cache's approximation."""
    model = agents_model()
    counter, cache, ids = TokenCounter(model), SharedLoRACache(sharing=sharing), text(12)
    for name in ("check", "judge", None, "check", "judge"):
        activate(model, name)
        ids = ids if name is None else asked(ids, name)
        cached = cache.trajectory_length
        counter.take()
        ids = generate(model, ids, cache).sequences
        assert sum(counter.take()) == ids.shape[1] - 1 - cached
    assert cache.coverage() == {"__base__": ids.shape[1] - 1, "plan": 0 if sharing != "lr_precomputed" else ids.shape[1] - 1} | {
        "check": ids.shape[1] - 1 - 6 - 5, "judge": ids.shape[1] - 1
    }  # fmt: skip
    counter.handle.remove()


def test_after_another_invocation_the_earlier_turn_is_no_longer_active():
    """Layer 0 reads embeddings: there the entries of a second turn are exactly those of a prompt that is run at once."""
    model = agents_model()
    activate(model, "check")
    cache, whole = SharedLoRACache(), SharedLoRACache()
    ids = asked(generate(model, asked(text(8), "check"), cache).sequences, "check")
    generate(model, ids, cache)
    generate(model, ids, whole)
    n = ids.shape[1]
    for which in ("k_proj", "v_proj"):
        ours, theirs = (c.layers[0].entries["check",][which].view(n) for c in (cache, whole))
        assert difference(ours, theirs) < 1e-12
        assert bool((ours[:, : n - 4] == 0).all()) and bool((ours[:, n - 4 :] != 0).any(-1).all())


@pytest.mark.parametrize(
    "how", ["chunked_prefill", "new_tokens", "new_tokens_without_invocation", "by_hand", "unattached"]
)
def test_however_the_tokens_come(how):
    model = agents_model()
    for m in (model, plain := twin(model)):
        activate(m, "check")
    ids = asked(text(12), "check")
    theirs, cache = generate(plain, ids, None), SharedLoRACache()
    if how == "unattached":
        assert_same(generate(model, ids, cache), theirs)
        return
    logits(model, ids[:, : {"chunked_prefill": 3, "new_tokens_without_invocation": 15}.get(how, 9)], cache)
    if how == "chunked_prefill":
        ours = generate(model, ids, cache, prefill_chunk_size=2)
    elif how == "by_hand":
        expected = torch.cat([torch.zeros(1, 0, 64), *(step[:, None] for step in theirs.logits)], dim=1)
        out, new = [], theirs.sequences[:, 9:16]
        for token in (new, *theirs.sequences[:, 16:-1].split(1, dim=1)):
            out.append(logits(model, token, cache)[:, -1:])
        assert_equal_logits(torch.cat(out, dim=1).float(), expected, 1e-5)
        return
    else:
        ours = generate(model, ids[:, cache.trajectory_length :], cache, attention_mask=torch.ones_like(ids))
        ours.sequences = torch.cat((ids[:, : 12 + 4 - (ours.sequences.shape[1] - 6)], ours.sequences), dim=1)
    assert_same(ours, theirs)


def test_chunks_walk_through_what_sliding_layers_no_longer_hold():
    """Transformers 5.17 feeds all chunks of a prompt, also those that are cached."""
    model = agents_model(tiny_mistral(sliding_window=5))
    plain, cache, ids = twin(model), SharedLoRACache(), text(150)
    activate(model, None)
    logits(model, ids, cache)
    for m in (model, plain):
        activate(m, "judge")
    assert_same(
        generate(model, asked(ids, "judge"), cache, prefill_chunk_size=30), generate(plain, asked(ids, "judge"), None)
    )


def test_saved_loaded_and_left_padded_past_a_window(tmp_path):
    model = agents_model(tiny_mistral(sliding_window=9))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_mistral(sliding_window=9), tmp_path / "judge", adapter_name="judge").eval()
    ids, mask = text(150, rows=3), torch.ones(3, 150, dtype=torch.long)
    ids[1, :2] = mask[1, :2] = ids[2, :5] = mask[2, :5] = 0
    cache, question = SharedLoRACache(), asked(ids, "judge")
    activate(loaded, None)
    logits(loaded, ids, cache, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    mask = torch.cat((mask, torch.ones(3, question.shape[1] - 150, dtype=torch.long)), dim=1)
    for m in (model, loaded):
        activate(m, "judge")
    counter = TokenCounter(loaded)
    ours = generate(loaded, question, cache, attention_mask=mask)
    assert sum(counter.take()) == question.shape[1] - 150 + 5
    assert_same(ours, generate(model, question, None, attention_mask=mask))


def test_several_sequences():
    """PEFT alone does not repeat the place of the invocation for them, and fails; so greedily, all are the one sequence."""
    model = agents_model()
    plain, cache, ids = twin(model), SharedLoRACache(), text(12)
    activate(model, None)
    logits(model, ids, cache)
    cache.batch_repeat_interleave(3)
    for m in (model, plain):
        activate(m, "check")
    settings = dict(do_sample=True, top_k=1, num_return_sequences=3)
    ours, theirs = generate(model, asked(ids, "check"), cache, **settings), generate(plain, asked(ids, "check"), None)
    assert torch.equal(ours.sequences, theirs.sequences.expand(3, -1))
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert_equal_logits(a, b.expand(3, -1), 1e-5)


@pytest.mark.parametrize("family", ["Llama", "Phi with norms", "HunYuanDenseV1"])
def test_rows_padding_and_normalised_keys(family):
    model = agents_model(build(family, torch.float64, **FAMILIES.get(family, {})))
    ids, mask = text(16, rows=3), torch.ones(3, 16, dtype=torch.long)
    ids[0, 9:11] = ids[1, 13:15] = torch.tensor(INVOCATIONS["check"])  # and none in row 2
    ids[1, :2], mask[1, :2] = 0, 0
    for m in (model, plain := twin(model)):
        activate(m, "check")
    theirs, cache = generate(plain, ids, None, attention_mask=mask), SharedLoRACache()
    activate(model, None)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, :8]
    logits(model, ids[:, :8], cache, attention_mask=mask[:, :8], position_ids=positions)
    activate(model, "check")
    assert_same(generate(model, ids, cache, attention_mask=mask), theirs)


def test_what_can_not_be_right_is_refused():
    model = agents_model()
    cache, ids = SharedLoRACache(), asked(text(12), "check")
    activate(model, ["plan", "check"])
    with pytest.raises(UnsupportedAdapterError, match="'check' is active from.*together with others"):
        logits(model, ids, cache)
    activate(model, "plan")
    with pytest.raises(UnsupportedAdapterError, match="together with others"):
        logits(model, ids.repeat(2, 1), cache, adapter_names=["check", "plan"])
    activate(model, "check")
    for call in (
        lambda: model.get_base_model()(input_ids=ids, past_key_values=cache),
        lambda: model.get_base_model().generate(ids, past_key_values=cache, max_new_tokens=2),
    ):
        with pytest.raises(UnsupportedAdapterError, match="Call the PeftModel itself"):
            call()
    with pytest.raises(TrajectoryError, match="there is no invocation"):
        logits(model, ids, cache, alora_offsets=[3])
    assert cache.trajectory_length == 0
    expected = logits(twin(model), ids, DynamicCache(config=model.config))
    assert_equal_logits(logits(model, ids, cache), expected)
