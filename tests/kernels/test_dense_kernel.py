"""The kernel for K and V that stand ready, under Triton's interpreter on the CPU and on the GPU where there is one."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from flash_lora_attention import calls
from flash_lora_attention.dense import can_be_mapped, dense_attention
from flash_lora_attention.tuning import DenseConfig, dense_config

from .cases import check, make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
HOPPER = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] == 9
SMALL = DenseConfig(block_m=16, block_n=16, num_warps=4, num_stages=2, min_keys=32)

CASES = [
    dict(S=37, T=37), dict(S=37, T=90), dict(S=64, T=64), dict(S=16, T=300, B=1), dict(S=5, T=301, B=1), dict(S=1, T=33),
    dict(S=37, T=50, is_causal=False), dict(S=9, T=700, B=1, is_causal=False), dict(S=60, T=20, is_causal=False),
    dict(S=37, T=90, sinks=True), dict(S=16, T=300, B=1, sinks=True), dict(S=37, T=90, D=80), dict(S=37, T=90, D=64, G=1),
    dict(S=20, T=60, D=8), dict(S=37, T=90, layout="bthd"), dict(S=37, T=90, trunk=True, B=3), dict(S=8, T=400, trunk=True, B=2),
    dict(S=37, T=90, Hk=1, G=5), dict(S=40, T=90, scale=0.7), dict(S=20, T=200, D=256, B=1), dict(S=33, T=33, D=128, B=1),
]  # fmt: skip


def attend(qkv, a, config=SMALL):
    query, key, value = qkv
    scale = a.get("scale", 1 / math.sqrt(query.shape[-1]))
    is_causal = a.get("is_causal", True)
    return dense_attention(query, key, value, scale=scale, is_causal=is_causal, sinks=a.get("sinks"), config=config)


def problem(seed=0, **options):
    return make(
        **{"key": False, "val": False, "dtype": torch.float16, "device": DEVICE, "seed": seed, "D": 32, **options}
    )


@pytest.mark.skipif(not HOPPER, reason="needs Hopper's tensor memory accelerator")
@pytest.mark.parametrize("options", CASES, ids=str)
def test_attention(options):
    qkv, a = problem(**options)
    assert can_be_mapped(*qkv)
    check(*attend(qkv, a), qkv, a)


@pytest.mark.skipif(not HOPPER, reason="needs Hopper's tensor memory accelerator")
def test_queries_with_heads_and_tokens_exchanged():
    (q, k, v), a = problem(S=37, T=90)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = attend((q, k, v), a)
    check(out, lse, (q, k, v), a)
    assert out.transpose(1, 2).is_contiguous()  # as the model's next projection reads it


@pytest.mark.skipif(not HOPPER, reason="needs Hopper's tensor memory accelerator")
@pytest.mark.parametrize("options", [dict(S=37, T=90), dict(S=16, T=300, B=1), dict(S=37, T=90, sinks=True)], ids=str)
def test_what_is_behind_the_keys_is_not_seen(options):
    """Keys are often the first of a longer storage, which holds anything behind them."""
    qkv, a = problem(**options)
    longer = [torch.cat((t, torch.full_like(t[:, :, :40], math.nan)), dim=2) for t in qkv[1:]]
    found = attend((qkv[0], *(t[:, :, : options["T"]] for t in longer)), a)
    check(*found, qkv, a)


@pytest.mark.skipif(not HOPPER, reason="needs Hopper's tensor memory accelerator")
@pytest.mark.parametrize("options", CASES[:5] + CASES[9:11] + CASES[15:16], ids=str)
def test_the_next_call_of_a_kind(options, monkeypatch):
    """Remembered with its tensor maps: other tensors of the same kind are mapped anew."""
    monkeypatch.setattr(calls, "_plans", {})

    def serve(seed):
        qkv, a = problem(seed=seed, **options)
        check(*calls.serve((*qkv, a.get("sinks")), ("dense",), lambda: attend(qkv, a)), qkv, a)

    serve(0)
    assert None not in calls._plans.values()

    def fail(*args, **kwargs):
        raise AssertionError("this call was not remembered")

    monkeypatch.setitem(globals(), "attend", fail)
    serve(1)


def test_what_can_be_mapped():
    def tensor(*shape, dtype=torch.float16):
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    fine = tensor(2, 3, 5, 32)
    assert can_be_mapped(fine, fine.transpose(1, 2), fine[:1].expand(4, -1, -1, -1), tensor(1, 1, 1, 8))
    not_fine = [
        fine.float(), fine.bfloat16(), tensor(2, 3, 5, 33)[..., :32], fine[..., ::2], tensor(2, 3, 5, 40)[..., 4:36],
        tensor(2, 3, 5, 512), fine[:, :, :0], fine[:, :1].expand(-1, 3, -1, -1),
    ]  # fmt: skip
    for other in not_fine:
        assert not can_be_mapped(fine, other)


@pytest.mark.skipif(DEVICE == "cpu" or not HOPPER, reason="the device's own configuration")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    "options", [dict(S=700, T=700), dict(S=1000, T=5000, B=1), dict(S=300, T=9000, B=1), dict(S=64, T=20000, B=1)], ids=str
)  # fmt: skip
def test_with_the_tuned_tiles(options, D, dtype):
    qkv, a = problem(D=D, dtype=dtype, G=4, **options)
    check(*attend(qkv, a, dense_config(qkv[0].device, dtype, D)), qkv, a)
