"""Speed of flash_lora_attention beside every SDPA backend of PyTorch on ready-made K and V, which do less work.

    PYTHONPATH=kernels python kernels/benchmarks/benchmark.py --out docs/benchmarks

One bfloat16 problem per row (Hq=32, Hk=8, D=128, r=16 on K and V unless the row says otherwise), L2 emptied before each run,
median of the GPU's own time stamps. Prints microseconds, TB/s or TFLOP/s, the ratio to the best peer (above 1: ours is
faster) and to the limit (bytes that must be read over copy bandwidth, or operations over matmul rate, both measured here).
Rows of long blocks also say what the first call of new lengths takes, host included (``new_lengths_ms``); "no plans" is
``cudnn_plans=False``, as the shared cache calls.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from flash_lora_attention import flash_lora_attention

_flush: torch.Tensor | None = None


def measure(run, repeats: int = 15) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the device time in microseconds, L2 cold, host ahead of the device."""
    global _flush
    if _flush is None:
        _flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        _flush.zero_()
        torch.cuda._sleep(2_000_000)  # about 1 ms: the host has queued the whole call before the first kernel starts
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(stop) * 1e3 for start, stop in events])
    return tuple(torch.quantile(times, q).item() for q in (0.5, 0.2, 0.8))


def problem(
    B=1,
    Hk=8,
    G=4,
    S=1,
    T=4096,
    D=128,
    r=16,
    n=1,
    dtype=torch.bfloat16,
    key=True,
    val=True,
    trunk=False,
    cudnn_plans=True,
) -> tuple[tuple, dict]:
    """Random (query, key, value) and keyword arguments of one row of the table."""

    def rand(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    q = rand(B, Hk * G, S, D)
    rows = 1 if trunk else B
    k, v = (rand(rows, Hk, T, D).expand(B, -1, -1, -1) for _ in range(2))
    angle = torch.rand(1, T, D // 2, device="cuda") * 6.28
    a = dict(cos=angle.cos().to(dtype), sin=angle.sin().to(dtype))
    if key:
        a |= dict(key_low_rank=rand(n if n > 1 else B, T, r), key_up=rand(n, Hk, r, D) / r**0.5)
    if val:
        a |= dict(value_low_rank=rand(n if n > 1 else B, T, r), value_up=rand(n, Hk, r, D) / r**0.5)
    if not cudnn_plans:
        a |= dict(cudnn_plans=False)
    if n > 1:
        a |= dict(adapter_index=torch.arange(B, device="cuda", dtype=torch.int32) % n, low_rank_per_adapter=True)
    return (q, k, v), a


def peers(q, k, v) -> dict[str, float]:
    """Microseconds of each SDPA backend on ready-made K and V; those that refuse the call are left out."""
    S, T, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    wide = [t.repeat_interleave(G, 1) for t in (k, v)] if G > 1 and T * S < 1 << 31 else (k, v)
    mask = None
    if 1 < S < T:
        mask = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)
    causal = dict(is_causal=True) if S == T else {}
    times = {}
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION), ("math", SDPBackend.MATH),
    ):  # fmt: skip
        if name == "math" and S * T * q.shape[1] > 1 << 28:
            continue

        def run(name=name, backend=backend):
            with sdpa_kernel(backend):
                if name == "flash" and mask is not None:
                    bias = causal_lower_right(S, T)
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=G > 1)
                kv = wide if name == "efficient" else (k, v)
                gqa = G > 1 and name != "efficient"
                return F.scaled_dot_product_attention(q, *kv, attn_mask=mask, enable_gqa=gqa, **causal)

        try:
            times[name] = measure(run)[0]
        except RuntimeError:
            continue
    return times


def ceilings() -> tuple[float, float]:
    """Measured copy bandwidth in byte/us (read + written) and bf16 matmul rate in FLOP/us."""
    source = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = 4 * source.numel() / measure(lambda: target.copy_(source), 10)[0]
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return copy, 2 * 8192**3 / measure(lambda: a @ b, 10)[0]


