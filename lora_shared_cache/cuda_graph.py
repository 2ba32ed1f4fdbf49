"""CUDA graphs, and the two streams of a device on which they are captured and run."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_capture_lock = threading.Lock()
_capture_streams: dict[torch.device, torch.cuda.Stream] = {}
_replay_streams: dict[torch.device, torch.cuda.Stream] = {}


class CudaGraph:
    """One captured function.

    Args:
        run: launches device work on fixed addresses, and returns its outputs.
        pool: memory that graphs which never run at the same time have in common.
        device: where it launches that; a stream of another device would record nothing.
    """

    def __init__(self, run: Callable[[], Any], pool: Any, device: torch.device):
        # One stream for a device, whichever thread asks. Not the one that replays run on: what another thread launches there
        # would become a part of the graph.
        with _capture_lock, _no_garbage_collection(), torch.cuda.device(device):
            stream = _stream_of(device, _capture_streams)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
                self._out = run()

    def replay(self) -> Any:
        """Run it again on the current stream; returns the outputs, which the next replay overwrites."""
        self._graph.replay()
        return self._out


def start_beside(device: torch.device, run: Callable[[], Any]) -> tuple[Any, torch.cuda.Event | None]:
    """Let ``run`` launch behind what the current stream has to do so far, without anything later waiting for it.

    All replays of a device go through here, so that they run one after the other: what was captured on one stream has the
    workspace of its matrix products in common, whichever cache it belongs to.

    Returns:
        what ``run`` returns, and what :func:`wait_for` waits for. Elsewhere than on CUDA it has run already.
    """
    if device.type != "cuda":
        return run(), None
    stream = _stream_of(device, _replay_streams)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        return run(), stream.record_event()


def wait_for(device: torch.device, done: torch.cuda.Event | None) -> None:
    """Let the current stream of the device wait for what :func:`start_beside` has started; the host does not wait."""
    if done is not None:
        torch.cuda.current_stream(device).wait_event(done)


def _stream_of(device: torch.device, streams: dict[torch.device, torch.cuda.Stream]) -> torch.cuda.Stream:
    stream = streams.get(device)
    if stream is None:
        stream = streams.setdefault(device, torch.cuda.Stream(device))
    return stream


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """No collection meanwhile: it could free another cache's graph, which CUDA forbids during a capture and so breaks it off."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
