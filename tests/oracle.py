"""What each sharing policy has to compute, written once more by hand: a Llama in plain loops over a dense cache.

It reads the weights of a (twin) ``PeftModel`` and shares no code with the package, with PEFT's forward or with
Transformers' attention. Every token keeps its base K (after RoPE) and base V from whoever processed it first; the low-rank
entries are filled as the policy's definition says; attention is dense, with K and V fully expanded. In private layers each
agent keeps the K and V that it computed itself. Of a sliding layer the last ``window`` tokens are shared: an agent that runs
older ones again reads what it computes itself for them.
"""

from __future__ import annotations

import math

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

Agent = tuple[str, ...]


def _linear(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None, dict]:
    """(W, b, {adapter: (A, s * B)}) of a linear layer with or without LoRA."""
    if not isinstance(module, LoraLayer):
        return module.weight, module.bias, {}
    base = module.base_layer
    pairs = {
        name: (module.lora_A[name].weight, module.scaling[name] * module.lora_B[name].weight) for name in module.lora_A
    }
    return base.weight, base.bias, pairs


class LlamaOracle:
    """One trajectory, one batch row, under one policy.

    Args:
        model: a tiny Llama in a ``PeftModel``, in float64, that is not attached. It is read anew at each turn.
        sharing: "base_shared", "lr_precomputed" or "base_lr_shared" (all adapters have equal A's on k/v).
        names: the loaded adapters.
        private: indices of the layers in which nothing is shared; with "base_shared".
    """

    def __init__(self, model: nn.Module, sharing: str, names: list[str], private: tuple[int, ...] = ()):
        self.llama = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.sharing, self.names = sharing, list(names)
        self.private = tuple(private)
        self.layers = self.llama.model.layers
        config = self.llama.config
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(self.layers)
        self.windows = [window if kind == "sliding_attention" else None for kind in types]
        self.ids: list[int] = []
        # Per layer and token: base key (after RoPE) and base value, each (Hk, D).
        self.base: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self.layers]
        # Per entry key, layer and projection: one {adapter: A x} for each covered token.
        self.entries: dict[object, list[dict[str, list[dict[str, torch.Tensor]]]]] = {}
        # Per agent, private layer and token: key (after RoPE) and value as this agent computed them.
        self.own: dict[Agent, dict[int, list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        # In a turn of rows with adapters of their own: what names the entries that such a batch has for itself.
        self._batch: object = None

    # ---- who writes and reads what: the definitions of the policies ----

    def _reads(self, agent: Agent) -> object:
        if self.sharing == "base_lr_shared":
            return "*"
        return agent if self._batch is None else self._batch

    def _entry_length(self, key: object) -> int:
        """Leading tokens that have entries of this key."""
        return len(self.entries[key][0]["k_proj"]) if key in self.entries else 0

    def coverage(self, agent: Agent) -> int:
        if self.private:
            return len(self.own[agent][self.private[0]]) if agent in self.own else 0
        if not agent:
            return len(self.ids)
        if self.sharing == "lr_precomputed":
            return min(self._entry_length((name,)) for name in agent)
        return self._entry_length(self._reads(agent))

    def _writes(self, agent: Agent) -> list[tuple[object, list[str]]]:
        if self.sharing == "base_lr_shared":
            return [("*", self.names)]
        if self.sharing == "lr_precomputed":
            return [((name,), [name]) for name in self.names]
        return [(self._reads(agent), list(agent))] if agent or self._batch is not None else []

    def crop(self, n: int) -> None:
        keep = len(self.ids) - n
        del self.ids[keep:]
        for stored in self.base:
            del stored[keep:]
        for layers in self.entries.values():
            for parts in layers:
                for tokens in parts.values():
                    del tokens[keep:]
        for layers in self.own.values():
            for tokens in layers.values():
                del tokens[keep:]

    def forget(self, name: str) -> None:
        """Drop the entries of every combination with this adapter."""
        self.entries = {k: v for k, v in self.entries.items() if k == "*" or name not in k}
        self.own = {agent: layers for agent, layers in self.own.items() if name not in agent}

    def fork(self) -> LlamaOracle:
        copy = LlamaOracle(self.llama, self.sharing, self.names, self.private)
        copy.ids = list(self.ids)
        copy.base = [list(stored) for stored in self.base]
        copy.entries = {
            k: [{which: list(tokens) for which, tokens in parts.items()} for parts in layers]
            for k, layers in self.entries.items()
        }
        copy.own = {agent: {i: list(t) for i, t in layers.items()} for agent, layers in self.own.items()}
        return copy

    # ---- the model ----

    def turn_in_batch(self, agent: Agent, ids: list[int], start: int, batch: object) -> torch.Tensor:
        """:meth:`turn` of one row, in which the batch as a whole runs tokens ``start ...``.

        Args:
            batch: what names the entries of this assignment of adapters to rows; None: all rows have the same adapter.
        """
        self._batch = batch
        try:
            return self.turn(agent, ids, start)
        finally:
            self._batch = None

    @torch.no_grad()
    def turn(self, agent: Agent, ids: list[int], start: int | None = None) -> torch.Tensor:
        """Give an agent the whole trajectory: logits (n, vocabulary) of the n tokens that it has to run.

        Those are the tokens it does not cover, and at least the last one; or those from ``start`` on.
        """
        assert ids[: len(self.ids)] == self.ids
        start = min(self.coverage(agent), len(ids) - 1) if start is None else start
        lengths = {key: self._entry_length(key) for key in self.entries}
        self.ids = list(ids)
        writes = [
            (key, names, self._entry_length(key))
            for key, names in self._writes(agent)
            if self._entry_length(key) >= start
        ]
        for key, _, _ in writes:
            self.entries.setdefault(key, [{"k_proj": [], "v_proj": []} for _ in self.layers])
        if self.private:
            self.own.setdefault(agent, {index: [] for index in self.private})
        x = self.llama.model.embed_tokens.weight[torch.tensor(ids[start:])]
        for index, layer in enumerate(self.layers):
            attention = layer.self_attn
            h = self._norm(layer.input_layernorm, x)
            q = self._project(attention.q_proj, h, agent)
            # In a private layer nothing is split: the agent's own projections.
            writer = agent if index in self.private else ()
            base = {which: self._project(getattr(attention, which), h, writer) for which in ("k_proj", "v_proj")}
            D = attention.head_dim
            q = self._rotate(q.view(len(h), -1, D), range(start, len(ids)))
            k = self._rotate(base["k_proj"].view(len(h), -1, D), range(start, len(ids)))
            v = base["v_proj"].view(len(h), -1, D)
            stored = self.own[agent][index] if index in self.private else self.base[index]
            window = self.windows[index]
            mine = self._mine(window, start, len(stored), len(ids))
            for t in range(len(stored), len(ids)):
                stored.append((k[t - start], v[t - start]))
            read = [(k[t - start], v[t - start]) if t in mine else stored[t] for t in range(len(ids))]
            for key, names, length in writes:
                for which in ("k_proj", "v_proj"):
                    _, _, pairs = _linear(getattr(attention, which))
                    for t in range(length, len(ids)):
                        self.entries[key][index][which].append(
                            {name: pairs[name][0] @ h[t - start] for name in names if name in pairs}
                        )
            keys, values = self._expand(index, attention, agent, read, start, h, lengths)
            out = torch.zeros(len(h), q.shape[1], D, dtype=x.dtype)
            group = q.shape[1] // keys.shape[1]
            for i in range(len(h)):
                stop = start + i + 1
                seen = slice(0 if window is None else max(0, stop - window), stop)
                for head in range(q.shape[1]):
                    scores = keys[seen, head // group] @ q[i, head] / math.sqrt(D)
                    out[i, head] = torch.softmax(scores, dim=0) @ values[seen, head // group]
            x = x + self._project(attention.o_proj, out.flatten(1), agent)
            h = self._norm(layer.post_attention_layernorm, x)
            gate, up = self._project(layer.mlp.gate_proj, h, agent), self._project(layer.mlp.up_proj, h, agent)
            x = x + self._project(layer.mlp.down_proj, gate * torch.sigmoid(gate) * up, agent)
        return self._norm(self.llama.model.norm, x) @ self.llama.lm_head.weight.T

    @staticmethod
    def _mine(window: int | None, start: int, stored: int, stop: int) -> range:
        """Tokens for which a pass from ``start`` on reads what it computes itself, of those that are stored."""
        return range(start, start) if window is None else range(start, min(max(stored - window, start), stop))

    def _expand(self, index, attention, agent: Agent, read, start, h, lengths) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.stack([k for k, _ in read])
        values = torch.stack([v for _, v in read])
        if index in self.private:
            return keys, values
        stop = len(read)
        for which in ("k_proj", "v_proj"):
            _, _, pairs = _linear(getattr(attention, which))
            for name in agent:
                if name not in pairs:
                    continue
                key = (name,) if self.sharing == "lr_precomputed" else self._reads(agent)
                entries = self.entries[key][index][which]
                mine = self._mine(self.windows[index], start, lengths.get(key, 0), stop)
                a = torch.stack([pairs[name][0] @ h[t - start] if t in mine else entries[t][name] for t in range(stop)])
                delta = (a @ pairs[name][1].T).view(stop, -1, attention.head_dim)
                if which == "k_proj":
                    keys = keys + self._rotate(delta, range(stop))
                else:
                    values = values + delta
        return keys, values

    @staticmethod
    def _project(module: nn.Module, x: torch.Tensor, agent: Agent) -> torch.Tensor:
        weight, bias, pairs = _linear(module)
        out = x @ weight.T if bias is None else x @ weight.T + bias
        for name in agent:
            if name in pairs:
                a, b = pairs[name]
                out = out + x @ a.T @ b.T
        return out

    @staticmethod
    def _norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module.weight * x / (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()

    def _rotate(self, x: torch.Tensor, positions: range) -> torch.Tensor:
        """(n, H, D) rotated as complex numbers; angles rounded to float32, as Transformers computes them."""
        half = x.shape[-1] // 2
        theta = self.llama.config.rope_parameters["rope_theta"]
        exponents = torch.arange(0, 2 * half, 2, dtype=torch.int64).float() / (2 * half)
        frequencies = 1.0 / (theta**exponents)
        angles = torch.tensor(list(positions), dtype=torch.float32)[:, None] * frequencies
        turn = torch.complex(angles.cos().double(), angles.sin().double())[:, None]
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((z.real, z.imag), dim=-1)