# name, keywords of problem(), whether peers are measured
TABLE = [
    *((f"decode {t // 1024}k", dict(T=t), True) for t in (4096, 16384, 65536, 131072)),
    *((f"decode {t // 1024}k, V only", dict(T=t, key=False), False) for t in (16384, 131072)),
    *((f"decode {t // 1024}k, K only", dict(T=t, val=False), False) for t in (16384, 131072)),
    *((f"decode {t // 1024}k, no LoRA", dict(T=t, key=False, val=False), False) for t in (16384, 131072)),
    *((f"decode {t // 1024}k, r=64", dict(T=t, r=64), False) for t in (16384, 131072)),
    ("decode 32k", dict(T=32768), True),
    ("decode 32k, 8 rows 8 adapters 1 trunk", dict(T=32768, B=8, n=8, trunk=True), False),
    *((f"prefill {t // 1024}k", dict(S=t, T=t), True) for t in (2048, 8192, 32768)),
    *((f"prefill {t // 1024}k, r=64", dict(S=t, T=t, r=64), False) for t in (8192,)),
    *((f"extend {s} on {t // 1024}k", dict(S=s, T=t), True) for s in (128, 512) for t in (16384, 65536)),
    *((f"prefill {t // 1024}k, no plans", dict(S=t, T=t, cudnn_plans=False), True) for t in (2048, 8192, 32768)),
    *((f"extend {s} on 16k, no plans", dict(S=s, T=16384, cudnn_plans=False), True) for s in (256, 512, 4096)),
    *((f"prefill 8k, D={d}, no plans", dict(S=8192, T=8192, D=d, cudnn_plans=False), True) for d in (64, 256)),
    ("extend 4096 on 16k", dict(S=4096, T=16384), True),
    ("extend 128 on 16k, r=64", dict(S=128, T=16384, r=64), False),
    ("extend 128 on 16k, V only", dict(S=128, T=16384, key=False), False),
    ("extend 128 on 16k, no LoRA", dict(S=128, T=16384, key=False, val=False), False),
    *((f"decode 16k, D={d}", dict(T=16384, D=d), True) for d in (64, 256)),
    *((f"prefill 8k, D={d}", dict(S=8192, T=8192, D=d), True) for d in (64, 256)),
    ("decode 16k, MHA", dict(T=16384, Hk=32, G=1), True),
    ("prefill 8k, MHA", dict(S=8192, T=8192, Hk=32, G=1), True),
    ("extend 128 on 16k, MHA", dict(S=128, T=16384, Hk=32, G=1), True),
    ("decode 16k, float32", dict(T=16384, dtype=torch.float32), True),
    ("extend 128 on 16k, float32", dict(S=128, T=16384, dtype=torch.float32), True),
    ("prefill 2k, float32", dict(S=2048, T=2048, dtype=torch.float32), True),
]


def of_new_lengths(options: dict) -> float:
    """Milliseconds of the first call of lengths that have not been, wall clock, until the device is done."""
    S, T = options["S"] - options["S"] // 9, options["T"] - options["T"] // 9
    qkv, a = problem(**options | dict(S=S, T=T))
    torch.cuda.synchronize()
    start = time.perf_counter()
    flash_lora_attention(*qkv, **a)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def row(name: str, options: dict, with_peers: bool, copy: float, matmul: float) -> dict:
    """One line of the table."""
    qkv, a = problem(**options)
    q, k, v = qkv
    B, Hq, S, D = q.shape
    T = k.shape[2]
    median, low, high = measure(lambda: flash_lora_attention(*qkv, **a))
    base = {id(t.untyped_storage()): t for t in (k, v)}.values()
    moved = sum(t.untyped_storage().nbytes() for t in base) + 2 * q.nbytes
    moved += sum(t.nbytes for name, t in a.items() if name != "adapter_index" and ("key" in name or "value" in name))
    moved += (a["cos"].nbytes + a["sin"].nbytes) if "key_up" in a else 0
    flops = 4 * B * Hq * S * D * (T - (S - 1) / 2)
    limit = max(moved / copy, flops / matmul if S > 1 else 0.0)
    new_lengths = of_new_lengths(options) if S >= 256 else None
    times = peers(*qkv) if with_peers else {}
    best = min(times.values(), default=float("nan"))
    return dict(
        name=name, us=median, us_p20=low, us_p80=high, tb_s=moved / median / 1e6, tflop_s=flops / median / 1e6,
        best_peer=min(times, key=times.get, default=""), best_peer_us=best, speed_vs_peer=best / median,
        limit_us=limit, of_limit=limit / median, new_lengths_ms=new_lengths, **{f"{p}_us": t for p, t in times.items()},
    )  # fmt: skip


def show(line: dict) -> None:
    print(
        f"{line['name']:<40}{line['us']:>10.1f} us {line['tb_s']:>6.2f} TB/s {line['tflop_s']:>6.0f} TFLOP/s"
        f"  x{line['speed_vs_peer']:<5.2f} of {line['best_peer']:<9}{line['best_peer_us']:>9.1f}"
        f"  limit {line['limit_us']:>8.1f} ({line['of_limit']:.2f})"
        + ("" if line["new_lengths_ms"] is None else f"  new lengths {line['new_lengths_ms']:.1f} ms"),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the CSV")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    copy, matmul = ceilings()
    print(f"copy {copy / 1e6:.2f} TB/s, matmul {matmul / 1e6:.0f} TFLOP/s")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = dict(
        gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        date=datetime.date.today().isoformat(), commit=commit or "none", copy_tb_s=copy / 1e6,
        matmul_tflop_s=matmul / 1e6,
    )  # fmt: skip
    lines = []
    for name, options, with_peers in TABLE:
        if arguments.only not in name:
            continue
        lines.append(row(name, options, with_peers, copy, matmul) | about)
        show(lines[-1])
        torch.cuda.empty_cache()
        if arguments.out:
            # After each row: a run that is cut short keeps what it has measured.
            arguments.out.mkdir(parents=True, exist_ok=True)
            with open(arguments.out / "flash_lora_attention.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(f for line in lines for f in line)))
                writer.writeheader()
                writer.writerows(lines)


if __name__ == "__main__":
    main()
