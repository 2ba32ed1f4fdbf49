"""The report on a model's own adapters: its numbers, what it leaves behind, what it refuses."""

from __future__ import annotations

import builtins
import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F

from lora_shared_cache import SharedCacheError, UnsupportedAdapterError, attach, detach, sharing_report

from .tiny import (
    activate,
    agents_model,
    copy_adapter,
    fill_adapter,
    lora,
    reference,
    tiny_llama,
    tokens,
    with_adapters,
)

NAMES = ["plan", "act", "reflect"]
TURNS = [("plan", 9), ("act", 5), ("plan", 4), ("reflect", 6), ("act", 3)]


def model_with(names=NAMES):
    return with_adapters(tiny_llama(), list(names))


def turns(seed=0):
    ids = tokens(sum(n for _, n in TURNS), seed=seed)
    return [(name, part) for (name, _), part in zip(TURNS, ids.split([n for _, n in TURNS], dim=1), strict=True)]


def report(model, text=None, **options):
    return sharing_report(model, turns() if text is None else text, progress=False, **options)


@pytest.mark.parametrize("chunk", [512, 4])
def test_exact_loss_is_pefts(chunk):
    model = model_with()
    result = report(model, chunk=chunk)
    ids, start, total = torch.cat([part for _, part in turns()], dim=1), 0, 0.0
    for index, (name, part) in enumerate(turns()):
        stop = start + part.shape[1]
        if index:
            activate(model, name)
            logits = reference(model, ids[:, :stop])[0, start - 1 : -1]
            total += float(F.cross_entropy(logits, ids[0, start:stop], reduction="sum"))
        start = stop
    exact = result.policies["non_shared"]
    assert exact.loss == pytest.approx(total / result.scored, abs=1e-10)
    assert (exact.kl, exact.top1, exact.loss_difference) == (pytest.approx(0, abs=1e-12), 1.0, 0.0)
    assert result.scored == 18 and result.tokens == 27


def test_equal_adapters_lose_nothing_and_different_ones_do():
    model = model_with()
    apart = report(model)
    for name in NAMES[1:]:
        copy_adapter(model, "plan", name)
    equal = report(model)
    assert set(equal.policies) == {"non_shared", "fully_shared", "base_shared", "base_lr_shared", "lr_precomputed"}
    for result in equal.policies.values():
        assert result.kl < 1e-12 and result.top1 == 1.0 and abs(result.loss_difference) < 1e-10
    assert all(row.key_similarity > 1 - 1e-6 and row.value_similarity > 1 - 1e-6 for row in equal.layers)
    assert "base_lr_shared" in apart.skipped and "base_lr_shared" not in apart.policies
    for name in ("fully_shared", "base_shared", "lr_precomputed"):
        assert apart.policies[name].kl > 1e-3
    # What is shared is the base part, and layer 0 reads the same embeddings.
    assert apart.layers[0].key_similarity > 1 - 1e-6 and apart.layers[0].value_similarity > 1 - 1e-6
    assert apart.layers[2].key_similarity < 0.999
    assert apart.policies["base_shared"].kl < apart.policies["fully_shared"].kl


def test_a_worse_mismatch_shows_as_a_larger_gap():
    mild, wild = model_with(), model_with()
    for index, name in enumerate(NAMES):
        fill_adapter(mild, name, index, strength=0.05)
        fill_adapter(wild, name, index, strength=1.0)
    assert report(mild).policies["base_shared"].kl * 10 < report(wild).policies["base_shared"].kl


def test_low_rank_size_is_that_of_the_adapters():
    model = model_with(["plan"])
    model.add_adapter("act", lora(target_modules=["v_proj"]))
    fill_adapter(model, "act", 5)
    result = report(model, [("plan", tokens(6)), ("act", tokens(4))])
    sizes = []
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    x = model.base_model.model.model.layers[0].input_layernorm(
        model.get_input_embeddings()(torch.cat([tokens(6), tokens(4)], 1))
    )
    for name in ("plan", "act"):
        delta = layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](x))
        sizes.append((delta.norm(dim=-1) / layer.base_layer(x).norm(dim=-1)).mean())
    assert result.layers[0].value_low_rank == pytest.approx(float(sum(sizes) / 2), rel=1e-5)


def test_rerun_tokens_and_memory():
    result = report(agents_model(NAMES), policies=["non_shared", "base_lr_shared", "lr_precomputed", "base_shared"])
    rerun = {name: r.rerun_tokens for name, r in result.policies.items()}
    # One token before each of the four later turns, and nothing else.
    assert rerun["base_lr_shared"] == rerun["lr_precomputed"] == 4
    # act runs plan's 9, plan act's 5, reflect all 18, act 4 + 6.
    assert rerun["non_shared"] == 9 + 5 + 18 + 10
    assert rerun["base_shared"] == rerun["non_shared"]
    memory = {name: r.memory_bytes for name, r in result.policies.items()}
    per_token = 3 * 2 * 2 * 8 * 8  # layers, K and V, heads, head size, bytes
    assert memory["non_shared"] == (18 + 27 + 24) * per_token
    assert memory["base_lr_shared"] < memory["lr_precomputed"] < memory["non_shared"]


