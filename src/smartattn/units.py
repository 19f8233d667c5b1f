"""How times and their ratios are printed."""

from __future__ import annotations

#: Ratios of two backends' times are printed from this one on: below it they are about as fast.
LEAD = 1.05
#: What such a ratio says, by what it is of, see :class:`~smartattn.profile.Threshold`.
TIMES_AS_FAST = {
    "layer": "how many times as fast a whole layer runs as with the next one",
    "call": "how many times as fast as the next one",
}


def in_words(mode: str, causal: bool, padding: str = "") -> str:
    """A kind of call as thresholds, maps and pages print it.

    Args:
        padding: what is said of it, see :data:`LAYOUTS`; "" for nothing.
    """
    words = MODES[mode]
    if mode != "decode":
        words += ", causal" if causal else ", bidirectional"
    return f"{words}, {padding}" if padding else words


#: Modes and layouts of :class:`~smartattn.features.Regime` in words. What is only "padding" lies on
#: the left of causal calls, where the right has a name of its own, and anywhere otherwise.
MODES = {
    "forward": "forward",
    "decode": "decode, one query per sequence",
    "train": "forward and backward",
}
LAYOUTS = {
    "plain": "no padding",
    "right": "padding on the right",
    "padded": "padding",
    "masked": "a window, no padding",
    "packed": "packed sequences",
}


def format_us(microseconds: float | None) -> str:
    """A time with three digits and its unit; "-" for None."""
    if microseconds is None:
        return "-"
    # Rounded first, so that 999.7 us are 1.00 ms.
    rounded = float(f"{microseconds:.3g}")
    scales = ((1e3, 1.0, "us"), (1e6, 1e-3, "ms"))
    factor, unit = next(((f, u) for limit, f, u in scales if rounded < limit), (1e-6, "s"))
    value = rounded * factor
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def span_us(values: list[float]) -> str:
    """The shortest and the longest of some times, or the one that they all print as."""
    low, high = format_us(min(values)), format_us(max(values))
    return low if low == high else f"{low} to {high}"
