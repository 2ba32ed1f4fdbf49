"""Three agents of one model solve a question together, live, on one `SharedLoRACache`.

A ReAct loop: `plan` thinks and picks a tool, `action` writes its argument, a local full-text search answers, and so on
until `Finish`; then `reflect` judges the answer. The agents are LoRA adapters of SmolLM2-135M-Instruct and take turns
on one growing trajectory with `set_adapter`. Afterwards the recorded trajectory is replayed, token for token, on one
shared cache, on one `DynamicCache` per adapter (exact, but everything N times) and on one `DynamicCache` passed from
adapter to adapter (cheapest, but each adapter reads what others wrote). For watching one episode: this is no benchmark,
and one question says nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from search_tool import LIBRARY, SearchTool
from smollm2 import load_smollm2
from transformers import (
    Cache,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lora_shared_cache import SharedLoRACache

ADAPTERS = Path(__file__).parent / "adapters"
AGENTS = {"plan": "cyan", "action": "yellow", "reflect": "magenta"}

# The scheme that the adapters were trained on: this instruction, the question, then the turns.
PROMPT = """\
Answer a question by taking turns of Thought, Action and Observation. A Thought says what is known and what is still \
missing. An Action is one of these five:
(1) BingSearch[query], which searches a small library for the words of the query and returns the article that fits \
best. For example, BingSearch[how do bees find flowers]
(2) Retrieve[title], which returns the article with exactly this title. If there is none, it returns similar titles. \
For example, Retrieve[Honey bee]
(3) Lookup[keyword], which returns the next sentence with the keyword in the article that was found last. \
For example, Lookup[queen]
(4) Finish[answer], which gives the answer in a few words and ends the task. For example, Finish[Honey bee]
(5) Reflect[right/wrong], which says whether the answer is right or wrong, judged by the text so far. \
For example, Reflect[right]
The Action after Finish is always Reflect. Search before you answer.
Question: {question}
"""

# Most tokens of a turn, by its kind. A turn that reaches its limit is closed by the loop.
LIMITS = {"thought": 48, "action_type": 8, "argument": 32, "verdict": 8}


# --- The text of a turn -----------------------------------------------------------------------------------------------


def turn_is_over(kind: str, text: str) -> bool:
    """Whether the generated text ends the turn: a line end, or the opening bracket after the name of a tool."""
    if "\n" in text:
        return True
    if kind == "action_type":
        return "[" in text
    # The line end after the closing bracket is mostly a token of its own, or part of the bracket's.
    return kind != "thought" and "]" in text and not text.endswith("]")


def closing(kind: str, text: str) -> str:
    """What a turn that was cut off at its limit still needs, so that the next one starts as it was trained to."""
    if kind == "action_type":
        return "" if "[" in text else "["
    if "\n" in text:
        return ""
    return "\n" if kind == "thought" or "]" in text else "]\n"


def tool_name(text: str) -> str:
    """`' BingSearch['` -> `'BingSearch'`"""
    return text.split("[")[0].strip()


def tool_argument(text: str) -> str:
    """`'how magnets work]\\n'` -> `'how magnets work'`; brackets inside the argument stay."""
    line = text.strip().split("\n")[0]
    return (line.rpartition("]")[0] if "]" in line else line).strip()


class StopAtTurnEnd(StoppingCriteria):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, kind: str, start: int) -> None:
        self.tokenizer, self.kind, self.start = tokenizer, kind, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        over = [turn_is_over(self.kind, self.tokenizer.decode(row[self.start :])) for row in input_ids]
        return torch.tensor(over, device=input_ids.device)


# --- Caches and turns -------------------------------------------------------------------------------------------------


class Caches:
    """The cache of each agent: one for all, or one for each."""

    def __init__(self, make: Callable[[], Cache], *, one_for_all: bool) -> None:
        self._make, self._one_for_all = make, one_for_all
        self._caches: dict[str, Cache] = {}

    def of(self, agent: str) -> Cache:
        name = "all" if self._one_for_all else agent
        if name not in self._caches:
            self._caches[name] = self._make()
        return self._caches[name]

    def nbytes(self) -> int:
        return sum(cache_nbytes(cache) for cache in self._caches.values())


def cache_nbytes(cache: Cache) -> int:
    if isinstance(cache, SharedLoRACache):
        return cache.memory_footprint()["total"]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


@dataclass
class Turn:
    """One generated turn and what it cost."""

    agent: str
    kind: str
    prompt: list[int]  # the whole trajectory so far, with the cue of this turn
    tokens: list[int]  # what the agent generated
    covered: int  # tokens of the prompt that the agent's cache had already
    seconds: float
    nbytes: int  # of all caches together, after the turn
    choices: list[int] = field(default_factory=list)  # the agent's own greedy tokens, where the text is given

    @property
    def prefilled(self) -> int:
        return len(self.prompt) - self.covered


def take_turn(model: PeftModel, caches: Caches, agent: str, kind: str, prompt: list[int], **generate) -> Turn:
    """Let an agent generate greedily after `prompt`, and measure it (with the switch to the agent)."""
    start = time.perf_counter()
    model.set_adapter(agent)
    cache = caches.of(agent)
    covered = cache.get_seq_length()
    input_ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=cache,
            do_sample=False,
            **generate,
        )
    tokens = output[0, len(prompt) :].tolist()
    return Turn(agent, kind, prompt, tokens, covered, time.perf_counter() - start, caches.nbytes())


# --- The live loop ----------------------------------------------------------------------------------------------------


@dataclass
class Piece:
    """A piece of the trajectory, for showing: what the loop put in, or what a turn generated."""

    source: str  # an agent, or "observation"
    text: str
    turn: Turn | None = None


class Episode:
    """The trajectory of one question, and the loop that lets the agents write it."""

    def __init__(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, tool: SearchTool, caches: Caches, question: str
    ) -> None:
        self.model, self.tokenizer, self.tool, self.caches = model, tokenizer, tool, caches
        self.turns: list[Turn] = []
        self.answer = ""
        self.tokens: list[int] = []
        self._append(PROMPT.format(question=" ".join(question.split())))

    def _append(self, text: str) -> None:
        # Each piece is tokenised by itself, so that no later text changes the tokens that the caches hold.
        self.tokens += self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _turn(self, agent: str, kind: str, cue: str) -> Piece:
        self._append(cue)
        turn = take_turn(
            self.model,
            self.caches,
            agent,
            kind,
            list(self.tokens),
            max_new_tokens=LIMITS[kind],
            stopping_criteria=StoppingCriteriaList([StopAtTurnEnd(self.tokenizer, kind, len(self.tokens))]),
            **plain_text_only(self.tokenizer),
        )
        self.turns.append(turn)
        self.tokens += turn.tokens
        text = self.tokenizer.decode(turn.tokens)
        self._append(closing(kind, text))
        return Piece(agent, cue + text, turn)

    def _observe(self, text: str) -> Piece:
        text = f"Observation: {text}\n"
        self._append(text)
        return Piece("observation", text)

    def run(self, max_steps: int) -> Iterator[Piece]:
        """Yield the pieces as they are written. After `max_steps` tool calls the loop itself picks `Finish`."""
        for step in range(max_steps + 1):
            yield self._turn("plan", "thought", "Thought:")
            if step < max_steps:
                picked = self._turn("plan", "action_type", "Action:")
                yield picked
                name, cue = tool_name(picked.text.removeprefix("Action:")), ""
            else:
                name, cue = "Finish", "Action: Finish["
            written = self._turn("action", "argument", cue)
            yield written
            argument = tool_argument(written.text.removeprefix(cue))
            if name == "Finish":
                self.answer = argument
                break
            yield self._observe(self.tool.call(name, argument))
        yield self._observe("Please reflect your answer.")
        yield self._turn("reflect", "thought", "Thought:")
        yield self._turn("reflect", "verdict", "Action:")


def plain_text_only(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Arguments for `generate`: the turns end by their text, so no special token may be written."""
    return {"suppress_tokens": tokenizer.all_special_ids, "pad_token_id": tokenizer.eos_token_id}


