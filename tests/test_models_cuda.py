"""One model of each kind of attention on CUDA, through the Triton kernels, against PEFT with a ``DynamicCache`` there.

python -m tests.test_models_cuda OUT.json     # the same, written down for the table (``models_table.py --gpu OUT.json``)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lora_shared_cache import SharedLoRACache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = dict(
    vocab_size=211, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=64, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
QKV = ["q_proj", "k_proj", "v_proj"]
SLIDING = dict(sliding_window=24, layer_types=["sliding_attention", "full_attention"])
NO_HEAD_DIM = dict(head_dim=None)
MOE = dict(num_local_experts=2, num_experts_per_tok=1)
# kind: model type, settings, targets
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "plain, all heads": ("llama", dict(num_key_value_heads=4), QKV),
    "grouped heads": ("qwen2", dict(), QKV),
    "key norm per head": ("qwen3", dict(), QKV),
    "key norm, full width": ("olmo2", NO_HEAD_DIM, QKV),
    "key LayerNorm": ("stablelm", dict(qk_layernorm=True, **NO_HEAD_DIM), QKV),
    "key LayerNorm, bias": ("phi", dict(qk_layernorm=True, **NO_HEAD_DIM), QKV),
    "key LayerNorm, bias, fused": (
        "persimmon",
        dict(qk_layernorm=True, head_dim=None, num_key_value_heads=None),
        ["query_key_value"],
    ),
    "norm after RoPE": ("nanochat", NO_HEAD_DIM, QKV),
    "norm after RoPE, weights": ("hunyuan_v1_dense", dict(), QKV),
    "complex RoPE": (
        "llama4_text",
        dict(intermediate_size_mlp=256, use_qk_norm=True, no_rope_layers=[1, 0], attention_chunk_size=512, **MOE),
        QKV,
    ),
    "fused, blocks": ("phi3", dict(), ["qkv_proj"]),
    "fused, per head": ("gpt_neox", dict(head_dim=None, num_key_value_heads=None), ["query_key_value"]),
    "fused, Conv1D": ("gpt2", dict(n_embd=256, n_layer=2, n_head=4, n_positions=512), ["c_attn"]),
    "soft cap": ("gemma2", dict(query_pre_attn_scalar=64, attn_logit_softcapping=2.0, **SLIDING), QKV),
    "sinks": ("gpt_oss", dict(**MOE, **SLIDING), QKV),
    "partial rotation": ("phi", NO_HEAD_DIM, QKV),
    "interleaved": ("glm4", dict(), QKV),
    "sliding window": ("mistral", dict(sliding_window=24), QKV),
    "no RoPE": ("smollm3", dict(no_rope_layers=[1, 0], use_sliding_window=False, **NO_HEAD_DIM), QKV),
}
# Prefill, a chunk, eight decode steps.
SIZES = [80, 9, *[1] * 8]


def build(kind: str) -> Any:
    """The model of a kind with two adapters of the same content, float32 on CUDA."""
    model_type, settings, targets = KINDS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{k: v for k, v in {**SHAPE, **settings}.items() if v is not None})
    # SDPA of some versions drops the soft cap and the sinks silently.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "emb" in name or "wte" in name else parameter.shape[-1] ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(mean=1.0, std=0.2)
            else:
                parameter.normal_(std=0.2)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=model_type == "gpt2")
    model = get_peft_model(model, lora, adapter_name="one")
    model.add_adapter("two", lora)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_B.one" in name:
                parameter.normal_(std=0.3)
            if ".two." in name:
                parameter.copy_(parameters[name.replace(".two.", ".one.")])
    return model.cuda().eval()


@torch.no_grad()
def feed(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any, switch: bool) -> torch.Tensor:
    """Logits of all tokens, fed in pieces; with ``switch`` the adapters take turns."""
    positions, out, start = (mask.cumsum(-1) - 1).clamp(min=0), [], 0
    for index, size in enumerate(SIZES):
        stop = start + size
        model.set_adapter("two" if switch and index % 3 == 1 else "one")
        # An agent's prompt is the whole trajectory: what it has not run itself, it runs again.
        first = 0 if switch else start
        arguments = dict(attention_mask=mask[:, :stop], position_ids=positions[:, first:stop], use_cache=True)
        logits = model(input_ids=ids[:, first:stop], past_key_values=cache, **arguments).logits
        out.append(logits[:, -size:])
        start = stop
    return torch.cat(out, dim=1).float()


def measure(kind: str, dtype: torch.dtype) -> dict[str, float]:
    """Errors relative to the largest logit: ours, and PEFT's, both against PEFT in float32; and the adapter's effect."""
    model = build(kind)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, SHAPE["vocab_size"], (2, sum(SIZES)), generator=generator).cuda()
    mask = torch.ones_like(ids)
    ids[1, :11], mask[1, :11] = 0, 0
    real = mask.bool()

    def dynamic() -> torch.Tensor:
        return feed(model, ids, mask, DynamicCache(config=model.config), switch=False)[real]

    exact = dynamic()
    with model.disable_adapter(), torch.no_grad():
        base = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[real]
    model = model.to(dtype)
    peft = dynamic()
    largest = float(exact.abs().max())
    found = dict(effect=float((exact - base).abs().max()) / largest, peft=float((peft - exact).abs().max()) / largest)
    found["peft_rms"] = float((peft - exact).norm() / exact.norm())
    ours = 0.0
    rms = 0.0
    for sharing in ("base_shared", "lr_precomputed", "auto"):
        actual = feed(model, ids, mask, SharedLoRACache(sharing=sharing), switch=True)[real]
        ours = max(ours, float((actual - exact).abs().max()) / largest)
        rms = max(rms, float((actual - exact).norm() / exact.norm()))
    return found | dict(error=ours, rms=rms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kinds_of_attention(kind, dtype, monkeypatch):
    monkeypatch.setenv("LORA_SHARED_CACHE_BACKEND", "triton")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    found = measure(kind, dtype)
    assert found["effect"] > 0.01
    if dtype == torch.float32:
        assert found["error"] < 1e-3
    else:
        assert found["rms"] <= 1.5 * found["peft_rms"]


def main() -> None:
    """Write down what is measured."""
    os.environ["LORA_SHARED_CACHE_BACKEND"] = "triton"
    rows = []
    for kind, (model_type, _, _) in KINDS.items():
        row: dict[str, Any] = dict(kind=kind, model_type=model_type)
        for dtype in (torch.float32, torch.bfloat16):
            row[str(dtype).removeprefix("torch.")] = measure(kind, dtype)
        rows.append(row)
        print(row, flush=True)
    about = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, transformers=transformers.__version__)
    Path(sys.argv[1]).write_text(json.dumps(about | dict(rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
