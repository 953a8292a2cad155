"""What a design can show at best: the smallest q that its number of seeds or cells and of tested rows allows."""

from __future__ import annotations

import math

from perturb.stats import FEW
from perturb.wording import smallest_p

__all__ = ["FALSE_DISCOVERIES", "reach", "smallest_q"]

FALSE_DISCOVERIES = 0.05
"""A hit's q lies below."""


def smallest_q(n_cells: int, n_seeds: int, rows: int) -> float:
    """The smallest q that one row alone can reach among ``rows`` tested ones; 0, so none, over several cells and seeds.

    Where several rows reach the smallest p together, each has that share of it.

    Examples
    --------
    >>> round(smallest_q(1, 8, 33), 3), round(smallest_q(1, 12, 33), 3)
    (0.258, 0.016)
    """
    return min(1.0, smallest_p(n_cells, n_seeds) * rows)


def reach(n_cells: int, n_seeds: int, rows: int) -> str:
    """What ``rows`` tests over so many cells and seeds can show at best, one sentence."""
    if min(n_cells, n_seeds) > 1:
        both = f"With {n_cells} cells and {n_seeds} seeds"
        if min(n_cells, n_seeds) > FEW:
            return f"{both} no q is out of reach."
        few = "cells" if n_cells <= n_seeds else "seeds"
        return f"{both} only a very clear effect can be shown, so few {few} tell little of others: take more {few}."
    p, cells = smallest_p(n_cells, n_seeds), n_cells > 1
    least = f"With {max(n_cells, n_seeds)} {'cells' if cells else 'seeds'} no p is below {p:.2g}"
    needed = math.floor(p * rows / FALSE_DISCOVERIES) + 1
    if needed > rows:
        more = "cells" if cells else "further seeds"
        return f"{least}, so that no q can be below {FALSE_DISCOVERIES:g}: take more {more} to show anything."
    if needed == 1:
        return f"{least}, and one row alone among {rows} tested can reach q = {smallest_q(n_cells, n_seeds, rows):.2g}."
    return (
        f"{least}: one row alone among {rows} tested cannot go below q = {smallest_q(n_cells, n_seeds, rows):.2g}, and "
        f"{needed} of them have to reach that p together for q < {FALSE_DISCOVERIES:g}."
    )
