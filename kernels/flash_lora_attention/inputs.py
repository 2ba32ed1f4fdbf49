"""The checked arguments brought into the form that every kernel takes, and the one launch that passes them on.

Copies nothing that grows with the number of tokens, except what isn't made of rows of whole 4-byte words; see ``prepare``. It
decides nothing: which kernel runs is the business of ``interface.py``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from triton.runtime.errors import OutOfResources

from .arguments import Problem
from .calls import start_kernel
from .rope import half_width
from .sizes import next_power_of_2


@dataclass
class Inputs:
    """Arguments of ``flash_lora_attention`` with defaults filled in; shapes as there unless stated.

    ``key_up``/``value_up`` are (n, Hk, r, D) contiguous, low-rank entries (rows, T, r) with batch stride 0 where all rows
    share one, ``cos``/``sin`` (rows, T, rotary_dim / 2) with equal strides, ``key_length`` an int or a (B,) tensor, and
    ``attention_mask`` (B, Hq, S, T) with stride 0 where it was broadcast (bool as uint8).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_low_rank: torch.Tensor | None
    key_up: torch.Tensor | None
    value_low_rank: torch.Tensor | None
    value_up: torch.Tensor | None
    adapter_index: torch.Tensor | None
    low_rank_per_adapter: bool
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    rotary_dim: int
    rotary_interleaved: bool
    key_gain: torch.Tensor | None
    key_delta_gain: torch.Tensor | None
    key_delta_weight: torch.Tensor | None
    scale: float
    is_causal: bool
    sliding_window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    attention_mask: torch.Tensor | None
    key_length: torch.Tensor | int

    def __post_init__(self) -> None:
        self.B, Hq, self.S, self.D = self.query.shape
        self.Hk, self.T = self.key.shape[1:3]
        self.G = Hq // self.Hk
        self.rk = self.key_up.shape[2] if self.key_up is not None else 1
        self.rv = self.value_up.shape[2] if self.value_up is not None else 1

    @property
    def visible_keys(self) -> int:
        """Upper bound of the keys that one launch visits, known without asking the device."""
        keys = self.key_length if isinstance(self.key_length, int) else self.T
        return keys if self.sliding_window is None else min(keys, self.sliding_window + self.S)

    def replace(self, **changes) -> Inputs:
        """A copy with some arguments changed."""
        return dataclasses.replace(self, **changes)


