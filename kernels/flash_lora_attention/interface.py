"""The entry point: checks, then the path that is fastest for this shape on this device.

CUDA tensors take one of four paths. Few queries: the split-KV kernel. Blocks of queries: the fused extend kernel, from some
size on over keys that are expanded once. Long blocks that causality alone describes: expand this layer's K and V and attend
as ordinary attention does, with the best kernel for that. Where one path takes over from the other was measured
(``configs/``), not guessed. CPU tensors, float64 and calls that need gradients go to the reference, and so does everything
where Triton is not installed.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from .arguments import check_arguments
from .reference import flash_lora_attention_reference

# Not imported here: the kernels need it only once they run, and macOS and Windows have none.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def flash_lora_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_low_rank: torch.Tensor | None = None,
    key_up: torch.Tensor | None = None,
    value_low_rank: torch.Tensor | None = None,
    value_up: torch.Tensor | None = None,
    adapter_index: torch.Tensor | None = None,
    low_rank_per_adapter: bool = False,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    rotary_interleaved: bool = False,
    key_gain: torch.Tensor | None = None,
    key_delta_gain: torch.Tensor | None = None,
    key_delta_weight: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    key_length: torch.Tensor | int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    cudnn_plans: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over a split KV cache: base keys and values plus low-rank parts, expanded inside the attention.

    The meaning, shapes and dtypes of all arguments are those of :func:`flash_lora_attention_reference`. ``key_length`` as an
    int lets long blocks of queries use SDPA; as a device tensor it never makes the host wait.

    Args:
        backend: None chooses; "reference" or "triton" forces one. "triton" on CPU tensors needs ``TRITON_INTERPRET=1``.
        cudnn_plans: whether cuDNN may build plans for the lengths of a long block of queries, which takes 40 to 80 ms for
            each pair of lengths, once. False, for lengths that do not come again: only where a pass of some 32 layers pays
            for it.

    Returns:
        (B, Hq, S, D) in the dtype of ``query``, contiguous or a view with heads and tokens exchanged in memory; with
        ``return_lse`` also (B, Hq, S) float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with both values; an unknown ``backend``; "triton" where it
            can't run.
    """
    tensors = (
        query, key, value, key_low_rank, key_up, value_low_rank, value_up, adapter_index, cos, sin, key_gain, key_delta_gain,
        key_delta_weight, sinks, attention_mask, key_length if isinstance(key_length, torch.Tensor) else None,
    )  # fmt: skip
    arguments = (
        query, key, value, key_low_rank, key_up, value_low_rank, value_up, adapter_index, low_rank_per_adapter,
        cos, sin, rotary_dim, rotary_interleaved, key_gain, key_delta_gain, key_delta_weight, scale, is_causal,
        sliding_window, softcap, sinks, attention_mask,
    )  # fmt: skip
    number = None if isinstance(key_length, torch.Tensor) else key_length

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        check_arguments(
            query, key, value, key_low_rank, key_up, value_low_rank, value_up, adapter_index, low_rank_per_adapter,
            cos, sin, rotary_dim, key_gain, key_delta_gain, key_delta_weight, sliding_window, softcap, sinks, attention_mask,
            key_length,
        )  # fmt: skip
        if backend not in (None, "reference", "triton"):
            raise ValueError(f"flash_lora_attention: backend is {backend!r}, expected None, 'reference' or 'triton'")
        if backend == "triton" and (reason := _unserved(query, key)) is not None:
            raise ValueError(f"flash_lora_attention: backend='triton' does not serve {reason}")
        if _HAS_TRITON and torch.compiler.is_compiling():
            from .custom_op import forward

            return forward(*arguments, tensors[-1], number, backend)
        return run(*arguments, key_length, backend, cudnn_plans)

    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    on_kernels = _HAS_TRITON and backend != "reference" and (query.is_cuda or interpreted)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if on_kernels and not differentiable and not torch.compiler.is_compiling():
        from .calls import serve

        numbers = (
            low_rank_per_adapter, rotary_dim, rotary_interleaved, scale, is_causal, sliding_window, softcap, number, backend,
            cudnn_plans,
        )  # fmt: skip
        out, lse = serve(tensors, numbers, call)
    else:
        out, lse = call()
    return (out, lse) if return_lse else out


