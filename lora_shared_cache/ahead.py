"""Captured steps that are replayed before the pass they belong to has come, or before it was checked.

Within ``generate`` the step after a captured one is the same again, unless somebody interferes from inside. As soon as a token
is chosen, its step is started on the graphs' own stream (:class:`NextStep`). Meanwhile ``generate`` waits for the token,
prepares the pass, and the pass is checked, which takes the host up to some milliseconds; the output is used if the pass turns
out to be the one that was run, token for token. Otherwise it is dropped: all that was written lies behind the last token.
Whatever a replay must not do to find that out (read memory that is gone, write into another storage) is ruled out before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import StoppingCriteria

from .attachment import Attachment
from .buffers import allocations
from .cuda_graph import start_beside, wait_for

if TYPE_CHECKING:
    from .graphs import DecodeGraphs, Step

# Arguments of a decoder that a captured step brings itself.
OWN_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "cache_position")


def other_arguments(kwargs: dict[str, Any]) -> tuple:
    """The arguments of a decoder that a captured step does not bring itself."""
    return tuple(sorted((name, value) for name, value in kwargs.items() if name not in OWN_ARGUMENTS))


@dataclass(frozen=True, eq=False)
class Expected:
    """The step that follows a captured one in ``generate``, if all stays as it is.

    Attributes:
        step: the same again.
        others: the arguments that it was captured with.
        padded: whether it reads the padding.
        held: the memory of the adapters' weights, so that a replay reads nothing else even where they have just been moved.
    """

    step: Step
    others: tuple
    padded: bool
    held: list[Any]


class _StepPass(NamedTuple):
    """Token ids (B, 1), position ids (B or 1, 1; None: as many as tokens before) and mask (B, T + 1; None: ones) of a step."""

    ids: torch.Tensor
    positions: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Replayed:
    """A step that was replayed ahead, at trajectory position ``start``.

    Attributes:
        done: when it is, on its stream.
        given: what it was started with before its pass came; None: its pass was there.
    """

    step: Step
    start: int
    out: Any
    done: torch.cuda.Event | None
    given: _StepPass | None


class StepsAhead:
    """What is expected, and what was replayed for it.

    Attributes:
        expected: the next step of ``generate``; None: anything may come.
        replayed: a step that was replayed and whose output nobody has taken yet.
        positions: (B or 1, 1) of the last step; None: they are those of the trajectory.
    """

    def __init__(self, graphs: DecodeGraphs):
        self.graphs = graphs
        self.expected: Expected | None = None
        self.replayed: Replayed | None = None
        self.positions: torch.Tensor | None = None

    def forget(self) -> None:
        """``generate`` has ended, and nothing is expected."""
        self.drop()
        self.expected = self.positions = None

    def drop(self) -> None:
        """Nobody takes what was replayed."""
        self.join()
        self.replayed = None

    def join(self) -> None:
        """Whatever the current stream does from here on comes after what was replayed."""
        if self.replayed is not None:
            wait_for(self.replayed.step.ids.device, self.replayed.done)

    def start(self, text: torch.Tensor) -> None:
        """Start the step of the last tokens of ``text`` (B, n), which have just been chosen; their pass comes later."""
        self.drop()
        expected = self.expected
        if expected is None or self.graphs.cache._lock.locked() or not self._can_replay(expected):
            return
        rows = expected.step.ids.shape[0]
        if text.shape[0] != rows or text.dtype != torch.int64 or text.device != expected.step.ids.device:
            return
        # Both belong to the current stream, where the pass is compared with them while the step runs on the other.
        ids = text[:, -1:].clone()
        positions = None if self.positions is None else self.positions + 1
        self._replay(expected, _StepPass(ids, positions, None), before_pass=True)

    def claim(self, attachment: Attachment, kwargs: dict[str, Any]) -> None:
        """The pass has come: drop what was replayed if it is not this one's, and replay now if nothing was yet."""
        expected, replayed, step_pass = self.expected, self.replayed, None
        if expected is not None and self.graphs.cache._attachment is attachment:
            step_pass = self._step_pass(expected, attachment, kwargs)
        if replayed is not None:
            # Asked before the current stream waits for the step, so that the host does not.
            same_step = expected is not None and replayed.step is expected.step
            fits = same_step and step_pass is not None and self._same(replayed, step_pass)
            self.join()
            self.replayed = replayed if fits else None
        elif expected is not None and step_pass is not None and self._can_replay(expected):
            self._replay(expected, step_pass, before_pass=False)
            self.join()

    def take(self, step: Step | None, start: int, fingerprint: tuple) -> Replayed | None:
        """What was replayed, if it was this step at this place, with everything it was captured for as it is now."""
        replayed, self.replayed = self.replayed, None
        if replayed is None or step is None or replayed.step is not step or replayed.start != start:
            return None
        return replayed if fingerprint == step.fingerprint == (fingerprint[0], step.ran_with) else None

    def _can_replay(self, expected: Expected) -> bool:
        graphs, cache, step = self.graphs, self.graphs.cache, expected.step
        start = cache.trajectory_length
        return (
            cache._in_prompt
            and graphs.device_at == (start, step.first)
            and step.windows_at == cache._windows_at
            and step.has_room(start + 1)
            and step.allocations == allocations()
            and step.ran_with == graphs.weights
            and step.graph is not None
            and cache._attachment is not None
            and cache._attachment.weights_version == graphs.weights[0]
            and expected.padded == (cache._trajectory.attention_mask is not None)
            and not (step.ids.is_cuda and torch.cuda.is_current_stream_capturing())
        )

    def _step_pass(self, expected: Expected, attachment: Attachment, kwargs: dict[str, Any]) -> _StepPass | None:
        """The pass as one of the expected step, if it can be one by what the host knows of it."""
        step, start = expected.step, self.graphs.cache.trajectory_length
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if not isinstance(ids, torch.Tensor) or ids.shape != step.ids.shape or kwargs.get("inputs_embeds") is not None:
            return None
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.shape == (len(ids), start + 1)):
            return None
        positions = kwargs.get("position_ids") if attachment.takes_position_ids else None
        if positions is not None and not (
            isinstance(positions, torch.Tensor) and positions.shape == step.positions.shape
        ):
            return None
        others = other_arguments(kwargs)
        plain = all(value is None or isinstance(value, bool | int | float | str) for _, value in others)
        return _StepPass(ids, positions, mask) if plain and others == expected.others else None

    def _same(self, replayed: Replayed, found: _StepPass) -> bool:
        """Whether the pass has the tokens, positions and padding that the step was started with."""
        if replayed.given is None:
            return False
        ids, positions, _ = replayed.given
        if found.ids.device != ids.device or (found.positions is None and positions is not None):
            return False
        differs = [found.ids != ids]
        if found.positions is not None:
            differs.append(found.positions != (replayed.start if positions is None else positions))
        if found.mask is not None and self.graphs.cache._trajectory.attention_mask is not None:
            differs.append(found.mask[:, -1:] == 0)
        return not bool(torch.cat([d.flatten() for d in differs]).any())

    def _replay(self, expected: Expected, given: _StepPass, before_pass: bool) -> None:
        graphs, step = self.graphs, expected.step
        start = graphs.cache.trajectory_length
        graphs.device_at = None  # unknown, until the step is committed

        def run() -> Any:
            if expected.padded:
                graphs.write_padding(start, given.mask, given.ids)
            step.take_in(given.ids, given.positions, start)
            return step.graph.replay()

        out, done = start_beside(step.ids.device, run)
        self.replayed = Replayed(step, start, out, done, given if before_pass else None)


class NextStep(StoppingCriteria):
    """Stops nothing: the last criterion of a ``generate`` call starts the step of the token that was just chosen.

    Args:
        ahead: of the cache that the call was given.
        length: tokens of the whole text with which ``generate`` ends; the last one's step is not run. None: not known.
    """

    def __init__(self, ahead: StepsAhead, length: int | None):
        self.ahead, self.length = ahead, length
        self._no: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B,) False."""
        if self._no is None or self._no.shape[0] != input_ids.shape[0] or self._no.device != input_ids.device:
            self._no = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        if self.length is None or input_ids.shape[1] < self.length:
            self.ahead.start(input_ids)
        return self._no
