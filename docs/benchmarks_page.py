"""Writes ``docs/benchmarks.md`` from the results in ``docs/benchmarks``: every measured row, losses included.

``python docs/benchmarks_page.py`` after new results; a test compares the page with what this makes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS / "benchmarks"
PAGE = DOCS / "benchmarks.md"

INTRODUCTION = """# All results

Written by `docs/benchmarks_page.py` from the files in `docs/benchmarks`; don't edit. **Bold** is where we lose:
slower, larger or
less accurate than what the section compares with. What the numbers mean, and what was tried: the pages that each
section names."""

DECODE_VARIANTS = {
    "peft_dynamic_eager": "PEFT, `DynamicCache`, eager",
    "peft_static_compile": "PEFT, `StaticCache`, `torch.compile`",
    "ours_captured": "ours, captured",
    "ours_captured_growing": "ours, captured, growing storage",
    "ours_eager": "ours, not captured",
    "base_captured": "ours, captured, no adapter",
}
DECODE_TARGETS = {"attention": "q, k, v, o", "all": "all linear layers"}
# The lossy cache for all agents, which the policies have to beat.
LOSSY = "fully_shared"
QUALITY = ("quality_dev50.json", "quality_dev50_seed1.json", "quality_private.json")


def load(name: str) -> Any:
    """A results file."""
    return json.loads((RESULTS / name).read_text())


def link(*names: str) -> str:
    """Links to results files."""
    return ", ".join(f"[{name}](benchmarks/{name})" for name in names)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def bold(text: str, worse: bool) -> str:
    """Marked where it is a loss."""
    return f"**{text}**" if worse else text


def versions(about: dict[str, Any]) -> str:
    """Device, libraries, date and commit of a run, as far as its file says."""
    names = ("torch", "triton", "transformers", "peft")
    about = {**about, **about.get("versions", {})}
    device = about.get("gpu") or about.get("device") or f"{about['threads']} CPU cores ({about['cpu']})"
    parts = [device, *(f"{name} {about[name]}" for name in names if name in about), about["date"]]
    return ", ".join(parts) + (f", commit {about['commit']}" if "commit" in about else "")


def kernels() -> str:
    """Attention kernels beside PyTorch's attention."""
    sections = []
    for path in sorted(RESULTS.glob("flash_lora_attention*.csv")):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        lines = []
        for row in rows:
            compared = ["not compared", ""]
            if row["best_peer"]:
                speed = float(row["speed_vs_peer"])
                compared = [f"{float(row['best_peer_us']):,.1f} ({row['best_peer']})", bold(f"{speed:.2f}×", speed < 1)]
            first = f"{float(row['new_lengths_ms']):,.1f}" if row.get("new_lengths_ms") else ""
            lines.append([row["name"], f"{float(row['us']):,.1f}", *compared, first])
        head = ["work", "µs", "best peer, µs", "our speed over the peer's", "first call of new lengths, ms"]
        sections.append(f"{versions(rows[0])}. {link(path.name)}.\n\n{table(head, lines)}")
    return """## Attention kernels

bfloat16 unless said, 32 query and 8 KV heads of size 128, r = 16 on K and V, cold L2 cache, medians. The peer is the
fastest backend of PyTorch's
`scaled_dot_product_attention` in the same run, on keys and values that are ready-made. *No plans*: as the cache
calls, without cuDNN's plans for lengths. [Kernels](kernels.md).

""" + "\n\n".join(sections)


