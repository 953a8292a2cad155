"""Corrected comparison: planted effects, coverage by simulation, and what pairing must cancel."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ge2hist_core import rng
from ge2hist_core.reader_error import ReaderError
from perturb.reader_error import corrected_comparison, count_table

CLASSES = ("A", "B")
SHARE = np.array([[0.9, 0.05, 0.05], [0.25, 0.65, 0.10]])
AREA = 0.004


def judged(n: int, stream: np.random.Generator | None = None) -> ReaderError:
    outcome = SHARE * n if stream is None else stream.multinomial(n, SHARE)
    return ReaderError(CLASSES, outcome, np.zeros(2), 1.0)


def read(stream: np.random.Generator, true: np.ndarray) -> np.ndarray:
    """Found counts of tiles ``[cell, seed, type]``."""
    return sum(stream.multinomial(true[..., t], SHARE[t])[..., :2] for t in range(2)).astype(float)


def test_a_planted_effect_is_found_and_the_readers_bias_is_gone() -> None:
    draw = rng.stream(0, "planted")
    base, edited = (draw.poisson(mean, size=(1, 3000, 2)) for mean in ([10, 4], [10, 8]))
    table = corrected_comparison(read(draw, base), read(draw, edited), judged(10**7), AREA, seed=0, n_resamples=50)
    table = table.set_index("readout")
    truth = (edited.mean((0, 1)) - base.mean((0, 1))) / AREA
    # A tile's effect varies by 1,600 / mm2.
    assert table.loc["density:B", "effect"] == pytest.approx(truth[1], abs=4 * 1600 / np.sqrt(3000))
    assert table.loc["density:A", "effect"] == pytest.approx(truth[0], abs=4 * 1600 / np.sqrt(3000))
    assert table.loc["density:B", "found"] == pytest.approx(0.65 * truth[1], abs=4 * 1600 / np.sqrt(3000))
    fraction = edited.mean((0, 1))[1] / edited.mean((0, 1)).sum()
    assert table.loc["fraction:B", "edited"] == pytest.approx(fraction, abs=0.02)
    assert (
        list(table.loc[["density", "fraction:A"], "unit"]) == ["cells/mm²", "fraction"] and (table["n"] == 3000).all()
    )


def test_intervals_cover_the_truth_when_the_reader_was_judged_on_few_nuclei() -> None:
    """60 judged nuclei per type: without its own error the interval would be too narrow."""
    hit = narrow = 0
    worlds = 60
    for i in range(worlds):
        draw = rng.stream(1, "coverage", i)
        base, edited = (draw.poisson(mean, size=(1, 40, 2)) for mean in ([10, 3], [4, 9]))
        arms = read(draw, base), read(draw, edited)
        truth = 6 / AREA
        own = judged(60, draw)
        for n, error in (("measured", own), ("certain", ReaderError(CLASSES, own.outcome * 1e6, np.zeros(2), 1.0))):
            row = (
                corrected_comparison(*arms, error, AREA, seed=i, n_resamples=100).set_index("readout").loc["density:B"]
            )
            inside = row["low"] <= truth <= row["high"]
            hit += inside and n == "measured"
            narrow += inside and n == "certain"
    assert hit / worlds > 0.95 - 4 * np.sqrt(0.05 * 0.95 / worlds)
    assert narrow < hit


def test_equal_arms_have_no_effect_and_no_width() -> None:
    found = rng.stream(2, "equal").poisson(6, size=(2, 4, 2)).astype(float)
    table = corrected_comparison(found, found, judged(100), AREA, seed=0, n_resamples=40)
    assert (table[["effect", "low", "high", "found"]] == 0).all(axis=None)


def test_not_knowing_the_reader_widens_the_interval_and_is_named() -> None:
    draw = rng.stream(3, "width")
    base, edited = (read(draw, draw.poisson(mean, size=(1, 64, 2))) for mean in ([10, 3], [4, 9]))
    few, many = (
        corrected_comparison(base, edited, judged(n), AREA, seed=0, n_resamples=400)
        .set_index("readout")
        .loc["density:B"]
        for n in (40, 10**7)
    )
    assert few["high"] - few["low"] > 1.3 * (many["high"] - many["low"])
    assert few["reader_share"] > 0.3 > 0.05 > many["reader_share"]


def test_same_seed_same_numbers_and_a_single_picture_has_no_interval() -> None:
    found = rng.stream(4, "single").poisson(6, size=(3, 1, 2)).astype(float)
    one, two = (corrected_comparison(found, found[::-1], judged(90), AREA, 7, n_resamples=30) for _ in range(2))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert one[["low", "high"]].notna().all(axis=None)
    single = corrected_comparison(found[:1], found[1:2], judged(90), AREA, 7)
    assert single[["low", "high", "reader_share"]].isna().all(axis=None) and single["effect"].notna().all()


def test_pictures_without_nuclei_have_density_zero_and_no_composition() -> None:
    nothing, some = np.zeros((1, 3, 2)), np.array([[[2.0, 0.0], [4.0, 0.0], [3.0, 0.0]]])
    table = corrected_comparison(nothing, some, judged(90), AREA, 0, n_resamples=30).set_index("readout")
    assert table.loc["density", "base"] == 0 and np.isnan(table.loc["fraction:A", "effect"])
    assert "density:B" not in table.index
    assert len(corrected_comparison(nothing, nothing, judged(90), AREA, 0, n_resamples=30)) == 1


def test_counts_are_those_of_nuclei_inside_the_picture() -> None:
    nuclei = pd.DataFrame({"x_um": [1.0, 2.0, 99.0], "y_um": [1.0, 2.0, 3.0], "cell_type": ["A", "B", "A"]})
    assert count_table([nuclei, nuclei[:0]], (64.0, 64.0), CLASSES).tolist() == [[1, 1], [0, 0]]


def test_arms_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"counts \[cell, seed, 2\]"):
        corrected_comparison(np.zeros((1, 2, 2)), np.zeros((1, 3, 2)), judged(9), AREA, 0)
    with pytest.raises(ValueError, match=r"counts \[cell, seed, 2\]"):
        corrected_comparison(np.zeros((1, 2, 3)), np.zeros((1, 2, 3)), judged(9), AREA, 0)


def test_a_type_that_no_pair_differs_in_may_differ_in_the_next_where_others_do() -> None:
    base = np.full((1, 16, 2), 10.0)
    edited = base.copy()
    edited[0, 3, 0] = 11.0
    exact = ReaderError(CLASSES, np.eye(2, 3) * 1e9, np.zeros(2), 1.0)
    table = corrected_comparison(base, edited, exact, AREA, 0).set_index("readout")
    still = table.loc["density:B"]
    # Two further values half a nucleus about the mean.
    half = 1.96 / AREA / (np.sqrt(2) * 16)
    assert still["effect"] == pytest.approx(0, abs=0.1)
    assert (-still["low"], still["high"]) == pytest.approx((half, half), rel=0.02)
    nothing = corrected_comparison(base, base, exact, AREA, 0)
    assert nothing[["effect", "low", "high"]].abs().to_numpy().max() < 0.1
