"""The largest batch that fits, found with few compilations."""

from __future__ import annotations

import math
from collections.abc import Callable


def largest(
    size_of: Callable[[int], float], limit: float, rows: int, *, multiple: int = 1, tries: int = 8
) -> int:
    """About the most rows whose size is within the limit; 0 if none are found.

    Size is nearly a line in the rows: it is followed to the limit, and computed there, until it fits to 5%.

    Args:
      size_of: so many rows in bytes, or infinite; not cheap.
      limit: in bytes.
      rows: where to start.
      multiple: what the rows must be a multiple of.
      tries: sizes computed at most.

    Example:
      >>> largest(lambda rows: 1000 + 30 * rows, 2000, 2)
      33
    """
    known = {n: size_of(n) for n in (rows, 2 * rows)}
    while len(known) < tries and not any(0.95 * limit <= size <= limit for size in known.values()):
        fitting = {n for n, size in known.items() if size <= limit}
        low = max(fitting, default=0)
        high = min(known.keys() - fitting, default=64 * max(known))
        a, b = sorted(known, key=lambda n: abs(known[n] - limit))[:2]
        if low in known and high in known:
            a, b = low, high
        rise = known[b] - known[a]
        guess = (low + high) / 2
        if math.isfinite(rise) and rise:
            guess = a + (limit - known[a]) * (b - a) / rise
        guess = int(min(max(guess, low, multiple), high - 1)) // multiple * multiple
        if guess in (0, *known):
            break
        known[guess] = size_of(guess)
    return max((n for n, size in known.items() if size <= limit), default=0)
