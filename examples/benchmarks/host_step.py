"""The host's part of captured decode steps in ``generate``, without a GPU: what it does before a replay, and what after.

Before a replay the device waits, so that part is added to every token; what comes after it runs while the device works. Graphs
launch nothing here: 32 layers of tiny width, three adapters on q, k, v, o, and a replay that returns what its capture returned.
``transformers``: a decoder that returns at once, with no cache of ours. ``with its pass``: replayed when the pass is there,
before it is checked; ``checked first``: after that. One thread of a CPU; what launches and PyTorch take on a GPU comes on top.

    PYTHONPATH=.:kernels python examples/benchmarks/host_step.py --out docs/benchmarks/host_step.json

Fields of a row (ms, medians over all tokens of a round but the first two of a turn, of these the median of ``--rounds`` of all
variants in turn): ``before_ms``: from the end of the last stopping criterion to the replay; ``after_ms``: from the replay to the
end of the next one.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from decode_step import ADAPTERS, about, add_adapters
from peft import PeftModel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StoppingCriteria
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutputWithPast

from lora_shared_cache import SharedLoRACache, detach, graphs
from lora_shared_cache.ahead import StepsAhead

POLICIES = ("lr_precomputed", "base_lr_shared", "base_shared")
LAYERS, WIDTH = 32, 64
# When a step is replayed, and which methods of ``StepsAhead`` are left out for it.
WAYS = {"": (), ", with its pass": ("start",), ", checked first": ("start", "claim")}


class Watch(StoppingCriteria):
    """Looks at the clock at each token's end and, through :meth:`replay`, at each replay."""

    def __init__(self) -> None:
        self.before: list[float] = []
        self.after: list[float] = []
        self._end: float | None = None
        self._replay: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool)
        now = time.perf_counter()
        if self._replay is not None:
            self.after.append(now - self._replay)
        self._end, self._replay = now, None
        return done

    def replay(self) -> None:
        self._replay = time.perf_counter()
        if self._end is not None:
            self.before.append(self._replay - self._end)


def without_a_device(watch: Watch) -> None:
    """Captures as on a GPU, and replays that do nothing."""

    class Graph:
        def __init__(self, run: Callable[[], Any], pool: Any, device: torch.device):
            self.out = run()

        def replay(self) -> Any:
            watch.replay()
            return self.out

    graphs.CudaGraph = Graph  # type: ignore[misc,assignment]
    graphs.DecodeGraphs._why_not_on_this_device = staticmethod(lambda attachment: None)  # type: ignore[method-assign]


def agents() -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    model = add_adapters(LlamaForCausalLM(config).eval(), ADAPTERS, "attention", 4, torch.float32)
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.endswith(("k_proj", "v_proj")):
                for name in ADAPTERS[1:]:
                    module.lora_A[name].weight.copy_(module.lora_A[ADAPTERS[0]].weight)
    return model


def measure(model: PeftModel, cache: Any, tokens: int, turns: int, watch: Watch) -> dict[str, float]:
    """Turns of the agents; those of the first round warm up."""
    text = torch.full((1, 20), 5)
    for turn in range(len(ADAPTERS) + turns):
        if turn == len(ADAPTERS):
            watch.before, watch.after = [], []
        model.set_adapter(ADAPTERS[turn % len(ADAPTERS)])
        watch._end = watch._replay = None
        text = model.generate(
            input_ids=text, attention_mask=torch.ones_like(text), past_key_values=cache, max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=False, pad_token_id=0, stopping_criteria=StoppingCriteriaList([watch]),
        )  # fmt: skip
    assert len(watch.before) >= turns * (tokens - 3), "not every step was replayed"
    return {
        name: round(1e3 * statistics.median(seconds), 4)
        for name, seconds in (("before_ms", watch.before), ("after_ms", watch.after))
    }


def transformers_alone(model: PeftModel, tokens: int, turns: int, watch: Watch) -> dict[str, float]:
    """The same with a decoder that returns at once."""

    class Empty(DynamicCache):
        tokens = 0

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.tokens

    def forward(input_ids: torch.Tensor, past_key_values: Empty, **_: Any) -> BaseModelOutputWithPast:
        if past_key_values.tokens:
            watch.replay()
        past_key_values.tokens += input_ids.shape[1]
        hidden = torch.zeros(*input_ids.shape, WIDTH)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    decoder = model.get_base_model().model
    decoder.forward = functools.wraps(type(decoder).forward)(forward)
    try:
        return measure(model, Empty(), tokens, turns, watch)
    finally:
        del decoder.forward


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100, help="per turn")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    watch = Watch()
    without_a_device(watch)
    model = agents()
    wanted = ("torch", "transformers", "peft", "date", "commit")
    arguments.shape, arguments.dtype, arguments.adapter_dtype, arguments.rank = "32 layers", "float32", "float32", 4
    common = {name: value for name, value in about(arguments, torch.device("cpu")).items() if name in wanted}
    common |= dict(device=f"one thread of a CPU ({platform.machine()})", layers=LAYERS, adapters=len(ADAPTERS))
    length = (len(ADAPTERS) + arguments.turns) * arguments.tokens + 40
    methods = {name: getattr(StepsAhead, name) for name in ("start", "claim")}

    def measure_policy(policy: str, without: Sequence[str]) -> dict[str, float]:
        for name in without:
            setattr(StepsAhead, name, lambda *_: None)
        cache = SharedLoRACache(sharing=policy, max_cache_len=length)  # type: ignore[arg-type]
        try:
            row = measure(model, cache, arguments.tokens, arguments.turns, watch)
        finally:
            for name, method in methods.items():
                setattr(StepsAhead, name, method)
        assert cache.eager_reason is None, cache.eager_reason
        detach(model)
        return row

    variants: dict[str, Callable[[], dict[str, float]]] = {
        "transformers": lambda: transformers_alone(model, arguments.tokens, arguments.turns, watch)
    }
    for policy in POLICIES:
        for way, without in WAYS.items():
            variants[policy + way] = functools.partial(measure_policy, policy, without)
    rounds = [{name: run() for name, run in variants.items()} for _ in range(arguments.rounds)]
    rows = [
        dict(variant=name)
        | {field: statistics.median(found[name][field] for found in rounds) for field in ("before_ms", "after_ms")}
        | common
        for name in variants
    ]
    for row in rows:
        print(f"{row['variant']:<32} before the replay {row['before_ms']:.3f} ms, after it {row['after_ms']:.3f} ms")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
