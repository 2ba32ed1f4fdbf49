"""The Triton kernels on the CPU, under Triton's interpreter: small odd shapes over the whole argument grid."""

from __future__ import annotations

import os

import pytest
import torch

from flash_lora_attention import flash_lora_attention, flash_lora_attention_reference, merge_states

from .cases import GRID, check, make

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run natively here")


def prepared(qkv, a):
    """The arguments in the form that the launchers take."""
    from flash_lora_attention.arguments import Problem
    from flash_lora_attention.inputs import prepare

    optional = dict.fromkeys((
        "key_low_rank", "key_up", "value_low_rank", "value_up", "cos", "sin", "adapter_index", "key_gain",
        "key_delta_gain", "key_delta_weight", "scale", "sliding_window", "softcap", "sinks", "attention_mask",
    ))  # fmt: skip
    fixed = dict(low_rank_per_adapter=False, is_causal=True, rotary_interleaved=False)
    given = {k: v for k, v in a.items() if k not in ("rotary_dim", "key_length")}
    length = a.get("key_length")
    problem = Problem(qkv[1].shape[2] if length is None else length, a.get("rotary_dim") or qkv[0].shape[-1], 1)
    return prepare(problem, *qkv, **{**optional, **fixed, **given})


@pytest.mark.parametrize(
    "name, queries",
    [(name, queries) for name in GRID for queries in (1, 37)]
    + [(name, 3) for name in ("plain", "adapters", "window", "sinks", "bool_mask", "lengths", "everything")],
)
def test_argument_grid(name, queries):
    qkv, a = make(S=queries, **GRID[name])
    check(*flash_lora_attention(*qkv, **a, return_lse=True, backend="triton"), qkv, a)


@pytest.mark.parametrize("queries", [1, 37])
@pytest.mark.parametrize(
    "name", ["plain", "adapters", "gains", "sinks", "partial_interleaved", "strided", "strided_trunk"]
)
def test_float16(name, queries):
    qkv, a = make(S=queries, dtype=torch.float16, **GRID[name])
    check(*flash_lora_attention(*qkv, **a, return_lse=True, backend="triton"), qkv, a)


@pytest.mark.parametrize(
    "name", ["plain", "adapters", "trunk", "trunk_gains", "gains", "weights", "partial", "no_rope", "mha", "rank_70"]
)
@pytest.mark.parametrize("queries", [1, 3])
def test_folded_product(name, queries):
    """In float32, where an error shows that float16 hides; there the default expands on chip."""
    from flash_lora_attention.decode import split_kv_attention
    from flash_lora_attention.tuning import DecodeConfig

    qkv, a = make(S=queries, **GRID[name])
    check(*split_kv_attention(prepared(qkv, a), DecodeConfig(32, 4, 1, 2, max_folded=1024)), qkv, a)


@pytest.mark.parametrize("max_folded", [16, 128])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(n=2), dict(n=2, lr="adapter"), dict(lr="one"), dict(n=2, gains="rows"),
        dict(n=2, length="rows"), dict(gains="rows", weight=True, rotary_dim=8),
        dict(rope=None), dict(rope="interleaved", rotary_dim=8), dict(rope="full", rotary_dim=8), dict(val=False),
        dict(n=2, mask="padding", sinks=True, softcap=3.0), dict(layout="strided"), dict(length=40),
    ],
    ids=str,
)  # fmt: skip
def test_scores_ahead(options, queries, max_folded):
    """Many rows of one trunk: their low-rank scores come from a kernel of their own."""
    from flash_lora_attention import decode
    from flash_lora_attention.tuning import DecodeConfig, ScoresConfig

    qkv, a = make(**{**dict(B=5, r=2, S=queries, trunk=True), **options})
    x = prepared(qkv, a)
    config, scores = (
        DecodeConfig(32, 4, 1, 2, max_folded=8),
        ScoresConfig(32, 4, 1, 2, max_folded=max_folded, min_rows=2),
    )
    assert decode._scores_ahead(x, config, scores)
    check(*decode.split_kv_attention(x, config, scores=scores), qkv, a)


@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_split_count_does_not_matter(num_splits):
    from flash_lora_attention.decode import split_kv_attention
    from flash_lora_attention.extend import extend_attention
    from flash_lora_attention.tuning import decode_config, extend_config

    qkv, a = make(S=3, T=150, sinks=True)
    x = prepared(qkv, a)
    case = (qkv[0].device, qkv[0].dtype, 16)
    check(*split_kv_attention(x, decode_config(*case, None), num_splits), qkv, a)
    check(*extend_attention(x, extend_config(*case), num_splits), qkv, a)


@pytest.mark.parametrize(
    "name",
    ["adapters_own_lr", "gains", "weights", "partial", "interleaved", "gains_without_lr", "rank_70", "head_size_20"],
)
def test_expand(name):
    from flash_lora_attention.expand import expand
    from flash_lora_attention.tuning import ExpandConfig

    from .dense import expand_dense

    qkv, a = make(**GRID[name])
    x = prepared(qkv, a)
    for length in (70, 33):
        for ours, exact in zip(expand(x, length, ExpandConfig(16, 4)), expand_dense(*qkv[1:], **a), strict=True):
            exact = exact[:, :, :length]
            assert torch.isfinite(ours).all()
            assert (ours - exact).norm() <= 4 * torch.finfo(ours.dtype).eps * exact.norm()


