"""Messages that no other test provokes: what is said, and that the cache goes on afterwards as if nothing had been asked."""

from __future__ import annotations

import pytest
import torch

from lora_shared_cache import (
    SharedCacheError,
    SharedLoRACache,
    TrajectoryError,
    attach,
    graphs,
    share_down_projections,
    sharing_report,
)
from lora_shared_cache.errors import UnsupportedAdapterError, UnsupportedModelError

from .conftest import emulate_graphs
from .tiny import assert_equal_logits, logits, lora, reference, tiny_llama, tokens, twin, with_adapters

pytestmark = pytest.mark.integration


def two_adapters():
    return with_adapters(tiny_llama(), ("plan", "act"))


def call_layer(model, cache, *args):
    return model.get_base_model().model.layers[1].self_attn(*args, past_key_values=cache)


def late_with_a_mask_of_its_own(model, cache):
    model.set_adapter("act")
    mask = torch.zeros(1, 1, 2, 8, dtype=torch.float64)
    logits(model, tokens(8)[:, 6:], cache, attention_mask=mask, position_ids=torch.tensor([[6, 7]]))


def mask_of_other_width(model, cache):
    mask = torch.zeros(1, 1, 2, 5, dtype=torch.float64)
    logits(model, tokens(8)[:, 6:], cache, attention_mask=mask, position_ids=torch.tensor([[6, 7]]))


PROVOKE = {
    "outside of its model's forward pass; call the model": (
        UnsupportedModelError,
        lambda model, cache: call_layer(model, cache, torch.zeros(1, 2, 32, dtype=torch.float64)),
    ),
    "called without input_ids and inputs_embeds": (
        TrajectoryError,
        lambda model, cache: model.get_base_model().model(past_key_values=cache),
    ),
    "has not seen tokens 0 to 6; pass them, with a mask for them": (TrajectoryError, late_with_a_mask_of_its_own),
    "the attention_mask has 5 columns, expected 8, one for each token, cached or new": (
        TrajectoryError,
        mask_of_other_width,
    ),
    "drop_adapter: no adapter 'critic'; known are 'act', 'plan'": (
        SharedCacheError,
        lambda model, cache: cache.drop_adapter("critic"),
    ),
}


@pytest.mark.parametrize("message", PROVOKE)
def test_refused_and_goes_on(message):
    model, (error, provoke) = two_adapters(), PROVOKE[message]
    plain, cache = twin(model), SharedLoRACache()
    attach(model)
    logits(model, tokens(6), cache)
    with pytest.raises(error) as caught:
        provoke(model, cache)
    assert message in str(caught.value)
    model.set_adapter("plan")
    assert cache.trajectory_length == 6
    assert_equal_logits(logits(model, tokens(8)[:, 6:], cache), reference(plain, tokens(8))[:, 6:])


def test_positional_arguments_of_an_attention_layer():
    model, cache = two_adapters(), SharedLoRACache()
    attach(model)
    layer = model.get_base_model().model.layers[1]
    call = layer.self_attn.forward
    layer.self_attn.forward = lambda hidden_states, **kwargs: call(hidden_states, None, **kwargs)
    with pytest.raises(UnsupportedModelError, match="is called with 2 positional arguments, which is not supported"):
        logits(model, tokens(6), cache)
    layer.self_attn.forward = call
    logits(model, tokens(6), cache)
    assert cache.trajectory_length == 6


def test_offloaded_adapters():
    model, cache = two_adapters(), SharedLoRACache()
    a = model.get_base_model().model.layers[1].self_attn.k_proj.lora_A
    kept = a["plan"]
    a["plan"] = torch.nn.Linear(kept.in_features, kept.out_features, bias=False, device="meta")
    with pytest.raises(UnsupportedAdapterError, match="offloaded .meta device.; load them on the model's device"):
        logits(model, tokens(6), cache)
    a["plan"] = kept
    logits(model, tokens(6), cache)
    assert cache.trajectory_length == 6


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("LORA_SHARED_CACHE_BACKEND", "cuda")
    cache = SharedLoRACache()
    with pytest.raises(
        SharedCacheError, match="LORA_SHARED_CACHE_BACKEND is 'cuda', expected 'reference', 'triton' or nothing"
    ):
        logits(two_adapters(), tokens(6), cache)
    assert cache.trajectory_length == 0


def test_a_report_without_adapters():
    with pytest.raises(UnsupportedAdapterError, match="the model has no adapters; load some, or give turns"):
        sharing_report(tiny_llama(), tokens(20), progress=False)


def test_shared_a_without_adapters():
    with pytest.raises(UnsupportedAdapterError, match="the model has no adapters; load some"):
        share_down_projections(tiny_llama())


def in_training(model, cache):
    model.train()
    with torch.no_grad():
        logits(model, tokens(7)[:, 6:], cache)
    model.eval()


def by_embeddings(model, cache):
    embeds = model.get_input_embeddings()(tokens(7)[:, 6:]).detach()
    with torch.no_grad():
        model(inputs_embeds=embeds, past_key_values=cache)


def hidden_states_in_the_config(model, cache):
    model.config.output_hidden_states = True
    logits(model, tokens(7)[:, 6:], cache)


