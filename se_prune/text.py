"""How reports and the command line write numbers: percent with a space, a real minus sign, thin groups of thousands."""

from __future__ import annotations

import math

MISSING = "–"
#: What the predicted loss of some criteria counts with.
PREDICTS = {
    "gate-energy": "It counts with no repair.",
    "gate-obs": "It counts with a least-squares repair that is perfect.",
    "excitation": "It counts with the least-squares repair.",
}


def percent(fraction: float, digits: int = 1) -> str:
    """Write a fraction as percent: 0.489 is "48.9 %"."""
    return f"{_minus(f'{100 * fraction:.{digits}f}')} %"


def points(difference: float, digits: int = 2) -> str:
    """Write a difference of two fractions in percentage points, always with its sign."""
    value = round(100 * difference, digits)
    return f"{_minus(f'{value:+.{digits}f}') if value else f'{0:.{digits}f}'} points"


def share(part: float, whole: float) -> str:
    """Write `part` as percent of `whole`, or a dash where there is no whole."""
    return percent(part / whole) if whole else MISSING


def interval(bounds: tuple[float, float]) -> str:
    """Write a 95 % interval of fractions: "93.84–94.75 %"."""
    low, high = bounds
    return f"{100 * low:.2f}–{100 * high:.2f} %"


def points_interval(bounds: tuple[float, float], digits: int = 1) -> str:
    """Write a 95 % interval of a difference of fractions: "−3.1 to +0.4 points"."""
    low, high = (points(end, digits).removesuffix(" points") for end in bounds)
    return f"{low} to {high} points"


def loss(fraction: float) -> str:
    """Write a predicted loss, a share of a signal, with about two digits: 0.0034 is "0.34 %"; it may pass 100 %."""
    value = 100 * fraction
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def count(number: int) -> str:
    """Write a whole number with commas between thousands."""
    return f"{number:,}"


def scaled(number: float) -> str:
    """Write a count with a decimal prefix and three or more significant digits: 41287680 is "41.29 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{3 if number < 10 * size else 2}f} {unit}"
    return f"{number:.0f}"


def as_printed(number: float | None) -> str:
    """Write a count with the digits that the SENet paper prints: "3.87 G", "569 M", "28.1 M"; None is a dash."""
    if number is None:
        return MISSING
    if number >= 1e9:
        return f"{number / 1e9:.2f} G"
    return f"{number / 1e6:.{0 if number >= 1e8 else 1}f} M"


def file_size(number: int) -> str:
    """Write bytes in kB or MB (1 MB = 10⁶ bytes)."""
    return f"{number / 1e6:.2f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"


def milliseconds(value: float) -> str:
    """Write a time in milliseconds with three significant digits."""
    return f"{significant(value)} ms"


def duration(seconds: float) -> str:
    """Write how long a stage took: "0.4 s", "38 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def significant(value: float, digits: int = 3) -> str:
    """Write a number of ordinary size with so many significant digits and no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _minus(f"{value:.{places}f}")


def tiny(value: float) -> str:
    """Write a numerical difference in scientific form: "2.1e-06"; exactly zero is "0"."""
    return "0" if value == 0 else f"{value:.1e}"


def p_value(value: float) -> str:
    """Write a p value with its relation sign: "= 0.12", "< 0.0001"."""
    if value < 1e-4:
        return "< 0.0001"
    return f"= {value:.2f}" if value >= 0.1 else f"= {value:.2g}"


def speed(ratio: float) -> str:
    """Write a latency ratio first / this: "1.62× as fast"."""
    return f"{ratio:.2f}× as fast"


def shape(size: tuple[int, ...]) -> str:
    """Write an input size: "3 × 224 × 224"."""
    return " × ".join(str(part) for part in size)


def _minus(text: str) -> str:
    return text.replace("-", "−")
