"""PEFT's own decode steps in a plain CUDA graph (``StaticCache``, no compiler, no ``generate``): the captured peer of benchmarks.

What a careful user can build today, once per adapter: the step's graph holds the adapter's kernels, the cache's addresses, and
the next token, which it chooses itself; the host only replays, and waits for nothing. On a CPU steps just run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from decode_step import synchronize
from peft import PeftModel
from transformers import StaticCache


@dataclass(frozen=True)
class Times:
    """Seconds of one turn, from before ``set_adapter``: until the adapter is set, until the first token, until the last."""

    switched: float
    first: float
    whole: float


class StaticSteps:
    """Greedy turns of several agents on static caches, one for all agents or one for each.

    Args:
        model: with an adapter for each role.
        room: tokens that a cache holds.
        one_for_all: one cache that all agents write to and read from.
    """

    def __init__(self, model: PeftModel, room: int, one_for_all: bool):
        self.model, self.room, self.one_for_all = model, room, one_for_all
        self.caches: dict[str, StaticCache] = {}
        self.held: dict[str, int] = {}
        self.token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._ran: set[str] = set()
        self._pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    @torch.no_grad()
    def take_turn(self, role: str, text: torch.Tensor, tokens: int) -> tuple[torch.Tensor, Times]:
        """As ``agent_trace.Generate.take_turn``."""
        synchronize(text.device)
        start = time.perf_counter()
        self.model.set_adapter(role)
        switched = time.perf_counter() - start
        name = "all" if self.one_for_all else role
        if name not in self.caches:
            self.caches[name], self.held[name] = StaticCache(config=self.model.config, max_cache_len=self.room), 0
        cache = self.caches[name]
        self._run(text[:, self.held[name] :], cache)
        found = text.new_empty(1, tokens)
        found[:, :1] = self.token
        synchronize(text.device)
        first = time.perf_counter() - start
        for i in range(1, tokens):
            self._step(role, cache)
            found[:, i : i + 1] = self.token
        synchronize(text.device)
        whole = time.perf_counter() - start
        self.held[name] = text.shape[1] + tokens - 1
        return torch.cat((text, found), dim=1), Times(switched, first, whole)

    def rewind(self) -> None:
        """Forget the text; caches and graphs stay."""
        for name, cache in self.caches.items():
            self.held[name] = 0
            for layer in cache.layers:
                layer.cumulative_length.fill_(0)

    def bytes_in_use(self) -> tuple[int, int]:
        """Bytes of the tokens held, and of all that is allocated."""
        used = whole = 0
        for name, cache in self.caches.items():
            nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            used, whole = used + nbytes // self.room * self.held[name], whole + nbytes
        return used, whole

    def _run(self, ids: torch.Tensor, cache: StaticCache) -> None:
        """Run ids (1, n) and leave the next token where the step reads it."""
        logits = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def _step(self, role: str, cache: StaticCache) -> None:
        step: Callable[[], None] = lambda: self._run(self.token, cache)  # noqa: E731
        if self._pool is None or role not in self._ran:
            # The first step of an adapter only runs: what libraries load must not come to be in a capture.
            self._ran.add(role)
            step()
            return
        if role not in self._graphs:
            self._graphs[role] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[role], pool=self._pool):
                step()
        self._graphs[role].replay()
