"""Linear probes: against scikit-learn, and what holding programmes still means."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.metrics import r2_score

from ge2hist_core.types import Cells
from perturb import encoder_ablation
from perturb.encoder_ablation import ENCODERS, Ablation, Probe, Ridge, log_normalised, principal_axes


def some_data(n: int = 300, features: int = 12, targets: int = 3) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(1)
    x = draw.normal(2.0, 1.0, (n, features)) * np.linspace(0.5, 3, features)
    return x, x @ draw.normal(0, 1, (features, targets)) + draw.normal(0, 2, (n, targets)) + 5.0


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_a_ridge_is_scikit_learns_on_standardised_columns(penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_ablation, "PENALTIES", (penalty,))
    x, y = some_data()
    found = Ridge.fit(x, y, (x[:5], y[:5]))
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    expected = SklearnRidge(alpha=penalty * len(x)).fit(z, y)
    np.testing.assert_allclose(found(x), expected.predict(z), rtol=1e-8)


def test_each_target_takes_the_penalty_that_serves_it_on_held_out_cells() -> None:
    draw = np.random.default_rng(2)
    x = draw.normal(0, 1, (60, 40))
    y = np.column_stack([x @ draw.normal(0, 1, 40), draw.normal(0, 1, 60)])  # all signal, all noise
    held_out = draw.normal(0, 1, (500, 40)), np.zeros((500, 2))
    held_out[1][:, 0] = held_out[0] @ np.linalg.lstsq(x, y[:, 0], rcond=None)[0]
    size = np.linalg.norm(Ridge.fit(x, y, held_out).coefficients, axis=0)
    least = np.linalg.norm(np.linalg.lstsq(x, y[:, 0], rcond=None)[0])
    assert size[0] > 0.9 * least and size[1] < 0.2


def test_principal_axes_are_scikit_learns() -> None:
    x, _ = some_data()
    found, expected = principal_axes(x, 5), PCA(5).fit(x).components_.T
    np.testing.assert_allclose(np.abs((found * expected).sum(axis=0)), 1.0, atol=1e-8)


def test_r2_is_scikit_learns_and_a_constant_target_has_none() -> None:
    x, y = some_data()
    y = np.column_stack([y, np.ones(len(y))])
    weights = np.full((1, len(y)), 1 / len(y))
    read = np.column_stack([y[:, :3] + np.random.default_rng(0).normal(0, 1, (len(y), 3)), np.zeros(len(y))])
    found = encoder_ablation._r2(y, read, weights)[:, 0]
    np.testing.assert_allclose(found[:3], r2_score(y[:, :3], read[:, :3], multioutput="raw_values"))
    assert np.isnan(found[3])


def test_log_normalised_counts_do_not_depend_on_depth_and_an_empty_cell_is_0() -> None:
    counts = np.array([[1.0, 3.0], [10.0, 30.0], [0.0, 0.0]])
    cells = Cells(sp.csr_matrix(counts), np.array(["A", "B"]), np.array(["a", "b", "c"]))
    found = log_normalised(cells)
    np.testing.assert_allclose(found[0], np.log1p([2500, 7500]))
    np.testing.assert_allclose(found[1], found[0])
    assert (found[2] == 0).all()


def test_holding_programmes_leaves_them_where_they_were_and_moves_nothing_else() -> None:
    draw = np.random.default_rng(3)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    before = unit(draw.normal(0, 1, (20, 16)))
    after = unit(before + 0.01 * draw.normal(0, 1, (20, 16)))
    reader = Ridge(np.zeros(16), draw.uniform(0.5, 2, 16), draw.normal(0, 1, (16, 3)), np.zeros(3))
    held = Ablation((), reader, {}).hold_programmes(before, after)
    assert np.abs(reader(after) - reader(before)).max() > 0.05
    np.testing.assert_allclose(reader(held), reader(before), atol=1e-5)
    # What is orthogonal to the readers' directions stays.
    axes = np.linalg.qr(reader.coefficients / reader.scale[:, None])[0]
    rest = np.eye(16) - axes @ axes.T
    np.testing.assert_allclose(held @ rest, after @ rest, atol=1e-6)
    with pytest.raises(ValueError, match="not known"):
        Ablation((), None, {}).hold_programmes(before, after)


def test_a_probe_reads_the_description_that_it_was_fitted_on() -> None:
    counts = np.random.default_rng(4).poisson(3.0, (30, 6)).astype(float)
    cells = Cells(sp.csr_matrix(counts), np.array(list("ABCDEF")), np.array([f"c{i}" for i in range(30)]))
    embedding = np.random.default_rng(5).normal(0, 1, (30, 4)).astype(np.float32)
    x = log_normalised(cells)
    centre, axes = x.mean(axis=0), principal_axes(x, 4)
    nothing = Ridge(np.zeros(4), np.ones(4), np.zeros((4, 2)), np.array([1.0, 2.0]))
    np.testing.assert_array_equal(Probe(ENCODERS[0], nothing).describe(cells, embedding), embedding)
    described = Probe(ENCODERS[1], nothing, centre, axes).describe(cells, embedding)
    np.testing.assert_allclose(np.abs(described), np.abs(PCA(4).fit_transform(x)), atol=1e-8)
    np.testing.assert_array_equal(Probe(ENCODERS[2], nothing).describe(cells, embedding), x)
    np.testing.assert_array_equal(Probe(ENCODERS[0], nothing)(cells, embedding), np.repeat([[1.0], [2.0]], 30, axis=1))