UNCAPTURED = {
    "output_hidden_states was asked for in the model's config": hidden_states_in_the_config,
    "the step has an attention mask of its own, not one entry per token": lambda model, cache: logits(
        model, tokens(7)[:, 6:], cache, attention_mask=torch.zeros(1, 1, 1, 7, dtype=torch.float64)
    ),
    "the model is in training mode": in_training,
    "the step was given as inputs_embeds": by_embeddings,
    "return_dict=False": lambda model, cache: model.get_base_model().model(
        tokens(7)[:, 6:], past_key_values=cache, return_dict=False
    ),
    "the model was called with something, which a captured step does not know": lambda model, cache: logits(
        model, tokens(7)[:, 6:], cache, something=torch.zeros(1)
    ),
    "output_hidden_states was asked for": lambda model, cache: logits(
        model, tokens(7)[:, 6:], cache, output_hidden_states=True
    ),
}


@pytest.mark.parametrize("reason", UNCAPTURED)
def test_reasons_for_uncaptured_steps(reason, monkeypatch):
    emulated = emulate_graphs(monkeypatch, graphs)
    model, cache = with_adapters(tiny_llama(), {"plan": lora(lora_dropout=0.0)}), SharedLoRACache()
    attach(model)
    logits(model, tokens(6), cache)
    UNCAPTURED[reason](model, cache)
    assert cache.eager_reason == reason
    assert cache.trajectory_length == 7 and emulated.replays == 0


def test_activated_lora_is_not_captured(monkeypatch):
    emulate_graphs(monkeypatch, graphs)
    model, cache = with_adapters(tiny_llama(), {"check": lora(alora_invocation_tokens=[61, 60])}), SharedLoRACache()
    ids = torch.cat((tokens(6) % 59 + 1, torch.tensor([[61, 60, 5]])), dim=1)
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3, pad_token_id=0
    )
    assert cache.eager_reason == "the adapter is active from an invocation on (aLoRA)"


def test_the_reference_is_not_captured(monkeypatch):
    emulate_graphs(monkeypatch, graphs)
    monkeypatch.setenv("LORA_SHARED_CACHE_BACKEND", "reference")
    model, cache = two_adapters(), SharedLoRACache()
    model.generate(tokens(6), attention_mask=torch.ones(1, 6), past_key_values=cache, max_new_tokens=3, pad_token_id=0)
    assert cache.eager_reason == "the reference attention was chosen"


def test_rows_that_can_not_be_kept():
    model, cache = two_adapters(), SharedLoRACache()
    ids = tokens(6, rows=3)
    logits(model, ids[:, :4], cache)
    for change, message in (
        (lambda: cache.batch_repeat_interleave(0), "batch_repeat_interleave.0.: expected at least 1"),
        (lambda: cache.batch_select_indices(torch.tensor([False] * 3)), "no row is kept"),
        (lambda: cache.batch_select_indices(torch.tensor([0, 3])), "the cache holds 3 rows; index 3 is out of bounds"),
    ):
        with pytest.raises(SharedCacheError, match=message):
            change()
        assert cache.token_ids.tolist() == ids[:, :4].tolist()
    # As DynamicCache takes them.
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_select_indices([-1])
    assert_equal_logits(logits(model, ids[2:, 4:], cache), reference(model, ids[2:])[:, 4:])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_pass_in_which_layers_keep_nothing_is_not_committed():
    """Gradient checkpointing takes the cache from the layers of a model in training mode, and the model goes on without."""
    model, cache = two_adapters(), SharedLoRACache()
    logits(model, tokens(4), cache)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match="0 of 3 attention layers gave keys and values"):
        logits(model, tokens(6)[:, 4:], cache)
    model.gradient_checkpointing_disable()
    model.eval()
    assert cache.trajectory_length == 4
    assert_equal_logits(logits(model, tokens(6)[:, 4:], cache), reference(model, tokens(6))[:, 4:])


def test_an_argument_that_is_not_cut_to_the_tokens():
    """A length of one is stretched silently: a layer that brings more tokens than are run is refused."""
    model, cache = two_adapters(), SharedLoRACache()
    logits(model, tokens(4), cache)
    embed = model.get_input_embeddings()
    handle = embed.register_forward_hook(lambda module, args, out: out.expand(-1, 3, -1))
    with pytest.raises(UnsupportedModelError, match="gave keys of 1 rows and 3 tokens to the cache, expected 1 and 1"):
        logits(model, tokens(5)[:, 4:], cache, position_ids=torch.tensor([[4]]))
    handle.remove()
    assert_equal_logits(logits(model, tokens(6)[:, 4:], cache), reference(model, tokens(6))[:, 4:])


def test_an_attention_implementation_that_changes_in_the_middle_of_a_pass():
    """Another thread may call set_attn_implementation: without ours low-rank entries would be left out silently."""
    model, cache = two_adapters(), SharedLoRACache()
    logits(model, tokens(4), cache)
    before = model.config._attn_implementation

    def change(module, args, out):
        model.get_base_model().config._attn_implementation_internal = "eager"

    handle = model.get_input_embeddings().register_forward_hook(change)
    with pytest.raises(UnsupportedModelError, match="call its attention through"):
        logits(model, tokens(6)[:, 4:], cache)
    handle.remove()
    assert model.config._attn_implementation == before
    assert_equal_logits(logits(model, tokens(6)[:, 4:], cache), reference(model, tokens(6))[:, 4:])