def _shared(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Batch stride 0 where there is one entry for all rows, so that a kernel can index it with the row."""
    if tensor is None or tensor.shape[0] != 1 or tensor.stride(0) == 0:
        return tensor
    return tensor.as_strided(tensor.shape, (0, *tensor.stride()[1:]))


def _whole_words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, if its rows consist of whole 4-byte words in place, else a copy of which that is true.

    An odd number of 16-bit entries per row gets one more, a zero.
    """
    word = 4 // tensor.element_size() or 1
    if tensor.shape[-1] % word:
        return F.pad(tensor, (0, 1))
    if tensor.stride(-1) == 1 and tensor.data_ptr() % 4 == 0 and not any(s % word for s in tensor.stride()[:-1]):
        return tensor
    shared = tensor.stride(0) == 0
    copy = (tensor[:1] if shared else tensor).clone(memory_format=torch.contiguous_format)
    return copy.expand(tensor.shape) if shared else copy


def prepare(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_low_rank: torch.Tensor | None,
    key_up: torch.Tensor | None,
    value_low_rank: torch.Tensor | None,
    value_up: torch.Tensor | None,
    adapter_index: torch.Tensor | None,
    low_rank_per_adapter: bool,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotary_interleaved: bool,
    key_gain: torch.Tensor | None,
    key_delta_gain: torch.Tensor | None,
    key_delta_weight: torch.Tensor | None,
    scale: float | None,
    is_causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> Inputs:
    """Normalise arguments that ``check_arguments`` has passed; see :class:`Inputs`.

    Whatever a kernel multiplies tile by tile must be copied to shared memory asynchronously, which takes rows of whole 4-byte
    words. Where a tile goes through registers instead (an odd rank in 16 bits, say), kernels compiled by Triton 3.6 for Hopper
    gave wrong results and illegal addresses, though its intermediate code reads right. So what isn't made of whole words is
    copied here first: odd ranks and rotary widths, views that start at an odd entry or whose last dimension has a stride.
    """
    key, value = _whole_words(key), _whole_words(value)
    B, Hq, S, D = query.shape

    def pair(low_rank: torch.Tensor | None, up: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if low_rank is None or up is None:
            return None, None
        low_rank, up = _whole_words(low_rank), up.reshape(-1, *up.shape[-3:]).contiguous()
        if low_rank.shape[-1] > up.shape[2]:
            up = F.pad(up, (0, 0, 0, 1))
        return low_rank if low_rank_per_adapter and adapter_index is not None else _shared(low_rank), up

    key_low_rank, key_up = pair(key_low_rank, key_up)
    value_low_rank, value_up = pair(value_low_rank, value_up)
    if cos is not None and sin is not None and key_low_rank is not None:
        cos, sin = (half_width(t, problem.rotary_dim, rotary_interleaved) for t in (cos, sin))
        cos, sin = _whole_words(cos), _whole_words(sin)
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        cos, sin = _shared(cos), _shared(sin)
    else:
        cos = sin = None
    if key_gain is not None and key_delta_gain is not None:
        if key_gain.shape != key_delta_gain.shape or key_gain.stride() != key_delta_gain.stride():
            shape = torch.broadcast_shapes(key_gain.shape, key_delta_gain.shape)
            key_gain, key_delta_gain = (t.expand(shape).contiguous() for t in (key_gain, key_delta_gain))
        key_gain, key_delta_gain = _shared(key_gain), _shared(key_delta_gain)
    if attention_mask is not None:
        if attention_mask.dim() == 2:
            attention_mask = attention_mask.bool()[:, None, None, :]
        elif not attention_mask.is_floating_point():
            attention_mask = attention_mask.bool()
        if attention_mask.dtype == torch.bool:
            attention_mask = attention_mask.view(torch.uint8)
        attention_mask = attention_mask.expand(B, Hq, S, attention_mask.shape[-1])
    key_length = problem.key_length
    if isinstance(key_length, torch.Tensor):
        key_length = key_length.to(query.device).expand(B)
    return Inputs(
        query=query,
        key=key,
        value=value,
        key_low_rank=key_low_rank,
        key_up=key_up,
        value_low_rank=value_low_rank,
        value_up=value_up,
        adapter_index=None if adapter_index is None else adapter_index.contiguous(),
        low_rank_per_adapter=low_rank_per_adapter,
        cos=cos,
        sin=sin,
        rotary_dim=problem.rotary_dim,
        rotary_interleaved=rotary_interleaved,
        key_gain=key_gain,
        key_delta_gain=key_delta_gain,
        key_delta_weight=None if key_delta_weight is None or key_low_rank is None else key_delta_weight.contiguous(),
        scale=D**-0.5 if scale is None else scale,
        is_causal=is_causal,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=None if sinks is None else sinks.contiguous(),
        attention_mask=attention_mask,
        key_length=key_length,
    )


def alignment(tensor: torch.Tensor | None) -> int:
    """Power of two, at most 16, that divides the strides of a tensor's rows, in elements."""
    return 16 if tensor is None else math.gcd(16, *tensor.stride()[:-1])


def alignments(x: Inputs) -> dict[str, int]:
    """Compile-time arguments of all kernels; see ``tiles.aligned``."""
    return dict(
        K_ALIGN=alignment(x.key), V_ALIGN=alignment(x.value), KA_ALIGN=alignment(x.key_low_rank),
        VA_ALIGN=alignment(x.value_low_rank), C_ALIGN=alignment(x.cos),
    )  # fmt: skip


# Tiles that fitted into shared memory, by kernel and compile-time arguments: found once, not at every call.
_fitting: dict[tuple, tuple[int, int]] = {}


def launch(
    kernel, grid, x: Inputs, out: torch.Tensor, lse: torch.Tensor | None, runtime: dict, meta: dict, config, **options
) -> None:
    """Launch an attention kernel on all arguments, with smaller tiles where the configured ones do not fit the device.

    Args:
        kernel, grid: the Triton kernel and its grid.
        x: arguments. out, lse: contiguous outputs, with a leading split dimension.
        runtime, meta: further run-time and compile-time arguments by name.
        config: with ``block_n``, ``num_stages``, ``num_warps`` and ``precision``.
        options: further launch options of Triton.
    """

    def strides(tensor: torch.Tensor | None, n: int) -> tuple[int, ...]:
        return (0,) * n if tensor is None else tensor.stride()[:n]

    length = x.key_length if isinstance(x.key_length, torch.Tensor) else None
    arguments = (
        x.query, x.key, x.value, x.key_low_rank, x.key_up, x.value_low_rank, x.value_up, x.adapter_index, x.cos, x.sin,
        x.key_gain, x.key_delta_gain, x.key_delta_weight, x.sinks, x.attention_mask, length, out, lse,
        *x.query.stride(), *x.key.stride(), *x.value.stride(), *strides(x.key_low_rank, 2), *strides(x.value_low_rank, 2),
        *strides(x.cos, 3), *strides(x.key_gain, 3), *strides(x.attention_mask, 4), *strides(length, 1),
        x.B, x.S, x.T, x.T if length is not None else x.key_length, x.scale, x.softcap or 0.0, x.sliding_window or 0,
    )  # fmt: skip
    meta = dict(
        HK=x.Hk, G=x.G, D=x.D, RK=x.rk, RV=x.rv, ROTARY=x.rotary_dim, INTERLEAVED=x.rotary_interleaved,
        IS_CAUSAL=x.is_causal, HAS_WINDOW=x.sliding_window is not None, HAS_SOFTCAP=x.softcap is not None,
        FLOAT_MASK=x.attention_mask is not None and x.attention_mask.is_floating_point(),
        PER_ADAPTER=x.low_rank_per_adapter and x.adapter_index is not None,
        C_WIDTH=0 if x.cos is None else x.cos.shape[-1], **alignments(x),
        BLOCK_D=max(16, next_power_of_2(x.D)), BLOCK_P=max(16, next_power_of_2(x.D // 2)),
        PRECISION=config.precision if x.query.dtype == torch.float32 else "ieee",
        **meta,
    )  # fmt: skip
    present = tuple(a.dtype if isinstance(a, torch.Tensor) else None for a in arguments[:18])
    identity = (kernel.fn.__name__, present, config, *meta.items())
    block_n, stages = _fitting.get(identity, (config.block_n, config.num_stages))
    while True:
        try:
            start_kernel(
                kernel, grid, *arguments, **runtime, **meta, BLOCK_N=block_n, STAGES=stages, num_warps=config.num_warps,
                num_stages=stages, **options,
            )  # fmt: skip
            break
        except OutOfResources:
            if stages > 1:
                stages -= 1
            elif block_n > 16:
                block_n //= 2
            else:
                raise
    if (block_n, stages) != (config.block_n, config.num_stages):
        _fitting[identity] = (block_n, stages)
