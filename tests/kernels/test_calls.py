"""Calls that are remembered as their launches: with other tensors of the same kind they give that call's own results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from flash_lora_attention import calls, flash_lora_attention, interface

from .cases import GRID, check, make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(calls, "_plans", {})


def attend(qkv, a):
    return flash_lora_attention(*qkv, **a, return_lse=True, backend="triton")


def plans():
    """Those of whole calls; a merge that is part of one may have its own."""
    return [plan for kind, plan in calls._plans.items() if kind[-1][0] != "merge"]


@pytest.fixture
def only_plans(monkeypatch):
    """From its call on a call that has no plan fails."""

    def fail(*args):
        raise AssertionError("this call was not remembered")

    return lambda: monkeypatch.setattr(interface, "dispatch", fail)


NAMES = ("plain", "base", "adapters_own_lr", "trunk", "trunk_gains", "full_width", "partial_interleaved", "weights",
         "sinks_window", "padding", "bool_mask", "lengths", "length", "layout", "everything")  # fmt: skip


@pytest.mark.parametrize("queries", [1, 37])
@pytest.mark.parametrize("name", NAMES)
def test_the_next_call_of_a_kind(name, queries, only_plans):
    problem = make(S=queries, device=DEVICE, seed=1, **GRID[name])
    expected = attend(*problem)
    calls._plans.clear()
    attend(*make(S=queries, device=DEVICE, **GRID[name]))
    only_plans()
    for found, theirs in zip(attend(*problem), expected, strict=True):
        assert torch.equal(found, theirs)


@pytest.mark.parametrize(
    "options", [dict(r=600, T=20), dict(S=37, r=100), dict(S=70, G=4, T=100, r=16, dtype=torch.float16)], ids=str
)
def test_expanded_keys(options, only_plans, monkeypatch):
    """Paths with a kernel before the attention, whose output is allocated in between."""
    from flash_lora_attention import expand, tuning

    ran = []
    of_device = tuning.dispatch_config
    config = lambda *case: replace(of_device(*case), expand_key_columns=256)  # noqa: E731
    monkeypatch.setattr(tuning, "dispatch_config", config)
    monkeypatch.setattr(expand, "expand", lambda *a, f=expand.expand: ran.append(1) or f(*a))
    attend(*make(device=DEVICE, **options))
    assert ran
    only_plans()
    qkv, a = make(device=DEVICE, seed=1, **options)
    check(*attend(qkv, a), qkv, a)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="long blocks have their own way on CUDA")
@pytest.mark.parametrize(
    "options",
    [dict(S=600, T=1900), dict(S=600, T=600), dict(S=600, T=1900, sinks=True), dict(S=600, T=1900, key=False, val=False),
     dict(S=600, T=5000, B=1), dict(S=600, T=1900, dtype=torch.float32), dict(S=600, T=1900, is_causal=False)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("cudnn_plans", [True, False])
def test_long_blocks(options, cudnn_plans, only_plans):
    options = dict(dict(D=64, r=8, G=4, dtype=torch.bfloat16), **options)
    (q, k, v), a = make(device=DEVICE, **options)
    flash_lora_attention(q, k, v, **a, return_lse=True, cudnn_plans=cudnn_plans)
    only_plans()
    qkv, a = make(device=DEVICE, seed=1, **options)
    check(*flash_lora_attention(*qkv, **a, return_lse=True, cudnn_plans=cudnn_plans), qkv, a)


@pytest.mark.parametrize("cudnn_plans", [True, False])
@pytest.mark.parametrize("hopper", [True, False])
def test_who_serves_long_blocks(hopper, cudnn_plans, monkeypatch):
    """Without plans: the kernel that needs none, FlashAttention-2 where there is none, cuDNN where a call is long."""
    from flash_lora_attention import expand, tuning

    from .test_interpreter import prepared

    served = []

    def stand_in(name):
        def run(query, *args, **kwargs):
            served.append(name)
            return query.clone(), query.new_zeros(query.shape[:3])

        return run

    for name in ("_flash", "_cudnn_square", "_efficient", "dense_attention"):
        monkeypatch.setattr(expand, name, stand_in(name))
    monkeypatch.setattr(expand, "dense_serves", lambda query, *args: hopper and query.dtype == torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    config = tuning.dispatch_config(torch.device("cpu"), torch.float16, 16)

    def serve(dtype, cudnn_queries):
        x = prepared(*make(S=300, T=300, dtype=dtype, key=False, val=False))
        expand.sdpa_attention(x, None, replace(config, cudnn_queries=cudnn_queries), cudnn_plans=cudnn_plans)

    serve(torch.float16, 128)
    serve(torch.float32, 128)
    serve(torch.float16, 400)
    plain = "dense_attention" if hopper else "_flash"
    assert served == ["_cudnn_square" if cudnn_plans else plain, "_efficient", plain]
    monkeypatch.setattr(expand, "_LONG_CALL", 4 * 2 * 4 * 300 * 150 * 16)
    serve(torch.float16, 128)
    assert served[3] == "_cudnn_square"


def test_kinds():
    """Whatever decides how a call is served makes it a kind of its own."""
    (q, k, v), a = make(D=32, r=16, device=DEVICE, mask="bool")
    attend((q, k, v), a)
    others = [
        ((q, k, v), dict(a, scale=0.5)),
        ((q, k, v), dict(a, is_causal=False)),
        ((q, k, v), dict(a, key_length=11)),
        ((q, k, v), dict(a, key_length=torch.tensor(11, device=DEVICE))),
        ((q, k, v), dict(a, sliding_window=4)),
        ((q, k, v), dict(a, rotary_interleaved=True)),
        ((q, k, v), dict(a, attention_mask=None)),
        ((q, k, v), dict(a, attention_mask=torch.randn(a["attention_mask"].shape, device=DEVICE))),
        ((q, k.transpose(1, 2).contiguous().transpose(1, 2), v), a),
        ((q.half(), k.half(), v.half()), a),
        ((q, torch.cat((k[..., :1], k), -1)[..., 1:], v), a),  # begins in the middle of 16 bytes
        ((q[:, :2], k, v), a),
    ]
    for qkv, b in others:
        expected = flash_lora_attention(*qkv, **b, backend="reference")
        for _ in range(2):
            tolerance = 5e-3 if qkv[0].dtype == torch.float16 else 1e-5
            torch.testing.assert_close(attend(qkv, b)[0], expected, rtol=tolerance, atol=tolerance)


def test_a_merge_that_was_known_before_the_call(only_plans):
    from flash_lora_attention.merge_kernel import merge_partials

    options = dict(T=900, B=1, D=32, device=DEVICE)
    out, lse = attend(*make(**options))
    shapes = [step.arguments[0] for plan in plans() for step in plan.steps if step.function is calls._empty]
    splits = max(shape[0] for shape in shapes if len(shape) == 5)
    assert splits > 1
    calls._plans.clear()
    parts = torch.zeros(splits, *out.shape, device=DEVICE), torch.zeros(splits, *lse.shape, device=DEVICE)
    merge_partials(*parts, out.dtype, None)
    assert len(calls._plans) == 1
    attend(*make(**options))
    only_plans()
    qkv, a = make(seed=1, **options)
    check(*attend(qkv, a), qkv, a)


def test_tensors_that_begin_at_one_address():
    """Which of them went where is not known: key and value were one tensor, now they are two."""
    (q, k, v), a = make(device=DEVICE)
    attend((q, k, k), a)
    check(*attend((q, k, v), a), (q, k, v), a)
    assert plans() == [None]


def test_copies():
    """Rows that are no whole words are copied on the way, which a plan can't do."""
    for seed in (0, 1):
        qkv, a = make(r=3, dtype=torch.float16, device=DEVICE, seed=seed)
        check(*attend(qkv, a), qkv, a)
    assert plans() == [None]


