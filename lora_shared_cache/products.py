"""LoRA products of a decode step with fewer launches: A's that read the same input stacked, ``B a`` added in one product.

Only in steps whose lengths the device counts (``forward.Slot``), and only for PEFT's plain LoRA on a plain linear layer; all
else goes PEFT's own way. The same sums: ``W x + s B (A x)``, with one rounding where PEFT has three.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .attachment import Attachment


@dataclass
class DownProducts:
    """The down-projections ``A x`` of one decode step, as its first run showed them.

    Attributes:
        attachment: keeps the stacked weights for as long as they are valid.
        groups: by module, the modules that read the same input, in their order.
    """

    attachment: Attachment
    groups: dict[int, list[int]] = field(default_factory=dict)
    _learned: bool = False
    _weights: dict[int, tuple[Hashable, Callable[[], torch.Tensor]]] = field(default_factory=dict)
    _input: torch.Tensor | None = None
    _members: list[int] = field(default_factory=list)
    _result: torch.Tensor | None = None

    def finish(self) -> None:
        """The step ended: what it showed is known from here on, and nothing of it is kept alive."""
        if not self._learned:
            self._learned = True
            # Not while a step is captured: the memory would be the graph's.
            for group in {id(g): g for g in self.groups.values()}.values():
                self._stacked(group)
        self._input = self._result = None

    def restart(self) -> None:
        """A step begins."""
        self._input = self._result = None

    def down(
        self, module: nn.Module, key: Hashable, weight: Callable[[], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """``weight() @ x``, together with that of all modules that read the same ``x``.

        Args:
            module: who asks; it asks once per step.
            key: identifies the weight.
            weight: gives the weight (r, in_features) as it is now.
            x: (B, 1, in_features), the very tensor that the others were given.

        Returns:
            (B, 1, r) in the dtype of the weight.
        """
        me = id(module)
        if not self._learned:
            if x is not self._input:
                self._input, self._members = x, []
            self._members.append(me)
            self.groups[me] = self._members
            self._weights[me] = (key, weight)
        group = self.groups.get(me, [])
        stacked = self._stacked(group) if self._learned and me in group and self._weights[me][0] == key else None
        if stacked is None:
            own = weight()
            return F.linear(x.to(own.dtype), own)
        joint, firsts = stacked
        if x is not self._input or self._result is None or group is not self._members:
            self._input, self._members, self._result = x, group, F.linear(x.to(joint.dtype), joint)
        position = group.index(me)
        return self._result[..., firsts[position] : firsts[position + 1]]

    def _stacked(self, group: list[int]) -> tuple[torch.Tensor, list[int]] | None:
        """The weights of a group below each other and where each begins, or None: they are of different kinds, or one."""
        if len(group) < 2:
            return None
        members = [self._weights[other] for other in group]

        def compute() -> tuple[torch.Tensor, list[int]] | bool:
            weights = [weight().detach() for _, weight in members]
            if len({(w.dtype, w.device) for w in weights}) > 1:
                return False
            firsts = [0]
            for w in weights:
                firsts.append(firsts[-1] + w.shape[0])
            return torch.cat(weights), firsts

        key = ("stacked", tuple((other, key) for other, (key, _) in zip(group, members, strict=True)))
        return self.attachment.cached_weights(key, compute) or None


# Classes of a layer and its base, and no subclasses of them: those compute something else.
_PLAIN_LAYERS = {LoraLinear, nn.Linear}


def plain_adapters(module: Any, x: torch.Tensor) -> list[str] | None:
    """The active adapters of a plain LoRA layer that can be computed here, or None: PEFT's own forward is asked.

    The empty list: none of them adapts this layer.
    """
    if {type(module), type(module.base_layer)} != _PLAIN_LAYERS or module.merged:
        return None
    if module.disable_adapters:
        return []
    names = [name for name in module.active_adapters if name in module.lora_A]
    for name in names:
        a: Any = module.lora_A[name]
        b: Any = module.lora_B[name]
        dropout: Any = module.lora_dropout[name]
        if {type(a), type(b)} != {nn.Linear} or a.bias is not None or b.bias is not None:
            return None
        if name in module.lora_variant or module.use_dora.get(name, False):
            return None
        if not isinstance(dropout, nn.Identity) and module.training:
            return None
        if a.weight.dtype != b.weight.dtype or a.weight.dtype not in (x.dtype, torch.float32):
            return None
    if len({module.lora_A[name].weight.dtype for name in names}) > 1 or module.base_layer.weight.dtype != x.dtype:
        return None
    return names


def linear_with_adapters(module: Any, names: list[str], x: torch.Tensor, products: DownProducts) -> torch.Tensor:
    """``W x + s B (A x)`` (B, 1, out_features) of a layer that :func:`plain_adapters` accepts."""
    out = module.base_layer(x)
    if not names:
        return out
    key = ("active", id(module), tuple(names))

    def weight() -> torch.Tensor:
        weights = [module.lora_A[name].weight for name in names]
        if len(weights) == 1:
            return weights[0]
        return products.attachment.cached_weights(key, lambda: torch.cat([w.detach() for w in weights]))

    a = products.down(module, key, weight, x)
    first = 0
    for name in names:
        up, scaling = module.lora_B[name].weight, module.scaling[name]
        part = a[..., first : first + up.shape[1]]
        first += up.shape[1]
        if part.dtype == out.dtype:
            out.view(-1, out.shape[-1]).addmm_(part.reshape(-1, part.shape[-1]), up.T, alpha=scaling)
        else:
            # float32 adapters on a narrower base: added in float32 and rounded once, as in PEFT.
            torch.add(out, F.linear(part, up), alpha=scaling, out=out)
    return out
