"""What each policy keeps of the adapters' gain, against the tokens that it runs again and the memory that it takes.

    python examples/quality/pareto.py --data episodes_dev.jsonl --output docs/benchmarks/quality_pareto

Quality is read from the results of ``replay.py`` and ``what_if.py``; tokens and memory are counted here, from the lengths of the
turns of the same episodes, for the shape of SmolLM2 and the adapters' ranks (a test compares the counts with the caches'). Writes
``OUTPUT.png`` and ``OUTPUT.json``. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from replay import BASE, EXACT, FULLY_SHARED, Text, encode, load_smollm2, policy_arguments, read_episodes  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
# In which nobody runs again what another has run.
INSTANT = (FULLY_SHARED, "base_lr_shared", "lr_precomputed")


@dataclass(frozen=True)
class Shape:
    """What decides about memory.

    Attributes:
        layers: attention layers.
        width: numbers of K and V of one token and layer.
        rank: numbers of low-rank entries of k_proj and v_proj of one token, layer and adapter.
        adapters: loaded adapters.
    """

    layers: int
    width: int
    rank: int
    adapters: int = 3


@dataclass(frozen=True)
class Cost:
    """Of one text, or of several together.

    Attributes:
        tokens: of the text.
        rerun: tokens that went through the model beyond these.
        numbers: stored at the end, K, V and low-rank entries.
        one_cache: numbers in one full cache of the text.
    """

    tokens: int
    rerun: int
    numbers: int
    one_cache: int


@dataclass(frozen=True)
class Point:
    """One policy: what it keeps and what it costs. ``copies``: memory over that of one full cache of the text."""

    adapters: str
    policy: str
    episodes: int
    simulated: bool
    kept: float
    kept_interval: tuple[float, float]
    rerun_per_token: float
    copies: float


def cost(text: Text, policy: str, shape: Shape) -> Cost:
    """What the turns of a text cost under a policy (see ``policy_arguments`` for its name)."""
    covered: dict[str, int] = {}
    run = length = 0
    for turn in text.turns:
        # The token before a turn is always run by the turn's adapter: its logits predict the first token.
        known = length if policy in INSTANT else covered.get(turn.role, 0)
        run += turn.stop - max(0, min(known, turn.start - 1))
        covered[turn.role] = length = turn.stop
    own = sum(covered.values())
    private = len(policy_arguments(policy).get("private_layers", ()))
    shared = shape.layers - private
    low_rank = {
        EXACT: 0, FULLY_SHARED: 0, "base_lr_shared": length, "lr_precomputed": length * shape.adapters,
    }.get(policy, own) * shape.rank * shared  # fmt: skip
    full = own * shape.layers if policy == EXACT else length * shared + own * private
    return Cost(length, run - length, full * shape.width + low_rank, length * shape.layers * shape.width)


def point(
    adapters: str, policy: str, groups: dict[str, Any], texts: Sequence[Text], shape: Shape, simulated: bool = False
) -> Point:
    """Join the quality of a summary with the costs of the episodes that it was measured on: the first so many."""
    numbers = groups["all"]
    costs = [cost(text, policy, shape) for text in texts[: numbers["texts"]]]
    if len(costs) < numbers["texts"]:
        raise ValueError(f"{policy} was measured on {numbers['texts']} episodes, the data has {len(costs)}")
    tokens, rerun, stored, one = (sum(c) for c in zip(*(asdict(c).values() for c in costs), strict=True))
    low, high = numbers["kept_interval"]
    return Point(
        adapters,
        policy,
        len(costs),
        simulated,
        numbers["kept"],
        (low, high),
        round(rerun / tokens, 4),
        round(stored / one, 4),
    )


def points(
    replays: Sequence[dict[str, Any]], what_if: dict[str, Any], texts: Sequence[Text], shape: Shape
) -> list[Point]:
    """All policies of the results of ``replay.py``, and private layers that were only simulated.

    Of the simulation its largest part is taken.
    """
    found: list[Point] = []
    for result in replays:
        for adapters, policies in result["summary"].items():
            _, _, rank = adapters.partition(":")
            ranked = Shape(shape.layers, shape.width, 2 * int(rank)) if rank else shape
            found += [point(adapters, name, groups, texts, ranked) for name, groups in policies.items() if name != BASE]
    parts = {int(name.split()[0]): part for name, part in what_if.items() if name != "about"}
    for name, groups in parts[max(parts)].items():
        # "private 8-21" there is the cache's "base_shared+private:8-21".
        policy = f"base_shared+private:{name.split()[1]}" if name.startswith("private ") else name
        if policy.startswith("base_shared"):
            simulated = point(what_if["about"]["adapters"], policy, groups, texts, shape, simulated=True)
            measured = [p for p in found if (p.adapters, p.policy) == (simulated.adapters, policy)]
            if all(p.episodes < simulated.episodes for p in measured):
                found.append(simulated)
    return found


def draw(found: Sequence[Point], path: Path) -> None:
    """Gain kept against tokens run again and against memory."""
    from matplotlib.figure import Figure

    # Exact is the same for all adapters, and for any number of episodes.
    exact = next(p for p in found if p.policy == EXACT)
    shown = [exact, *(p for p in found if p.policy != EXACT)]
    labels = {
        id(p): f"{p.policy} ({p.adapters}, {p.episodes} episodes{', simulated' * p.simulated})"
        for p in shown
    }  # fmt: skip
    labels[id(exact)] = "one exact cache per adapter"
    figure = Figure(figsize=(12, 5.8), layout="constrained")
    markers = dict(zip(dict.fromkeys(p.policy for p in shown), "osD^vP*XhdH<>", strict=False))
    colours = dict(zip(dict.fromkeys(p.adapters for p in shown), ("tab:green", "tab:blue", "tab:orange"), strict=False))
    panels = figure.subplots(1, 2, sharey=True)
    for panel, value, label in (
        (panels[0], "rerun_per_token", "tokens run again, per token of the text"),
        (panels[1], "copies", "memory at the end, in full caches of the text"),
    ):
        groups: dict[int, list[Point]] = {}
        for p in shown:
            groups.setdefault(round(getattr(p, value) / 0.1), []).append(p)
        for members in groups.values():
            for place, p in enumerate(members):
                # Points at the same place stand side by side.
                x = getattr(p, value) + 0.04 * (place - (len(members) - 1) / 2)
                low, high = p.kept_interval
                panel.errorbar(
                    x, 100 * p.kept, [[100 * max(0, p.kept - low)], [100 * max(0, high - p.kept)]], capsize=2, linewidth=1,
                    marker=markers[p.policy], color="black" if p is exact else colours[p.adapters],
                    mfc="white" if p.episodes < exact.episodes else None, linestyle="none", label=labels[id(p)],
                )  # fmt: skip
        panel.axhline(100, color="grey", linewidth=0.5)
        panel.set(xlabel=label)
        panel.set_xlim(left=min(0, panel.get_xlim()[0]))
    panels[0].set(ylabel="gain kept (%), 95 % interval over episodes")
    handles = dict(zip(*reversed(panels[1].get_legend_handles_labels()), strict=True))
    ordered = [labels[id(p)] for p in shown]
    figure.legend([handles[label] for label in ordered], ordered, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, join and draw."""
    benchmarks = ROOT / "docs" / "benchmarks"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="the episodes that quality was measured on, as JSON lines"
    )
    parser.add_argument(
        "--replays", type=Path, nargs="+", help="of replay.py",
        default=[benchmarks / "quality_dev50.json"],
    )  # fmt: skip
    parser.add_argument("--what-if", type=Path, default=benchmarks / "quality_what_if.json", help="of what_if.py")
    parser.add_argument(
        "--rank", type=int, default=8, help="of the adapters on k_proj and on v_proj, default %(default)s"
    )
    parser.add_argument("--output", type=Path, required=True, help="without suffix")
    options = parser.parse_args(arguments)
    model, tokenizer = load_smollm2()
    config = model.config
    shape = Shape(config.num_hidden_layers, 2 * config.num_key_value_heads * config.head_dim, 2 * options.rank)
    texts = [encode(tokenizer, episode) for episode in read_episodes(options.data)]
    results = [json.loads(path.read_text()) for path in options.replays]
    found = points(results, json.loads(options.what_if.read_text()), texts, shape)
    about = dict(
        data=options.data.name, quality=[path.name for path in (*options.replays, options.what_if)], shape=asdict(shape),
        tokens=sum(text.turns[-1].stop for text in texts), episodes=len(texts),
        rerun_per_token="tokens that went through the model beyond one pass over the text, per token of the text",
        copies="K, V and low-rank entries at the end over those of one full cache of the text; no positions, no expanded keys",
    )  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(
        json.dumps(dict(about=about, points=[asdict(p) for p in found]), indent=1) + "\n"
    )
    draw(found, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
