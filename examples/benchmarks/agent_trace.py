"""Replay an agent trace on every way of caching it: end-to-end time, time to first token, memory, tokens run again.

Three LoRA adapters of one model take turns on one growing text, as a trace says (``traces.py``: a file with the columns
``role``, ``new_input_tokens`` and ``generated_tokens``, or a synthetic one), stretched to the wanted lengths. Llama-3.1-8B's
or Ministral-8B's shape with random weights in bfloat16 on a GPU; with ``--cpu`` SmolLM2-135M in float32 with its real adapters.

- ``non_shared``: PEFT with one ``DynamicCache`` per adapter. ``fully_shared``: one ``DynamicCache`` for all.
- ``base_shared``, ``base_lr_shared``, ``lr_precomputed``: one ``SharedLoRACache`` with that policy.

Modes: ``eager``: no CUDA graphs, growing storage. ``captured``: decode steps from CUDA graphs, storage allocated at once;
graphs are there before the clock starts (``fresh_s``: with a new cache, capturing included). ``growing``: a ``SharedLoRACache``
with no setting but its policy, capturing included. For the first two variants ``captured`` is a ``StaticCache`` and a plain
CUDA graph of PEFT's step (``static_steps.py``): no ``generate``, no waiting for tokens, which is to their advantage.

A turn is what a user writes: ``model.set_adapter(role)``, then ``model.generate(the whole text, past_key_values=cache, ...)``
with as many new tokens as the trace says. Its clock runs from before ``set_adapter``. A first replay with few tokens a turn warms
up all shapes and is not counted (``first_use_s``: how much longer it took than the later times say: attaching, compiling kernels,
capturing).

    PYTHONPATH=.:kernels python examples/benchmarks/agent_trace.py --totals 16384 --out results.json
    PYTHONPATH=.:kernels python examples/benchmarks/agent_trace.py --cpu --totals 1024 --repeats 3 --out cpu.json
    PYTHONPATH=.:kernels python examples/benchmarks/trace_report.py results.json --plot results.png    # verdicts, table, plot

On an H100 one model with one kind of adapters takes some 100 s at 16k; ``--time-budget`` ends a run in good order.

Fields of a row that do not speak for themselves (times in s or ms, memory in bytes): ``end_to_end_s``: sum over the turns,
median of ``--repeats``; ``ttft_*_ms``: time to first token over the turns; ``first_tokens_s``: their sum; ``decode_ms``: per
token after the first; ``cache_bytes``, ``allocated_bytes``: of the caches, in use and with slack; ``expanded_bytes``: of these,
expanded keys (on a CPU only); ``steady_bytes``, ``peak_bytes``: of the device beyond the weights and what cuBLAS keeps for
each stream of a process (``workspace_bytes``), after the last turn and at most; ``predicted_bytes``: what K, V and low-rank
entries of the tokens take; ``one_cache_bytes``: K and V of the text once; ``eager_reason``: why the last step of a captured
variant was not replayed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from decode_step import (
    DTYPES,
    SHAPES,
    Clock,
    about,
    add_adapters,
    allocated,
    build_base,
    peak,
    release,
    synchronize,
)
from peft import PeftModel
from static_steps import StaticSteps, Times
from trace_report import musts, show_musts, table
from traces import Trace, count_tokens, read_traces, stretch, synthetic
from transformers import Cache, DynamicCache
from transformers.generation.stopping_criteria import StoppingCriteriaList

from lora_shared_cache import SharedLoRACache, detach
from lora_shared_cache.cuda_graph import CudaGraph

EXAMPLES = Path(__file__).resolve().parents[1]
PEERS = ("non_shared", "fully_shared")
POLICIES = ("base_shared", "base_lr_shared", "lr_precomputed")
VARIANTS = (*PEERS, *POLICIES)
MODES = ("eager", "captured", "growing")
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
# Rank, and what has a LoRA. The first is the one of the paper.
ADAPTERS = {"r8-qv": (8, "qv"), "r16-qkvo": (16, "attention")}
SMOLLM2 = "smollm2-135m"
# What the verdicts need comes first.
ORDER = [
    ("eager", "fully_shared"), ("captured", "lr_precomputed"), ("eager", "non_shared"), ("captured", "base_lr_shared"),
    ("captured", "fully_shared"), ("captured", "non_shared"), ("eager", "lr_precomputed"), ("captured", "base_shared"),
    ("growing", "lr_precomputed"), ("eager", "base_lr_shared"), ("eager", "base_shared"), ("growing", "base_lr_shared"),
    ("growing", "base_shared"),
]  # fmt: skip
# Tokens of a turn in a replay that only warms up: a captured step runs once and is captured once.
WARM_TOKENS = {"eager": 2, "captured": 4, "growing": 4}
# Replays until a cache has captured what it captures: a pass of few tokens has its graph the fourth time it comes.
WARM_REPLAYS = 4


# ---- one turn ------------------------------------------------------------------------------------------------------


class Runner(Protocol):
    """Caches of the agents, and how a turn is taken with them."""

    def take_turn(self, role: str, text: torch.Tensor, tokens: int) -> tuple[torch.Tensor, Times]:
        """Let an agent write ``tokens`` tokens after ``text`` (1, n); the whole text, and the times."""

    def rewind(self) -> None:
        """Forget the text and keep what is captured."""

    def bytes_in_use(self) -> tuple[int, int]:
        """Bytes of the caches: of what they hold, and with their slack."""


class Generate:
    """``model.generate`` with one cache for all agents, or one for each; ``now`` is the clock, in seconds."""

    def __init__(
        self,
        model: PeftModel,
        make: Callable[[], Cache],
        one_for_all: bool,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.model, self.make, self.one_for_all, self.now = model, make, one_for_all, now
        self.caches: dict[str, Cache] = {}

    def cache_of(self, role: str) -> Cache:
        name = "all" if self.one_for_all else role
        if name not in self.caches:
            self.caches[name] = self.make()
        return self.caches[name]

    def take_turn(self, role: str, text: torch.Tensor, tokens: int) -> tuple[torch.Tensor, Times]:
        cache = self.cache_of(role)
        clock = Clock(text.device, (1,), {}, self.now)
        self.model.set_adapter(role)
        switched = self.now() - clock.start
        out = self.model.generate(
            input_ids=text, attention_mask=torch.ones_like(text), past_key_values=cache, max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=False, pad_token_id=0, stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        synchronize(text.device)
        return out, Times(switched, clock.seconds[1], self.now() - clock.start)

    def rewind(self) -> None:
        # All but one token: an empty cache would give back its storage, and with it the graphs.
        for cache in self.caches.values():
            assert isinstance(cache, SharedLoRACache)
            cache.crop(1 - cache.trajectory_length)

    def bytes_in_use(self) -> tuple[int, int]:
        both = [_cache_bytes(cache) for cache in self.caches.values()]
        return sum(used for used, _ in both), sum(whole for _, whole in both)


def _cache_bytes(cache: Cache) -> tuple[int, int]:
    if isinstance(cache, SharedLoRACache):
        footprint = cache.memory_footprint()
        return footprint["total"], footprint["allocated"]
    whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
    return whole, whole


def make_runner(
    model: PeftModel, variant: str, mode: str, room: int, now: Callable[[], float] = time.perf_counter
) -> Runner:
    """The caches of a variant, empty. ``room``: tokens that storage allocated at once must hold."""
    if variant in POLICIES:

        def make() -> Cache:
            return SharedLoRACache(
                model, sharing=variant, cuda_graphs=mode != "eager", max_cache_len=room if mode == "captured" else None
            )  # type: ignore[arg-type]

        return Generate(model, make, True, now)
    if mode == "growing":
        raise ValueError(f"{variant} is not captured with growing storage")
    if mode == "captured":
        return StaticSteps(model, room, one_for_all=variant == "fully_shared")
    return Generate(model, lambda: DynamicCache(config=model.config), variant == "fully_shared", now)


def replay(runner: Runner, trace: Trace, pieces: Sequence[torch.Tensor], most: int | None = None) -> list[Times]:
    """Take all turns of a trace.

    Args:
        runner: the caches.
        trace: who takes which turn.
        pieces: (1, new_input) token ids that each turn is given.
        most: tokens that a turn writes at most, to warm up; None: as many as the trace says.
    """
    text, times = pieces[0][:, :0], []
    for turn, piece in zip(trace.turns, pieces, strict=True):
        text = torch.cat((text, piece), dim=1)
        text, seconds = runner.take_turn(turn.role, text, min(turn.generated, most or turn.generated))
        times.append(seconds)
    return times


# ---- what is replayed, with which models ---------------------------------------------------------------------------


def random_pieces(trace: Trace, vocabulary: int, device: torch.device) -> list[torch.Tensor]:
    """Random ids for what each turn is given; the same ones for every variant. No token 0, which stands for padding."""
    generator = torch.Generator().manual_seed(1)
    new = [turn.new_input for turn in trace.turns]
    ids = torch.randint(1, vocabulary, (1, sum(new)), generator=generator).to(device)
    return list(ids.split(new, dim=1))


def library_pieces(trace: Trace, tokenizer: Any) -> list[torch.Tensor]:
    """Text of the demo's library, over and over, cut to what each turn is given; cues are words."""
    text = (EXAMPLES / "demo_library" / "articles.md").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    cue = tokenizer("Action:", add_special_tokens=False)["input_ids"]
    pieces, at = [], 0
    for turn in trace.turns:
        tail = cue if turn.new_input >= len(cue) else []
        body = [ids[(at + i) % len(ids)] for i in range(turn.new_input - len(tail))]
        at += len(body)
        pieces.append(torch.tensor([body + tail], dtype=torch.long))
    return pieces


