"""Where to read a bootstrap distribution of few units."""

from __future__ import annotations

import numpy as np

__all__ = ["expanded_tail"]


def expanded_tail(n: int, level: float) -> float:
    r"""Lower tail at which the bootstrap distribution of ``n`` units is read for an interval at ``level``.

    The plain percentile interval of a mean is too narrow by about ``sqrt((n - 1) / n)`` and by Student's against
    normal quantiles. Both are mended by the levels :math:`\Phi(\pm\sqrt{n/(n-1)}\,t_{n-1})` (Hesterberg 2015,
    doi:10.1080/00031305.2015.1089789).

    Parameters
    ----------
    n: units that are resampled as a whole, at least two; the fewer of two levels.

    Examples
    --------
    >>> round(expanded_tail(12, 0.95), 4), round(expanded_tail(1000, 0.95), 4)
    (0.0108, 0.0249)
    """
    from scipy.stats import norm
    from scipy.stats import t as student_t

    return float(norm.cdf(np.sqrt(n / (n - 1)) * student_t.ppf((1 - level) / 2, n - 1)))
