"""Which shared forward pass, and which attention layer of it, the code is in: one variable per thread or async task.

Everything a forward pass needs to know reaches the layers through these two variables, never through the model, so that
two threads with two caches on one model can't mix and an exception leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


class Scope:
    """A context variable that ``torch.compile`` can trace through (Dynamo can't trace ``ContextVar.get``)."""

    def __init__(self, name: str):
        self._var: ContextVar[Any] = ContextVar(name, default=None)
        self._traced: Any = None

    def get(self) -> Any:
        """The innermost value set in this thread or task, or None."""
        return self._traced if torch.compiler.is_compiling() else self._var.get()

    def set(self, value: Any) -> None:
        """Set the value without a way back; only for a forward pass that was entered from inside."""
        self._var.set(value)

    @contextmanager
    def __call__(self, value: Any) -> Iterator[None]:
        """Set the value for a ``with`` block."""
        if torch.compiler.is_compiling():
            previous, self._traced = self._traced, value
            try:
                yield
            finally:
                self._traced = previous
        else:
            token = self._var.set(value)
            try:
                yield
            finally:
                self._var.reset(token)


forward_scope = Scope("lora_shared_cache.forward")
layer_scope = Scope("lora_shared_cache.layer")
# What :func:`~lora_shared_cache.attach` does with each attention layer that it comes to.
attach_scope = Scope("lora_shared_cache.attach")
# The cache that a ``generate`` call under way was given.
generate_scope = Scope("lora_shared_cache.generate")
