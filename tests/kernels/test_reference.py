"""``flash_lora_attention_reference`` against attention computed one query and one head at a time in float64.

The oracle below shares nothing with the package: a scalar loop over rows, heads, queries and keys, rotation by a matrix,
visibility as a Python condition.
"""

from __future__ import annotations

import math

import pytest
import torch

from flash_lora_attention import flash_lora_attention_reference

B, HQ, HK, S, T, D, R = 3, 4, 2, 3, 7, 8, 3
# Sums of at most a few hundred float64 terms of size 1.
EXACT = 1e-12


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(s=S, t=T, hq=HQ, hk=HK, key_lora=True, value_lora=True, rope="half", rotary_dim=None, rows=B, n=None):
    """Arguments of a call; ``rope``: None, "half", "interleaved"; angles at full width."""
    a = dict(query=random(B, hq, s, D, seed=1), key=random(B, hk, t, D, seed=2), value=random(B, hk, t, D, seed=3))
    up = (hk, R, D) if n is None else (n, hk, R, D)
    if key_lora:
        a |= dict(key_low_rank=random(rows, t, R, seed=4), key_up=random(*up, seed=5))
    if value_lora:
        a |= dict(value_low_rank=random(rows, t, R, seed=6), value_up=random(*up, seed=7))
    if rope:
        half = (rotary_dim or D) // 2
        angle = random(B, t, half, seed=8) * 3
        wide = torch.cat((angle, angle), -1) if rope == "half" else angle.repeat_interleave(2, -1)
        a |= dict(cos=wide.cos(), sin=wide.sin(), rotary_interleaved=rope == "interleaved", rotary_dim=rotary_dim)
    return a


def row_of(tensor, b):
    return tensor[b] if tensor.shape[0] > 1 else tensor[0]


def rotation(cos, sin, rotary_dim, interleaved):
    """(D, D) matrix that rotates one head; cos/sin of one token, at full or half width."""
    half = rotary_dim // 2
    if len(cos) == rotary_dim:
        pick = [2 * i for i in range(half)] if interleaved else list(range(half))
        cos, sin = [float(cos[i]) for i in pick], [float(sin[i]) for i in pick]
    matrix = torch.eye(D, dtype=torch.float64)
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = float(cos[i]), float(sin[i])
        matrix[first, first], matrix[first, second] = c, -s
        matrix[second, first], matrix[second, second] = s, c
    return matrix


def dense(
    query, key, value, *, key_low_rank=None, key_up=None, value_low_rank=None, value_up=None, adapter_index=None,
    low_rank_per_adapter=False, cos=None, sin=None, rotary_dim=None, rotary_interleaved=False, key_gain=None,
    key_delta_gain=None, key_delta_weight=None, scale=None, is_causal=True, sliding_window=None, softcap=None, sinks=None,
    attention_mask=None, key_length=None,
):  # fmt: skip
    """(out, lse) in float64."""
    rows, hq, s, _ = query.shape
    hk, t = key.shape[1:3]
    out = torch.zeros(rows, hq, s, D, dtype=torch.float64)
    lse = torch.full((rows, hq, s), -math.inf, dtype=torch.float64)
    for b in range(rows):
        adapter = 0 if adapter_index is None else int(adapter_index[b])
        length = t if key_length is None else key_length
        length = int(length[b]) if isinstance(length, torch.Tensor) and length.dim() else int(length)

        def delta(low_rank, up, h, token, b=b, adapter=adapter):
            if low_rank is None or adapter < 0:
                return torch.zeros(D, dtype=torch.float64)
            a = (low_rank[adapter] if low_rank_per_adapter else row_of(low_rank, b))[token].double()
            return torch.einsum("r,rd->d", a, (up if up.dim() == 3 else up[adapter])[h].double())

        for h in range(hq):
            g = h // (hq // hk)
            keys, values = [], []
            for token in range(t):
                d = delta(key_low_rank, key_up, g, token)
                if cos is not None:
                    d = rotation(row_of(cos, b)[token], row_of(sin, b)[token], rotary_dim or D, rotary_interleaved) @ d
                if key_delta_weight is not None:
                    d = d * key_delta_weight[g].double()
                k = key[b, g, token].double()
                if key_gain is not None:
                    k, d = k * row_of(key_gain, b)[g, token].double(), d * row_of(key_delta_gain, b)[g, token].double()
                keys.append(k + d)
                values.append(value[b, g, token].double() + delta(value_low_rank, value_up, g, token))
            for i in range(s):
                position = length - s + i
                scores, seen = [], []
                for token in range(t):
                    score = float(query[b, h, i].double() @ keys[token]) * (D**-0.5 if scale is None else scale)
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    visible = token < length
                    visible &= not is_causal or token <= position
                    visible &= sliding_window is None or token > position - sliding_window
                    if attention_mask is not None and attention_mask.dim() == 2:
                        visible &= bool(attention_mask[b, token])
                    elif attention_mask is not None:
                        mask = row_of(attention_mask, b)
                        mask = mask[h if mask.shape[0] > 1 else 0, i, token]
                        if mask.dtype == torch.bool:
                            visible &= bool(mask)
                        else:
                            score += float(mask)
                    if visible and score > -math.inf:
                        scores.append(score)
                        seen.append(values[token])
                total = [math.exp(x) for x in scores] + ([] if sinks is None else [math.exp(float(sinks[h]))])
                if total:
                    lse[b, h, i] = math.log(sum(total))
                for score, v in zip(scores, seen, strict=True):
                    out[b, h, i] += math.exp(score) / sum(total) * v
    return out, lse


