"""Content of adapters as a number: 128 bits of all weights, computed where they are.

In-place writes to ``.data`` leave no trace in PyTorch's counters, so a turn begins by reading every weight of the adapters.
On CUDA that is one kernel over a table of addresses, without copies; elsewhere the same sum in PyTorch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from .errors import UnsupportedAdapterError

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Word number i is multiplied by an odd number made of i times this (2^64 over the golden ratio).
MULTIPLIER = -0x61C8864680B583EB
_CHUNK = 2048


class Digest:
    """The digest of some tensors, as often as it is asked for; valid while they stay where they are.

    Args:
        tensors: the weights, on any devices.

    Raises:
        UnsupportedAdapterError: for a tensor on the meta device (an offloaded adapter).
    """

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._count = len(tensors)
        words: dict[torch.device, list[torch.Tensor]] = {}
        for t in tensors:
            if t.device.type == "meta":
                raise UnsupportedAdapterError(
                    "an adapter's weights are offloaded (meta device); load them on the model's device"
                )
            flat = t.detach().contiguous().view(-1)
            if flat.numel() == 0:
                continue
            size = flat.numel() * flat.element_size()
            whole = size % 8 == 0 and flat.data_ptr() % 8 == 0
            words.setdefault(t.device, []).append(
                flat.view(torch.int64 if whole else _INTEGER_OF_SIZE[flat.element_size()])
            )
        # A tensor that was copied to be contiguous would be read as it is now for ever.
        self.lasts = all(t.is_contiguous() for t in tensors)
        self._words = words
        self._tables = {device: _table(parts) for device, parts in words.items() if _by_kernel(device, parts)}

    def start(self) -> list[torch.Tensor]:
        """Begin to compute; the result goes to :meth:`finish`."""
        sums = []
        for device, parts in self._words.items():
            if device in self._tables:
                from .digest_kernel import digest_words

                sums.append(digest_words(self._tables[device], _CHUNK))
            else:
                sums.append(_sums(parts, device))
        return sums

    def finish(self, sums: list[list[int]]) -> tuple[int, int]:
        """128 bits from the two sums of each device."""
        first = second = self._count
        for pair in sums:
            first, second = first * 31 + pair[0], second * 31 + pair[1]
        return first, second


def digests(wanted: Sequence[Digest]) -> list[tuple[int, int]]:
    """All digests, waiting for each device once."""
    started = [digest.start() for digest in wanted]
    flat = [pair for sums in started for pair in sums]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for pair in flat:
        by_device.setdefault(pair.device, []).append(pair)
    read = {device: iter(torch.stack(pairs).tolist()) for device, pairs in by_device.items()}
    return [
        digest.finish([next(read[pair.device]) for pair in sums]) for digest, sums in zip(wanted, started, strict=True)
    ]


def digest(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """128 bits of the tensors' content.

    Raises:
        UnsupportedAdapterError: for a tensor on the meta device (an offloaded adapter).
    """
    return digests([Digest(tensors)])[0]


def _sums(parts: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    joined = torch.cat([part if part.dtype == torch.int64 else part.to(torch.int64) for part in parts])
    weights = torch.arange(1, joined.numel() + 1, device=device, dtype=torch.int64) * MULTIPLIER
    mixed = joined ^ (joined >> 29)
    return torch.stack(((joined * (weights | 1)).sum(), (mixed * ((weights >> 7) | 1)).sum()))


def _by_kernel(device: torch.device, parts: list[torch.Tensor]) -> bool:
    return device.type == "cuda" and _HAS_TRITON and all(part.dtype == torch.int64 for part in parts)


def _table(parts: list[torch.Tensor]) -> torch.Tensor:
    """(chunks, 3) int64: address of up to ``_CHUNK`` words, how many, and the number of the first."""
    rows, first = [], 0
    for part in parts:
        for start in range(0, part.numel(), _CHUNK):
            rows.append((part.data_ptr() + 8 * start, min(_CHUNK, part.numel() - start), first + start))
        first += part.numel()
    return torch.tensor(rows, dtype=torch.int64, device=parts[0].device)
