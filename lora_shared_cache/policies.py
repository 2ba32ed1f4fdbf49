"""Sharing policies: whose low-rank entries are written while an agent runs, and which ones the agent reads.

Pure bookkeeping over adapter names; tensors and modules are elsewhere. The names are those of LRAgent (arXiv 2602.01053):
``base_shared`` is its BaseShared, ``base_lr_shared`` its BaseLRShared; ``lr_precomputed`` is this project's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .adapters import Agent, agent_name, names_in, rows_of
from .errors import SharedCacheError

Sharing = Literal["auto", "base_shared", "base_lr_shared", "lr_precomputed"]
SHARING_POLICIES: tuple[str, ...] = ("auto", "base_shared", "base_lr_shared", "lr_precomputed")

EntryKey = tuple[str, ...]
SHARED_ENTRY: EntryKey = ("shared.",)
"""Key of the one low-rank cache of all adapters with a common A. No adapter has this name: torch.nn.ModuleDict refuses dots."""


def private_key(agent: Agent) -> EntryKey:
    """Key of an agent's own K and V on private layers. No adapter's name is empty, so it is the key of nothing else."""
    return ("", *agent)


def entry_name(key: EntryKey) -> str:
    """Whose entries they are, as a text: "plan", "plan+act", "*" for all adapters with a common A; see :func:`agent_name`."""
    if is_private(key):
        return agent_name(key[1:])
    return "+".join(("*", *key[1:])) if key[:1] == SHARED_ENTRY else agent_name(key)


def is_private(key: EntryKey) -> bool:
    """Whether the key is that of an agent's own K and V, not of a low-rank cache."""
    return key[:1] == ("",)


@dataclass(frozen=True)
class Entry:
    """One low-rank cache, or one agent's own K and V on private layers.

    Attributes:
        key: identifies it within the cache.
        names: the adapters whose A's it was computed with; none for K and V.
        shared: those adapters have one A in common (else their A's stand below each other).
        gains: it holds only the two numbers per key of one adapter, on models that normalise keys (``key_norm.py``); its
            low-rank entries are those of :data:`SHARED_ENTRY`.
        activated: they are those of an adapter that is active from an invocation on (aLoRA), and zeros before.

    With the key of an agent whose rows have adapters of their own, each row's entries are those of its adapter, with zeros up to
    the largest rank.
    """

    key: EntryKey
    names: tuple[str, ...]
    shared: bool = False
    gains: bool = False
    activated: bool = False

    @property
    def rows(self) -> tuple[str, ...] | None:
        """The adapter of each row, or None: all rows are computed with all ``names``."""
        return rows_of(self.key)


