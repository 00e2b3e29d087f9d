"""Durations, sizes and money as people write them, and as the code counts them.

    "30s"     <->  30.0          seconds, float
    "64MiB"   <->  67108864      bytes, int
    "0.40"    <->  400000000     nano-dollars (10^-9 USD), int; no float ever touches money

The parsers take exactly these forms and raise ValueError with a sentence that shows the expected one and never
quotes what was read: a secret may have been put in the wrong place. The formatters are their inverses.
"""

from __future__ import annotations

import re
from decimal import Decimal

NANO_PER_USD = 10**9
LONGEST = 36_500 * 86_400.0
"""Seconds in a hundred years: no duration is longer."""

_MILLISECONDS = {"ms": 1, "s": 1_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

# [0-9] rather than \d, which also takes the digits of other scripts.
_DURATION = re.compile(r"([0-9]{1,14}(?:\.[0-9]{1,9})?)(ms|s|min|h|d)")
_SIZE = re.compile(r"([0-9]{1,19})(B|KiB|MiB|GiB|TiB)")
_USD = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,9}))?")


def parse_duration(text: str) -> float:
    """Seconds in "300ms", "30s", "10min", "24h" or "400d"; decimals are allowed ("1.5s"), a bare number is not."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError('must be a duration: a number and a unit, as in "300ms", "30s", "10min", "24h" or "400d"')
    seconds = float(Decimal(match[1]) * _MILLISECONDS[match[2]] / 1000)
    if seconds > LONGEST:
        raise ValueError('must be a duration of at most a hundred years ("36500d")')
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest spelling in the largest unit that fits without a fraction; fractions only below a millisecond."""
    if not 0 <= seconds <= LONGEST:
        raise ValueError("a duration lies between 0s and 36500d")
    # repr() is the shortest decimal that means this very float, so what was parsed comes back unchanged.
    milliseconds = Decimal(repr(float(seconds))) * 1000
    if not milliseconds:
        return "0s"
    for unit, size in reversed(_MILLISECONDS.items()):
        if not milliseconds % size:
            return f"{int(milliseconds // size)}{unit}"
    return f"{milliseconds.normalize():f}ms"


def parse_size(text: str) -> int:
    """Bytes in "512B", "64KiB", "64MiB", "2GiB" or "1TiB"."""
    match = _SIZE.fullmatch(text)
    if match is None or (size := int(match[1]) * _BYTES[match[2]]) >= 2**63:
        raise ValueError('must be a size: a whole number and a binary unit, as in "512B", "64KiB", "64MiB" or "2GiB"')
    return size


def format_size(size: int) -> str:
    """The size in the largest unit that holds it as a whole number."""
    if not 0 <= size < 2**63:
        raise ValueError("a size is not negative and below 2^63 bytes")
    for unit, factor in reversed(_BYTES.items()):
        if size and not size % factor:
            return f"{size // factor}{unit}"
    return "0B"


def parse_usd(text: str) -> int:
    """Nano-dollars in "0.40": digits and up to nine decimals; no sign, exponent, space or currency mark."""
    match = _USD.fullmatch(text)
    if match is None:
        raise ValueError('must be an amount in US dollars, in quotes, as in "0.40" (up to nine decimals)')
    return int(match[1]) * NANO_PER_USD + int((match[2] or "").ljust(9, "0"))


def format_usd(nano: int) -> str:
    """Dollars with at least two decimals and as many more as the amount has: "0.40", "0.000000001", "-3.00"."""
    whole, rest = divmod(abs(nano), NANO_PER_USD)
    decimals = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nano < 0 else ''}{whole}.{decimals}"
