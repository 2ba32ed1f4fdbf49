"""Time of a greedy decode step in ``model.generate``: PEFT's caches beside ``SharedLoRACache``, eager and captured.

A model's shape (Llama-3.1-8B's) with random weights in bfloat16 and three LoRA adapters whose A and B are random; nothing is
downloaded.
Each variant fills one context after the other in chunks, is measured there, and is cropped back to go on:

- ``peft_dynamic_eager``: PEFT with ``DynamicCache``.
- ``ours_eager``, ``ours_captured``, ``ours_captured_growing``: ``SharedLoRACache(sharing="lr_precomputed")`` without CUDA
  graphs, with them and room for the context (``max_cache_len``), with them and growing storage.
- ``base_captured``: the model without adapters, captured; what no LoRA at all would take.
- ``peft_static_compile``: PEFT with ``StaticCache``, which ``generate`` compiles by itself (at ``--compile-contexts`` only).

``ms`` is the time from the second token of a call to its last, without a synchronisation of ours in between, median of
``--repeats`` calls. ``limit_ms`` is what must be read for a token (all weights but the embedding table, the active adapter,
the cache of the active agent) over the copy bandwidth measured here. On a CPU everything runs eagerly: a check, no result.

    PYTHONPATH=.:kernels python examples/benchmarks/decode_step.py --out docs/benchmarks
    PYTHONPATH=.:kernels python examples/benchmarks/decode_step.py --shape tiny --contexts 24 40

Fields of a row of ``decode_step.json`` that do not speak for themselves (times in s or ms, memory in bytes):
``first_call_s``: the first call at this context, whole (compiling and capturing); ``first_token_s``, ``second_token_s``: the
call after the first switch to another adapter; ``turn_ms``, ``switched_turn_ms``: a call until its first token, without and
with a switch before it; ``set_adapter_ms``: PEFT's part of a switch; ``step_host_ms``: the host's time in ``model(token)``;
``switch_ms``: how much longer the host is at it in the first step after a switch; ``eager_reason``: why a captured variant's
last measured step was not replayed; ``tokens_equal``: as ``ours_eager``; ``tokens_as_peft``: leading tokens equal to those of
``peft_dynamic_eager``; ``peak_*``: beyond the weights.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
)
from transformers.generation.stopping_criteria import StoppingCriteriaList

from lora_shared_cache import SharedLoRACache, detach

ADAPTERS = ("plan", "act", "reflect")
TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, initializer_range=0.02,
    ),
    # Without the window of 32k tokens that its published config has.
    "ministral-8b": dict(
        model_type="mistral", vocab_size=131072, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, initializer_range=0.02, sliding_window=None,
    ),
    # Weights large enough that the context shows in the tokens.
    "tiny": dict(
        vocab_size=499, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.2,
    ),
}  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CHUNK = 8192
FIRST_CALL = 8  # tokens: a captured step runs once, is captured once and is replayed from then on
SWITCHES = 3
STEPS = 4  # direct steps after a switch
PROFILED = 3


@dataclass(frozen=True)
class Variant:
    """One way to decode.

    Attributes:
        make: a cache for (model, room in tokens).
        fixed: the cache has room for one context, so each context gets a new one.
        adapter: whether an adapter is active.
    """

    make: Callable[[PeftModel, int], Cache]
    fixed: bool = False
    adapter: bool = True

    @property
    def agent(self) -> str | None:
        return ADAPTERS[0] if self.adapter else None


def ours(model: PeftModel, cuda_graphs: bool = True, **settings: Any) -> SharedLoRACache:
    return SharedLoRACache(model, cuda_graphs=cuda_graphs, **{"sharing": "lr_precomputed", **settings})


COMPILED = "peft_static_compile"
VARIANTS = {
    "peft_dynamic_eager": Variant(lambda model, room: DynamicCache(config=model.config)),
    "ours_eager": Variant(lambda model, room: ours(model, cuda_graphs=False)),
    "ours_captured": Variant(lambda model, room: ours(model, max_cache_len=room), fixed=True),
    "ours_captured_growing": Variant(lambda model, room: ours(model)),
    # The base model as the only agent keeps no low-rank entries under this policy.
    "base_captured": Variant(
        lambda model, room: ours(model, sharing="base_shared", max_cache_len=room), fixed=True, adapter=False
    ),
    COMPILED: Variant(lambda model, room: StaticCache(config=model.config, max_cache_len=room), fixed=True),
}


# ---- the model -----------------------------------------------------------------------------------------------------


def build_base(shape: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The shape with random weights, made on the device."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{
        "model_type": "llama", "max_position_embeddings": 1 << 18,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": 0, "tie_word_embeddings": False, **SHAPES[shape],
    })  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def add_adapters(
    base: PreTrainedModel, names: Sequence[str], targets: str, rank: int, adapter_dtype: torch.dtype
) -> PeftModel:
    """Adapters with random A and B, of which the first is active."""
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS[targets], task_type="CAUSAL_LM")
    with torch.device(base.device):
        # As floats PEFT would widen bfloat16 adapters to float32, unless told not to.
        model = get_peft_model(base, lora, adapter_name=names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            model.add_adapter(name, lora, autocast_adapter_dtype=False)
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            parameter.data = parameter.data.to(adapter_dtype)
        if "lora_B" in path:
            torch.nn.init.normal_(parameter, std=0.3 / rank**0.5)
    return model.eval()


def weight_bytes(model: PeftModel, agent: str | None) -> int:
    """Bytes of weights that a token reads: all but the embedding table and the adapters that are not active."""
    return sum(
        parameter.nbytes
        for path, parameter in model.named_parameters()
        if "embed_tokens" not in path and ("lora_" not in path or f".{agent}." in path)
    )


def cache_bytes(cache: Cache, agent: str | None, context: int) -> tuple[int, int]:
    """Bytes that the cache takes, and those of them that a token of ``agent`` reads."""
    if isinstance(cache, SharedLoRACache):
        footprint = cache.memory_footprint()
        return footprint["total"], footprint["base"] + footprint["low_rank"].get(agent or "", 0)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.nbytes for t in tensors), sum(t.nbytes // t.shape[-2] * context for t in tensors)


def copy_bandwidth(device: torch.device) -> float:
    """Measured copy bandwidth in bytes per second, read and written."""
    source = torch.ones(1 << (29 if device.type == "cuda" else 24), dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds[2:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def release(device: torch.device) -> None:
    """Give back the memory of what is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak(device: torch.device, weights: int) -> int | None:
    """Peak memory beyond ``weights`` since the last call; None on a CPU."""
    if device.type != "cuda":
        return None
    most = torch.cuda.max_memory_allocated(device) - weights
    torch.cuda.reset_peak_memory_stats(device)
    return most


