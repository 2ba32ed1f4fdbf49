"""What would close the gap of ``base_shared``? Other writers of the base and private layers, simulated on plain PEFT.

    python examples/quality/what_if.py --data episodes_dev.jsonl --output runs/what_if --private 8-14 --private 8-21

Uses neither the cache nor its attention: hooks on the base layers of ``k_proj`` and ``v_proj`` replace what earlier writers have
written, so any wish about whose K and V a token keeps can be tried before it is built. Every turn runs the whole text again.

Variants: ``base_shared`` (whoever processes a token first writes its base; a test compares it with the cache), ``neutral`` (the
base model writes all of it), and one per ``--private FIRST-LAST`` (there, each adapter keeps K and V of its own).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from replay import BASE, EXACT, Text, encode, load, read_episodes, score, show, summarise  # noqa: E402


class Simulation:
    """Base K and V of one text, as a rule about who writes them leaves them.

    Args:
        model: a PEFT model, not attached.
        neutral: the base model writes, not the adapters.
        private: indices of the layers that are not shared.
    """

    def __init__(self, model: Any, neutral: bool = False, private: Sequence[int] = ()):
        self.model, self.neutral = model, neutral
        self.base: dict[tuple[int, str], torch.Tensor] = {}
        self.replaces = False
        self.layers = {
            (index, which): getattr(layer.self_attn, which).base_layer
            for index, layer in enumerate(model.get_base_model().model.layers)
            for which in ("k_proj", "v_proj")
            if index not in private
        }

    def __enter__(self) -> Simulation:
        def hook(key: tuple[int, str], new: torch.Tensor) -> torch.Tensor:
            old = self.base.get(key)
            known = 0 if old is None else old.shape[1]
            both = new if old is None else torch.cat((old[:, : new.shape[1]], new[:, known:]), dim=1)
            if both.shape[1] > known and (self.replaces != self.neutral):
                self.base[key] = both
            return both if self.replaces else new

        self.handles = [
            module.register_forward_hook(lambda _m, _i, out, key=key: hook(key, out))
            for key, module in self.layers.items()
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def turn(self, role: str, ids: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Logits (stop - start, vocabulary) that predict the tokens start ... stop > 0 of ids (1, T)."""
        if self.neutral:
            self.replaces = False
            with self.model.disable_adapter():
                self.model(input_ids=ids[:, :start], use_cache=False)
        self.model.set_adapter(role)
        self.replaces = True
        return self.model(input_ids=ids[:, :stop], use_cache=False).logits[0, start - 1 : stop - 1]


@torch.no_grad()
def simulate(model: Any, text: Text, variants: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The scores of every turn under every variant, with exact caches and with the base model alone, as ``replay.replay``."""
    ids = text.ids.to(model.device)
    plain = {}
    with model.disable_adapter():
        plain[BASE] = model(input_ids=ids, use_cache=False).logits[0]
    for role in dict.fromkeys(turn.role for turn in text.turns):
        model.set_adapter(role)
        plain[role] = model(input_ids=ids, use_cache=False).logits[0]
    for variant, options in (*((name, None) for name in (BASE, EXACT)), *variants.items()):
        simulation = None if options is None else Simulation(model, **options)
        for index, turn in enumerate(text.turns):
            if simulation is None:
                logits = plain[BASE if variant == BASE else turn.role][turn.start - 1 : turn.stop - 1]
            else:
                with simulation:
                    logits = simulation.turn(turn.role, ids, turn.start, turn.stop)
            about = dict(policy=variant, text=text.name, turn=index, role=turn.role, kind=turn.kind)
            yield dict(**about, **score(logits, ids[0, turn.start : turn.stop]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate all variants; writes ``scores.jsonl`` and ``summary.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="episodes as JSON lines")
    parser.add_argument("--adapters", type=Path, default=Path(__file__).resolve().parents[1] / "adapters")
    parser.add_argument("--set", default="separate")
    parser.add_argument("--episodes", type=int, help="the first so many only")
    parser.add_argument("--private", action="append", default=[], metavar="FIRST-LAST", help="layers, both inclusive")
    parser.add_argument("--neutral", action="store_true", help="also: the base model writes the base")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    variants: dict[str, dict[str, Any]] = {"base_shared": {}}
    if options.neutral:
        variants["neutral"] = dict(neutral=True)
    for layers in options.private:
        first, _, last = layers.partition("-")
        variants[f"private {layers}"] = dict(private=range(int(first), int(last or first) + 1))
    options.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(options.adapters, options.set, torch.float32, options.device)
    rows = []
    with (options.output / "scores.jsonl").open("w") as file:
        for episode in tqdm(read_episodes(options.data)[: options.episodes]):
            for row in simulate(model, encode(tokenizer, episode), variants):
                rows.append(row)
                file.write(json.dumps(row) + "\n")
            file.flush()
    summary = summarise(rows)
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    Console(width=130).print(show({options.set: summary}))


if __name__ == "__main__":
    main()
