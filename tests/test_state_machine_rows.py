"""Random sequences of what a batch can go through: rows with one adapter or with adapters of their own (``adapter_names=``), left
padding, rows that are reordered, selected and repeated; each row against the policy written by hand (``oracle.py``).

What a batch has in common is modelled here: how many tokens each entry covers, of all rows, padding included.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lora_shared_cache import SharedCacheError, SharedLoRACache
from lora_shared_cache.adapters import agent_of_rows
from lora_shared_cache.policies import SHARED_ENTRY

from .oracle import LlamaOracle
from .state_machines import agents_for, case_of, replace_up_projections
from .tiny import VOCAB, activate, assert_equal_logits, logits

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

NAMES = ["plan", "act", "reflect"]
BASE = "__base__"
LONGEST, MOST_ROWS, EXAMPLES = 20, 4, 8
# All rows have the same, or each its own; the latter is as long as the largest batch and cut to the rows that there are.
agents = st.one_of(
    st.sampled_from([("plan",), ("act",), (), ("act", "plan")]),
    st.lists(st.sampled_from([*NAMES, BASE]), min_size=MOST_ROWS, max_size=MOST_ROWS),
)


class BatchLoop(RuleBasedStateMachine):
    sharing = "base_shared"
    captured = False
    window = None
    keep_all = False

    def __init__(self):
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        self.model = agents_for(NAMES, self.patches, self.captured, self.window)
        self.cache = SharedLoRACache(sharing=self.sharing, keep_all_tokens=self.keep_all)
        self.changes, self.seed = 0, 0
        self.forget()

    def teardown(self):
        self.patches.undo()

    def forget(self):
        """The model of an empty cache."""
        self.rows: list[LlamaOracle] = []
        self.pads: list[int] = []
        # The columns of the batch, padding included; tokens that each entry covers; first token that each adapter processed.
        self.ids = torch.zeros(0, 0, dtype=torch.long)
        self.covered: dict[object, int] = {}
        self.first: dict[str, int] = {}

    # ---- what the policy says of a batch ----

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def names_of_rows(self) -> list[tuple[str, ...]]:
        """The adapters of each row."""
        if isinstance(self.agent, tuple):
            return [self.agent] * len(self.rows)
        return [() if name == BASE else (name,) for name in self.agent[: len(self.rows)]]

    def key(self) -> object:
        """What names the entries of the agent under base_shared."""
        names = self.names_of_rows()
        return names[0] if len(set(names)) == 1 else ("rows", *("".join(n) or BASE for n in names))

    def covers(self) -> int:
        """Leading tokens that the agent need not run again."""
        key = self.key()
        if self.sharing == "base_shared":
            return self.covered.get(key, 0) if key else self.length
        needed = [("*",) if self.sharing == "base_lr_shared" else (n,) for names in self.names_of_rows() for n in names]
        return min([self.length, *(self.covered.get(key, 0) for key in needed)])

    def written(self) -> list[object]:
        if self.sharing == "base_shared":
            return [self.key()] if self.key() else []
        return [("*",)] if self.sharing == "base_lr_shared" else [(name,) for name in NAMES]

    def expect(self, ids: torch.Tensor, n: int) -> list[torch.Tensor]:
        """Logits of each row's last ``n`` tokens (without padding) where the whole text is ``ids`` (B, T)."""
        start = min(self.covers(), ids.shape[1] - 1)
        key = self.key()
        batch = key if key and key[0] == "rows" else None
        found = []
        for oracle, names, pad, row in zip(self.rows, self.names_of_rows(), self.pads, ids.tolist(), strict=True):
            out = oracle.turn_in_batch(names, row[pad:], max(0, start - pad), batch)
            found.append(out[-min(n, len(out)) :])
        for key in self.written():
            if self.covered.get(key, 0) >= start:
                self.covered[key] = max(self.covered.get(key, 0), ids.shape[1])
        if ids.shape[1] > self.length:
            for name in {name for names in self.names_of_rows() for name in names}:
                self.first.setdefault(name, self.length)
        self.ids = ids
        return found

    # ---- turns ----

    @initialize(agent=agents)
    def start(self, agent):
        self.switch(agent)

    @rule(agent=agents)
    def switch(self, agent):
        self.agent = agent
        activate(self.model, (list(agent) if agent else None) if isinstance(agent, tuple) else NAMES[0])

    def settings(self, columns: int, new: int) -> dict:
        """Mask, positions of the ``new`` last columns, and the adapters of the rows."""
        mask = torch.ones(len(self.rows), columns, dtype=torch.long)
        for row, pad in enumerate(self.pads):
            mask[row, :pad] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, columns - new :]
        names = {} if isinstance(self.agent, tuple) else {"adapter_names": self.agent[: len(self.rows)]}
        return dict(attention_mask=mask, position_ids=positions, **names)

    def longer(self, rows: int, pads: list[int], new: int) -> torch.Tensor:
        """The text with ``new`` further columns; an empty one gets rows and padding."""
        if not self.length:
            self.rows = [LlamaOracle(self.model, self.sharing, NAMES) for _ in range(rows)]
            self.pads = pads[:rows]
            self.pads[0] = 0
            new += max(self.pads)
            self.ids = torch.zeros(rows, 0, dtype=torch.long)
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        more = torch.randint(1, VOCAB, (len(self.rows), new), generator=generator)
        ids = torch.cat((self.ids, more), dim=1)
        for row, pad in enumerate(self.pads):
            ids[row, :pad] = 0
        return ids

    def room(self, n: int = 6) -> bool:
        return self.length + n <= LONGEST

    rows_and_pads = dict(rows=st.integers(2, 3), pads=st.lists(st.integers(0, 2), min_size=3, max_size=3))

    @precondition(lambda self: self.room())
    @rule(new=st.integers(1, 3), whole=st.booleans(), **rows_and_pads)
    def append(self, new, whole, rows, pads):
        ids = self.longer(rows, pads, new)
        new = ids.shape[1] - self.length
        expected = self.expect(ids, new)
        given = ids if whole else ids[:, -new:]
        out = logits(self.model, given, self.cache, **self.settings(ids.shape[1], given.shape[1]))
        for row, of_row in zip(out, expected, strict=True):
            assert_equal_logits(row[-len(of_row) :], of_row)

    @precondition(lambda self: self.room(8))
    @rule(new=st.integers(1, 3), steps=st.integers(1, 3), **rows_and_pads)
    def generate(self, new, steps, rows, pads):
        ids = self.longer(rows, pads, new)
        more = self.settings(ids.shape[1], 1)
        del more["position_ids"]
        out = self.model.generate(
            input_ids=ids, past_key_values=self.cache, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
            output_logits=True, **more,
        )  # fmt: skip
        for step in range(steps):
            expected = self.expect(out.sequences[:, : ids.shape[1] + step], 1)
            for row, of_row in zip(out.logits[step], expected, strict=True):
                # generate hands out float32.
                assert_equal_logits(row, of_row[-1].float(), 1e-5)

    @precondition(lambda self: self.length > 0)
    @rule()
    def equal_prompt(self):
        expected = self.expect(self.ids, 1)
        out = logits(self.model, self.ids, self.cache, **self.settings(self.length, self.length))
        for row, of_row in zip(out, expected, strict=True):
            assert_equal_logits(row[-1], of_row[-1])

    # ---- going back ----

    @precondition(lambda self: self.length > 0)
    @rule(n=st.integers(0, 6))
    def crop(self, n):
        # Each row keeps a token, or nothing is kept.
        n = self.length if self.length - n <= max(self.pads) else n
        try:
            self.cache.crop(-n)
        except SharedCacheError:
            # Sliding layers do not hold what comes before; nothing has changed, as the invariant sees.
            assert self.window is not None and not self.keep_all and 0 < n < self.length
            return
        self.cut(self.length - n)

    def cut(self, length: int) -> None:
        if length == 0:
            self.forget()
            return
        for oracle, pad in zip(self.rows, self.pads, strict=True):
            oracle.crop(len(oracle.ids) - (length - pad))
        self.ids = self.ids[:, :length]
        self.covered = {key: min(tokens, length) for key, tokens in self.covered.items()}
        self.first = {name: first for name, first in self.first.items() if first < length}
        if self.window is not None and not self.keep_all:
            # Entries that went on where sliding layers no longer hold what is before are dropped.
            for key in [key for key in self.covered if self.cache._coverage.get(self.place_in_cache(key), 0) == 0]:
                del self.covered[key]
                for oracle in self.rows:
                    oracle.entries.pop(self.place(key), None)

    @rule()
    def reset(self):
        self.cache.reset()
        self.forget()

    # ---- rows ----

    @precondition(lambda self: self.length > 0)
    @rule(
        chosen=st.lists(st.integers(0, MOST_ROWS - 1), min_size=1, max_size=3),
        how=st.sampled_from(["select", "reorder"]),
    )
    def choose_rows(self, chosen, how):
        chosen = [row % len(self.rows) for row in chosen]
        if how == "reorder":
            chosen = (chosen * len(self.rows))[: len(self.rows)]
        if self.go_on_with(chosen):
            change = self.cache.batch_select_indices if how == "select" else self.cache.reorder_cache
            change(torch.tensor(chosen))

    @precondition(lambda self: 0 < len(self.rows) <= MOST_ROWS // 2)
    @rule()
    def repeat_rows(self):
        if self.go_on_with([row for row in range(len(self.rows)) for _ in range(2)]):
            self.cache.batch_repeat_interleave(2)

    def go_on_with(self, chosen: list[int]) -> bool:
        """The model with these rows, unless it is open which of two entries stays."""
        renamed: dict[object, object] = {}
        for key in self.covered:
            if key[0] != "rows":
                renamed[key] = key
            else:
                new = [key[1:][row] for row in chosen]
                renamed[key] = ("rows", *new) if set(new) == set(key[1:]) else None
        kept: dict[object, object] = {}
        for key, new in renamed.items():
            if new in kept and self.covered[kept[new]] == self.covered[key]:
                return False
            if new is not None and (new not in kept or self.covered[kept[new]] < self.covered[key]):
                kept[new] = key
        oracles = []
        for row in chosen:
            oracles.append(self.rows[row].fork())
            # Of every key there are entries in every row or in none.
            oracles[-1].entries = {
                self.place(new): oracles[-1].entries[self.place(key)]
                for new, key in kept.items()
                if self.place(key) in oracles[-1].entries
            }
        self.rows, self.pads = oracles, [self.pads[row] for row in chosen]
        self.covered = {new: self.covered[key] for new, key in kept.items()}
        self.ids = self.ids[chosen]
        if not isinstance(self.agent, tuple):
            # The same adapters go on with their rows.
            self.agent = ([self.agent[row] for row in chosen] * MOST_ROWS)[:MOST_ROWS]
        return True

    @staticmethod
    def place(key: object) -> object:
        """The name that the oracle has for an entry."""
        return "*" if key == ("*",) else key

    @staticmethod
    def place_in_cache(key: object) -> object:
        """The name that the cache has for an entry."""
        if key == ("*",):
            return SHARED_ENTRY
        return agent_of_rows(list(key[1:])) if key[0] == "rows" else key

    # ---- adapters ----

    @precondition(lambda self: self.changes < 2)
    @rule(name=st.sampled_from(NAMES))
    def change_content(self, name):
        """B of an adapter is replaced behind everybody's back, as a hot-swap does."""
        self.changes += 1
        replace_up_projections(self.model, name, 50 + self.changes)
        if not self.length:
            return
        self.cache.coverage()
        self.drop(name)
        first = min(self.first.pop(name, self.length), self.length)
        if self.cache.trajectory_length == 0 and self.window is not None:
            first = 0  # sliding layers no longer hold what is before it
        # A row that is padding only is not modelled.
        if 0 < first <= max(self.pads):
            self.cache.reset()
            first = 0
        self.cut(first)

    @precondition(lambda self: self.sharing != "base_lr_shared" and self.length > 0)
    @rule(name=st.sampled_from(NAMES))
    def drop_adapter(self, name):
        self.cache.drop_adapter(name)
        self.drop(name)

    def drop(self, name: str) -> None:
        self.covered = {key: tokens for key, tokens in self.covered.items() if name not in key}
        for oracle in self.rows:
            oracle.forget(name)

    @precondition(lambda self: self.length > 0)
    @rule()
    def go_on_with_a_copy(self):
        self.cache = copy.deepcopy(self.cache)

    @invariant()
    def lengths(self):
        assert self.cache.trajectory_length == self.length
        if not self.length:
            return
        assert torch.equal(self.cache.token_ids, self.ids)
        assert self.cache.rows == len(self.rows)
        found = self.cache.coverage()
        for key, tokens in self.covered.items():
            if key[0] == "rows":
                assert found[f"[{', '.join(key[1:])}]"] == tokens
            elif key != ("*",) and len(key) == 1:
                assert found[key[0]] == tokens
        assert found[BASE] == self.length


def machine(sharing: str, captured: bool = False, window: int | None = None, keep_all: bool = False):
    class Machine(BatchLoop):
        pass

    Machine.sharing, Machine.captured, Machine.window, Machine.keep_all = sharing, captured, window, keep_all
    kind = f"{sharing}{'_captured' if captured else ''}{'_window' if window else ''}{'_all' if keep_all else ''}"
    return case_of(Machine, f"BatchLoop_{kind}", EXAMPLES, pytestmark)


TestBaseShared = machine("base_shared")
TestLrPrecomputed = machine("lr_precomputed")
TestBaseLrShared = machine("base_lr_shared")
TestBaseSharedCaptured = machine("base_shared", captured=True)
TestLrPrecomputedCaptured = machine("lr_precomputed", captured=True)
TestBaseLrSharedCaptured = machine("base_lr_shared", captured=True)
TestBaseSharedWindow = machine("base_shared", window=3)
TestLrPrecomputedWindow = machine("lr_precomputed", window=4)
TestLrPrecomputedWindowCaptured = machine("lr_precomputed", captured=True, window=3)
TestBaseLrSharedWindowAll = machine("base_lr_shared", window=2, keep_all=True)
