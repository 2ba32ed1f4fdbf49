"""What PEFT's layers say about the loaded adapters: who is active, what they weigh, whether their content changed.

Reads PEFT's LoRA layers (the same classes serve ``PeftModel`` and Transformers' own ``load_adapter``) and refuses, by
name, what a split cache can't express. It changes nothing in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .errors import UnsupportedAdapterError

# PEFT's placeholder for the base model in `adapter_names`.
BASE_MODEL = "__base__"

Agent = tuple[str, ...]
"""The active adapters, sorted; the empty tuple is the base model. See :func:`agent_of_rows` for batches with several."""

# First in an agent whose rows have adapters of their own. No adapter can have this name: torch.nn.ModuleDict refuses dots.
_ROWS = "rows."

# Initialisations that move a part of the base weight into the adapter: with such an adapter, and any other, PEFT's base
# model is no longer the base of both.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")

# Arguments of PEFT's LoRA layers that must not reach the base layer, and the hooks that bring them.
PEFT_ARGUMENTS = ("adapter_names", "alora_offsets")
_PEFT_HOOKS = ("_adapter_names_pre_forward_hook", "_alora_offsets_pre_forward_hook")


def agent_of_rows(names: Sequence[str]) -> Agent:
    """The agent of a batch whose rows have the adapters ``names``, "__base__" for none: an ordinary one if all have the same."""
    if len(set(names)) > 1:
        return (_ROWS, *names)
    return tuple(name for name in names[:1] if name != BASE_MODEL)


def rows_of(agent: Agent) -> tuple[str, ...] | None:
    """The adapter of each row ("__base__": none), or None: all rows have the same."""
    return agent[1:] if agent[:1] == (_ROWS,) else None


def names_in(agent: Agent) -> Agent:
    """The names of the agent's adapters, sorted."""
    rows = rows_of(agent)
    return agent if rows is None else tuple(sorted({*rows} - {BASE_MODEL}))


def agent_name(agent: Agent) -> str:
    """The agent as a text: "plan", "plan+act", "__base__", or "[plan, act, __base__]" by rows."""
    rows = rows_of(agent)
    if rows is not None:
        return f"[{', '.join(rows)}]"
    return "+".join(agent) if agent else BASE_MODEL


@dataclass(frozen=True)
class DownProjection:
    """The stacked down-projections of some adapters on one linear layer, for ``a = A x``.

    Attributes:
        weight: (r, in_features), the A's of the adapters below each other.
        ones: a last column of ones is appended to ``a``; it carries ``lora_bias`` through the same product as B.
    """

    weight: torch.Tensor
    ones: bool

    @property
    def rank(self) -> int:
        """Columns of ``a``."""
        return self.weight.shape[0] + int(self.ones)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, in_features) -> (B, n, rank), in the dtype of A, as PEFT computes it."""
        a = nn.functional.linear(x.to(self.weight.dtype), self.weight)
        return torch.cat((a, a.new_ones(*a.shape[:-1], 1)), dim=-1) if self.ones else a


def is_lora(module: Any) -> bool:
    """Whether PEFT put LoRA on this linear layer."""
    return isinstance(module, LoraLayer)


def names_on(module: Any, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that have a LoRA on this linear layer."""
    return [name for name in names if name in module.lora_A] if is_lora(module) else []


def down_projection(module: Any, names: Sequence[str]) -> DownProjection:
    """The A's of adapters ``names`` (each on this layer), stacked."""
    weights = [module.lora_A[name].weight for name in names]
    weight = weights[0] if len(weights) == 1 else torch.cat([w.to(weights[0].dtype) for w in weights])
    return DownProjection(weight.detach(), any(module.lora_bias.get(name, False) for name in names))


