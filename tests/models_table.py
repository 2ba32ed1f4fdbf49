"""Every causal language model of Transformers, tiny and random, through the shared cache: writes ``docs/models.md``.

    python -m tests.models_table             # about three minutes
    python -m tests.models_table phi3 gpt2   # these again
    python -m tests.models_table --gpu OUT.json  # put in what `python -m tests.test_models_cuda OUT.json` measured on a GPU

Each model type gets a config of a layer of each kind (``tiny_configs.py``) and two LoRA adapters on its projections of queries,
keys and values, and is run in float64 on a batch of two rows, one with padding on the left: a prefill, a chunk and eight
single tokens by one adapter, then the other adapter, then the first one again. Its logits are compared with PEFT and a
``DynamicCache`` for each adapter, under every policy that takes such adapters.

What is compared is exact (``docs/design.md``, section 1): the adapters have different weights and ranks on all layers, but on all
layers except the last one their products B A are equal, so base K and V do not depend on who ran a token. On the last layer they
have nothing in common, so entries of the wrong adapter show. ``tests/test_models_table.py`` holds the table against the code.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from lora_shared_cache import SharedLoRACache, UnsupportedAdapterError, UnsupportedModelError, detach

from .tiny import activate, randomise, tokens, with_adapters
from .tiny_configs import VARIANTS, tiny_config

ROOT = Path(__file__).resolve().parents[1]
JSON, PAGE = ROOT / "docs" / "benchmarks" / "models.json", ROOT / "docs" / "models.md"
# Turns: the adapter, and how many tokens it is given at a time; the first of a later turn with what it has not covered.
TURNS: list[tuple[str, list[int]]] = [("one", [8, 3, *[1] * 8]), ("two", [2, 1, 1]), ("one", [1, 2, 1])]
N = sum(sum(sizes) for _, sizes in TURNS)
PADDING = 3
RANKS = dict(one=3, two=5)
# Float64 through two to four layers, relative to the largest logit; a wrong number is larger by orders.
TOLERANCE = 1e-10
# What an adapter does to the logits at least, or the comparison would show nothing.
EFFECT = 1e-3
_LARGEST = 5_000_000


class Float64(TorchFunctionMode):
    """Norms, softmax, routers and rotations of the families go through float32; in this mode through float64."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype != torch.float32:
            if func is torch.Tensor.float:
                return args[0].double()
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


class NotRunnable(Exception):
    """There is no such model to run, or PEFT with a ``DynamicCache`` does not run it."""


def build(config: Any) -> Any:
    """A random model of a config in float64; :class:`NotRunnable` if the config makes none."""
    make = transformers.AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in make(config).parameters())
        if size > _LARGEST:
            raise NotRunnable(f"no tiny config: {size:,} parameters")
        torch.manual_seed(0)
        return randomise(make(config)).double().eval()
    except NotRunnable:
        raise
    except Exception as error:
        raise NotRunnable(f"no model: {_short(error)}") from error


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that say which layer they are and are called attention."""
    found = {path: m for path, m in model.named_modules() if isinstance(getattr(m, "layer_idx", None), int)}
    return {path: m for path, m in found.items() if "attention" in type(m).__name__.lower()}


def targets_of(model: nn.Module) -> list[str]:
    """What the adapters are put on: projections of queries, keys and values, fused ones, else whatever is linear."""
    inside = [part for layer in attention_layers(model).values() for part in layer.named_modules()]
    linear = [n for n, m in inside or model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    names = {n.rpartition(".")[2] for n in linear}
    wanted = [["q_proj", "k_proj", "v_proj"], ["query", "key", "value"], ["qkv_proj"], ["query_key_value"], ["c_attn"]]
    wanted += [["Wqkv"], ["qkv"], ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]]
    found = next((here for group in wanted if (here := [name for name in group if name in names])), None)
    return found or sorted(names - {"lm_head"})[:2]


def add_adapters(model: Any) -> Any:
    """A ``PeftModel`` with two adapters that do the same on all layers but the last; see the module's docstring."""
    configs = {
        name: LoraConfig(r=r, lora_alpha=2 * r + len(name), target_modules=targets_of(model), task_type="CAUSAL_LM")
        for name, r in RANKS.items()
    }
    last = max((m.layer_idx for m in attention_layers(model).values()), default=0)
    deep = [m for m in attention_layers(model).values() if m.layer_idx == last]
    peft_model = with_adapters(model, configs)
    deep_parts = {id(part) for m in deep for part in m.modules()}
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in peft_model.modules():
            if hasattr(module, "lora_A") and id(module) not in deep_parts and "two" in module.lora_A:
                a, b = module.lora_A, module.lora_B
                mix = torch.randn(RANKS["two"], RANKS["two"], generator=generator, dtype=torch.float64)
                down = torch.cat((a["one"].weight, a["two"].weight[RANKS["one"] :]))
                up = torch.zeros_like(b["two"].weight)
                up[:, : RANKS["one"]] = b["one"].weight * (module.scaling["one"] / module.scaling["two"])
                a["two"].weight.copy_(mix @ down)
                b["two"].weight.copy_(up @ torch.linalg.inv(mix))
    return peft_model