def _unserved(query: torch.Tensor, key: torch.Tensor) -> str | None:
    """Why the kernels can't take this call, or None."""
    if not _HAS_TRITON:
        return "any call: triton is not installed"
    if not query.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors on {query.device} without TRITON_INTERPRET=1"
    if query.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return f"GPUs before Ampere ({torch.cuda.get_device_name(query.device)})"
    if torch.float64 in (query.dtype, key.dtype):
        return "float64"
    if query.shape[-1] > 256 or query.shape[-1] % 2:
        return f"head size {query.shape[-1]}"
    return None


def run(
    query, key, value, key_low_rank, key_up, value_low_rank, value_up, adapter_index, low_rank_per_adapter,
    cos, sin, rotary_dim, rotary_interleaved, key_gain, key_delta_gain, key_delta_weight, scale, is_causal, sliding_window,
    softcap, sinks, attention_mask, key_length, backend, cudnn_plans=True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Dispatch of a checked call, without ``torch.compile``; returns (out, lse)."""
    tensors = (query, key, value, key_low_rank, key_up, value_low_rank, value_up, sinks)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if backend is None and (not query.is_cuda or differentiable or _unserved(query, key) is not None):
        backend = "reference"
    if backend == "reference":
        out_and_lse = flash_lora_attention_reference(
            query, key, value, key_low_rank=key_low_rank, key_up=key_up, value_low_rank=value_low_rank,
            value_up=value_up, adapter_index=adapter_index, low_rank_per_adapter=low_rank_per_adapter, cos=cos, sin=sin,
            rotary_dim=rotary_dim, rotary_interleaved=rotary_interleaved, key_gain=key_gain,
            key_delta_gain=key_delta_gain, key_delta_weight=key_delta_weight, scale=scale, is_causal=is_causal,
            sliding_window=sliding_window, softcap=softcap, sinks=sinks, attention_mask=attention_mask,
            key_length=key_length, return_lse=True,
        )  # fmt: skip
        return out_and_lse[0], out_and_lse[1]
    from .arguments import Problem
    from .calls import on_device_of
    from .inputs import prepare

    key_length = key.shape[2] if key_length is None else key_length
    x = prepare(
        Problem(key_length, query.shape[-1] if rotary_dim is None else rotary_dim, 1), query, key, value,
        key_low_rank=key_low_rank, key_up=key_up, value_low_rank=value_low_rank, value_up=value_up,
        adapter_index=adapter_index, low_rank_per_adapter=low_rank_per_adapter, cos=cos, sin=sin,
        rotary_interleaved=rotary_interleaved, key_gain=key_gain, key_delta_gain=key_delta_gain,
        key_delta_weight=key_delta_weight, scale=scale,
        is_causal=is_causal, sliding_window=sliding_window, softcap=softcap, sinks=sinks, attention_mask=attention_mask,
    )  # fmt: skip
    if query.numel() == 0 or key.shape[2] == 0:
        out, lse = torch.zeros_like(query), query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32)
        return out, lse if sinks is None else sinks.float()[None, :, None].expand_as(lse).contiguous()
    with on_device_of(query):
        return dispatch(x, cudnn_plans)


def dispatch(x, cudnn_plans: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the path for prepared arguments (``inputs.Inputs``) by the measured crossovers."""
    from .decode import split_kv_attention, variant
    from .expand import expanded, sdpa_attention, sdpa_can_express
    from .extend import extend_attention
    from .tuning import decode_config, dispatch_config, expand_config, extend_config, scores_config

    case = (x.query.device, x.query.dtype, x.D)
    config = dispatch_config(*case)
    length = x.key_length if isinstance(x.key_length, int) else x.T
    if x.S * x.G <= config.split_kv_columns:
        if max(x.rk, x.rv) * x.D * x.query.element_size() > config.split_kv_up_bytes:
            # They have no room in shared memory beside a tile, or not in registers.
            x = expanded(x, length, expand_config(*case))
        return split_kv_attention(x, decode_config(*case, variant(x)), scores=scores_config(*case))
    if x.query.is_cuda and x.S >= config.sdpa_queries and sdpa_can_express(x):
        return sdpa_attention(x, expand_config(*case), config, cudnn_plans=cudnn_plans)
    has_key_lora = x.key_low_rank is not None
    if max(x.rk, x.rv) > config.max_fused_rank:
        x = expanded(x, length, expand_config(*case))
    elif isinstance(x.key_length, int) and x.S * x.G >= config.expand_key_columns and 2 * x.visible_keys >= length:
        # So many tiles of queries read a key that expanding it once, in memory, is cheaper than once per tile.
        x = expanded(x, length, expand_config(*case), with_value=False)
    return extend_attention(x, extend_config(*case), after_expansion=has_key_lora and x.key_low_rank is None)