def up_projection(
    module: Any, names: Sequence[str], head_dim: int, shared: bool, ones: bool, columns: torch.Tensor | None = None
) -> torch.Tensor:
    """The B's of ``names`` times their scaling, split into heads.

    Args:
        names: adapters, each on this layer.
        head_dim: D.
        shared: the adapters have one A in common: their B's are added; otherwise they stand below each other, as the
            A's do in :func:`down_projection`.
        ones: a last row with the scaled ``lora_bias`` follows.
        columns: (Hk * D,) of the layer's outputs, those wanted of a fused projection; None: all.

    Returns:
        (Hk, r, D) float32 (float64 for float64 adapters).
    """
    dtype = torch.float64 if module.lora_B[names[0]].weight.dtype == torch.float64 else torch.float32
    rows = [module.lora_B[name].weight.detach().to(dtype).T * module.scaling[name] for name in names]
    up = torch.stack(rows).sum(0) if shared and len(rows) > 1 else torch.cat(rows)
    if ones:
        bias = up.new_zeros(1, up.shape[1])
        for name in names:
            if module.lora_B[name].bias is not None:
                bias = bias + module.lora_B[name].bias.detach().to(dtype) * module.scaling[name]
        up = torch.cat((up, bias))
    if columns is not None:
        up = up[:, columns.to(up.device)]
    return up.view(up.shape[0], -1, head_dim).transpose(0, 1).contiguous()


def content_tensors(lora_layers: Iterable[tuple[str, Any]], name: str) -> list[torch.Tensor]:
    """All tensors of an adapter, in module order."""
    tensors: list[torch.Tensor] = []
    for _, module in lora_layers:
        if name not in module.scaling:
            continue
        for container in (module.lora_A, module.lora_B, module.lora_magnitude_vector):
            if name in container:
                # A shared, frozen A is a buffer.
                tensors.extend((*container[name].parameters(), *container[name].buffers()))
        for container in (module.lora_embedding_A, module.lora_embedding_B):
            if name in container:
                tensors.append(container[name])
    return tensors


def check_expressible(path: str, module: Any, names: Iterable[str], split: bool = True) -> None:
    """Refuse what the split can't express on one ``k_proj`` or ``v_proj``.

    Args:
        split: False for a layer whose K and V are kept whole: DoRA is fine there.

    Raises:
        UnsupportedAdapterError: with the module's path, the adapter and the feature.
    """
    if not isinstance(module, BaseTunerLayer):
        inner = next((part for part, m in module.named_modules() if isinstance(m, BaseTunerLayer)), None)
        if split and inner is not None:
            raise UnsupportedAdapterError(
                f"{path} ({type(module).__name__}) is adapted in a part of it, {inner}; only adapters on the whole projection "
                "can be split. Use target_modules without it, or a DynamicCache per adapter"
            )
        return
    if isinstance(module, ParamWrapper):
        raise UnsupportedAdapterError(
            f"{path}: LoRA through target_parameters has no down-projection; use target_modules"
        )
    if not is_lora(module):
        raise UnsupportedAdapterError(
            f"{path} is adapted by {type(module).__module__}.{type(module).__name__}, which is not LoRA. Only LoRA on k_proj and "
            "v_proj can be split; use target_modules without them, or a DynamicCache per adapter"
        )
    layer: Any = module
    for name in names_on(module, names):
        dora = layer.use_dora.get(name, False)
        if dora and not split:
            continue
        if dora:
            raise UnsupportedAdapterError(
                f"{path}: adapter {name!r} uses DoRA, which rescales base and low-rank part together. Train it without DoRA on "
                "k_proj and v_proj, make all layers that have it private (private_layers=), or use a DynamicCache per adapter"
            )
        variant = layer.lora_variant.get(name)
        if variant is not None and variant is not ALoraLinearVariant and not isinstance(variant, ALoraLinearVariant):
            variant_name = variant.__name__ if isinstance(variant, type) else type(variant).__name__
            raise UnsupportedAdapterError(
                f"{path}: adapter {name!r} uses {variant_name}, which the split can't express"
            )
        weight = getattr(layer.lora_B[name], "weight", None)
        if weight is None or weight.dim() != 2 or not weight.is_floating_point():
            raise UnsupportedAdapterError(f"{path}: the up-projection of adapter {name!r} is not a plain weight matrix")


def brings_adapter_names(hook: Any) -> bool:
    """Whether a forward hook is PEFT's that gives a layer ``adapter_names``."""
    return getattr(getattr(hook, "func", None), "__name__", "") == _PEFT_HOOKS[0]


