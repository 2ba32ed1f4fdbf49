"""The kernels as one ``torch.library`` operator, so that ``torch.compile(fullgraph=True)`` passes through them.

The operator takes the whole call and dispatches inside; ``torch.compile`` sees shapes alone. In eager mode
``flash_lora_attention`` calls the same function directly, without the dispatcher's overhead.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("flash_lora_attention::forward", mutates_args=())
def forward(
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
    key_length_tensor: torch.Tensor | None,
    key_length: int | None,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``flash_lora_attention`` with ``return_lse=True``; the two forms of ``key_length`` are two arguments."""
    from .interface import run

    out, lse = run(
        query, key, value, key_low_rank, key_up, value_low_rank, value_up, adapter_index, low_rank_per_adapter,
        cos, sin, rotary_dim, rotary_interleaved, key_gain, key_delta_gain, key_delta_weight, scale, is_causal,
        sliding_window, softcap, sinks, attention_mask, key_length if key_length_tensor is None else key_length_tensor, backend,
    )  # fmt: skip
    # cuDNN's output has heads and tokens exchanged in memory; the fake below promises contiguous tensors.
    return out.contiguous(), lse.contiguous()


@forward.register_fake
def _forward_fake(query, *args, **kwargs):
    """Shapes and dtypes of the outputs."""
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
        query.shape[:3], dtype=torch.float32
    )