def test_wrong_arguments_after_right_ones():
    qkv, a = make(device=DEVICE)
    attend(qkv, a)
    with pytest.raises(ValueError, match="cos's shape"):
        attend(qkv, dict(a, cos=a["cos"][:, :-1]))
    with pytest.raises(ValueError, match="backend"):
        flash_lora_attention(*qkv, **a, backend="nonsense")


def test_an_error_is_not_remembered(monkeypatch):
    qkv, a = make(device=DEVICE)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(interface, "dispatch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            attend(qkv, a)
    assert not calls._plans
    check(*attend(qkv, a), qkv, a)


def test_few_are_kept(monkeypatch):
    monkeypatch.setattr(calls, "MAX_KINDS", 3)
    for length in range(20, 30):
        qkv, a = make(device=DEVICE, length=length)
        check(*attend(qkv, a), qkv, a)
        assert len(calls._plans) <= 3


def test_a_plan_keeps_no_tensor():
    import gc
    import weakref

    qkv, a = make(device=DEVICE)
    attend(qkv, a)
    assert None not in calls._plans.values()
    tensors = [weakref.ref(t) for t in (*qkv, *a.values()) if isinstance(t, torch.Tensor)]
    del qkv, a
    gc.collect()
    assert all(tensor() is None for tensor in tensors)