def test_private_layers_are_between_base_shared_and_exact():
    policies = ["non_shared", "base_shared", "base_shared+private:1", "base_shared+private:0-2"]
    found = report(model_with(), policies=policies).policies
    assert list(found) == policies
    exact, shared, some, everything = found.values()
    assert everything.kl < 1e-12 and everything.top1 == 1.0 and 0 < some.kl < shared.kl
    assert exact.rerun_tokens == shared.rerun_tokens == some.rerun_tokens == everything.rerun_tokens
    assert shared.memory_bytes < some.memory_bytes < everything.memory_bytes
    with pytest.raises(ValueError, match="policy 'lr_precomputed\\+private:1' is unknown"):
        report(model_with(), policies=["lr_precomputed+private:1"])


def test_the_model_is_left_as_it_was():
    model = model_with()
    model.train()
    model.set_adapter("act")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    report(model)
    assert model.training and model.active_adapter == "act"
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        assert not hasattr(module, "lora_A") or module.active_adapters == ["act"]
    attach(model)
    with model.disable_adapter():
        report(model)
        assert all(m.disable_adapters for m in model.modules() if hasattr(m, "lora_A"))
    detach(model)


def test_texts_are_cut_into_turns():
    class Tokenizer:
        def __call__(self, text, return_tensors, add_special_tokens):
            assert return_tensors == "pt" and not add_special_tokens
            return type("Encoding", (), {"input_ids": torch.tensor([[1 + ord(c) % 60 for c in text]])})

    model = model_with()
    result = report(model, "a text of some length", tokenizer=Tokenizer(), policies=["base_shared"])
    assert result.adapters == NAMES and result.tokens == 21 and list(result.policies) == ["base_shared"]
    assert report(model, [("plan", "one"), ("act", "two")], tokenizer=Tokenizer()).scored == 3
    assert report(model, tokens(24), adapters=["act", "plan"]).adapters == ["act", "plan"]


def test_output(monkeypatch, capsys):
    result = report(model_with())
    data = json.loads(json.dumps(result.to_dict()))
    assert data["policies"]["base_shared"]["kl"] == result.policies["base_shared"].kl
    text = str(result)
    assert "fully_shared" in text and "base_lr_shared: " in text and "K similarity" in text
    assert "base_shared" in result._repr_html_()
    # In a notebook rich shows what it is given at once, and the texts were empty.
    monkeypatch.setattr(builtins, "get_ipython", type("ZMQInteractiveShell", (), {}), raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert str(result) == text and "\x1b" not in text
    assert "base_shared" in result._repr_html_() and not capsys.readouterr().out
    pytest.importorskip("matplotlib")
    left, right = result.plot().axes
    assert len(left.lines) == 2 and len(left.lines[0].get_xdata()) == 3
    assert {t.get_text() for t in right.get_legend().get_texts()} == set(result.policies)


def test_wrong_arguments_are_named():
    model = model_with()
    with pytest.raises(UnsupportedAdapterError, match=r"\['critic'\] are not loaded"):
        report(model, [("critic", tokens(3)), ("plan", tokens(3))])
    with pytest.raises(ValueError, match="policy 'best' is unknown"):
        report(model, policies=["best"])
    with pytest.raises(ValueError, match="needs tokenizer="):
        report(model, "text")
    with pytest.raises(ValueError, match="1 turns with tokens, expected two or more"):
        report(model, [("plan", tokens(3))])
    with pytest.raises(ValueError, match=r"token ids are torch.float32 \(1, 3\)"):
        report(model, torch.ones(1, 3))
    with pytest.raises(SharedCacheError, match="share"):
        report(model, policies=["base_lr_shared"])


def test_what_cannot_be_split_is_an_error_and_not_a_skipped_policy():
    model = model_with(["plan"])
    model.add_adapter("act", lora(use_dora=True))
    with pytest.raises(UnsupportedAdapterError, match="DoRA"):
        report(model, [("plan", tokens(4)), ("act", tokens(4)), ("plan", tokens(2))])


def test_command(tmp_path, capsys, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    from lora_shared_cache.__main__ import main

    words = {word: i for i, word in enumerate("? the cat sat on a mat and slept all day".split())}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?").save_pretrained(tmp_path / "base")
    tiny_llama(torch.float32).save_pretrained(tmp_path / "base")
    with_adapters(tiny_llama(torch.float32), ["plan", "act"]).save_pretrained(tmp_path / "adapters")
    (tmp_path / "text").write_text("the cat sat on the mat and slept all day and the cat sat on a mat")
    arguments = ["report", "--model", str(tmp_path / "base"), "--text", str(tmp_path / "text"), "--adapters"]
    adapters = [f"{name}={tmp_path / 'adapters' / name}" for name in ("plan", "act")]
    main([*arguments, *adapters, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")])
    assert "fully_shared" in capsys.readouterr().out
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["adapters"] == ["plan", "act"] and data["tokens"] == 17
    assert (tmp_path / "out.png").stat().st_size > 1000
    main(
        [
            *arguments,
            *adapters,
            "--policies",
            "non_shared",
            "base_shared+private:1",
            "--json",
            str(tmp_path / "out.json"),
        ]
    )
    assert list(json.loads((tmp_path / "out.json").read_text())["policies"]) == ["non_shared", "base_shared+private:1"]
    for wrong, message in (
        ([*adapters, "--policies", "base_shared+private:x"], "'x' is no layer"),
        (["plan"], "'plan' is not NAME=PATH"),
        ([f"plan={tmp_path / 'nowhere'}"], "nowhere"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *wrong])
        assert stopped.value.code not in (0, None)
        assert message in (str(stopped.value.code) + capsys.readouterr().err)
    # Said before the replay, which may take minutes.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="--plot needs matplotlib: pip install matplotlib"):
        main([*arguments, *adapters, "--plot", str(tmp_path / "none.png")])
