"""Counts of the known-truth cells, against scipy, closed forms and the structural model's own promises."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chisquare, kstest, nbinom

from ge2hist_core.config import CELL_TYPES
from ge2hist_core.simulator import expression
from ge2hist_core.simulator.expression import GeneTable, draw_counts, expected_counts, load_genes, nb_quantile
from ge2hist_core.simulator.programmes import PROGRAMMES
from ge2hist_core.types import BadInput

REPO = Path(__file__).parents[2]
XENIUM = REPO.parent / "shared" / "data" / "xenium_breast" / "ghist_breast_cells.h5ad"
GRID_UM = 2.0
SIZE_UM = 400.0
GENES = load_genes()
ROW = {symbol: g for g, symbol in enumerate(GENES.symbols)}


@dataclass(frozen=True, eq=False)
class FlatSection:
    """A section built from its answer: every field has a known constant or linear value."""

    nuclei: pd.DataFrame
    fields: dict[str, np.ndarray]
    driver_levels: dict[str, np.ndarray]
    gene_factors: dict[str, float] = field(default_factory=dict)
    grid_um: float = GRID_UM
    seed: int = 5
    donor: int = 0


def section(n: int = 600, **changes) -> FlatSection:
    rng = np.random.default_rng(1)
    nuclei = pd.DataFrame(
        {
            "x_um": rng.uniform(0, SIZE_UM, n),
            "y_um": rng.uniform(0, SIZE_UM, n),
            "cell_type": np.resize(np.array(CELL_TYPES, dtype=object), n),
            "major_um": 8.0,
            "minor_um": 6.4,
            "key": np.arange(n, dtype=np.int64) * 7 + 3,
        }
    )
    flat = np.zeros((int(SIZE_UM / GRID_UM),) * 2)
    base = FlatSection(
        nuclei,
        dict.fromkeys(PROGRAMMES, flat),
        {GENES.symbols[g]: flat for g in GENES.rows("driver")},
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def flat_counts():
    return draw_counts(section())


def test_table_is_large_enough_and_every_role_is_there():
    assert len(GENES) >= 640
    assert len(GENES.rows("driver")) == 24
    for programme in PROGRAMMES:
        drivers = GENES.rows("driver", programme)
        assert len(drivers) == 4
        assert 8 <= len(GENES.rows("reporter", programme)) <= 12
        assert ((np.abs(GENES.strength[drivers]) >= 0.6) & (np.abs(GENES.strength[drivers]) <= 1.2)).all()
        # The four together must be able to raise the programme although single ones lower it.
        assert GENES.strength[drivers].sum() > 1
    reporters = np.abs(GENES.strength[GENES.rows("reporter")])
    assert ((reporters >= 0.3) & (reporters <= 0.8)).all()
    # A driver's count in one cell must carry information whatever the type.
    assert GENES.base[GENES.rows("driver")].min() >= 2


def test_a_gene_is_found_by_its_symbol():
    assert len(GENES.drivers) == 24
    assert GENES.programme_of("VEGFA") == ("angiogenesis", 1.2)
    assert GENES.programme_of("SNAI2") == ("cohesion", -0.9)
    assert GENES.programme_of("GAPDH") == ("", 0.0)
    with pytest.raises(KeyError, match="NOGENE"):
        GENES.programme_of("NOGENE")


def test_sources_are_citations():
    cited = GENES.source[GENES.source != "background"]
    assert all(source.startswith("10.") and "/" in source for source in cited)
    assert (GENES.source[GENES.rows("driver")] != "background").all()


def test_the_file_holds_the_ten_types_in_the_order_of_config():
    """Known markers decide whether a column has been swapped."""
    marker = ("ERBB2", "MKI67", "KRT15", "COL1A2", "VWF", "CD40LG", "CD8B", "MS4A1", "JCHAIN", "CD68")
    np.testing.assert_array_equal([GENES.base[ROW[g]].argmax() for g in marker], np.arange(len(CELL_TYPES)))
    with expression.GENES_CSV.open() as file:
        assert tuple(next(csv.reader(file))[4:14]) == expression.TYPE_COLUMNS


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("role", "cause", "role must be"),
        ("programme", "", "programme"),
        ("strength", 0.0, "strength"),
        ("dispersion", 0.0, "dispersion"),
        ("source", "background", "citation"),
        ("symbols", GENES.symbols[1], "more than one row"),
    ],
)
def test_a_broken_row_is_refused_by_name(column, value, message):
    changed = getattr(GENES, column).copy()
    changed[0] = value
    with pytest.raises(ValueError, match=message) as error:
        replace(GENES, **{column: changed})
    assert (GENES.symbols[1] if column == "symbols" else GENES.symbols[0]) in str(error.value)


def test_a_table_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        GENES.base[0, 0] = 1


def test_xenium_breast_panel_is_covered():
    if not XENIUM.exists():
        pytest.skip("needs ../shared/data/xenium_breast")
    anndata = pytest.importorskip("anndata")
    source = anndata.read_h5ad(XENIUM, backed="r")
    panel = set(source.var_names)
    source.file.close()
    assert len(panel & set(GENES.symbols)) / len(panel) >= 0.9


def test_quantile_equals_scipy():
    rng = np.random.default_rng(0)
    n = 20_000
    u, mean, alpha = rng.uniform(size=n), np.exp(rng.uniform(-4, 6, n)), np.exp(rng.uniform(-3, 0, n))
    expected = nbinom.ppf(u, 1 / alpha, 1 / (1 + alpha * mean))
    np.testing.assert_array_equal(nb_quantile(u, mean, alpha), expected)


def test_quantile_at_the_ends():
    """The smallest and largest uniform number that the hash can give: no endless sum, nothing beyond the law."""
    lowest, highest = 0.5 * 2.0**-53, 1 - 2.0**-53
    for mean in (1e-9, 3.0, 2000.0):
        law = nbinom(1 / 0.3, 1 / (1 + 0.3 * mean))
        low, high = nb_quantile(np.array([lowest, highest]), np.full(2, mean), np.full(2, 0.3))
        assert low == law.ppf(lowest)
        assert law.ppf(1 - 1e-12) <= high
        assert law.logsf(high - 1) > np.log(1e-18) or high == 0
    assert nb_quantile(np.array([highest]), np.zeros(1), np.ones(1)) == 0


def test_hash_is_uniform_and_uncorrelated():
    """Sequential keys, as nuclei have; neighbouring keys and salts must not show."""
    u = expression._uniforms(np.arange(4000), np.arange(1, 21, dtype=np.uint64))
    assert kstest(u.ravel(), "uniform").pvalue > 0.001
    n = len(u)
    off_diagonal = np.corrcoef(u.T)[np.triu_indices(20, 1)]
    assert np.abs(off_diagonal).max() < 4.5 / np.sqrt(n)
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 4.5 / np.sqrt(u.size)


def test_counts_have_the_negative_binomial_law(monkeypatch):
    """One type, one library size: counts of a gene against NB(mean, alpha) by chi-square, and its two moments."""
    monkeypatch.setattr(expression, "LIBRARY_SIGMA", 0.0)
    flat = section(n=6000)
    flat = replace(flat, nuclei=flat.nuclei.assign(cell_type="Fibroblast"))
    counts = draw_counts(flat).toarray()
    for symbol in ("COL1A2", "TGFB1", "CD3E"):
        g = ROW[symbol]
        mean, alpha = expected_counts(flat, GENES)[0, g], GENES.dispersion[g]
        variance = mean + alpha * mean**2
        assert counts[:, g].mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / 6000))
        # Var(s^2) of NB from its excess kurtosis 6 alpha + 1 / variance.
        spread = variance * np.sqrt((2 + 6 * alpha + 1 / variance) / 6000)
        assert counts[:, g].var() == pytest.approx(variance, abs=4 * spread)
        law = nbinom(1 / alpha, 1 / (1 + alpha * mean))
        edges = np.unique(law.ppf(np.linspace(0.1, 0.9, 9)))
        observed = np.bincount(np.searchsorted(edges, counts[:, g]), minlength=len(edges) + 1)
        probability = np.diff(np.concatenate([[0], law.cdf(edges), [1]]))
        assert chisquare(observed, probability * 6000).pvalue > 0.001


def test_umi_and_detected_genes_are_those_of_one_nucleus(flat_counts):
    umi, detected = flat_counts.sum(axis=1).A1, flat_counts.getnnz(axis=1)
    assert 500 < np.median(umi) < 1500
    assert 200 < np.median(detected) < 400
    assert (umi > 100).all()
    assert flat_counts.dtype == np.float32
    assert flat_counts.shape == (600, len(GENES))


def test_markers_separate_the_types(flat_counts):
    """Nearest centroid on log-normalised counts, centroids from other cells and another donor."""

    def normalised(counts):
        dense = counts.toarray()
        return np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1000)

    train, test = normalised(draw_counts(section(donor=1))), normalised(flat_counts)
    label = np.resize(np.arange(10), len(test))
    centroid = np.stack([train[label == t].mean(axis=0) for t in range(10)])
    predicted = ((test[:, None] - centroid[None]) ** 2).sum(axis=2).argmin(axis=1)
    assert (predicted == label).mean() > 0.97


def test_driver_follows_its_level_and_reporter_its_programme():
    """Linear fields: bilinear interpolation is exact, so every mean has a closed form."""
    base = section(n=200)
    nodes = (np.arange(200) + 0.5) * GRID_UM
    slope = np.broadcast_to(nodes / SIZE_UM, (200, 200))  # rises with x, columns
    moved = replace(
        base,
        driver_levels={**base.driver_levels, "VEGFA": slope},
        fields={**base.fields, "hypoxia": slope.T},  # rises with y, rows
    )
    # Borders hold the outer node's value.
    x = np.clip(base.nuclei["x_um"], 1, SIZE_UM - 1) / SIZE_UM
    y = np.clip(base.nuclei["y_um"], 1, SIZE_UM - 1) / SIZE_UM
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expression, "AMBIENT_FRACTION", 0.0)
        ratio = expected_counts(moved, GENES) / expected_counts(base, GENES)
    np.testing.assert_allclose(ratio[:, ROW["VEGFA"]], np.exp(x), rtol=1e-9)
    np.testing.assert_allclose(ratio[:, ROW["CA9"]], np.exp(GENES.strength[ROW["CA9"]] * y), rtol=1e-9)
    still = [g for g in range(len(GENES)) if GENES.symbols[g] != "VEGFA" and GENES.programme[g] != "hypoxia"]
    np.testing.assert_array_equal(ratio[:, still], 1)
    # Drivers of hypoxia are causes: its field does not move them.
    np.testing.assert_array_equal(ratio[:, GENES.rows("driver", "hypoxia")], 1)


def test_ambient_is_three_per_cent_of_the_nearest_nuclei():
    flat = section(n=80)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expression, "AMBIENT_FRACTION", 0.0)
        own = expected_counts(flat, GENES)
    xy = flat.nuclei[["x_um", "y_um"]].to_numpy()
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    for i in (0, 17, 79):
        near = np.argsort(distance[i])[:12]
        np.testing.assert_allclose(
            expected_counts(flat, GENES)[i], 0.97 * own[i] + 0.03 * own[near].mean(axis=0), rtol=1e-9
        )


@pytest.mark.parametrize("symbol", ["MKI67", "STAT1", "VEGFA"])
def test_editing_one_gene_leaves_every_other_count(flat_counts, symbol):
    flat = section()
    if GENES.role[ROW[symbol]] == "driver":
        edited = replace(flat, driver_levels={**flat.driver_levels, symbol: np.full((200, 200), np.log(2.0))})
    else:
        edited = replace(flat, gene_factors={symbol: 2.0})
    after = draw_counts(edited)
    changed = np.flatnonzero((after != flat_counts).getnnz(axis=0))
    np.testing.assert_array_equal(changed, [ROW[symbol]])
    # Quantile coupling: doubling the mean never lowers any single count.
    assert (after - flat_counts)[:, ROW[symbol]].min() >= 0


@pytest.mark.parametrize("symbol", ["KRT8", "CA9", "TGFB1"])
def test_knock_out_gives_no_count_at_all(symbol):
    flat = section(n=100)
    if GENES.role[ROW[symbol]] == "driver":
        knocked = replace(flat, driver_levels={**flat.driver_levels, symbol: np.full((200, 200), -np.inf)})
    else:
        knocked = replace(flat, gene_factors={symbol: 0.0})
    assert draw_counts(flat)[:, ROW[symbol]].sum() > 0
    assert draw_counts(knocked)[:, ROW[symbol]].sum() == 0


def test_counts_belong_to_the_key_not_to_the_row():
    """Rows in another order: same counts per nucleus, so arms with other nuclei stay comparable."""
    flat = section(n=120)
    order = np.random.default_rng(2).permutation(120)
    shuffled = replace(flat, nuclei=flat.nuclei.iloc[order].reset_index(drop=True))
    assert (draw_counts(shuffled) != draw_counts(flat)[order]).nnz == 0


def test_donors_and_seeds_differ():
    flat = section(n=100)
    means = [expected_counts(s, GENES) for s in (flat, replace(flat, donor=1), replace(flat, seed=6))]
    log_ratio = np.log(means[1] / means[0]).mean(axis=0)
    # Two independent log-normal effects of 0.15 each.
    assert np.std(log_ratio) == pytest.approx(0.15 * np.sqrt(2), rel=0.15)
    assert not np.allclose(means[2], means[0])


def test_one_nucleus_and_none():
    for n in (0, 1):
        assert draw_counts(section(n=n)).shape == (n, len(GENES))


@pytest.mark.parametrize(("factors", "message"), [({"NOGENE": 1.0}, "NOGENE"), ({"KRT8": -1.0}, "KRT8 is -1.0")])
def test_bad_edits_name_gene_and_cure(factors, message):
    with pytest.raises(BadInput, match=message):
        draw_counts(section(n=5, gene_factors=factors))


def test_a_driver_without_level_or_with_holes_is_refused():
    flat = section(n=5)
    without = {g: level for g, level in flat.driver_levels.items() if g != "VEGFA"}
    with pytest.raises(ValueError, match="VEGFA"):
        draw_counts(replace(flat, driver_levels=without))
    holes = flat.driver_levels["VEGFA"].copy()
    holes[0, 0] = -np.inf
    with pytest.raises(ValueError, match="VEGFA"):
        draw_counts(replace(flat, driver_levels={**without, "VEGFA": holes}))


def test_gene_table_is_what_load_genes_returns():
    assert isinstance(GENES, GeneTable)
    assert load_genes() is GENES