def share_a(model: PeftModel, roles: Sequence[str]) -> None:
    """Give all adapters the A of the first on k_proj and v_proj: every policy can run with them, and none gets faster by it."""
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.endswith(("k_proj", "v_proj")) and hasattr(module, "lora_A"):
                for role in roles[1:]:
                    module.lora_A[role].weight.copy_(module.lora_A[roles[0]].weight)


def load_smollm2_agents(roles: Sequence[str]) -> tuple[Callable[[str], PeftModel], Any]:
    """The model that a variant runs with, ``shared_a`` for base_lr_shared and ``separate`` for all others; and the tokenizer."""
    sys.path.insert(0, str(EXAMPLES))
    from smollm2 import load_smollm2

    models = {}
    for folder in ("separate", "shared_a"):
        if missing := [role for role in roles if not (EXAMPLES / "adapters" / folder / role).is_dir()]:
            raise SystemExit(f"there is no adapter {', '.join(missing)} in examples/adapters/{folder}")
        base, tokenizer = load_smollm2(torch.float32)
        models[folder] = PeftModel.from_pretrained(
            base, EXAMPLES / "adapters" / folder / roles[0], adapter_name=roles[0]
        )
        for role in roles[1:]:
            models[folder].load_adapter(EXAMPLES / "adapters" / folder / role, adapter_name=role)
        models[folder].to(torch.float32).eval()
    return lambda variant: models["shared_a" if variant == "base_lr_shared" else "separate"], tokenizer


