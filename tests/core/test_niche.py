"""Niche statistics against brute force, closed forms and invariances."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ge2hist_core import niche
from ge2hist_core.types import BadInput
from tests import oracles

SIZE = (64.0, 48.0)
CLASSES = ("A", "B", "C")


def table(points, labels):
    points = np.asarray(points, dtype=float).reshape(-1, 2)
    return pd.DataFrame({"x_um": points[:, 0], "y_um": points[:, 1], "cell_type": np.asarray(labels, dtype=object)})


def stats(points, labels, size=SIZE):
    return niche.niche_stats(table(points, labels), size, CLASSES)


# Multiples of 1/8 um: reflections are then exact, so that a tie between neighbour and edge stays one.
def coordinate(limit):
    return st.integers(0, int(limit * 8)).map(lambda k: k / 8)


labelled = st.lists(st.tuples(coordinate(SIZE[0]), coordinate(SIZE[1]), st.sampled_from(CLASSES)), max_size=40)


def split(nuclei):
    return [(x, y) for x, y, _ in nuclei], [t for _, _, t in nuclei]


def assert_same(a, b):
    for name, value in a.readouts().items():
        assert b.readouts()[name] == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True), name
    np.testing.assert_allclose(a.per_type["spacing_um"], b.per_type["spacing_um"], rtol=1e-9)


def test_docstring_examples():
    result = doctest.testmod(niche)
    assert result.attempted >= 6 and result.failed == 0


@settings(deadline=None)
@given(labelled)
def test_equals_brute_force(nuclei):
    points, labels = split(nuclei)
    got = stats(points, labels)
    mean, variance = oracles.hanisch(points, SIZE)
    assert got.n == len(points)
    assert got.density_per_mm2 == pytest.approx(len(points) / (64e-3 * 48e-3))
    assert got.spacing_um == pytest.approx(mean, nan_ok=True)
    assert got.spacing_var_um2 == pytest.approx(variance, rel=1e-6, abs=1e-9, nan_ok=True)
    for name in CLASSES:
        own = [p for p, t in zip(points, labels, strict=True) if t == name]
        row = got.per_type.loc[name]
        assert row["n"] == len(own)
        assert row["density_per_mm2"] * got.area_mm2 == pytest.approx(len(own))
        assert row["fraction"] == pytest.approx(len(own) / len(points) if points else math.nan, nan_ok=True)
        assert row["spacing_um"] == pytest.approx(oracles.hanisch(own, SIZE)[0], nan_ok=True)


@settings(deadline=None)
@given(labelled)
def test_fractions_sum_to_one_or_are_all_nan(nuclei):
    fraction = stats(*split(nuclei)).per_type["fraction"]
    assert fraction.isna().all() if not nuclei else fraction.sum() == pytest.approx(1.0)


@settings(deadline=None)
@given(labelled, st.randoms(use_true_random=False))
def test_order_does_not_matter(nuclei, random):
    mixed = list(nuclei)
    random.shuffle(mixed)
    assert_same(stats(*split(nuclei)), stats(*split(mixed)))


@settings(deadline=None)
@given(labelled)
def test_reflection_and_quarter_turn_do_not_matter(nuclei):
    points, labels = split(nuclei)
    reference = stats(points, labels)
    assert_same(reference, stats([(SIZE[0] - x, y) for x, y in points], labels))
    assert_same(reference, stats([(y, SIZE[0] - x) for x, y in points], labels, size=SIZE[::-1]))


@settings(deadline=None)
@given(labelled, st.floats(0.5, 20.0))
def test_scaling_all_lengths_scales_the_spacing(nuclei, factor):
    points, labels = split(nuclei)
    a = stats(points, labels)
    b = stats([(factor * x, factor * y) for x, y in points], labels, size=(factor * SIZE[0], factor * SIZE[1]))
    assert b.density_per_mm2 == pytest.approx(a.density_per_mm2 / factor**2)
    # Rounding may move a nucleus over the border of the rule "neighbour nearer than edge" only where the two tie.
    tie = [
        abs(s - oracles.edge_distance(p, SIZE)) < 1e-9
        for p, s in zip(points, oracles.nearest_distances(points), strict=True)
    ]
    if not any(tie):
        assert b.spacing_um == pytest.approx(factor * a.spacing_um, nan_ok=True)


@settings(deadline=None)
@given(labelled)
def test_an_empty_margin_only_lowers_density(nuclei):
    points, labels = split(nuclei)
    wide = stats([(x + 5, y + 5) for x, y in points], labels, size=(SIZE[0] + 10, SIZE[1] + 10))
    narrow = stats(points, labels)
    assert wide.n == narrow.n
    assert wide.density_per_mm2 < narrow.density_per_mm2 or not nuclei


def test_undefined_is_nan():
    empty = stats([], [])
    assert empty.n == 0 and empty.density_per_mm2 == 0
    assert math.isnan(empty.spacing_um) and math.isnan(empty.spacing_var_um2)
    one = stats([(32, 24)], ["A"])
    assert math.isnan(one.spacing_um) and one.per_type.loc["A", "fraction"] == 1
    far_apart = stats([(1, 1), (60, 40)], ["A", "A"])
    assert math.isnan(far_apart.spacing_um)


def test_one_counting_nucleus_has_a_mean_but_no_variance():
    got = stats([(30, 24), (30, 3)], ["A", "A"])
    assert got.spacing_um == 21 and math.isnan(got.spacing_var_um2)


def test_square_lattice_has_its_own_spacing():
    xy = [(4.0 + 8 * i, 4.0 + 8 * j) for i in range(8) for j in range(6)]
    got = stats(xy, ["A"] * len(xy))
    assert got.spacing_um == pytest.approx(8.0) and got.spacing_var_um2 == pytest.approx(0.0, abs=1e-12)


def poisson_tiles(density_per_um2, size, n_tiles, seed):
    draw = np.random.default_rng(seed)
    for _ in range(n_tiles):
        yield draw.uniform(0, size, size=(draw.poisson(density_per_um2 * size[0] * size[1]), 2))


def test_poisson_points_reach_the_closed_form_and_the_uncorrected_mean_does_not():
    """Poisson points of intensity lambda: mean 1 / (2 sqrt(lambda)), variance (4 - pi) / (4 pi lambda)."""
    density, size = 0.008, (64.0, 64.0)
    mean, variance = 1 / (2 * math.sqrt(density)), (4 - math.pi) / (4 * math.pi * density)
    corrected, plain = [], []
    for points in poisson_tiles(density, size, 3000, seed=5):
        corrected.append(niche.spacing(points, size))
        plain.append(niche.nearest_neighbours(points).mean())
    got = np.array(corrected)
    error = got.std(axis=0) / math.sqrt(len(got))
    assert abs(got[:, 0].mean() - mean) < 4 * error[0] + 0.01 * mean
    assert abs(got[:, 1].mean() - variance) < 4 * error[1] + 0.06 * variance
    assert np.mean(plain) > 1.04 * mean


@pytest.mark.parametrize("kind", ["unknown type", "nan position", "no width"])
def test_what_cannot_be_counted_is_refused(kind):
    points, labels, size = [(1.0, 1.0)], ["A"], SIZE
    if kind == "unknown type":
        labels, match = ["Nucleus"], "'Nucleus' is not among the classes A, B, C"
    elif kind == "nan position":
        points, match = [(math.nan, 1.0)], "finite"
    else:
        size, match = (0.0, 1.0), "width and height > 0"
    with pytest.raises(ValueError, match=match):
        stats(points, labels, size)


def test_nuclei_outside_the_tile_are_not_counted():
    assert stats([(32, 24), (-0.1, 3), (64.1, 3), (64.0, 48.0)], ["A"] * 4).n == 2


def test_pool_weighs_fractions_by_nuclei_and_skips_undefined():
    few = stats([(32, 24)], ["A"])
    many = stats([(20, 20), (24, 20), (28, 20)], ["B", "B", "A"])
    got = niche.pool([few, many, stats([], [])])
    assert got.loc["fraction:A", "mean"] == pytest.approx(2 / 4)
    assert got.loc["fraction:C", "mean"] == 0
    assert got.loc["density", "mean"] == pytest.approx((few.density_per_mm2 + many.density_per_mm2) / 3)
    assert got.loc["spacing", "mean"] == 4 and got.loc["spacing", "n"] == 1
    assert got.loc["density", "n"] == 3
    assert math.isnan(niche.pool([stats([], [])]).loc["fraction:A", "mean"])


def test_pool_refuses_nothing_and_mixtures():
    with pytest.raises(ValueError, match="at least one"):
        niche.pool([])
    with pytest.raises(ValueError, match="different classes"):
        niche.pool([stats([], []), niche.niche_stats(table([], []), SIZE, ("A", "B"))])


counts = st.lists(st.integers(0, 500), min_size=3, max_size=3).map(np.array)


@settings(deadline=None)
@given(counts, counts)
def test_composition_kl_is_zero_only_for_equal_compositions(p, q):
    value = niche.composition_kl(p, q)
    assert value >= -1e-12 and niche.composition_kl(p, p) == pytest.approx(0.0, abs=1e-12)
    smooth_p, smooth_q = (p + 0.5) / (p.sum() + 1.5), (q + 0.5) / (q.sum() + 1.5)
    assert value == pytest.approx(sum(a * math.log(a / b) for a, b in zip(smooth_p, smooth_q, strict=True)), abs=1e-12)


def test_enrichment_has_the_moments_of_all_orders_of_the_labels():
    points = [(10, 10), (14, 10), (18, 12), (22, 18), (30, 30), (33, 31), (36, 29)]
    labels = ["A", "A", "A", "B", "B", "B", "B"]
    n = 20_000
    got = niche.enrichment(table(points, labels), SIZE, ("A", "B"), radius_um=9, n_permutations=n, seed=3)
    for row in got.itertuples():
        mean, sd = oracles.pair_count_moments(points, labels, row.type_a, row.type_b, 9)
        assert row.observed == oracles.pair_count(points, labels, row.type_a, row.type_b, 9)
        assert abs(row.expected - mean) < 4 * sd / math.sqrt(n)
        assert row.z == pytest.approx((row.observed - mean) / sd, rel=0.05)


def test_enrichment_sees_planted_neighbours_and_absent_types():
    draw = np.random.default_rng(1)
    a, b = draw.uniform(0, 30, (40, 2)), draw.uniform(0, 30, (40, 2)) + [34, 18]
    got = niche.enrichment(table(np.vstack([a, b]), ["A"] * 40 + ["B"] * 40), SIZE, CLASSES, 10, 200, 0)
    z = got.set_index(["type_a", "type_b"])["z"]
    assert z["A", "A"] > 3 and z["B", "B"] > 3 and z["A", "B"] < -3
    assert math.isnan(z["A", "C"]) and math.isnan(z["C", "C"])


def test_enrichment_of_shuffled_labels_is_standard():
    """z over many label shuffles has mean 0 and variance 1 by construction."""
    draw = np.random.default_rng(2)
    points = draw.uniform(0, 48, (40, 2))
    labels = np.array(["A"] * 20 + ["B"] * 20, dtype=object)
    z = [
        niche.enrichment(table(points, draw.permutation(labels)), SIZE, ("A", "B"), 10, 200, seed)["z"][0]
        for seed in range(200)
    ]
    assert abs(np.mean(z)) < 4 / math.sqrt(200) and 0.75 < np.std(z) < 1.25


@settings(deadline=None, max_examples=20)
@given(labelled, st.randoms(use_true_random=False))
def test_enrichment_does_not_depend_on_the_order_of_the_table(nuclei, random):
    mixed = list(nuclei)
    random.shuffle(mixed)
    a, b = (niche.enrichment(table(*split(rows)), SIZE, CLASSES, 12, 20, 7) for rows in (nuclei, mixed))
    pd.testing.assert_frame_equal(a, b)
    changed = niche.enrichment(table(*split(nuclei)), SIZE, CLASSES, 12, 20, 8)
    assert (changed["observed"] == a["observed"]).all()


def test_enrichment_refuses_what_it_cannot_do():
    with pytest.raises(BadInput, match="radius_um is 0"):
        niche.enrichment(table([], []), SIZE, CLASSES, 0)
    with pytest.raises(BadInput, match="n_permutations is 1"):
        niche.enrichment(table([], []), SIZE, CLASSES, 5, 1)
