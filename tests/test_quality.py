"""The replay of examples/quality: it must reproduce what is known before it is believed about anything else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tqdm")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "quality")]
import pareto  # noqa: E402
import replay  # noqa: E402
import what_if  # noqa: E402

from .tiny import activate, agents_model, copy_adapter, lora, reference, share_a, tiny_llama, with_adapters  # noqa: E402

ROLES = list(replay.ROLES)
POLICIES = ["non_shared", "fully_shared", "base_shared", "lr_precomputed"]


class Letters:
    """A tokenizer of one token per letter."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [1 + ord(letter) % 60 for letter in text]}


def episode(name="one", extra=""):
    return {
        "episode_id": name,
        "prompt": "Answer the question." + extra,
        "turns": [
            {"role": "plan", "kind": "thought", "cue": "T:", "text": "look it up\n"},
            {"role": "action", "kind": "argument", "cue": "", "text": "rivers]"},
            {"role": "observation", "text": "A river is long."},
            {"role": "plan", "kind": "thought", "cue": "T:", "text": "done\n"},
            {"role": "reflect", "kind": "verdict", "cue": "R:", "text": "right]"},
        ],
    }


def rows_of(model, policies=POLICIES, episodes=None):
    texts = [replay.encode(Letters(), e) for e in episodes or [episode(), episode("two", " Twice.")]]
    return [row for text in texts for row in replay.replay(model, text, policies, chunk=7)]


def test_encoding_and_joining():
    one, two = replay.encode(Letters(), episode()), replay.encode(Letters(), episode("two", "!"))
    assert one.ids.shape[1] == sum(
        len(t)
        for t in ("Answer the question.", "T:look it up\n", "rivers]", "A river is long.", "T:done\n", "R:right]")
    )
    assert [(t.role, t.start, t.stop) for t in one.turns] == [
        ("plan", 22, 33),
        ("action", 33, 40),
        ("plan", 58, 63),
        ("reflect", 65, 71),
    ]
    joined = replay.join([one, two, one], 150)
    assert [t.ids.shape[1] for t in joined] == [71 + 72, 71]
    assert joined[0].turns[4].start == 71 + 23 and torch.equal(joined[0].ids[:, 71:], two.ids)


def test_exact_is_pefts_plain_loss():
    model = with_adapters(tiny_llama(torch.float32), ROLES)
    rows = [row for row in rows_of(model, episodes=[episode()]) if row["policy"] == "non_shared"]
    text = replay.encode(Letters(), episode())
    for row, turn in zip(rows, text.turns, strict=True):
        activate(model, turn.role)
        logits = reference(model, text.ids)[0, turn.start - 1 : turn.stop - 1]
        loss = float(F.cross_entropy(logits, text.ids[0, turn.start : turn.stop], reduction="sum"))
        assert row["nll"] == pytest.approx(loss, abs=1e-5 * row["tokens"])
        assert row["role"] == turn.role and row["tokens"] == turn.stop - turn.start


def test_equal_adapters_have_no_gap_and_keep_all():
    model = with_adapters(tiny_llama(), ROLES)
    for role in ROLES[1:]:
        copy_adapter(model, ROLES[0], role)
    summary = replay.summarise(rows_of(model, [*POLICIES, "base_lr_shared"]))
    for policy in (*POLICIES, "base_lr_shared"):
        assert abs(summary[policy]["all"]["gap"]) < 1e-10 and summary[policy]["all"]["kept"] == pytest.approx(1)
    assert summary["base_model"]["all"]["kept"] == 0.0


def test_a_shuffled_adapter_has_a_large_gap():
    model = with_adapters(tiny_llama(), ROLES)
    # Adapters that predict the text: the one of another role is worse at it.
    text = replay.encode(Letters(), episode())
    for role in ROLES:
        activate(model, role)
        for p in model.parameters():
            p.requires_grad_(False)
        own = [p for n, p in model.named_parameters() if f".{role}." in n]
        for p in own:
            p.requires_grad_(True)
        optimiser = torch.optim.Adam(own, lr=0.02)
        for _ in range(30):
            logits = model(input_ids=text.ids).logits[0]
            loss = sum(
                F.cross_entropy(logits[t.start - 1 : t.stop - 1], text.ids[0, t.start : t.stop])
                for t in text.turns if t.role == role
            )  # fmt: skip
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    right = replay.summarise(rows_of(model, ["non_shared"], [episode()]))["non_shared"]["all"]
    shuffled = {a: b for a, b in zip(ROLES, [*ROLES[1:], ROLES[0]], strict=True)}
    wrong_turns = [dict(t, role=shuffled.get(t["role"], t["role"])) for t in episode()["turns"]]
    wrong = replay.summarise(rows_of(model, ["non_shared"], [dict(episode(), turns=wrong_turns)]))["non_shared"]["all"]
    assert wrong["nll"] > right["nll"] + 1.0