# --- The replay -------------------------------------------------------------------------------------------------------


class FollowRecord(LogitsProcessor):
    """Make `generate` write the recorded tokens, and note which ones it would have chosen itself."""

    def __init__(self, record: list[int], start: int) -> None:
        self.record, self.start = record, start
        self.choices: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.choices.append(int(scores[0].argmax()))
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.record[input_ids.shape[1] - self.start]] = 0.0
        return forced


def replay_turn(model: PeftModel, tokenizer: PreTrainedTokenizerBase, caches: Caches, recorded: Turn) -> Turn:
    """Run a recorded turn again on other caches, with the same prompt and the same generated tokens."""
    follow = FollowRecord(recorded.tokens, len(recorded.prompt))
    turn = take_turn(
        model,
        caches,
        recorded.agent,
        recorded.kind,
        recorded.prompt,
        max_new_tokens=len(recorded.tokens),
        logits_processor=LogitsProcessorList([follow]),
        **plain_text_only(tokenizer),
    )
    turn.choices = follow.choices
    return turn


def replay(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rivals: dict[str, Caches], recorded: list[Turn]
) -> dict[str, list[Turn]]:
    """Replay an episode on several arrangements of caches at once.

    Turn by turn and in changing order, so that whatever else the machine is doing slows all of them alike.
    """
    replays: dict[str, list[Turn]] = {name: [] for name in rivals}
    names = list(rivals)
    for number, turn in enumerate(recorded):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            replays[name].append(replay_turn(model, tokenizer, rivals[name], turn))
    return replays


