"""Compiles the kernels for Hopper where there may be no GPU, and says what came out; run as a script by ``test_compile.py``.

A driver that only knows its target stands in for CUDA's. One JSON object per case: the operand tiles that loops read through
registers, shared memory in bytes, and what ptxas says of serialised wgmma instructions.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flash_lora_attention import decode, dense, expand, extend, fold, merge_kernel, tuning

from .cases import GRID, make
from .test_interpreter import prepared


class Hopper:
    """What Triton asks a driver before it launches; nothing is launched."""

    launcher_cls = staticmethod(lambda source, metadata: lambda *args, **kwargs: None)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only(run):
    """``JITFunction.run`` that compiles, keeps the kernel and launches nothing."""

    def wrapper(self, *args, grid=None, warmup=False, **kwargs):
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))
        return compiled[-1][1]

    return wrapper


def operands_through_registers(ttgir: str) -> list[str]:
    """Tiles of 16-bit numbers that are loaded inside a loop rather than copied asynchronously."""
    found, inside = [], False
    for line in ttgir.splitlines():
        inside = (inside or "scf.for" in line) and not re.match(r"    }", line)
        if inside and "tt.load" in line and re.search(r"x!tt.ptr<b?f16>", line):
            found.append(line.split("=")[0].strip())
    return found


def serialised(ptx: str) -> list[str]:
    """Reasons for which ptxas serialises wgmma instructions."""
    ptxas = get_ptxas(90).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", "--gpu-name", "sm_90a", file.name, "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.findall(r"\(C75\d\d\)[^\n]*", result.stdout + result.stderr)


compiled: list = []


def main() -> None:
    JITFunction.run = compile_only(JITFunction.run)
    driver.set_active(Hopper())
    file = Path(tuning.__file__).parent / "configs/nvidia_h100_80gb_hbm3.json"
    tuning._config = lambda index: json.loads(file.read_text())
    for module in (decode, dense, extend, expand, fold):
        module.num_sms = lambda device: 132
    # What is remembered of a call are loaded kernels.
    merge_kernel.serve = lambda tensors, numbers, call: call()
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    for case in sys.argv[1:]:
        kernel, name, D, S = case.split(":")
        qkv, a = make(**{**dict(D=int(D), T=777, Hk=2, G=4, S=int(S), r=16, dtype=dtype), **GRID[name]})
        x = prepared(qkv, a)
        compiled.clear()
        if kernel == "decode":
            decode.split_kv_attention(x, tuning.decode_config(cpu, dtype, int(D), decode.variant(x)))
        elif kernel in ("scores", "after_scores"):
            config = tuning.decode_config(cpu, dtype, int(D), decode.variant(x))
            decode.split_kv_attention(x, config, scores=tuning.scores_config(cpu, dtype, int(D)))
            assert len(compiled) == 3, "scores, attention, merge"
            if kernel == "after_scores":
                compiled.pop(0)
        elif kernel == "extend":
            extend.extend_attention(x, tuning.extend_config(cpu, dtype, int(D)))
        elif kernel == "dense":
            tiles = tuning.dense_config(cpu, dtype, int(D))
            dense.dense_attention(x.query, x.key, x.value, scale=0.1, is_causal=True, sinks=x.sinks, config=tiles)
        else:
            expand.expand(x, x.T, tuning.expand_config(cpu, dtype, int(D)))
        found = compiled[0][1]
        result = dict(
            case=case, kernel=compiled[0][0], shared=found.metadata.shared,
            through_registers=operands_through_registers(found.asm["ttgir"]), serialised=serialised(found.asm["ptx"]),
        )  # fmt: skip
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
