"""The benchmark of agent traces: lengths, what each way of caching runs and keeps, and what is said about the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "benchmarks"))
import agent_trace  # noqa: E402
import trace_capacity  # noqa: E402
import trace_report  # noqa: E402
from agent_trace import VARIANTS, Bench, Cell, Setting, make_runner, random_pieces, share_a  # noqa: E402
from decode_step import add_adapters, build_base  # noqa: E402
from traces import Trace, Turn, count_tokens, read_traces, stretch, synthetic  # noqa: E402

from lora_shared_cache import SharedLoRACache, graphs  # noqa: E402

from .conftest import emulate_graphs  # noqa: E402
from .tiny import TokenCounter  # noqa: E402

CPU = torch.device("cpu")
TRACE = Trace(
    "made up",
    (
        Turn("plan", 20, 3), Turn("plan", 2, 2), Turn("action", 0, 4), Turn("plan", 9, 1), Turn("reflect", 5, 3),
        Turn("action", 0, 2),
    ),
)  # fmt: skip


def setting_of(trace: Trace = TRACE, targets: str = "attention", rank: int = 4) -> Setting:
    model = add_adapters(build_base("tiny", torch.float32, CPU), trace.roles, targets, rank, torch.float32)
    share_a(model, trace.roles)
    return Setting(trace, random_pieces(trace, 499, CPU), lambda variant: model, CPU, 0)


def texts(runner, setting: Setting) -> list[torch.Tensor]:
    text, found = setting.pieces[0][:, :0], []
    for turn, piece in zip(setting.trace.turns, setting.pieces, strict=True):
        text, _ = runner.take_turn(turn.role, torch.cat((text, piece), dim=1), turn.generated)
        found.append(text)
    return found


# ---- lengths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [200, 256, 941, 16384, 65536])
def test_stretching_scales_what_is_read_and_keeps_what_is_written(total):
    trace = synthetic()
    assert (len(trace.turns), trace.switches, trace.roles) == (14, 8, ("plan", "action", "reflect"))
    stretched = stretch(trace, total)
    assert stretched.total == total and stretched.name == trace.name
    for before, after in zip(trace.turns, stretched.turns, strict=True):
        assert (after.role, after.generated) == (before.role, before.generated)
        # A cue stays: only what comes with it is scaled.
        assert after.new_input >= min(before.new_input, 2 if after is not stretched.turns[0] else 1)
        assert after.new_input == before.new_input or before.new_input > 2
    if total > 941:
        assert stretched.turns[0] == trace.turns[0]
        pairs = zip(trace.turns[1:], stretched.turns[1:], strict=True)
        observations = [(b.new_input - 2, a.new_input - 2) for b, a in pairs if b.new_input > 2]
        factor = sum(a for _, a in observations) / sum(b for b, _ in observations)
        assert all(abs(a - factor * b) <= 1 for b, a in observations)


def test_a_trace_is_read_by_its_columns(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("role,kind,episode_id,new_input_tokens,generated_tokens\nplan,x,a,7,2\nact,x,a,0,3\nplan,x,b,4,1\n")
    found = read_traces(file)
    assert found["a"] == Trace("a", (Turn("plan", 7, 2), Turn("act", 0, 3))) and found["b"].total == 5
    for text, message in (
        ("role,new_input_tokens\nplan,3\n", "generated_tokens"),
        ("role,new_input_tokens,generated_tokens\nplan,many,3\n", "line 2"),
        ("role,new_input_tokens,generated_tokens\nplan,0,3\n", "line 2"),
        ("role,new_input_tokens,generated_tokens\nplan,3,3\nact,3,0\n", "line 3"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_traces(file)
    with pytest.raises(ValueError, match="can't be stretched to 20"):
        stretch(synthetic(), 20)


# ---- what is run and kept ------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_and_memory_are_those_of_the_caches(variant):
    setting = setting_of()
    runner, counter = make_runner(setting.model_of(variant), variant, "eager", 0), None
    counts, coverage = count_tokens(TRACE, variant)
    counter = TokenCounter(setting.model_of(variant))
    text = setting.pieces[0][:, :0]
    for turn, piece, count in zip(TRACE.turns, setting.pieces, counts, strict=True):
        text, times = runner.take_turn(turn.role, torch.cat((text, piece), dim=1), turn.generated)
        assert 0 < times.switched < times.first <= times.whole
        prefilled, *steps = counter.take()
        assert prefilled == count.prefilled and steps == [1] * (turn.generated - 1)
    assert text.shape[1] == TRACE.total
    agent_trace.check_coverage(runner, variant, coverage)
    assert (sum(count.rerun for count in counts) > 0) == (variant in ("non_shared", "base_shared"))
    predicted = agent_trace.predicted_bytes(setting, variant, coverage)
    # K and V of two layers with two heads of size 64 in float32.
    assert predicted["one_cache_bytes"] == (TRACE.total - 1) * 2 * 2 * 2 * 64 * 4
    used, _ = runner.bytes_in_use()
    if variant in agent_trace.POLICIES:
        footprint = runner.cache_of("plan").memory_footprint()
        used = footprint["base"] + sum(footprint["low_rank"].values())
    assert used == predicted["predicted_bytes"]
    if variant == "lr_precomputed":
        # 1 + N (r_k + r_v) / (2 Hk D)
        assert predicted["predicted_bytes"] / predicted["one_cache_bytes"] == 1 + 3 * (4 + 4) / (2 * 2 * 64)


@pytest.mark.integration
@pytest.mark.parametrize("variant", agent_trace.PEERS)
def test_the_captured_peer_writes_what_generate_writes(variant):
    setting = setting_of()
    model = setting.model_of(variant)
    expected = texts(make_runner(model, variant, "eager", 0), setting)
    runner = make_runner(model, variant, "captured", TRACE.total)
    for _ in range(2):
        assert all(map(torch.equal, texts(runner, setting), expected))
        used, whole = runner.bytes_in_use()
        assert used == make_used(setting, variant) and whole >= used
        runner.rewind()


def make_used(setting: Setting, variant: str) -> int:
    return agent_trace.predicted_bytes(setting, variant, count_tokens(TRACE, variant)[1])["predicted_bytes"]


def test_graphs_stay_when_a_captured_cache_is_rewound(monkeypatch):
    emulated = emulate_graphs(monkeypatch, graphs)
    setting = setting_of()
    expected = texts(make_runner(setting.model_of("lr_precomputed"), "lr_precomputed", "eager", 0), setting)
    runner = make_runner(setting.model_of("lr_precomputed"), "lr_precomputed", "captured", TRACE.total)
    for _ in range(2):
        assert all(map(torch.equal, texts(runner, setting), expected))
        runner.rewind()
    assert emulated.captures == 3
    captured = []

    def counted(*args):
        before = emulated.captures
        times = replay(*args)
        captured.append(emulated.captures - before)
        return times

    replay = agent_trace.replay
    monkeypatch.setattr(agent_trace, "replay", counted)
    row = Bench().measure(Cell("tiny", "r4", TRACE.total, "captured", "lr_precomputed"), setting)
    # The agents' steps when it warms up, and what comes again later; none in the measured replay; the steps with a new cache.
    assert captured[0] == 3 and sum(captured[:4]) > 3 and captured[4:] == [0, 3]
    assert row["eager_reason"] is None
    assert row["fresh_s"] > 0 and row["first_use_s"] >= 0 and row["rerun_tokens"] == 0


# ---- the script ----------------------------------------------------------------------------------------------------

SMALL = ["--device", "cpu", "--models", "tiny", "--dtype", "float32", "--totals", "200", "--modes", "eager"]


@pytest.mark.integration
def test_the_script_writes_rows_a_table_and_a_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    make = agent_trace.make_runner

    def fails_once(model, variant, mode, room, *now):
        if variant == "base_shared" and room:
            raise RuntimeError("no such cache")
        return make(model, variant, mode, room, *now)

    monkeypatch.setattr(agent_trace, "make_runner", fails_once)
    out = tmp_path / "results.json"
    assert (
        agent_trace.main([*SMALL, "--synthetic", "2", "--adapters", "r8-qv", "--repeats", "2", "--out", str(out)]) == 1
    )
    rows = {row["variant"]: row for row in json.loads(out.read_text())}
    assert set(rows) == set(VARIANTS) and rows.pop("base_shared")["error"] == "RuntimeError: no such cache"
    for variant, row in rows.items():
        assert (
            len(row["end_to_end_runs"]) == 2 and row["end_to_end_s"] in row["end_to_end_runs"] and row["decode_ms"] > 0
        )
        assert (
            row["total"] == 200
            and row["switches"] == 4
            and row["generated"] == sum(t["generated"] for t in row["turns"])
        )
        assert 0 < row["ttft_p50_ms"] <= row["ttft_p95_ms"] and row["peak_bytes"] is None
        assert (row["rerun_tokens"] > 0) == (variant == "non_shared")
        assert row["prefilled_tokens"] == sum(t["prefilled"] for t in row["turns"])
        assert {
            "gpu",
            "torch",
            "triton",
            "transformers",
            "peft",
            "commit",
            "date",
            "dtype",
            "trace",
            "model",
        } <= row.keys()
    arguments = [str(out), "--plot", str(tmp_path / "plot.png"), "--merge", str(tmp_path / "all.json")]
    assert trace_report.main(arguments) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000 and len(json.loads((tmp_path / "all.json").read_text())) == 5
    text = capsys.readouterr().out
    assert (
        "| `lr_precomputed` | eager |" in text
        and "throughput of lr_precomputed, eager, over fully_shared, eager" in text
    )
    # The model is PEFT's alone again.
    assert agent_trace.main([*SMALL, "--adapters", "r8-qv", "--time-budget", "0"]) == 0
    assert capsys.readouterr().out.count("--time-budget is spent") == 5


def test_capacity_fits_and_no_more():
    trace = Trace("five", tuple(Turn(f"agent{i}", 1, 1) for i in range(5)))
    model = setting_of(trace).model_of("")
    sizes = trace_capacity.sizes_of(model, trace.roles)
    assert (sizes.full, sizes.low_rank) == (2 * 2 * 2 * 64 * 4, 2 * (4 + 4) * 4)
    assert sizes.base + 5 * sizes.adapter == sum(p.nbytes for p in model.parameters())
    room = trace_capacity.CARD - trace_capacity.RESERVE
    for way in trace_capacity.WAYS:
        tokens, agents = trace_capacity.fits(sizes, way, agents=3), trace_capacity.fits(sizes, way, tokens=131072)
        assert sizes.total(way, 3, tokens) <= room < sizes.total(way, 3, tokens + 1)
        assert sizes.total(way, agents, 131072) <= room < sizes.total(way, agents + 1, 131072)
    assert trace_capacity.fits(sizes, "non_shared", agents=3, card=1e9) == 0
    row = trace_capacity.fill(model, list(trace.roles), "lr_precomputed", 60, 40, 0)
    assert row["tokens"] == 40 + 2 * 5 - 1 and len(row["ttft_ms"]) == 5
    extra = row["cache_bytes"] - row["tokens"] * sizes.per_token("lr_precomputed", 5)
    # Expanded keys of the agent that ran last (on a CPU), cos and sin of half width, ids and positions.
    assert extra == row["tokens"] * (sizes.full // 2 + 2 * 32 * 4 + 8 + 8)


# ---- what is said about it -----------------------------------------------------------------------------------------


def made_up(variant: str, mode: str = "eager", seconds: float = 10.0, **fields) -> dict:
    row = dict(
        model="m", adapters="a", total=16384, mode=mode, variant=variant, end_to_end_s=seconds, ttft_p50_ms=100.0,
        ttft_p95_ms=100.0, cache_bytes=104, steady_bytes=None, predicted_bytes=100,
    )  # fmt: skip
    return row | fields


def verdicts(rows, capacity=()) -> dict[str, tuple]:
    found = trace_report.musts(rows, capacity)
    assert len({must.what for must in found}) == len(found)
    return {must.what: (must.found, must.passed) for must in found}


def test_what_was_asked_for_is_compared_with_the_right_rows():
    rows = [
        made_up("non_shared", seconds=20.0), made_up("fully_shared"), made_up("fully_shared", "captured", 4.0),
        made_up("lr_precomputed", seconds=10.5, ttft_p95_ms=106.0), made_up("lr_precomputed", "captured", 5.0, steady_bytes=106),
        made_up("base_shared", cache_bytes=94), dict(made_up("base_lr_shared"), error="out of memory"),
        made_up("lr_precomputed", "growing", 6.0), made_up("lr_precomputed", total=4096),
    ]  # fmt: skip
    found = verdicts([row for row in rows if row["total"] == 16384])
    eager, captured = "lr_precomputed, eager, over", "lr_precomputed, captured, over"
    assert found[f"throughput of {eager} fully_shared, eager"] == (pytest.approx(10 / 10.5), True)
    assert found[f"throughput of {captured} fully_shared, captured"] == (0.8, False)
    assert found[f"throughput of {captured} fully_shared, eager"] == (2.0, True)
    assert found[f"TTFT p50 of {eager} fully_shared, eager"] == (1.0, True)
    assert found[f"TTFT p95 of {eager} fully_shared, eager"] == (1.06, False)
    assert found[f"speed of {eager} non_shared, eager"] == (pytest.approx(20 / 10.5), False)
    assert found[f"speed of {captured} non_shared, eager"] == (4.0, True)
    assert found[f"memory in use of {eager} the formula"] == (1.04, True)
    assert found["memory in use of base_shared, eager, over the formula"] == (0.94, False)
    assert found[f"device memory of {captured} the formula"] == (1.06, False)
    assert not any("base_lr_shared" in what for what in found)
    short = trace_report.musts(rows[-1:])
    assert [must.passed for must in short] == [None, None, None, True]
    lines = trace_report.show_musts(trace_report.musts(rows)).splitlines()
    words = [line.split()[0] for line in lines]
    assert words.count("FAIL") == 5 and words.count("not") == 3
    assert words == sorted(words, key=["FAIL", "pass", "not"].index)


def test_capacity_is_judged_and_files_are_merged():
    capacity = [
        dict(
            kind="filled",
            model="m",
            adapters="a",
            agents=20,
            tokens=131072,
            policy="lr_precomputed",
            peak_total_bytes=40e9,
        ),
        dict(
            kind="filled",
            model="m",
            adapters="a",
            agents=20,
            tokens=131072,
            policy="base_lr_shared",
            error="out of memory",
        ),
        dict(kind="most", model="m", adapters="a", policy="non_shared"),
    ]
    found = verdicts([], capacity)
    assert [value for value in found.values()] == [(40.0, True), (None, None)]
    old, new = [made_up("non_shared", seconds=2.0)], [made_up("non_shared", seconds=1.0), made_up("fully_shared")]
    broken = [dict(made_up("fully_shared"), error="x")]
    merged = trace_report.merged([old, new, broken])
    assert [(row["variant"], row["end_to_end_s"]) for row in merged] == [("non_shared", 1.0), ("fully_shared", 10.0)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_modes_run_on_a_gpu(tmp_path):
    out = tmp_path / "results.json"
    assert agent_trace.main(["--models", "tiny", "--totals", "300", "--adapters", "r16-qkvo", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert {(row["mode"], row["variant"]) for row in rows} == set(agent_trace.ORDER)
    assert all(row["steady_bytes"] > 0 and row["peak_bytes"] >= row["steady_bytes"] for row in rows)
    assert not any(row["eager_reason"] for row in rows if row["mode"] != "eager")


def test_the_cpu_version_needs_the_eager_mode(capsys):
    with pytest.raises(SystemExit):
        agent_trace.main(["--cpu", "--modes", "captured"])
    assert "eager only" in capsys.readouterr().err
    assert SharedLoRACache().cuda_graphs
