"""Puts measured numbers into README.md and pages of ``docs/``, and draws the picture beside them.

    python docs/results_in_pages.py            # after new results in docs/benchmarks

What stands between ``<!-- numbers: NAME -->`` and ``<!-- end -->`` is written by the function NAME below, from the results files.
Rows are found by what they are (model, adapters, length, mode, way), never by place, so a new file of results changes the text by
itself; where several runs measured the same, the range of them is given. ``tests/test_documentation.py`` holds pages and picture
against the files. The picture needs matplotlib.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RESULTS = DOCS / "benchmarks"
PICTURE = DOCS / "pictures" / "overview.png"
PAGES = (ROOT / "README.md", DOCS / "index.md", DOCS / "policies.md")
BLOCK = re.compile(r"(<!-- numbers: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]
GPU = dict(model="llama-8b", adapters="r16-qkvo", total=16384)
# Times of different cards are no range of one number; runs on others stand on the page of all results.
CARD = "H100"
CPU = dict(model="smollm2-135m", adapters="r8-qkvo")
# Ways of caching in the words of a reader; the last part: whether it is ours.
WAYS = [
    ("non_shared", "eager", "one `DynamicCache` per adapter, PEFT as it is (exact)", False),
    ("non_shared", "captured", "the same in CUDA graphs of our own, `StaticCache`", False),
    ("fully_shared", "eager", "one `DynamicCache` for all, PEFT as it is", False),
    ("fully_shared", "captured", "the same in CUDA graphs of our own", False),
    ("lr_precomputed", "captured", "`lr_precomputed`, `max_cache_len=`", True),
    ("base_lr_shared", "captured", "`base_lr_shared`, `max_cache_len=`", True),
    ("base_shared", "captured", "`base_shared`, `max_cache_len=`", True),
    ("lr_precomputed", "growing", "`lr_precomputed`, growing storage, capturing in the clock", True),
    ("lr_precomputed", "eager", "`lr_precomputed`, nothing captured", True),
]
PEERS = ("non_shared", "fully_shared")
NEWEST = ("agent_trace.json", "agent_trace_cpu.json")
SEEDS = ("quality_dev50.json", "quality_dev50_seed1.json")


# ---- reading -------------------------------------------------------------------------------------------------------


def load(name: str) -> Any:
    """A results file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def trace_rows(gpu: bool) -> list[Row]:
    """Rows of whole episodes on the card or on a CPU, each with its file's name as ``source``.

    Of the policies the newest: earlier ones say what earlier code did. Of PEFT's ways all, which say what the hosts do.
    """
    rows = [
        dict(row, source=path.name) for path in sorted(RESULTS.glob("agent_trace*.json")) for row in load(path.name)
    ]
    rows = [row for row in rows if row["source"] in NEWEST or row["variant"] in PEERS]
    return [row for row in rows if "error" not in row and (CARD in row["gpu"] if gpu else row["gpu"] == "none")]


