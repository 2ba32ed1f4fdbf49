"""A model on CUDA, by the reference, by the Triton kernels and by what is chosen, gives the CPU's tokens under every policy."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lora_shared_cache import SharedLoRACache, buffers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = dict(
    vocab_size=211,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
)
AGENTS = ("plan", "act", "reflect", "plan", "act")


def build(family: str, shared_a: bool):
    torch.manual_seed(3)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    else:
        model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=24))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(model, config, adapter_name="plan")
    for name in ("act", "reflect"):
        model.add_adapter(name, config)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if "lora_A" in name and shared_a:
            source = parameters[name.replace(".act.", ".plan.").replace(".reflect.", ".plan.")]
            parameter.data.copy_(source.data)
    return model.eval()


def trajectory(model, device: str, sharing: str, new: int = 12) -> torch.Tensor:
    """Five turns of three agents, each followed by three fixed tokens of an observation."""
    model = model.to(device)
    cache = SharedLoRACache(sharing=sharing)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, SHAPE["vocab_size"], (1, 40), generator=generator).to(device)
    for agent in AGENTS:
        model.set_adapter(agent)
        text = model.generate(text, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=0)
        observation = torch.randint(0, SHAPE["vocab_size"], (1, 3), generator=generator).to(device)
        text = torch.cat((text, observation), dim=1)
    return text.cpu()


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("sharing", ["auto", "base_shared", "base_lr_shared", "lr_precomputed"])
@pytest.mark.parametrize("backend", ["", "reference", "triton"])
def test_cuda_gives_the_tokens_of_the_cpu(family, sharing, backend, monkeypatch):
    # So that sliding layers let go of tokens within this trajectory.
    monkeypatch.setattr(buffers, "MIN_MARGIN", 8)
    model = build(family, shared_a=sharing in ("auto", "base_lr_shared"))
    on_cpu = trajectory(model, "cpu", sharing)
    monkeypatch.setenv("LORA_SHARED_CACHE_BACKEND", backend)
    assert len(set(on_cpu[0].tolist())) > 20, "a constant text would show nothing"
    assert torch.equal(trajectory(model, "cuda", sharing), on_cpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["", "reference", "triton"])
def test_logits_on_cuda_are_as_close_to_float32_as_pefts(dtype, backend, monkeypatch):
    monkeypatch.setenv("LORA_SHARED_CACHE_BACKEND", backend)
    model = build("llama", shared_a=False).to("cuda")
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 300), device="cuda")
    with torch.no_grad():
        exact = model(ids).logits
        model = model.to(dtype)
        peft_error = (model(ids).logits.float() - exact).norm()
        cache = SharedLoRACache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split([200, 99, 1], dim=1)]
    ours = (torch.cat(parts, dim=1).float() - exact).norm()
    assert ours <= 1.5 * peft_error
