"""How an attention layer turns the output of its key and value projections into K and V, found by trying it.

Families differ in where they rotate, normalise, scale or clip keys, and in how they cut a fused projection. Instead of a list of
names, a few tiny calls compare what a layer gives to the cache for inputs that differ by a known delta. Only a layer that behaves
like ``K = base + RoPE(delta)`` and ``V = base + delta`` for a rotation we know is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import Cache

from flash_lora_attention import apply_rope

from .errors import UnsupportedModelError
from .key_norm import KeyNorm
from .scopes import layer_scope

# Magnitudes of the probe's tokens: an adapter's effect must be the same function of small and of large projections (clipping).
_PROBE_SCALES = (1.0, 30.0, 1000.0)
_PROBE_TOKENS = len(_PROBE_SCALES)
# Relative to the largest entry of the expected delta, per token. The probe runs in float32; a layer that takes nothing but its
# own dtype (nn.LayerNorm for keys) is tried in that; in 16 bits roundings are 4e-3 of a key.
_PROBE_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True, eq=False)
class FusedColumns:
    """Which output columns of a fused projection are queries, keys and values.

    Attributes:
        query: (Hq * D,) int64, of all heads; sorted.
        key, value: (Hk * D,) int64, in the order of heads.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class RotaryLayout:
    """How keys and values of a layer come from its projections.

    Attributes:
        rotary_dim: rotated leading columns of a head; 0: no rotation.
        interleaved: pairs (2i, 2i+1) instead of (i, i + rotary_dim/2).
        columns: where the angles of the pairs stand in the model's cos/sin: "all" (half width), "first" half, or "even".
        reversed: by the negative angle (nanochat).
        key_norm: how keys are normalised; None: not at all.
        head_dim, key_heads: D and Hk; 0 if the layer was not tried out, since no adapter changes its keys and values.
        fused: where keys and values stand in the output of a fused projection; None: they have projections of their own.
    """

    rotary_dim: int
    interleaved: bool = False
    columns: str = "all"
    reversed: bool = False
    key_norm: KeyNorm | None = None
    head_dim: int = 0
    key_heads: int = 0
    fused: FusedColumns | None = None

    def half_width(self, cos: torch.Tensor) -> torch.Tensor:
        """The model's cos or sin (..., width) as one angle per pair (..., rotary_dim / 2)."""
        if self.columns == "all":
            return cos
        return cos[..., ::2] if self.columns == "even" else cos[..., : cos.shape[-1] // 2]

    def angles(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's cos and sin in the form in which :meth:`rotate` takes them."""
        return self.half_width(cos), self.half_width(-sin if self.reversed else sin)

    def rotate(self, delta: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
        """Rotate (B, Hk, T, D) with half-width cos/sin (B or 1, T, rotary_dim / 2) of its tokens."""
        if self.rotary_dim == 0 or cos is None or sin is None:
            return delta
        return apply_rope(delta, cos, sin, self.interleaved)


NO_ROTATION = RotaryLayout(0)


class NotTried(UnsupportedModelError):
    """The layer raised an error, or rounded to a dtype of its own, when it was tried out."""


class StopTrial(Exception):
    """Ends the probe's forward pass once K and V were seen and attention was dispatched."""


class LayoutProbe(Cache):
    """Stands in for the cache and for the adapted projections during one tiny call of an attention layer."""

    trial = True

    def __init__(self, projected: dict[str, torch.Tensor]):
        super().__init__(layers=[])
        self.projected = projected
        self.states: tuple[torch.Tensor, torch.Tensor] | None = None
        self.query: torch.Tensor | None = None
        self.dispatched = False
        self.objection = ""

    def project(self, which: str, module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The made-up output of a projection."""
        return self.projected[which]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Keep what the layer gives to the cache."""
        self.states = (key_states, value_states)
        return key_states, value_states

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> None:
        """Called by our attention function: the layer dispatches, and nothing after this matters."""
        self.dispatched = True
        self.query = query
        if self.states is not None and (key is not self.states[0] or value is not self.states[1]):
            self.objection = "it attends to other keys or values than it gives to the cache"
        elif attention_mask is not None:
            self.objection = "it makes an attention mask of its own, which may depend on the keys or values"
        raise StopTrial

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The probe is empty."""
        return 0


def _is_complex(kwargs: dict[str, Any]) -> bool:
    embeddings = kwargs.get("position_embeddings")
    return isinstance(embeddings, torch.Tensor) and embeddings.is_complex()


def angles_of(kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """cos and sin (B or 1, n, width) among the arguments of an attention layer, or None. Llama4 gives them as complex numbers."""
    embeddings = kwargs.get("position_embeddings")
    if isinstance(embeddings, torch.Tensor) and embeddings.is_complex():
        return embeddings.real, embeddings.imag
    return (embeddings[0], embeddings[1]) if isinstance(embeddings, tuple | list) and len(embeddings) == 2 else None


def trial_arguments(
    kwargs: dict[str, Any], hidden: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[dict[str, Any], str]:
    """Arguments for a tiny call of an attention layer, made of those of a real one.

    Args:
        hidden: (1, n, hidden size), the hidden states.
        angles: cos and sin (1, n, width); None: the layer is given none.

    Returns:
        The arguments without the cache, and the name of the cache's.
    """
    (rows, real_tokens), tokens = kwargs["hidden_states"].shape[:2], hidden.shape[1]
    first = torch.arange(tokens, device=hidden.device) % real_tokens
    call = dict(kwargs, hidden_states=hidden)
    for key, value in kwargs.items():
        if isinstance(value, torch.Tensor) and key not in ("hidden_states", "attention_mask", "position_ids"):
            # A number for each token, say (Beam); where there is one token it is broadcast.
            value = value[:1] if value.dim() and value.shape[0] == rows else value
            of_tokens = [dim for dim in range(1, value.dim()) if value.shape[dim] == real_tokens > 1]
            call[key] = value.index_select(of_tokens[0], first.to(value.device)) if of_tokens else value
    if "attention_mask" in call:
        call["attention_mask"] = None
    if isinstance(call.get("position_ids"), torch.Tensor):
        call["position_ids"] = torch.arange(tokens, device=hidden.device)[None]
    if angles is not None:
        call["position_embeddings"] = torch.complex(*angles) if _is_complex(kwargs) else angles
    cache_argument = next((key for key, value in kwargs.items() if isinstance(value, Cache)), "past_key_values")
    call.pop(cache_argument, None)
    return call, cache_argument


def find_layout(
    name: str,
    forward: Callable[..., Any],
    kwargs: dict[str, Any],
    sources: dict[str, str],
    widths: dict[str, int],
    key_norms: Callable[[int, int], list[KeyNorm]],
    settings: Sequence[str] = (),
) -> RotaryLayout:
    """Find the layout of an attention layer, or refuse the layer.

    Args:
        name: the layer's name and class, for the error.
        forward: the attention module's own forward.
        kwargs: keyword arguments of a real call; only shapes and dtypes are used.
        sources: where "k_proj" and "v_proj" come from: themselves, or both from one fused projection.
        widths: output width of those projections that carry adapters.
        key_norms: given Hk and D, what a norm that the layer has for its keys may be, of the kinds that can be split.
        settings: what may be why a layer is refused (clipping, multipliers), for the error.

    Raises:
        UnsupportedModelError: the layer does not dispatch its attention, gives nothing to the cache, or treats its keys
            or values in a way that is not base + delta.
    """
    try:
        return _find_layout(name, forward, kwargs, sources, widths, key_norms, settings, torch.float32)
    except NotTried:
        dtype = kwargs["hidden_states"].dtype
        if dtype not in _PROBE_TOLERANCE or dtype == torch.float32:
            raise
        return _find_layout(name, forward, kwargs, sources, widths, key_norms, settings, dtype)


def _find_layout(
    name: str,
    forward: Callable[..., Any],
    kwargs: dict[str, Any],
    sources: dict[str, str],
    widths: dict[str, int],
    key_norms: Callable[[int, int], list[KeyNorm]],
    settings: Sequence[str],
    dtype: torch.dtype,
) -> RotaryLayout:
    """As :func:`find_layout`, with made-up projections in ``dtype``."""
    hidden = kwargs["hidden_states"]
    device = hidden.device
    changed = f" ({', '.join(settings)})" if settings else ""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    scales = torch.tensor(_PROBE_SCALES, device=device, dtype=dtype)[None, :, None]
    base = {which: random(1, _PROBE_TOKENS, width) * scales for which, width in widths.items()}
    delta = {which: random(1, _PROBE_TOKENS, width) * scales for which, width in widths.items()}
    cos = sin = None
    embeddings = angles_of(kwargs)
    if embeddings is not None:
        # Independent numbers in every column: only the columns that the layer really uses can then explain its keys.
        cos, sin = (random(1, _PROBE_TOKENS, t.shape[-1]) for t in embeddings)
    call, cache_argument = trial_arguments(
        kwargs, hidden[:1, :1].expand(1, _PROBE_TOKENS, -1), None if cos is None or sin is None else (cos, sin)
    )

    def run(projected: dict[str, torch.Tensor]) -> LayoutProbe:
        probe = LayoutProbe(projected)
        try:
            with layer_scope(probe), torch.no_grad():
                forward(**call, **{cache_argument: probe})
        except StopTrial:
            pass
        except torch.OutOfMemoryError:
            raise
        except (TypeError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            raise NotTried(f"{name}: its attention could not be tried out: {error}") from error
        if probe.states is None:
            raise UnsupportedModelError(
                f"{name}: it gave no keys and values to the cache (shared between layers?). Use a "
                "DynamicCache per adapter"
            )
        if not probe.dispatched:
            raise UnsupportedModelError(
                f"{name}: it does not call its attention through Transformers' attention interface, so the low-rank part "
                "can't be applied inside it. Use a DynamicCache per adapter"
            )
        if probe.objection:
            raise UnsupportedModelError(
                f"{name}: {probe.objection}, so the low-rank part can't be applied inside it. Use a DynamicCache per adapter"
            )
        return probe

    def states(projected: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        found = run(projected).states
        assert found is not None
        if any(torch.finfo(t.dtype).eps > torch.finfo(dtype).eps for t in found):
            raise NotTried(
                f"{name}: its attention could not be tried out: it does not keep the dtype of keys and values"
            )
        return (found[0].float(), found[1].float()) if dtype != torch.float32 else found

    before = states(base)
    after = states({which: base[which] + delta[which] for which in widths})
    if dtype != torch.float32:
        # What was added is what the sum has more, after its rounding.
        delta = {which: (base[which] + delta[which]).float() - base[which].float() for which in widths}
        base = {which: base[which].float() for which in widths}
        cos, sin = (None if t is None else t.float() for t in (cos, sin))
    key_heads, head_dim = before[0].shape[1], before[0].shape[-1]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(1, _PROBE_TOKENS, -1, head_dim).transpose(1, 2)

    def explains(expected: torch.Tensor, actual: torch.Tensor) -> bool:
        if expected.shape != actual.shape:
            return False
        worst, largest = ((x.abs().amax((0, 1, 3))) for x in (expected - actual, expected))
        return bool((worst <= _PROBE_TOLERANCE[dtype] * largest).all())

    def delta_of(role: str, columns: FusedColumns | None) -> torch.Tensor | None:
        """What is added to the projection's columns of this role, (1, T, Hk * D); None: it has no adapters."""
        whole = delta.get(sources[role])
        if whole is None or columns is None:
            return whole
        return whole[..., columns.key if role == "k_proj" else columns.value]

    fused = sources["k_proj"] if sources["k_proj"] == sources["v_proj"] else None
    splits: list[FusedColumns | None] = [None]
    if fused is not None and fused in widths:
        projected, values = base[fused][0], before[1][0]
        if dtype != torch.float32:
            # Random numbers of 16 bits repeat: each column gets one of its own, in two digits that are exact there.
            column = torch.arange(widths[fused], device=device)
            digits = torch.stack((column % 256, column // 256, torch.zeros_like(column)))
            values = states({fused: digits.to(dtype)[None]})[1][0]
            projected, values = column[None].float(), values[:, :1] + 256 * values[:, 1:2]
        splits = list(_splits(projected, values, key_heads * head_dim))
        if not splits:
            raise UnsupportedModelError(
                f"{name}: its values are not columns of what {fused} gives{changed}, so an adapter on it has no low-rank form. "
                "Use private_layers, or a DynamicCache per adapter"
            )
    value_delta = delta_of("v_proj", splits[0])
    if value_delta is not None and not explains(heads(value_delta), after[1] - before[1]):
        raise UnsupportedModelError(
            f"{name}: its values are not v_proj's output split into heads of {head_dim}{changed}, so an adapter on v_proj "
            "has no low-rank form. Adapters without v_proj work, and private_layers do"
        )
    if sources["k_proj"] not in widths:
        return replace(NO_ROTATION, head_dim=head_dim, key_heads=key_heads)
    norms = [None, *key_norms(key_heads, head_dim)]
    for columns in splits:
        key_delta = delta_of("k_proj", columns)
        assert key_delta is not None
        if key_delta.shape[-1] != key_heads * head_dim:
            continue
        own = base[sources["k_proj"]]
        own_heads, delta_heads = heads(own if columns is None else own[..., columns.key]), heads(key_delta)
        for norm in norms:
            for layout in _candidates(None if cos is None else cos.shape[-1], head_dim):
                rotate = partial(_rotate_as_the_model, layout, cos=cos, sin=sin)
                if norm is None:
                    expected, difference = rotate(delta_heads), after[0] - before[0]
                else:
                    # gain * K_base + delta_gain * RoPE(g * delta + shift * b), as the low-rank part will be applied
                    u, v = (rotate(x) if norm.after_rotation else x for x in (own_heads, own_heads + delta_heads))
                    s_base, s_adapted = norm.rms(u).to(u.dtype), norm.rms(v).to(u.dtype)
                    difference = after[0] - before[0] * (s_base / s_adapted)
                    added = norm.scaled(delta_heads)
                    if norm.bias is not None:
                        added = added + (s_adapted - s_base) * norm.bias.to(added)[:, None]
                    expected = rotate(added) / s_adapted
                    if norm.rotated_weight is not None:
                        expected = expected * norm.rotated_weight.to(expected)[:, None]
                if explains(expected, difference):
                    if columns is not None:
                        _check_query(name, fused, columns, base, delta, run, dtype)
                    return replace(layout, key_norm=norm, head_dim=head_dim, key_heads=key_heads, fused=columns)
    raise UnsupportedModelError(
        f"{name}: its keys are not k_proj's output plus a rotation{changed} (are they scaled or clipped, or normalised "
        "otherwise than by an RMS norm or, before the rotation, a LayerNorm?), so an adapter on k_proj has no low-rank form. "
        "Adapters without k_proj work, and private_layers do"
    )


def _splits(projected: torch.Tensor, values: torch.Tensor, width: int) -> list[FusedColumns]:
    """Where queries, keys and values may stand in the output of a fused projection.

    Values are found by their numbers; keys stand before them, head by head or all together, and the rest is queries.

    Args:
        projected: (T, out), all numbers different. values: (Hk, T, D), what the layer made of it. width: Hk * D.
    """
    flat = values.transpose(0, 1).flatten(1)
    order = projected[0].argsort()
    place = torch.searchsorted(projected[0][order], flat[0].contiguous()).clamp(max=order.numel() - 1)
    value = order[place]
    if not torch.equal(projected[:, value], flat):
        return []
    found = []
    for before in dict.fromkeys((width, values.shape[-1])):
        key = value - before
        if bool((key >= 0).all()) and not bool(torch.isin(key, value).any()):
            rest = torch.ones(projected.shape[1], dtype=torch.bool, device=projected.device)
            rest[key] = rest[value] = False
            found.append(FusedColumns(rest.nonzero().flatten(), key, value))
    return found


def _check_query(
    name: str,
    fused: str | None,
    columns: FusedColumns,
    base: dict[str, torch.Tensor],
    delta: dict[str, torch.Tensor],
    run: Callable[[dict[str, torch.Tensor]], LayoutProbe],
    dtype: torch.dtype,
) -> None:
    """Refuse a layer whose queries depend on the columns that hold keys and values: those get the base alone.

    Raises:
        UnsupportedModelError: they do.
    """
    assert fused is not None
    changed = base[fused].clone()
    for part in (columns.key, columns.value):
        changed[..., part] += delta[fused][..., part]
    before, after = (run({**base, fused: projected.to(dtype)}).query for projected in (base[fused], changed))
    assert before is not None and after is not None
    if not torch.equal(before, after):
        raise UnsupportedModelError(
            f"{name}: its queries are made of the columns of {fused} that give keys and values. Use private_layers, or a "
            "DynamicCache per adapter"
        )


def _candidates(width: int | None, head_dim: int) -> list[RotaryLayout]:
    """Layouts that are possible with cos/sin of this width."""
    found = [NO_ROTATION]
    if width is None:
        return found
    if width <= head_dim:
        found += [RotaryLayout(width, interleaved=True, columns="even"), RotaryLayout(width, columns="first")]
        found += [RotaryLayout(width, interleaved=True, columns="first")]
    if 2 * width <= head_dim:
        found += [RotaryLayout(2 * width), RotaryLayout(2 * width, interleaved=True)]
    return found + [replace(layout, reversed=True) for layout in found[1:]]


def _rotate_as_the_model(
    layout: RotaryLayout, x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None
) -> torch.Tensor:
    """Rotate (1, Hk, T, D) with cos/sin in the model's width."""
    if cos is None or sin is None or layout.rotary_dim == 0:
        return x
    sin = -sin if layout.reversed else sin
    return layout.rotate(x, cos, sin) if layout.columns == "all" else _rotate_full(x, cos, sin, layout)


def _rotate_full(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: RotaryLayout) -> torch.Tensor:
    """Rotation with cos/sin of full width, whose two copies of an angle may differ (only the probe makes them differ)."""
    if layout.interleaved and layout.columns == "first":
        # GLM: the first half of the columns, each repeated for its pair.
        cos, sin = (layout.half_width(t).repeat_interleave(2, dim=-1) for t in (cos, sin))
    rotated, rest = x[..., : layout.rotary_dim], x[..., layout.rotary_dim :]
    if layout.interleaved:
        turned = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return torch.cat((rotated * cos.unsqueeze(1) + turned * sin.unsqueeze(1), rest), dim=-1)
