"""``"shared_lora"`` in Transformers' interfaces: its masks say what SDPA's say, and none is made where none is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lora_shared_cache.attention as attention
from lora_shared_cache import ATTENTION_NAME, SharedLoRACache
from lora_shared_cache.layer_pass import LayerPass
from lora_shared_cache.scopes import forward_scope

from .tiny import (
    activate,
    assert_equal_logits,
    feed,
    logits,
    lora_layers,
    reference,
    tiny_llama,
    tiny_mistral,
    tokens,
    twin,
    with_adapters,
)

pytestmark = pytest.mark.integration


def test_attention_and_mask_are_registered_together():
    assert ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME] is attention.shared_lora_attention
    assert ALL_MASK_ATTENTION_FUNCTIONS[ATTENTION_NAME] is attention.shared_lora_mask


@pytest.mark.parametrize(("q", "kv"), [(1, 1), (1, 9), (4, 4), (4, 9)], ids=str)
@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("padding", [None, "none", "left"])
def test_masks_allow_what_sdpas_allow(q, kv, window, padding):
    mask = None
    if padding is not None:
        mask = torch.ones(2, kv, dtype=torch.bool)
        if padding == "left":
            mask[1, : kv // 2] = False
    arguments = dict(
        batch_size=2,
        q_length=q,
        kv_length=kv,
        q_offset=kv - q,
        kv_offset=0,
        mask_function=causal_mask_function if window is None else sliding_window_causal_mask_function(window),
        attention_mask=mask,
        local_size=window,
        device=torch.device("cpu"),
    )
    expected = sdpa_mask(**arguments, allow_is_causal_skip=False)
    with forward_scope(SimpleNamespace(slot=None)):
        actual = attention.shared_lora_mask(**arguments, allow_is_causal_skip=True, config=None)
        forced = attention.shared_lora_mask(**arguments, allow_is_causal_skip=False, config=None)
    needed = (padding == "left" and kv > 1) or (window is not None and window < kv)
    assert (actual is not None) == needed, "a mask is made only where causality is not all"
    causal = torch.ones(q, kv, dtype=torch.bool).tril(kv - q).expand(2, 1, q, kv)
    assert torch.equal((causal if actual is None else actual.expand(2, 1, q, kv)), expected.expand(2, 1, q, kv))
    assert forced is not None and torch.equal(forced.expand(2, 1, q, kv), expected.expand(2, 1, q, kv))


@pytest.fixture
def masks_seen(monkeypatch):
    seen = []
    original = LayerPass.attend

    def watching(self, query, key, value, **kwargs):
        seen.append(kwargs["attention_mask"])
        return original(self, query, key, value, **kwargs)

    monkeypatch.setattr(LayerPass, "attend", watching)
    return seen


def test_no_mask_is_materialised_on_a_trajectory_without_padding(masks_seen):
    model = with_adapters(tiny_llama(), ["one", "two"])
    cache, ids = SharedLoRACache(sharing="base_shared"), tokens(30)
    for name, stop in [("one", 9), ("two", 15), ("one", 16)]:
        activate(model, name)
        logits(model, ids[:, :stop], cache, attention_mask=torch.ones(1, stop, dtype=torch.long))
    model.generate(
        input_ids=ids[:, :20],
        attention_mask=torch.ones(1, 20, dtype=torch.long),
        past_key_values=cache,
        max_new_tokens=3,
    )
    assert len(masks_seen) >= 3 * 6 and all(mask is None for mask in masks_seen)


def test_a_mask_is_there_where_a_window_is_smaller_than_the_context(masks_seen):
    model = with_adapters(tiny_mistral(sliding_window=4), ["one"])
    feed(model, tokens(9), SharedLoRACache(), [3, 6])
    assert [mask is None for mask in masks_seen[-6:]] == [True] * 3 + [False] * 3


def test_a_mask_of_four_dimensions_is_used_as_it_is():
    """A caller's own mask (tree attention, packed prompts) goes through to the attention."""
    model = with_adapters(tiny_llama(), ["one"])
    plain = twin(model)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    visible[4:, 1] = visible[5, 2] = False
    additive = torch.zeros(1, 1, 6, 6, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    expected = reference(plain, tokens(6), attention_mask=additive)
    assert_equal_logits(logits(model, tokens(6), SharedLoRACache(), attention_mask=additive), expected)
    cache = SharedLoRACache()
    logits(model, tokens(6)[:, :3], cache)
    tail = logits(model, tokens(6)[:, 3:], cache, attention_mask=additive[:, :, 3:])
    assert_equal_logits(tail, expected[:, 3:])
    assert float((reference(plain, tokens(6)) - expected).abs().max()) > 1e-3


def test_the_low_rank_part_of_values_is_never_expanded(monkeypatch):
    """What the attention of few tokens is given: base values as they are stored, and (B, T, r) beside them."""
    model = with_adapters(tiny_llama(), ["one"])
    seen = []
    import lora_shared_cache.layer_pass as layer_pass

    for name in ("flash_lora_attention", "flash_lora_attention_reference", "step_attention"):
        original = getattr(layer_pass, name, None)
        if original is None:
            continue

        def watching(query, key, value, *, original=original, **kwargs):
            seen.append((value, kwargs.get("value_low_rank"), kwargs.get("key_low_rank")))
            return original(query, key, value, **kwargs)

        monkeypatch.setattr(layer_pass, name, watching)
    cache = SharedLoRACache()
    feed(model, tokens(9), cache, [8, 1])
    assert len(seen) == 6
    ranks = [m.lora_A["one"].weight.shape[0] for path, m in lora_layers(model) if path.endswith("v_proj")]
    for layer, rank, (value, low_rank, key_low_rank) in zip(cache.layers, ranks, seen[3:], strict=True):
        assert value.data_ptr() == layer.values.data_ptr(), "a view of the storage"
        assert low_rank.shape == (1, 9, rank)
        assert key_low_rank is None, "keys are expanded once and kept, on the CPU"


def test_expanded_keys_are_appended_to_and_not_made_anew(monkeypatch):
    model = with_adapters(tiny_llama(), ["one", "two"])
    cache, ids = SharedLoRACache(sharing="base_shared"), tokens(30)
    rotated = []
    from lora_shared_cache.layout import RotaryLayout

    original = RotaryLayout.rotate
    monkeypatch.setattr(
        RotaryLayout, "rotate", lambda self, delta, *a: (rotated.append(delta.shape[2]), original(self, delta, *a))[1]
    )
    activate(model, "one")
    logits(model, ids[:, :9], cache)
    rotated.clear()
    logits(model, ids[:, 9:10], cache)
    logits(model, ids[:, 10:12], cache)
    assert rotated == [1] * 3 + [2] * 3
    rotated.clear()
    activate(model, "two")
    logits(model, ids[:, :13], cache, attention_mask=torch.ones(1, 13))
    assert rotated == [13] * 3
    rotated.clear()
    activate(model, "one")
    logits(model, ids[:, 13:14], cache, attention_mask=torch.ones(1, 14))
    assert rotated == [14] * 3, "released on a switch"
