"""Time of a decode step on the CPU: PEFT with ``DynamicCache`` beside ``SharedLoRACache``, step by step in turn.

Both run the same SmolLM2-135M, adapter and tokens in the same process; their steps alternate, so that whatever else the
machine does hits both alike. Expected before measuring: our step leaves out PEFT's up-projections of k and v and
``DynamicCache``'s copy of the whole cache, and pays for expanding one key and for attention in parts; about even.

    python examples/benchmarks/decode_cpu.py --context 1000 --output docs/benchmarks/decode_cpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Cache, DynamicCache

from lora_shared_cache import SharedLoRACache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from smollm2 import load_smollm2  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build_model(dtype: torch.dtype, rank: int, targets: list[str]) -> tuple[peft.PeftModel, str]:
    """SmolLM2 with one LoRA adapter "agent" whose A and B are both random (PEFT starts B at zero)."""
    model, _ = load_smollm2(dtype=dtype)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), adapter_name="agent")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval(), "agent"


@torch.no_grad()
def time_steps(model: peft.PeftModel, caches: dict[str, Cache], context: int, steps: int) -> dict[str, list[float]]:
    """Prefill every cache with the same random tokens, then time ``steps`` decode steps of each, in turn.

    Returns:
        Seconds of each step, by cache.
    """
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(0, vocabulary, (1, context), generator=generator)
    tokens = torch.randint(0, vocabulary, (1, steps), generator=generator)
    for cache in caches.values():
        model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for step in track(range(steps), description=f"{context} tokens", console=Console(stderr=True)):
        order = list(caches) if step % 2 == 0 else list(reversed(caches))
        for name in order:
            begin = time.perf_counter()
            model(input_ids=tokens[:, step : step + 1], past_key_values=caches[name])
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    """Run the comparison and print (and keep) the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[1000], help="tokens in the cache before decoding")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=5, help="first steps that are not counted")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file to keep the result in")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, _ = build_model(DTYPES[arguments.dtype], arguments.rank, arguments.targets)

    rows = []
    for context in arguments.context:
        shared = SharedLoRACache()
        seconds = time_steps(model, {"dynamic": DynamicCache(), "shared": shared}, context, arguments.steps)
        counted = {name: times[arguments.warmup :] for name, times in seconds.items()}
        median = {name: statistics.median(times) for name, times in counted.items()}
        ratios = [s / d for s, d in zip(counted["shared"], counted["dynamic"], strict=True)]
        rows.append(
            {
                "context": context,
                "dynamic_ms": round(1e3 * median["dynamic"], 2),
                "shared_ms": round(1e3 * median["shared"], 2),
                "ratio_of_medians": round(median["shared"] / median["dynamic"], 3),
                "median_of_paired_ratios": round(statistics.median(ratios), 3),
                "memory_bytes": shared.memory_footprint(),
            }
        )
    table = Table(
        title=f"Decode step, SmolLM2-135M, {arguments.dtype}, r={arguments.rank} on {', '.join(arguments.targets)}"
    )
    for heading in ("context", "PEFT + DynamicCache", "SharedLoRACache", "ratio", "paired ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["context"]),
            f"{row['dynamic_ms']} ms",
            f"{row['shared_ms']} ms",
            str(row["ratio_of_medians"]),
            str(row["median_of_paired_ratios"]),
        )
    Console().print(table)
    if arguments.output:
        result = {
            "benchmark": "decode_cpu",
            "date": date.today().isoformat(),
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
            ).stdout.strip(),
            "cpu": platform.processor() or platform.machine(),
            "threads": arguments.threads,
            "dtype": arguments.dtype,
            "rank": arguments.rank,
            "targets": arguments.targets,
            "steps": arguments.steps,
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
            "rows": rows,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
