"""Adapters that share A: prepared for training, and projected from trained ones."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from lora_shared_cache import SharedLoRACache, UnsupportedAdapterError, project_to_shared_a, share_down_projections

from .tiny import (
    EXACT,
    activate,
    assert_equal_logits,
    logits,
    lora,
    ones,
    reference,
    tiny_llama,
    tokens,
    with_adapters,
)

NAMES = ("plan", "act")


def fresh(**settings) -> PeftModel:
    """Two adapters as PEFT makes them: random A's of their own, B = 0."""
    model = PeftModel(tiny_llama(), lora(**settings), adapter_name="plan")
    model.add_adapter("act", lora(**settings))
    return model


def apart() -> PeftModel:
    """Two filled adapters whose A's have nothing in common."""
    return with_adapters(tiny_llama(), list(NAMES))


def layers(model, *targets):
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and path.rpartition(".")[2] in targets
    ]


def policy(model) -> str:
    cache = SharedLoRACache()
    ids = tokens(9)
    for name in NAMES:
        activate(model, name)
        logits(model, ids, cache)
    return cache.policy


def trained(model, name: str, steps: int = 2) -> None:
    """A few steps of what everybody does, weight decay included."""
    model.train()
    model.set_adapter(name)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    ids = tokens(12, seed=hash(name) % 100)
    for _ in range(steps):
        optimiser.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimiser.step()
    model.eval()


# ---- share_down_projections ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["orthogonal", "kaiming"])
def test_frozen_shared_a_survives_training_and_is_recognised(init):
    model = fresh()
    untouched = {p: m.lora_A["plan"].weight.clone() for p, m in layers(model, "q_proj", "o_proj")}
    paths = share_down_projections(model, init=init)
    assert sorted(paths) == sorted(p for p, _ in layers(model, "k_proj", "v_proj"))
    start = {p: m.lora_A["plan"].weight.clone() for p, m in layers(model, "k_proj", "v_proj")}
    assert all(torch.equal(m.lora_A["plan"].weight, untouched[p]) for p, m in layers(model, "q_proj", "o_proj"))
    for name in NAMES:
        trained(model, name)
    for path, module in layers(model, "k_proj", "v_proj"):
        assert all(torch.equal(module.lora_A[name].weight, start[path]) for name in NAMES)
        assert module.lora_A["plan"].weight.data_ptr() == module.lora_A["act"].weight.data_ptr()
        assert not torch.equal(module.lora_B["plan"].weight, module.lora_B["act"].weight)
    assert not any(torch.equal(m.lora_A["plan"].weight, untouched[p]) for p, m in layers(model, "q_proj", "o_proj"))
    assert policy(model) == "base_lr_shared"


def test_orthogonal_rows_are_orthonormal_and_each_layer_has_its_own():
    model = fresh()
    share_down_projections(model, generator=torch.Generator().manual_seed(1))
    weights = [m.lora_A["plan"].weight for _, m in layers(model, "k_proj", "v_proj")]
    for weight in weights:
        assert torch.allclose(weight @ weight.T, torch.eye(len(weight), dtype=weight.dtype), atol=1e-6)
    assert not torch.equal(weights[0], weights[1])
    again = fresh()
    share_down_projections(again, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        layers(again, "k_proj")[0][1].lora_A["act"].weight, layers(model, "k_proj")[0][1].lora_A["act"].weight
    )


def test_shared_adapters_are_saved_and_loaded_as_ordinary_ones(tmp_path):
    model = fresh()
    share_down_projections(model)
    for name in NAMES:
        trained(model, name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "plan"), adapter_name="plan")
    loaded.load_adapter(str(tmp_path / "act"), adapter_name="act")
    loaded.eval()
    for name in NAMES:
        activate(model, name)
        activate(loaded, name)
        assert_equal_logits(logits(loaded, tokens(7)), logits(model, tokens(7)))
    assert policy(loaded) == "base_lr_shared"


def test_without_freeze_it_is_one_parameter_and_back():
    model = fresh()
    share_down_projections(model, NAMES, freeze=False)
    module = layers(model, "v_proj")[0][1]
    assert module.lora_A["plan"].weight is module.lora_A["act"].weight
    assert isinstance(module.lora_A["plan"].weight, torch.nn.Parameter)
    share_down_projections(model, NAMES, source="plan")
    assert not isinstance(module.lora_A["plan"].weight, torch.nn.Parameter)


def test_a_source_is_left_as_it_is():
    model = with_adapters(tiny_llama(), ["plan"])
    model.add_adapter("act", model.peft_config["plan"])
    expected = logits(model, tokens(8))
    share_down_projections(model, source="plan")
    assert_equal_logits(logits(model, tokens(8)), expected)
    module = layers(model, "k_proj")[0][1]
    assert torch.equal(module.lora_A["plan"].weight, module.lora_A["act"].weight)


