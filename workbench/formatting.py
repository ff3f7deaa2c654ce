"""The one way a number is written for a person: in tables, panels, figures, the report and the command line."""

from __future__ import annotations

import math


def significant(value: float, digits: int = 3) -> str:
    """A number at `digits` significant digits without an exponent: ``0.131``, ``12.4``, ``1080``."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")  # rounding may carry into another digit: 0.9996 is 1.00
    decimals = max(digits - 1 - math.floor(math.log10(abs(rounded))), 0)
    return f"{rounded:.{decimals}f}"


def accuracy(value: float, *, unit: bool = True) -> str:
    """A share of 1 as per cent at two decimals: ``91.62 %``."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.2f}" + (" %" if unit else "")


def milliseconds(value: float, *, unit: bool = True) -> str:
    """Milliseconds at three significant digits: ``0.131 ms``."""
    return significant(value) + (" ms" if unit else "")


def size(value: float) -> str:
    """Bytes in powers of 1000: ``98 KB``, ``1.07 MB``."""
    if value is None or not math.isfinite(value):
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if value >= scale:
            return f"{significant(value / scale) if unit != 'KB' else round(value / scale)} {unit}"
    return f"{round(value)} B"


def count(value: float) -> str:
    """A count in powers of 1000: ``61.7 k``, ``40.8 M``; whole below a thousand."""
    if value is None or not math.isfinite(value):
        return "–"
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{significant(value / scale)} {unit}"
    return f"{round(value)}"


def factor(value: float) -> str:
    """A ratio: ``8.2 ×``."""
    return f"{significant(value, 2 if value is not None and abs(value) < 100 else 3)} ×"


def share(value: float) -> str:
    """A share of 1 at one decimal of a per cent: ``12.3 %``."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def signed(value: float, text: str) -> str:
    """`text`, the written absolute of `value`, under its sign; the sign is a true minus."""
    return ("+" if value > 0 else "−" if value < 0 else "±") + text


def plus_minus(value: float, interval: tuple[float, float], scale: float = 1.0, digits: int = 2) -> str:
    """The half-width of an interval as ``± 0.54``; both ends as ``(a to b)`` where it is clearly lopsided."""
    low, high = interval
    below, above = (value - low) * scale, (high - value) * scale
    if not (math.isfinite(below) and math.isfinite(above)):
        return ""
    if max(below, above) > 0 and abs(below - above) > 0.5 * max(below, above):
        return f"({low * scale:.{digits}f} to {high * scale:.{digits}f})"
    return f"± {(below + above) / 2:.{digits}f}"


def latency_interval(latency_ms: float, interval_ms: tuple[float, float]) -> str:
    """How sure a latency is, in few characters: ``± 0.003``, or both ends where one lies far out.

    The longer side stands for both, since latencies are skewed and a narrow interval needs no more; it is written to
    the digits of the latency, and to more where it would read as zero.
    """
    below, above = latency_ms - interval_ms[0], interval_ms[1] - latency_ms
    reach = float(f"{max(below, above):.0e}")
    if reach > 0.1 * latency_ms and abs(below - above) > 0.5 * reach:
        return f"({significant(interval_ms[0])} to {significant(interval_ms[1])})"
    return f"± {max(below, above):.{max(_decimals(latency_ms, 3), _decimals(reach, 1))}f}"


def _decimals(value: float, significant: int) -> int:
    """Decimals at which a positive number shows so many significant digits; 0 where it is none."""
    return max(significant - 1 - math.floor(math.log10(value)), 0) if value > 0 and math.isfinite(value) else 0


def duration(seconds: float | None) -> str:
    """Minutes and seconds left: ``0:08``; empty where unknown."""
    return "" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
