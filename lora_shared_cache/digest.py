"""Content of adapters as a number: 128 bits of all weights, computed where they are.

In-place writes to ``.data`` leave no trace in PyTorch's counters, so a turn begins by reading every weight of the adapters.
On CUDA that is one kernel over a table of addresses, without copies; elsewhere the same sum in PyTorch.
"""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Iterable, Sequence

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

    Attributes:
        words: the weights as integers, by device.
        lasts: False if a tensor had to be copied, which would then be read as it is now for ever.

    Raises:
        UnsupportedAdapterError: for a tensor on the meta device (an offloaded adapter).
    """

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._count = len(tensors)
        self.lasts = all(t.is_contiguous() for t in tensors)
        self.words: dict[torch.device, list[torch.Tensor]] = {}
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
            self.words.setdefault(t.device, []).append(
                flat.view(torch.int64 if whole else _INTEGER_OF_SIZE[flat.element_size()])
            )

    def finish(self, sums: Iterable[Sequence[int]]) -> tuple[int, int]:
        """128 bits from the two sums of each device."""
        first = second = self._count
        for pair in sums:
            first, second = first * 31 + pair[0], second * 31 + pair[1]
        return first, second


# For each device the addresses for the kernel, or None where PyTorch reads, and which digests have words there.
_Tables = dict[torch.device, tuple[torch.Tensor | None, list[Digest]]]


class DigestReader:
    """Reads several digests together: one launch and one synchronisation per device, while they stay the same."""

    def __init__(self) -> None:
        # In one attribute, and never changed: threads may read at the same time.
        self._last: tuple[list[Digest], _Tables] = ([], {})

    def read(self, wanted: Sequence[Digest]) -> list[tuple[int, int]]:
        """The content of each, as it is now."""
        digests, tables = self._last
        if len(wanted) != len(digests) or not all(map(operator.is_, wanted, digests)):
            tables = {}
            for device in dict.fromkeys(device for digest in wanted for device in digest.words):
                there = [digest for digest in wanted if device in digest.words]
                by_kernel = device.type == "cuda" and _HAS_TRITON
                by_kernel = by_kernel and all(w.dtype == torch.int64 for digest in there for w in digest.words[device])
                table = _table([digest.words[device] for digest in there]) if by_kernel else None
                tables[device] = (table, there)
            self._last = list(wanted), tables
        sums: dict[int, list[Sequence[int]]] = {id(digest): [] for digest in wanted}
        for device, (table, there) in tables.items():
            if table is None:
                read = torch.stack([_sums(digest.words[device], device) for digest in there]).tolist()
            else:
                from .digest_kernel import digest_words

                read = digest_words(table, len(there), _CHUNK).tolist()
            for digest, pair in zip(there, read, strict=True):
                sums[id(digest)].append(pair)
        return [digest.finish(sums[id(digest)]) for digest in wanted]


def digest(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """128 bits of the tensors' content.

    Raises:
        UnsupportedAdapterError: for a tensor on the meta device (an offloaded adapter).
    """
    return DigestReader().read([Digest(tensors)])[0]


def _sums(parts: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    joined = torch.cat([part if part.dtype == torch.int64 else part.to(torch.int64) for part in parts])
    weights = torch.arange(1, joined.numel() + 1, device=device, dtype=torch.int64) * MULTIPLIER
    mixed = joined ^ (joined >> 29)
    return torch.stack(((joined * (weights | 1)).sum(), (mixed * ((weights >> 7) | 1)).sum()))


def _table(digests: list[list[torch.Tensor]]) -> torch.Tensor:
    """(chunks, 4) int64: address of up to ``_CHUNK`` words, how many, the number of the first, and which digest they are of."""
    rows = []
    for which, parts in enumerate(digests):
        first = 0
        for part in parts:
            for start in range(0, part.numel(), _CHUNK):
                rows.append((part.data_ptr() + 8 * start, min(_CHUNK, part.numel() - start), first + start, which))
            first += part.numel()
    return torch.tensor(rows, dtype=torch.int64, device=digests[0][0].device)
