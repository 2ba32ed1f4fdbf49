"""Random sequences of everything an agent loop can do, against the policy written by hand (``oracle.py``)."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lora_shared_cache import SharedCacheError, SharedLoRACache, TrajectoryError, buffers

from .oracle import LlamaOracle
from .state_machines import agents_for, case_of, replace_up_projections
from .tiny import VOCAB, activate, assert_equal_logits, logits

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

NAMES = ["plan", "act", "reflect"]
LONGEST = 24
EXAMPLES = 12
agents = st.sampled_from([("plan",), ("act",), ("reflect",), (), ("act", "plan")])
new_tokens = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=4)


class AgentLoop(RuleBasedStateMachine):
    sharing = "base_shared"
    auto = False
    private = ()
    window = None
    captured = False

    def __init__(self):
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        self.model = model = agents_for(NAMES, self.patches, self.captured, self.window)
        self.cache = SharedLoRACache(sharing="auto" if self.auto else self.sharing, private_layers=self.private)
        self.oracle = LlamaOracle(model, self.sharing, NAMES, self.private)
        # First token that each adapter processed, to know what goes when its content changes.
        self.first: dict[str, int] = {}
        self.fork = None
        self.changes = 0

    def teardown(self):
        self.patches.undo()

    @initialize(agent=agents)
    def start(self, agent):
        self.switch(agent)

    @rule(agent=agents)
    def switch(self, agent):
        self.agent = agent
        activate(self.model, list(agent) if agent else None)

    def expect(self, ids):
        previous = len(self.oracle.ids)
        out = self.oracle.turn(self.agent, ids)
        if len(ids) > previous:
            for name in self.agent:
                self.first.setdefault(name, previous)
        return out

    def room(self, n=5):
        return len(self.oracle.ids) + n <= LONGEST

    @precondition(lambda self: self.room())
    @rule(new=new_tokens, whole=st.booleans())
    def append(self, new, whole):
        """The whole trajectory, or its new tokens with a mask over all."""
        ids = self.oracle.ids + new
        expected = self.expect(ids)
        given = ids if whole else new
        out = logits(
            self.model, torch.tensor([given]), self.cache, attention_mask=torch.ones(1, len(ids), dtype=torch.long)
        )[0]
        n = min(len(out), len(expected))
        # New tokens alone: what the agent has not seen is run again before them.
        assert n >= len(new)
        assert_equal_logits(out[-n:], expected[-n:])

    @precondition(lambda self: self.room() and len(self.oracle.ids) > 0)
    @rule(new=new_tokens)
    def append_in_chunks(self, new):
        for token in new:
            ids = self.oracle.ids + [token]
            expected = self.expect(ids)
            out = logits(
                self.model,
                torch.tensor([[token]]),
                self.cache,
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            )[0]
            assert_equal_logits(out[-1], expected[-1])

    @precondition(lambda self: self.room(8))
    @rule(new=new_tokens, steps=st.integers(1, 3), chunk=st.sampled_from([None, 2]))
    def generate(self, new, steps, chunk):
        ids = self.oracle.ids + new
        extra = {} if chunk is None else {"prefill_chunk_size": chunk}
        out = self.model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            past_key_values=self.cache,
            max_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **extra,
        )
        for step in range(steps):
            expected = self.expect(out.sequences[0, : len(ids) + step].tolist())
            # generate hands out float32.
            assert_equal_logits(out.logits[step][0], expected[-1].float(), 1e-5)

    @precondition(lambda self: len(self.oracle.ids) > 0)
    @rule(by_generate=st.booleans())
    def equal_prompt(self, by_generate):
        ids = torch.tensor([self.oracle.ids])
        expected = self.expect(self.oracle.ids)
        mask = torch.ones_like(ids)
        if by_generate:
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=self.cache, max_new_tokens=1, do_sample=False,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            assert_equal_logits(out.logits[0][0], expected[-1].float(), 1e-5)
        else:
            assert_equal_logits(logits(self.model, ids, self.cache, attention_mask=mask)[0, -1], expected[-1])

    @precondition(lambda self: len(self.oracle.ids) > 1)
    @rule(position=st.integers(0, 100), new=new_tokens)
    def contradict(self, position, new):
        ids = self.oracle.ids + new
        position %= len(self.oracle.ids)
        ids[position] = ids[position] % (VOCAB - 2) + 1
        with pytest.raises(TrajectoryError, match=f"position {position}"):
            logits(
                self.model, torch.tensor([ids]), self.cache, attention_mask=torch.ones(1, len(ids), dtype=torch.long)
            )

    @rule(n=st.integers(0, 6))
    def crop(self, n):
        n = min(n, len(self.oracle.ids))
        try:
            self.cache.crop(-n)
        except SharedCacheError as refused:
            # Nothing has changed, as the invariant sees; what it offers instead works.
            assert self.window is not None and n > buffers.MIN_MARGIN
            n = int(re.search(r"crop\(-(\d+)\)[,;]", str(refused)).group(1))
            self.lengths()
            self.cache.crop(-n)
        self.oracle.crop(n)
        if self.window is not None and self.oracle.ids:
            # Entries that went on where sliding layers no longer hold what is before are dropped.
            for agent in [key for key in self.oracle.entries if key != "*"]:
                names = agent if self.sharing == "base_shared" else agent[:1]
                if self.cache._coverage.get(names, 0) == 0:
                    del self.oracle.entries[agent]
            for agent in list(self.oracle.own):
                if self.cache._coverage.get(("", *agent), 0) == 0:
                    del self.oracle.own[agent]
        self.first = {name: first for name, first in self.first.items() if first < len(self.oracle.ids)}

    @rule(agent=agents)
    def another_agent_in_between(self, agent):
        """Switched to and back, without a forward pass."""
        activate(self.model, list(agent) if agent else None)
        self.cache.get_seq_length()
        activate(self.model, list(self.agent) if self.agent else None)

    @precondition(lambda self: self.changes < 3)
    @rule(name=st.sampled_from(NAMES))
    def change_content(self, name):
        """B of an adapter is replaced behind everybody's back, as a hot-swap does."""
        self.changes += 1
        replace_up_projections(self.model, name, 50 + self.changes)
        self.oracle.forget(name)
        first = self.first.pop(name, len(self.oracle.ids))
        self.cache.coverage()
        if self.window is not None and self.cache.trajectory_length == 0:
            first = 0  # sliding layers no longer hold what is before it
        self.oracle.crop(len(self.oracle.ids) - min(first, len(self.oracle.ids)))
        self.first = {n: f for n, f in self.first.items() if f < len(self.oracle.ids)}

    @rule()
    def reset(self):
        self.cache.reset()
        self.oracle = LlamaOracle(self.model, self.sharing, NAMES, self.private)
        self.first = {}

    @rule()
    def fork_cache(self):
        self.fork = (copy.deepcopy(self.cache), self.oracle.fork(), dict(self.first), self.changes)

    @precondition(lambda self: self.fork is not None and self.fork[3] == self.changes)
    @rule()
    def go_on_with_the_fork(self):
        self.fork, (self.cache, self.oracle, self.first, _) = (
            (self.cache, self.oracle, self.first, self.changes),
            self.fork,
        )

    @precondition(lambda self: self.sharing != "base_lr_shared" and self.oracle.ids)
    @rule(name=st.sampled_from(NAMES))
    def drop_adapter(self, name):
        self.cache.drop_adapter(name)
        self.oracle.forget(name)

    @invariant()
    def lengths(self):
        ids = self.oracle.ids
        assert self.cache.trajectory_length == len(ids)
        if ids:
            assert self.cache.token_ids.tolist() == [ids]
            covered = self.cache.coverage()
            assert {n: covered[n] for n in NAMES} == {n: self.oracle.coverage((n,)) for n in NAMES}
            assert self.cache.get_seq_length() == self.oracle.coverage(self.agent)
            assert covered["__base__"] == self.oracle.coverage(())