@dataclass(frozen=True)
class Policy:
    """A resolved sharing policy for the adapters that are loaded now.

    Attributes:
        name: "base_shared", "base_lr_shared" or "lr_precomputed".
        adapters: loaded adapters with a LoRA on some k_proj or v_proj, sorted.
        group: of those, the ones that share A; only with "base_lr_shared".
        key_norm: the model normalises keys that adapters change: each adapter has two numbers of its own per key.
        activated: of ``adapters``, those that are active from an invocation on (aLoRA). Others' tokens need no entries of theirs,
            so each has its own under every policy.
        private: some layers are private: each agent has K and V of its own there. Only with "base_shared".
    """

    name: str
    adapters: tuple[str, ...]
    group: tuple[str, ...] = ()
    key_norm: bool = False
    private: bool = False
    activated: tuple[str, ...] = ()

    def readers(self, agent: Agent) -> list[tuple[Entry, tuple[str, ...]]]:
        """What the agent needs, each with the agent's adapters that read it in low rank.

        Empty for the base model, unless there are private layers.
        """
        found = self._low_rank(agent)
        if self.private:
            found.append((Entry(private_key(agent), ()), ()))
        return found

    def _low_rank(self, agent: Agent) -> list[tuple[Entry, tuple[str, ...]]]:
        names = tuple(name for name in names_in(agent) if name in self.adapters)
        if any(name in self.activated for name in names):
            return [(Entry(agent, names, activated=True), names)]
        if self.name == "lr_precomputed":
            return [(Entry((name,), (name,)), (name,)) for name in names]
        found: list[tuple[Entry, tuple[str, ...]]] = []
        members = tuple(name for name in names if name in self.group)
        if members:
            found.append((self._shared_entry(), members))
            found += [(entry, entry.names) for entry in self._gains(members)]
        own = tuple(name for name in names if name not in self.group)
        if own:
            # What is not shared belongs to the whole combination: its hidden states are those of all active adapters. So it
            # does to the adapters of all rows together: there is one coverage for all rows.
            found.append((Entry(agent, own), own))
        return found

    def writers(self, agent: Agent) -> list[Entry]:
        """What is written while the agent processes tokens."""
        if self.name == "lr_precomputed":
            own = [entry for entry, _ in self._low_rank(agent) if entry.activated]
            return own + [Entry((name,), (name,)) for name in self.adapters if name not in self.activated]
        entries = [entry for entry, _ in self.readers(agent)]
        if self.group and all(entry.key != SHARED_ENTRY for entry in entries):
            # Whoever processes a token, the base model included, writes the common entry.
            entries.append(self._shared_entry())
        # So is what each of its readers needs besides.
        return entries + [entry for entry in self._gains(self.group) if entry not in entries]

    def _gains(self, names: Sequence[str]) -> list[Entry]:
        return [Entry((*SHARED_ENTRY, name), (name,), gains=True) for name in names] if self.key_norm else []

    def _shared_entry(self) -> Entry:
        return Entry(SHARED_ENTRY, self.group, shared=True)


def check_sharing(sharing: str) -> None:
    """Refuse an unknown policy name.

    Raises:
        SharedCacheError: with the name and the known ones.
    """
    if sharing not in SHARING_POLICIES:
        raise SharedCacheError(f"sharing is {sharing!r}, expected one of {', '.join(map(repr, SHARING_POLICIES))}")


def check_private_layers(layers: Iterable[int], sharing: str) -> tuple[int, ...]:
    """The private layers, sorted and each once.

    Raises:
        SharedCacheError: something else than indices from 0, or a policy with which agents do not run every token themselves.
    """
    expected = "expected indices of attention layers from 0, for example range(8, 22)"
    if not isinstance(layers, Iterable):
        raise SharedCacheError(f"private_layers is {layers!r}, {expected}")
    given = list(layers)
    for index in given:
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise SharedCacheError(f"private_layers has {index!r}, {expected}")
    if given and sharing not in ("auto", "base_shared"):
        raise SharedCacheError(
            f"sharing is {sharing!r} with private_layers, expected 'base_shared' (or 'auto', which is then the same): a private "
            "layer needs K and V of every token from each agent's own run. Leave out private_layers, or sharing"
        )
    return tuple(sorted(set(given)))


DownDigests = dict[tuple[int, str], tuple[int, ...]]
"""(layer index, "k_proj" or "v_proj") -> content of the down-projection there."""


def first_difference(digests: dict[str, DownDigests]) -> tuple[int, str, str, str] | None:
    """Where two adapters have different A's: (layer index, projection, adapter, other adapter), or None.

    An adapter without a LoRA on a layer agrees with every other one there: it reads nothing.
    """
    seen: dict[tuple[int, str], str] = {}
    for name in sorted(digests):
        for place, value in sorted(digests[name].items()):
            other = seen.setdefault(place, name)
            if digests[other][place] != value:
                return (*place, other, name)
    return None


def sharing_group(digests: dict[str, DownDigests], first: Sequence[str]) -> tuple[str, ...]:
    """The adapters whose A's agree with those of ``first`` (which agree among each other), sorted."""
    group = [name for name in first if name in digests]
    for name in sorted(digests):
        if name not in group and first_difference({n: digests[n] for n in (*group, name)}) is None:
            group.append(name)
    return tuple(sorted(group))
