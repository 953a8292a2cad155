"""Support: nearest neighbours against brute force, p-values against their definition and their guarantee."""

from __future__ import annotations

import numpy as np
import pytest

from ge2hist_core import rng
from ge2hist_core.support import Support


def unit(n: int, name: str, dim: int = 8) -> np.ndarray:
    x = rng.stream(0, name).standard_normal((n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def support() -> Support:
    cell_id = np.array([f"c{i}" for i in range(40)], dtype=object)
    return Support.fit(unit(40, "reference"), cell_id, unit(30, "held out"))


def test_distance_and_nearest_are_those_of_a_double_loop(support: Support):
    asked = unit(7, "asked")
    every = np.array([[np.sqrt(((a - r) ** 2).sum()) for r in support.reference] for a in asked])
    np.testing.assert_array_equal(support.nearest(asked), every.argmin(1))
    np.testing.assert_allclose(support.distance(asked), every.min(1), rtol=1e-6)


def test_a_reference_cell_is_at_distance_zero_and_fully_supported(support: Support):
    assert support.nearest(support.reference[3]).tolist() == [3]
    assert support.distance(support.reference[3]).tolist() == [0.0]
    assert support.p(support.reference[3]).tolist() == [1.0]


def test_p_counts_calibration_cells_at_least_as_far(support: Support):
    asked = unit(20, "asked")
    expected = [(1 + sum(c >= d for c in support.calibration)) / 31 for d in support.distance(asked)]
    np.testing.assert_allclose(support.p(asked), expected)


def test_what_is_opposite_to_everything_gets_the_smallest_p():
    reference = unit(40, "reference")
    reference[:, 0] = abs(reference[:, 0]) + 2
    reference /= np.linalg.norm(reference, axis=1, keepdims=True)
    support = Support.fit(reference[:20], np.arange(20).astype(str).astype(object), reference[20:])
    assert support.p(-reference[:1]).tolist() == [1 / 21]


def test_p_of_exchangeable_cells_is_below_a_in_at_most_a_of_them():
    rejected = total = 0
    for i in range(60):
        cells = unit(160, f"world {i}", dim=3)
        fitted = Support.fit(cells[:40], np.arange(40).astype(str).astype(object), cells[40:100])
        rejected += int((fitted.p(cells[100:]) <= 0.1).sum())
        total += 60
    # Cells of one world share their calibration: Beta(6, 55) between worlds.
    assert rejected / total < 0.1 + 4 * np.sqrt(0.1 * 0.9 / 60 / 60 + 0.1 * 0.9 / total)
    assert rejected / total > 0.07


def test_one_name_per_reference_cell_is_required():
    with pytest.raises(ValueError, match="one row per cell id"):
        Support(unit(4, "x"), np.array(["a"], dtype=object), np.ones(3))