def machine(sharing, auto=False, private=(), window=None, captured=False):
    class Machine(AgentLoop):
        pass

    Machine.sharing, Machine.auto, Machine.private, Machine.window = sharing, auto, private, window
    Machine.captured = captured
    kind = f"{'auto' if auto else sharing}{'_private' if private else ''}{'_window' if window else ''}"
    kind += "_captured" if captured else ""
    return case_of(Machine, f"AgentLoop_{kind}", EXAMPLES, pytestmark)


TestBaseShared = machine("base_shared")
TestLrPrecomputed = machine("lr_precomputed")
TestBaseLrShared = machine("base_lr_shared")
TestAuto = machine("base_lr_shared", auto=True)
TestPrivateLayer = machine("base_shared", auto=True, private=(1,))
TestBaseSharedWindow = machine("base_shared", window=3)
TestLrPrecomputedWindow = machine("lr_precomputed", window=4)
TestBaseLrSharedWindow = machine("base_lr_shared", window=2)
TestBaseSharedCaptured = machine("base_shared", captured=True)
TestLrPrecomputedCaptured = machine("lr_precomputed", captured=True)
TestBaseLrSharedCaptured = machine("base_lr_shared", captured=True)
TestPrivateLayerCaptured = machine("base_shared", private=(1,), captured=True)
TestLrPrecomputedWindowCaptured = machine("lr_precomputed", window=4, captured=True)
TestPrivateLayerWindow = machine("base_shared", auto=True, private=(0,), window=3)
