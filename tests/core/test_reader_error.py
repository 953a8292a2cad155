"""The reader's errors: a known confusion is undone, in expectation exactly; draws have the moments of their counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ge2hist_core import rng
from ge2hist_core.config import READER_CLASSES
from ge2hist_core.reader_error import ReaderError
from ge2hist_core.types import BadInput

CLASSES = ("A", "B", "C")
# Recall 0.9, 0.8, 0.95; B is often called A.
SHARE = np.array([[0.85, 0.03, 0.02, 0.10], [0.20, 0.55, 0.05, 0.20], [0.01, 0.04, 0.90, 0.05]])
AREA = 0.004


def measured(n: float = 1e9, false: float = 3e6) -> ReaderError:
    """So many judged nuclei that the matrix is known."""
    return ReaderError(CLASSES, SHARE * n, np.array([1.0, 2.0, 0.0]) * false, area_mm2=false / 100)


def test_a_known_confusion_is_undone_in_expectation() -> None:
    error = measured()
    true = np.array([12.0, 3.0, 5.0])
    found = true @ SHARE[:, :3] + np.array([100.0, 200.0, 0.0]) * AREA
    np.testing.assert_allclose(error.correct(found, AREA, ridge=0), true, rtol=1e-6)
    np.testing.assert_allclose(error.correct(found, AREA), true, rtol=1e-3)


def test_the_mean_of_read_tiles_is_corrected_to_the_true_mean() -> None:
    draw = rng.stream(0, "tiles")
    true = np.stack([draw.poisson([9, 2, 4]) for _ in range(4000)])
    read = np.stack(
        [
            sum(draw.multinomial(n, share)[:3] for n, share in zip(tile, SHARE, strict=True))
            + draw.poisson(np.array([100.0, 200.0, 0.0]) * AREA)
            for tile in true
        ]
    )
    error, naive = measured().correct(read.mean(0), AREA) - true.mean(0), read.mean(0) - true.mean(0)
    # A tile's corrected count varies by about 4 nuclei.
    assert np.abs(error).max() < 4 * 4 / np.sqrt(4000)
    assert np.abs(naive).max() > 0.4


@given(arrays(float, (4, 3), elements=st.floats(0, 60)))
def test_corrected_counts_are_never_negative_and_come_row_by_row(found: np.ndarray) -> None:
    error = measured()
    together = error.correct(found, AREA)
    assert (together >= 0).all()
    np.testing.assert_allclose(together[2], error.correct(found[2], AREA), atol=1e-9)


def test_a_negative_answer_is_the_best_one_without_negatives() -> None:
    """Brute force over a fine grid of counts >= 0 finds nothing better."""
    error = measured()
    found = np.array([9.0, 0.0, 4.0])
    fitted = error.correct(found, AREA, ridge=0)
    assert fitted[1] == 0

    def loss(t: np.ndarray) -> np.ndarray:
        return np.square(t @ error.matrix + error.false_per_mm2 * AREA - found).sum(-1)

    axis = np.linspace(0, 12, 61)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    assert loss(fitted) <= loss(grid).min() + 1e-9


def test_a_perfect_reader_is_believed_and_types_that_it_cannot_tell_apart_stay_as_found() -> None:
    perfect = ReaderError(CLASSES, np.eye(3, 4) * 500, np.zeros(3), 1.0)
    np.testing.assert_allclose(perfect.correct(np.array([5.0, 0.0, 7.0]), AREA), [5, 0, 7], atol=1e-9)
    half = np.array([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0]])
    blind = ReaderError(CLASSES, half * 1e12, np.zeros(3), 1.0)
    np.testing.assert_allclose(blind.correct(np.array([6.0, 4.0, 1.0]), AREA), [6, 4, 1], rtol=0.02)


def test_a_type_that_was_never_judged_is_taken_as_read() -> None:
    error = ReaderError(CLASSES, np.diag([80.0, 0.0, 90.0]) @ np.eye(3, 4), np.zeros(3), 1.0)
    assert error.matrix[1].tolist() == [0, 1, 0] and np.isnan(error.recall[1])
    assert all(one.matrix[1].tolist() == [0, 1, 0] for one in error.draws(3, 0))


def test_drawn_readers_vary_as_counts_do_and_depend_on_their_number_alone() -> None:
    error = ReaderError(CLASSES, SHARE * 400, np.array([30.0, 5.0, 0.0]), 2.0)
    drawn = error.draws(1500, seed=4)
    outcome, false = (np.stack([getattr(one, name) for one in drawn]) for name in ("outcome", "false"))
    assert (outcome.sum(2) == 400).all()
    np.testing.assert_allclose(outcome.mean(0), 400 * SHARE, atol=4 * 10 / np.sqrt(1500) + 1)
    np.testing.assert_allclose(outcome.var(0), 400 * SHARE * (1 - SHARE), rtol=0.25, atol=1)
    np.testing.assert_allclose(false.mean(0), [30, 5, 0], atol=4 * 6 / np.sqrt(1500))
    np.testing.assert_array_equal(error.draws(3, 4)[2].outcome, outcome[2])
    assert (error.draws(3, 5)[2].outcome != outcome[2]).any()


def figures(**more: object) -> dict[str, object]:
    matched = {"A": {"A": 85, "B": 3, "C": 2}, "B": {"A": 20, "B": 55, "C": 5}, "C": {"A": 1, "B": 4, "C": 90}}
    return {"confusion": matched, "recall": 265 / 300, "precision": 265 / 280, "n_tiles": 50, **more}


def test_figures_by_type_are_used_where_the_bundle_records_them() -> None:
    by_type = figures(true_counts={"A": 100, "B": 100, "C": 100}, found_counts={"A": 106, "B": 77, "C": 97})
    error = ReaderError.from_figures(by_type, CLASSES)
    np.testing.assert_allclose(error.outcome, SHARE * 100)
    assert error.false.tolist() == [0, 15, 0]
    np.testing.assert_allclose(error.area_mm2, 50 * 0.064**2)
    np.testing.assert_allclose(error.recall, [0.9, 0.8, 0.95])


def test_older_figures_spread_missed_and_false_nuclei_over_the_types() -> None:
    error = ReaderError.from_figures(figures(), CLASSES)
    np.testing.assert_allclose(error.recall, 265 / 300)
    np.testing.assert_allclose(error.outcome.sum(), 300)
    np.testing.assert_allclose(error.false.sum(), 15)
    assert ReaderError.from_figures({"reconstructed": figures(), "recall": 0}, CLASSES).false.sum() > 14


def test_the_shipped_reader_has_errors_to_carry() -> None:
    path = Path(__file__).parents[2] / "assets" / "demo_bundle" / "reader.json"
    error = ReaderError.from_figures(json.loads(path.read_text())["figures"], READER_CLASSES)
    assert (np.diag(error.matrix) > 0.7).all() and (error.recall > 0.9).all()


@pytest.mark.parametrize("broken", [{}, figures(recall=0.0), figures(confusion={"A": {"A": 1}}), {"confusion": 3}])
def test_figures_without_errors_are_refused(broken: dict[str, object]) -> None:
    with pytest.raises(BadInput, match="figures lack its errors by type .*judge it with `train-reader`"):
        ReaderError.from_figures(broken, CLASSES)


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="outcome must hold counts"):
        ReaderError(CLASSES, np.eye(3), np.zeros(3), 1.0)
    with pytest.raises(ValueError, match="outcome must hold counts"):
        ReaderError(CLASSES, -np.eye(3, 4), np.zeros(3), 1.0)
    with pytest.raises(ValueError, match="area_mm2"):
        ReaderError(CLASSES, np.eye(3, 4), np.zeros(3), 0.0)
