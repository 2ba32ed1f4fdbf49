"""LoRA layers with fewer launches and less of the host's time than PEFT's own forward: ``B a`` added in place, in one product.

Only in passes with a shared cache, and only for PEFT's plain LoRA on a plain linear layer; all else goes PEFT's own way. The same
sums: ``W x + s B (A x)``, with one rounding where PEFT has three. In steps whose lengths the device counts (``forward.Slot``)
A's that read the same input are stacked besides.
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
from torch.nn.modules import module as torch_module

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
    _stacked: dict[int, tuple[torch.Tensor, dict[int, tuple[int, int]]]] = field(default_factory=dict)
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
                    stops = itertools.accumulate(w.shape[0] for w in weights)
                    columns = {m: (stop - len(w), len(w)) for (m, w), stop in zip(group, stops, strict=True)}
                    joint = self._stack_of_all(weights) if id(group) in self._common else stack(weights)
                    self._stacked[id(group)] = joint, columns
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
        joint, columns = stacked
        result = self._results.get(id(group))
        if result is None:
            result = self._results[id(group)] = F.linear(self._cast(x, joint.dtype), joint)
        return result.narrow(-1, *columns[me])

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


@dataclass(frozen=True, eq=False)
class PlainLora:
    """A LoRA layer as it was found by :func:`plain_lora`, which a call then need not look through again.

    Attributes:
        base: its base layer.
        names: the active adapters that it has, in PEFT's order; None: PEFT's own forward is to be asked.
        weights: where A's and B's weights of each are.
        owners, keys, modules: the modules that it consists of, and where each of them was.
        types: their classes.
        hooks: all hooks that a call of these modules would call.
    """

    base: Any
    names: list[str] | None
    weights: list[tuple[dict, dict]]
    owners: list[dict]
    keys: list[str]
    modules: list[nn.Module]
    types: list[type]
    hooks: list[dict]

    def serves(self) -> bool:
        """Whether the layer still consists of the same modules, and nobody else wants to see them called."""
        same = self.names is not None and list(map(dict.get, self.owners, self.keys)) == self.modules
        # A parametrisation changes the class of a module.
        same = same and list(map(type, self.modules)) == self.types
        return same and not any(self.hooks) and not any(["forward" in m.__dict__ for m in self.modules])


def plain_lora(module: Any, x: torch.Tensor, attachment: Attachment, rows: Sequence[str] | None = None) -> PlainLora:
    """What is known of a LoRA layer for inputs like ``x`` and the adapters that are active now, or the one that all rows have."""
    own = module.__dict__
    active = module._active_adapter if rows is None else rows[:1]
    key = (
        "plain", id(module), x.dtype, active if type(active) is str else tuple(active), module._disable_adapters,
        own["training"], own.get("cast_input_dtype_enabled"), not own.get("merged_adapters"),
    )  # fmt: skip
    plan: PlainLora = attachment.cached_weights(key, lambda: _look(module, x, rows))
    return plan


def _look(module: Any, x: torch.Tensor, rows: Sequence[str] | None) -> PlainLora:
    names = plain_adapters(module, x, rows)
    owners, keys = [module._modules], ["base_layer"]
    for name in names or ():
        owners += [container._modules for container in (module.lora_A, module.lora_B, module.lora_dropout)]
        keys += [name] * 3
    modules = [owner[key] for owner, key in zip(owners, keys, strict=True)]
    hooks = list({id(hooks): hooks for m in modules for hooks in _hooks_of(m)}.values())
    # A shared, frozen A is a buffer.
    weights = [
        tuple([m._parameters if "weight" in m._parameters else m._buffers for m in (a, b)])
        for a, b in zip(modules[1::3], modules[2::3], strict=True)
    ]
    return PlainLora(modules[0], names, weights, owners, keys, modules, [*map(type, modules)], hooks)


def _hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """What a call of a module calls besides its forward."""
    own = module.__dict__
    everywhere = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    return own["_forward_hooks"], own["_forward_pre_hooks"], *everywhere


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
        if a.weight.dtype != x.dtype and not getattr(module, "cast_input_dtype_enabled", True):
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


def base_linear(base: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``base(x, ...)``, without the module's call where that does nothing else than the product."""
    own = base.__dict__
    if type(base) is not nn.Linear or args or kwargs or "forward" in own or any(_hooks_of(base)):
        return cast(torch.Tensor, base(x, *args, **kwargs))
    weights = own["_parameters"]
    return F.linear(x, weights["weight"], weights["bias"])


def linear_with_adapters(plan: PlainLora, module: Any, x: torch.Tensor, products: DownProducts | None) -> torch.Tensor:
    """``W x + s B (A x)`` (B, n, out_features) of a layer whose plan serves.

    Args:
        products: with it A's that read the same input are one product.
    """
    base = plan.base._parameters
    if not plan.weights:
        return F.linear(x, base["weight"], base["bias"])
    # Two dimensions: of more PyTorch makes two by itself, for every product.
    flat = x.reshape(-1, x.size(-1))
    out = F.linear(flat, base["weight"], base["bias"])
    weight = plan.weights[0][0]["weight"]
    if len(plan.weights) > 1:
        assert products is not None
        key = ("active", id(module), tuple(plan.names or ()))
        downs = [a["weight"] for a, _ in plan.weights]
        weight = products.attachment.cached_weights(key, lambda: torch.cat([w.detach() for w in downs]))
    if products is not None:
        a = products.down(module, weight, x)
        a = a.reshape(-1, a.size(-1))
    else:
        a = F.linear(flat if x.dtype == weight.dtype else flat.to(weight.dtype), weight)
    first = 0
    for name, (_, b) in zip(plan.names or (), plan.weights, strict=True):
        up, scaling = b["weight"], module.scaling[name]
        part = a if len(plan.weights) == 1 else a.narrow(-1, first, up.shape[1])
        first += up.shape[1]
        if part.dtype == out.dtype == up.dtype:
            out.addmm_(part, up.t(), alpha=scaling)
        else:
            # float32 adapters on a narrower base: added in float32 and rounded once, as in PEFT.
            out.add_(F.linear(part, up), alpha=scaling)
    return out.view(*x.shape[:-1], out.size(-1))
