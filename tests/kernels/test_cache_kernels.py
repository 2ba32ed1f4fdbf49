"""The cache's own small kernels: writing one token into many buffers, and the digest of many weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lora_shared_cache import append_kernel
from lora_shared_cache.append import append_tokens
from lora_shared_cache.append_kernel import append_tokens_kernel
from lora_shared_cache.buffers import NotReserved, TokenBuffer
from lora_shared_cache.digest import Digest, DigestReader, digest

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    "rows, place, most, n", [(1, 0, 16, 1), (1, 6, 2, 1), (3, 0, 2, 1), (3, 6, 16, 1), (1, 2, 16, 4), (3, 0, 2, 7)]
)
def test_tokens_into_many_buffers(rows, place, most, n, monkeypatch):
    monkeypatch.setattr(append_kernel, "MAX_JOBS", most)

    def random(*shape, dtype=torch.float32):
        return torch.randn(*shape, device=device()).to(dtype)

    joint = random(rows, n, 9)
    jobs = [
        (random(rows, 3, 7, 8), random(rows, n, 3, 8).transpose(1, 2)),
        (random(rows, 3, 7, 10), random(rows, 3, n, 10)),
        (random(rows, 7, 5), joint[..., 4:9]),
        (random(rows, 7, 4, dtype=torch.float16), joint[..., :4]),
        (random(rows, 7, 4), joint[..., 1:9:2]),
    ]
    expected = []
    for target, new in jobs:
        copy = target.clone()
        copy[..., place : place + n, :] = new.to(copy.dtype)
        expected.append(copy)
    append_tokens_kernel(torch.tensor(place, device=device()), jobs)
    for (target, _), copy in zip(jobs, expected, strict=True):
        assert torch.equal(target, copy)


def test_nothing_is_written_where_one_buffer_has_no_room():
    buffers = [TokenBuffer(-2), TokenBuffer(-2)]
    buffers[0].write(0, torch.zeros(1, 2, 4, 8))
    before = buffers[0].data.clone()
    jobs = [(buffers[0], torch.ones(1, 2, 1, 8)), (buffers[1], torch.ones(1, 1, 3))]
    with pytest.raises(NotReserved):
        append_tokens(torch.tensor(1), jobs)
    torch.testing.assert_close(buffers[0].data, before, rtol=0, atol=0, equal_nan=True)


WEIGHTS = [torch.arange(24.0).view(4, 6), torch.randn(5, 3), torch.ones(2, 2, dtype=torch.bfloat16), torch.zeros(0)]


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_digest_sees_every_bit_and_place(where):
    weights = [w.clone().to(where) for w in WEIGHTS]
    kept = Digest(weights)
    before = digest(weights)
    other = Digest(weights[:2])
    reader = DigestReader()

    def digests(wanted):
        return reader.read(wanted)

    assert digests([kept, other]) == [before, digest(weights[:2])]
    for w in weights[:3]:
        flat = w.view(-1)
        for i in (0, flat.numel() - 1):
            old = flat[i].item()
            flat.data[i] = old + 1 if w.dtype != torch.bfloat16 else -old
            assert digests([kept])[0] != before
            flat.data[i] = old
    assert digests([kept])[0] == before
    weights[1].data[[0, 1]] = weights[1].data[[1, 0]]
    assert digests([kept])[0] != before
    assert digest(weights[:2]) != digest(weights[:1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_counts_as_pytorch_does():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, 16, generator=generator) for n in (4096, 1, 777)]
    assert digest([w.cuda() for w in weights]) == digest(weights)
