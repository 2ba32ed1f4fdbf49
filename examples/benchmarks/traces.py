"""Agent traces: who takes which turn, with how many new tokens, and how many it generates. Lengths only, no text.

A trace file is a CSV with the columns ``role``, ``new_input_tokens`` and ``generated_tokens``, one row per turn in order, and
``episode_id`` where it holds several episodes; other columns are not looked at. ``new_input_tokens`` is what was put into the
text since the last turn (the first prompt, observations, cues).
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

COLUMNS = ("role", "new_input_tokens", "generated_tokens")
CUE = 2  # tokens of a cue ("Action:"); what a turn gets beyond them is an observation


@dataclass(frozen=True)
class Turn:
    """One turn: ``role`` is given ``new_input`` tokens and generates ``generated`` tokens."""

    role: str
    new_input: int
    generated: int


@dataclass(frozen=True)
class Trace:
    """The turns of one episode. ``name`` says where they come from."""

    name: str
    turns: tuple[Turn, ...]

    @property
    def total(self) -> int:
        """Tokens of the whole text, the last generated one included."""
        return sum(turn.new_input + turn.generated for turn in self.turns)

    @property
    def generated(self) -> int:
        """Tokens that the agents write."""
        return sum(turn.generated for turn in self.turns)

    @property
    def roles(self) -> tuple[str, ...]:
        """The agents, in the order in which they first speak."""
        return tuple(dict.fromkeys(turn.role for turn in self.turns))

    @property
    def switches(self) -> int:
        """How often another agent than before takes a turn."""
        return sum(a.role != b.role for a, b in zip(self.turns, self.turns[1:], strict=False))


def read_traces(path: Path) -> dict[str, Trace]:
    """All episodes of a trace file, by id ("" where the file has no column ``episode_id``).

    Raises:
        ValueError: a column is missing, a number is none or negative, or an episode starts with an empty prompt.
    """
    turns: dict[str, list[Turn]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or [])]:
            raise ValueError(f"{path} has no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
        for row in reader:
            try:
                new, generated = int(row["new_input_tokens"]), int(row["generated_tokens"])
            except (TypeError, ValueError):
                raise ValueError(f"{path}, line {reader.line_num}: token counts must be whole numbers: {row}") from None
            episode = turns.setdefault(row.get("episode_id") or "", [])
            if new < (not episode) or generated < 1:
                raise ValueError(
                    f"{path}, line {reader.line_num}: {new} new and {generated} generated tokens; expected at least 0 (1 in the "
                    "first turn of an episode) and 1"
                )
            episode.append(Turn(row["role"], new, generated))
    return {name: Trace(name or path.stem, tuple(found)) for name, found in turns.items()}


def synthetic(steps: int = 4, seed: int = 3) -> Trace:
    """An episode of plan, action and reflect, with lengths drawn around the medians of 452 real ones.

    Each step is a thought, an action and its argument; its observation comes with the next thought. Four steps are 14 turns
    with 8 switches between agents, the median of the real episodes.

    Args:
        steps: tool calls, the last of which ends the search.
        seed: other seeds draw other lengths.
    """
    draw = random.Random(seed)

    def around(median: int, least: int = 1) -> int:
        return max(least, round(draw.lognormvariate(0, 0.4) * median))

    turns = []
    for step in range(steps):
        new = around(350, 64) if step == 0 else CUE + around(204, 16)
        turns += [Turn("plan", new, around(16, 4)), Turn("plan", CUE, around(3, 2)), Turn("action", 0, around(5, 2))]
    turns += [Turn("reflect", 12, around(10, 4)), Turn("reflect", CUE, 5)]
    return Trace(f"synthetic, {steps} steps, seed {seed}", tuple(turns))


def stretch(trace: Trace, total: int) -> Trace:
    """The trace with ``total`` tokens in all: observations scaled alike, everything that agents write kept.

    An observation is what a turn after the first is given beyond a cue. Where the first prompt, the cues and what is written are
    already longer than ``total``, the first prompt is scaled down together with the observations.

    Raises:
        ValueError: there is not enough to scale.
    """
    parts = [max(0, turn.new_input - CUE) for turn in trace.turns]
    parts[0] = 0
    fixed = trace.total - sum(parts)
    if total <= fixed or not sum(parts):
        parts[0] = trace.turns[0].new_input - 1
        fixed -= parts[0]
    if total < fixed:
        raise ValueError(
            f"{trace.name} writes and is cued with {fixed} tokens, so it can't be stretched to {total} in all"
        )
    scaled = _share_out(total - fixed, parts)
    turns = (
        replace(turn, new_input=turn.new_input - part + new)
        for turn, part, new in zip(trace.turns, parts, scaled, strict=True)
    )
    return Trace(trace.name, tuple(turns))


def _share_out(whole: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to ``weights`` that add up to ``whole``: the largest remainders are rounded up."""
    exact = [whole * weight / max(1, sum(weights)) for weight in weights]
    shares = [int(number) for number in exact]
    order = sorted(range(len(shares)), key=lambda i: shares[i] - exact[i])
    for i in order[: whole - sum(shares)]:
        shares[i] += 1
    return shares


@dataclass(frozen=True)
class Count:
    """What one turn makes the model run.

    Attributes:
        prefilled: tokens run before the first new one is there, at least 1: the last token of the text, whose logits are needed.
        rerun: of those, tokens that some agent has run before.
    """

    prefilled: int
    rerun: int


OWN_COVERAGE = ("non_shared", "base_shared")
"""Under these an agent runs every token itself; under all others nobody runs again what another has run."""


def count_tokens(trace: Trace, variant: str) -> tuple[list[Count], dict[str, int]]:
    """What each turn runs under a way of caching, and each agent's coverage at the end.

    The last token that an agent generates is not in its cache: the next turn runs it.
    """
    counts, covered, length, held = [], dict.fromkeys(trace.roles, 0), 0, 0
    for turn in trace.turns:
        length += turn.new_input
        known = covered[turn.role] if variant in OWN_COVERAGE else held
        counts.append(Count(length - known, held - known))
        length += turn.generated
        held = covered[turn.role] = length - 1
    return counts, covered if variant in OWN_COVERAGE else dict.fromkeys(trace.roles, held)
