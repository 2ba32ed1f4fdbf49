"""Whole numbers for launches. Triton's functions of these names take 5 µs a call outside of kernels, a dozen times a launch."""

from __future__ import annotations


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, which is positive."""
    return 1 << (n - 1).bit_length()