def equal_choices(turns: list[Turn], reference: list[Turn]) -> tuple[int, int]:
    """How many greedy tokens are those of the reference, of how many."""
    pairs = [pair for a, b in zip(turns, reference, strict=True) for pair in zip(a.choices, b.choices, strict=True)]
    return sum(a == b for a, b in pairs), len(pairs)


# --- What is shown ----------------------------------------------------------------------------------------------------

SHARED, NON_SHARED, FULLY_SHARED = "SharedLoRACache", "DynamicCache per adapter", "one DynamicCache for all"
LINE_STYLES = {SHARED: ("tab:blue", "-"), NON_SHARED: ("tab:red", "--"), FULLY_SHARED: ("tab:gray", ":")}


def show_piece(console: Console, piece: Piece) -> None:
    style = AGENTS.get(piece.source, "dim")
    show_line(console, piece.source, Text(piece.text.strip(), style=style), style=f"bold {style}")


def show_line(console: Console, label: str, text: Text, style: str = "bold") -> None:
    """One labelled paragraph, its further lines indented like the first."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=11, justify="right", style=style)
    grid.add_column()
    grid.add_row(label, text)
    console.print(grid)


def turn_table(turns: list[Turn], cache: SharedLoRACache) -> Table:
    """What each turn of the live run had to compute. `cache` names the policy."""
    policy = cache.sharing if cache.sharing == cache.policy else f"{cache.sharing}: {cache.policy}"
    table = Table(title=f"Turns on one SharedLoRACache ({policy})", title_justify="left", show_footer=True)
    known = 0
    rows = []
    for turn in turns:
        rows.append((len(turn.prompt) - known, turn.covered, known - turn.covered, len(turn.tokens), turn.seconds))
        known = len(turn.prompt) + len(turn.tokens) - 1  # the last token is run at the start of the next turn
    new, reused, rerun, written, seconds = (sum(column) for column in zip(*rows, strict=True))
    table.add_column("turn", justify="right")
    table.add_column("agent", footer="all")
    table.add_column("writes")
    for name, total in (("new tokens", new), ("reused", reused), ("re-run", rerun), ("generated", written)):
        table.add_column(name, justify="right", footer=f"{total:,}")
    table.add_column("seconds", justify="right", footer=f"{seconds:.1f}")
    for number, (turn, (*counts, seconds)) in enumerate(zip(turns, rows, strict=True), 1):
        style = AGENTS[turn.agent]
        cells = [f"{count:,}" for count in counts]
        table.add_row(str(number), turn.agent, turn.kind.replace("_", " "), *cells, f"{seconds:.2f}", style=style)
    return table


def comparison_table(replays: dict[str, list[Turn]]) -> Table:
    table = Table(title="The same trajectory, replayed token for token", title_justify="left")
    table.add_column("")
    for name in replays:
        table.add_column(name, justify="right")
    exact = replays[NON_SHARED]
    equal = {name: equal_choices(turns, exact) for name, turns in replays.items()}
    table.add_row("memory at the end", *(f"{turns[-1].nbytes / 1e6:.1f} MB" for turns in replays.values()))
    table.add_row("prefilled tokens", *(f"{sum(t.prefilled for t in turns):,}" for turns in replays.values()))
    table.add_row("time", *(f"{sum(t.seconds for t in turns):.1f} s" for turns in replays.values()))
    table.add_row(
        "greedy tokens equal to the exact ones",
        *(
            "exact" if name == NON_SHARED else f"{same}/{count} ({same / count:.0%})"
            for name, (same, count) in equal.items()
        ),
    )
    return table


def memory_parts(cache: SharedLoRACache) -> str:
    """One sentence on what the shared cache holds."""
    footprint = cache.memory_footprint()
    parts = {
        "base": footprint["base"],
        "low rank": sum(footprint["low_rank"].values()),
        "expanded keys of the active agent (kept on a CPU only)": footprint["expanded_keys"],
        "cos, sin and token ids": footprint["positions"],
    }
    listed = ", ".join(f"{name} {nbytes / 1e6:.1f}" for name, nbytes in parts.items())
    return f"{SHARED} holds, in MB: {listed}. With slack to grow it has allocated {footprint['allocated'] / 1e6:.1f}."


def verdicts(replays: dict[str, list[Turn]]) -> Iterator[tuple[str, str]]:
    """What sharing won (+) and lost (-) against one cache per adapter, a sentence each."""
    shared, exact, fully = replays[SHARED], replays[NON_SHARED], replays[FULLY_SHARED]
    for what, value, less, more in (
        ("memory", lambda turns: turns[-1].nbytes, "less", "more"),
        ("prefill", lambda turns: sum(turn.prefilled for turn in turns), "fewer tokens", "more tokens"),
        ("time", lambda turns: sum(turn.seconds for turn in turns), "faster", "slower"),
    ):
        ratio = value(exact) / value(shared)
        if ratio == 1:
            yield "=", f"{what}: the same"
        else:
            yield (
                ("+", f"{what}: {ratio:.2f} times {less}")
                if ratio > 1
                else ("-", f"{what}: {1 / ratio:.2f} times {more}")
            )
    same, count = equal_choices(shared, exact)
    if same == count:
        yield "+", f"text: all {count} greedy tokens are those of the exact caches"
    else:
        first = next(number for number, (a, b) in enumerate(zip(shared, exact, strict=True)) if a.choices != b.choices)
        where = f"first in turn {first + 1} ({shared[first].agent}, {shared[first].kind.replace('_', ' ')})"
        yield "-", f"text: {count - same} of {count} greedy tokens are not those of the exact caches, {where}"
    naive, _ = equal_choices(fully, exact)
    sign = "+" if same > naive else "-" if same < naive else "="
    yield sign, f"text, beside one DynamicCache for all: {same} to {naive} equal tokens of {count}"


def plot_memory(replays: dict[str, list[Turn]], path: Path) -> None:
    """Memory of the caches after each turn, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, turns in replays.items():
        color, style = LINE_STYLES[name]
        numbers = range(1, len(turns) + 1)
        axes.plot(numbers, [turn.nbytes / 1e6 for turn in turns], style, color=color, marker=".", label=name)
    agents = [turn.agent for turn in replays[SHARED]]
    axes.set_xticks(range(1, len(agents) + 1), agents, rotation=60, ha="right", fontsize=8)
    axes.set_xlabel("turn")
    axes.set_ylabel("KV cache (MB)")
    axes.set_ylim(bottom=0)
    axes.set_title("Cache memory over the turns of one trajectory")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


