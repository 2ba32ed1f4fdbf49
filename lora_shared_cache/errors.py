"""The errors this package raises. Each is a ``ValueError`` and says what was given, what was expected and what to do."""

from __future__ import annotations


class SharedCacheError(ValueError):
    """Base class of the errors below."""


class UnsupportedModelError(SharedCacheError):
    """The model's attention can't be expressed as a base part plus a low-rank part, or was not recognised."""


class UnsupportedAdapterError(SharedCacheError):
    """An adapter's effect on K and V can't be expressed as a base part plus a low-rank part in its present state."""


class TrajectoryError(SharedCacheError):
    """The model's input does not continue the trajectory that the cache holds."""
