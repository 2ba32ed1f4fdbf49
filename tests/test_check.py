"""``python -m lora_shared_cache check``: what it says is what the library does, from config and adapter files alone."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import LoraConfig

from lora_shared_cache.__main__ import main
from lora_shared_cache.check import check

from .test_families import FAMILIES, build
from .tiny import lora, share_a, tiny_llama, with_adapters

pytestmark = pytest.mark.filterwarnings("ignore")
KV = dict(target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern={}, alpha_pattern={})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Configs and adapters on disk, and no weights of the base model: nothing may ask for them."""
    root = tmp_path_factory.mktemp("models")
    for shared in (False, True):
        model = with_adapters(tiny_llama(torch.float32), {"plan": lora(r=4, **KV), "act": lora(r=6, **KV)})
        if shared:
            model = with_adapters(tiny_llama(torch.float32), {name: lora(r=4, **KV) for name in ("plan", "act")})
            share_a(model, ["plan", "act"])
        model.get_base_model().config.save_pretrained(root / "base")
        model.save_pretrained(root / ("shared" if shared else "separate"))
    return root


def adapters(saved, which):
    return {name: saved / which / name for name in ("plan", "act")}


def test_a_plain_model_and_its_memory(saved):
    result = check(saved / "base", adapters(saved, "separate"))
    assert result.possible and not result.refused
    assert result.attention == {"LlamaAttention": 3}
    assert result.error < 1e-5
    assert result.policies == ["base_shared", "lr_precomputed"] and result.shared_a is False
    assert result.ranks == {"plan": 8, "act": 12}
    # Two projections of two heads of eight, three layers, two bytes: the config names no dtype.
    assert result.bytes_per_token == {"base": 2 * 16 * 3 * 2, "low_rank": {"plan": 8 * 3 * 2, "act": 12 * 3 * 2}}
    memory = result.memory(100)
    assert memory == {"shared": 100 * (192 + 48 + 72), "non_shared": 100 * 192 * 2}


def test_adapters_that_share_a(saved):
    result = check(saved / "base", adapters(saved, "shared"))
    assert result.shared_a is True and result.policies[0] == "base_lr_shared"
    assert result.memory(1) == {"shared": 192 + 48, "non_shared": 384}


def test_without_adapters_a_common_lora_is_assumed(saved):
    result = check(saved / "base")
    assert result.possible and set(result.ranks.values()) == {32.0}
    assert "assumed" in result.notes[0]


def test_a_fused_projection(tmp_path):
    config = transformers.Phi3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=5, vocab_size=64, intermediate_size=32,
        pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    result = check(tmp_path)
    assert result.possible and result.error < 1e-5 and "qkv_proj, o_proj" in result.notes[0]
    # Two heads of eight for k and as many for v; one down-projection of rank 16 for both.
    assert result.bytes_per_token == {"base": 2 * 16 * 5 * 2, "low_rank": dict.fromkeys(("one", "two"), 16 * 5 * 2)}


def test_what_norms_of_keys_take(tmp_path):
    build("Phi with norms", **FAMILIES["Phi with norms"]).config.save_pretrained(tmp_path)
    result = check(tmp_path)
    # Two layers, two heads: two numbers in float32 and one in bfloat16 for the bias; one of the base's.
    numbers = {name: 2 * 2 * (2 * 4 + 2) for name in ("one", "two")}
    assert result.bytes_per_token["norms"] == numbers and result.bytes_per_token["norms_of_base"] == 2 * 2 * 4
    others = result.bytes_per_token["base"] + sum(result.bytes_per_token["low_rank"].values())
    assert result.memory(10)["shared"] == 10 * (others + 2 * 40 + 16)
    assert "normalised" in result.notes[-1] and "two 40" in result.notes[-1]


def test_every_kind_of_layer_is_tried(tmp_path):
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4096, layer_types=["full_attention"] * 5 + ["sliding_attention"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    result = check(tmp_path)
    assert result.attention == {"Gemma2Attention": 6} and "sliding window of 4096" in result.notes[-1]
    # As two DynamicCaches hold them, and never less than is held here.
    base, context = result.bytes_per_token["base"], 100_000
    memory = result.memory(context)
    assert memory["non_shared"] == pytest.approx(2 * base / 6 * (5 * context + 4095))
    per_token = base + sum(result.bytes_per_token["low_rank"].values())
    assert memory["shared"] > per_token / 6 * (5 * context + 2 * 4096)
    assert memory["shared"] < per_token * context


REFUSED = {
    "latent": (lambda: transformers.DeepseekV3Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=4,
                                                     num_hidden_layers=2, vocab_size=64, intermediate_size=32, n_group=1,
                                                     topk_group=1, first_k_dense_replace=2), "DeepseekV3Attention", "latent"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_the_librarys(name, tmp_path, capsys):
    make, *words = REFUSED[name]
    make().save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["check", "--model", str(tmp_path), "--json", str(tmp_path / "found.json")])
    assert stop.value.code == 1
    printed = " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "found.json").read_text())
    for word in (*words, "refused", "can not share"):
        assert word in printed
    assert found["possible"] is False and found["policies"] == []


@pytest.mark.parametrize(
    "settings, words",
    [(dict(use_dora=True), "DoRA"), (dict(bias="all"), "bias"), (dict(init_lora_weights="pissa"), "pissa")],
)
def test_adapters_that_can_not_be_split(saved, tmp_path, settings, words):
    config = LoraConfig(**{**lora(**KV).to_dict(), **settings})
    for name in ("plan", "act"):
        config.save_pretrained(tmp_path / name)
    result = check(saved / "base", {name: tmp_path / name for name in ("plan", "act")})
    assert not result.possible and words in result.refused[0]


def test_the_command(saved, capsys):
    named = [f"{name}={path}" for name, path in adapters(saved, "separate").items()]
    main(["check", "--model", str(saved / "base"), "--adapters", *named])
    assert "can share a cache" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="OSError"):
        main(["check", "--model", str(saved / "nothing")])
