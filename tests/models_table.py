"""Every causal language model of Transformers, tiny and random, through the shared cache: writes ``docs/models.md``.

    python -m tests.models_table            # about five minutes on two cores
    python -m tests.models_table phi3 gpt2  # these again
    python -m tests.models_table --gpu OUT.json  # put in what `python -m tests.test_models_cuda OUT.json` measured on a GPU

Each model type gets a config of two layers, a LoRA on q_proj, k_proj and v_proj, and one prompt fed as a prefill, a chunk and
single tokens; the logits are compared with PEFT and a ``DynamicCache`` in float32. What the library refuses is listed with its
message. ``tests/test_models_table.py`` holds the table against the code.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from lora_shared_cache import SharedLoRACache, UnsupportedAdapterError, UnsupportedModelError, detach

from .tiny import VOCAB, difference, feed, finish, lora, tokens, with_adapters

ROOT = Path(__file__).resolve().parents[1]
JSON, PAGE = ROOT / "docs" / "benchmarks" / "models.json", ROOT / "docs" / "models.md"
N = 14
SIZES = [8, 3, 1, 1, 1]
# Float32 through two or three layers, logits of a few units; a wrong number is larger by orders.
TOLERANCE = 2e-4
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    head_dim=8, num_experts=2, num_local_experts=2, n_routed_experts=2, num_experts_per_tok=1,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, n_group=1, topk_group=1, n_shared_experts=1,
    attn_implementation="eager",
)  # fmt: skip
_LARGEST = 20_000_000
_SECONDS = 20
# Names of sizes that differ, or settings without which the shape above makes no model of the kind.
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=6),
    "gptj": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4),
    "codegen": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "bloom": dict(n_layer=2, n_head=4),
    "falcon": dict(num_kv_heads=2),
    "cohere2": dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "gemma2": dict(sliding_window=6, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]),
    "gemma3_text": dict(sliding_window=6, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]),
    "gpt_oss": dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "olmo3": dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "smollm3": dict(no_rope_layers=[1, 0], use_sliding_window=False),
    "glm4_moe": dict(use_qk_norm=True),
    "mistral": dict(sliding_window=6),
    "qwen3_next": dict(layer_types=["linear_attention", "full_attention"]),
    "falcon_h1": dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8),
}
_LATENT = dict(
    kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=2
)
LATENT = {"deepseek_v2", "deepseek_v3", "deepseek_v32", "longcat_flash", "glm4_moe_lite"}
SETTINGS |= {name: _LATENT for name in LATENT}
NO_HEAD_SIZE = LATENT | {
    "phi",
    "stablelm",
    "cohere",
    "granite",
    "granitemoe",
    "olmo2",
    "olmo3",
    "starcoder2",
    "smollm3",
    "olmo",
    "olmoe",
}


def tiny_config(model_type: str) -> Any:
    """A small config of a model type."""
    shape = {**SHAPE, **SETTINGS.get(model_type, {})}
    if model_type in NO_HEAD_SIZE:
        del shape["head_dim"]
    return CONFIG_MAPPING[model_type](**shape)


def verdict(model_type: str) -> dict[str, Any]:
    """What becomes of a model type: status "ok" with the largest error, "refused" with the message, or "not tried"."""
    row: dict[str, Any] = dict(model_type=model_type)
    try:
        config = tiny_config(model_type)
        with torch.device("meta"):
            size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
        if size > _LARGEST:
            return row | dict(status="not tried", message="no tiny config: its sizes have other names")
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model = finish(model, torch.float32)
    except Exception as error:  # whatever a config of another shape raises: it is not what is tested
        return row | dict(status="not tried", message=f"no tiny config: {type(error).__name__}")
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    found = [m for _, m in model.named_modules() if isinstance(getattr(m, "layer_idx", None), int)]
    row["attention"] = sorted({type(m).__name__ for m in found if "attention" in type(m).__name__.lower()})
    targets = [n for n in ("q_proj", "k_proj", "v_proj") if n in names]
    targets = (
        targets or [n for n in ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "o_proj", "dense") if n in names][:1]
    )
    try:
        peft_model = with_adapters(model, {"one": lora(target_modules=targets, rank_pattern={}, alpha_pattern={})})
        with torch.no_grad():
            expected = feed(peft_model, tokens(N), DynamicCache(config=model.config), SIZES)
            peft_model.base_model.disable_adapter_layers()
            effect = difference(expected, feed(peft_model, tokens(N), DynamicCache(config=model.config), SIZES))
            peft_model.base_model.enable_adapter_layers()
    except Exception as error:
        return row | dict(status="not tried", message=f"PEFT with a DynamicCache: {type(error).__name__}")
    try:
        actual = feed(peft_model, tokens(N), SharedLoRACache(peft_model), SIZES)
    except (UnsupportedModelError, UnsupportedAdapterError) as error:
        return row | dict(status="refused", message=str(error))
    except Exception as error:  # neither right nor refused by name
        return row | dict(status="WRONG", message=repr(error), error=float("inf"), effect=effect)
    finally:
        detach(peft_model)
    row |= dict(error=difference(actual, expected) / float(expected.abs().max()), effect=effect)
    return row | dict(status="ok" if row["error"] <= TOLERANCE and effect > 1e-3 else "WRONG")


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


def page(rows: list[dict[str, Any]], version: str, gpu: dict[str, Any] | None = None) -> str:
    """The table as Markdown."""
    done = {status: [r for r in rows if r["status"] == status] for status in ("ok", "refused", "not tried", "WRONG")}
    lines = [
        "# Models",
        "",
        f"Every model type of `AutoModelForCausalLM` in Transformers {version}, as a tiny random model on",
        "the CPU in float32: LoRA on q, k, v; a prefill, a chunk, single tokens; logits compared with PEFT and a `DynamicCache`.",
        "Written by `python -m tests.models_table`. A model of your own: `python -m lora_shared_cache check --model ID_OR_PATH`.",
        "",
        f"{len(done['ok'])} work, {len(done['refused'])} are refused by name, {len(done['not tried'])} were not tried.",
        "",
        "## Work",
        "",
        "| model type | attention | largest error, relative |",
        "|---|---|---|",
        *(
            f"| {r['model_type']} | {', '.join(r['attention'])} | {r['error']:.0e} |"
            for r in done["ok"] + done["WRONG"]
        ),
        "",
        *(gpu_section(gpu) if gpu else []),
        "## Refused",
        "",
        "| model type | message |",
        "|---|---|",
        *(f"| {r['model_type']} | {r['message'].replace('|', chr(92) + '|')} |" for r in done["refused"]),
        "",
        "## Not tried",
        "",
        "The generic tiny config makes no model of the kind, or PEFT or a `DynamicCache` does not run on it:",
        ", ".join(f"{r['model_type']}" for r in done["not tried"]) + ".",
        "",
    ]
    return "\n".join(lines)


def _too_long(*_: Any) -> None:
    raise TimeoutError


def main() -> None:
    """The whole table, or again the model types that are named."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    whole = json.loads(JSON.read_text()) if JSON.exists() else dict(rows=[])
    named, gpu = sys.argv[1:], whole.get("gpu")
    if named[:1] == ["--gpu"]:
        gpu, named = json.loads(Path(named[1]).read_text()), []
        again = []
    else:
        again = named or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    table = {row["model_type"]: row for row in whole["rows"]} if named or not again else {}
    signal.signal(signal.SIGALRM, _too_long)
    for model_type in again:
        signal.alarm(_SECONDS)
        table[model_type] = verdict(model_type)
        signal.alarm(0)
        print(table[model_type], flush=True)
    rows = [table[model_type] for model_type in sorted(table)]
    version = transformers.__version__ if again else whole["transformers"]
    found = dict(transformers=version, **(dict(gpu=gpu) if gpu else {}), rows=rows)
    JSON.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(rows, version, gpu))


if __name__ == "__main__":
    main()