# ---- one context ---------------------------------------------------------------------------------------------------


class Clock(StoppingCriteria):
    """Notes the time when chosen tokens of a call of ``generate`` are there; it never stops, and waits only for those."""

    def __init__(
        self,
        device: torch.device,
        tokens: tuple[int, ...],
        actions: dict[int, Callable[[], Any]],
        now: Callable[[], float] = time.perf_counter,
    ):
        self.device, self.tokens, self.actions, self.now = device, tokens, actions, now
        self.seconds: dict[int, float] = {}
        self.count = 0
        self.go_on = torch.zeros(1, dtype=torch.bool, device=device)
        synchronize(device)
        self.start = now()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.count += 1
        if self.count in self.tokens or self.count in self.actions:
            synchronize(self.device)
            self.seconds[self.count] = self.now() - self.start
            self.actions.get(self.count, lambda: None)()
        return self.go_on


@dataclass
class Run:
    """A variant's cache and how much of the text it holds.

    Attributes:
        text: (1, longest context) token ids.
        stops: contexts at which the text is cut into chunks, so that every cache is filled with the very same products.
        held: tokens of it in the cache.
    """

    model: PeftModel
    cache: Cache
    text: torch.Tensor
    stops: tuple[int, ...] = ()
    held: int = 0

    @torch.no_grad()
    def fill(self, tokens: int) -> None:
        """Run the text up to ``tokens`` in chunks."""
        for stop in (*(s for s in self.stops if self.held < s < tokens), tokens):
            for start in range(self.held, stop, CHUNK):
                chunk = self.text[:, start : min(start + CHUNK, stop)]
                self.model(input_ids=chunk, past_key_values=self.cache, logits_to_keep=1)
            self.held = stop
        synchronize(self.text.device)

    def rewind(self) -> None:
        """Take back what was generated."""
        if isinstance(self.cache, SharedLoRACache):
            self.cache.crop(self.held - self.cache.trajectory_length)
        elif isinstance(self.cache, StaticCache):
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.held)
        elif (extra := self.cache.get_seq_length() - self.held) > 0:
            self.cache.crop(-extra)

    def generate(
        self, new: int, tokens: tuple[int, ...], actions: dict[int, Callable[[], Any]] | None = None
    ) -> tuple[list[int], dict[int, float]]:
        """Generate ``new`` tokens after the text's first ``held + 1`` and rewind.

        Returns:
            The tokens, and the seconds from the call to each of ``tokens`` (1: the first).
        """
        prompt = self.text[:, : self.held + 1]
        clock = Clock(prompt.device, tokens, actions or {})
        out = self.model.generate(
            input_ids=prompt, past_key_values=self.cache, max_new_tokens=new, do_sample=False, pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        found = out[0, prompt.shape[1] :].tolist()
        self.rewind()
        assert len(found) == new, f"{len(found)} tokens instead of {new}"
        return found, clock.seconds

    def set_adapter(self, name: str) -> float:
        """Switch; returns the seconds that PEFT took."""
        start = time.perf_counter()
        self.model.set_adapter(name)
        return time.perf_counter() - start

    @torch.no_grad()
    def host_steps(self) -> list[float]:
        """The host's seconds in each of ``STEPS`` direct calls of the model with one token."""
        seconds = []
        for _ in range(STEPS):
            synchronize(self.text.device)
            start = time.perf_counter()
            self.model(input_ids=self.text[:, :1], past_key_values=self.cache)
            seconds.append(time.perf_counter() - start)
        synchronize(self.text.device)
        self.rewind()
        return seconds


def measure_steps(run: Run, new: int, repeats: int) -> dict[str, Any]:
    """Milliseconds per token, and the tokens."""
    _, first = run.generate(FIRST_CALL, (FIRST_CALL,))
    runs = [run.generate(new, (1, 2, new)) for _ in range(repeats)]
    ms = [1e3 * (seconds[new] - seconds[2]) / (new - 2) for _, seconds in runs]
    return dict(
        ms=statistics.median(ms), ms_runs=ms, first_call_s=first[FIRST_CALL],
        turn_ms=1e3 * statistics.median(seconds[1] for _, seconds in runs),
        tokens=runs[0][0], repeats_equal=all(found == runs[0][0] for found, _ in runs),
    )  # fmt: skip


def measure_switches(run: Run) -> dict[str, float]:
    """The first switch to another adapter, and later ones between two that have both run."""
    run.set_adapter(ADAPTERS[1])
    _, first = run.generate(FIRST_CALL, (1, 2))
    run.host_steps()
    run.set_adapter(ADAPTERS[0])
    run.host_steps()
    peft_s, turns, after_switch, normal = [], [], [], []
    for _ in range(SWITCHES):
        peft_s.append(run.set_adapter(ADAPTERS[1]))
        turns.append(run.generate(2, (1,))[1][1])
        peft_s.append(run.set_adapter(ADAPTERS[0]))
        switched, *others = run.host_steps()
        after_switch.append(switched)
        normal += others
    step = statistics.median(normal)
    return dict(
        first_token_s=first[1], second_token_s=first[2] - first[1], set_adapter_ms=1e3 * statistics.median(peft_s),
        switched_turn_ms=1e3 * statistics.median(turns), step_host_ms=1e3 * step,
        switch_ms=1e3 * (statistics.median(after_switch) - step),
    )  # fmt: skip


def profile_steps(run: Run) -> dict[str, Any]:
    """Device time of decode steps inside ``generate``, by kernel (on a CPU by operator), per token."""
    on_cuda = run.text.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU
    profiler = torch.profiler.profile(activities=[activity])
    _, seconds = run.generate(5 + PROFILED, (), {4: profiler.start, 4 + PROFILED: profiler.stop})
    kind = torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU
    kernels = []
    for event in profiler.key_averages():
        us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if event.device_type == kind and us:
            kernels.append(dict(name=event.key, us=us / PROFILED, count=event.count / PROFILED))
    kernels.sort(key=lambda kernel: -kernel["us"])
    return dict(
        us=sum(kernel["us"] for kernel in kernels), launches=sum(kernel["count"] for kernel in kernels),
        kernels=kernels[:25],
    )  # fmt: skip


# ---- all of them ---------------------------------------------------------------------------------------------------


def about(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What every row says about where it comes from."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return dict(
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "none", torch=torch.__version__,
        triton=triton_version, transformers=transformers.__version__, peft=peft.__version__,
        date=datetime.date.today().isoformat(), commit=commit or "none", shape=arguments.shape, dtype=arguments.dtype,
        adapter_dtype=arguments.adapter_dtype, rank=arguments.rank, adapters=len(ADAPTERS), new_tokens=arguments.tokens,
    )  # fmt: skip


def head() -> str:
    return (
        f"{'targets':<10}{'context':>8}  {'variant':<22}{'ms/token':>9}{'x PEFT':>7}{'limit':>7}{'prefill':>9}{'first':>7}"
        f"{'switch':>8}{'set_ad.':>8}{'cache':>7}{'peak':>7}  tokens\n"
        f"{'':<10}{'':>8}  {'':<22}{'':>9}{'':>7}{'ms':>7}{'tok/s':>9}{'s':>7}{'ms':>8}{'ms':>8}{'GB':>7}{'GB':>7}"
    )


def show(row: dict[str, Any]) -> str:
    line = f"{row['targets']:<10}{row['context']:>8}  {row['variant']:<22}"
    if "error" in row:
        return f"{line}{row['error']}"

    def number(name: str, width: int, digits: int, scale: float = 1.0) -> str:
        value = row.get(name)
        return f"{'-':>{width}}" if value is None else f"{value * scale:>{width}.{digits}f}"

    equal = {None: "", True: "as eager", False: "NOT AS EAGER"}[row.get("tokens_equal")]
    return (
        line + number("ms", 9, 2) + number("speed_vs_peft", 7, 2) + number("limit_ms", 7, 2)
        + number("prefill_tok_s", 9, 0) + number("first_call_s", 7, 2) + number("switch_ms", 8, 2)
        + number("set_adapter_ms", 8, 2) + number("cache_bytes", 7, 2, 1e-9) + number("peak_decode_bytes", 7, 2, 1e-9)
        + f"  {equal}" + ("" if row["repeats_equal"] else "  REPEATS DIFFER")
        + ("  not captured" if "captured" in row["variant"] and row.get("eager_reason") else "")
    )  # fmt: skip


class Report:
    """Prints each row and keeps all of them in files, so that a run that is cut short keeps what it has measured."""

    def __init__(self, out: Path | None, common: dict[str, Any]):
        self.out, self.common = out, common
        self.rows: list[dict[str, Any]] = []
        self.profiles: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row | self.common)
        print(show(row), flush=True)
        self._write("decode_step.json", self.rows)

    def add_profile(self, profile: dict[str, Any]) -> None:
        self.profiles.append(profile | self.common)
        print(f"  per token: {profile['us']:.0f} us on the device in {profile['launches']:.0f} launches")
        for kernel in profile["kernels"]:
            print(f"  {kernel['us']:>9.1f} us {kernel['count']:>7.1f} x  {kernel['name'][:110]}", flush=True)
        self._write("decode_step_profile.json", self.profiles)

    def tokens_of(self, variant: str, targets: str, context: int) -> tuple[list[int], float] | None:
        for row in self.rows:
            if (row["variant"], row["targets"], row["context"]) == (variant, targets, context) and "tokens" in row:
                return row["tokens"], row["ms"]
        return None

    def _write(self, name: str, content: Any) -> None:
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / name).write_text(json.dumps(content, indent=1) + "\n")


