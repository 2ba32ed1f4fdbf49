"""Tile sizes and crossovers per device, read from ``configs/*.json``.

Measured with ``kernels/benchmarks/tune.py``. Nothing is tuned at run time, and no entry depends on a sequence length: a new
length never costs a search. A device without a file gets ``configs/default.json``, which fits any GPU since Ampere, and one
warning that names the tuning script.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

_CONFIGS = Path(__file__).parent / "configs"
# Devices without a file of their own take that of another with the same multiprocessors, by compute capability.
_SIMILAR: dict[int | None, str] = {9: "nvidia_h100_80gb_hbm3"}


@dataclass(frozen=True)
class DecodeConfig:
    """Tiles of ``split_kv_kernel``."""

    block_n: int  # keys per tile
    num_warps: int
    num_stages: int
    programs_per_sm: int  # splits are chosen so that about this many programs run on each multiprocessor
    min_tiles: int = 1  # tiles per split, at least
    max_block_m: int = 64  # query columns per program, at most
    block_m_rows: int = 32  # query columns up to which rows of one trunk are packed into a program
    max_rows: int = 8  # and rows per program, at most
    max_folded: int = 128  # columns of the folded product (query columns x rank), at most; above, K is expanded on chip
    precision: str = "ieee"  # of float32 products


@dataclass(frozen=True)
class ScoresConfig:
    """Tiles of ``low_rank_scores_kernel``."""

    block_n: int  # keys per tile
    num_warps: int
    num_stages: int
    programs_per_sm: int
    max_folded: int  # columns of the folded product (query columns x rank), at most
    min_rows: int  # rows of one trunk from which on their low-rank scores are computed ahead
    precision: str = "ieee"


@dataclass(frozen=True)
class ExtendConfig:
    """Tiles of ``extend_kernel``."""

    block_m: int  # query rows (tokens x grouped heads) per tile
    block_n: int  # keys per tile
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1
    min_tiles: int = 8
    precision: str = "ieee"


@dataclass(frozen=True)
class ExpandConfig:
    """Tiles of ``expand_kernel``."""

    block_t: int  # tokens per tile
    num_warps: int
    num_stages: int = 2
    programs_per_sm: int = 8


@dataclass(frozen=True)
class DenseConfig:
    """Tiles of ``dense_kernel``, which has 16-bit inputs only."""

    block_m: int  # queries per tile
    block_n: int  # keys per tile
    num_warps: int
    num_stages: int
    programs_per_sm: int = (
        2  # pieces of the keys are chosen so that at least half as many programs run on each multiprocessor
    )
    min_keys: int = 1024  # keys per piece, at least


@dataclass(frozen=True)
class DispatchConfig:
    """Which path serves which number of queries; see ``interface.py``."""

    split_kv_columns: int  # up to this many (tokens x grouped heads): split-KV kernel
    split_kv_up_bytes: int  # up-projections of one head and adapter, at most; above, K and V are expanded first
    expand_key_columns: int  # from this many on the extend kernel gets expanded K, where a window hides few keys
    sdpa_queries: int  # from this many query tokens on: expand K and V, then SDPA, where SDPA can express the call
    cudnn_queries: int  # from this many on cuDNN is the SDPA backend (its plans are built per shape)
    max_fused_rank: int  # above it the extend kernel gets expanded K and V


def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device; 4 for the interpreter, so that splits occur there too."""
    return _num_sms(device.index or 0) if device.type == "cuda" else 4


@functools.cache
def _num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _config(index: int | None) -> dict:
    """The configuration of a CUDA device, or the default for the interpreter (None)."""
    default = json.loads((_CONFIGS / "default.json").read_text())
    if index is None:
        return default
    name = torch.cuda.get_device_name(index)
    path = _CONFIGS / (re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".json")
    capability = torch.cuda.get_device_capability(index)[0] if torch.version.hip is None else None
    similar = _CONFIGS / f"{_SIMILAR.get(capability)}.json"
    for file in (path, similar):
        if file.exists():
            return json.loads(file.read_text())
    warnings.warn(
        f"flash_lora_attention has no tuned configuration for {name!r} and uses safe defaults, which can be much slower. "
        f"`python kernels/benchmarks/tune.py` writes one to {path.name}.",
        stacklevel=3,
    )
    return default


def _entry(device: torch.device, kernel: str, dtype: torch.dtype, head_size: int) -> dict:
    table = _config((device.index or 0) if device.type == "cuda" else None)[kernel]
    table = table["32-bit" if dtype == torch.float32 else "16-bit"]
    return table[min((size for size in table if int(size) >= head_size), key=int, default=max(table, key=int))]


@functools.cache
def decode_config(device: torch.device, dtype: torch.dtype, head_size: int, variant: str | None) -> DecodeConfig:
    """Tiles of the split-KV kernel for a device, dtype and head size.

    Args:
        variant: "rows" of one trunk in one program, or None.
    """
    entry = dict(_entry(device, "decode", dtype, head_size))
    rows = entry.pop("rows", {})
    return DecodeConfig(**entry | (rows if variant == "rows" else {}))


@functools.cache
def scores_config(device: torch.device, dtype: torch.dtype, head_size: int) -> ScoresConfig:
    """Tiles of the kernel for low-rank scores of many rows, for a device, dtype and head size."""
    return ScoresConfig(**_entry(device, "scores", dtype, head_size))


@functools.cache
def extend_config(device: torch.device, dtype: torch.dtype, head_size: int) -> ExtendConfig:
    """Tiles of the extend kernel for a device, dtype and head size."""
    return ExtendConfig(**_entry(device, "extend", dtype, head_size))


@functools.cache
def expand_config(device: torch.device, dtype: torch.dtype, head_size: int) -> ExpandConfig:
    """Tiles of the expand kernel for a device, dtype and head size."""
    return ExpandConfig(**_entry(device, "expand", dtype, head_size))


@functools.cache
def dense_config(device: torch.device, dtype: torch.dtype, head_size: int) -> DenseConfig:
    """Tiles of the kernel for ready-made K and V, for a device, 16-bit dtype and head size."""
    return DenseConfig(**_entry(device, "dense", dtype, head_size))


@functools.cache
def dispatch_config(device: torch.device, dtype: torch.dtype, head_size: int) -> DispatchConfig:
    """The measured crossovers for a device, dtype and head size."""
    return DispatchConfig(**_entry(device, "dispatch", dtype, head_size))