@pytest.mark.parametrize("name", ["plain", "adapters_own_lr", "gains", "value_only", "padding", "length"])
@pytest.mark.parametrize("with_value", [False, True])
def test_attention_over_expanded_keys(name, with_value):
    from flash_lora_attention.expand import expanded
    from flash_lora_attention.extend import extend_attention
    from flash_lora_attention.tuning import ExpandConfig, extend_config

    qkv, a = make(S=20, **GRID[name])
    x = expanded(prepared(qkv, a), a.get("key_length") or 70, ExpandConfig(16, 4), with_value)
    assert x.key_low_rank is None and (x.value_low_rank is None) == with_value
    check(*extend_attention(x, extend_config(qkv[0].device, qkv[0].dtype, 16), after_expansion=True), qkv, a)


def test_base_row_never_reads_its_low_rank_entries():
    qkv, a = make(**GRID["adapters"])
    base = a["adapter_index"] < 0
    assert base.any() and not base.all()
    expected = flash_lora_attention(*qkv, **a, backend="triton")
    a["key_low_rank"] = a["key_low_rank"].masked_fill(base[:, None, None], float("nan"))
    a["value_low_rank"] = a["value_low_rank"].masked_fill(base[:, None, None], float("nan"))
    assert torch.equal(flash_lora_attention(*qkv, **a, backend="triton"), expected)


def test_nothing_past_the_length_is_read():
    qkv, a = make(length=41, S=3)
    expected = flash_lora_attention(*qkv, **a, backend="triton")
    for t in (qkv[1], qkv[2]):
        t[:, :, 41:] = float("nan")
    for name in ("key_low_rank", "value_low_rank", "cos", "sin"):
        a[name][:, 41:] = float("nan")
    assert torch.equal(flash_lora_attention(*qkv, **a, backend="triton"), expected)


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("name", GRID)
def test_reference_agrees_with_the_dense_float64(name, dtype):
    qkv, a = make(S=5, dtype=dtype, **GRID[name])
    check(*flash_lora_attention_reference(*qkv, **a, return_lse=True), qkv, a)


@pytest.mark.parametrize("name", ["plain", "adapters", "lengths"])
def test_compile_fullgraph_on_the_cpu(name):
    qkv, a = make(S=3, **GRID[name])
    compiled = torch.compile(lambda q, k, v: flash_lora_attention(q, k, v, **a), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*qkv), flash_lora_attention_reference(*qkv, **a), rtol=0, atol=0)


def test_an_impossible_backend_is_refused(monkeypatch):
    qkv, a = make()
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        flash_lora_attention(*qkv, **a, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="without TRITON_INTERPRET=1"):
        flash_lora_attention(*qkv, **a, backend="triton")


def test_what_other_devices_get(monkeypatch):
    """Shown by names alone: no such device is here."""
    from types import SimpleNamespace

    from flash_lora_attention import tuning
    from flash_lora_attention.interface import _unserved
    from flash_lora_attention.merge_kernel import launches_dependents

    cuda = torch.device("cuda", 0)
    tensor = SimpleNamespace(is_cuda=True, device=cuda, dtype=torch.float16, shape=(1, 1, 1, 64))
    for capability, name, hip, served, dependent, config in (
        ((7, 5), "Tesla T4", None, False, False, "default"), ((8, 0), "NVIDIA A100", None, True, False, "default"),
        ((9, 0), "NVIDIA H200", None, True, True, "NVIDIA H100 80GB HBM3"),
        ((9, 4), "AMD Instinct MI300X", "6.4", True, False, "default"),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        monkeypatch.setattr(torch.version, "hip", hip)
        tuning._config.cache_clear()
        assert (_unserved(tensor, tensor) is None) == served
        assert launches_dependents(cuda) == dependent
        if config == "default":
            with pytest.warns(UserWarning, match=f"no tuned configuration for '{name}'"):
                assert tuning._config(0)["device"] == config
        else:
            assert tuning._config(0)["device"] == config
    tuning._config.cache_clear()


def test_merge_states_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="expected"):
        merge_states(torch.zeros(2, 1, 2, 3, 4), torch.zeros(2, 1, 2, 4))


@pytest.mark.parametrize("sinks", [False, True])
def test_merge_states_is_attention_over_the_union(sinks):
    qkv, a = make(S=5, T=60, is_causal=False)
    q, k, v = qkv
    parts = []
    for cut in (slice(0, 10), slice(10, 51), slice(51, 60)):
        piece = {n: t[:, cut] if n in ("key_low_rank", "value_low_rank", "cos", "sin") else t for n, t in a.items()}
        parts.append(flash_lora_attention_reference(q, k[:, :, cut], v[:, :, cut], **piece, return_lse=True))
    sink = torch.randn(4) if sinks else None
    out, lse = torch.stack([o for o, _ in parts]), torch.stack([s for _, s in parts])
    check(*merge_states(out, lse, sink), qkv, {**a, "sinks": sink} if sinks else a)
    from flash_lora_attention.merge_kernel import merge_partials

    check(*merge_partials(out, lse, q.dtype, sink), qkv, {**a, "sinks": sink} if sinks else a)


def test_sizes_are_tritons():
    import triton

    from flash_lora_attention.sizes import cdiv, next_power_of_2

    for n in (*range(1, 70), 4095, 4096, 4097, 1 << 20):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert [cdiv(n - 1, y) for y in (1, 3, 64)] == [triton.cdiv(n - 1, y) for y in (1, 3, 64)]
