"""The self-test of attention layers: what the split makes of a real layer and adapter is PEFT's own K and V, or is refused."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear

from lora_shared_cache import SharedLoRACache, UnsupportedModelError, attach, detach, self_test
from lora_shared_cache.attach import attachment_of

from .models_table import add_adapters, build
from .test_attach import state_of
from .tiny import (
    assert_equal_logits,
    feed,
    fill_adapter,
    lora,
    lora_layers,
    reference,
    tiny_llama,
    tokens,
    with_adapters,
)
from .tiny_configs import tiny_config

pytestmark = pytest.mark.integration


class OneTenthMore(LoraLinear):
    """An adapter's part that is not what its weights and scaling say."""

    def forward(self, x, *args, **kwargs):
        base = self.base_layer(x)
        return base + 1.1 * (super().forward(x, *args, **kwargs) - base)


def projection(model, layer=1, which="v_proj"):
    return next(m for path, m in lora_layers(model) if path.endswith(f"layers.{layer}.self_attn.{which}"))


def of_another_class(model):
    module = projection(model)
    module.__class__ = OneTenthMore
    return lambda: setattr(module, "__class__", LoraLinear)


def with_a_hook(model):
    return projection(model, which="k_proj").register_forward_hook(lambda module, args, out: 2 * out.relu()).remove


def with_a_forward_of_its_own(model):
    module = projection(model)
    own = module.forward
    module.forward = lambda x: 3 * own(x) - 2 * module.base_layer(x)
    return lambda: vars(module).pop("forward")


BROKEN = {
    of_another_class: ("values", r"v_proj \(OneTenthMore\) does not return its base_layer's output plus"),
    with_a_hook: ("keys", r"LlamaAttention makes something else of base and adapter than of their sum"),
    with_a_forward_of_its_own: ("values", r"v_proj \(Linear\) does not return"),
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_is_no_sum_of_base_and_low_rank_part_is_refused(breaks, dtype):
    """By attach, and in the first pass of a cache that attaches itself; nothing is stored, and it works once it is repaired."""
    model = with_adapters(tiny_llama(), {"one": lora(target_modules=["k_proj", "v_proj"])})
    model.to(dtype)
    expected = reference(model, tokens(9))
    repair = breaks(model)
    before, rng = state_of(model), torch.random.get_rng_state()
    what, why = BROKEN[breaks]
    message = rf"layers.1.self_attn \(LlamaAttention\): .* its {what} with adapter 'one' differ from PEFT's own by .*e-.*: {why}"
    if breaks is not with_a_hook:
        # Hooks would see the tokens that are tried.
        with pytest.raises(UnsupportedModelError, match=message):
            attach(model)
        assert state_of(model) == before
    cache = SharedLoRACache()
    with pytest.raises(UnsupportedModelError, match=message):
        feed(model, tokens(9), cache, [6, 3])
    assert cache.trajectory_length == 0 and torch.equal(torch.random.get_rng_state(), rng)
    detach(model)
    repair()
    out = feed(model, tokens(9), cache, [6, 3])
    assert_equal_logits(out, expected, 1e-10 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize("strength", [0.0, 1e-4, 1.0])
def test_an_adapter_of_any_strength_is_tested(strength):
    """A new adapter (B = 0) and one whose effect is lost in the base's roundings, in bfloat16; its weights stay as they are."""
    model = with_adapters(tiny_llama(), ["one"])
    with torch.no_grad():
        for _, module in lora_layers(model):
            module.lora_B["one"].weight.mul_(strength)
    model.to(torch.bfloat16)
    weights = {name: (p.data_ptr(), p._version, p.clone()) for name, p in model.named_parameters()}
    repair = of_another_class(model)
    with pytest.raises(UnsupportedModelError, match="OneTenthMore"):
        attach(model)
    repair()
    attach(model)
    assert attachment_of(model).layers[0].tested == attachment_of(model).version
    for name, p in model.named_parameters():
        pointer, version, content = weights[name]
        assert (p.data_ptr(), p._version) == (pointer, version) and torch.equal(p, content) and p.grad is None


def test_once_for_each_kind_and_again_for_a_new_kind(monkeypatch):
    compared = []
    original = self_test._compare
    monkeypatch.setattr(
        self_test, "_compare", lambda layer, name, kw: (compared.append(name), original(layer, name, kw))[1]
    )
    model = with_adapters(tiny_llama(), ["one", "two"])
    attach(model)
    assert compared == ["one"]
    attach(model)
    cache = SharedLoRACache(sharing="base_shared")
    feed(model, tokens(9), cache, [6, 1, 1, 1])
    assert compared == ["one"]
    model.add_adapter("three", lora())
    model.add_adapter("biased", lora(lora_bias=True))
    fill_adapter(model, "biased", 5)
    feed(model.eval(), tokens(1), cache, [1])
    assert compared == ["one", "biased"]


def test_put_off_where_a_pass_is_not_possible_or_would_leave_traces():
    model = with_adapters(tiny_llama(), {"one": lora(lora_dropout=0.2)})
    attention = model.get_base_model().model.layers[0].self_attn
    seen = []

    def reason(model):
        attach(model)
        return attachment_of(model).not_tried.get("LlamaModel")

    model.train()
    state = torch.random.get_rng_state()
    assert reason(model) == "the model is in training mode" and torch.equal(torch.random.get_rng_state(), state)
    model.eval()
    handle = attention.register_forward_hook(lambda *a: seen.append(a))
    assert reason(model) == "modules of the model have forward hooks" and not seen
    handle.remove()
    assert reason(model) is None and attachment_of(model).tested
    offloaded = with_adapters(tiny_llama(), ["one"]).to("meta")
    assert reason(offloaded) == "weights are offloaded (meta device)"


def test_private_layers_are_not_tried():
    """A model that can be used with them alone is refused by attach, not by a cache that knows of them."""
    model = with_adapters(tiny_llama(), ["one"])
    of_another_class(model)
    with pytest.raises(UnsupportedModelError, match=r"private_layers=\[1, \.\.\.\]"):
        SharedLoRACache(model)
    expected = reference(model, tokens(9))
    assert_equal_logits(feed(model, tokens(9), SharedLoRACache(model, private_layers=[1]), [6, 3]), expected)


@pytest.mark.parametrize("name", ["cohere2", "ernie4_5", "modernbert-decoder"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layers_that_round_to_the_dtype_of_their_queries(name, dtype):
    """They are tried out in the model's dtype, since keys of float32 come out of them as coarse as that."""
    model = add_adapters(build(tiny_config(name))).to(dtype)
    attach(model)
    attachment = attachment_of(model)
    assert attachment.tested and not attachment.not_tried