def test_trained_adapters_are_refused_and_nothing_is_changed():
    model = apart()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(UnsupportedAdapterError, match=r"adapter 'plan' is trained.*project_to_shared_a"):
        share_down_projections(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("call", [share_down_projections, project_to_shared_a])
def test_wrong_arguments_are_named(call):
    model = fresh()
    with pytest.raises(UnsupportedAdapterError, match=r"\['critic'\] are not loaded; the model has \['plan', 'act'\]"):
        call(model, ["plan", "critic"])
    with pytest.raises(UnsupportedAdapterError, match="no layer named fc1 has LoRA"):
        call(model, target_modules=("fc1",))
    model.add_adapter("queries", lora(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedAdapterError, match=r"k_proj: adapters \['queries'\] have no LoRA here"):
        call(model)


def test_ranks_that_differ_and_unknown_starts_are_refused():
    model = PeftModel(tiny_llama(), lora(r=2), adapter_name="plan")
    model.add_adapter("act", lora(r=4))
    with pytest.raises(UnsupportedAdapterError, match=r"ranks \{'plan': 2, 'act': 4\}"):
        share_down_projections(model)
    with pytest.raises(ValueError, match="init is 'zeros'"):
        share_down_projections(model, init="zeros")
    with pytest.raises(ValueError, match="rank is 0"):
        project_to_shared_a(model, rank=0)


def test_a_changed_frozen_a_is_noticed():
    model = fresh()
    share_down_projections(model)
    for name in NAMES:
        trained(model, name)
    cache, ids = SharedLoRACache(), tokens(9)
    activate(model, "plan")
    logits(model, ids, cache)
    with torch.no_grad():
        layers(model, "v_proj")[0][1].lora_A["plan"].weight.mul_(2)
    longer = logits(model, tokens(12), cache, attention_mask=ones(12))
    assert_equal_logits(longer, reference(model, tokens(12)))


# ---- project_to_shared_a ---------------------------------------------------------------------------------------------


def updates(module) -> dict[str, torch.Tensor]:
    return {n: (module.scaling[n] * module.lora_B[n].weight @ module.lora_A[n].weight).detach() for n in NAMES}


@pytest.mark.parametrize("settings", [{}, dict(use_rslora=True), dict(lora_bias=True)], ids=str)
def test_with_the_sum_of_the_ranks_nothing_changes(tmp_path, settings):
    model = with_adapters(
        tiny_llama(), {n: lora(r=r, rank_pattern={}, **settings) for n, r in zip(NAMES, (2, 3), strict=True)}
    )
    expected = {}
    for name in NAMES:
        activate(model, name)
        expected[name] = logits(model, tokens(10))
    result = project_to_shared_a(model)
    assert result.rank == 5 and result.largest < 1e-10
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "plan"), adapter_name="plan")
    loaded.load_adapter(str(tmp_path / "act"), adapter_name="act")
    for each in (model, loaded.eval()):
        for name in NAMES:
            activate(each, name)
            # Saved in the adapters' own dtype.
            assert_equal_logits(logits(each, tokens(10)), expected[name], EXACT if each is model else 1e-5)
        assert policy(each) == "base_lr_shared"


def test_a_smaller_rank_is_the_best_fit_and_its_error_is_reported():
    model = apart()
    before = {path: updates(module) for path, module in layers(model, "k_proj", "v_proj")}
    result = project_to_shared_a(model, rank=3)
    assert set(result.errors) == set(before)
    for path, module in layers(model, "k_proj", "v_proj"):
        # Independent of the code under test: a dense singular value decomposition of the stacked updates.
        stacked = torch.cat([update / update.norm() for update in before[path].values()])
        rows = torch.linalg.svd(stacked).Vh[:3]
        for name, update in updates(module).items():
            exact = before[path][name]
            assert torch.allclose(update, exact @ rows.T @ rows, atol=1e-10)
            assert result.errors[path][name] == pytest.approx(float((update - exact).norm() / exact.norm()), abs=1e-10)
            assert result.errors[path][name] > 1e-3
    assert result.largest == max(e for layer in result.errors.values() for e in layer.values())
    assert result.to_dict()["rank"] == 3 and "plan" in str(result)


def test_a_config_of_several_adapters_stays_that_of_the_others():
    config = lora()
    model = with_adapters(tiny_llama(), {"plan": config, "act": config, "other": config})
    before = dict(config.rank_pattern)
    project_to_shared_a(model, NAMES)
    assert model.peft_config["other"].rank_pattern == before != model.peft_config["plan"].rank_pattern


def test_errors_fall_with_the_rank():
    errors = [project_to_shared_a(apart(), rank=rank).largest for rank in (1, 2, 4, 20)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-10


def test_projected_adapters_can_be_trained_further():
    model = apart()
    project_to_shared_a(model)
    trained(model, "plan")
    module = layers(model, "k_proj")[0][1]
    assert torch.equal(module.lora_A["plan"].weight, module.lora_A["act"].weight)
    assert policy(model) == "base_lr_shared"


def test_layers_that_are_not_plain_lora_are_refused_before_anything_changes():
    model = apart()
    model.add_adapter("dora", lora(use_dora=True))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(UnsupportedAdapterError, match="adapter 'dora' uses DoRA"):
        project_to_shared_a(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
