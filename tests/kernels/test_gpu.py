"""The kernels on a CUDA device: the whole grid, all head sizes and dtypes, long contexts, determinism, torch.compile."""

from __future__ import annotations

import pytest
import torch

from flash_lora_attention import flash_lora_attention, flash_lora_attention_reference, merge_states

from .cases import GRID, check, make
from .dense import attention_dense

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def run_and_check(**options):
    qkv, a = make(device="cuda", **options)
    return check(*flash_lora_attention(*qkv, **a, return_lse=True, backend="triton"), qkv, a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 5, 37, 300])
@pytest.mark.parametrize("name", GRID)
def test_argument_grid(name, queries, dtype):
    run_and_check(**{"D": 64, "T": 777, "Hk": 2, "G": 4, "S": queries, "dtype": dtype, **GRID[name]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 200])
@pytest.mark.parametrize("r", [1, 16, 64, 256])
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
def test_head_sizes_and_ranks(D, r, queries, dtype):
    run_and_check(D=D, r=r, S=queries, T=1111, dtype=dtype)


@pytest.mark.parametrize(
    "dtype, cudnn_plans", [(dtype, True) for dtype in DTYPES] + [(dtype, False) for dtype in DTYPES[:2]], ids=str
)
@pytest.mark.parametrize(
    "options",
    [
        dict(S=512, T=512), dict(S=1000, T=1000), dict(S=999, T=5000), dict(S=300, T=5000, B=1),
        dict(S=300, T=5000, B=1, sinks=True), dict(S=300, T=3000, length=2500), dict(S=300, T=3000, is_causal=False),
        dict(S=300, T=300, is_causal=False, sinks=True), dict(S=300, T=2500, key=False), dict(S=300, T=2500, val=False),
        dict(S=300, T=2500, n=2, B=3, layout="bthd"), dict(S=300, T=2000, trunk=True, n=2, B=3),
    ],
    ids=str,
)  # fmt: skip
def test_expand_and_sdpa(options, dtype, cudnn_plans):
    run_and_check(cudnn_plans=cudnn_plans, **{"D": 128, "G": 4, "r": 16, "dtype": dtype, **options})


@pytest.mark.parametrize("n", [1, 8])
def test_rows_of_one_trunk(n):
    run_and_check(
        B=8, n=n, trunk=True, lr="adapter" if n > 1 else "row", D=128, G=4, r=16, T=4097, dtype=torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(r=8), dict(r=32), dict(r=3), dict(D=64), dict(D=80), dict(D=256), dict(rope="interleaved", rotary_dim=64),
        dict(rope=None), dict(gains="rows"), dict(length="rows"), dict(softcap=3.0, sinks=True, mask="padding"), dict(S=2),
        dict(B=5), dict(B=11), dict(val=False), dict(layout="strided"), dict(Hk=8, G=1, r=64),
    ],
    ids=str,
)  # fmt: skip
def test_many_rows_of_one_trunk(options, dtype):
    common = dict(B=8, n=8, trunk=True, lr="adapter", D=128, G=4, r=16, T=1111, dtype=dtype)
    run_and_check(**{**common, **options})


@pytest.mark.parametrize("queries", [1, 129])
def test_two_runs_are_equal(queries):
    qkv, a = make(S=queries, D=128, G=4, T=9001, B=1, dtype=torch.bfloat16, device="cuda")
    first = flash_lora_attention(*qkv, **a)
    assert all(torch.equal(first, flash_lora_attention(*qkv, **a)) for _ in range(5))


def test_million_tokens():
    run_and_check(B=1, Hk=2, G=4, D=128, r=16, T=1 << 20, dtype=torch.bfloat16)


def test_addresses_beyond_32_bits():
    """Rows of a cache with more than 2**31 elements: the last one must read its own keys."""
    B, Hk, T, D = 3, 8, 1 << 20, 128
    k = torch.randn(B, Hk, T, D, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(B, Hk, 1, D, device="cuda", dtype=torch.bfloat16)
    out = flash_lora_attention(q, k, k)
    exact, _ = attention_dense(q[2:, -1:], k[2:, -1:], k[2:, -1:])
    assert (out[2:, -1:] - exact).norm() <= 0.02 * exact.norm()


def test_length_on_the_device_needs_no_synchronisation():
    qkv, a = make(S=1, D=64, T=500, length="rows", device="cuda", dtype=torch.bfloat16)
    expected = flash_lora_attention(*qkv, **a)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_lora_attention(*qkv, **a)
    a["key_length"].copy_(torch.tensor([3, 450], device="cuda"))
    graph.replay()
    assert not torch.equal(out, expected)
    assert torch.equal(out, flash_lora_attention(*qkv, **a))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def test_compile_fullgraph():
    qkv, a = make(S=1, D=64, T=500, device="cuda", dtype=torch.bfloat16)

    @torch.compile(fullgraph=True)
    def step(q, k, v):
        return flash_lora_attention(q * 2, k, v, **a) + 1

    q, k, v = qkv
    torch.testing.assert_close(step(q, k, v), flash_lora_attention(q * 2, k, v, **a) + 1, rtol=0, atol=2**-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_states_is_attention_over_the_union(dtype):
    qkv, a = make(S=5, D=64, T=600, is_causal=False, device="cuda", dtype=dtype)
    q, k, v = qkv
    parts = []
    for cut in (slice(0, 100), slice(100, 511), slice(511, 600)):
        piece = dict(a)
        for name in ("key_low_rank", "value_low_rank", "cos", "sin"):
            piece[name] = a[name][:, cut]
        parts.append(flash_lora_attention(q, k[:, :, cut], v[:, :, cut], **piece, return_lse=True))
    merged = merge_states(torch.stack([o for o, _ in parts]), torch.stack([s for _, s in parts]))
    check(*merged, qkv, a)


def test_float64_and_gradients_go_to_the_reference():
    qkv, a = make(S=2, D=64, device="cuda")
    q = qkv[0].requires_grad_()
    flash_lora_attention(*qkv, **a).sum().backward()
    assert q.grad is not None
    qkv, a = make(S=2, D=64, device="cuda", dtype=torch.float64)
    assert torch.equal(flash_lora_attention(*qkv, **a), flash_lora_attention_reference(*qkv, **a))
