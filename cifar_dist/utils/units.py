"""Format numbers and durations for people."""

from __future__ import annotations


def human_readable(number: float, unit: str = "") -> str:
    """1234567 -> '1.23 M'."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5:
            return f"{number:.3g} {prefix}{unit}".rstrip()
        number /= 1000
    return f"{number:.3g} E{unit}"


def format_duration(seconds: float) -> str:
    """5400 -> '90 min'."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
