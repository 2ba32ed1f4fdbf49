"""Verdicts, tables and plot from what ``agent_trace.py`` and ``trace_capacity.py`` have measured.

    python examples/benchmarks/trace_report.py RESULTS.json [MORE.json] [--capacity JSON] [--plot PNG] [--merge JSON]

Of rows about the same thing the last file's counts. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
INSTANT = ("base_lr_shared", "lr_precomputed")
"""Policies under which nothing is run again: what is asked of speed is asked of these."""
KEY = ("model", "adapters", "total", "mode", "variant")
LONG = 16384
GB = 1e9


# ---- what is asked for ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Must:
    """One thing that was asked for. ``found`` is None, and nothing is passed, where it was not measured."""

    where: str
    what: str
    found: float | None
    least: float | None = None
    most: float | None = None

    @property
    def passed(self) -> bool | None:
        """Whether it is so; None: not measured."""
        if self.found is None:
            return None
        return (self.least is None or self.found >= self.least) and (self.most is None or self.found <= self.most)


def musts(rows: Iterable[Row], capacity: Iterable[Row] = ()) -> list[Must]:
    """What the results say about each thing asked for; every policy, length, model and kind of adapters by itself.

    Captured policies are compared with the captured peer (``StaticCache`` and a plain CUDA graph) where it was measured, and with
    PEFT's eager steps.
    """
    table_of = {tuple(row[name] for name in KEY): row for row in rows if "error" not in row}
    found: list[Must] = []
    for (model, adapters, total, mode, variant), row in table_of.items():
        where = f"{model} {adapters} {total}"

        def ratio(
            field: str, other: str, other_mode: str, row: Row = row, place: tuple = (model, adapters, total)
        ) -> float | None:
            peer = table_of.get((*place, other_mode, other))
            return None if peer is None else row[field] / peer[field]

        name = f"{variant}, {mode}"
        if variant in INSTANT and mode != "growing":
            for peer_mode in dict.fromkeys((mode, "eager")):
                beside = f"{name}, over fully_shared, {peer_mode}"
                time = ratio("end_to_end_s", "fully_shared", peer_mode)
                found += [
                    Must(where, f"throughput of {beside}", time and 1 / time, least=0.95),
                    Must(where, f"TTFT p50 of {beside}", ratio("ttft_p50_ms", "fully_shared", peer_mode), most=1.05),
                    Must(where, f"TTFT p95 of {beside}", ratio("ttft_p95_ms", "fully_shared", peer_mode), most=1.05),
                ]
            if total == LONG:
                least = 2.0 if mode == "eager" else 4.0
                time = ratio("end_to_end_s", "non_shared", "eager")
                found.append(Must(where, f"speed of {name}, over non_shared, eager", time and 1 / time, least=least))
        if variant not in ("non_shared", "fully_shared"):
            for field, what in (("cache_bytes", "memory in use"), ("steady_bytes", "device memory")):
                if field == "cache_bytes" or row.get(field) is not None:
                    share = row[field] / row["predicted_bytes"]
                    found.append(Must(where, f"{what} of {name}, over the formula", share, least=0.95, most=1.05))
    for row in capacity:
        if row.get("kind") == "filled":
            where = f"{row['model']} {row['adapters']}"
            what = f"{row['agents']} agents on {row['tokens']} tokens with {row['policy']}: GB at most"
            peak = None if "error" in row else row["peak_total_bytes"] / GB
            found.append(Must(where, what, peak, most=80.0))
    return found


def show_musts(found: Sequence[Must]) -> str:
    """One line each, the failed ones first."""
    words = {True: "pass", False: "FAIL", None: "not measured"}
    lines = []
    for must in sorted(found, key=lambda must: (must.passed is not False, must.passed is None)):
        limits = ((">=", must.least), ("<=", must.most))
        bounds = [f"{sign} {limit:g}" for sign, limit in limits if limit is not None]
        number = "-" if must.found is None else f"{must.found:.3f}"
        lines.append(f"{words[must.passed]:<13}{number:>9}  {' and '.join(bounds):<20}{must.where}: {must.what}")
    return "\n".join(lines)


# ---- tables --------------------------------------------------------------------------------------------------------


# Heading, width, digits and value of each number of a row.
COLUMNS: list[tuple[str, int, int, Callable[[Row], float | None]]] = [
    ("whole s", 8, 2, lambda row: row["end_to_end_s"]),
    ("tok/s", 7, 1, lambda row: row["generated_tok_s"]),
    ("TTFT50", 8, 1, lambda row: row["ttft_p50_ms"]),
    ("TTFT95", 8, 1, lambda row: row["ttft_p95_ms"]),
    ("ms/tok", 7, 1, lambda row: row["decode_ms"]),
    ("run", 8, 0, lambda row: row["prefilled_tokens"]),
    ("re-run", 8, 0, lambda row: row["rerun_tokens"]),
    ("cache GB", 9, 3, lambda row: row["cache_bytes"] / GB),
    ("x one", 6, 2, lambda row: row["cache_bytes"] / row["one_cache_bytes"]),
    ("steady", 7, 2, lambda row: None if row["steady_bytes"] is None else row["steady_bytes"] / GB),
    ("peak", 7, 2, lambda row: None if row["peak_bytes"] is None else row["peak_bytes"] / GB),
    ("first use", 10, 2, lambda row: row["first_use_s"]),
    ("fresh s", 8, 2, lambda row: row["fresh_s"]),
]
MARKDOWN_HEAD = """\
| | mode | end to end | of non-shared's speed | TTFT p50 / p95 | ms per token | run / of them again | caches, of one | peak |
|---|---|---|---|---|---|---|---|---|"""


def table(rows: Iterable[Row], head: bool = True) -> str:
    """Rows for a terminal."""
    lines = []
    if head:
        heads = "".join(f"{name:>{width}}" for name, width, _, _ in COLUMNS)
        lines.append(f"{'model':<13}{'adapters':<10}{'total':>7} {'mode':<9}{'variant':<15}{heads}")
    for row in rows:
        line = f"{row['model']:<13}{row['adapters']:<10}{row['total']:>7} {row['mode']:<9}{row['variant']:<15}"
        if "error" in row:
            lines.append(line + row["error"])
            continue
        for _, width, digits, value in COLUMNS:
            number = value(row)
            line += f"{'-':>{width}}" if number is None else f"{number:>{width}.{digits}f}"
        not_captured = row["mode"] != "eager" and row.get("eager_reason")
        lines.append(line + "  not captured" * bool(not_captured))
    return "\n".join(lines)


def markdown(rows: Iterable[Row]) -> str:
    """Rows for a page: one table for each model, kind of adapters and length."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault((row["model"], row["adapters"], row["total"]), []).append(row)
    parts = []
    for (model, adapters, total), group in groups.items():
        exact = next((r for r in group if (r["variant"], r["mode"]) == ("non_shared", "eager")), None)
        lines = [
            f"**{model}, {adapters}, {total:,} tokens** ({group[0]['generated']} of them generated)\n",
            MARKDOWN_HEAD,
        ]
        for row in group:
            cells = [
                f"`{row['variant']}`", row["mode"], f"{row['end_to_end_s']:.2f} s",
                "" if exact is None else f"{exact['end_to_end_s'] / row['end_to_end_s']:.2f}×",
                f"{row['ttft_p50_ms']:.0f} / {row['ttft_p95_ms']:.0f} ms",
                "" if row["decode_ms"] is None else f"{row['decode_ms']:.1f}",
                f"{row['prefilled_tokens']:,} / {row['rerun_tokens']:,}",
                f"{_size(row['cache_bytes'])}, {row['cache_bytes'] / row['one_cache_bytes']:.2f}×",
                "" if row["peak_bytes"] is None else _size(row["peak_bytes"]),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _size(nbytes: float) -> str:
    return f"{nbytes / GB:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


# ---- plot ----------------------------------------------------------------------------------------------------------

COLOURS = {
    "non_shared": "tab:red", "fully_shared": "tab:gray", "base_shared": "tab:orange", "base_lr_shared": "tab:green",
    "lr_precomputed": "tab:blue",
}  # fmt: skip
LINES = {"eager": "-", "captured": "--", "growing": ":"}


def plot(rows: Sequence[Row], path: Path) -> None:
    """End-to-end time and memory against the length of the trajectory, a row of panels for each model and kind of adapters."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in rows if "error" not in row]
    groups = list(dict.fromkeys((row["model"], row["adapters"]) for row in rows))
    figure = Figure(figsize=(11, 4.2 * len(groups) + 0.8), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for (model, adapters), (time, memory) in zip(groups, axes, strict=True):
        mine = [row for row in rows if (row["model"], row["adapters"]) == (model, adapters)]
        unit, name = (GB, "GB") if max(row["cache_bytes"] for row in mine) > GB else (1e6, "MB")
        for variant, colour in COLOURS.items():
            for mode, line in LINES.items():
                points = sorted(
                    (r["total"], r["end_to_end_s"], r["cache_bytes"] / unit)
                    for r in mine
                    if (r["variant"], r["mode"]) == (variant, mode)
                )
                if points:
                    totals, seconds, nbytes = zip(*points, strict=True)
                    style = dict(color=colour, linestyle=line, marker=".")
                    time.plot(totals, seconds, label=f"{variant}, {mode}", **style)
                    if mode == "eager" or not any((r["variant"], r["mode"]) == (variant, "eager") for r in mine):
                        memory.plot(totals, nbytes, label=variant, **style)
        time.set(title=f"{model}, {adapters}: whole trace", ylabel="seconds", yscale="log")
        memory.set(title="caches at the end, in use", ylabel=name, yscale="log")
        for panel in (time, memory):
            panel.set_xscale("log", base=2)
            ticks = sorted({row["total"] for row in mine})
            panel.set_xticks(ticks, [f"{t // 1024}k" if t % 1024 == 0 else str(t) for t in ticks])
            # Times often lie within one power of ten.
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_minor_locator(NullLocator())
            panel.set_xlabel("tokens of the trajectory")
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
    where = (
        rows[0]["gpu"] if rows[0]["gpu"] != "none" else f"{rows[0]['threads']} CPU thread(s), {rows[0]['clock']} clock"
    )
    figure.suptitle(
        f"{where}, {rows[0]['dtype']}, {rows[0]['adapters_loaded']} adapters, {rows[0]['generated']} generated tokens, "
        f"{rows[0]['switches']} switches, {rows[0]['date']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)


def merged(files: Sequence[Sequence[Row]], key: Sequence[str] = KEY) -> list[Row]:
    """Rows of several files; of rows about the same thing the last one, but no error over a result."""
    found: dict[tuple, Row] = {}
    for row in (row for rows in files for row in rows):
        place = tuple(row.get(name) for name in key)
        if "error" not in row or place not in found or "error" in found[place]:
            found[place] = row
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="of agent_trace.py")
    parser.add_argument("--capacity", type=Path, help="of trace_capacity.py")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--merge", type=Path, help="write all rows to one file")
    arguments = parser.parse_args(argv)
    rows = merged([json.loads(path.read_text()) for path in arguments.results])
    rows.sort(key=lambda row: (row["model"], row["adapters"], row["total"]))
    capacity = json.loads(arguments.capacity.read_text()) if arguments.capacity else []
    print(table(rows) + "\n\n" + markdown(rows) + "\n\n" + show_musts(musts(rows, capacity)))
    if arguments.merge:
        arguments.merge.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)
    return 0


if __name__ == "__main__":
    main()
