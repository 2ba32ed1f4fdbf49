"""Random problems over the argument grid, for the interpreter tests and the GPU tests alike."""

from __future__ import annotations

import torch

from .dense import attention_dense, sdpa_peer


def make(
    B=2, Hk=2, G=2, S=1, T=70, D=16, r=3, rv=None, n=1, dtype=torch.float32, device="cpu", key=True, val=True,
    rope="half", rotary_dim=None, trunk=False, lr="row", layout="bhtd", mask=None, gains=None, weight=False, length=None,
    sinks=False, seed=0, **options,
):  # fmt: skip
    """(query, key, value), keywords; ``key``/``val``: with a low-rank part; ``rope``: half, full, interleaved or None."""
    g = torch.Generator(device=device).manual_seed(seed)

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, device=device, dtype=torch.float32) * scale).to(dtype)

    rv = r if rv is None else rv
    q = rand(B, Hk * G, S, D)
    rows = 1 if trunk else B
    if layout == "bthd":
        k, v = (rand(rows, T, Hk, D).transpose(1, 2) for _ in range(2))
    elif layout == "strided":
        k, v = rand(rows, Hk, T, 2 * D)[..., ::2], rand(rows, Hk, T, D + 3)[..., 3:]
    else:
        k, v = rand(rows, Hk, T, D), rand(rows, Hk, T, D)
    if trunk:
        k, v = k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)
    a = dict(options)
    lead = {"row": B, "one": 1, "adapter": n}[lr]
    up_shape = (Hk,) if n == 0 else (n, Hk)
    if key:
        low_rank = rand(lead, T, r) if layout != "strided" else rand(lead, T, r + 1)[..., 1:]
        a["key_low_rank"], a["key_up"] = low_rank, rand(*up_shape, r, D, scale=r**-0.5)
    if val:
        a["value_low_rank"], a["value_up"] = rand(lead, T, rv), rand(*up_shape, rv, D, scale=rv**-0.5)
    if lr == "adapter":
        a["low_rank_per_adapter"] = True
    if n > 1:
        # Every adapter and the base model (-1), in an order that isn't the rows'.
        a["adapter_index"] = (torch.arange(B, device=device) * 2 + 1) % (n + 1) - 1
    if rope is not None and key:
        half = (rotary_dim or D) // 2
        angle = torch.rand(1 if trunk else B, T, half, generator=g, device=device) * 6.28
        cos, sin = angle.cos(), angle.sin()
        if rope == "full":
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        elif rope == "interleaved_full":
            cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        a["cos"], a["sin"] = cos.to(dtype), sin.to(dtype)
        a["rotary_interleaved"] = rope.startswith("interleaved")
        a["rotary_dim"] = rotary_dim
    if gains is not None:
        lead = 1 if gains == "one" else B
        a["key_gain"] = torch.rand(lead, Hk, T, generator=g, device=device) + 0.5
        a["key_delta_gain"] = torch.rand(lead, Hk, T, generator=g, device=device) + 0.5
    if weight:
        a["key_delta_weight"] = torch.randn(Hk, D, generator=g, device=device)
    if mask == "padding":
        a["attention_mask"] = torch.rand(B, T, generator=g, device=device) > 0.3
    elif mask == "bool":
        a["attention_mask"] = torch.rand(B, 1, S, T, generator=g, device=device) > 0.3
    elif mask == "float":
        a["attention_mask"] = rand(1, Hk * G, S, T)
    elif mask == "nothing":
        a["attention_mask"] = torch.zeros(B, 1, S, T, dtype=torch.bool, device=device)
    if length == "rows":
        a["key_length"] = (T - torch.arange(B, device=device) * max(1, (T - S) // B)).to(torch.int32)
    elif length is not None:
        a["key_length"] = length
    if sinks:
        a["sinks"] = rand(Hk * G)
    return (q, k, v), a


def norm_and_max(error):
    return error.norm().item(), error.abs().max().item()


def check(out, lse, qkv, a, factor=2.0):
    """Error against float64 at most ``factor`` times that of PyTorch's SDPA in the same dtype on ready-made K and V.

    Of the error's norm, that is. The largest of all errors may be half as much again above, from 1024 outputs on: it is there
    to find an element among many that is wrong on its own, and the ratio of two maxima of rounding noise scatters (0.3 to 4
    among 128 outputs, for the same kernel).
    """
    exact, exact_lse = attention_dense(*qkv, **a)
    peer = sdpa_peer(*qkv, **a)
    assert out.shape == exact.shape and out.dtype == qkv[0].dtype
    assert torch.isfinite(out).all(), "an output was not written, or is not finite"
    ours, theirs = norm_and_max(out.double() - exact), norm_and_max(peer.double() - exact)
    # Where PyTorch happens to be exact (one visible key), a rounding of the result is still allowed.
    rounding = torch.finfo(out.dtype).eps / 2
    floor = rounding * exact.norm().item(), rounding * exact.abs().max().item()
    factors = (factor, 1.5 * factor if out.numel() >= 1024 else 1e9)
    for name, o, t, f, times in zip(("norm", "max"), ours, theirs, floor, factors, strict=True):
        assert o <= times * max(t, f), f"{name} of the error {o:.3e}, SDPA's is {t:.3e} (rounding alone {f:.3e})"
    nothing = exact_lse == -torch.inf
    assert ((lse == -torch.inf) == nothing).all()
    assert (out[nothing] == 0).all()
    scores = exact_lse[~nothing].abs().max().item() if (~nothing).any() else 0.0
    if scores:
        # A log-sum-exp inherits the absolute error of a score, which is a sum of D products in this dtype.
        assert (lse.double() - exact_lse)[~nothing].abs().max().item() <= 8 * torch.finfo(out.dtype).eps * max(
            1.0, scores
        )
    return ours[0] / max(theirs[0], floor[0], torch.finfo(torch.float64).tiny)


# name -> keywords of make(); S decides the kernel: few queries split-KV, blocks the extend kernel.
GRID = {
    "plain": dict(),
    "key_only": dict(val=False),
    "value_only": dict(key=False),
    "base": dict(key=False, val=False),
    "ranks_differ": dict(r=5, rv=18),
    "rank_3": dict(r=3),
    "rank_6": dict(r=6),
    "rank_8": dict(r=8),
    "rank_64": dict(r=64),
    "rank_70": dict(r=70),
    "up_3d": dict(n=0),
    "adapters": dict(n=2, B=3),
    "adapters_shared_lr": dict(n=2, B=3, lr="one"),
    "adapters_own_lr": dict(n=3, B=4, lr="adapter"),
    "trunk": dict(n=3, B=5, lr="adapter", trunk=True),
    "trunk_rows": dict(n=2, B=3, lr="row", trunk=True),
    "trunk_one": dict(n=1, B=3, lr="one", trunk=True),
    "eight_rows": dict(n=8, B=8, lr="adapter", trunk=True),
    "trunk_gains": dict(n=2, B=3, lr="row", trunk=True, gains="rows"),
    "trunk_lengths": dict(n=2, B=3, lr="row", trunk=True, length="rows"),
    "full_width": dict(rope="full"),
    "interleaved": dict(rope="interleaved"),
    "interleaved_full": dict(rope="interleaved_full"),
    "partial": dict(rotary_dim=8),
    "partial_interleaved": dict(rotary_dim=6, rope="interleaved"),
    "no_rope": dict(rope=None),
    "head_size_20": dict(D=20),
    "gains": dict(gains="rows"),
    "gains_one": dict(gains="one"),
    "weights": dict(gains="rows", weight=True),
    "gains_without_lr": dict(gains="rows", key=False),
    "scale": dict(scale=0.37),
    "not_causal": dict(is_causal=False),
    "window": dict(sliding_window=9),
    "window_not_causal": dict(sliding_window=9, is_causal=False),
    "softcap": dict(softcap=2.0),
    "sinks": dict(sinks=True),
    "sinks_window": dict(sinks=True, sliding_window=5),
    "padding": dict(mask="padding"),
    "bool_mask": dict(mask="bool"),
    "float_mask": dict(mask="float"),
    "sees_nothing": dict(mask="nothing"),
    "sees_nothing_sinks": dict(mask="nothing", sinks=True),
    "length": dict(length=41),
    "lengths": dict(length="rows"),
    "layout": dict(layout="bthd"),
    "strided": dict(layout="strided"),
    "strided_trunk": dict(n=2, B=3, r=4, layout="strided", trunk=True),
    "mha": dict(G=1, Hk=3),
    "everything": dict(
        n=2, B=3, rope="interleaved", rotary_dim=8, gains="rows", weight=True, sliding_window=30, softcap=3.0, sinks=True,
        mask="padding", length="rows", layout="bthd",
    ),
}  # fmt: skip
