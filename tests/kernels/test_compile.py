"""What the compiler makes of the kernels for Hopper, without a GPU.

Two things that no interpreter shows decide there whether results are right and fast (docs/kernels.md): operand tiles must be
copied asynchronously, and ptxas must not serialise the wgmma instructions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
CASES = [
    "decode:plain:128:1", "decode:value_only:128:1", "decode:base:128:1", "decode:rank_64:128:1", "decode:trunk:128:1",
    "decode:plain:64:1", "decode:plain:80:1", "decode:rank_8:64:1", "decode:rank_3:64:1", "decode:partial_interleaved:64:1",
    "decode:interleaved_full:64:1", "decode:strided:64:1", "extend:plain:128:37", "extend:value_only:128:37",
    "extend:base:128:37", "extend:rank_3:64:37", "extend:rank_8:64:37", "extend:window:64:37", "extend:plain:80:37",
    "expand:plain:128:37", "scores:eight_rows:128:1", "after_scores:eight_rows:128:1", "scores:eight_rows:64:1",
    "dense:plain:128:200", "dense:plain:64:200", "dense:plain:80:200", "dense:plain:256:200", "dense:sinks:64:200",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Compiled in a process of its own: here Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= dict(
        TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")),
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    )
    command = [sys.executable, "-m", "tests.kernels.hopper", *CASES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return {result["case"]: result for result in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", CASES)
def test_compiled_for_hopper(results, case):
    result = results[case]
    assert result["through_registers"] == []
    assert result["serialised"] == []
    assert result["shared"] <= 227 * 1024
