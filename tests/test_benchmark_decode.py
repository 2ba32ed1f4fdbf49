"""The benchmark of decode steps runs on a CPU, and its variants decode the same tokens there."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "benchmarks"))
import decode_step  # noqa: E402

VARIANTS = ["peft_dynamic_eager", "ours_eager", "ours_captured"]
SMALL = ["--device", "cpu", "--shape", "tiny", "--tokens", "12", "--repeats", "2"]


def rows_of(folder: Path, name: str = "decode_step.json") -> list[dict]:
    return json.loads((folder / name).read_text())


@pytest.mark.integration
def test_variants_decode_the_same_tokens(tmp_path, capsys):
    arguments = [*SMALL, "--contexts", "24", "40", "--variants", *VARIANTS, "--profile", "--out", str(tmp_path)]
    assert decode_step.main(arguments) == 0
    rows = rows_of(tmp_path)
    assert [(row["variant"], row["context"]) for row in rows] == [(v, c) for v in VARIANTS for c in (24, 40)]
    for row in rows:
        assert row["ms"] > 0 and len(row["ms_runs"]) == 2 and row["limit_ms"] > 0 and row["prefill_s"] > 0
        # The context shows in the tokens, or equal ones would say nothing.
        assert len(row["tokens"]) == 12 and len(set(row["tokens"])) > 4 and row["repeats_equal"]
        assert row["tokens_as_peft"] == (None if row["variant"] == "peft_dynamic_eager" else 12)
        assert row["tokens_equal"] is (True if row["variant"] == "ours_captured" else None)
        times = ("first_call_s", "first_token_s", "second_token_s", "turn_ms", "switched_turn_ms", "set_adapter_ms")
        for field in times:
            assert row[field] > 0
        assert row["step_host_ms"] > 0 and isinstance(row["switch_ms"], float)
        assert ("CUDA" in (row["eager_reason"] or "")) == (row["variant"] == "ours_captured")
        assert row["peak_decode_bytes"] is None and row["cache_bytes"] > 0
        assert {"gpu", "torch", "triton", "transformers", "peft", "commit", "date", "rank", "dtype"} <= row.keys()
    assert rows[0]["tokens"] != rows[1]["tokens"]
    # From 24 on only the rest is run; where the cache has room for one context, all of it.
    assert [row["prefill_tokens"] for row in rows] == [23, 16, 23, 16, 23, 39]
    # K and V of two layers with two heads of size 64 in float32.
    assert rows[1]["cache_bytes"] == 39 * 2 * 2 * 2 * 64 * 4
    profiles = rows_of(tmp_path, "decode_step_profile.json")
    assert [p["context"] for p in profiles] == [24, 40] and all(p["kernels"] and p["us"] > 0 for p in profiles)
    assert "as eager" in capsys.readouterr().out


def test_the_other_variants_run_and_a_failure_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(model, room):
        raise RuntimeError("no such cache")

    broken = replace(decode_step.VARIANTS["ours_captured_growing"], make=fail)
    monkeypatch.setitem(decode_step.VARIANTS, "ours_captured_growing", broken)
    names = ["ours_captured_growing", "base_captured", "peft_static_compile"]
    arguments = [*SMALL, "--contexts", "24", "--compile-contexts", "30", "--variants", *names, "--targets", "all"]
    assert decode_step.main([*arguments, "--out", str(tmp_path)]) == 1
    failed, base, static = rows_of(tmp_path)
    assert failed["error"] == "RuntimeError: no such cache" and failed["variant"] == "ours_captured_growing"
    assert base["ms"] > 0 and "switch_ms" not in base and base["tokens_as_peft"] is None
    assert static["context"] == 30 and static["repeats_equal"] and static["targets"] == "all"


def test_captured_tokens_that_differ_are_told():
    row = dict(variant="ours_captured", targets="attention", context=24, tokens=[1, 2, 3], ms=2.0)
    report = decode_step.Report(None, {})
    report.rows = [
        dict(row, variant="peft_dynamic_eager", tokens=[1, 5, 3], ms=4.0),
        dict(row, variant="ours_eager", tokens=[1, 2, 4]),
    ]
    compared = decode_step.compare(row, report)
    assert compared == dict(tokens_equal=False, tokens_as_peft=1, speed_vs_peft=2.0)
    assert "NOT AS EAGER" in decode_step.show(row | compared | dict(repeats_equal=True))
