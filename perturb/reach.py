"""What a design can show at best: the smallest q that its number of seeds or cells and of tested rows allows."""

from __future__ import annotations

import math

from perturb.wording import smallest_p

__all__ = ["FALSE_DISCOVERIES", "reach", "smallest_q"]

FALSE_DISCOVERIES = 0.05
"""A hit's q lies below."""


def smallest_q(units: int, rows: int) -> float:
    """The smallest q that one row alone can reach among ``rows`` tested ones.

    Where several rows reach the smallest p together, each has that share of it.

    Parameters
    ----------
    units: seeds, or cells where there are several: what a p-value flips the sign of.

    Examples
    --------
    >>> round(smallest_q(8, 33), 3), round(smallest_q(12, 33), 3)
    (0.258, 0.016)
    """
    return min(1.0, smallest_p(units) * rows)


def reach(units: int, rows: int, *, cells: bool) -> str:
    """What ``rows`` tests over ``units`` can show at best, one sentence; ``cells`` says what the units are."""
    p = smallest_p(units)
    least = f"With {units} {'cells' if cells else 'seeds'} no p is below {p:.2g}"
    needed = math.floor(p * rows / FALSE_DISCOVERIES) + 1
    if needed > rows:
        more = "cells" if cells else "further seeds"
        return f"{least}, so that no q can be below {FALSE_DISCOVERIES:g}: take more {more} to show anything."
    if needed == 1:
        return f"{least}, and one row alone among {rows} tested can reach q = {smallest_q(units, rows):.2g}."
    return (
        f"{least}: one row alone among {rows} tested cannot go below q = {smallest_q(units, rows):.2g}, and {needed} "
        f"of them have to reach that p together for q < {FALSE_DISCOVERIES:g}."
    )
