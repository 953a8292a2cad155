"""Oracles: enumeration with itertools, scipy's bootstrap, permutation test and FDR, and planted truth."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ge2hist_core.types import BadInput
from perturb.stats import (
    bh_fdr,
    bootstrap_mean,
    clustered_ratio,
    crossed_effect,
    crossed_mean,
    pairing_gain,
    seeds_for,
    sign_flip_p,
)

EIGHT = np.array([1.2, -0.4, 2.2, 0.9, 3.1, -1.0, 0.3, 1.7])


def all_flips(values: np.ndarray) -> float:
    observed = abs(math.fsum(values))
    sums = [
        abs(math.fsum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in product((1, -1), repeat=len(values))
    ]
    return sum(s >= observed - 1e-12 for s in sums) / len(sums)


@pytest.mark.parametrize("values", [EIGHT, EIGHT[:3], EIGHT[:1], np.array([1.0, 1.0, 1.0, -1.0]), np.zeros(5)])
def test_sign_flip_p_counts_all_patterns(values: np.ndarray) -> None:
    assert sign_flip_p(values, seed=0) == all_flips(values)


def test_sign_flip_p_agrees_with_scipy() -> None:
    theirs = scipy.stats.permutation_test(
        (EIGHT,), lambda x, axis: np.abs(x.mean(axis=axis)), permutation_type="samples", alternative="greater"
    )
    assert sign_flip_p(EIGHT, seed=0) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_many_pairs_are_sampled_with_a_p_that_is_never_zero() -> None:
    clear = np.linspace(5, 6, 40)
    assert sign_flip_p(clear, seed=0) == 1 / 10_000
    # 20 pairs, of which the exact p is known from the normal limit of the sign sums to a few percent.
    values = scipy.stats.norm.ppf((np.arange(20) + 0.5) / 20) + 0.4
    z = values.sum() / np.sqrt((values**2).sum())
    assert sign_flip_p(values, seed=0) == pytest.approx(2 * scipy.stats.norm.sf(z), rel=0.15)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=20))
def test_p_lies_between_its_least_value_and_one_or_is_undefined(values: list[float]) -> None:
    n = sum(math.isfinite(v) for v in values)
    p = sign_flip_p(np.array(values), seed=3)
    assert math.isnan(p) if n == 0 else (min(2.0 ** (1 - n), 1.0) if n <= 16 else 1e-4) <= p <= 1.0


def test_interval_agrees_with_scipys_bootstrap_at_the_expanded_level() -> None:
    n = len(EIGHT)
    t = scipy.stats.t(n - 1).ppf(0.975)
    level = 1 - 2 * scipy.stats.norm.cdf(-t * math.sqrt(n / (n - 1)))
    theirs = scipy.stats.bootstrap(
        (EIGHT,),
        np.mean,
        confidence_level=level,
        n_resamples=200_000,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    ours = bootstrap_mean(EIGHT, seed=0)
    # The error of a 4,000-fold bootstrap quantile this far out is about 4 % of the standard error of the mean.
    tolerance = 0.15 * EIGHT.std(ddof=1) / math.sqrt(n)
    assert ours.value == pytest.approx(EIGHT.mean()) and ours.n == n
    assert ours.low == pytest.approx(theirs.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.high, abs=tolerance)


def test_undefined_pairs_are_left_out_and_counted() -> None:
    base = np.array([[1.0, np.nan, 3.0, 4.0]])
    edited = np.array([[2.0, 5.0, np.nan, 7.0]])
    found = crossed_effect(base, edited, seed=0)
    assert (found.value, found.n, found.p) == (2.0, 2, 0.5)
    nothing = crossed_effect(base[:, :2], edited[:, 1:3], seed=0)
    assert nothing.n == 1 and math.isnan(nothing.low)
    for shape in ((1, 1), (2, 2)):
        empty = crossed_effect(np.full(shape, np.nan), np.ones(shape), seed=0)
        assert empty.n == 0 and math.isnan(empty.value) and math.isnan(empty.p)


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("shape", [(1, 16), (4, 8)])
def test_intervals_hold_the_mean_of_changes_that_are_rare(shape: tuple[int, int], share: float) -> None:
    """A share of the pairs gains one nucleus, all others nothing: as hard as it gets, without a step often (0, 0)."""
    draws, hit, narrow = np.random.default_rng(4), [], []
    for seed in range(300):
        edited = (draws.random(shape) < share).astype(float)
        found = crossed_effect(np.zeros(shape), edited, seed, step=1.0)
        hit.append(found.low <= share <= found.high)
        assert found.low <= found.value <= found.high
        narrow.append(found.high - found.low)
    assert np.mean(hit) > 0.8
    assert np.mean(narrow) < 8 * max(share, 1 / math.prod(shape)) ** 0.5 / math.prod(shape) ** 0.5


@pytest.mark.parametrize("shape", [(1, 16), (6, 8)])
def test_a_step_hardly_widens_the_interval_of_changes_over_many_steps(shape: tuple[int, int]) -> None:
    edited = np.random.default_rng(6).normal(20.0, 4.0, shape)
    with_step, without = (crossed_effect(np.zeros(shape), edited, 0, step=step) for step in (1.0, 0.0))
    assert with_step.value == without.value and with_step.p == without.p
    assert with_step.high - with_step.low == pytest.approx(without.high - without.low, rel=0.08)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (4, 2)])
def test_equal_arms_give_exactly_zero(shape: tuple[int, int]) -> None:
    found = crossed_effect(EIGHT.reshape(shape), EIGHT.reshape(shape), seed=0)
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("edited", [EIGHT[None], EIGHT[:, None] + EIGHT**2])
def test_result_depends_on_seed_alone_and_mirrors_with_the_arms(edited: np.ndarray) -> None:
    base = np.zeros(edited.shape)
    assert crossed_effect(base, edited, 7) == crossed_effect(base, edited, 7)
    assert crossed_effect(base[:1], edited[:1], 7).low != crossed_effect(base[:1], edited[:1], 8).low
    there, back = crossed_effect(base, edited, 7), crossed_effect(edited, base, 7)
    assert (there.value, there.p) == pytest.approx((-back.value, back.p))
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_a_single_row_or_column_is_the_plain_bootstrap() -> None:
    for shape in ((1, 8), (8, 1)):
        assert crossed_mean(EIGHT.reshape(shape), 3) == bootstrap_mean(EIGHT, 3)


def test_the_crossed_interval_is_that_of_the_mean_squares_by_hand() -> None:
    values = np.array([[1.0, 2.0, 4.0, 3.0], [2.0, 5.0, 5.0, 2.0], [0.0, 1.0, 6.0, 1.0], [4.0, 4.0, 9.0, 6.0]])
    rows, columns, grand = values.mean(1), values.mean(0), values.mean()
    cell, seed = 4 * ((rows - grand) ** 2).sum() / 3, 4 * ((columns - grand) ** 2).sum() / 3
    rest = ((values - rows[:, None] - columns + grand) ** 2).sum() / 9
    variance = (cell + seed - rest) / 16
    freedom = (cell + seed - rest) ** 2 / (cell**2 / 3 + seed**2 / 3 + rest**2 / 9)
    t = scipy.stats.t(freedom)
    found = crossed_effect(np.zeros((4, 4)), values, seed=0)
    assert found.value == grand and found.n == 16
    half = t.ppf(0.975) * math.sqrt(variance)
    assert (found.low, found.high) == pytest.approx((grand - half, grand + half))
    assert found.p == pytest.approx(2 * t.sf(grand / math.sqrt(variance)))


def test_one_factor_without_a_component_is_a_test_of_the_other() -> None:
    """Cells differ and seeds do not at all: Student's test of the cells' means."""
    draws = np.random.default_rng(3)
    cells = draws.normal(0.5, 1.0, (9, 1))
    rest = draws.normal(size=(9, 6))
    values = cells + 0.1 * (rest - rest.mean(0))
    found = crossed_effect(np.zeros(values.shape), values, seed=0)
    assert found.p == pytest.approx(scipy.stats.ttest_1samp(values.mean(1), 0.0).pvalue)


def test_gaps_and_empty_rows_are_left_out_of_the_crossed_interval() -> None:
    values = np.random.default_rng(2).normal(1.0, 1.0, (6, 5))
    gap = np.vstack([values, np.full(5, np.nan)])
    assert crossed_mean(gap, 0) == crossed_mean(values, 0)
    values[3, 4] = np.nan
    found = crossed_mean(values, 0)
    assert found.n == 29 and found.value == pytest.approx(np.nanmean(values)) and found.low < found.value < found.high


def test_differences_that_are_all_alike_count_the_units_of_the_smaller_factor() -> None:
    """Two cells that agree in 16 draws each are two units: the least p is 1/2."""
    base, edited = np.zeros((2, 16)), np.ones((2, 16))
    assert crossed_effect(base, edited, 0).p == 0.5
    assert crossed_effect(base[:1], edited[:1], 0).p == 2.0**-15


@pytest.mark.parametrize("shape", [(20, 2), (8, 8), (3, 16), (40, 4)])
@pytest.mark.parametrize("spread", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_seeds_that_all_cells_share_do_not_make_a_null_effect_significant(
    shape: tuple[int, int], spread: tuple[float, float]
) -> None:
    draws, trials, rejected = np.random.default_rng(5), 1500, 0
    for _ in range(trials):
        cell, seed = spread[0] * draws.normal(size=(shape[0], 1)), spread[1] * draws.normal(size=(1, shape[1]))
        rejected += crossed_effect(np.zeros(shape), cell + seed + draws.normal(size=shape), 0).p <= 0.05
    # Degrees of freedom are approximate: 0.06 in the long run for 40 cells and 4 seeds that both differ.
    assert rejected / trials <= 0.07


def test_an_effect_of_two_standard_deviations_is_found_through_shared_seeds() -> None:
    draws, found = np.random.default_rng(6), 0
    for _ in range(200):
        noise = draws.normal(size=(8, 1)) + draws.normal(size=(1, 8)) + draws.normal(size=(8, 8))
        found += crossed_effect(np.zeros((8, 8)), 2.0 + noise, 0).p <= 0.05
    assert found / 200 >= 0.9


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes"):
        crossed_effect(np.zeros((1, 3)), np.zeros((1, 4)), 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_fdr_agrees_with_scipy(p: list[float]) -> None:
    q = bh_fdr(np.array(p))
    np.testing.assert_allclose(q, scipy.stats.false_discovery_control(p, method="bh"), atol=1e-12)
    assert (q >= np.array(p) - 1e-12).all() and (q <= 1).all()


def test_fdr_leaves_out_what_was_not_tested() -> None:
    q = bh_fdr(np.array([0.01, np.nan, 0.02]))
    np.testing.assert_allclose(q[[0, 2]], scipy.stats.false_discovery_control([0.01, 0.02]))
    assert np.isnan(q[1])
    assert np.isnan(bh_fdr(np.array([np.nan]))).all() and bh_fdr(np.array([])).shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("n", [6, 16])
@pytest.mark.parametrize("draw", ["normal", "poisson"])
def test_interval_covers_and_p_is_level_on_planted_truth(n: int, draw: str) -> None:
    """True effect 0.5; p is judged on differences that are symmetric about 0. Binomial error of 1,000 trials: 0.7 %."""
    generator = np.random.default_rng(11)
    covered, rejected, trials = 0, 0, 1000
    for trial in range(trials):
        if draw == "normal":
            noise = generator.normal(size=n)
        else:
            noise = generator.poisson(3.0, n) - generator.poisson(3.0, n)
        found = bootstrap_mean(noise + 0.5, seed=trial)
        covered += found.low <= 0.5 <= found.high
        rejected += sign_flip_p(noise, seed=trial) <= 0.05
    assert 0.93 <= covered / trials <= 0.975
    assert rejected / trials <= 0.05 + 2.5 * 0.007


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(20, 2), (10, 8), (3, 16), (40, 4)])
def test_the_crossed_interval_covers_where_cells_and_seeds_both_differ(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(12)
    covered, trials = 0, 400
    for trial in range(trials):
        cells, seeds = generator.normal(size=(shape[0], 1)), generator.normal(size=(1, shape[1]))
        found = crossed_mean(0.5 + cells + seeds + generator.normal(size=shape), seed=trial)
        covered += found.low <= 0.5 <= found.high
    assert covered / trials >= 0.9
    assert covered / trials <= 0.98 or min(shape) <= 3, "two or three units cost precision"


# --- pairing, more seeds, clusters ------------------------------------------------------------------------------------


def test_pairing_gain_is_the_closed_form_of_correlated_normals() -> None:
    """1 - var(y - x) / (var x + var y) = 2 rho s t / (s^2 + t^2) with standard deviations s and t."""
    draws = np.random.default_rng(4)
    rho, s, t = 0.8, 2.0, 1.0
    x = draws.normal(size=200_000)
    y = rho * x + math.sqrt(1 - rho**2) * draws.normal(size=len(x))
    assert pairing_gain(s * x[None], t * y[None]) == pytest.approx(2 * rho * s * t / (s**2 + t**2), abs=0.01)
    assert pairing_gain(x[None], -x[None]) == pytest.approx(-1.0)


def test_pairing_gain_takes_cells_apart_and_leaves_out_half_pairs() -> None:
    draws = np.random.default_rng(5)
    base, edited = draws.normal(size=(2, 3, 6))
    shifted = pairing_gain(base + [[0.0], [100.0], [-50.0]], edited + [[7.0], [0.0], [20.0]])
    assert shifted == pytest.approx(pairing_gain(base, edited))
    by_hand = 1 - np.var(edited[0] - base[0]) / (np.var(base[0]) + np.var(edited[0]))
    assert pairing_gain(base[:1], edited[:1]) == pytest.approx(by_hand)
    holed = base.copy()
    holed[:, 2] = np.nan
    assert pairing_gain(holed, edited) == pytest.approx(pairing_gain(np.delete(base, 2, 1), np.delete(edited, 2, 1)))
    assert math.isnan(pairing_gain(base[:, :1], edited[:, :1])) and math.isnan(pairing_gain(0 * base, 0 * base))
    with pytest.raises(ValueError, match="shapes"):
        pairing_gain(np.zeros((1, 3)), np.zeros((1, 4)))


def test_seeds_for_is_the_least_number_that_suffices() -> None:
    draws = np.random.default_rng(6)
    for n, width in ((5, 0.3), (12, 0.9), (40, 0.2), (8, 5.0)):
        values = draws.normal(size=n)
        total = n + seeds_for(values, width)
        s = values.std(ddof=1)

        def half_width(m: int, s: float = s) -> float:
            return scipy.stats.t(m - 1).ppf(0.975) * s / math.sqrt(m)

        assert half_width(total) <= width
        assert total == n or half_width(total - 1) > width
    assert seeds_for(np.ones(4), 0.1) == 0
    assert seeds_for(np.array([1.0]), 0.1) is None and seeds_for(np.array([np.nan, 1.0]), 0.1) is None
    for width in (0.0, -1.0, math.nan):
        with pytest.raises(BadInput, match="above 0"):
            seeds_for(np.ones(4), width)


def test_undefined_pictures_cost_seeds_in_proportion() -> None:
    values = np.random.default_rng(7).normal(size=30)
    holed = np.insert(values, np.arange(30), np.nan)  # every other one
    assert 60 + seeds_for(holed, 0.1) == 2 * (30 + seeds_for(values, 0.1))


def test_the_seeds_asked_for_give_the_interval_asked_for() -> None:
    """From a long pilot, so that the spread is known; the interval is the one shown, over many repetitions."""
    draws = np.random.default_rng(8)
    pilot = draws.normal(size=400)
    total = len(pilot) + seeds_for(pilot, 0.08)
    widths = []
    for trial in range(20):
        found = bootstrap_mean(draws.normal(size=total), seed=trial)
        widths.append((found.high - found.low) / 2)
    assert np.mean(widths) == pytest.approx(0.08, rel=0.05)


def test_more_seeds_help_until_the_cells_alone_are_too_different() -> None:
    draws = np.random.default_rng(9)
    n_cells, n_seeds = 40, 40
    cell, seed = draws.normal(0, 0.5, (n_cells, 1)), draws.normal(0, 1.0, (1, n_seeds))
    values = cell + seed + draws.normal(0, 1.0, (n_cells, n_seeds))
    t = scipy.stats.t(n_cells - 1).ppf(0.975)
    floor = t * 0.5 / math.sqrt(n_cells)
    assert seeds_for(values, 0.5 * floor) is None
    width = 1.5 * floor
    by_hand = (1.0 + 1.0 / n_cells) / ((width / t) ** 2 - 0.25 / n_cells)
    assert n_seeds + seeds_for(values, width) == pytest.approx(by_hand, rel=0.6)
    assert seeds_for(values, 1.2 * floor) > seeds_for(values, 1.5 * floor) > 0
    wider = crossed_mean(values, 0)
    assert seeds_for(values, wider.high - wider.low) == 0


def test_a_clustered_ratio_is_sums_over_sums_and_its_interval_that_of_resampled_clusters() -> None:
    draws = np.random.default_rng(10)
    cluster = np.repeat(np.arange(12), draws.integers(2, 9, 12))
    below = draws.uniform(1, 2, len(cluster))
    above = 0.5 * below + draws.normal(size=12)[cluster] + 0.1 * draws.normal(size=len(cluster))
    found = clustered_ratio(above, below, cluster, seed=0)
    assert found.value == pytest.approx(above.sum() / below.sum()) and found.n == len(cluster)
    level = 1 - 2 * scipy.stats.norm.cdf(-scipy.stats.t(11).ppf(0.975) * math.sqrt(12 / 11))
    drawn = []
    for _ in range(20_000):
        rows = np.concatenate([np.flatnonzero(cluster == c) for c in draws.choice(12, 12)])
        drawn.append(above[rows].sum() / below[rows].sum())
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * np.std(drawn))
    order = draws.permutation(len(cluster))
    shuffled = clustered_ratio(above[order], below[order], cluster[order], seed=0)
    assert (shuffled.low, shuffled.high) == pytest.approx((found.low, found.high))


def test_a_single_cluster_has_no_interval_and_undefined_cells_are_left_out() -> None:
    found = clustered_ratio(np.array([1.0, np.nan, 3.0]), np.ones(3), np.array(["a", "b", "a"]), 0)
    assert (found.value, found.n) == (2.0, 2) and math.isnan(found.low)
    empty = clustered_ratio(np.array([np.nan]), np.ones(1), np.array(["a"]), 0)
    assert empty.n == 0 and math.isnan(empty.value)
