"""Scaled rotations: every kind that Transformers has, against PEFT with a ``DynamicCache`` for each adapter.

"dynamic" and "longrope" rotate new tokens otherwise once the text is longer than ``original_max_position_embeddings``; what is
cached keeps its rotation, with PEFT and here. The texts below cross that length in the middle of the first agent's turn.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora_shared_cache import SharedLoRACache, graphs

from .conftest import emulate_graphs
from .models_table import RANKS, TOLERANCE, TURNS, Float64, N, Text, add_adapters, build, largest_difference
from .tiny import activate, lora, with_adapters
from .tiny_configs import tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

LIMIT = 12
PIECES = [size for _, sizes in TURNS for size in sizes]
ORIGINAL = dict(original_max_position_embeddings=LIMIT)
SCALINGS = {
    "linear": dict(factor=4.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL),
    "yarn": dict(factor=4.0, **ORIGINAL),
    "proportional": dict(partial_rotary_factor=0.5),
    "dynamic": dict(factor=2.0, **ORIGINAL),
    "longrope": dict(factor=4.0, short_factor=[1.0] * 4, long_factor=[2.0, 3.0, 4.0, 5.0], **ORIGINAL),
}
CHANGING = ["dynamic", "longrope"]


def model_with(kind: str):
    config = tiny_config("llama")
    config.rope_parameters = dict(rope_type=kind, rope_theta=10000.0, **SCALINGS[kind])
    config.max_position_embeddings = LIMIT if kind == "dynamic" else 4 * LIMIT
    return build(config)


def test_every_kind_is_tried():
    assert set(SCALINGS) == set(ROPE_INIT_FUNCTIONS)


@pytest.mark.parametrize("kind", SCALINGS)
def test_agents_in_turns(kind):
    text = Text(add_adapters(model_with(kind)))
    with Float64():
        exact = text.by_turns({agent: text.alone(agent, PIECES) for agent in RANKS})
        at_once = text.by_turns({agent: text.alone(agent) for agent in RANKS})
        # Where the rotation changes, when a token was run matters.
        assert (largest_difference(at_once, exact, text.mask) > 0.01) == (kind in CHANGING)
        for sharing in ("base_shared", "lr_precomputed"):
            assert largest_difference(text.in_turns(sharing), exact, text.mask) <= TOLERANCE


@pytest.mark.parametrize("kind", CHANGING)
def test_captured_steps(kind, monkeypatch):
    graph = emulate_graphs(monkeypatch, graphs)
    text = Text(add_adapters(model_with(kind)))
    with Float64():
        exact = text.by_turns({agent: text.alone(agent, PIECES) for agent in RANKS})
        assert largest_difference(text.in_turns("base_shared"), exact, text.mask) <= TOLERANCE
    assert graph.replays > 0


@pytest.mark.parametrize("kind", CHANGING)
@pytest.mark.parametrize("targets", [["v_proj"], ["k_proj"]])
@pytest.mark.parametrize("private", [(), (0,), (0, 1)])
def test_tokens_that_are_run_again_keep_their_rotation(kind, targets, private):
    """Whoever runs them, and whether or not its adapter changes keys: an agent that comes late equals one that was there."""
    model = with_adapters(
        model_with(kind), {name: lora(target_modules=targets, rank_pattern={}) for name in ("one", "two")}
    )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in parameters:
            if ".two." in name:
                parameters[name].copy_(parameters[name.replace(".two.", ".one.")])
    text = Text(model, padded=False)
    with Float64():
        exact = text.alone("one", [8, 8, N - 16])
        activate(model, "one")
        cache = SharedLoRACache(model, sharing="base_shared", private_layers=private)
        text.logits(cache, 0, 8, 0)
        text.logits(cache, 8, 16, 8)
        activate(model, "two")
        # All but the last call's tokens again, up to a place before the length at which the rotation changes, and beyond.
        again = torch.cat([text.logits(cache, 0, 10, 0), text.logits(cache, 10, N, 10)], dim=1)
    assert largest_difference(again, exact, text.mask) <= TOLERANCE


@pytest.mark.parametrize("kind", CHANGING)
def test_crop_goes_back_over_the_change(kind):
    """As with a ``DynamicCache``; a dynamic rotation stays that of the longest text so far, which Transformers' module keeps."""
    text = Text(add_adapters(model_with(kind)), padded=False)

    def run(cache):
        text.logits(cache, 0, 8, 0)
        text.logits(cache, 8, 20, 8)
        cache.crop(-12)
        return torch.cat([text.logits(cache, 8, 16, 8), text.logits(cache, 16, N, 16)], dim=1)

    with Float64():
        exact = run(DynamicCache(config=text.model.config))
        assert largest_difference(run(SharedLoRACache(text.model)), exact, text.mask[:, 8:]) <= TOLERANCE