# ---- one cell of the table -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What one row is about."""

    model: str
    adapters: str
    total: int
    mode: str
    variant: str


@dataclass
class Setting:
    """What the cells of one model, kind of adapters and length have in common.

    Attributes:
        model_of: the model that a variant runs with.
        weights: bytes on the device before any cache.
        now: the clock that turns are measured with.
    """

    trace: Trace
    pieces: list[torch.Tensor]
    model_of: Callable[[str], PeftModel]
    device: torch.device
    weights: int
    now: Callable[[], float] = time.perf_counter

    @property
    def room(self) -> int:
        return self.trace.total


def cache_width(config: Any) -> int:
    """Numbers of K and V per token, all layers together."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * config.num_key_value_heads * size


def predicted_low_rank(model: PeftModel, role: str) -> int:
    """Numbers of low-rank entries per token of one adapter, all layers together."""
    return sum(
        module.lora_A[role].weight.shape[0]
        for path, module in model.named_modules()
        if path.endswith(("k_proj", "v_proj")) and hasattr(module, "lora_A")
    )


def settle(device: torch.device) -> int:
    """Bytes that cuBLAS keeps for good for each stream of the process: the current one and those that graphs are captured on."""
    before = allocated(device)
    if device.type == "cuda":
        a = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
        a @ a
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            a @ a
        CudaGraph(lambda: a @ a, None, device)
        del a
        release(device)
    return allocated(device) - before


def predicted_bytes(setting: Setting, variant: str, coverage: dict[str, int]) -> dict[str, int]:
    """Bytes of K and V of the text once, and of all that the variant keeps, by the formula (no positions, no slack)."""
    model = setting.model_of(variant)
    size = next(model.parameters()).element_size()
    held = max(coverage.values())
    width = cache_width(model.config)
    one = size * width * held
    entries = {
        "non_shared": 0, "fully_shared": 0, "base_shared": sum(coverage.values()), "base_lr_shared": held,
        "lr_precomputed": held * len(coverage),
    }[variant]  # fmt: skip
    full = sum(coverage.values()) * size * width if variant == "non_shared" else one
    return dict(
        one_cache_bytes=one, predicted_bytes=full + size * entries * predicted_low_rank(model, setting.trace.roles[0])
    )


def quantile(numbers: Sequence[float], q: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(numbers)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def prepare(setting: Setting, variant: str) -> None:
    """Bring the model into the state that the variant's turns start from: PEFT alone, or attached and tried out."""
    model = setting.model_of(variant)
    # What another policy has made of the adapters' weights goes with it.
    detach(model)
    if variant in PEERS:
        return
    runner = make_runner(model, variant, "eager", 0)
    for role in setting.trace.roles:
        cache = next(iter(runner.caches.values()), None) if isinstance(runner, Generate) else None
        text = torch.full((1, 8), 5, device=setting.device)
        if isinstance(cache, SharedLoRACache):
            assert cache.token_ids is not None
            text = torch.cat((cache.token_ids, text), dim=1)
        runner.take_turn(role, text, 2)