def decode_gpu() -> str:
    """Decode steps on a GPU."""
    rows = load("decode_step.json")
    eager = {(r["targets"], r["context"]): r["ms"] for r in rows if r["variant"] == "peft_dynamic_eager"}
    lines = []
    for row in rows:
        theirs = eager.get((row["targets"], row["context"]))
        adapted = row["variant"] != "base_captured"
        compared = adapted and row["variant"] != "peft_dynamic_eager"
        ratio = bold(f"{theirs / row['ms']:.2f}×", row["ms"] > theirs) if theirs and compared else ""
        name, targets = DECODE_VARIANTS[row["variant"]], DECODE_TARGETS[row["targets"]]
        runs = row.get("ms_runs")
        spread = f"{min(runs):.1f} to {max(runs):.1f}" if runs else "one run"
        lines.append([f"{row['context']:,}", targets if adapted else "none", name, f"{row['ms']:.1f}", spread, ratio])
    head = ["context", "LoRA on", "way", "ms per token", "lowest and highest repeat", "speed over PEFT's eager"]
    return f"""## Decode steps on a GPU

{versions(rows[0])}; the shape of {rows[0]["shape"]} with random weights in {rows[0]["dtype"]}, {rows[0]["adapters"]}
adapters of rank {rows[0]["rank"]}, one sequence, greedy `generate`, median of the
repeats. The host of this machine is uneven, so ratios to eager rows are flattering.
{link("decode_step.json", "decode_step_profile.json", "decode_step_history.json")}; [Decode steps](decode.md).

{table(head, lines)}"""


def decode_cpu() -> str:
    """Decode steps on a CPU."""
    result = load("decode_cpu.json")
    lines = []
    for row in result["rows"]:
        ratio = row["ratio_of_medians"]
        memory = row["memory_bytes"]
        lines.append(
            [
                f"{row['context']:,}",
                f"{row['dynamic_ms']:.1f}",
                f"{row['shared_ms']:.1f}",
                bold(f"{ratio:.2f}×", ratio > 1),
                f"{memory['non_shared'] / 1e6:.1f}",
                bold(f"{memory['total'] / 1e6:.1f}", memory["total"] > memory["non_shared"]),
            ]
        )
    head = ["context", "PEFT, `DynamicCache`, ms", "ours, ms", "our time over PEFT's", "`DynamicCache`, MB", "ours, MB"]
    return f"""## Decode steps on a CPU

{versions(result)}; SmolLM2-135M, {result["dtype"]}, one adapter of rank {result["rank"]} on
{", ".join(result["targets"])}, {result["steps"]} steps. With a single agent nothing is shared, so
memory is what the split costs (expanded keys included, which are kept on a CPU only). {link("decode_cpu.json")}.

{table(head, lines)}"""


def kept_by(policies: dict[str, Any], policy: str) -> list[str]:
    """Gain that a policy keeps: of all turns, its interval, and of each role's; bold where the lossy cache keeps more."""
    roles, lossy = policies[policy], policies.get(LOSSY)

    def cell(role: str) -> str:
        worse = lossy is not None and policy != "base_model" and roles[role]["kept"] < lossy[role]["kept"]
        return bold(f"{roles[role]['kept']:.1%}", worse)

    low, high = roles["all"]["kept_interval"]
    return [cell("all"), f"{low:.1%} to {high:.1%}", *(cell(role) for role in ("plan", "action", "reflect"))]


def traces() -> str:
    """Whole episodes, by every way of caching."""
    sections = []
    for path in sorted(RESULTS.glob("agent_trace*.json")):
        rows = load(path.name)
        exact = {(*setting_of(row), row["mode"], row["commit"]): row for row in rows if row["variant"] == "non_shared"}
        lines = []
        for row in rows:
            setting = setting_of(row)
            other = exact.get((*setting, row["mode"], row["commit"]))
            compared = other is not None and other is not row
            speed = f"{other['end_to_end_s'] / row['end_to_end_s']:.2f}×" if compared else ""
            lines.append(
                [
                    *setting[:2],
                    f"{row['total']:,}",
                    row["mode"],
                    f"`{row['variant']}`",
                    f"{row['end_to_end_s']:.1f}",
                    bold(speed, worse=compared and other["end_to_end_s"] < row["end_to_end_s"]),
                    f"{row['ttft_p50_ms']:,.0f} / {row['ttft_p95_ms']:,.0f}",
                    f"{row['decode_ms']:.0f}",
                    f"{row['prefilled_tokens']:,} / {row['rerun_tokens']:,}",
                    f"{row['cache_bytes'] / 1e6:,.1f}",
                    f"{row['cache_bytes'] / row['one_cache_bytes']:.2f}×",
                ]
            )
        about = {**rows[0], "device": f"{rows[0]['threads']} thread of a CPU"}
        about["gpu"] = None if about["gpu"] == "none" else about["gpu"]
        clock = "CPU seconds" if rows[0].get("clock") == "process" else "wall time"
        head = ["model", "adapters", "tokens", "mode", "way", f"end to end, s ({clock})", "speed over `non_shared`"]
        head += [
            "first token p50 / p95, ms",
            "ms per token",
            "tokens run / of them again",
            "caches, MB",
            "of one cache",
        ]
        sections.append(
            f"{versions(about)}{commits(rows)}, {rows[0]['dtype']}. {link(path.name)}.{unsteady(rows)}\n\n{table(head, lines)}"
        )
    if not sections:
        return "## Agent traces\n\nNot measured yet."
    return (
        "## Agent traces\n\nTurns of three agents on one text, [what is measured and how](traces.md). Bold: slower than one "
        "exact cache per adapter in the same mode.\n\n" + "\n\n".join(sections)
    )


