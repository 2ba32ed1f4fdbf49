"""What sharing one cache costs *your* adapters on *your* text, against one exact cache per adapter.

Teacher-forced: a text is divided into turns, each written by one adapter. For every policy the turns are replayed on the cache
that this policy would have built, in that order, and each turn's tokens are predicted by its adapter. The same predictions from
a ``DynamicCache`` per adapter are exact; the report is the difference.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console, Group
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import Cache, DynamicCache

from . import adapters as peft_adapters
from .attach import attach, attachment_of, detach
from .attachment import PROJECTIONS
from .cache import SharedLoRACache
from .errors import SharedCacheError, UnsupportedAdapterError

Turn = tuple[str, torch.Tensor]
"""Adapter and its token ids (1, n)."""

EXACT, FULLY_SHARED = "non_shared", "fully_shared"
POLICIES = (EXACT, FULLY_SHARED, "base_shared", "base_lr_shared", "lr_precomputed")
_PRIVATE = "+private:"


def policy_arguments(name: str) -> dict[str, Any]:
    """What makes the cache of a policy: "base_shared", or with private layers "base_shared+private:0,8-21".

    Args:
        name: the policy; after "+private:" layers or ranges of layers, both ends included.

    Returns:
        Keyword arguments of :class:`SharedLoRACache`; none for the two that are no such cache.

    Raises:
        ValueError: an unknown policy, or something else than layers.
    """
    sharing, private, layers = name.partition(_PRIVATE)
    if sharing not in POLICIES or (private and sharing != "base_shared"):
        raise ValueError(
            f"policy {name!r} is unknown, expected one of {list(POLICIES)} or base_shared{_PRIVATE}FIRST-LAST"
        )
    if sharing in (EXACT, FULLY_SHARED):
        return {}
    indices: list[int] = []
    for part in layers.split(",") if private else ():
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise ValueError(f"policy {name!r}: {part!r} is no layer and no range of layers such as 8-21")
        indices += range(int(first), int(last or first) + 1)
    return dict(sharing=sharing, private_layers=indices) if indices else dict(sharing=sharing)


@dataclass(frozen=True)
class PolicyResult:
    """One policy on all turns but the first, which one adapter writes alone.

    Attributes:
        kl: mean over tokens of KL(exact || policy) of the next-token distributions, in nats.
        top1: share of tokens at which both have the same most likely token.
        loss: mean negative log-likelihood of the text, in nats per token.
        loss_difference: ``loss`` less that of the exact caches.
        rerun_tokens: tokens that went through the model beyond one pass over the text.
        memory_bytes: of the cache (or caches) at the end.
    """

    kl: float
    top1: float
    loss: float
    loss_difference: float
    rerun_tokens: int
    memory_bytes: int


@dataclass(frozen=True)
class LayerResult:
    """One layer, each adapter reading the whole text alone.

    Attributes:
        layer: its index.
        key_similarity, value_similarity: cosine similarity of the base model's part of K and V (before RoPE) of a token under
            two adapters, mean over tokens and pairs of adapters. The base part is what is shared.
        key_low_rank, value_low_rank: norm of an adapter's part over that of the base part, mean over tokens and adapters.
    """

    layer: int
    key_similarity: float
    value_similarity: float
    key_low_rank: float
    value_low_rank: float


@dataclass(frozen=True)
class SharingReport:
    """The result of :func:`sharing_report`. Prints as a table, also in notebooks.

    Attributes:
        adapters: in the order of their first turns.
        tokens: of the whole text; ``scored``: those that are compared, all of every turn but the first, observations included.
        policies: by name.
        layers: in order.
        skipped: policies that don't apply, with the reason.
    """

    adapters: list[str]
    tokens: int
    scored: int
    policies: dict[str, PolicyResult]
    layers: list[LayerResult]
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, for JSON."""
        return asdict(self)

    def __rich__(self) -> Group:
        policies = Table(
            title=f"{self.scored} of {self.tokens} tokens scored, adapters {', '.join(self.adapters)}",
            title_justify="left",
        )
        for name in ("policy", "KL (nats)", "same top token", "loss", "loss difference", "re-run tokens", "memory"):
            policies.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
        for name, r in self.policies.items():
            policies.add_row(
                name, f"{r.kl:.2e}", f"{r.top1:.1%}", f"{r.loss:.4f}", f"{r.loss_difference:+.4f}", str(r.rerun_tokens),
                f"{r.memory_bytes / 1e6:.2f} MB",
            )  # fmt: skip
        layers = Table(title="base K and V between adapters; low-rank over base", title_justify="left")
        for name in ("layer", "K similarity", "V similarity", "K low-rank", "V low-rank"):
            layers.add_column(name, justify="right")
        for row in self.layers:
            layers.add_row(
                str(row.layer), f"{row.key_similarity:.4f}", f"{row.value_similarity:.4f}", f"{row.key_low_rank:.3f}",
                f"{row.value_low_rank:.3f}",
            )  # fmt: skip
        return Group(policies, *(f"{name}: {reason}" for name, reason in self.skipped.items()), layers)

    def __str__(self) -> str:
        # In a notebook rich would display it there and then, and take the text for a terminal's.
        console = Console(file=io.StringIO(), width=120, force_jupyter=False, force_terminal=False)
        console.print(self)
        return cast(io.StringIO, console.file).getvalue()

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), width=120, force_jupyter=False, record=True)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def plot(self) -> Any:
        """A matplotlib ``Figure``: similarity per layer, and each policy's KL against its memory.

        Notebooks show it after ``%matplotlib inline``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        index = [row.layer for row in self.layers]
        left.plot(index, [row.key_similarity for row in self.layers], "o-", label="base K")
        left.plot(index, [row.value_similarity for row in self.layers], "s-", label="base V")
        left.set(xlabel="layer", ylabel="cosine similarity between adapters")
        left.legend()
        for name, result in self.policies.items():
            right.plot(result.memory_bytes / 1e6, result.kl, "o", label=name)
        right.set(xlabel="memory (MB)", ylabel="KL to the exact caches (nats)")
        right.set_ylim(bottom=0)
        right.set_xlim(left=0)
        right.legend()
        return figure


def sharing_report(
    model: nn.Module,
    text: torch.Tensor | str | Sequence[str] | Sequence[tuple[str, torch.Tensor | str]],
    adapters: Iterable[str] | None = None,
    policies: Iterable[str] | None = None,
    *,
    tokenizer: Any = None,
    chunk: int = 512,
    progress: bool = True,
) -> SharingReport:
    """Measure what each way of sharing costs a model's adapters.

    Nothing is trained or changed: active adapters, training mode and gradients are as before when it returns.

    Args:
        model: a ``PeftModel``, or a Transformers model with adapters.
        text: what is replayed. Turns as pairs (adapter, token ids (1, n) or text), the way your agents take them, are best. Token
            ids (1, n) or one or several texts are cut into two turns per adapter, in turn. All tokens of a turn count alike, an
            observation or a cue in it as much as what the adapter would write.
        adapters: the adapters of such turns; None takes all that are loaded.
        policies: of "non_shared", "fully_shared" (one ``DynamicCache`` for all), "base_shared", "base_lr_shared" and
            "lr_precomputed"; None takes all that apply. "base_shared+private:8-21" is "base_shared" with these layers private.
        tokenizer: for texts.
        chunk: tokens per forward pass; bounds the memory for activations.
        progress: show a bar.

    Returns:
        The report. Memory: one cache per policy and adapter, and the logits of one turn.

    Raises:
        UnsupportedAdapterError: an adapter is not loaded, or can't be split.
        SharedCacheError: a policy that doesn't apply was asked for.
        ValueError: nothing to score, an unknown policy, or a text without a tokenizer.
    """
    loaded = list(getattr(model, "peft_config", None) or {})
    names = loaded if adapters is None else [adapters] if isinstance(adapters, str) else list(adapters)
    turns = _turns(text, names, tokenizer)
    names = list(dict.fromkeys(name for name, _ in turns))
    missing = [name for name in names if name not in loaded]
    if missing:
        raise UnsupportedAdapterError(f"adapters {missing} are not loaded; the model has {loaded}")
    policies = [policies] if isinstance(policies, str) else None if policies is None else list(policies)
    for name in policies or ():
        policy_arguments(name)
    with _as_it_was(model), torch.no_grad():
        attach(model)
        return _measure(model, turns, names, policies, chunk, progress)


def _measure(
    model: nn.Module, turns: list[Turn], names: list[str], policies: list[str] | None, chunk: int, progress: bool
) -> SharingReport:
    device = next(model.parameters()).device
    ids = torch.cat([part for _, part in turns], dim=1).to(device)
    replays: dict[str, ExactReplay | SharedReplay] = {EXACT: ExactReplay(model, chunk)}
    skipped: dict[str, str] = {}
    for name in POLICIES[1:] if policies is None else policies:
        if name == FULLY_SHARED:
            replays[name] = FullySharedReplay(model, chunk)
        elif name != EXACT:
            replays[name] = SharedReplay(model, chunk, name)
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in replays}
    steps = len(turns) + -(-ids.shape[1] // chunk)
    with tqdm(total=steps, desc="sharing report", disable=not progress, leave=False) as bar:
        layers = _layers(model, ids, names, chunk, bar)
        start = 0
        for index, (adapter, part) in enumerate(turns):
            stop = start + part.shape[1]
            activate(model, adapter)
            exact = None
            for name in list(replays):
                try:
                    logits = replays[name].turn(adapter, ids, start, stop)
                except SharedCacheError as error:
                    # The one policy that fits some adapters only; whatever else is wrong, is wrong with the model.
                    if policies is not None or index or name != "base_lr_shared":
                        raise
                    del replays[name], sums[name]
                    skipped[name] = str(error)
                    continue
                if index:
                    log_p = F.log_softmax(logits.double() if logits.dtype == torch.float64 else logits.float(), dim=-1)
                    exact = log_p if exact is None else exact
                    sums[name] += _compare(exact, log_p, ids[0, start:stop])
            start = stop
            bar.update()
    scored = ids.shape[1] - turns[0][1].shape[1]
    exact_loss = float(sums[EXACT][2]) / scored
    results = {}
    for name in replays if policies is None else dict.fromkeys(policies):
        kl, top1, loss = (sums[name] / scored).tolist()
        replay = replays[name]
        results[name] = PolicyResult(
            max(kl, 0.0), top1, loss, loss - exact_loss, replay.run - ids.shape[1], replay.memory()
        )
    return SharingReport(names, ids.shape[1], scored, results, layers, skipped)


def _compare(exact: torch.Tensor, log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens of a turn: KL(exact || policy), agreement of the top tokens, negative log-likelihood."""
    kl = (exact.exp() * (exact - log_p)).sum()
    same = (exact.argmax(-1) == log_p.argmax(-1)).sum()
    loss = -log_p.gather(-1, targets[:, None]).sum()
    return torch.stack((kl.double(), same.double(), loss.double())).cpu()


