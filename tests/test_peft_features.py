"""What PEFT and Transformers can make of adapters, against PEFT with a ``DynamicCache``."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from lora_shared_cache import SharedLoRACache, graphs

from .conftest import emulate_graphs
from .test_mixed_batches import RowsAlone
from .tiny import (
    activate,
    assert_equal_logits,
    difference,
    feed,
    fill_adapter,
    logits,
    lora,
    ones,
    reference,
    tiny_llama,
    tokens,
    twin,
    with_adapters,
)

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

PLAIN = dict(rank_pattern={}, alpha_pattern={})


def assert_as_peft(model, name):
    plain = twin(model)
    activate(plain, None)
    base = reference(plain, tokens(12))
    activate(plain, name)
    expected = reference(plain, tokens(12))
    assert difference(expected, base) > 0.05
    activate(model, name)
    for sharing in ("base_shared", "lr_precomputed"):
        assert_equal_logits(feed(model, tokens(12), SharedLoRACache(sharing=sharing), [6, 5, 1]), expected)


@pytest.mark.parametrize(
    "how",
    [
        "linear",
        "cat",
        "svd",
        "ties",
        "ties_svd",
        "dare_linear",
        "dare_ties_svd",
        "magnitude_prune",
        "magnitude_prune_svd",
    ],
)
def test_a_weighted_adapter(how):
    """Made in the middle of a trajectory, and made again with other weights under the same name."""
    model = with_adapters(tiny_llama(), {"one": lora(**PLAIN), "two": lora(**PLAIN)})
    cache = SharedLoRACache()
    logits(model, tokens(12)[:, :5], cache)
    for weights in ([0.7, 0.4], [0.2, -0.9]):
        model.add_weighted_adapter(["one", "two"], weights, "mix", combination_type=how, density=0.6)
        model.eval()
        assert_as_peft(model, "mix")
        logits(model, tokens(12)[:, :9], cache, attention_mask=ones(9))
        assert cache.coverage()["mix"] == 9
        model.delete_adapter("mix")
    assert "mix" not in cache.coverage()


def test_replicated_layers():
    """Several attention layers with one base and LoRAs of their own."""
    model = get_peft_model(tiny_llama(), lora(layer_replication=[[0, 2], [1, 3]], **PLAIN), adapter_name="one")
    model.add_adapter("two", lora(target_modules=["q_proj", "v_proj"], **PLAIN))
    for index, name in enumerate(("one", "two")):
        fill_adapter(model, name, index)
    model.eval()
    assert len(model.get_base_model().model.layers) == 4
    for name in ("one", "two"):
        assert_as_peft(model, name)


def test_an_adapter_of_another_rank_is_swapped_in(tmp_path):
    """``prepare_model_for_compiled_hotswap`` pads the rank, and makes the scaling a tensor."""
    with_adapters(tiny_llama(), {"one": lora(r=2, **PLAIN)}, seed=3).save_pretrained(tmp_path)
    model, cache = with_adapters(tiny_llama(), {"one": lora(**PLAIN)}), SharedLoRACache()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert_as_peft(model, "one")
    logits(model, tokens(9), cache)
    hotswap_adapter(model, str(tmp_path / "one"), "one")
    assert cache.coverage()["one"] == 0
    expected = reference(twin(model), tokens(12))
    assert_equal_logits(logits(model, tokens(12), cache, attention_mask=ones(12)), expected)


def test_an_adapter_under_another_name(tmp_path):
    """PEFT can't rename: loaded again, and the old one deleted. Its tokens stay, being of the same weights or not."""
    model, cache = with_adapters(tiny_llama(), ["one", "two"]), SharedLoRACache()
    logits(model, tokens(9), cache)
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path / "one"), adapter_name="first")
    model.delete_adapter("one")
    activate(model.eval(), "first")
    expected = reference(twin(model), tokens(12))
    assert_equal_logits(logits(model, tokens(12), cache, attention_mask=ones(12))[:, -3:], expected[:, -3:])
    assert cache.coverage() == {"__base__": 12, "first": 12, "two": 0}


def test_every_method_of_transformers_own(tmp_path):
    with_adapters(tiny_llama(), {"one": lora(), "two": lora(r=2, rank_pattern={})}).save_pretrained(tmp_path)
    model, plain, cache = tiny_llama(), tiny_llama(), SharedLoRACache()

    def load(name, **settings):
        return lambda m: m.load_adapter(str(tmp_path / name), adapter_name=name, **settings)

    steps = [
        (load("one"), load("two"), lambda m: m.eval().set_adapter("one")),
        (lambda m: m.set_adapter("two"),),
        (lambda m: m.set_adapter(["one", "two"]),),
        (lambda m: m.disable_adapters(),),
        (lambda m: m.enable_adapters(),),
        (lambda m: m.set_adapter("two"), lambda m: m.delete_adapter("one")),
        (load("two", hotswap=True),),
        (load("one"), lambda m: m.eval().set_adapter("one")),
    ]
    for n, methods in enumerate(steps, 4):
        for m in (model, plain):
            for method in methods:
                method(m)
        expected = reference(plain, tokens(n))
        assert_equal_logits(feed(model, tokens(n), SharedLoRACache(), [n - 1, 1]), expected)
        # On one cache for all: what it covers at each step.
        logits(model, tokens(n), cache, attention_mask=ones(n))
        assert cache.trajectory_length == n
    assert cache.coverage() == {"__base__": 11, "one": 11, "two": 10}


# Captured steps multiply with the A's and B's of all rows at once where layers are plain LoRA; here they are not.
NOT_PLAIN = {
    "other_layers": {"one": lora(layers_to_transform=[0]), "two": lora(layers_to_transform=[1, 2], **PLAIN)},
    "dropout": {"one": lora(lora_dropout=0.1), "two": lora(lora_dropout=0.0)},
    "rslora": {"one": lora(use_rslora=True), "two": lora()},
    "dora_elsewhere": {
        "one": lora(target_modules=["k_proj", "v_proj"]),
        "two": lora(use_dora=True, target_modules=["o_proj", "q_proj"], **PLAIN),
    },
    "embeddings": {
        "one": lora(target_modules=["k_proj", "v_proj", "embed_tokens", "lm_head"]),
        "two": lora(),
    },
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_captured_steps_of_rows_whose_layers_are_not_plain(kind, monkeypatch):
    emulated = emulate_graphs(monkeypatch, graphs)
    names = ["one", "one", "__base__"] if kind == "dora_elsewhere" else ["one", "two", "__base__", "one"]
    model = with_adapters(tiny_llama(), NOT_PLAIN[kind])
    ids, cache = tokens(14, rows=len(names)), SharedLoRACache()
    alone = RowsAlone(twin(model), names)
    for part in ids.split((7, 1, 1, 1, 1, 1, 1, 1), dim=1):
        assert_equal_logits(logits(model, part, cache, adapter_names=names), alone.feed(part))
    assert emulated.replays > 3
