"""Adapters with one down-projection in common ("shared A"), for which ``base_lr_shared`` never runs a token again.

Where the A of ``k_proj`` and ``v_proj`` is the same in all adapters, a token's low-rank entries ``A x`` are the same too
(LRAgent, arXiv 2602.01053, section 4.2). :func:`share_down_projections` prepares new adapters for it, to be trained as usual;
:func:`project_to_shared_a` rewrites adapters that exist. Either way they stay ordinary PEFT adapters, on disk as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import adapters as peft_adapters
from .attachment import FUSED_PROJECTIONS, PROJECTIONS
from .errors import UnsupportedAdapterError

# Of a fused projection the A is that of queries too.
KEYS_AND_VALUES = (*PROJECTIONS, *FUSED_PROJECTIONS)


def share_down_projections(
    model: nn.Module,
    adapters: Iterable[str] | None = None,
    target_modules: Sequence[str] = KEYS_AND_VALUES,
    freeze: bool = True,
    *,
    init: str = "orthogonal",
    source: str | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Give adapters one A per target layer, before they are trained.

    Everything else (their B's, and A and B of other layers) is trained as usual, with ``Trainer`` or a plain loop, each
    adapter on its own. ``SharedLoRACache(sharing="auto")`` recognises them by content.

    Args:
        model: a ``PeftModel``, or a Transformers model with adapters.
        adapters: names; None takes all that are loaded.
        target_modules: last parts of the names of the layers whose A is shared.
        freeze: the A's become buffers, one tensor for all adapters: no optimiser sees them, and ``set_adapter``, which makes
            the parameters of an adapter trainable, leaves them alone. Without it they become one parameter; train all adapters
            together then, and set its ``requires_grad`` after each ``set_adapter``, which leaves it as the last adapter has it.
        init: "orthogonal" (rows of length 1) or "kaiming" (PEFT's default start).
        source: an adapter whose A's are taken instead, and which is left as it is.
        generator: for the random start; on the CPU.

    Returns:
        The paths of the layers.

    Raises:
        UnsupportedAdapterError: no layer fits, an adapter or its LoRA on one of them is missing, ranks differ, or an adapter is
            trained already (its B isn't 0): another A would change what it computes; see :func:`project_to_shared_a`.
        ValueError: an unknown ``init``.
    """
    if init not in ("orthogonal", "kaiming"):
        raise ValueError(f"init is {init!r}, expected 'orthogonal' or 'kaiming'")
    names = _names(model, adapters, source)
    with_source = list(dict.fromkeys([*names, *([source] if source is not None else [])]))
    shared: list[tuple[str, Any, torch.Tensor]] = []
    for path, module in _target_layers(model, with_source, target_modules):
        ranks = {name: module.lora_A[name].weight.shape[0] for name in with_source}
        if len(set(ranks.values())) > 1:
            raise UnsupportedAdapterError(
                f"{path}: adapters have ranks {ranks}, expected one rank for a shared down-projection"
            )
        like = module.lora_A[source or names[0]].weight.detach()
        if source is not None:
            weight = like.clone()
        else:
            start = torch.empty(like.shape)
            if init == "orthogonal":
                nn.init.orthogonal_(start, generator=generator)
            else:
                nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
            weight = start.to(like)
        for name in names:
            same = torch.equal(module.lora_A[name].weight, weight.to(module.lora_A[name].weight))
            if not same and module.lora_B[name].weight.detach().any():
                raise UnsupportedAdapterError(
                    f"{path}: adapter {name!r} is trained (its lora_B isn't 0), and with another A it would compute something "
                    "else. Use project_to_shared_a, or give it as source="
                )
        shared.append((path, module, weight))
    for _, module, weight in shared:
        _set_down(module, names, weight, freeze)
    return [path for path, _, _ in shared]