def test_summary_groups_and_intervals():
    summary = replay.summarise(rows_of(agents_model(ROLES)))
    groups = summary["base_shared"]
    assert set(groups) == {"all", *ROLES, "plan/thought", "action/argument", "reflect/verdict"}
    assert groups["all"]["turns"] == 8 and groups["all"]["texts"] == 2
    assert groups["all"]["tokens"] == sum(groups[role]["tokens"] for role in ROLES)
    low, high = groups["all"]["gap_interval"]
    assert low <= groups["all"]["gap"] <= high
    # Known answer: numerators 1 and 3 of 2 each; means of resamples are 0.5, 1 or 1.5.
    assert replay.interval(np.array([[1.0, 2.0], [3.0, 2.0]])) == (0.5, 1.5)


def test_the_script(tmp_path, monkeypatch, capsys):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(episode(n)) for n in ("one", "two", "three")))
    monkeypatch.setattr(replay, "load", lambda folder, name, dtype, device: (agents_model(ROLES), Letters()))
    replay.main(
        [
            "--data",
            str(tmp_path / "data.jsonl"),
            "--output",
            str(tmp_path / "out"),
            "--sets",
            "shared_a",
            "--episodes",
            "2",
        ]
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["summary"]["shared_a"]) == {"base_model", *replay.POLICIES["shared_a"]}
    assert summary["about"]["episodes"] == 2
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == 2 * 4 * 6
    assert "base_lr_shared" in capsys.readouterr().out
    private = "base_shared+private:1-2"
    arguments = ["--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "out"), "--sets", "shared_a"]
    replay.main([*arguments, "--policies", private])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["summary"]["shared_a"]
    assert list(summary) == ["base_model", "non_shared", private]
    assert summary[private]["all"]["kept"] == pytest.approx(1) and summary[private]["all"]["texts"] == 3
    with pytest.raises(SystemExit):
        replay.main([*arguments, "--policies", "base_shared+private"])


def test_simulation_by_hooks_agrees_with_the_cache():
    """Independent of the cache: hooks on plain PEFT, the whole text at every turn."""
    texts = [replay.encode(Letters(), e) for e in (episode(), episode("two", " Twice."))]
    model = agents_model(ROLES)
    layers = range(model.config.num_hidden_layers)
    variants = dict(base_shared={}, neutral=dict(neutral=True), private=dict(private=layers), first=dict(private=[0]))
    simulated = [row for text in texts for row in what_if.simulate(model, text, variants)]

    def nll(rows, policy):
        return torch.tensor([row["nll"] for row in rows if row["policy"] == policy], dtype=torch.float64)

    exact = nll(simulated, "non_shared")
    # All layers private: exact. The first one: no difference, its K and V are exact anyway.
    torch.testing.assert_close(nll(simulated, "private"), exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(nll(simulated, "first"), nll(simulated, "base_shared"), rtol=0, atol=1e-9)
    assert (nll(simulated, "base_shared") - exact).abs().max() > 1e-3
    assert (nll(simulated, "neutral") - nll(simulated, "base_shared")).abs().max() > 1e-3
    rows = [row for text in texts for row in replay.replay(model, text, ["non_shared", "base_shared"], chunk=7)]
    for policy in ("base_model", "non_shared", "base_shared"):
        torch.testing.assert_close(nll(simulated, policy), nll(rows, policy), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", ["0", "1", "1-2", "0,2", "0-2"])
def test_private_layers_agree_with_the_simulation(layers):
    """K and V of private layers by hooks on plain PEFT, the whole text at every turn, against the cache's."""
    policy = f"base_shared+private:{layers}"
    texts = [replay.encode(Letters(), e) for e in (episode(), episode("two", " Twice."))]
    model = with_adapters(tiny_llama(), ROLES)
    private = replay.policy_arguments(policy)["private_layers"]
    simulated = [row for text in texts for row in what_if.simulate(model, text, {policy: dict(private=private)})]
    rows = [row for text in texts for row in replay.replay(model, text, ["non_shared", policy], chunk=7)]
    nll = {
        which: torch.tensor([row["nll"] for row in found if row["policy"] == name], dtype=torch.float64)
        for which, found, name in [
            ("simulated", simulated, policy), ("cache", rows, policy), ("exact", rows, "non_shared"),
        ]
    }  # fmt: skip
    torch.testing.assert_close(nll["cache"], nll["simulated"], rtol=0, atol=1e-9)
    # Layer 0 is exact anyway: the base part of its K and V is that of the embeddings.
    assert (float((nll["cache"] - nll["exact"]).abs().max()) < 1e-9) == (layers in ("1-2", "0-2"))


def test_policies_by_name():
    arguments = replay.policy_arguments
    assert arguments("base_shared+private:0,8-10,2") == dict(sharing="base_shared", private_layers=[0, 8, 9, 10, 2])
    assert arguments("lr_precomputed") == dict(sharing="lr_precomputed") and arguments("non_shared") == {}
    for name in (
        "lr_precomputed+private:8-21", "base_shared+private:", "base_shared+private:21-8", "base_shared+private:-3",
        "base_shared+private:a", "shared", "base_shared+8",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="policy '" + name.replace("+", r"\+")):
            arguments(name)


def test_the_simulation_script(tmp_path, monkeypatch, capsys):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(episode(n)) for n in ("one", "two")))
    monkeypatch.setattr(what_if, "load", lambda folder, name, dtype, device: (agents_model(ROLES), Letters()))
    out = tmp_path / "out"
    what_if.main(["--data", str(tmp_path / "data.jsonl"), "--output", str(out), "--private", "1-1", "--neutral"])
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"base_model", "non_shared", "base_shared", "neutral", "private 1-1"}
    assert summary["private 1-1"]["all"]["texts"] == 2
    assert "private 1-1" in capsys.readouterr().out


