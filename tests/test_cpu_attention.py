"""Attention of blocks on a CPU against the dense reference in float64."""

from __future__ import annotations

import pytest
import torch

from flash_lora_attention import flash_lora_attention_reference
from lora_shared_cache import SharedLoRACache, cpu_attention, layer_pass
from lora_shared_cache.cpu_attention import block_attention, step_attention

from .tiny import activate, assert_equal_logits, logits, ones, tiny_llama, tokens, with_adapters


def problem(S, T, B=2, Hq=6, Hk=2, D=8, r=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(S + T)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return rand(B, Hq, S, D), rand(B, Hk, T, D), rand(B, Hk, T, D), rand(B, T, r), rand(Hk, r, D), rand(B, Hk, r, D)


def causal(S, T, rows=1):
    return torch.ones(S, T, dtype=torch.bool).tril(T - S).expand(rows, 1, S, T)


MASKS = {
    "none": lambda S, T: None,
    "left padding": lambda S, T: torch.cat((causal(S, T), causal(S, T) & (torch.arange(T) >= T - S + 3))),
    "window": lambda S, T: causal(S, T) & causal(S, T).logical_not().roll(5, -1).logical_not(),
    "additive": lambda S, T: (
        torch.zeros(1, 1, S, T, dtype=torch.float64).masked_fill(~causal(S, T), float("-inf")) - 0.3
    ),
}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("S, T", [(40, 40), (16, 90), (37, 60), (300, 520)])
@pytest.mark.parametrize("up", ["one", "of rows", None])
def test_against_the_reference(S, T, mask, up, is_causal, monkeypatch):
    monkeypatch.setattr(cpu_attention, "_BLOCK", 64)
    query, key, value, low_rank, one, of_rows = problem(S, T)
    given = MASKS[mask](S, T)
    low_rank = None if up is None else low_rank
    value_up = {"one": one, "of rows": of_rows, None: None}[up]
    out = block_attention(
        query, key, value, value_low_rank=low_rank, value_up=value_up, attention_mask=given, scale=0.4, is_causal=is_causal
    )  # fmt: skip
    options = dict(value_low_rank=low_rank, value_up=value_up)
    if up == "of rows":
        options |= dict(value_up=of_rows, adapter_index=torch.arange(2))
    expected = flash_lora_attention_reference(
        query, key, value, attention_mask=given, scale=0.4, is_causal=is_causal, **options
    )
    assert bool(out.isfinite().all())
    assert float((out - expected).abs().max()) < 1e-13


@pytest.mark.parametrize("T", [1, 7, 90])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("up", ["one", "of rows", None])
def test_one_token_against_the_reference(T, scale, up):
    query, key, value, low_rank, one, of_rows = problem(1, T)
    options = dict(value_low_rank=None, value_up=None)
    if up is not None:
        options = dict(value_low_rank=low_rank, value_up=one if up == "one" else of_rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = step_attention(query.transpose(1, 2).contiguous().transpose(1, 2), key, value, scale=scale, **options)
    if up == "of rows":
        options |= dict(adapter_index=torch.arange(2))
    expected = flash_lora_attention_reference(query, key, value, scale=scale, **options)
    assert out.shape == expected.shape and float((out - expected).abs().max()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_close_as_the_reference(dtype):
    exact = problem(50, 70)
    given = [t.to(dtype) for t in exact]
    query, key, value, low_rank, up, _ = exact
    options = dict(value_low_rank=low_rank, value_up=up)
    mask = torch.randn(1, 1, 50, 70, generator=torch.Generator().manual_seed(0))
    expected = flash_lora_attention_reference(query, key, value, attention_mask=mask, **options)
    query, key, value, low_rank, up, _ = given
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block_attention(
            query, key, value, value_low_rank=low_rank, value_up=up, attention_mask=mask, scale=None, is_causal=True
        )
    assert out.dtype == dtype
    error = float((out - expected).norm() / expected.norm())
    assert error < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sharing", ["base_shared", "lr_precomputed"])
def test_blocks_of_a_model_take_it_and_give_what_the_reference_gives(sharing, padded, monkeypatch):
    model = with_adapters(tiny_llama(), ["plan", "act"])
    ids, mask = tokens(70, rows=2), ones(70, rows=2)
    if padded:
        mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    calls, steps = [], []

    def counted(query, *args, **options):
        calls.append(query.shape[2])
        return block_attention(query, *args, **options)

    def counted_step(query, *args, **options):
        steps.append(query.shape[2])
        return step_attention(query, *args, **options)

    monkeypatch.setattr(layer_pass, "block_attention", counted)
    monkeypatch.setattr(layer_pass, "step_attention", counted_step)
    outs = []
    for backend in ("", "reference"):
        monkeypatch.setenv("LORA_SHARED_CACHE_BACKEND", backend)
        calls.clear(), steps.clear()
        cache = SharedLoRACache(sharing=sharing)
        activate(model, "plan")
        places = dict(position_ids=positions[:, :40], attention_mask=mask[:, :40])
        first = logits(model, ids[:, :40], cache, **places)
        activate(model, "act")
        second = logits(model, ids[:, 40:69], cache, position_ids=positions[:, 40:69], attention_mask=mask[:, :69])
        last = logits(model, ids[:, 69:], cache, position_ids=positions[:, 69:], attention_mask=mask)
        # Padding is a mask of its own.
        assert bool(steps) == (backend == "" and not padded) and set(steps) <= {1}
        outs.append(torch.cat((first, second[:, -29:], last), dim=1)[mask.bool()])
        assert bool(calls) == (backend == "") and min(calls, default=16) >= cpu_attention.MIN_TOKENS
    assert_equal_logits(*outs)