def check(a, tolerance=EXACT):
    expected, expected_lse = dense(**a)
    out, lse = flash_lora_attention_reference(**a, return_lse=True)
    alone = flash_lora_attention_reference(**a)
    for actual in (out, alone):
        assert actual.shape == expected.shape and actual.dtype == a["query"].dtype
        assert float((actual.double() - expected).abs().max()) <= tolerance
    assert lse.dtype == torch.float32
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    # The log-sum-exp is handed out in float32.
    if not bool(empty.all()):
        assert float((lse.double() - expected_lse)[~empty].abs().max()) <= max(tolerance, 1e-5)
    return out


def matters(a, *names):
    """Without these arguments the result is another one."""
    without = {k: v for k, v in a.items() if k not in names}
    return float((dense(**a)[0] - dense(**without)[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_grouped_heads_and_absent_parts(heads, parts):
    a = inputs(hq=heads[0], hk=heads[1], key_lora=parts[0], value_lora=parts[1])
    if parts[0]:
        assert matters(a, "key_low_rank", "key_up")
    if parts[1]:
        assert matters(a, "value_low_rank", "value_up")
    check(a)


@pytest.mark.parametrize("width", ["full", "half"])
@pytest.mark.parametrize("rotary_dim", [None, 8, 4, 2])
@pytest.mark.parametrize("rope", ["half", "interleaved"])
def test_rotation(rope, rotary_dim, width):
    a = inputs(rope=rope, rotary_dim=rotary_dim)
    assert matters(a, "cos", "sin")
    if width == "half":
        for name in ("cos", "sin"):
            a[name] = a[name][..., ::2] if rope == "interleaved" else a[name][..., : (rotary_dim or D) // 2]
    check(a)
    for name in ("cos", "sin"):
        a[name] = a[name][:1]
    check(a)


def test_no_rotation():
    check(inputs(rope=None))


def test_rotary_layouts_differ():
    out = [check(inputs(rope=rope, rotary_dim=d)) for rope in ("half", "interleaved") for d in (8, 4)]
    for i, one in enumerate(out):
        for other in out[i + 1 :]:
            assert float((one - other).abs().max()) > 1e-3


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("key_lora", [True, False])
def test_key_gains(rows, key_lora):
    a = inputs(key_lora=key_lora)
    a |= dict(key_gain=random(rows, HK, T, seed=9).abs() + 0.5, key_delta_gain=random(rows, HK, T, seed=10).abs() + 0.5)
    assert matters(a, "key_gain", "key_delta_gain")
    check(a)
    a |= dict(key_delta_weight=random(HK, D, seed=11))
    assert matters(a, "key_delta_weight") == key_lora
    check(a)


@pytest.mark.parametrize("low_rank", ["row", "one", "adapter"])
@pytest.mark.parametrize("index", [[0, 1, 0], [1, -1, 0], [-1, -1, -1], [1, 1, 1]], ids=str)
def test_rows_with_different_adapters(index, low_rank):
    a = inputs(n=2, rows={"row": B, "one": 1, "adapter": 2}[low_rank])
    a |= dict(adapter_index=torch.tensor(index), low_rank_per_adapter=low_rank == "adapter")
    out = check(a)
    base = {k: v for k, v in a.items() if "low_rank" not in k and "_up" not in k and k != "adapter_index"}
    alone = dense(**base)[0]
    for b, adapter in enumerate(index):
        differs = float((out[b] - alone[b]).abs().max())
        assert differs <= EXACT if adapter < 0 else differs > 1e-3


def test_one_adapter_with_an_index():
    check(inputs() | dict(adapter_index=torch.tensor([0, -1, 0], dtype=torch.int32)))
    check(inputs(n=1) | dict(adapter_index=torch.tensor([0, -1, 0])))
    check(inputs(n=1))


@pytest.mark.parametrize(("s", "t"), [(1, 7), (3, 7), (7, 7), (1, 1), (9, 7)], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_causality_is_aligned_to_the_lower_right(s, t, is_causal):
    """With more queries than keys the first ones see nothing."""
    out = check(inputs(s=s, t=t) | dict(is_causal=is_causal))
    if is_causal and s > t:
        assert bool((out[:, :, : s - t] == 0).all())


@pytest.mark.parametrize("window", [1, 2, 5, 100])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sliding_window(window, is_causal):
    a = inputs() | dict(sliding_window=window, is_causal=is_causal)
    if window < 5:
        assert matters(a, "sliding_window")
    check(a)


@pytest.mark.parametrize("s", [1, 3])
def test_softcap_scale_and_sinks(s):
    a = inputs(s=s)
    for extra in (
        dict(softcap=1.5),
        dict(scale=0.1),
        dict(scale=2.0, softcap=3.0),
        dict(sinks=random(HQ, seed=11)),
        dict(sinks=random(HQ, seed=11), softcap=1.5, sliding_window=2),
    ):
        assert matters(a | extra, *extra)
        check(a | extra)


def masks():
    generator = torch.Generator().manual_seed(12)
    keep = torch.rand(B, HQ, S, T, generator=generator) > 0.4
    padding = torch.ones(B, T, dtype=torch.bool)
    padding[0, :3] = padding[1, :1] = False
    added = random(B, HQ, S, T, seed=13).masked_fill(~keep, -math.inf)
    return {
        "padding": padding,
        "padding_as_numbers": padding.long(),
        "bool_per_head": keep,
        "bool_for_all_heads": keep[:, :1],
        "bool_for_all": keep[:1, :1],
        "added_per_head": added,
        "added_for_all_heads": added[:, :1],
        "added_for_all_rows": added[:1],
        "added_finite": random(B, 1, S, T, seed=14),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("is_causal", [True, False])
def test_masks_are_applied_together_with_causality(name, is_causal):
    a = inputs() | dict(attention_mask=masks()[name], is_causal=is_causal)
    assert matters(a, "attention_mask")
    check(a)
    check(a | dict(sinks=random(HQ, seed=11), sliding_window=3, softcap=2.0))


@pytest.mark.parametrize(
    "length", [3, 5, 7, torch.tensor(5), torch.tensor([3, 7, 5]), torch.tensor([1, 0, 2])], ids=str
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_key_length(length, is_causal):
    a = inputs() | dict(key_length=length, is_causal=is_causal)
    # What lies behind the length is never read into a result.
    for name in ("key", "value"):
        a[name] = a[name].clone()
        for b in range(B):
            stop = int(length if isinstance(length, int) or length.dim() == 0 else length[b])
            a[name][b, :, stop:] = 1e6
    check(a)
    check(a | dict(sliding_window=2))


def test_a_query_that_sees_nothing_gives_zeros():
    mask = torch.zeros(B, T, dtype=torch.bool)
    out, lse = flash_lora_attention_reference(**inputs(), attention_mask=mask, return_lse=True)
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())
    sinks = random(HQ, seed=11)
    out, lse = flash_lora_attention_reference(**inputs(), attention_mask=mask, sinks=sinks, return_lse=True)
    assert bool((out == 0).all())
    assert float((lse - sinks[None, :, None]).abs().max()) < 1e-6


def test_rows_may_share_one_trunk_by_a_stride_of_zero():
    a = inputs(rows=1, n=2) | dict(adapter_index=torch.tensor([1, 0, -1]))
    for name in ("key", "value"):
        a[name] = a[name][:1].expand(B, -1, -1, -1)
    check(a)


def test_strides_do_not_matter_and_nothing_is_written():
    a = inputs()
    for name in ("query", "key", "value"):
        a[name] = a[name].transpose(1, 2).contiguous().transpose(1, 2)
    before = {k: v.clone() for k, v in a.items() if isinstance(v, torch.Tensor)}
    check(a)
    assert all(torch.equal(a[k], v) for k, v in before.items())


def test_long_prompts_in_blocks_equal_one_block(monkeypatch):
    from flash_lora_attention import reference

    a = inputs(s=7, t=7) | dict(attention_mask=masks()["padding"], sinks=random(HQ, seed=11), sliding_window=4)
    whole = flash_lora_attention_reference(**a, return_lse=True)
    for block in (1, B * HQ * T * 2, B * HQ * T * 3 + 1):
        monkeypatch.setattr(reference, "_SCORE_BLOCK", block)
        blocks = flash_lora_attention_reference(**a, return_lse=True)
        for one, other in zip(whole, blocks, strict=True):
            assert float((one - other).abs().max()) <= 1e-6 if one.dtype == torch.float32 else EXACT
        check(a)


@pytest.mark.parametrize(
    # Half precision rounds the inputs (which both sides see) and the output: half a unit in the last place of about 4.
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=str,
)
def test_accumulates_in_float32(dtype, tolerance):
    a = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs(s=1, t=7).items()}
    check(a, tolerance)


def test_low_rank_parts_may_be_finer_than_the_keys():
    a = inputs()
    for name in ("query", "key", "value"):
        a[name] = a[name].to(torch.bfloat16)
    check(a, 2e-2)


# ---- arguments ----

WRONG = {
    "query's shape": dict(query=random(B, HQ, D, seed=1)),
    "query's dtype": dict(query=torch.zeros(B, HQ, S, D, dtype=torch.int32)),
    "key's shape": dict(key=random(B, HK, T, D + 2, seed=2)),
    "value's shape": dict(value=random(B, HK, T + 1, D, seed=3)),
    "the number of query heads": dict(query=random(B, 5, S, D, seed=1)),
    "key_up's shape": dict(key_up=random(HK, R, D + 1, seed=5)),
    "value_up's shape": dict(value_up=random(HK + 1, R, D, seed=5)),
    "key_low_rank's shape": dict(key_low_rank=random(B, T, R + 1, seed=4)),
    "value_low_rank's shape": dict(value_low_rank=random(2, T, R, seed=4)),
    "key_low_rank is given alone": dict(key_up=None),
    "value_up is given alone": dict(value_low_rank=None),
    "adapter_index is torch.float32": dict(adapter_index=torch.zeros(B)),
    "adapter_index is torch.int64 \\(2,\\)": dict(adapter_index=torch.zeros(2, dtype=torch.long)),
    "need adapter_index": dict(key_up=random(2, HK, R, D, seed=5), value_up=random(2, HK, R, D, seed=7)),
    "hold 2 and 1 adapters": dict(key_up=random(2, HK, R, D, seed=5)),
    "cos and sin": dict(sin=None),
    "cos's shape": dict(cos=random(B, T, 3, seed=8)),
    "sin's shape": dict(sin=random(2, T, D, seed=8)),
    "rotary_dim is 10": dict(rotary_dim=10),
    "rotary_dim is 3": dict(rotary_dim=3),
    "key_gain and key_delta_gain": dict(key_gain=random(B, HK, T, seed=9)),
    "key_delta_gain's shape": dict(key_gain=random(B, HK, T, seed=9), key_delta_gain=random(B, HQ, T, seed=9)),
    "key_delta_weight's shape": dict(key_delta_weight=random(1, D, seed=9)),
    "sliding_window is 0": dict(sliding_window=0),
    "softcap is -1.0": dict(softcap=-1.0),
    "sinks' shape": dict(sinks=random(HK, seed=9)),
    "attention_mask's shape is \\(3, 6\\)": dict(attention_mask=torch.ones(B, T - 1)),
    "attention_mask's shape is \\(3, 2": dict(attention_mask=torch.ones(B, HK, S, T)),
    "key_length is 8": dict(key_length=T + 1),
    "key_length is torch.float32": dict(key_length=torch.zeros(B)),
    "key_length is torch.int64 \\(2,\\)": dict(key_length=torch.zeros(2, dtype=torch.long)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named_with_what_was_expected(message):
    with pytest.raises(ValueError, match=f"flash_lora_attention: .*{message}") as error:
        flash_lora_attention_reference(**{**inputs(), **WRONG[message]})
    assert str(error.value).startswith("flash_lora_attention: ")


def test_another_device_is_named():
    with pytest.raises(ValueError, match="key's device is meta"):
        flash_lora_attention_reference(**{**inputs(), "key": random(B, HK, T, D, seed=2).to("meta")})