def test_costs_are_those_of_the_caches():
    """Counted from the lengths of turns, against the caches themselves."""
    config = dict(r=3, rank_pattern={}, alpha_pattern={})
    model = with_adapters(tiny_llama(), {role: lora(**config) for role in ROLES})
    share_a(model, ROLES)
    text = replay.encode(Letters(), episode())
    text.turns.append(replay.Turn("plan", "", 71, 74))
    text = replay.Text(text.name, torch.cat((text.ids, text.ids[:, :3]), 1), text.turns)
    policies = [*replay.POLICIES["shared_a"], "base_shared+private:1", "base_shared+private:0-2"]
    shape = pareto.Shape(layers=3, width=2 * 2 * 8, rank=2 * 3)
    caches = replay.replays(model, policies, 7)
    for turn in text.turns:
        activate(model, turn.role)
        for cache in caches.values():
            cache.turn(turn.role, text.ids, turn.start, turn.stop)
    for name, cache in caches.items():
        cost = pareto.cost(text, name, shape)
        assert cost.tokens == 74 and cost.rerun == cache.run - 74, name
        stored = cache.memory() if not hasattr(cache, "cache") else 0
        if not stored:
            footprint = cache.cache.memory_footprint()
            stored = footprint["base"] + sum(footprint["low_rank"].values()) + sum(footprint["private"].values())
        assert cost.numbers * 8 == stored, name
        assert cost.one_cache * 8 == 74 * 3 * 32 * 8


def test_the_pareto_script(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    benchmarks = EXAMPLES.parent / "docs" / "benchmarks"
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(episode(str(n))) for n in range(50)))
    monkeypatch.setattr(pareto, "load_smollm2", lambda: (tiny_llama(num_hidden_layers=30), Letters()))
    arguments = ["--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "out")]
    pareto.main(arguments)
    # What was measured with the cache takes the place of what was simulated before.
    found = json.loads((tmp_path / "out.json").read_text())["points"]
    assert sum(p["policy"] == "base_shared+private:8-21" for p in found) == 1 and not any(p["simulated"] for p in found)
    # Without that measurement the simulation stands in for it.
    measured = json.loads((benchmarks / "quality_dev50.json").read_text())
    for name in [name for name in measured["summary"]["separate"] if "private" in name]:
        del measured["summary"]["separate"][name]
    (tmp_path / "replay.json").write_text(json.dumps(measured))
    pareto.main([*arguments, "--replays", str(tmp_path / "replay.json")])
    assert (tmp_path / "out.png").stat().st_size > 10000
    result = json.loads((tmp_path / "out.json").read_text())
    found = {(p["adapters"], p["policy"], p["episodes"]): p for p in result["points"]}
    quality = json.loads((benchmarks / "quality_what_if.json").read_text())["12 episodes"]["private 8-21"]["all"]
    private = found["separate", "base_shared+private:8-21", 12]
    assert private["kept"] == quality["kept"] and private["simulated"]
    exact, shared = found["separate", "non_shared", 50], found["separate", "fully_shared", 50]
    assert exact["kept"] == 1 and exact["rerun_per_token"] == private["rerun_per_token"] > 1 > shared["rerun_per_token"]
    assert (
        shared["copies"] == 1 < found["separate", "base_shared", 50]["copies"] < private["copies"] < exact["copies"] < 3
    )
    (tmp_path / "data.jsonl").write_text(json.dumps(episode()))
    with pytest.raises(ValueError, match="measured on 50 episodes, the data has 1"):
        pareto.main(arguments)