@dataclass(frozen=True)
class SharedAProjection:
    """What :func:`project_to_shared_a` did.

    Attributes:
        rank: rows of the shared A of every layer.
        errors: path of a layer -> adapter -> ``|dW' - dW| / |dW|`` in the Frobenius norm.
    """

    rank: int
    errors: dict[str, dict[str, float]]

    @property
    def largest(self) -> float:
        """The largest error of any adapter on any layer."""
        return max(error for layer in self.errors.values() for error in layer.values())

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, for JSON."""
        return {"rank": self.rank, "largest": self.largest, "errors": self.errors}

    def __str__(self) -> str:
        names = list(next(iter(self.errors.values())))
        width = max(map(len, self.errors))
        lines = [f"shared A of rank {self.rank}: relative error of each adapter's update", " " * width + _cells(names)]
        for path, errors in self.errors.items():
            lines.append(f"{path:<{width}}" + _cells(f"{errors[name]:.2e}" for name in names))
        # Of many layers the last line is what is read.
        for projection in dict.fromkeys(path.rpartition(".")[2] for path in self.errors):
            of = [e for path, layer in self.errors.items() if path.endswith(projection) for e in layer.values()]
            lines.append(f"{projection}: mean {sum(of) / len(of):.1%}, largest {max(of):.1%}")
        return "\n".join(lines)


def project_to_shared_a(
    model: nn.Module,
    adapters: Iterable[str] | None = None,
    *,
    rank: int | None = None,
    target_modules: Sequence[str] = KEYS_AND_VALUES,
    freeze: bool = True,
) -> SharedAProjection:
    """Rewrite trained adapters so that they share their A's, without training.

    Per layer, with updates ``dW_i = s_i B_i A_i`` stacked below each other, each divided by its norm: the ``rank`` leading
    right singular vectors are the rows of A, and ``B_i = dW_i A^T / s_i'``, the best fit in the Frobenius norm. With the sum of
    the adapters' ranks nothing is lost. Only A and B of the target layers change, and ``rank_pattern`` of the adapters' configs,
    so that they are saved and loaded as what they are. An optimiser made before holds the old B's.

    Args:
        model: a ``PeftModel``, or a Transformers model with adapters.
        adapters: names; None takes all that are loaded.
        rank: of the shared A's; None takes the largest sum of the adapters' ranks on a layer, which is exact. The shared low-rank
            cache holds ``rank`` numbers per token and layer for all adapters together, once for k and once for v.
        target_modules: last parts of the names of the layers whose A is shared.
        freeze: as in :func:`share_down_projections`, for further training.

    Returns:
        The error of each adapter on each layer.

    Raises:
        UnsupportedAdapterError: no layer fits, an adapter or its LoRA on one of them is missing, or it is not plain LoRA.
        ValueError: a rank below 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}, expected a positive number")
    names = _names(model, adapters, None)
    layers = list(_target_layers(model, names, target_modules))
    if rank is None:
        rank = max(sum(module.lora_A[name].weight.shape[0] for name in names) for _, module in layers)
    configs: dict[str, Any] = model.peft_config  # type: ignore[assignment]
    new: list[tuple[Any, torch.Tensor, dict[str, tuple[torch.Tensor, float]]]] = []
    errors: dict[str, dict[str, float]] = {}
    for path, module in layers:
        down, updates, errors[path] = _common_rows(module, names, rank)
        ups = {}
        for name in names:
            root = rank**0.5 if getattr(configs[name], "use_rslora", False) else rank
            scaling = module.lora_alpha[name] / root  # what PEFT makes of the config when the adapter is loaded again
            ups[name] = (updates[name] / scaling, scaling)
        new.append((module, down, ups))
    for module, down, ups in new:
        for name, (up, scaling) in ups.items():
            _set_up(module, name, up, scaling)
        _set_down(module, names, down, freeze)
    found = {path.rpartition(".")[2] for path, _ in layers}
    target_modules = [name for name in target_modules if name in found]
    for name in names:
        config = configs[name] = copy.copy(configs[name])  # adapters may have been made from one config
        others = {k: v for k, v in (config.rank_pattern or {}).items() if k not in target_modules}
        # First: PEFT takes the first pattern that matches.
        config.rank_pattern = {**dict.fromkeys(target_modules, rank), **others}
    return SharedAProjection(rank, errors)


