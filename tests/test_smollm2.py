"""A real model with the role adapters of the examples: every policy generates, and one agent alone is exact."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DynamicCache

from lora_shared_cache import SharedLoRACache

from .tiny import activate, fill_adapter, share_a

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from smollm2 import load_smollm2, smollm2_available  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.integration,
    pytest.mark.skipif(not smollm2_available(), reason="the weights of SmolLM2-135M-Instruct are not installed"),
    # Raised by what reads the GGUF file.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NAMES = ["plan", "action", "reflect"]
SETS = ["separate", "shared_a"]
TURNS = ["plan", "action", "plan", "reflect"]
NEW = 5


@pytest.fixture(scope="module")
def base():
    model, tokenizer = load_smollm2(torch.float32)
    return model, tokenizer


@pytest.fixture(params=SETS)
def agents(request, base):
    """The trained adapters of a set, or random ones of the same shape where they are not there."""
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    folder = EXAMPLES / "adapters" / request.param
    if all((folder / name / "adapter_config.json").is_file() for name in NAMES):
        peft_model = PeftModel.from_pretrained(model, str(folder / NAMES[0]), adapter_name=NAMES[0])
        for name in NAMES[1:]:
            peft_model.load_adapter(str(folder / name), adapter_name=name)
    else:
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        peft_model = get_peft_model(model, config, NAMES[0])
        for name in NAMES[1:]:
            peft_model.add_adapter(name, config)
        for seed, name in enumerate(NAMES):
            fill_adapter(peft_model, name, seed, strength=0.05)
        if request.param == "shared_a":
            share_a(peft_model, NAMES)
    return request.param, peft_model.eval(), tokenizer


def prompt_of(tokenizer):
    messages = [{"role": "user", "content": "Which river flows through the capital of Austria? Think step by step."}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def generate(model, ids, cache, new=NEW):
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def test_every_policy_generates(agents):
    kind, model, tokenizer = agents
    policies = {"base_shared": "base_shared", "lr_precomputed": "lr_precomputed"}
    policies["auto"] = "base_lr_shared" if kind == "shared_a" else "base_shared"
    if kind == "shared_a":
        policies["base_lr_shared"] = "base_lr_shared"
    results = {}
    for sharing, policy in policies.items():
        cache, ids = SharedLoRACache(sharing=sharing), prompt_of(tokenizer)
        start = ids.shape[1]
        for name in TURNS:
            activate(model, name)
            ids = generate(model, ids, cache).sequences
        assert cache.policy == policy
        assert ids.shape[1] == start + NEW * len(TURNS)
        assert cache.trajectory_length == ids.shape[1] - 1
        footprint = cache.memory_footprint()
        assert footprint["base"] + sum(footprint["low_rank"].values()) < footprint["non_shared"] / 2
        results[sharing] = ids
    # The same policy by two names gives the same tokens.
    assert torch.equal(results["auto"], results[policies["auto"]])


def test_one_agent_alone_equals_peft_with_a_dynamic_cache(agents):
    _, model, tokenizer = agents
    ids = prompt_of(tokenizer)
    for name in [NAMES[0], None]:
        activate(model, name)
        theirs = generate(model, ids, DynamicCache(config=model.config))
        ours = generate(model, ids, SharedLoRACache())
        # Float32 through 30 layers; logits of about 20.
        for a, b in zip(ours.logits, theirs.logits, strict=True):
            assert float((a - b).abs().max()) < 5e-3
        assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sharing", ["base_shared", "base_lr_shared", "lr_precomputed"])
def test_cuda_gives_the_tokens_of_the_cpu(agents, sharing):
    """Greedy, float32; on CUDA by the Triton kernels, which are the default there."""
    kind, model, tokenizer = agents
    if sharing == "base_lr_shared" and kind != "shared_a":
        pytest.skip("needs adapters that share A")
    results = []
    for device in ("cpu", "cuda"):
        model.to(device)
        cache, ids = SharedLoRACache(sharing=sharing), prompt_of(tokenizer).to(device)
        for name in TURNS:
            activate(model, name)
            ids = generate(model, ids, cache, new=12).sequences
        results.append(ids.cpu())
    assert torch.equal(*results)
