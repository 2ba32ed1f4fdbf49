"""Choose the tiles of every kernel on this GPU and write them to ``flash_lora_attention/configs/<device>.json``.

    PYTHONPATH=kernels python kernels/benchmarks/tune.py

Tries a short list of tile shapes per kernel, dtype and head size on representative lengths, and keeps the fastest by the
geometric mean. What is not tuned in a run (``--dtypes``, ``--head-sizes``) stays as the file has it. Crossovers between the paths
(``dispatch``) come from the file or the default: read them off the table that ``benchmark.py`` prints and edit the file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re

import torch
import triton
from benchmark import measure, problem

from flash_lora_attention import tuning
from flash_lora_attention.arguments import Problem
from flash_lora_attention.decode import split_kv_attention
from flash_lora_attention.dense import dense_attention
from flash_lora_attention.expand import expand
from flash_lora_attention.extend import extend_attention
from flash_lora_attention.inputs import Inputs, prepare

# block_n, num_warps, num_stages, programs_per_sm; each with and without the folded product
DECODE = [(64, 4, 3, 1), (64, 4, 3, 2), (64, 4, 2, 2), (32, 4, 2, 2), (64, 4, 1, 2)]
# max_rows, max_folded
ROWS = [(1, 128), (2, 128), (4, 128), (8, 128), (2, 0)]
# block_n, num_warps, num_stages, programs_per_sm, max_folded, min_rows
SCORES = [
    (64, 4, 3, 2, 128, 4),
    (64, 4, 4, 2, 128, 4),
    (64, 4, 2, 1, 64, 4),
    (32, 4, 2, 2, 128, 4),
    (32, 4, 1, 1, 128, 1 << 30),
]
# block_m, block_n, num_warps, num_stages
EXTEND = [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2), (32, 16, 4, 1)]
# block_t, num_warps, num_stages, programs_per_sm
EXPAND = [(32, 4, 2, 8), (32, 4, 3, 4), (32, 4, 1, 16), (64, 8, 3, 4), (16, 4, 3, 8)]
# block_m, block_n, num_warps, num_stages; for Hopper and 16 bits
DENSE = [(64, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)]


def inputs(**options) -> Inputs:
    """``benchmark.problem`` in the form that the launchers take."""
    qkv, a = problem(**options)
    absent = dict.fromkeys((
        "key_low_rank", "key_up", "value_low_rank", "value_up", "adapter_index", "cos", "sin", "key_gain",
        "key_delta_gain", "key_delta_weight", "scale", "sliding_window", "softcap", "sinks", "attention_mask",
    ))  # fmt: skip
    fixed = dict(low_rank_per_adapter=False, rotary_interleaved=False, is_causal=True)
    return prepare(Problem(qkv[1].shape[2], qkv[0].shape[-1], 1), *qkv, **{**absent, **fixed, **a})


def dense(x: Inputs, config: tuning.DenseConfig) -> None:
    dense_attention(x.query, x.key, x.value, scale=x.scale, is_causal=True, sinks=None, config=config)


def fastest(name: str, problems: list[dict], configs: list, run) -> dict:
    """The fields of the configuration with the smallest geometric mean over the problems, defaults left out."""
    best, best_score = None, math.inf
    for config in configs:
        times = []
        for options in problems:
            x = inputs(**options)
            try:
                times.append(measure(lambda x=x, config=config: run(x, config), 8)[0])
            except (triton.runtime.errors.OutOfResources, triton.CompilationError):
                times.append(math.inf)
        score = math.exp(sum(map(math.log, times)) / len(times)) if math.inf not in times else math.inf
        print(f"{name:<28}{config}: {score:.1f} us", flush=True)
        if score < best_score:
            best, best_score = config, score
    if best is None:
        raise RuntimeError(f"no configuration of {name} runs on this device")
    fields = type(best).__dataclass_fields__.values()
    return {f.name: getattr(best, f.name) for f in fields if getattr(best, f.name) != f.default}


DTYPES = {"16-bit": (torch.bfloat16, "ieee"), "32-bit": (torch.float32, "tf32x3")}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-sizes", nargs="+", type=int, choices=(64, 128, 256), default=[64, 128, 256])
    arguments = parser.parse_args(argv)
    device = torch.cuda.get_device_name()
    path = tuning._CONFIGS / (re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json")
    default = json.loads((tuning._CONFIGS / "default.json").read_text())
    before = json.loads(path.read_text()) if path.exists() else {}
    result = {
        "device": device,
        "measured_with": f"torch {torch.__version__}, triton {triton.__version__}, {datetime.date.today().isoformat()}",
        **{part: before.get(part, {}) for part in ("decode", "scores", "extend", "expand")},
        **{part: before.get(part, default[part]) for part in ("dense", "dispatch")},
    }  # fmt: skip
    for bits in arguments.dtypes:
        dtype, precision = DTYPES[bits]
        for kernel in ("decode", "scores", "extend", "expand"):
            result[kernel].setdefault(bits, {})
        decode = [
            tuning.DecodeConfig(*c, max_folded=folded, precision=precision) for c in DECODE for folded in (128, 0)
        ]
        extend = [tuning.ExtendConfig(*c, precision=precision) for c in EXTEND]
        for D in arguments.head_sizes:
            common = dict(D=D, dtype=dtype)
            name = f"{bits} D={D}"
            work = [dict(T=t, **common) for t in (16384, 131072)]
            entry = fastest(f"decode {name}", work, decode, split_kv_attention)
            work = [dict(T=32768, B=8, n=8, trunk=True, **common)]
            rows = [tuning.DecodeConfig(**entry | dict(max_rows=m, max_folded=f)) for m, f in ROWS]
            fused = fastest(f"decode {name} rows", work, rows, split_kv_attention)
            # Written out, defaults too: what the entry for single rows says must not take their place.
            chosen = tuning.DecodeConfig(**fused)
            ahead = tuning.DecodeConfig(**entry | dict(max_rows=8, max_folded=chosen.max_folded))
            # The last of them never computes scores ahead.
            result["scores"][bits][str(D)] = scores = fastest(
                f"scores {name}", work, [tuning.ScoresConfig(*c) for c in SCORES],
                lambda x, config, ahead=ahead: split_kv_attention(x, ahead, scores=config),
            )  # fmt: skip
            if scores["min_rows"] < 1 << 30:
                chosen = ahead
            result["decode"][bits][str(D)] = entry | {
                "rows": dict(max_rows=chosen.max_rows, max_folded=chosen.max_folded)
            }
            work = [dict(S=s, T=16384, **common) for s in (32, 128)]
            result["extend"][bits][str(D)] = fastest(f"extend {name}", work, extend, extend_attention)
            work = [dict(T=16384, **common)]
            configs = [tuning.ExpandConfig(*c) for c in EXPAND]
            result["expand"][bits][str(D)] = fastest(
                f"expand {name}", work, configs, lambda x, config: expand(x, x.T, config)
            )
            if bits == "16-bit" and torch.cuda.get_device_capability()[0] == 9:
                work = [dict(S=s, T=16384, **common) for s in (1024, 4096, 16384)]
                configs = [tuning.DenseConfig(*c) for c in DENSE]
                result["dense"][bits][str(D)] = fastest(f"dense {name}", work, configs, dense)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