# --- The program ------------------------------------------------------------------------------------------------------


def read_questions() -> list[dict]:
    return [json.loads(line) for line in (LIBRARY / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def pick_question(wanted: str) -> tuple[str, list[str]]:
    """A built-in question by its number, with the answers that count as right; any other text as it is."""
    questions = read_questions()
    if not wanted.isdecimal():
        return wanted, []
    if not 1 <= int(wanted) <= len(questions):
        raise SystemExit(f"--question {wanted}: the built-in questions are 1 to {len(questions)}")
    chosen = questions[int(wanted) - 1]
    return chosen["question"], chosen["answers"]


def load_agents(arguments: argparse.Namespace) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    # Where every adapter has the same A on k_proj and v_proj, `auto` and `base_lr_shared` run no token twice.
    own_set = "shared_a" if arguments.sharing in ("auto", "base_lr_shared") else "separate"
    folder = arguments.adapters or ADAPTERS / own_set
    missing = [agent for agent in AGENTS if not (folder / agent / "adapter_config.json").exists()]
    if missing:
        raise SystemExit(f"{folder} holds no adapter for {', '.join(missing)}: see examples/train_role_adapters.py")
    # Most CPUs have no bfloat16 arithmetic: there a prefill in bfloat16 takes several times as long as in float32.
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    model, tokenizer = load_smollm2(getattr(torch, dtype), arguments.device, arguments.model)
    first, *others = AGENTS
    peft_model = PeftModel.from_pretrained(model, folder / first, adapter_name=first)
    for agent in others:
        peft_model.load_adapter(folder / agent, adapter_name=agent)
    return peft_model.to(dtype=model.dtype).eval(), tokenizer


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--question", default="1", help="number of a built-in question, or any text (default: 1)")
    parser.add_argument("--list-questions", action="store_true", help="show the built-in questions and stop")
    parser.add_argument(
        "--sharing",
        default="auto",
        choices=["auto", "base_shared", "base_lr_shared", "lr_precomputed"],
        help="policy of the shared cache (default: %(default)s)",
    )
    parser.add_argument(
        "--adapters",
        type=Path,
        help="folder with the adapters plan, action and reflect (default: shared_a beside this script, "
        "or separate for base_shared and lr_precomputed)",
    )
    parser.add_argument("--model", help="folder, GGUF file or id of the base model (default: the installed wheel)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the model and its adapters (default: float32 on a CPU, else bfloat16)",
    )
    parser.add_argument("--max-steps", type=int, default=4, help="tool calls before Finish is forced (default: 4)")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder of the plot (default: %(default)s)"
    )
    parsed = parser.parse_args(arguments)
    if parsed.max_steps < 0:
        parser.error("--max-steps must not be negative")
    return parsed


def main() -> None:
    arguments = parse_arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 118)
    if arguments.list_questions:
        for number, entry in enumerate(read_questions(), 1):
            console.print(Text(f"{number}. {entry['question']}"))
        return
    question, accepted = pick_question(arguments.question)
    transformers.logging.disable_progress_bar()
    with console.status("Loading the model and its adapters ..."), warnings.catch_warnings():
        # PEFT still uses a property that Transformers has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        model, tokenizer = load_agents(arguments)

    console.rule("Three agents, one cache")
    show_line(console, "question", Text(question, style="bold"))
    shared_cache = SharedLoRACache(sharing=arguments.sharing)
    episode = Episode(model, tokenizer, SearchTool(), Caches(lambda: shared_cache, one_for_all=True), question)
    for piece in episode.run(arguments.max_steps):
        show_piece(console, piece)
    outcome = Text(episode.answer or "(none)", style="bold")
    if accepted:
        right = any(answer.casefold() in episode.answer.casefold() for answer in accepted)
        outcome.append(f"   ({'right' if right else 'wrong'}; accepted: {', '.join(accepted)})")
    show_line(console, "answer", outcome)
    show_line(console, "", Text("The reflect adapter has only seen right answers: its verdict proves nothing.", "dim"))
    console.print()
    console.print(turn_table(episode.turns, shared_cache))

    rivals = {
        SHARED: Caches(lambda: SharedLoRACache(sharing=arguments.sharing), one_for_all=True),
        NON_SHARED: Caches(DynamicCache, one_for_all=False),
        FULLY_SHARED: Caches(DynamicCache, one_for_all=True),
    }
    with console.status("Replaying the same tokens on three arrangements of caches ..."):
        replays = replay(model, tokenizer, rivals, episode.turns)
    console.print(comparison_table(replays))
    console.print(Text(memory_parts(shared_cache), "dim"))
    console.print(Text(f"{SHARED} against one {NON_SHARED}:"))
    for sign, sentence in verdicts(replays):
        console.print(Text(f"  {sign} {sentence}", style={"+": "green", "-": "red"}.get(sign, "")))
    arguments.output.mkdir(parents=True, exist_ok=True)
    plot = arguments.output / "memory.png"
    plot_memory(replays, plot)
    console.print(Text(f"Memory over the turns: {plot}"))


if __name__ == "__main__":
    main()
