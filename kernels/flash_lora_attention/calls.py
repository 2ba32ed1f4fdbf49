"""Calls remembered as the launches they came to: all layers of a model call alike, and a call's way to its kernels takes the
host longer than many kernels run.

Shapes, strides, dtypes, alignments and numbers decide everything on that way, what tensors hold decides nothing. So the first
call of a kind is recorded while it runs: which kernels it launched, with which numbers, and where its tensors went among their
arguments. The next one allocates the same and launches the same. What does anything else than that (a copy, one of PyTorch's
attention kernels) shows in a pointer that is neither an argument's nor a recorded allocation's, and is not remembered.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor as TensorMap

# Kinds of calls that are remembered at most; a pass whose lengths the host knows is of a kind of its own.
MAX_KINDS = 512

Tensors = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class _Step:
    """One allocation, launch or PyTorch function: ``function(*arguments)``, where tensors, their maps, and tuples of tensors are
    put into their places by number. Those that it returns are numbered on."""

    function: Callable[..., Any]
    arguments: tuple
    tensors: tuple[tuple[int, int], ...] = ()
    tuples: tuple[tuple[int, tuple[int, ...]], ...] = ()
    returns: int = 0


@dataclass(frozen=True)
class Plan:
    """A kind of call as its allocations and launches; see :meth:`run`."""

    steps: tuple[_Step, ...]
    results: tuple[tuple[int, bool], ...]

    def run(self, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        """The results of a call with other tensors of the same kind."""
        known: list[Any] = [*tensors]
        for step in self.steps:
            arguments = [*step.arguments]
            for place, number in step.tensors:
                arguments[place] = known[number]
            for place, numbers in step.tuples:
                arguments[place] = tuple([known[number] for number in numbers])
            returned = step.function(*arguments)
            if step.returns == 1:
                known.append(returned)
            elif step.returns:
                known += returned
        return tuple([known[number][0] if first else known[number] for number, first in self.results])


class _Recording:
    def __init__(self, tensors: Tensors):
        self.tensors: list[torch.Tensor | TensorMap | None] = [*tensors]
        self.given = len(self.tensors)
        self.steps: list[_Step] = []
        self.fails = False

    def number_of(self, tensor: torch.Tensor, whole: bool) -> int:
        """Which tensor of the call this is, or (unless ``whole``) begins where that begins; -1, and no plan, if that is not
        certain."""
        pointer = tensor.data_ptr()
        found = [i for i, t in enumerate(self.tensors) if isinstance(t, torch.Tensor) and t.data_ptr() == pointer]
        if len(found) == 1 and pointer:
            known = self.tensors[found[0]]
            if not whole or (isinstance(known, torch.Tensor) and _layout(known) == _layout(tensor)):
                return found[0]
        self.fails = True
        return -1

    def note(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        returned: Sequence[torch.Tensor | TensorMap] = (),
        whole: bool = False,
    ) -> None:
        others, tensors, tuples = [*arguments], [], []
        for place, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                others[place] = None
                tensors.append((place, self.number_of(argument, whole)))
            elif isinstance(argument, TensorMap):
                others[place] = None
                tensors.append((place, next(i for i, t in enumerate(self.tensors) if t is argument)))
            elif isinstance(argument, tuple) and any(isinstance(a, torch.Tensor) for a in argument):
                others[place] = None
                tuples.append((place, tuple([self.number_of(a, whole) for a in argument])))
        self.steps.append(_Step(function, tuple(others), tuple(tensors), tuple(tuples), len(returned)))
        self.tensors += returned

    def plan(self, results: tuple[torch.Tensor, ...]) -> Plan | None:
        found = []
        for result in results:
            number = self.number_of(result, whole=False)
            known = self.tensors[number] if number >= self.given else None
            if not isinstance(known, torch.Tensor):
                return None
            first = result.dim() < known.dim()
            if _layout(known[0] if first else known) != _layout(result):
                return None
            found.append((number, first))
        return None if self.fails else Plan(tuple(self.steps), tuple(found))


def _layout(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.stride()


_plans: dict[tuple, Plan | None] = {}
_current = threading.local()


def serve(tensors: Tensors, numbers: tuple, call: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """``call()``, or the launches that another call of this kind came to.

    Args:
        tensors: all that the call is given; the first is one.
        numbers: everything else that decides how it is served.
        call: checks the arguments and serves them.
    """
    if getattr(_current, "recording", None) is not None:
        return call()  # a part of what is being recorded
    found = [None if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() & 15) for t in tensors]
    kind = (*found, numbers)
    first: Any = tensors[0]
    with on_device_of(first):
        if kind in _plans:
            plan = _plans.get(kind)
            return call() if plan is None else plan.run(tensors)
        recording = _current.recording = _Recording(tensors)
        try:
            results = call()
        finally:
            _current.recording = None
    if len(_plans) >= MAX_KINDS:
        _plans.clear()
    _plans[kind] = recording.plan(results)
    return results


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, tokens_first: bool = False) -> torch.Tensor:
    """``torch.empty``, for what kernels write; ``tokens_first``: (B, H, T, D) with heads and tokens exchanged in memory."""
    shape = tuple(shape)
    arguments = (shape, dtype, device, tokens_first)
    tensor = _empty(*arguments)
    recording = getattr(_current, "recording", None)
    if recording is not None:
        recording.note(_empty, arguments, (tensor,))
    return tensor


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, tokens_first: bool) -> torch.Tensor:
    if tokens_first:
        B, H, T, D = shape
        return torch.empty((B, T, H, D), dtype=dtype, device=device).transpose(1, 2)
    return torch.empty(shape, dtype=dtype, device=device)


def tensor_map(
    tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> TensorMap:
    """What a kernel reads or writes in blocks through Hopper's tensor memory accelerator, from the tensor's first element on."""
    made = _tensor_map(tensor, shape, strides, block)
    recording = getattr(_current, "recording", None)
    if recording is not None:
        recording.note(_tensor_map, (tensor, shape, strides, block), (made,))
    return made


def _tensor_map(
    tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> TensorMap:
    return TensorMap(tensor, [*shape], [*strides], [*block])


def perform(function: Callable[..., tuple[torch.Tensor, ...]], *arguments: Any) -> tuple[torch.Tensor, ...]:
    """``function(*arguments)``, of tensors and numbers: several new tensors, whose values alone depend on those of tensors."""
    recording = getattr(_current, "recording", None)
    if recording is None:
        return function(*arguments)
    _current.recording = None
    try:
        returned = function(*arguments)
    finally:
        _current.recording = recording
    recording.note(function, arguments, returned, whole=True)
    return returned


def start_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """``kernel[grid](*arguments, **named)``: a Triton kernel's launch."""
    compiled = kernel[grid](*arguments, **named)
    recording = getattr(_current, "recording", None)
    if recording is None or recording.fails:
        return
    names = _defaults(kernel.fn)
    options = {name: value for name, value in named.items() if name not in names}
    values = {**names, **dict(zip(names, arguments, strict=False)), **named}
    recording.note(starter(compiled, kernel, grid, options), [values[name] for name in names])


def starter(compiled: Any, kernel: Any, grid: tuple[int, ...], options: dict[str, Any]) -> Callable[..., Any]:
    """Launches the same again, given all arguments in the kernel's order: without what Triton does to find ``compiled``."""
    if compiled is None:  # Triton's interpreter compiles nothing
        return functools.partial(kernel[grid], **options)
    runner: Callable[..., Any] = compiled[(*grid, 1, 1)[:3]]
    return runner


@functools.cache
def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """A kernel's arguments in their order, with their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
