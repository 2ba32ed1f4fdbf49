"""The sums of ``digest.py`` over a table of addresses, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flash_lora_attention.calls import on_device_of

from .digest import MULTIPLIER

_MULTIPLIER = tl.constexpr(MULTIPLIER)


@triton.jit
def digest_kernel(TABLE, OUT, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One chunk of words; TABLE (chunks, 4) int64, OUT (digests, 2) int64 zeros. Integer sums: the order does not matter."""
    i = tl.program_id(0)
    address = tl.load(TABLE + 4 * i)
    words = tl.load(TABLE + 4 * i + 1)
    first = tl.load(TABLE + 4 * i + 2)
    OUT += 2 * tl.load(TABLE + 4 * i + 3)
    o = tl.arange(0, CHUNK)
    b_x = tl.load(address.to(tl.pointer_type(tl.int64)) + o, mask=o < words, other=0)
    b_w = (first + o + 1) * _MULTIPLIER
    tl.atomic_add(OUT, tl.sum(b_x * (b_w | 1)))
    tl.atomic_add(OUT + 1, tl.sum((b_x ^ (b_x >> 29)) * ((b_w >> 7) | 1)))


def digest_words(table: torch.Tensor, digests: int, chunk: int) -> torch.Tensor:
    """(digests, 2) int64 on the table's device."""
    out = torch.zeros(digests, 2, dtype=torch.int64, device=table.device)
    with on_device_of(table):
        digest_kernel[(len(table),)](table, out, CHUNK=chunk)
    return out