def commits(rows: list[dict[str, Any]]) -> str:
    """The other commits that rows of one file were measured with."""
    others = list(dict.fromkeys(row["commit"] for row in rows))[1:]
    return f" (some rows {', '.join(others)})" if others else ""


def unsteady(rows: list[dict[str, Any]]) -> str:
    """A warning where the same work, PEFT's eager step with a ``DynamicCache``, took very different times in one run."""
    steps: dict[tuple, list[float]] = {}
    for row in rows:
        if row["mode"] == "eager" and row["variant"] in ("non_shared", LOSSY):
            steps.setdefault((*setting_of(row), row["commit"]), []).append(row["decode_ms"])
    worst = max(steps.values(), key=lambda times: max(times) / min(times), default=[1.0])
    if max(worst) < 1.3 * min(worst):
        return ""
    repeats = min(row["repeats"] for row in rows)
    return (
        f" **Don't judge by these times**: PEFT's same eager step took {min(worst):.0f} ms in one row and {max(worst):.0f} in "
        f"another, and some rows are of {repeats} repeat{'s' * (repeats > 1)}; token counts and memory are exact."
    )


def setting_of(row: dict[str, Any]) -> tuple[str, str, int]:
    """What has to be equal for two rows of a trace to be compared."""
    return row["model"], row["adapters"], row["total"]


def quality() -> str:
    """Gain of role adapters that each policy keeps."""
    lines = []
    for name in QUALITY:
        for adapters, policies in load(name)["summary"].items():
            for policy, roles in policies.items():
                start = [f"{name[:-5]}, {roles['all']['texts']}", f"`{adapters}`", f"`{policy}`"]
                lines.append([*start, f"{roles['all']['nll']:.3f}", *kept_by(policies, policy)])
    abouts = "; ".join(f"`{name[:-5]}`: {versions(load(name)['about'])}" for name in QUALITY)
    head = ["file, episodes", "adapters", "policy", "NLL", "gain kept", "95 %", "plan", "action", "reflect"]
    return f"""## Quality

Share of the adapters' gain over the base model that is kept, teacher-forced, SmolLM2-135M, rank 8, float32; bootstrap
intervals over episodes. Bold: less than one
lossy `DynamicCache` for all (`{LOSSY}`) kept in the same run. `non_shared` is exact. {abouts}. {link(*QUALITY)};
[Quality](quality.md).

{table(head, lines)}"""


def joined() -> str:
    """The same episodes, joined to long texts."""
    lines = []
    result = load("quality_dev50.json")
    for adapters, policies in result["joined"].items():
        lines += [[f"`{adapters}`", f"`{policy}`", *kept_by(policies, policy)] for policy in policies]
    return f"""### Long texts

{result["about"]["joined"][0].upper() + result["about"]["joined"][1:]}; seed 0.

{table(["adapters", "policy", "gain kept", "95 %", "plan", "action", "reflect"], lines)}"""


def what_if() -> str:
    """Rules that were simulated without the cache."""
    result = load("quality_what_if.json")
    lines = []
    for episodes, rules in result.items():
        if episodes == "about":
            continue
        shared = rules["base_shared"]["all"]["kept"]
        for rule, roles in rules.items():
            kept, (low, high) = roles["all"]["kept"], roles["all"]["kept_interval"]
            worse = rule != "base_model" and kept < shared
            lines.append([episodes, f"`{rule}`", bold(f"{kept:.1%}", worse), f"{low:.1%} to {high:.1%}"])
    return f"""### Simulated rules

{versions(result["about"])}; `{result["about"]["adapters"]}`. Bold: worse than `base_shared` on the same episodes;
`neutral`: the base model writes the base. {link("quality_what_if.json")}.

{table(["episodes", "rule", "gain kept", "95 %"], lines)}"""


