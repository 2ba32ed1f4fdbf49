"""The tuning script with made-up times: what it writes is what the kernels read."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
NEVER = 1 << 30


def forget(tuning) -> None:
    """What was read from a file for a device is read again."""
    for kernel in ("decode", "scores", "extend", "expand", "dense"):
        getattr(tuning, f"{kernel}_config").cache_clear()


@pytest.mark.parametrize("ahead_is_faster", [True, False])
def test_writes_a_configuration_that_is_read(tmp_path, monkeypatch, ahead_is_faster):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("benchmark", "tune"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import tune

    from flash_lora_attention import tuning

    shutil.copy(tuning._CONFIGS / "default.json", tmp_path)
    monkeypatch.setattr(tuning, "_CONFIGS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *index: "Some GPU 1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *index: (9, 0))
    called = []
    monkeypatch.setattr(tune, "inputs", lambda **options: type("X", (), options))
    for launcher in ("split_kv_attention", "extend_attention", "expand", "dense"):
        monkeypatch.setattr(tune, launcher, lambda x, *args, **kwargs: called.append((args, kwargs)))

    def measure(run, repeats):
        """Eight times faster with 64 keys per tile, or 16 tokens; of the scores with four buffers, or not ahead at all."""
        run()
        args, kwargs = called[-1]
        scores = kwargs.get("scores")
        if scores is not None:
            fast = (scores.min_rows < NEVER and scores.num_stages == 4) if ahead_is_faster else scores.min_rows == NEVER
        else:
            fast = getattr(args[-1], "block_n", 0) == 64 or getattr(args[-1], "block_t", 0) == 16
        return (1.0 if fast else 8.0,) * 3

    monkeypatch.setattr(tune, "measure", measure)
    tune.main([])

    written = json.loads((tmp_path / "some_gpu_1.json").read_text())
    monkeypatch.setattr(tuning, "_config", lambda index: written)
    cuda = torch.device("cuda", 0)
    forget(tuning)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            for D in (64, 80, 128, 256):
                assert tuning.decode_config(cuda, dtype, D, None).block_n == 64
                assert tuning.extend_config(cuda, dtype, D).block_n == 64
                assert tuning.expand_config(cuda, dtype, D).block_t == 16
                if dtype == torch.bfloat16:
                    assert tuning.dense_config(cuda, dtype, D).block_n == 64
                scores = tuning.scores_config(cuda, dtype, D)
                rows = tuning.decode_config(cuda, dtype, D, "rows")
                assert (scores.min_rows < NEVER) == ahead_is_faster
                if ahead_is_faster:
                    assert scores.num_stages == 4 and rows.max_rows == 8

        # A run for one head size leaves the rest as it was.
        monkeypatch.setattr(tune, "measure", lambda run, repeats: (1.0,) * 3)
        tune.main(["--dtypes", "16-bit", "--head-sizes", "128"])
        again = json.loads((tmp_path / "some_gpu_1.json").read_text())
        kept, new = (
            {(kernel, bits, D): fields for kernel in ("decode", "scores", "extend", "expand", "dense")
             for bits, sizes in file[kernel].items() for D, fields in sizes.items()}
            for file in (written, again)
        )  # fmt: skip
        changed = {key for key in kept if kept[key] != new[key]}
        assert changed and all(key[1:] == ("16-bit", "128") for key in changed) and kept.keys() == new.keys()
    finally:
        forget(tuning)