class Replay:
    """What replays of turns have in common. ``run`` counts the tokens that went through the model."""

    def __init__(self, model: nn.Module, chunk: int):
        self.model, self.chunk, self.run = model, chunk, 0
        forward = getattr(model, "get_base_model", lambda: model)().forward
        self.keep = "logits_to_keep" in inspect.signature(forward).parameters

    def feed(self, cache: Cache, ids: torch.Tensor, keep: int, **kwargs: Any) -> torch.Tensor:
        """The last ``keep`` logits (keep, vocabulary) of ids (1, n)."""
        kept: list[torch.Tensor] = []
        pieces = ids.split(self.chunk, dim=1)
        left = ids.shape[1]
        for piece in pieces:
            wanted = max(0, min(piece.shape[1], keep - (left - piece.shape[1])))
            options = {"logits_to_keep": max(wanted, 1)} if self.keep else {}
            logits = self.model(input_ids=piece, past_key_values=cache, use_cache=True, **options, **kwargs).logits[0]
            kept.append(logits[logits.shape[0] - wanted :])
            left -= piece.shape[1]
        return torch.cat(kept)


class ExactReplay(Replay):
    """One ``DynamicCache`` per adapter."""

    def __init__(self, model: nn.Module, chunk: int):
        super().__init__(model, chunk)
        self.caches: dict[str, DynamicCache] = {}

    def turn(self, adapter: str, ids: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Logits (stop - start, vocabulary) that predict the tokens start ... stop; zeros for the first of a text."""
        cache = self.caches.setdefault(self.key(adapter), DynamicCache(config=cast(Any, self.model.config)))
        covered = cache.get_seq_length()
        if start and covered == start:
            # The token before the turn is run by the turn's adapter, as generate does with a whole prompt.
            cache.crop(-1)
            covered -= 1
        self.run += stop - covered
        logits = self.feed(cache, ids[:, covered:stop], min(stop - start + 1, stop - covered))[:-1]
        return logits if start else torch.cat((torch.zeros_like(logits[:1]), logits))

    def key(self, adapter: str) -> str:
        """Which cache an adapter uses."""
        return adapter

    def memory(self) -> int:
        """Bytes of all caches."""
        layers = [cast(Any, layer) for cache in self.caches.values() for layer in cache.layers]
        return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))


class FullySharedReplay(ExactReplay):
    """One ``DynamicCache`` that all adapters use as if it were their own."""

    def key(self, adapter: str) -> str:
        """See :class:`ExactReplay`."""
        return FULLY_SHARED


class SharedReplay(Replay):
    """A :class:`SharedLoRACache`."""

    def __init__(self, model: nn.Module, chunk: int, policy: str):
        super().__init__(model, chunk)
        self.cache = SharedLoRACache(**policy_arguments(policy))

    def turn(self, adapter: str, ids: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """As :meth:`ExactReplay.turn`."""
        if not start:
            self.run += stop
            logits = self.feed(self.cache, ids[:, :stop], stop)[:-1]
            return torch.cat((torch.zeros_like(logits[:1]), logits))
        covered = min(self.cache.get_seq_length(), start - 1)
        self.run += stop - covered
        # As generate does: the whole prompt, of which the cache runs what this adapter hasn't seen, and one token at least.
        mask = torch.ones(1, start, dtype=torch.long, device=ids.device)
        options = {"logits_to_keep": 1} if self.keep else {}
        prompt = self.model(
            input_ids=ids[:, :start], past_key_values=self.cache, attention_mask=mask, use_cache=True, **options
        )
        logits = self.feed(self.cache, ids[:, start:stop], stop - start)
        return torch.cat((prompt.logits[0, -1:], logits[:-1]))

    def memory(self) -> int:
        """Bytes of the cache."""
        footprint = self.cache.memory_footprint()
        # Without the expanded keys that the CPU keeps for speed.
        return footprint["total"] - footprint["expanded_keys"]


def _layers(model: nn.Module, ids: torch.Tensor, names: list[str], chunk: int, bar: Any) -> list[LayerResult]:
    """All adapters over the whole text side by side, chunk by chunk, so that no layer's K and V are kept."""
    attachment = attachment_of(model)
    assert attachment is not None
    base: dict[tuple[int, str], torch.Tensor] = {}
    whole: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    replay = Replay(model, chunk)
    if any(len(layer.modules) == 1 for layer in attachment.layers.values()):
        # Which columns of a fused projection are keys and values shows at first use.
        replay.feed(SharedLoRACache(model), ids[:, :1], 1)
    for index, layer in attachment.layers.items():
        for which in PROJECTIONS:
            module = layer.projection(which)
            columns = layer.columns(which)
            part = slice(None) if columns is None else columns

            def keep(_m: Any, _i: Any, out: torch.Tensor, key: tuple = (index, which), part: Any = part) -> None:
                whole[key] = out.detach()[0][..., part].float()

            handles.append(module.register_forward_hook(keep))
            if peft_adapters.is_lora(module):

                def keep_base(
                    _m: Any, _i: Any, out: torch.Tensor, key: tuple = (index, which), part: Any = part
                ) -> None:
                    base[key] = out.detach()[0][..., part].float()

                handles.append(module.base_layer.register_forward_hook(keep_base))
    caches = {name: DynamicCache(config=cast(Any, model.config)) for name in names}
    similarity = {key: 0.0 for key in ((i, w) for i in attachment.layers for w in PROJECTIONS)}
    size = dict(similarity)
    pairs = list(combinations(names, 2))
    try:
        for piece in ids.split(chunk, dim=1):
            parts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
            for name in names:
                activate(model, name)
                base.clear()
                whole.clear()
                replay.feed(caches[name], piece, 1)
                parts[name] = {key: base.get(key, whole[key]) for key in whole}
                for key, out in whole.items():
                    delta = (out - parts[name][key]).norm(dim=-1) / parts[name][key].norm(dim=-1).clamp_min(1e-30)
                    size[key] += float(delta.sum()) / len(names)
            for one, other in pairs:
                for key in similarity:
                    close = F.cosine_similarity(parts[one][key], parts[other][key], dim=-1)
                    similarity[key] += float(close.sum()) / len(pairs)
            bar.update()
    finally:
        for handle in handles:
            handle.remove()
    n = ids.shape[1]
    if not pairs:
        similarity = dict.fromkeys(similarity, float(n))
    return [
        LayerResult(
            index, similarity[index, "k_proj"] / n, similarity[index, "v_proj"] / n, size[index, "k_proj"] / n,
            size[index, "v_proj"] / n,
        )
        for index in sorted(attachment.layers)
    ]  # fmt: skip


def _turns(text: Any, names: list[str], tokenizer: Any) -> list[Turn]:
    """The argument ``text`` as turns."""

    def encoded(part: Any) -> torch.Tensor:
        if isinstance(part, torch.Tensor):
            part = part[None] if part.dim() == 1 else part
            if part.dim() != 2 or part.shape[0] != 1 or part.is_floating_point():
                raise ValueError(f"token ids are {part.dtype} {tuple(part.shape)}, expected integers (1, n)")
            return part
        if tokenizer is None:
            raise ValueError("a text needs tokenizer=, or give token ids")
        return cast(torch.Tensor, tokenizer(part, return_tensors="pt", add_special_tokens=False).input_ids)

    if not isinstance(text, (torch.Tensor, str)) and text and all(isinstance(t, (tuple, list)) for t in text):
        turns = [(str(name), encoded(part)) for name, part in text]
    else:
        parts = [text] if isinstance(text, (torch.Tensor, str)) else list(text)
        ids = (
            torch.cat([encoded(part).cpu() for part in parts], dim=1) if parts else torch.zeros(1, 0, dtype=torch.long)
        )
        if not names:
            raise UnsupportedAdapterError("the model has no adapters; load some, or give turns")
        pieces = [piece for piece in ids.tensor_split(2 * len(names), dim=1)]
        turns = [(names[i % len(names)], piece) for i, piece in enumerate(pieces)]
    turns = [(name, part) for name, part in turns if part.shape[1]]
    if len(turns) < 2:
        raise ValueError(
            f"{len(turns)} turns with tokens, expected two or more: the first is never scored, one adapter writes it alone"
        )
    return turns


def activate(model: nn.Module, adapter: str) -> None:
    """Make one adapter active on every layer, without a word to the optimiser."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(True)
            module.set_adapter([adapter])


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards adapters, gradients, training mode and attachment as before."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    active = [(m, list(m.active_adapters), m.disable_adapters) for m in layers]
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    attached = attachment_of(model) is not None
    model.eval()
    try:
        yield
    finally:
        for layer, names, disabled in active:
            layer.set_adapter(names)
            layer.enable_adapters(not disabled)
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
        for module, mode in training:
            module.training = mode
        if not attached:
            detach(model)
