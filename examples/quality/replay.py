"""What each way of sharing a cache costs role adapters on real episodes: teacher-forced replay.

    python examples/quality/replay.py --data episodes_dev.jsonl --output runs/quality

Each role's turns are scored on the cache that a policy would have built from the episode's own order of turns, against one
exact cache per adapter. ``scores.jsonl`` holds a line for each turn, ``summary.json`` the tables: per role and kind of turn, and
over all, negative log-likelihood, token accuracy, turns reproduced whole by greedy decoding, the gap to the exact caches, and the
share of the adapter's gain over the base model that is kept, with bootstrap 95 % intervals over episodes.

Data: JSON lines with ``prompt`` and ``turns`` as in ``train_role_adapters.py``; adapters: ``SET/ROLE/`` folders. Beside the sets
there, ``projected:R`` is ``separate`` rewritten by ``project_to_shared_a`` with rank R. ``--join-tokens N`` joins episodes, in
order, into texts of at most N tokens. Policies are those of the package; ``base_shared+private:8-21`` has these layers private.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from smollm2 import load_smollm2  # noqa: E402
from train_role_adapters import ROLES, read_episodes  # noqa: E402

from lora_shared_cache import project_to_shared_a  # noqa: E402
from lora_shared_cache.sharing import (  # noqa: E402
    EXACT,
    FULLY_SHARED,
    ExactReplay,
    FullySharedReplay,
    SharedReplay,
    activate,
    policy_arguments,
)

POLICIES = {
    "separate": (EXACT, FULLY_SHARED, "base_shared", "lr_precomputed"),
    "shared_a": (EXACT, FULLY_SHARED, "base_shared", "base_lr_shared", "lr_precomputed"),
    "projected": (EXACT, "base_lr_shared"),
}
BASE = "base_model"
RESAMPLES = 2000


@dataclass(frozen=True)
class Turn:
    """Tokens start ... stop of a text, written by a role; what lies between turns is input."""

    role: str
    kind: str
    start: int
    stop: int


@dataclass(frozen=True)
class Text:
    """One episode, or several joined."""

    name: str
    ids: torch.Tensor  # (1, T)
    turns: list[Turn]


def encode(tokenizer: Any, episode: dict[str, Any]) -> Text:
    """Token ids piece by piece, as agents that take turns produce them."""
    ids: list[int] = []
    turns = []

    def add(text: str) -> None:
        if text:
            ids.extend(tokenizer(text, add_special_tokens=False)["input_ids"])

    add(episode["prompt"])
    for turn in episode["turns"]:
        add(turn.get("cue", "") if turn["role"] != "observation" else turn["text"])
        if turn["role"] != "observation":
            start = len(ids)
            add(turn["text"])
            turns.append(Turn(turn["role"], turn.get("kind", ""), start, len(ids)))
    return Text(str(episode.get("episode_id", "")), torch.tensor([ids]), turns)


def join(texts: Sequence[Text], tokens: int) -> list[Text]:
    """Texts one after the other, in pieces of at most ``tokens`` tokens; a longer one stands alone."""
    joined: list[Text] = []
    for text in texts:
        last = joined[-1] if joined else None
        if last is not None and last.ids.shape[1] + text.ids.shape[1] <= tokens:
            offset = last.ids.shape[1]
            moved = [Turn(t.role, t.kind, t.start + offset, t.stop + offset) for t in text.turns]
            joined[-1] = Text(f"{last.name}+{text.name}", torch.cat((last.ids, text.ids), 1), [*last.turns, *moved])
        else:
            joined.append(text)
    return joined


def score(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    """Sums over the tokens of one turn, from the logits (n, vocabulary) that predict them."""
    right = logits.argmax(-1) == targets
    loss = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, targets, reduction="sum")
    return dict(tokens=len(targets), nll=float(loss), correct=int(right.sum()), whole=bool(right.all()))


def replays(model: Any, policies: Sequence[str], chunk: int) -> dict[str, ExactReplay | SharedReplay]:
    """An empty cache for each policy."""
    special = {EXACT: ExactReplay, FULLY_SHARED: FullySharedReplay}
    return {
        name: special[name](model, chunk) if name in special else SharedReplay(model, chunk, name) for name in policies
    }


@torch.no_grad()
def replay(model: Any, text: Text, policies: Sequence[str], chunk: int = 512) -> Iterator[dict[str, Any]]:
    """The scores of every turn under every policy, and under the base model alone.

    Yields:
        Dicts with "policy", "text", "turn", "role", "kind" and the sums of :func:`score`.
    """
    ids = text.ids.to(model.device)
    caches = replays(model, policies, chunk)
    with model.disable_adapter():
        base = model(input_ids=ids, use_cache=False).logits[0]
    for index, turn in enumerate(text.turns):
        about = dict(text=text.name, turn=index, role=turn.role, kind=turn.kind)
        targets = ids[0, turn.start : turn.stop]
        yield dict(policy=BASE, **about, **score(base[turn.start - 1 : turn.stop - 1], targets))
        activate(model, turn.role)
        for name, cache in caches.items():
            logits = cache.turn(turn.role, ids, turn.start, turn.stop)
            yield dict(policy=name, **about, **score(logits, targets))


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of a ratio of sums over episodes.

    Args:
        values: (episodes, 2), numerator and denominator of each.
    """
    draws = np.random.default_rng(seed).integers(0, len(values), size=(RESAMPLES, len(values)))
    sums = values[draws].sum(1)
    low, high = np.nanpercentile(sums[:, 0] / np.where(sums[:, 1] == 0, np.nan, sums[:, 1]), [2.5, 97.5])
    return float(low), float(high)


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """policy -> group -> numbers; a group is "all", a role, or "role/kind". Paired by text with the exact caches."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    position = {name: i for i, name in enumerate(texts)}
    sums: dict[tuple[str, str], np.ndarray] = {}
    for row in rows:
        for group in ("all", row["role"], f"{row['role']}/{row['kind']}"):
            table = sums.setdefault((row["policy"], group), np.zeros((len(texts), 5)))
            table[position[row["text"]]] += (row["nll"], row["tokens"], row["correct"], row["whole"], 1)
    result: dict[str, Any] = {}
    for (policy, group), table in sums.items():
        nll, tokens, correct, whole, turns = table.sum(0)
        exact, base = sums[EXACT, group], sums[BASE, group]
        gap = np.stack((table[:, 0] - exact[:, 0], table[:, 1]), 1)
        gain = np.stack((base[:, 0] - table[:, 0], base[:, 0] - exact[:, 0]), 1)
        result.setdefault(policy, {})[group] = dict(
            texts=len(texts), turns=int(turns), tokens=int(tokens), nll=nll / tokens, token_accuracy=correct / tokens,
            whole_turns=whole / turns, gap=float(gap[:, 0].sum() / tokens), gap_interval=interval(gap),
            kept=float(gain[:, 0].sum() / gain[:, 1].sum()), kept_interval=interval(gain),
        )  # fmt: skip
    return result


def show(summary: dict[str, Any]) -> Table:
    """The rows "all" of a summary of several sets."""
    table = Table(title="all turns")
    for name in ("adapters", "policy", "NLL", "token accuracy", "whole turns", "gap (95 %)", "gain kept (95 %)"):
        table.add_column(name, justify="left" if name in ("adapters", "policy") else "right", no_wrap=True)
    for adapters, policies in summary.items():
        for policy, groups in policies.items():
            g = groups["all"]
            table.add_row(
                adapters, policy, f"{g['nll']:.4f}", f"{g['token_accuracy']:.1%}", f"{g['whole_turns']:.1%}",
                f"{g['gap']:+.4f} ({g['gap_interval'][0]:+.4f} {g['gap_interval'][1]:+.4f})",
                f"{g['kept']:.1%} ({g['kept_interval'][0]:.1%} {g['kept_interval'][1]:.1%})",
            )  # fmt: skip
    return table


def load(folder: Path, name: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """SmolLM2 with the adapters of a set."""
    kind, _, rank = name.partition(":")
    source = folder / ("separate" if kind == "projected" else kind)
    base, tokenizer = load_smollm2(dtype, device)
    model = PeftModel.from_pretrained(base, str(source / ROLES[0]), adapter_name=ROLES[0])
    for role in ROLES[1:]:
        model.load_adapter(str(source / role), adapter_name=role)
    if kind == "projected":
        project_to_shared_a(model, rank=int(rank) if rank else None)
    return model.eval(), tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Replay all sets and write scores and summary."""
    examples = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="episodes as JSON lines")
    parser.add_argument("--adapters", type=Path, default=examples / "adapters", help="folder of SET/ROLE/")
    parser.add_argument("--sets", nargs="+", default=["separate", "shared_a", "projected:16"])
    parser.add_argument(
        "--policies", nargs="+", help="non_shared is always one of them; default: those that fit the set"
    )
    parser.add_argument("--episodes", type=int, help="the first so many only")
    parser.add_argument("--join-tokens", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder for scores.jsonl and summary.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    for policy in options.policies or ():
        try:
            policy_arguments(policy)
        except ValueError as error:
            parser.error(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    episodes = read_episodes(options.data)[: options.episodes]
    summary: dict[str, Any] = {}
    with (options.output / "scores.jsonl").open("w") as file:
        for name in options.sets:
            model, tokenizer = load(options.adapters, name, getattr(torch, options.dtype), options.device)
            texts = [encode(tokenizer, episode) for episode in episodes]
            texts = join(texts, options.join_tokens) if options.join_tokens else texts
            policies = tuple(options.policies or POLICIES[name.partition(":")[0]])
            # The gap and the gain kept are those to the exact caches.
            policies = policies if EXACT in policies else (EXACT, *policies)
            rows = []
            for text in tqdm(texts, desc=name):
                for row in replay(model, text, policies):
                    rows.append(row)
                    file.write(json.dumps(dict(adapters=name, **row)) + "\n")
                file.flush()
            summary[name] = summarise(rows)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = dict(
        data=options.data.name, episodes=len(episodes), join_tokens=options.join_tokens, dtype=options.dtype,
        device=torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine(),
        torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__, commit=commit or "none",
        date=datetime.date.today().isoformat(),
    )  # fmt: skip
    (options.output / "summary.json").write_text(json.dumps(dict(about=about, summary=summary), indent=1) + "\n")
    Console(width=130).print(show(summary))


if __name__ == "__main__":
    main()
