"""Which shared forward pass, and which attention layer of it, the code is in: one variable per thread or async task.

Everything a forward pass needs to know reaches the layers through these two variables, never through the model, so that
two threads with two caches on one model can't mix and an exception leaves nothing behind.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any

from torch.compiler import is_compiling


class Scope:
    """A context variable that ``torch.compile`` can trace through (Dynamo can't trace ``ContextVar.get``)."""

    def __init__(self, name: str):
        self._var: ContextVar[Any] = ContextVar(name, default=None)
        self._traced: Any = None

    def get(self) -> Any:
        """The innermost value set in this thread or task, or None."""
        return self._traced if is_compiling() else self._var.get()

    def set(self, value: Any) -> None:
        """Set the value without a way back; only for a forward pass that was entered from inside."""
        self._var.set(value)

    def __call__(self, value: Any) -> _Within:
        """Set the value for a ``with`` block."""
        return _Within(self, value)


class _Within:
    """The ``with`` block of a :class:`Scope`. A class: generators take several times as long, and every layer has one."""

    def __init__(self, scope: Scope, value: Any):
        self._scope, self._value = scope, value
        self._token: Token | None = None

    def __enter__(self) -> None:
        scope = self._scope
        if is_compiling():
            self._value, scope._traced = scope._traced, self._value
        else:
            self._token = scope._var.set(self._value)

    def __exit__(self, *error: object) -> None:
        if self._token is None:
            self._scope._traced = self._value
        else:
            self._scope._var.reset(self._token)


forward_scope = Scope("lora_shared_cache.forward")
layer_scope = Scope("lora_shared_cache.layer")
# What :func:`~lora_shared_cache.attach` does with each attention layer that it comes to.
attach_scope = Scope("lora_shared_cache.attach")
# The cache that a ``generate`` call under way was given.
generate_scope = Scope("lora_shared_cache.generate")
