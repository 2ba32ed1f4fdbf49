"""Checks of the arguments of :func:`flash_lora_attention`, shared by the reference and the kernels.

Everything wrong is found here, before any launch, as a ``ValueError`` that names what was given and what was expected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Problem:
    """What the arguments mean together, after the checks."""

    key_length: torch.Tensor | int
    rotary_dim: int
    num_adapters: int


def _fail(name: str, given: object, expected: object) -> None:
    raise ValueError(f"flash_lora_attention: {name} is {given}, expected {expected}")


def check_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_low_rank: torch.Tensor | None,
    key_up: torch.Tensor | None,
    value_low_rank: torch.Tensor | None,
    value_up: torch.Tensor | None,
    adapter_index: torch.Tensor | None,
    low_rank_per_adapter: bool,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotary_dim: int | None,
    key_gain: torch.Tensor | None,
    key_delta_gain: torch.Tensor | None,
    key_delta_weight: torch.Tensor | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    key_length: torch.Tensor | int | None,
) -> Problem:
    """Check shapes, dtypes and devices; the meaning of each argument is in ``flash_lora_attention_reference``.

    Raises:
        ValueError: with the argument's name, its value and what was expected.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            _fail(f"{name}'s shape", tuple(tensor.shape), "4 dimensions (B, heads, tokens, head size)")
        if tensor.dtype not in _FLOATS:
            _fail(f"{name}'s dtype", tensor.dtype, "a floating dtype")
    B, Hq, S, D = query.shape
    _, Hk, T, _ = key.shape
    if tuple(key.shape) != (B, Hk, T, D):
        _fail("key's shape", tuple(key.shape), f"({B}, Hk, T, {D}) to go with query {tuple(query.shape)}")
    if value.shape != key.shape:
        _fail("value's shape", tuple(value.shape), f"that of key, {tuple(key.shape)}")
    if Hk == 0 or Hq % Hk:
        _fail("the number of query heads", Hq, f"a multiple of the number of KV heads, {Hk}")

    others: tuple[tuple[str, torch.Tensor | None], ...] = (
        ("key", key), ("value", value), ("key_low_rank", key_low_rank), ("key_up", key_up),
        ("value_low_rank", value_low_rank), ("value_up", value_up), ("adapter_index", adapter_index),
        ("cos", cos), ("sin", sin), ("key_gain", key_gain), ("key_delta_gain", key_delta_gain),
        ("key_delta_weight", key_delta_weight), ("sinks", sinks), ("attention_mask", attention_mask),
    )  # fmt: skip
    for name, other in others:
        if other is not None and other.device != query.device:
            _fail(f"{name}'s device", other.device, f"that of query, {query.device}")

    num_adapters = 1
    counts: list[int] = []
    for part, low_rank, up in (("key", key_low_rank, key_up), ("value", value_low_rank, value_up)):
        if (low_rank is None) != (up is None):
            given = f"{part}_low_rank" if up is None else f"{part}_up"
            raise ValueError(f"flash_lora_attention: {given} is given alone, expected {part}_low_rank and {part}_up")
        if low_rank is None or up is None:
            continue
        if up.dim() not in (3, 4) or (up.shape[-3], up.shape[-1]) != (Hk, D):
            _fail(f"{part}_up's shape", tuple(up.shape), f"([n,] {Hk}, r, {D})")
        n, r = (up.shape[0] if up.dim() == 4 else 1), up.shape[-2]
        counts.append(n)
        leading = (n,) if low_rank_per_adapter else (1, B)
        if low_rank.dim() != 3 or low_rank.shape[0] not in leading or tuple(low_rank.shape[1:]) != (T, r):
            _fail(f"{part}_low_rank's shape", tuple(low_rank.shape), f"({' or '.join(map(str, leading))}, {T}, {r})")
    if counts:
        num_adapters = counts[0]
        if len(set(counts)) > 1:
            raise ValueError(f"flash_lora_attention: key_up and value_up hold {counts[0]} and {counts[1]} adapters")
        if adapter_index is None and num_adapters > 1:
            raise ValueError(
                f"flash_lora_attention: {num_adapters} adapters need adapter_index, the adapter of each row"
            )
    if adapter_index is not None:
        if tuple(adapter_index.shape) != (B,) or adapter_index.is_floating_point():
            _fail("adapter_index", f"{adapter_index.dtype} {tuple(adapter_index.shape)}", f"an integer tensor ({B},)")
    elif low_rank_per_adapter and num_adapters > 1:
        raise ValueError("flash_lora_attention: low_rank_per_adapter needs adapter_index")

    rotary_dim = D if rotary_dim is None else rotary_dim
    if (cos is None) != (sin is None):
        raise ValueError("flash_lora_attention: cos and sin are given together or not at all")
    if cos is not None and sin is not None:
        if rotary_dim > D or rotary_dim % 2 or rotary_dim <= 0:
            _fail("rotary_dim", rotary_dim, f"an even number from 2 to the head size, {D}")
        for name, tensor in (("cos", cos), ("sin", sin)):
            widths = (rotary_dim, rotary_dim // 2)
            shape = tuple(tensor.shape)
            if tensor.dim() != 3 or shape[0] not in (1, B) or shape[1] != T or shape[2] not in widths:
                _fail(f"{name}'s shape", shape, f"(1 or {B}, {T}, {widths[0]} or {widths[1]})")
    if (key_gain is None) != (key_delta_gain is None):
        raise ValueError("flash_lora_attention: key_gain and key_delta_gain are given together or not at all")
    for name, gain in (("key_gain", key_gain), ("key_delta_gain", key_delta_gain)):
        if gain is not None and (gain.dim() != 3 or gain.shape[0] not in (1, B) or tuple(gain.shape[1:]) != (Hk, T)):
            _fail(f"{name}'s shape", tuple(gain.shape), f"(1 or {B}, {Hk}, {T})")
    if key_delta_weight is not None and tuple(key_delta_weight.shape) != (Hk, D):
        _fail("key_delta_weight's shape", tuple(key_delta_weight.shape), (Hk, D))
    if sliding_window is not None and sliding_window < 1:
        _fail("sliding_window", sliding_window, "a positive number of tokens")
    if softcap is not None and softcap <= 0:
        _fail("softcap", softcap, "a positive number")
    if sinks is not None and tuple(sinks.shape) != (Hq,):
        _fail("sinks' shape", tuple(sinks.shape), (Hq,))
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        if len(shape) == 2:
            if shape != (B, T):
                _fail("attention_mask's shape", shape, f"({B}, {T}) for key padding")
        elif len(shape) != 4 or shape[0] not in (1, B) or shape[1] not in (1, Hq) or shape[2:] != (S, T):
            _fail("attention_mask's shape", shape, f"(1 or {B}, 1 or {Hq}, {S}, {T})")
    if key_length is None:
        key_length = T
    elif isinstance(key_length, torch.Tensor):
        # Not `shape in ((), (B,))`: torch.compile takes that for false.
        fits = key_length.dim() == 0 or (key_length.dim() == 1 and key_length.shape[0] == B)
        if not fits or key_length.is_floating_point():
            _fail("key_length", f"{key_length.dtype} {tuple(key_length.shape)}", f"an int or an integer tensor ({B},)")
    elif not 0 <= key_length <= T:
        _fail("key_length", key_length, f"0 to {T}, the capacity of key")
    return Problem(key_length, rotary_dim, num_adapters)
