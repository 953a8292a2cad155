"""KID against loops, torch-fidelity and exact identities; intervals against sampling and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ge2hist_core.metrics import (
    _mmd,
    draw_subsets,
    kid,
    kid_over,
    paired_mean,
    polynomial_kernel,
    polynomial_mmd,
)
from ge2hist_core.types import BadInput

draws = np.random.default_rng(0)


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    return (sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)) / len(x) + 1) ** 3


def loop_mmd(x: np.ndarray, y: np.ndarray, copy_of_x: list[int] | None = None, copy_of_y: list[int] | None = None):
    """The estimator pair by pair; pictures that are copies of one another are no pair."""
    ids = copy_of_x or list(range(len(x))), copy_of_y or list(range(len(y)))
    within = []
    for values, names in zip((x, y), ids, strict=True):
        pairs = [(i, j) for i in range(len(values)) for j in range(len(values)) if names[i] != names[j]]
        within.append(sum(kernel(values[i], values[j]) for i, j in pairs) / len(pairs))
    across = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    return within[0] + within[1] - 2 * across


def test_mmd_is_the_sum_over_pairs_for_sets_of_different_size():
    x, y = draws.normal(size=(9, 5)), draws.normal(0.4, 1.3, size=(6, 5))
    assert polynomial_mmd(x, y) == pytest.approx(loop_mmd(x, y), rel=1e-12)
    assert polynomial_mmd(x, y) == pytest.approx(polynomial_mmd(y, x), rel=1e-12)


def test_mmd_averages_to_zero_over_all_splits_of_one_set():
    """Unbiased exactly, not nearly: whichever pictures are called real."""
    points = draws.normal(size=(7, 3))
    values = []
    for chosen in itertools.combinations(range(7), 3):
        rest = [i for i in range(7) if i not in chosen]
        values.append(polynomial_mmd(points[list(chosen)], points[rest]))
    assert np.mean(values) == pytest.approx(0, abs=1e-12)
    assert min(values) < 0 < max(values)


def test_mmd_does_not_depend_on_order_or_rotation_of_the_features():
    x, y = draws.normal(size=(12, 4)), draws.normal(0.5, 1, size=(10, 4))
    turned, _ = np.linalg.qr(draws.normal(size=(4, 4)))
    expected = polynomial_mmd(x, y)
    assert polynomial_mmd(draws.permutation(x), y) == pytest.approx(expected)
    assert polynomial_mmd(x @ turned, y @ turned) == pytest.approx(expected)


def test_a_picture_that_is_drawn_twice_is_never_compared_with_itself():
    x, y = draws.normal(size=(4, 3)), draws.normal(size=(5, 3))
    a, b = [2, 0, 1, 3], [1, 1, 3, 0, 1]
    copies = [[i for i, n in enumerate(counts) for _ in range(n)] for counts in (a, b)]
    kernels = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    found = _mmd(*kernels, np.array(a, float), np.array(b, float))
    assert found == pytest.approx(loop_mmd(x[copies[0]], y[copies[1]], *copies), rel=1e-12)


def test_kid_is_the_mean_over_subsets_and_of_the_whole_sets_where_a_subset_is_all():
    x, y = draws.normal(size=(30, 4)), draws.normal(0.6, 1, size=(20, 4))
    result = kid(x, y, "test", 3, subset_size=8, subsets=5, bootstrap=0)
    values = [polynomial_mmd(x[a], y[b]) for a, b in draw_subsets(30, 20, 8, 5, 3)]
    assert result.value == pytest.approx(np.mean(values)) and result.subset_sd == pytest.approx(np.std(values))
    assert (result.n_real, result.n_generated, result.subset_size, result.subsets) == (30, 20, 8, 5)
    assert result.low is None and result.name == "KID (test features)"
    whole = kid(x[:20], y, "test", 0, subset_size=20, subsets=2, bootstrap=0)
    assert whole.value == pytest.approx(polynomial_mmd(x[:20], y)) and whole.subset_sd < 1e-12


def test_kid_equals_torch_fidelity_on_the_same_subsets():
    """``torch_fidelity.metric_kid.kid_features_to_metric`` of torch-fidelity 0.4.0 on these features.

    With ``kid_subsets=20, kid_subset_size=25, rng_seed=2020, kid_degree=3, kid_gamma=None, kid_coef0=1``.
    """
    generator = np.random.default_rng(2020)
    x, y = generator.normal(size=(80, 32)), generator.normal(0.3, 1.2, size=(60, 32))
    legacy = np.random.RandomState(2020)
    pairs = [(legacy.choice(80, 25, replace=False), legacy.choice(60, 25, replace=False)) for _ in range(20)]
    assert kid_over(x, y, pairs) == pytest.approx((0.4838180703075194, 0.13665546802528356), abs=1e-6)


def test_kid_grows_with_the_difference_and_vanishes_without_one():
    x = draws.normal(size=(200, 6))
    values = [kid(x, draws.normal(shift, 1, size=(200, 6)), "test", 0, bootstrap=50) for shift in (0, 0.3, 0.9)]
    assert values[0].low < 0 < values[0].high
    assert abs(values[0].value) < values[1].value < values[2].value
    assert values[2].low > 0


def population(mean: float, spread: float, d: int) -> float:
    """MMD^2 between N(0, spread^2 + 1) and N(mean, spread^2 + 1) in d independent dimensions, from the moments.

    With s = x.y / d: E (s + 1)^3 = 1 + 3 E s + 3 E s^2 + E s^3, and all moments of s follow from those of one x_k y_k.
    """
    v = 1 + spread**2

    def expected(a: float, b: float) -> float:
        m1 = a * b
        m2 = (a * a + v) * (b * b + v)
        m3 = (a**3 + 3 * a * v) * (b**3 + 3 * b * v)
        s2 = d * m2 + d * (d - 1) * m1**2
        s3 = d * m3 + 3 * d * (d - 1) * m2 * m1 + d * (d - 1) * (d - 2) * m1**3
        return 1 + 3 * m1 + 3 * s2 / d**2 + s3 / d**3

    return expected(0, 0) + expected(mean, mean) - 2 * expected(0, mean)


def test_the_interval_covers_the_population_value_when_tiles_are_independent():
    truth = population(0.5, 0.0, 3)
    inside = 0
    for trial in range(150):
        draw = np.random.default_rng(trial)
        result = kid(draw.normal(size=(60, 3)), draw.normal(0.5, 1, (60, 3)), "test", trial, subsets=1, subset_size=60,
                     bootstrap=60)  # fmt: skip
        inside += result.low <= truth <= result.high
    assert 0.88 <= inside / 150 <= 0.995


def test_the_interval_covers_when_tiles_of_a_donor_are_alike():
    """Ten donors of eight tiles, whose share of the variance is a half: tiles alone would promise too much."""
    truth, donor = population(0.8, 1.0, 3), np.repeat([f"d{i}" for i in range(10)], 8)
    inside, inside_tiles = 0, 0
    for trial in range(150):
        draw = np.random.default_rng(trial)
        level = np.repeat(draw.normal(size=(10, 3)), 8, axis=0)
        real, generated = level + draw.normal(size=(80, 3)), level + draw.normal(0.8, 1, (80, 3))
        settings = {"subsets": 1, "subset_size": 80, "bootstrap": 60, "paired": True}
        result = kid(real, generated, "test", trial, donor_real=donor, donor_generated=donor, **settings)
        inside += result.low <= truth <= result.high
        alone = kid(real, generated, "test", trial, **settings)
        inside_tiles += alone.low <= truth <= alone.high
    assert 0.86 <= inside / 150 <= 1.0
    assert inside_tiles < inside


def test_paired_mean_has_the_standard_error_of_its_units():
    values = draws.normal(2, 0.5, 400)
    alone = paired_mean(values, "LPIPS", 0)
    assert alone.value == pytest.approx(values.mean()) and alone.sd == pytest.approx(values.std()) and alone.n == 400
    assert (alone.high - alone.low) / 2 == pytest.approx(1.966 * values.std() / 20, rel=0.15)
    # All tiles of a donor equal: the donors' mean, with Student's t of 9 degrees of freedom.
    levels = draws.normal(size=10)
    donors = paired_mean(np.repeat(levels, 40), "LPIPS", 0, donor=np.repeat(np.arange(10), 40))
    assert donors.donors == 10
    assert (donors.high - donors.low) / 2 == pytest.approx(2.262 * levels.std() / np.sqrt(10), rel=0.15)
    one = paired_mean(np.array([1.0]), "LPIPS", 0)
    assert one.value == 1.0 and one.low is None


def test_results_are_plain_json():
    import json

    x = draws.normal(size=(6, 2))
    assert json.loads(json.dumps(kid(x, x + 1, "test", 0, bootstrap=5).to_json()))["donors"] == 1
    assert json.loads(json.dumps(paired_mean(x[:, 0], "a", 0, bootstrap=5).to_json()))["n"] == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generated": np.ones((5, 3))}, "have 2 features, generated 3"),
        ({"real": np.array([[0.0, np.nan], [1, 1]])}, "real features hold NaN"),
        ({"real": np.ones((1, 2))}, "two pictures or more"),
        ({"subset_size": 6}, "subset_size is 6: give a number from 2 to 5"),
        ({"subsets": 0}, "subsets is 0"),
        ({"donor_real": np.array(list("aaaaa"))}, "Donors are named for one"),
        ({"real": np.ones((7, 2)), "paired": True}, "as many pictures each, got 7 and 5"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"real": np.ones((5, 2)), "generated": np.ones((5, 2)), **change}
    with pytest.raises(BadInput, match=message):
        kid(given.pop("real"), given.pop("generated"), "test", 0, **given)


def test_distances_that_are_not_finite_are_refused():
    with pytest.raises(BadInput, match="LPIPS: the distances must be finite"):
        paired_mean(np.array([0.1, np.inf]), "LPIPS", 0)