def _common_rows(
    module: Any, names: Sequence[str], rank: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]:
    """A (rank, in) with orthonormal rows (zeros beyond what there is), ``dW_i A^T`` (out, rank), and relative errors."""
    downs = [module.lora_A[name].weight.detach().double() for name in names]
    basis, _ = torch.linalg.qr(torch.cat(downs).T)  # (in, m): every update lives in these rows
    updates = {
        name: module.scaling[name] * module.lora_B[name].weight.detach().double() @ (down @ basis)
        for name, down in zip(names, downs, strict=True)
    }
    norms = {name: float(update.norm()) for name, update in updates.items()}
    stacked = torch.cat([update / (norms[name] or 1.0) for name, update in updates.items()])
    rows = torch.linalg.svd(stacked, full_matrices=False).Vh[:rank]  # (rank or less, m)
    errors = {
        name: float((update - update @ rows.T @ rows).norm()) / (norms[name] or 1.0) for name, update in updates.items()
    }
    down = nn.functional.pad(rows @ basis.T, (0, 0, 0, rank - rows.shape[0]))
    ups = {name: nn.functional.pad(update @ rows.T, (0, rank - rows.shape[0])) for name, update in updates.items()}
    return down, ups, errors


def _set_down(module: Any, names: Sequence[str], weight: torch.Tensor, freeze: bool) -> None:
    """One A for the adapters ``names`` of a layer: a buffer, or one parameter. One tensor per device and dtype."""
    tensors: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
    for name in names:
        linear = module.lora_A[name]
        old = linear.weight
        shared = tensors.setdefault((old.device, old.dtype), weight.to(device=old.device, dtype=old.dtype))
        if not freeze and not isinstance(shared, nn.Parameter):
            shared = tensors[old.device, old.dtype] = nn.Parameter(shared)
        linear._parameters.pop("weight", None)
        linear._buffers.pop("weight", None)
        if freeze:
            linear.register_buffer("weight", shared)
        else:
            linear.register_parameter("weight", shared)
        linear.out_features = weight.shape[0]
        module.r[name] = weight.shape[0]


def _set_up(module: Any, name: str, weight: torch.Tensor, scaling: float) -> None:
    """B (out, r) of an adapter, and its scaling; a ``lora_bias`` keeps its effect."""
    linear = module.lora_B[name]
    requires_grad = linear.weight.requires_grad
    linear.weight = nn.Parameter(weight.to(linear.weight), requires_grad=requires_grad)
    linear.in_features = weight.shape[1]
    if linear.bias is not None:
        linear.bias.data.mul_(module.scaling[name] / scaling)
    module.scaling[name] = scaling


def _names(model: nn.Module, adapters: Iterable[str] | None, source: str | None) -> list[str]:
    loaded = list(getattr(model, "peft_config", None) or {})
    if not loaded:
        raise UnsupportedAdapterError("the model has no adapters; load some")
    names = loaded if adapters is None else list(dict.fromkeys([adapters] if isinstance(adapters, str) else adapters))
    missing = [name for name in [*names, *([source] if source is not None else [])] if name not in loaded]
    if missing or not names:
        raise UnsupportedAdapterError(f"adapters {missing or names} are not loaded; the model has {loaded}")
    return names


def _target_layers(model: nn.Module, names: Sequence[str], target_modules: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """LoRA layers named like one of ``target_modules``, each checked to hold plain LoRA of every adapter."""
    found = False
    for path, module in model.named_modules():
        if path.rpartition(".")[2] not in target_modules or not peft_adapters.is_lora(module):
            continue
        found = True
        without = [name for name in names if name not in peft_adapters.names_on(module, names)]
        if without:
            raise UnsupportedAdapterError(
                f"{path}: adapters {without} have no LoRA here, expected one of all of {list(names)}. Add the layer to their "
                "target_modules, or leave them out of adapters"
            )
        peft_adapters.check_not_merged([(path, module)])
        peft_adapters.check_expressible(path, module, names)
        yield path, module
    if not found:
        raise UnsupportedAdapterError(
            f"no layer named {' or '.join(target_modules)} has LoRA; give the layers that the adapters target as target_modules"
        )


def _cells(values: Iterable[str]) -> str:
    return "".join(f"  {value:>10}" for value in values)