def summarise(setting: Setting, variant: str, runs: list[list[Times]]) -> dict[str, Any]:
    """A row's times: those of the run with the median of the end-to-end times (of two, the slower)."""
    totals = [sum(turn.whole for turn in run) for run in runs]
    times = runs[sorted(range(len(runs)), key=totals.__getitem__)[len(runs) // 2]]
    trace = setting.trace
    counts, _ = count_tokens(trace, variant)
    whole, first = sum(t.whole for t in times), [t.first for t in times]
    turns = [
        dict(role=turn.role, prefilled=count.prefilled, rerun=count.rerun, generated=turn.generated,
             ttft_ms=round(1e3 * t.first, 2), turn_s=round(t.whole, 4))
        for turn, count, t in zip(trace.turns, counts, times, strict=True)
    ]  # fmt: skip
    later = trace.generated - len(trace.turns)
    return dict(
        end_to_end_s=whole, end_to_end_runs=totals, generated_tok_s=trace.generated / whole,
        trajectory_tok_s=trace.total / whole, ttft_p50_ms=1e3 * quantile(first, 0.5), ttft_p95_ms=1e3 * quantile(first, 0.95),
        first_tokens_s=sum(first), decode_ms=1e3 * (whole - sum(first)) / later if later else None,
        set_adapter_ms=1e3 * statistics.median(t.switched for t in times),
        prefilled_tokens=sum(c.prefilled for c in counts), rerun_tokens=sum(c.rerun for c in counts), turns=turns,
    )  # fmt: skip


def check_coverage(runner: Runner, variant: str, coverage: dict[str, int]) -> None:
    """What was counted is what the cache says. Looked at after the clock has stopped: it reads all adapters."""
    if isinstance(runner, Generate):
        for role, expected in coverage.items():
            cache = runner.cache_of(role)
            found = cache.coverage()[role] if isinstance(cache, SharedLoRACache) else cache.get_seq_length()
            assert found == expected, f"{variant}: {role} covers {found} tokens, expected {expected}"


class Bench:
    """Measures cells, each several times; keeps all runs of a cell, so that its row can be written after each."""

    def __init__(self) -> None:
        self.runs: dict[Cell, list[list[Times]]] = {}
        self.first_use: dict[Cell, float] = {}

    def measure(self, cell: Cell, setting: Setting) -> dict[str, Any]:
        """Run a cell once more; its row from all its runs."""
        variant, mode, device = cell.variant, cell.mode, setting.device
        trace, pieces, model = setting.trace, setting.pieces, setting.model_of(cell.variant)
        _, coverage = count_tokens(trace, variant)
        first_time = cell not in self.runs
        fresh = warming = None
        if first_time or mode == "captured":
            start = time.perf_counter()
            prepare(setting, variant)
            runner = make_runner(model, variant, mode, setting.room, setting.now)
            if device.type == "cuda" or mode == "captured":
                replay(runner, trace, pieces, WARM_TOKENS[mode])
                warming = time.perf_counter() - start
            if mode == "captured" and variant in POLICIES:
                for _ in range(WARM_REPLAYS - 1):
                    runner.rewind()
                    replay(runner, trace, pieces, WARM_TOKENS[mode])
        else:
            prepare(setting, variant)
        if mode == "captured":
            runner.rewind()
        else:
            runner = make_runner(model, variant, mode, setting.room, setting.now)
            release(device)
        peak(device, 0)
        run = replay(runner, trace, pieces)
        release(device)
        row: dict[str, Any] = dict(
            peak_bytes=peak(device, setting.weights),
            steady_bytes=allocated(device) - setting.weights if device.type == "cuda" else None,
        )
        check_coverage(runner, variant, coverage)
        used, whole = runner.bytes_in_use()
        caches = runner.caches.values() if isinstance(runner, Generate) else ()
        ours = next((cache for cache in caches if isinstance(cache, SharedLoRACache)), None)
        row["expanded_bytes"] = ours.memory_footprint()["expanded_keys"] if ours else 0
        row["eager_reason"] = ours.eager_reason if ours else None
        row |= dict(cache_bytes=used, allocated_bytes=whole, **predicted_bytes(setting, variant, coverage))
        del runner, caches, ours
        release(device)
        if mode == "captured" and variant in POLICIES and first_time:
            fresh = sum(
                t.whole for t in replay(make_runner(model, variant, mode, setting.room, setting.now), trace, pieces)
            )
        self.runs.setdefault(cell, []).append(run)
        row |= summarise(setting, variant, self.runs[cell])
        if warming is not None and first_time:
            later = (row["decode_ms"] or 0) / 1e3
            warm = sum(
                t.first + later * (min(turn.generated, WARM_TOKENS[mode]) - 1)
                for turn, t in zip(trace.turns, run, strict=True)
            )
            self.first_use[cell] = max(0.0, warming - warm)
        return row | dict(first_use_s=self.first_use.get(cell), fresh_s=fresh)


# ---- all of them ---------------------------------------------------------------------------------------------------


class Report:
    """Prints each row and keeps all of them in a file, so that a run that is cut short keeps what it has measured."""

    def __init__(self, out: Path | None, common: dict[str, Any]):
        self.out, self.common = out, common
        self.rows: dict[Cell, dict[str, Any]] = {}

    def add(self, cell: Cell, row: dict[str, Any], last: bool) -> None:
        before = self.rows.get(cell, {})
        if row.get("fresh_s") is None and before.get("fresh_s") is not None:
            row["fresh_s"] = before["fresh_s"]
        self.rows[cell] = asdict(cell) | row | self.common
        if last:
            print(table([self.rows[cell]], head=False), flush=True)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(list(self.rows.values()), indent=1) + "\n")


def wanted_cells(model: str, adapters: str, total: int, arguments: argparse.Namespace) -> list[Cell]:
    return [
        Cell(model, adapters, total, mode, variant)
        for mode, variant in ORDER
        if mode in arguments.modes and variant in arguments.variants
    ]


def run_cells(cells: Sequence[Cell], setting: Setting, report: Report, arguments: argparse.Namespace) -> bool:
    """Measure cells, each ``--repeats`` times in turn, as long as there is time; whether all went well."""
    bench, broken, left_out = Bench(), set(), set()
    for repeat in range(arguments.repeats):
        for cell in cells:
            if time.perf_counter() - arguments.start > arguments.time_budget:
                left_out.add(cell)
            if cell in broken or cell in left_out:
                continue
            start = time.perf_counter()
            try:
                row = bench.measure(cell, setting)
                report.add(cell, row | dict(row_s=time.perf_counter() - start), last=repeat == arguments.repeats - 1)
            except Exception as error:
                traceback.print_exc()
                text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                report.add(cell, dict(error=text), last=True)
                broken.add(cell)
            release(setting.device)
    for cell in left_out:
        times = "" if cell not in bench.runs else f" after {len(bench.runs[cell])} of {arguments.repeats} repeats"
        print(f"left out{times}, --time-budget is spent: {cell}", flush=True)
    return not broken


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--trace", type=Path, help="a trace file")
    source.add_argument("--synthetic", type=int, default=4, metavar="STEPS", help="a made-up trace (default: 4 steps)")
    parser.add_argument("--episode", help="episode_id of the trace file; default: its first")
    parser.add_argument("--seed", type=int, default=3, help="of the synthetic trace")
    parser.add_argument(
        "--totals", type=int, nargs="+", default=[16384, 4096, 1024, 65536], help="in this order; 0: as it is"
    )
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-8b", "ministral-8b"])
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=["r8-qv", "r16-qkvo"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--repeats", type=int, default=1, help="of everything, in turn")
    parser.add_argument("--time-budget", type=float, default=math.inf, help="seconds after which no run is started")
    parser.add_argument("--cpu", action="store_true", help="SmolLM2-135M with its real adapters in float32, eager")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="process: CPU seconds of this process, for a CPU that others use; with --threads 1",
    )
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error("--repeats must be 1 or more")
    if arguments.clock == "process" and (arguments.device != "cpu" and not arguments.cpu or arguments.threads != 1):
        parser.error("--clock process needs a CPU and --threads 1")
    if arguments.episode and not arguments.trace:
        parser.error("--episode needs --trace")
    if arguments.cpu:
        arguments.models, arguments.adapters, arguments.device, arguments.dtype = (
            [SMOLLM2],
            ["r8-qkvo"],
            "cpu",
            "float32",
        )
    if arguments.cpu or arguments.device == "cpu":
        arguments.modes = [mode for mode in arguments.modes if mode == "eager"] or parser.error(
            "a CPU runs --modes eager only"
        )
    return arguments


def read_trace(arguments: argparse.Namespace) -> Trace:
    if not arguments.trace:
        return synthetic(arguments.synthetic, arguments.seed)
    traces = read_traces(arguments.trace)
    name = arguments.episode or next(iter(traces))
    if name not in traces:
        raise SystemExit(f"{arguments.trace} has no episode {name!r}; it has {', '.join(list(traces)[:5])} ...")
    return traces[name]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    arguments.start = time.perf_counter()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    trace = read_trace(arguments)
    lengths = [trace if total == 0 else stretch(trace, total) for total in arguments.totals]
    # The fields about one model and one rank are each row's own here.
    arguments.shape = arguments.rank = arguments.tokens = None
    arguments.adapter_dtype = arguments.dtype
    own = ("shape", "rank", "adapters", "adapter_dtype", "new_tokens")
    common = {name: value for name, value in about(arguments, device).items() if name not in own}
    common |= dict(
        cpu=platform.processor() or platform.machine(), threads=torch.get_num_threads(), clock=arguments.clock, trace=trace.name,
        workspace_bytes=settle(device), generated=trace.generated, switches=trace.switches,
        adapters_loaded=len(trace.roles), repeats=arguments.repeats,
    )  # fmt: skip
    report = Report(arguments.out, common)
    print(" ".join(f"{name}={value}" for name, value in common.items()))
    print(f"{len(trace.turns)} turns, {trace.switches} switches, {trace.generated} generated tokens\n")
    print(table([], head=True), flush=True)
    well = True
    for name in arguments.models:
        start = time.perf_counter()
        if arguments.cpu:
            model_of, tokenizer = load_smollm2_agents(trace.roles)
        else:
            base = build_base(name, dtype, device)
        print(f"{name}: built in {time.perf_counter() - start:.1f} s", flush=True)
        for stretched in lengths:
            for adapters in arguments.adapters:
                if arguments.cpu:
                    pieces = library_pieces(stretched, tokenizer)
                else:
                    rank, targets = ADAPTERS[adapters]
                    model = add_adapters(base, trace.roles, targets, rank, dtype)
                    share_a(model, trace.roles)
                    model_of = lambda variant, model=model: model  # noqa: E731
                    pieces = random_pieces(stretched, base.config.vocab_size, device)
                release(device)
                setting = Setting(stretched, pieces, model_of, device, allocated(device), CLOCKS[arguments.clock])
                cells = wanted_cells(name, adapters, stretched.total, arguments)
                well = run_cells(cells, setting, report, arguments) and well
                if not arguments.cpu:
                    detach(model)
                    base = model.unload()
                    del model, setting, model_of
        if not arguments.cpu:
            del base
        release(device)
    print("\n" + show_musts(musts(list(report.rows.values()))))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
