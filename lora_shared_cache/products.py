"""LoRA products of a decode step with fewer launches: A's that read the same input stacked, ``B a`` added in one product.

Only in steps whose lengths the device counts (``forward.Slot``), and only for PEFT's plain LoRA on a plain linear layer; all
else goes PEFT's own way. The same sums: ``W x + s B (A x)``, with one rounding where PEFT has three.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .attachment import Attachment


@dataclass
class DownProducts:
    """The down-projections ``A x`` of one decode step, as its first run showed them; for as long as the weights are the same.

    Attributes:
        attachment: keeps weights that are made of several adapters'.
        groups: by module, the modules that read the same input in one product, in their order, with their weights. What all
            agents have in common is a product of its own: its weights exist once, not once per agent.
    """

    attachment: Attachment
    groups: dict[int, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)
    _stacked: dict[int, tuple[torch.Tensor, list[int]]] = field(default_factory=dict)
    _learned: bool = False
    _input: torch.Tensor | None = None
    _open: dict[bool, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)
    _results: dict[Any, torch.Tensor] = field(default_factory=dict)
    _common: set[int] = field(default_factory=set)

    def finish(self) -> None:
        """The step ended: what it showed is known from here on, and nothing of it is kept alive."""
        if not self._learned:
            self._learned = True
            # Not while a step is captured: the memory would be the graph's.
            for group in {id(g): g for g in self.groups.values()}.values():
                weights = [weight.detach() for _, weight in group]
                if len(group) > 1 and len({(w.dtype, w.device) for w in weights}) == 1:
                    firsts = [0, *itertools.accumulate(w.shape[0] for w in weights)]
                    joint = self._stack_of_all(weights) if id(group) in self._common else stack(weights)
                    self._stacked[id(group)] = joint, firsts
        self.restart()

    def _stack_of_all(self, weights: list[torch.Tensor]) -> torch.Tensor:
        # With the weights themselves, so that their addresses belong to nobody else meanwhile.
        key = ("stacked", *((w.data_ptr(), w.shape[0]) for w in weights))
        return cast(torch.Tensor, self.attachment.cached_weights(key, lambda: (stack(weights), weights))[0])

    def restart(self) -> None:
        """A step begins."""
        self._input, self._open, self._results = None, {}, {}

    def down(self, module: nn.Module, weight: torch.Tensor, x: torch.Tensor, common: bool = False) -> torch.Tensor:
        """``weight @ x``, together with that of all modules that read the same ``x``.

        Args:
            module: who asks; it asks once per step.
            weight: (r, in_features).
            x: (B, 1, in_features), the very tensor that the others were given.
            common: whether every agent's step asks with this weight.

        Returns:
            (B, 1, r) in the dtype of the weight.
        """
        me = id(module)
        if x is not self._input:
            self._input, self._open, self._results = x, {}, {}
        if not self._learned:
            group = self.groups[me] = self._open.setdefault(common, [])
            group.append((me, weight))
            if common:
                self._common.add(id(group))
            return F.linear(x.to(weight.dtype), weight)
        group = self.groups.get(me, [])
        stacked = self._stacked.get(id(group))
        if stacked is None:
            return F.linear(self._cast(x, weight.dtype), weight)
        joint, firsts = stacked
        if id(group) not in self._results:
            self._results[id(group)] = F.linear(self._cast(x, joint.dtype), joint)
        position = [other for other, _ in group].index(me)
        return self._results[id(group)][..., firsts[position] : firsts[position + 1]]

    def _cast(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if x.dtype == dtype:
            return x
        if dtype not in self._results:
            self._results[dtype] = x.to(dtype)
        return self._results[dtype]


def stack(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """(r, in) weights below each other, in one tensor; in their own memory where they lie there like that."""
    first, rows = weights[0], 0
    for weight in weights:
        at = first.storage_offset() + rows * first.stride(0)
        beside = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and weight.is_contiguous()
        if not (beside and weight.storage_offset() == at and weight.shape[1:] == first.shape[1:]):
            return torch.cat([*weights])
        rows += weight.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())


# Classes of a layer and its base, and no subclasses of them: those compute something else.
_PLAIN_LAYERS = {LoraLinear, nn.Linear}


def plain_adapters(module: Any, x: torch.Tensor, rows: Sequence[str] | None = None) -> list[str] | None:
    """The active adapters of a plain LoRA layer that can be computed here, or None: PEFT's own forward is asked.

    The empty list: none of them adapts this layer.

    Args:
        rows: the adapter of each row of the batch instead of those that are active.
    """
    if {type(module), type(module.base_layer)} != _PLAIN_LAYERS or module.merged:
        return None
    if module.disable_adapters:
        return []
    active = module.active_adapters if rows is None else sorted(set(rows))
    names = [name for name in active if name in module.lora_A]
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


def linear_of_rows(
    module: Any, rows: tuple[str, ...], names: list[str], x: torch.Tensor, products: DownProducts
) -> torch.Tensor:
    """``W x + s B (A x)`` (B, 1, out_features) with each row's own adapter, if it is one of ``names``.

    One product with the A's and one with the B's of all of them; in between, what is of other rows' adapters is set to 0.
    """
    out = module.base_layer(x)
    if not names:
        return out

    downs = [module.lora_A[name].weight for name in names]

    def joined() -> tuple[torch.Tensor, torch.Tensor]:
        ups = [module.lora_B[name].weight.detach() for name in names]
        return torch.cat([down.detach() for down in downs]), torch.cat(ups, dim=1).T.contiguous()

    def of_rows() -> torch.Tensor:
        of_row = [[float(name == row) * scaling for name, scaling in zip(names, scalings, strict=True)] for row in rows]
        repeats = torch.tensor(ranks, device=downs[0].device)
        return downs[0].new_tensor(of_row).repeat_interleave(repeats, dim=1)

    # There may be as many assignments of adapters to rows as batches: what is large does not depend on them, and what does is
    # the same in all layers of these ranks.
    cached = products.attachment.cached_weights
    down, up = cached(("rows", id(module), tuple(names)), joined)
    ranks, scalings = [len(down) for down in downs], [module.scaling[name] for name in names]
    key = ("scales", rows, tuple(names), *ranks, *scalings, down.dtype, down.device)
    scale = cached(key, of_rows)
    a = products.down(module, down, x).flatten(0, 1) * scale
    if a.dtype == out.dtype:
        out.view(-1, out.shape[-1]).addmm_(a, up)
    else:
        torch.add(out, (a @ up).view(out.shape), out=out)
    return out


def linear_with_adapters(module: Any, names: list[str], x: torch.Tensor, products: DownProducts) -> torch.Tensor:
    """``W x + s B (A x)`` (B, 1, out_features) of a layer that :func:`plain_adapters` accepts."""
    out = module.base_layer(x)
    if not names:
        return out
    weights = [module.lora_A[name].weight for name in names]
    weight = weights[0]
    if len(weights) > 1:
        key = ("active", id(module), tuple(names))
        weight = products.attachment.cached_weights(key, lambda: torch.cat([w.detach() for w in weights]))
    a = products.down(module, weight, x)
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
