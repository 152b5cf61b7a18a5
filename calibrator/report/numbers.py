"""How numbers are shown: few digits for the eye, the whole value beside them for machines and for checking."""

import math

from markupsafe import Markup

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits; very small and very large ones as a product with a power of ten."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if value < 0:
        return "−" + significant(-value, digits)
    if 1e-3 <= abs(float(f"{value:.{digits - 1}e}")) < 1e5:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}")))))
        return f"{value:,.{decimals}f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def byte_unit(size_bytes: float) -> tuple[float, str]:
    """The decimal unit in which a size is best read: (bytes per unit, name)."""
    return next((unit for unit in _BYTE_UNITS if abs(size_bytes) >= unit[0]), _BYTE_UNITS[-1])


def in_bytes(size_bytes: float, digits: int = 3) -> str:
    """A size in B, kB, MB or GB (powers of 1000)."""
    scale, name = byte_unit(size_bytes)
    return f"{significant(size_bytes / scale, digits)} {name}"


def data(value: float, text: str | None = None) -> Markup:
    """`text` on the page, `value` in its markup; without a text, three significant digits."""
    exact = value if isinstance(value, int) else float(value)
    return Markup('<data value="{}">{}</data>').format(repr(exact), significant(value) if text is None else text)


def evaluated(value: float | None) -> Markup:
    """`data` of a value, or that there is none because a screened run did not evaluate it."""
    return Markup("not evaluated") if value is None else data(value)


def size(size_bytes: float, digits: int = 3) -> Markup:
    """A number of bytes."""
    return data(size_bytes, in_bytes(size_bytes, digits))


def percent(share: float, digits: int = 3) -> Markup:
    """A share, shown as a percentage."""
    return data(share, f"{significant(100 * share, digits)} %")