def compare(row: dict[str, Any], report: Report) -> dict[str, Any]:
    """The row beside those of PEFT and of ``ours_eager`` with the same adapter."""
    fields: dict[str, Any] = dict(tokens_equal=None, tokens_as_peft=None, speed_vs_peft=None)
    if found := report.tokens_of("peft_dynamic_eager", row["targets"], row["context"]):
        fields["speed_vs_peft"] = found[1] / row["ms"]
        if VARIANTS[row["variant"]].adapter:
            same = [a == b for a, b in zip(row["tokens"], found[0], strict=True)]
            fields["tokens_as_peft"] = (same + [False]).index(False)
    found = report.tokens_of("ours_eager", row["targets"], row["context"])
    if found and row["variant"].startswith("ours_captured"):
        fields["tokens_equal"] = row["tokens"] == found[0]
    return fields


def measure(run: Run, name: str, context: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: prefill, steps, and (not where it would compile anew) switches."""
    device, variant = run.text.device, VARIANTS[name]
    before, start = run.held, time.perf_counter()
    run.fill(context - 1)
    row: dict[str, Any] = dict(prefill_s=time.perf_counter() - start, prefill_tokens=context - 1 - before)
    row["prefill_tok_s"] = row["prefill_tokens"] / row["prefill_s"]
    row["peak_prefill_bytes"] = peak(device, arguments.weights)
    row |= measure_steps(run, arguments.tokens, arguments.repeats)
    row["eager_reason"] = getattr(run.cache, "eager_reason", None)
    row["cache_bytes"], read = cache_bytes(run.cache, variant.agent, context)
    row["limit_ms"] = 1e3 * (weight_bytes(run.model, variant.agent) + read) / arguments.copy
    row["peak_decode_bytes"] = peak(device, arguments.weights)
    if variant.adapter and name != COMPILED:
        row |= measure_switches(run)
    return row


def run_variant(
    model: PeftModel, name: str, targets: str, text: torch.Tensor, arguments: argparse.Namespace, report: Report
) -> bool:
    """All contexts of a variant, short ones first; whether all went well."""
    variant, run, well = VARIANTS[name], None, True
    contexts = arguments.compile_contexts if name == COMPILED else arguments.contexts
    model.set_adapter(ADAPTERS[0])
    with nullcontext() if variant.adapter else model.disable_adapter():
        for context in sorted(contexts):
            row: dict[str, Any] = dict(variant=name, targets=targets, context=context)
            start = time.perf_counter()
            try:
                if run is None or variant.fixed:
                    run = None
                    release(text.device)
                    peak(text.device, arguments.weights)
                    # A call's last token is not run; the direct steps come to fewer.
                    room = context + max(arguments.tokens, FIRST_CALL, 5 + PROFILED)
                    stops = tuple(c - 1 for c in sorted(arguments.contexts))
                    run = Run(model, variant.make(model, room), text, stops)
                row |= measure(run, name, context, arguments)
                row |= compare(row, report)
                row["row_s"] = time.perf_counter() - start
                report.add(row)
                if arguments.profile and "captured" in name:
                    report.add_profile(dict(variant=name, targets=targets, context=context, **profile_steps(run)))
            except Exception as error:
                traceback.print_exc()
                text_of_error = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                report.add(dict(variant=name, targets=targets, context=context, error=text_of_error))
                run, well = None, False
                if variant.adapter:
                    model.set_adapter(ADAPTERS[0])
    # The next variant may be PEFT alone.
    detach(model)
    if name == COMPILED:
        torch.compiler.reset()
    del run
    release(text.device)
    return well


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 16384, 32768, 65536, 131072])
    parser.add_argument("--compile-contexts", type=int, nargs="*", default=[16384], help=f"contexts of {COMPILED}")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["attention"], help="what has a LoRA, in turn")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, for tiny float32")
    parser.add_argument("--adapter-dtype", choices=DTYPES, help="default: --dtype (PEFT's own default is float32)")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a measured call, at least 3")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help=f"{PROFILED} steps of each captured variant by kernel")
    parser.add_argument("--out", type=Path, help="folder for decode_step.json")
    arguments = parser.parse_args(argv)
    if arguments.tokens < 3 or min(*arguments.contexts, *arguments.compile_contexts, 1 << 18) < 2:
        parser.error("--tokens must be 3 or more, contexts 2 or more")
    arguments.dtype = arguments.dtype or ("float32" if arguments.shape == "tiny" else "bfloat16")
    arguments.adapter_dtype = arguments.adapter_dtype or arguments.dtype
    device = torch.device(arguments.device)
    if arguments.profile and device.type == "cuda":
        # Else CUPTI, once torn down, does not get along with graphs that were captured before (pytorch/pytorch#75504).
        os.environ.setdefault("TEARDOWN_CUPTI", "0")
        os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    arguments.copy = copy_bandwidth(device)
    report = Report(arguments.out, about(arguments, device) | dict(copy_tb_s=arguments.copy / 1e12))
    print(" ".join(f"{name}={value}" for name, value in report.common.items()))
    # No token 0: generate would take it for padding.
    longest = max(*arguments.contexts, *arguments.compile_contexts, 2)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, SHAPES[arguments.shape]["vocab_size"], (1, longest), generator=generator).to(device)
    well = True
    for targets in arguments.targets:
        release(device)
        before, start = allocated(device), time.perf_counter()
        base = build_base(arguments.shape, DTYPES[arguments.dtype], device)
        model = add_adapters(base, ADAPTERS, targets, arguments.rank, DTYPES[arguments.adapter_dtype])
        synchronize(device)
        arguments.weights = allocated(device)
        print(
            f"\nmodel with LoRA on {', '.join(TARGETS[targets])} in {time.perf_counter() - start:.1f} s, "
            f"{(arguments.weights - before) / 1e9:.2f} GB\n{head()}",
            flush=True,
        )
        # In the table's order: the others are compared with the first two.
        for name in [name for name in VARIANTS if name in arguments.variants]:
            well = run_variant(model, name, targets, text, arguments, report) and well
        del model, base
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