class Text:
    """Two rows of tokens, the second with padding on the left, and a model that reads them."""

    def __init__(self, model: Any, padded: bool = True):
        self.model = model
        self.ids, self.mask = tokens(N, rows=2), torch.ones(2, N, dtype=torch.long)
        if padded:
            self.ids[1, :PADDING], self.mask[1, :PADDING] = 0, 0
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)

    @torch.no_grad()
    def logits(self, cache: Any, start: int, stop: int, first: int) -> torch.Tensor:
        """Logits (2, stop - start, V) of these tokens, of a call that is given those from ``first`` on."""
        out = self.model(
            input_ids=self.ids[:, first:stop],
            attention_mask=self.mask[:, :stop],
            position_ids=self.positions[:, first:stop],
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits[:, start - stop :]

    def alone(self, agent: str | None, pieces: Iterable[int] = (N,)) -> torch.Tensor:
        """One agent reads all of it, with a ``DynamicCache``."""
        activate(self.model, agent)
        cache, out, start = DynamicCache(config=self.model.config), [], 0
        for size in pieces:
            out.append(self.logits(cache, start, start + size, start))
            start += size
        activate(self.model, "one")
        return torch.cat(out, dim=1)

    def in_turns(self, sharing: str) -> torch.Tensor:
        """The adapters take turns on one shared cache."""
        cache, out, start = SharedLoRACache(self.model, sharing=sharing), [], 0
        for agent, sizes in TURNS:
            activate(self.model, agent)
            for index, size in enumerate(sizes):
                # As `generate` does it: what the agent has not covered is given again.
                first = min(start, cache.get_seq_length()) if index == 0 else start
                out.append(self.logits(cache, start, start + size, first))
                start += size
        activate(self.model, "one")
        return torch.cat(out, dim=1)

    def by_turns(self, expected: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of each agent's logits those of its turns."""
        out, start = [], 0
        for agent, sizes in TURNS:
            out.append(expected[agent][:, start : start + sum(sizes)])
            start += sum(sizes)
        return torch.cat(out, dim=1)


def largest_difference(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> float:
    """Largest difference at tokens that are no padding, relative to the largest logit."""
    a, b = a[mask.bool()], b[mask.bool()]
    return float((a - b).abs().max() / b.abs().max())


def verdict(name: str) -> dict[str, Any]:
    """What becomes of a model: status "ok" with the largest error, "refused" with the message, "not runnable" with the
    reason, or "WRONG"."""
    row: dict[str, Any] = dict(model=name)
    try:
        try:
            config = tiny_config(name)
        except Exception as error:
            raise NotRunnable(f"no config: {_short(error)}") from error
        with Float64():
            return row | _verdict(build(config), row)
    except NotRunnable as reason:
        return row | dict(status="not runnable", message=str(reason))


def _verdict(model: Any, row: dict[str, Any]) -> dict[str, Any]:
    layers = attention_layers(model)
    row["attention"] = sorted({type(m).__name__ for m in layers.values()})
    try:
        text = Text(add_adapters(model))
        with torch.no_grad():
            pieces = [size for _, sizes in TURNS for size in sizes]
            expected = dict(one=text.alone("one", pieces), two=text.alone("two"))
            base = text.alone(None)
    except Exception as error:
        found = _refusal(model)
        if found is not None:
            return dict(status="refused", message=found)
        raise NotRunnable(f"PEFT with a DynamicCache: {_short(error)}") from error
    exact = text.by_turns(expected)
    effects = [(expected["one"], base), (expected["two"], base), (expected["one"], expected["two"])]
    effect = min(largest_difference(a, b, text.mask) for a, b in effects)
    errors = []
    try:
        for sharing in ("base_shared", "lr_precomputed"):
            errors.append(largest_difference(text.in_turns(sharing), exact, text.mask))
    except (UnsupportedModelError, UnsupportedAdapterError) as error:
        return dict(status="refused", message=str(error))
    except Exception as error:  # neither right nor refused by name
        return dict(status="WRONG", message=repr(error), effect=effect)
    finally:
        detach(text.model)
    right = max(errors) <= TOLERANCE and effect > EFFECT
    return dict(status="ok" if right else "WRONG", error=max(errors), effect=effect)


def _refusal(model: Any) -> str | None:
    """What a shared cache says to a model that PEFT with a ``DynamicCache`` does not run, or None: it does not refuse it."""
    try:
        with torch.no_grad():
            model(input_ids=tokens(4), past_key_values=SharedLoRACache(model))
    except (UnsupportedModelError, UnsupportedAdapterError) as error:
        return str(error)
    except Exception:
        # It fails with any cache, and is listed as not runnable, with PEFT's error.
        return None
    finally:
        detach(model)
    return None


def reason(message: str) -> str:
    """A refusal without the names of the layers and classes that it is about, and without what to do instead."""
    message = re.sub(r"^[\w.]+ \(\w+\):? |^\w+: ", "", message)
    message = re.sub(r"^[\w.]+ and [\w.]+ both", "two modules both", message)
    message = re.sub(r"\w+ has (?=eager)", "it has ", message)
    message = re.sub(r"(?<=layers) \[[\d, ]+\]", "", message)
    message = re.sub(r"^(\w+ )?(?=has (no )?attention)", "it ", message)
    return re.split(r"[.;] Use a |; use a |, so an? |, so the |\. (It|Use) ", message)[0]


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def gpu_section(gpu: dict[str, Any]) -> list[str]:
    """What ``test_models_cuda.py`` measured."""
    lines = [
        "## On a GPU",
        "",
        f"One model of each kind of attention through the Triton kernels ({gpu['device']}, Transformers",
        f"{gpu['transformers']}), head size 64, two rows with padding on the left, a prefill, a chunk, eight single tokens,",
        "adapters taking turns, every policy. Errors against PEFT and a `DynamicCache` in float32: the largest, relative to",
        "the largest logit; in bfloat16 the root mean square, beside that of PEFT in bfloat16.",
        "Written by `python -m tests.test_models_cuda`.",
        "",
        "| kind | model type | float32 | bfloat16 | PEFT in bfloat16 |",
        "|---|---|---|---|---|",
    ]
    for r in gpu["rows"]:
        low = r["bfloat16"]
        numbers = f"{r['float32']['error']:.0e} | {low['rms']:.1e} | {low['peft_rms']:.1e}"
        lines.append(f"| {r['kind']} | {r['model_type']} | {numbers} |")
    return [*lines, ""]


def page(table: dict[str, Any]) -> str:
    """The table as Markdown."""
    version, *others = sorted(table["versions"], key=_as_numbers, reverse=True)
    rows = table["versions"][version]
    of = {status: [r for r in rows if r["status"] == status] for status in ("ok", "refused", "not runnable", "WRONG")}
    reasons: dict[str, list[str]] = {}
    for row in of["refused"]:
        reasons.setdefault(row["message"], []).append(row["model"])
    steps = sum(size == 1 for size in TURNS[0][1])
    lines = [
        "# Models",
        "",
        f"Every model type of `AutoModelForCausalLM` in Transformers {version}, and some of them with other settings: a tiny",
        "random model of a layer of each kind, in float64 on the CPU, with two adapters of different ranks on the projections",
        f"of queries, keys and values. Two rows of tokens, one with padding on the left: a prefill, a chunk and {steps} decode",
        "steps by one adapter, then the other adapter, then the first one again, under `base_shared` and under",
        "`lr_precomputed`. Every logit is compared with PEFT and a `DynamicCache` for each adapter. After a switch that",
        "comparison is exact, as the adapters have equal products B A on all layers but the last one, on which they have",
        "nothing in common.",
        "",
        "Written by `python -m tests.models_table`. A model of your own: `python -m lora_shared_cache check --model ID_OR_PATH`.",
        "",
        f"{len(of['ok'])} work, {len(of['refused'])} are refused by name, {len(of['not runnable'])} can't be run here."
        + "".join(f" {len(of['WRONG'])} are WRONG." if of["WRONG"] else ""),
        "",
        "## Work",
        "",
        "| model | attention | largest error, relative to the largest logit |",
        "|---|---|---|",
        *(f"| `{r['model']}` | {', '.join(r['attention'])} | {r['error']:.0e} |" for r in of["ok"] + of["WRONG"]),
        "",
        *(gpu_section(table["gpu"]) if table.get("gpu") else []),
        "## Refused",
        "",
        "With an error that names the model or the layer, before any number. Shortened here; messages say what to do besides.",
        "",
        "| what the message says | models |",
        "|---|---|",
        *(f"| {_cell(text)} | {_names(names)} |" for text, names in reasons.items()),
        "",
        "## Not runnable",
        "",
        "Transformers makes no such model of a config alone, or does not run it with PEFT and a `DynamicCache`:",
        "",
        "| model | why |",
        "|---|---|",
        *(f"| `{r['model']}` | {_cell(r['message'])} |" for r in of["not runnable"]),
        "",
    ]
    for other in others:
        lines += _differences(version, rows, other, table["versions"][other])
    return "\n".join(lines)


def _differences(version: str, rows: list[dict[str, Any]], other: str, others: list[dict[str, Any]]) -> list[str]:
    """What is otherwise in another version."""
    here = {r["model"]: r for r in rows}
    count = {status: sum(r["status"] == status for r in others) for status in ("ok", "refused", "not runnable")}
    lines = [
        f"## Transformers {other}",
        "",
        f"{count['ok']} work, {count['refused']} are refused by name, {count['not runnable']} can't be run. Largest error:"
        f" {max(r['error'] for r in others if r['status'] == 'ok'):.0e}. Other than in {version}:",
        "",
        "| model | there |",
        "|---|---|",
    ]
    for row in others:
        now = here.get(row["model"])
        if now is None or now["status"] != row["status"]:
            what = f"works, {row['error']:.0e}" if row["status"] == "ok" else f"{row['status']}: {row['message']}"
            lines.append(f"| `{row['model']}` | {_cell(what)} |")
    absent = sorted(set(here) - {r["model"] for r in others})
    return [*lines, "", f"Not there: {_names(absent)}.", ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _as_numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def models() -> list[str]:
    """All lines of the table for the installed Transformers."""
    known = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
    return sorted([*known, *(name for name, (of, _) in VARIANTS.items() if of in known)])


def quiet() -> None:
    """Without what models of unusual configs have to say, on one core."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def main() -> None:
    """The whole table of the installed Transformers, or again the models that are named."""
    warnings.simplefilter("ignore")
    quiet()
    table: dict[str, Any] = json.loads(JSON.read_text()) if JSON.exists() else dict(versions={})
    if sys.argv[1:2] == ["--gpu"]:
        table["gpu"] = json.loads(Path(sys.argv[2]).read_text())
    else:
        version = transformers.__version__
        rows = {row["model"]: row for row in table["versions"].get(version, []) if sys.argv[1:]}
        for name in sys.argv[1:] or models():
            start = time.perf_counter()
            row = rows[name] = verdict(name)
            if row["status"] == "refused":
                row["message"] = reason(row["message"])
            print(f"{time.perf_counter() - start:.1f} s", rows[name], flush=True)
        table["versions"][version] = [rows[name] for name in sorted(rows)]
    JSON.write_text(json.dumps(table, indent=1) + "\n")
    PAGE.write_text(page(table))


if __name__ == "__main__":
    main()
