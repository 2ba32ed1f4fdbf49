"""What the state machines of ``test_state_machine.py`` (one row) and ``test_state_machine_rows.py`` (batches) have in common."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine
from torch import nn

from lora_shared_cache import buffers, graphs

from .conftest import emulate_graphs
from .tiny import fill_adapter, lora_layers, share_a, tiny_llama, tiny_ministral, with_adapters


def agents_for(names: Sequence[str], patches: pytest.MonkeyPatch, captured: bool, window: int | None) -> nn.Module:
    """A model whose adapters have one A, with what makes graphs and sliding windows show within a few tokens."""
    if captured:
        emulate_graphs(patches, graphs)
        # A block whenever one is possible.
        patches.setattr(graphs, "_BLOCK_COMES", 1)
        patches.setattr(graphs, "_SHORT_BLOCK_COMES", 1)
        patches.setattr(graphs, "BLOCKS", (3, 7))
    if window is None:
        model = with_adapters(tiny_llama(num_hidden_layers=2), names)
    else:
        # As little as possible is kept, so that it is let go of in a short trajectory.
        patches.setattr(buffers, "MIN_MARGIN", 2)
        model = with_adapters(tiny_ministral(num_hidden_layers=2, sliding_window=window), names)
    share_a(model, names)
    return model


def replace_up_projections(model: nn.Module, name: str, seed: int) -> None:
    """Another B of an adapter, as a hot-swap brings it; A stays."""
    down = {path: module.lora_A[name].weight.clone() for path, module in lora_layers(model)}
    fill_adapter(model, name, seed=seed)
    with torch.no_grad():
        for path, module in lora_layers(model):
            module.lora_A[name].weight.copy_(down[path])


def case_of(machine: type[RuleBasedStateMachine], name: str, examples: int, marks: list) -> type:
    """The test of a state machine."""
    machine.__name__ = machine.__qualname__ = name
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples, stateful_step_count=18, deadline=None, suppress_health_check=list(HealthCheck)
    )
    case.pytestmark = marks
    return case