def adapter_names_argument(lora_layers: Iterable[tuple[str, Any]]) -> tuple[str, ...] | None:
    """PEFT's ``adapter_names=`` of the call that is under way (PEFT passes it to all its layers by hooks), or None."""
    for _, module in lora_layers:
        # The last one wins: PEFT leaves hooks behind when a forward pass raises.
        for hook in reversed(list(module._forward_pre_hooks.values())):
            if brings_adapter_names(hook):
                return tuple(hook.keywords["adapter_names"])
        return None
    return None


def alora_offsets_argument(lora_layers: Iterable[tuple[str, Any]]) -> list[int | None] | None:
    """What PEFT tells its layers of the call under way: where each row's aLoRA starts, counted from the end. None: nothing."""
    for _, module in lora_layers:
        for hook in reversed(list(module._forward_pre_hooks.values())):
            if getattr(getattr(hook, "func", None), "__name__", "") == _PEFT_HOOKS[1]:
                offsets: list[int | None] = hook.keywords["alora_offsets"]
                return offsets
        return None
    return None


def remove_left_hooks(model: nn.Module) -> None:
    """Remove the hooks of ``adapter_names=`` and aLoRA that PEFT leaves on its layers when a forward pass raises.

    ``modules_to_save`` has them too.
    """
    for module in model.modules():
        if not isinstance(module, LoraLayer | AuxiliaryTrainingWrapper):
            continue
        for key, hook in list(module._forward_pre_hooks.items()):
            function = getattr(hook, "func", None)
            if getattr(function, "__name__", "") in _PEFT_HOOKS:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def check_not_merged(lora_layers: Iterable[tuple[str, Any]]) -> None:
    """Refuse merged adapters: their base weights are no longer the base.

    Raises:
        UnsupportedAdapterError: with the first merged layer and its adapters.
    """
    for path, module in lora_layers:
        if module.merged_adapters and not module.disable_adapters:
            raise UnsupportedAdapterError(
                f"{path}: adapters {module.merged_adapters} are merged into the base weights, so base and low-rank part can't "
                "be told apart. Call model.unmerge_adapter() first"
            )


def check_no_dropout(lora_layers: Iterable[tuple[str, Any]], agent: Agent) -> None:
    """Refuse LoRA dropout in training mode.

    Raises:
        UnsupportedAdapterError: with the layer, the adapter and its dropout.
    """
    names = names_in(agent)
    for path, module in lora_layers:
        for name in names:
            dropout = module.lora_dropout[name] if name in module.lora_dropout else None
            if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
                raise UnsupportedAdapterError(
                    f"{path}: adapter {name!r} is in training mode with lora_dropout={dropout.p}; what is cached would be "
                    "random. Call model.eval()"
                )


def check_no_virtual_tokens(peft_config: dict) -> None:
    """Refuse prompt tuning and its kin.

    Raises:
        UnsupportedAdapterError: with the adapter and its type.
    """
    for name, config in peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UnsupportedAdapterError(
                f"adapter {name!r} is {kind}: its virtual tokens are not part of the trajectory. Only LoRA can share a cache"
            )


def check_model_wide(model: Any, peft_config: dict, names: Sequence[str]) -> None:
    """Refuse adapters under which the base itself differs.

    Args:
        model: the top Transformers model.
        peft_config: adapter name -> config; configs that are no PEFT config objects are ignored.
        names: the adapters that were loaded.

    Raises:
        UnsupportedAdapterError: with the adapter and the setting.
    """
    check_no_virtual_tokens(peft_config)
    for name, config in peft_config.items():
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise UnsupportedAdapterError(
                f"adapter {name!r} was trained with bias={bias!r}, which changes the base model's biases. Use bias='none' or "
                "lora_bias=True"
            )
        init = getattr(config, "init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS) and len(names) > 1:
            raise UnsupportedAdapterError(
                f"adapter {name!r} was initialised with {init!r}, which changes the base weights for all {len(names)} adapters. "
                "Convert it to plain LoRA (save_pretrained(..., path_initial_model_for_weight_conversion=...))"
            )
    output_embeddings = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and module is not output_embeddings:
            raise UnsupportedAdapterError(
                f"{path}: adapters replace this module ({type(module).__name__}, from modules_to_save or "
                "trainable_token_indices), so they disagree about the base. Train without it"
            )
