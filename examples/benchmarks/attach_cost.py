"""What ``attach`` takes on one CPU core: the trial and the self-test of the attention layers, at the widths of an 8B model.

PYTHONPATH=.:kernels python examples/benchmarks/attach_cost.py --out attach_cost.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lora_shared_cache import attach

# In Gemma3 the first layer of its second kind is the sixth.
MODELS = {"llama": 2, "gemma3_text": 6}


def measure(kind: str, layers: int) -> dict[str, float | int | str]:
    """CPU and wall seconds of the first ``attach`` of a model with random weights in bfloat16."""
    config = AutoConfig.for_model(
        kind, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=16, target_modules=targets, init_lora_weights=False)).eval()
    wall, cpu = time.perf_counter(), time.process_time()
    attach(model)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return dict(model=kind, layers=layers, cpu_s=round(cpu, 3), wall_s=round(wall, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    versions = dict(torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__)
    about = versions | dict(device=f"one thread of a CPU ({platform.machine()})", date=time.strftime("%Y-%m-%d"))
    rows = [about | measure(kind, layers) for kind, layers in MODELS.items()]
    for row in rows:
        print(row)
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