def having(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows with these fields."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def in_same_run(rows: Iterable[Row], row: Row, **other: Any) -> Row | None:
    """The row of another way and mode that was measured beside ``row``."""
    same = {name: row[name] for name in ("source", "commit", "model", "adapters", "total", "gpu")}
    return next(iter(having(rows, **same, **other)), None)


def spread(values: Iterable[float | None], digits: int = 1) -> str:
    """The lowest and the highest of several runs."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return ""
    low, high = (f"{value:,.{digits}f}" for value in (found[0], found[-1]))
    return low if low == high else f"{low} to {high}"


def speeds(rows: list[Row], of: list[Row], **other: Any) -> list[float]:
    """How many times as fast as another way that was measured in the same run."""
    pairs = [(row, in_same_run(rows, row, **other)) for row in of]
    return [peer["end_to_end_s"] / row["end_to_end_s"] for row, peer in pairs if peer is not None]


def links(names: Iterable[str], folder: str) -> str:
    """Links to results files."""
    return ", ".join(f"[{name}]({folder}benchmarks/{name})" for name in names)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def prose(*sentences: str) -> str:
    """Sentences as one paragraph."""
    return textwrap.fill(" ".join(sentences), 140, break_long_words=False, break_on_hyphens=False)


def conditions(rows: list[Row]) -> str:
    """Devices, versions, dates and commits of rows."""

    def all_of(name: str) -> str:
        return " and ".join(dict.fromkeys(str(row[name]) for row in rows))

    names = ("torch", "transformers", "peft")
    return ", ".join(f"{name} {all_of(name)}" for name in names) + f", {all_of('date')}, commit {all_of('commit')}"


# ---- blocks --------------------------------------------------------------------------------------------------------


def episode_gpu(folder: str) -> str:
    """A whole episode on a GPU by every way."""
    rows = trace_rows(gpu=True)
    here = having(rows, **GPU)
    lines, shown = [], []
    for way, mode, name, ours in WAYS:
        found = having(here, variant=way, mode=mode)
        if not found:
            continue
        shown += found
        faster = speeds(rows, found, variant="non_shared", mode="eager")
        speed = f"{spread(faster)}×" if faster else ""
        lines.append([
            name, f"{spread(row['end_to_end_s'] for row in found)} s",
            f"**{speed}**" if ours and max(faster, default=2) < 1 else speed,
            f"{spread((row['ttft_p50_ms'] for row in found), 0)} ms",
            f"{spread((row['prefilled_tokens'] for row in found), 0)}",
            f"{spread((row['cache_bytes'] / row['one_cache_bytes'] for row in found), 2)}×",
        ])  # fmt: skip
    one = shown[0]
    head = ["", "whole episode", "speed", "first token of a turn, median", "tokens prefilled", "caches, of one"]
    longer = []
    for total in sorted(
        {row["total"] for row in having(rows, model=GPU["model"], adapters=GPU["adapters"])} - {GPU["total"]}
    ):
        at = having(rows, model=GPU["model"], adapters=GPU["adapters"], total=total)
        parts = [
            f"{spread(row['end_to_end_s'] for row in found)} s {words}"
            for way, mode, words in (
                ("lr_precomputed", "captured", "with `lr_precomputed`"),
                ("non_shared", "eager", "with exact caches in PEFT as it is"),
                ("non_shared", "captured", "with exact caches in graphs"),
                ("fully_shared", "captured", "with one lossy cache in graphs"),
            )
            if (found := having(at, variant=way, mode=mode))
        ]
        if len(parts) > 1:
            longer.append(f"At {total:,} tokens: {', '.join(parts)}.")
    runs = {(row["source"], row["commit"]) for row in shown}
    text = prose(
        f"One {one['gpu']}; the shape of Llama-3.1-8B with random weights in {one['dtype']}, three",
        "adapters of rank 16 on q, k, v, o;",
        f"{len(one['turns'])} turns up to {GPU['total']:,} tokens, {one['generated']} of them generated.",
        f"Speed: over the first row of the same run. PEFT's ways in {len(runs)} runs, ours in the last: the hosts are slow and",
        "uneven, which flatters what is compared with uncaptured rows. **Bold** in the column of speed: slower.",
        *longer,
        f"{conditions(shown)}. {links(dict.fromkeys(row['source'] for row in shown), folder)};",
        f"[how it was measured]({folder}traces.md).",
    )
    return f"{table(head, lines)}\n\n{text}\n"


def summary(folder: str) -> str:
    """The first numbers that a reader sees."""
    rows = having(trace_rows(gpu=True), **GPU)
    ours, exact = (having(rows, variant=way, mode="captured") for way in ("lr_precomputed", "non_shared"))
    plain, lossy = (
        having(rows, variant="non_shared", mode="eager"),
        having(rows, variant="fully_shared", mode="captured"),
    )
    cpu = having(trace_rows(gpu=False), **CPU)
    longest = max(row["total"] for row in cpu)
    ours_cpu, exact_cpu = (having(cpu, total=longest, variant=way) for way in ("lr_precomputed", "non_shared"))
    kept = [load(name)["summary"]["separate"] for name in SEEDS]
    private = spread(100 * seed["base_shared+private:8-21"]["all"]["kept"] for seed in kept)
    shared = spread(100 * seed["lr_precomputed"]["all"]["kept"] for seed in kept)

    def seconds(found: list[Row]) -> str:
        return spread(row["end_to_end_s"] for row in found)

    def caches(found: list[Row]) -> str:
        return spread((row["cache_bytes"] / row["one_cache_bytes"] for row in found), 2)

    return (
        "\n".join(
            textwrap.indent(item, "  ").replace("  ", "- ", 1)
            for item in (
                prose(
                    f"**Time and memory on a GPU** (H100, 8B shape, three agents, {GPU['total']:,} tokens,",
                    f"{rows[0]['generated']} of them",
                    f"generated): an episode takes **{seconds(ours)} s and {caches(ours)} times the memory",
                    "of one cache**. Exact caches, one",
                    f"per adapter, take {caches(exact)} times and {seconds(plain)} s with PEFT as it is,",
                    f"{seconds(exact)} s in CUDA graphs of",
                    f"our own; one lossy cache for all, in such graphs, {seconds(lossy)} s.",
                ),
                prose(
                    f"**On a CPU** (SmolLM2-135M, {longest:,} tokens, seconds of one thread):",
                    f"{seconds(ours_cpu)} instead of {seconds(exact_cpu)}.",
                ),
                prose(
                    f"**Quality**: of what three real adapters gain over their base model {shared} % is",
                    f"kept, {private} % at twice the",
                    "memory of one cache. One lossy cache keeps about as much as the former.",
                ),
                "",
            )
            if item
        )
        + "\n"
    )


def picture(folder: str) -> str:
    """The conditions of the picture."""
    rows = having(trace_rows(gpu=True), **GPU)
    one, about = rows[0], load(SEEDS[0])["about"]
    sources = [*dict.fromkeys(row["source"] for row in rows), "trace_capacity.json", *SEEDS]
    text = prose(
        f"Left and middle: one {one['gpu']}, the shape of Llama-3.1-8B with random weights in",
        f"{one['dtype']}, adapters of rank 16 on",
        f"q, k, v, o. Left: three agents, {GPU['total']:,} tokens; *captured*: in CUDA graphs, *eager*:",
        "not, *growing*: captured within",
        "the clock; lines from the lowest to the highest run (the hosts are slow and uneven, which the",
        "eager bars show). Middle: lines",
        "by the formula. Grey: one exact cache per adapter. Orange: one lossy cache for all. Blue: ours. Right: real adapters of",
        f"SmolLM2-135M, {about['episodes']} real episodes. {conditions(rows)}; {links(sources, folder)}.",
    )
    return f"{text}\n"


def episode_cpu(folder: str) -> str:
    """A whole episode on a CPU, shortest and longest."""
    rows = having(trace_rows(gpu=False), **CPU)
    totals = sorted({row["total"] for row in rows})
    names = dict(
        non_shared="one `DynamicCache` per adapter (exact)", fully_shared="one `DynamicCache` for all",
        base_lr_shared="`base_lr_shared`", lr_precomputed="`lr_precomputed`", base_shared="`base_shared`",
    )  # fmt: skip
    lines = []
    for way, name in names.items():
        found = [having(rows, variant=way, total=total) for total in totals]
        if not all(found):
            continue
        slower = [max(speeds(rows, at, variant="non_shared", mode="eager")) < 1 for at in found]
        times = [f"{spread(row['end_to_end_s'] for row in at)} s" for at in found]
        last = found[-1]
        lines.append([
            name, *(f"**{time}**" if slow else time for time, slow in zip(times, slower, strict=True)),
            spread((row["prefilled_tokens"] for row in last), 0),
            f"{spread((row['cache_bytes'] / row['one_cache_bytes'] for row in last), 2)}×",
        ])  # fmt: skip
    head = ["", *(f"{total:,} tokens" for total in totals), f"prefilled at {totals[-1]:,}", "caches, of one"]
    one = rows[0]
    clock = "CPU seconds of one thread" if one["clock"] == "process" else "seconds"
    text = prose(
        f"SmolLM2-135M with real adapters (rank 8 on q, k, v, o) in {one['dtype']} on a CPU,",
        f"{one['generated']} tokens generated in",
        f"{len(one['turns'])} turns, {clock}. **Bold** time: slower than exact caches. The agent that ran last keeps its",
        f"expanded keys on a CPU, half a cache. {conditions(rows)}.",
        f"{links(dict.fromkeys(row['source'] for row in rows), folder)}; [more]({folder}traces.md#a-cpu).",
    )
    return f"{table(head, lines)}\n\n{text}\n"


def decode(folder: str) -> str:
    """Decode steps on a GPU."""
    rows = having(load("decode_step.json"), targets="attention")

    def ms(context: int, variant: str) -> str:
        return spread(row["ms"] for row in having(rows, context=context, variant=variant))

    contexts = sorted({row["context"] for row in having(rows, variant="ours_captured")})
    compiled = next(iter(having(rows, variant="peft_static_compile")), None)
    lines = [[f"{n:,}", ms(n, "peft_dynamic_eager"), ms(n, "ours_captured"), ms(n, "ours_eager")] for n in contexts]
    extra = ""
    if compiled is not None:
        extra = (
            f" PEFT with `StaticCache` and `torch.compile`: {compiled['ms']:.1f} ms at {compiled['context']:,}, after "
            f"{compiled['first_call_s']:.0f} s of compiling."
        )
    one = rows[0]
    head = ["context", "PEFT, `DynamicCache`, eager", "`SharedLoRACache`, captured", "not captured"]
    text = prose(
        f"ms per token in `generate`, one {one['gpu']}, Llama-3.1-8B's shape, three adapters of rank",
        f"{one['rank']} on q, k, v, o,",
        f"`lr_precomputed`.{extra} {conditions(rows)}. {links(['decode_step.json'], folder)}; [Decode steps]({folder}decode.md).",
    )
    return f"{table(head, lines)}\n\n{text}\n"


def quality(folder: str) -> str:
    """Gain kept by each policy."""
    kept: dict[tuple[str, str], list[float]] = {}
    for name in SEEDS:
        for adapters, policies in load(name)["summary"].items():
            for policy, roles in policies.items():
                kept.setdefault((adapters, policy), []).append(roles["all"]["kept"])
    points = load("quality_pareto.json")["points"]
    memory = {(point["adapters"], point["policy"]): point["copies"] for point in points}
    again = {(point["adapters"], point["policy"]): point["rerun_per_token"] for point in points}
    names = [
        ("separate", "non_shared", "one exact cache per adapter"),
        ("separate", "fully_shared", "one `DynamicCache` for all"),
        ("separate", "lr_precomputed", "`lr_precomputed`"),
        ("separate", "base_shared", "`base_shared`"),
        ("separate", "base_shared+private:8-21", "`base_shared`, 14 of 30 layers private"),
        ("shared_a", "fully_shared", "one `DynamicCache` for all, adapters trained with one A"),
        ("shared_a", "base_lr_shared", "`base_lr_shared`, adapters trained with one A"),
        ("projected:16", "base_lr_shared", "`base_lr_shared`, the first adapters rewritten to one A of rank 16"),
    ]
    lines = []
    for adapters, policy, name in names:
        seeds = kept[adapters, policy]
        # Of adapters of the same kind: less than one lossy cache keeps.
        lossy = kept.get((adapters, "fully_shared"), kept["separate", "fully_shared"])
        worse = all(a < b for a, b in zip(seeds, lossy, strict=True))
        percent = ", ".join(f"{value:.1%}" for value in seeds)
        lines.append([
            name, f"**{percent}**" if worse else percent, f"{again[adapters, policy]:.3g}", f"{memory[adapters, policy]:.2f}×",
        ])  # fmt: skip
    about = load(SEEDS[0])["about"]
    head = ["", "gain kept, two seeds of adapters", "tokens run again, per token of text", "memory, of one cache"]
    text = prose(
        "Share of what three real role adapters (SmolLM2-135M, rank 8) gain over the base model,",
        f"{about['episodes']} real episodes;",
        "bootstrap 95 % intervals are ± 0.8 to 1.6 points. **Bold**: less than the lossy cache keeps.",
        f"{links([*SEEDS, 'quality_pareto.json'], folder)}; [Quality]({folder}quality.md).",
    )
    return f"{table(head, lines)}\n\n{text}\n"


def capacity(folder: str) -> str:
    """What fits on one card."""
    rows = having(load("trace_capacity.json"), kind="filled")
    most = having(load("trace_capacity.json"), kind="most", policy="non_shared")[0]
    parts = " and ".join(
        f"{row['cache_bytes'] / 1e9:.1f} GB with `{row['policy']}` (the whole card then {row['peak_total_bytes'] / 1e9:.1f} GB)"
        for row in rows
    )
    one = rows[0]
    text = prose(
        f"{one['agents']} agents on {one['prompt_tokens']:,} tokens of an 8B model, on one {one['gpu']}:",
        f"caches of {parts}; one exact cache",
        f"each would take {one['non_shared_bytes'] / 1e9:.0f} GB: {most['agents_at']['131072']} agents fit",
        f"({links(['trace_capacity.json'], folder)}).",
    )
    return f"{text}\n"


BLOCKS: dict[str, Callable[[str], str]] = {
    function.__name__: function for function in (summary, picture, episode_gpu, episode_cpu, decode, quality, capacity)
}


def filled(page: Path) -> str:
    """A page with today's numbers.

    Raises:
        KeyError: it names a block that does not exist.
    """
    folder = "docs/" if page.parent == ROOT else ""
    text = page.read_text(encoding="utf-8")
    return BLOCK.sub(lambda match: match[1] + "\n" + BLOCKS[match[2]](folder) + "\n" + match[4], text)


# ---- the picture ---------------------------------------------------------------------------------------------------


def picture_data() -> dict[str, Any]:
    """All that is drawn."""
    rows = having(trace_rows(gpu=True), **GPU)
    ways = [(f"{way} ({mode})", having(rows, variant=way, mode=mode)) for way, mode, _, _ in WAYS]
    times = {name: [row["end_to_end_s"] for row in found] for name, found in ways if found}
    one_agent = having(rows, variant="lr_precomputed")[0]
    # r_k + r_v over 2 Hk D, from what three adapters take.
    ratio = (one_agent["predicted_bytes"] / one_agent["one_cache_bytes"] - 1) / one_agent["adapters_loaded"]
    measured = {
        way: [
            [row["adapters_loaded"], row["cache_bytes"] / row["one_cache_bytes"]]
            for row in having(rows, variant=way)[:1]
        ]
        for way in ("non_shared", "fully_shared", "lr_precomputed", "base_lr_shared")
    }
    for row in having(load("trace_capacity.json"), kind="filled"):
        measured[row["policy"]].append([row["agents"], row["cache_bytes"] * row["agents"] / row["non_shared_bytes"]])
    seeds = [load(name)["summary"]["separate"] for name in SEEDS]
    names = ("fully_shared", "base_shared", "lr_precomputed", "base_shared+private:8-21")
    kept = {name: [seed[name]["all"]["kept"] for seed in seeds] for name in names}
    return dict(times=times, share=ratio, measured=measured, kept=kept)


def digest(data: dict[str, Any]) -> str:
    """Short, the same for the same numbers."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def draw(data: dict[str, Any]) -> None:
    """Write the picture; the numbers it shows are named in its metadata."""
    from matplotlib.figure import Figure

    ours, exact, lossy = "#0b6e99", "#8a8a8a", "#c77c11"
    colour = dict(non_shared=exact, fully_shared=lossy)
    figure = Figure(figsize=(13, 4.2), layout="constrained", dpi=110)
    time, memory, quality = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])

    names = list(data["times"])[::-1]
    for place, name in enumerate(names):
        runs = data["times"][name]
        time.barh(place, statistics.median(runs), color=colour.get(name.split(" ")[0], ours), height=0.7)
        time.plot([min(runs), max(runs)], [place, place], "k-", lw=1)
        time.annotate(
            f"{spread(runs)} s", (max(runs), place), textcoords="offset points", xytext=(4, 0), va="center", fontsize=8
        )
    time.set_yticks(range(len(names)), names, fontsize=8)
    time.set_xlim(right=max(max(runs) for runs in data["times"].values()) * 1.3)
    time.set(xlabel="seconds", title=f"a whole episode, {GPU['total']:,} tokens")

    agents = list(range(1, 21))
    lines = dict(
        non_shared=agents, lr_precomputed=[1 + n * data["share"] for n in agents], base_lr_shared=[1 + data["share"]] * 20,
        fully_shared=[1] * 20,
    )  # fmt: skip
    marks = dict(non_shared=("-", "s"), lr_precomputed=("-", "o"), base_lr_shared=("--", "^"), fully_shared=(":", "D"))
    for name, values in lines.items():
        style, marker = marks[name]
        memory.plot(agents, values, style, color=colour.get(name, ours), label=name)
        for n, value in data["measured"][name]:
            memory.plot(n, value, marker, color=colour.get(name, ours))
    memory.set_yscale("log")
    memory.set_yticks([1, 2, 5, 10, 20], ["1×", "2×", "5×", "10×", "20×"])
    memory.minorticks_off()
    memory.set(xlabel="agents", title="memory, of one cache (points: measured)", xticks=[1, 5, 10, 15, 20])
    memory.legend(fontsize=8, frameon=False)

    for place, (name, values) in enumerate(reversed(data["kept"].items())):
        quality.plot([100 * value for value in values], [place] * len(values), "o", color=colour.get(name, ours))
    labels = [name.replace("+", "\n+") for name in reversed(data["kept"])]
    quality.set_yticks(range(len(labels)), labels, fontsize=8)
    quality.set_ylim(-0.6, len(labels) - 0.4)
    quality.axvline(100, color=exact, lw=1)
    quality.set(
        xlabel="% of the adapters' gain kept",
        title="quality, two seeds (100 %: exact caches)",
        xlim=(90, 100.6),
    )
    for axes in (time, memory, quality):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure.savefig(PICTURE, metadata={"Description": digest(data)})


def main() -> None:
    """Write pages and picture."""
    for page in PAGES:
        page.write_text(filled(page), encoding="utf-8")
    draw(picture_data())


if __name__ == "__main__":
    main()