def pareto() -> str:
    """Quality against tokens and memory."""
    result = load("quality_pareto.json")
    lines = []
    for point in result["points"]:
        row = [f"`{point['adapters']}`", f"`{point['policy']}`", f"{point['kept']:.1%}"]
        lines.append([*row, f"{point['rerun_per_token']:.4g}", f"{point['copies']:.3f}"])
    head = ["adapters", "policy", "gain kept", "tokens run again per token of text", "memory, full caches"]
    return f"""### Quality against re-run tokens and memory

{result["about"]["episodes"]} episodes, {result["about"]["tokens"]:,} tokens, seed 0. Counted from the lengths of the
turns. {link("quality_pareto.json")}.

{table(head, lines)}

![Gain kept against tokens run again and against memory](benchmarks/quality_pareto.png)"""


def sharing_report() -> str:
    """The report on a text, on a CPU."""
    result = load("sharing_report_cpu.json")
    report = result["report"]
    lossy = report["policies"][LOSSY]
    lines = []
    for name, policy in report["policies"].items():
        lines.append(
            [
                f"`{name}`",
                bold(f"{policy['kl']:.3f}", policy["kl"] > lossy["kl"]),
                f"{policy['top1']:.1%}",
                f"{policy['rerun_tokens']:,}",
                f"{policy['memory_bytes'] / 1e6:.1f}",
            ]
        )
    return f"""## Sharing report

{versions(result["about"])}; {result["about"]["model"]}, {report["tokens"]} tokens, {report["scored"]} scored.
{link("sharing_report_cpu.json")}.

{table(["policy", "KL to exact (nats)", "same top token", "tokens run again", "memory, MB"], lines)}"""


def shared_a() -> str:
    """Errors of rewritten adapters."""
    result = load("project_to_shared_a.json")
    lines = [[str(e["rank"]), e["projection"], f"{e['mean']:.1%}", f"{e['largest']:.1%}"] for e in result["errors"]]
    return f"""## Adapters rewritten to one A

{versions(result["about"])}; {result["about"]["model"]}, three adapters of rank 8: {result["about"]["what"]}.
{link("project_to_shared_a.json")}.

{table(["rank", "projection", "mean", "largest"], lines)}"""


def models() -> str:
    """How many models work."""
    result = load("models.json")["versions"]
    newest = max(result, key=lambda version: [int(part) for part in version.split(".")])
    worst = max((row for row in result[newest] if row["status"] == "ok"), key=lambda row: row["error"])
    found = sorted({row["status"] for rows in result.values() for row in rows})
    lines = [
        [status, *(str(sum(row["status"] == status for row in rows)) for rows in result.values())] for status in found
    ]
    return f"""## Models

Every model type of `AutoModelForCausalLM`, some of them with other settings too, tiny and random, in float64 beside PEFT and
`DynamicCache`: two adapters taking turns. The largest error of those that work in Transformers {newest}, relative to the largest
logit, is {worst["error"]:.0e} ({worst["model"]}). {link("models.json")}; the list: [Models](models.md).

{table(["status", *(f"Transformers {version}" for version in result)], lines)}"""


def others() -> str:
    """What has no table here."""
    return f"""## Besides

- {link("demo_cpu.txt")}: what `make demo` printed for one question, token counts, times and memory beside one
`DynamicCache` per adapter and one for all.
- {link("kernel_variants.txt")}: kernel variants on the way, those that lost included."""


def page() -> str:
    """The whole page."""
    sections = [
        kernels,
        decode_gpu,
        decode_cpu,
        traces,
        quality,
        joined,
        what_if,
        pareto,
        sharing_report,
        shared_a,
        models,
        others,
    ]
    return "\n\n".join([INTRODUCTION, *(section() for section in sections)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
