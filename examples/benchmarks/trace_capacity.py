"""How many agents and how long a trajectory one GPU holds: by the formula, and by really filling and allocating it.

    PYTHONPATH=.:kernels python examples/benchmarks/trace_capacity.py --out capacity.json        # some 60 s on one H100

Rows, by ``kind`` (memory in bytes):

- ``most``: by the formula, the most agents at a length and the longest trajectory for a number of agents; see :func:`fits`.
- ``filled``: ``--agents`` adapters, a trajectory of ``--tokens`` random tokens prefilled in chunks of 8k by the first of them,
  then a turn of every agent on it with ``generate``. ``peak_total_bytes``: most that PyTorch had allocated, weights included.
- ``allocated``: storage for the longest trajectory that the formula allows for three agents, allocated at once, and a turn of
  each on a prompt of one chunk. It shows that the storage fits; attention over all of it is not run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from agent_trace import ADAPTERS, Generate, cache_width, predicted_low_rank, share_a
from decode_step import CHUNK, DTYPES, SHAPES, about, add_adapters, allocated, build_base, peak, release, synchronize
from peft import PeftModel

from lora_shared_cache import SharedLoRACache, detach

WAYS = ("non_shared", "fully_shared", "base_shared", "base_lr_shared", "lr_precomputed")
# Activations of a prefill in chunks, and what libraries keep.
RESERVE = 2.5e9
CARD = 80e9


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model and its adapters.

    Attributes:
        base: weights of the base model.
        adapter: weights of one adapter.
        full: K and V of one token, all layers.
        low_rank: low-rank entries of one token and adapter, all layers.
        layers: attention layers.
    """

    base: int
    adapter: int
    full: int
    low_rank: int
    layers: int

    def per_token(self, way: str, agents: int) -> int:
        """Bytes that a token takes once every agent has seen it."""
        if way == "non_shared":
            return agents * self.full
        entries = {"fully_shared": 0, "base_lr_shared": 1}.get(way, agents)
        return self.full + entries * self.low_rank

    def total(self, way: str, agents: int, tokens: int) -> int:
        """Weights and caches, and K and V of one layer once more: attention over long inputs needs it, and so does growing."""
        return self.base + agents * self.adapter + tokens * (self.per_token(way, agents) + self.full // self.layers)


def fits(sizes: Sizes, way: str, *, agents: int | None = None, tokens: int | None = None, card: float = CARD) -> int:
    """The most agents at ``tokens``, or the longest trajectory of ``agents``, within ``card`` less ``RESERVE``; 0: none."""
    if tokens is None:
        assert agents is not None
        fixed, more = sizes.total(way, agents, 0), sizes.total(way, agents, 1)
    else:
        assert agents is None
        fixed, more = sizes.total(way, 0, tokens), sizes.total(way, 1, tokens)
    return max(0, math.floor((card - RESERVE - fixed) / (more - fixed)))


def sizes_of(model: PeftModel, agents: Sequence[str]) -> Sizes:
    """Of a model with adapters that are alike."""
    config = model.config
    parameters = list(model.named_parameters())
    base = sum(p.nbytes for name, p in parameters if "lora_" not in name)
    adapter = sum(p.nbytes for name, p in parameters if f".{agents[0]}." in name)
    size = parameters[0][1].element_size()
    full = size * cache_width(config)
    return Sizes(base, adapter, full, size * predicted_low_rank(model, agents[0]), config.num_hidden_layers)


def most_rows(sizes: Sizes, common: dict[str, Any]) -> list[dict[str, Any]]:
    """What fits by the formula."""
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        row: dict[str, Any] = dict(kind="most", policy=way, **common)
        row["agents_at"] = {tokens: fits(sizes, way, tokens=tokens) for tokens in (16384, 65536, 131072)}
        row["tokens_for"] = {agents: fits(sizes, way, agents=agents) for agents in (1, 3, 8, 20, 50)}
        row["bytes_of_20_at_128k"] = 131072 * sizes.per_token(way, 20)
        rows.append(row)
    return rows


@torch.no_grad()
def fill(
    model: PeftModel, agents: Sequence[str], policy: str, tokens: int, prompt: int, weights: int
) -> dict[str, Any]:
    """Storage for ``tokens``, a prompt of ``prompt`` tokens prefilled in chunks, and a turn of two tokens by every agent."""
    device = model.device
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, model.config.vocab_size, (1, prompt), generator=generator).to(device)
    release(device)
    peak(device, 0)
    cache = SharedLoRACache(model, sharing=policy, max_cache_len=tokens)  # type: ignore[arg-type]
    model.set_adapter(agents[0])
    start = time.perf_counter()
    for at in range(0, prompt - 1, CHUNK):
        model(input_ids=text[:, at : min(at + CHUNK, prompt - 1)], past_key_values=cache, logits_to_keep=1)
    synchronize(device)
    prefill = time.perf_counter() - start
    runner, first = Generate(model, lambda: cache, one_for_all=True), []
    for agent in agents:
        text, times = runner.take_turn(agent, text, 2)
        first.append(times.first)
    footprint = cache.memory_footprint()
    held = cache.trajectory_length
    return dict(
        agents=len(agents), tokens=held if prompt > tokens // 2 else tokens, prompt_tokens=prompt, prefill_s=prefill,
        ttft_ms=[round(1e3 * seconds, 1) for seconds in first], cache_bytes=footprint["total"],
        allocated_bytes=footprint["allocated"], non_shared_bytes=footprint["non_shared"],
        steady_bytes=allocated(device) - weights if device.type == "cuda" else None, peak_total_bytes=peak(device, 0),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-8b")
    parser.add_argument("--adapters", choices=ADAPTERS, default="r16-qkvo")
    parser.add_argument("--policies", nargs="*", choices=WAYS[3:], default=["lr_precomputed", "base_lr_shared"])
    parser.add_argument("--agents", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--no-fill", action="store_true", help="the formula only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args(argv)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    arguments.shape = arguments.rank = arguments.adapter_dtype = None
    common = {name: value for name, value in about(arguments, device).items() if name in
              ("gpu", "torch", "triton", "transformers", "peft", "date", "commit", "dtype")}  # fmt: skip
    common |= dict(model=arguments.model, adapters=arguments.adapters)
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps({name: value for name, value in row.items() if name not in common}), flush=True)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")

    rank, targets = ADAPTERS[arguments.adapters]
    base, well = build_base(arguments.model, dtype, device), True
    for kind, count in (("filled", arguments.agents), ("allocated", 3)):
        agents = [f"agent{i}" for i in range(count)]
        model = add_adapters(base, agents, targets, rank, dtype)
        share_a(model, agents)
        sizes = sizes_of(model, agents)
        if kind == "filled":
            for row in most_rows(sizes, common):
                keep(row)
        for policy in [] if arguments.no_fill else arguments.policies:
            tokens, prompt = arguments.tokens, arguments.tokens
            if kind == "allocated":
                tokens = fits(sizes, policy, agents=count)
                prompt = min(CHUNK, tokens // 2)
            release(device)
            row = dict(kind=kind, policy=policy, predicted_bytes=sizes.per_token(policy, count) * tokens, **common)
            try:
                # Room for what the agents write.
                room = tokens + 2 * count if kind == "filled" else tokens
                row |= fill(model, agents, policy, room, prompt, allocated(device))
            except Exception as error:
                traceback.print_exc()
                row |= dict(agents=count, tokens=tokens, error=f"{type(error).__name__}: {error}".splitlines()[0][:300])
                well = False
            keep(row)
            release(device)
        detach(model)
        base = model.unload()
        del model
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
