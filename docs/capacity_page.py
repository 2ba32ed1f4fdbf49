"""Puts model shapes and measured points into ``capacity.html``.

    python docs/capacity_page.py            # after a file in docs/benchmarks has changed
    python docs/capacity_page.py --check    # exit status 1 where the page is not up to date

The page computes everything itself. What it can't know are the shapes of models and what was measured: both are the JSON in its
``<script id="data">``, which this script fills. The formulas of the page are those of ``examples/benchmarks/trace_capacity.py``
(``Sizes``, ``fits``) and of ``SharedLoRACache.memory_footprint``; ``tests/test_capacity_page.py`` compares them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "capacity.html"
BLOCK = re.compile(r'(<script id="data" type="application/json">\n)(.*?)(\n</script>)', re.DOTALL)
WAYS = ("non_shared", "fully_shared", "base_shared", "base_lr_shared", "lr_precomputed")

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": dict(
        name="Llama-3.1-8B", layers=32, kv_heads=8, head_dim=128, heads=32, hidden=4096, mlp=14336, vocab=128256,
        tied=False, key_norm=False,
    ),
    "ministral-8b": dict(
        name="Ministral-8B (without its window)", layers=36, kv_heads=8, head_dim=128, heads=32, hidden=4096, mlp=12288,
        vocab=131072, tied=False, key_norm=False,
    ),
    "qwen3-8b": dict(
        name="Qwen3-8B", layers=36, kv_heads=8, head_dim=128, heads=32, hidden=4096, mlp=12288, vocab=151936, tied=False,
        key_norm=True,
    ),
    "smollm2-135m": dict(
        name="SmolLM2-135M", layers=30, kv_heads=3, head_dim=64, heads=9, hidden=576, mlp=1536, vocab=49152, tied=True,
        key_norm=False,
    ),
}  # fmt: skip
"""Sizes of the published configs. ``key_norm``: an RMS norm of queries and one of keys, per head."""

# What the benchmarks call an adapter, in the page's words: ranks on k, v and elsewhere, and the other projections with a LoRA.
ADAPTERS = {
    "r8-qv": dict(rk=0, rv=8, ro=8, on="q"),
    "r8-qkvo": dict(rk=8, rv=8, ro=8, on="qo"),
    "r16-qkvo": dict(rk=16, rv=16, ro=16, on="qo"),
}
NUMBER_SIZE = {"bfloat16": 2, "float32": 4}


def read(name: str) -> list[dict[str, Any]]:
    """Rows of a committed result."""
    rows = json.loads((DOCS / "benchmarks" / name).read_text(encoding="utf-8"))
    return [row for row in rows if "error" not in row]


def point(source: str, row: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A measured point. ``tokens``: of the trajectory; bytes and seconds only where they were measured."""
    about = dict(
        source=f"benchmarks/{source}",
        commit=row["commit"],
        device=row["gpu"] if row["gpu"] != "none" else "a CPU",
        date=row["date"],
        bytes=NUMBER_SIZE[row["dtype"]],
    )
    return about | {name: value for name, value in fields.items() if value is not None}


def capacity_points() -> list[dict[str, Any]]:
    """Trajectories that were really prefilled (``filled``) on one GPU, or whose storage was really allocated."""
    source, points = "trace_capacity.json", []
    for row in read(source):
        if row["kind"] == "most":
            continue
        common = dict(
            model=row["model"], adapter=ADAPTERS[row["adapters"]], way=row["policy"], agents=row["agents"], tokens=row["tokens"],
            whole=row["peak_total_bytes"],
        )  # fmt: skip
        if row["kind"] == "filled":
            points.append(point(
                source, row, **common, what="prefilled in chunks, a turn of every agent", caches=row["cache_bytes"],
                run=row["prompt_tokens"], run_s=round(row["prefill_s"], 2),
            ))  # fmt: skip
        else:
            points.append(point(
                source, row, **common, what="storage allocated, turns on 8k tokens of it", caches=row["allocated_bytes"],
            ))  # fmt: skip
    return points


def trace_points() -> list[dict[str, Any]]:
    """Whole episodes of three agents: on a GPU with the peak beside the weights, on a CPU without expanded keys."""
    points = []
    for source in ("agent_trace.json", "agent_trace_cpu.json"):
        for row in read(source):
            what = (
                f"an episode, {row['mode']}" if row["gpu"] != "none" else "an episode on a CPU, without expanded keys"
            )
            points.append(point(
                source, row, model=row["model"], adapter=ADAPTERS[row["adapters"]], way=row["variant"], tokens=row["total"],
                agents=row["adapters_loaded"], what=what, caches=row["cache_bytes"] - row["expanded_bytes"],
                beside_weights=row["peak_bytes"], run=row["prefilled_tokens"], run_s=round(row["first_tokens_s"], 2),
            ))  # fmt: skip
    return points


def decode_points() -> list[dict[str, Any]]:
    """Caches of three adapters, filled by one of them under ``lr_precomputed``."""
    source, points = "decode_step.json", []
    for row in read(source):
        if (row["variant"], row["targets"], row["rank"]) == ("ours_captured", "attention", 16):
            points.append(point(
                source, row, model=row["shape"], adapter=ADAPTERS["r16-qkvo"], way="lr_precomputed", agents=row["adapters"],
                tokens=row["context"], what="prefilled in chunks", caches=row["cache_bytes"],
            ))  # fmt: skip
    return points


def data() -> dict[str, Any]:
    """All that the page is given."""
    measured = capacity_points() + trace_points() + decode_points()
    return dict(shapes=SHAPES, measured=measured)


def filled(page: str) -> str:
    """The page with today's data.

    Raises:
        ValueError: the page has no block for them.
    """
    fields = data()
    lines = [f"  {json.dumps(row)}" for row in fields["measured"]]
    shapes = [f"  {json.dumps(name)}: {json.dumps(shape)}" for name, shape in fields["shapes"].items()]
    text = '{"shapes": {\n' + ",\n".join(shapes) + '\n},\n"measured": [\n' + ",\n".join(lines) + "\n]}"
    assert "</" not in text and json.loads(text) == json.loads(json.dumps(fields))
    found, count = BLOCK.subn(lambda match: match[1] + text + match[3], page)
    if count != 1:
        raise ValueError(f'{PAGE.name} has {count} blocks <script id="data" type="application/json">, expected 1')
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page)
    if new == page:
        return 0
    if arguments.check:
        print(f"{PAGE} is not up to date: run python docs/capacity_page.py", file=sys.stderr)
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
