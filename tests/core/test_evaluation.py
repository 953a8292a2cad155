"""The figures of a bundle: by hand, against scipy, on planted differences, and from store and bundle to the file."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import rel_entr
from scipy.stats import pearsonr
from scipy.stats import t as student_t

from ge2hist_core.__main__ import COMMANDS, run_command
from ge2hist_core.config import CELL_TYPES, READER_CLASSES, ModelConfig, SampleConfig
from ge2hist_core.evaluation import QUICK, Counts, Readings, compare, driver_programmes, evaluate, true_readings
from ge2hist_core.evaluation.command import add_arguments, counts_of, without_nan
from ge2hist_core.evaluation.methods import rivals, trained
from ge2hist_core.evaluation.readings import _resampled
from ge2hist_core.evaluation.run import _matched_other
from ge2hist_core.evaluation.states import central_class
from ge2hist_core.evaluation.truth import effects_against_truth, noise_seeds
from ge2hist_core.image_features import ReaderFeatures
from ge2hist_core.model import GE2Hist
from ge2hist_core.niche import niche_stats
from ge2hist_core.nuclei import LearnedReader, ReaderNet
from ge2hist_core.rivals import load_rival, rival_class
from ge2hist_core.rivals.common import Budget
from ge2hist_core.rivals.rna_gan import RNAGANConfig
from ge2hist_core.rivals.transgan import TransGANConfig
from ge2hist_core.rng import stream
from ge2hist_core.simulator.expression import GENES_CSV
from ge2hist_core.simulator.programmes import PROGRAMMES
from ge2hist_core.simulator.tissue import simulate_section
from ge2hist_core.store import TissueStore, write_store
from ge2hist_core.types import BadInput, Latent, NicheStats
from ge2hist_core.vae import fit_mixture

TILE_UM = 64.0
SEED, DONORS, SIZE_UM = 14, range(2, 8), 128.0
MODEL = ModelConfig(
    embedding_dim=16, d_c=3, d_e=2, vae_hidden=8, ae_channels=(8, 8), latent_channels=2, unet_channels=(8,),
    condition_tokens=2, condition_dim=8, attention_heads=2, time_embedding_dim=16,
)  # fmt: skip
FAST = SampleConfig(steps=2)
COUNTS = Counts(tiles=30, reference_tiles=0, edit_cells=0, type_pictures=0, training_cells=0)
FEW = {"counts": COUNTS, "sample": FAST, "seed": 5}


def few_of(**change: int) -> dict[str, Any]:
    return FEW | {"counts": replace(COUNTS, **change)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six simulated donors, numbered from 2, with some twenty whole tiles each."""
    from ge2hist_core.simulator.command import simulate_sections
    from ge2hist_core.simulator.expression import load_genes

    path = tmp_path_factory.mktemp("data") / "tissue.zarr"
    simulation = {"seed": SEED, "donors": list(DONORS), "size_um": SIZE_UM}
    write_store(path, simulate_sections(SEED, DONORS, SIZE_UM), list(load_genes().symbols), simulation=simulation)
    return path


@pytest.fixture(scope="module")
def store(data: Path) -> TissueStore:
    return TissueStore(data)


@pytest.fixture(scope="module")
def bundle(store: TissueStore, scgpt_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough that a cell's genes move its picture; said to be trained on two of the donors."""
    model = GE2Hist.untrained(MODEL, scgpt_folder)
    labels = torch.tensor([model.cell_types.index(name) for name in store.cells.cell_type])
    model.encoder.fit_standardisation(torch.from_numpy(model.embed(store.cells, 0)), labels)
    for parameter in (*model.encoder.parameters(), *model.denoiser.parameters()):
        parameter.mul_(2.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = ReaderNet(8, (8, 8, 8))
    model.reader = LearnedReader(net, threshold=0.02)
    z_c = model.encode(model.embed(store.cells, 0)).z_c
    model.mixture = fit_mixture(z_c, labels.numpy(), len(model.cell_types), seed=0)
    model.report = {
        "store": store.identity,
        "simulation": store.simulation,
        "donors": {"train": ["donor002"], "validation": ["donor005"], "test": ["donor003", "donor004"]},
    }
    folder = tmp_path_factory.mktemp("bundle")
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def model(bundle: Path) -> GE2Hist:
    return GE2Hist.load(bundle)


@pytest.fixture(scope="module")
def result(model: GE2Hist, store: TissueStore) -> dict[str, Any]:
    return evaluate(model, store, **FEW)


def readings(
    counts: list[list[int]] | np.ndarray,
    spacing: list[float] | np.ndarray,
    central: Any = None,
    variance: list[float] | None = None,
) -> Readings:
    """Tiles of 0.01 mm2 with the given nuclei of each class and mean and variance of the spacing."""
    stats = []
    for i, (n, distance) in enumerate(zip(np.asarray(counts), spacing, strict=True)):
        total, spread = int(n.sum()), math.nan if variance is None else variance[i]
        stats.append(NicheStats(pd.DataFrame({"n": n}), total, total / 0.01, float(distance), spread, 0.01))
    return Readings(stats, np.array(["any"] * len(stats) if central is None else central, dtype=object))


def tissue(n: int, seed: int, gain: float = 1.0, shift_um: float = 0.0) -> tuple[Readings, Readings]:
    """Tiles whose own density differs much more than the two readings of one tile; ``gain``, ``shift_um`` planted."""
    draw = np.random.default_rng(seed)
    base = draw.uniform(20, 60, n)
    a, b = (draw.poisson(base * factor)[:, None] * np.array([[3, 1]]) for factor in (gain, 1.0))
    own = draw.normal(8, 2, n)
    return (
        readings(a, own + shift_um + draw.normal(0, 0.3, n)),
        readings(b, own + draw.normal(0, 0.3, n)),
    )


# --- comparing two readings ------------------------------------------------------------------------------------------


def test_the_three_figures_are_those_computed_by_hand():
    a = readings([[3, 5], [1, 1], [2, 0]], [10.0, math.nan, 12.0])
    b = readings([[4, 4], [5, 3], [2, 2]], [8.0, 9.0, 10.0])
    found = compare(a, b, 0)
    # Densities 800, 200, 200 against 800, 800, 400 per mm2; the tile without a spacing leaves only its own mean.
    assert found["n"] == 3
    assert found["density_relative"]["value"] == pytest.approx(1200 / 2000 - 1)
    assert found["spacing_um"]["value"] == pytest.approx((10 + 12) / 2 - (8 + 9 + 10) / 3)
    p, q = np.array([11.5, 9.5]) / 21, np.array([6.5, 6.5]) / 13
    assert found["composition_kl"]["value"] == pytest.approx(rel_entr(p, q).sum())
    assert found["density_r"] == pytest.approx(pearsonr([8, 2, 2], [8, 8, 4])[0])


def test_variance_and_density_of_a_class_are_those_computed_by_hand():
    a = readings([[3, 5], [1, 1], [2, 0]], [10.0] * 3, variance=[4.0, math.nan, 6.0])
    b = readings([[4, 4], [5, 3], [2, 2]], [8.0] * 3, variance=[1.0, 2.0, 3.0])
    found = compare(a, b, 0)
    assert found["spacing_var_um2"]["value"] == pytest.approx((4 + 6) / 2 - (1 + 2 + 3) / 3)
    first, second = found["class_density"].values()
    # Nuclei per tile over 0.01 mm2.
    assert first["value"] == pytest.approx(((3 + 1 + 2) - (4 + 5 + 2)) / 3 / 0.01)
    assert first["real"] == pytest.approx((4 + 5 + 2) / 3 / 0.01)
    assert second["value"] == pytest.approx(((5 + 1 + 0) - (4 + 3 + 2)) / 3 / 0.01)
    assert first["low"] <= first["value"] <= first["high"]


def test_composition_is_measured_from_the_second_to_the_first():
    many, few = readings([[90, 10]] * 2, [5.0, 5.0]), readings([[50, 50]] * 2, [5.0, 5.0])
    p, q = np.array([0.5, 0.5]), np.array([180.5, 20.5]) / 201
    assert compare(many, few, 0)["composition_kl"]["value"] == pytest.approx(rel_entr(p, q).sum())
    assert compare(few, many, 0)["composition_kl"]["value"] == pytest.approx(rel_entr(q, p).sum())
    assert rel_entr(p, q).sum() > 1.3 * rel_entr(q, p).sum(), "else the test could not tell the two apart"


def test_a_reading_differs_from_itself_by_exactly_nothing():
    same = tissue(40, 0)[0]
    found = compare(same, same, 0)
    for name in ("density_relative", "spacing_um"):
        assert found[name] == {"value": 0.0, "low": 0.0, "high": 0.0}, name
    assert found["composition_kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["density_r"] == pytest.approx(1.0)


def test_planted_differences_are_found_and_told_from_none():
    found = compare(*tissue(400, 1, gain=1.3, shift_um=-0.5), 0)
    assert found["density_relative"]["value"] == pytest.approx(0.3, abs=0.06)
    assert found["density_relative"]["low"] < 0.3 < found["density_relative"]["high"]
    assert found["density_relative"]["low"] > 0
    assert found["spacing_um"]["value"] == pytest.approx(-0.5, abs=0.06)
    assert found["spacing_um"]["low"] < -0.5 < found["spacing_um"]["high"] < 0
    none = compare(*tissue(400, 1), 0)
    for name in ("density_relative", "spacing_um"):
        assert none[name]["low"] < 0 < none[name]["high"], name


def test_the_interval_is_that_of_paired_cells():
    """Tiles differ by 2 um, two readings of one tile by 0.4: unpaired, the interval would be seven times as wide."""
    a, b = tissue(300, 2)
    found = compare(a, b, 0)["spacing_um"]
    difference = a.spacing - b.spacing
    half = 1.96 * difference.std(ddof=1) / np.sqrt(300)
    assert found["low"] == pytest.approx(difference.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(difference.mean() + half, abs=0.1 * half)


def test_the_seed_moves_the_interval_and_not_the_value():
    a, b = tissue(50, 3, gain=1.2)
    first, again, other = compare(a, b, 0), compare(a, b, 0), compare(a, b, 1)
    assert without_nan(first) == without_nan(again)
    assert first["density_relative"]["value"] == other["density_relative"]["value"]
    assert first["density_relative"]["low"] != other["density_relative"]["low"]


def test_by_type_sees_what_cancels_in_the_mean():
    # Ten tiles half as dense, ten that are denser by half, nine of a type too rare to count.
    central = ["thin"] * 10 + ["thick"] * 10 + ["rare"] * 9
    b = readings([[10, 10]] * 29, [6.0] * 29, central)
    a = readings([[5, 5]] * 10 + [[15, 15]] * 10 + [[10, 10]] * 9, [7.0] * 10 + [4.0] * 10 + [6.0] * 9, central)
    found = compare(a, b, 0)
    assert found["density_relative"]["value"] == pytest.approx(0)
    assert found["by_type"]["types"] == 2
    assert found["by_type"]["density_relative"] == pytest.approx(0.5)
    assert found["by_type"]["spacing_um"] == pytest.approx((1 + 2) / 2)
    assert found["by_type"]["composition_kl"] == pytest.approx(0, abs=1e-12)
    assert found["each_type"]["thin"]["density_relative"]["value"] == pytest.approx(-0.5)
    assert found["each_type"]["thick"]["n"] == 10 and "rare" not in found["each_type"]
    ends = found["by_type_interval"]["density_relative"]
    assert ends["low"] <= 0.5 <= ends["high"]
    assert "by_type" not in compare(a.take(np.arange(9)), b.take(np.arange(9)), 0)


def test_the_interval_of_a_divergence_holds_its_value_where_percentiles_would_not():
    """Two readings of equal tissue: resampling adds to a divergence, and its percentiles lie above the value."""
    a, b = tissue(60, 9)
    found = compare(a, b, 0)["composition_kl"]
    assert 0 <= found["low"] <= found["value"] <= found["high"]
    by_type = compare(a, b, 0)
    assert by_type["by_type_interval"]["composition_kl"]["high"] >= by_type["by_type"]["composition_kl"]


def test_pictures_without_nuclei_are_compared_without_a_warning():
    empty = readings([[0, 0]] * 12, [math.nan] * 12)
    found = compare(empty, tissue(12, 4)[1], 0)
    assert found["density_relative"]["value"] == -1
    assert math.isnan(found["spacing_um"]["value"]) and math.isnan(found["density_r"])
    assert math.isfinite(found["composition_kl"]["value"])


@pytest.mark.slow
def test_intervals_of_density_and_spacing_hold_the_truth_in_95_of_100():
    repeats, hits = 200, np.zeros(2)
    for seed in range(repeats):
        found = compare(*tissue(80, seed + 100, gain=1.15, shift_um=0.2), seed)
        for i, (name, truth) in enumerate((("density_relative", 0.15), ("spacing_um", 0.2))):
            hits[i] += found[name]["low"] <= truth <= found[name]["high"]
    # Four binomial standard errors are 0.06.
    np.testing.assert_allclose(hits / repeats, 0.95, atol=0.06)


def test_the_interval_is_as_wide_as_donors_differ():
    """Ten donors, forty cells each: what sets the donors apart is known from ten values, not from four hundred."""
    shift = np.linspace(-1, 1, 10)
    draw = np.random.default_rng(5)
    own, donor = draw.normal(8, 2, 400), np.repeat([f"donor {i}" for i in range(10)], 40)
    b = readings([[30, 10]] * 400, own)
    a = readings([[30, 10]] * 400, own + np.repeat(shift, 40) + draw.normal(0, 0.1, 400))
    by_donor = compare(replace(a, donor=donor), replace(b, donor=donor), 0)["spacing_um"]
    half = student_t(9).ppf(0.975) * shift.std(ddof=1) / np.sqrt(10)
    assert (by_donor["high"] - by_donor["low"]) / 2 == pytest.approx(half, rel=0.1)
    as_one = compare(a, b, 0)["spacing_um"]
    assert as_one["high"] - as_one["low"] < half / 2


def test_the_bootstrap_draws_donors_and_then_their_cells():
    """With one cell of donor b among nine of a, b's cell is drawn in whole blocks: 0, 1 or 2 times, never more."""
    donor = np.array(["a"] * 9 + ["b"])
    seen = set()
    for i in range(200):
        rows = _resampled(stream(i, "test"), donor, 10)
        n_b = int((rows == 9).sum())
        assert len(rows) == 9 * (2 - n_b) + n_b
        seen.add(n_b)
    assert seen == {0, 1, 2}


# --- other cells for the floor ---------------------------------------------------------------------------------------


def test_the_floor_takes_other_cells_of_the_same_type_and_donor_each_once(store: TissueStore):
    pool = np.flatnonzero(store.interior)
    rows = np.sort(stream(0, "some rows").choice(pool, len(pool) // 3, replace=False))
    others = _matched_other(store, rows, pool, 0)
    assert len(set(others)) == len(rows)
    assert not set(others) & set(rows) and set(others) <= set(pool)
    kind, donor = store.cells.cell_type, store.cells.donor
    spare = pd.Series(0, index=pd.MultiIndex.from_product([CELL_TYPES, store.donors]))
    spare = spare.add(pd.Series(1, index=[kind[pool], donor[pool]]).groupby(level=[0, 1]).sum(), fill_value=0)
    spare = spare.sub(pd.Series(1, index=[kind[rows], donor[rows]]).groupby(level=[0, 1]).sum(), fill_value=0)
    wanted = pd.Series(1, index=[kind[rows], donor[rows]]).groupby(level=[0, 1]).sum()
    checked = 0
    for name in np.unique(kind[rows]):
        of_type = kind[rows] == name
        if spare[name].sum() >= of_type.sum():
            assert (kind[others[of_type]] == name).all(), name
            if all(spare[name][d] >= n for d, n in wanted[name].items()):
                np.testing.assert_array_equal(donor[others[of_type]], donor[rows[of_type]], err_msg=name)
                checked += 1
    assert checked >= 3, "the tissue must hold types that are common enough"
    assert (_matched_other(store, rows, pool, 0) == others).all()
    assert (_matched_other(store, rows, pool, 1) != others).any()


def test_a_pool_without_other_cells_is_refused(store: TissueStore):
    pool = np.flatnonzero(store.interior)[:5]
    with pytest.raises(BadInput, match="5 held-out cells for 3 tiles .* lower --tiles"):
        _matched_other(store, pool[:3], pool, 0)


# --- true effects ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("programme", PROGRAMMES)
def test_a_programme_is_pushed_through_all_its_drivers_by_the_sign_of_their_weights(programme: str, direction: str):
    table = pd.read_csv(GENES_CSV)
    drivers = table[(table["role"] == "driver") & (table["programme"] == programme)]
    raised = (drivers["strength"] > 0) == (direction == "up")
    expected = dict(zip(drivers["symbol"], np.where(raised, 4.0, 0.0), strict=True))
    assert driver_programmes(programme, direction) == expected
    assert set(expected.values()) == {0.0, 4.0}, "each programme has drivers of both signs"


def held_out_rows(store: TissueStore, n: int) -> np.ndarray:
    return np.sort(stream(7, "rows").choice(np.flatnonzero(store.interior), n, replace=False))


def test_the_tissue_simulated_again_has_the_nuclei_of_the_store(store: TissueStore):
    rows = held_out_rows(store, 40)
    again = true_readings(store, rows, {}, TILE_UM)
    for row, found in zip(rows, again, strict=True):
        expected = niche_stats(store.nuclei(row), (TILE_UM, TILE_UM), READER_CLASSES).readouts()
        assert found == pytest.approx(expected, nan_ok=True), store.cells.cell_id[row]


@cache
def _nuclei(donor: int, factors: tuple[tuple[str, float], ...]) -> pd.DataFrame:
    return simulate_section(SEED, donor, SIZE_UM, dict(factors)).nuclei


def lymphocytes(store: TissueStore, row: int, factors: dict[str, float]) -> tuple[int, int]:
    """Nuclei and lymphocytes within 32 um to every side of a cell, counted one by one in the simulated section."""
    donor = int(store.cells.donor[row].removeprefix("donor"))
    nuclei = _nuclei(donor, tuple(factors.items()))
    x, y = (math.floor(v / 0.5 + 0.5) * 0.5 for v in store.cells.xy_um[row])
    near = [abs(n.x_um - x) <= 32 and abs(n.y_um - y) <= 32 for n in nuclei.itertuples()]
    kinds = nuclei["cell_type"][near].tolist()
    return len(kinds), sum(kind in ("CD4 T cell", "CD8 T cell", "B cell") for kind in kinds)


def test_a_driver_programme_moves_the_truth_as_counting_says(store: TissueStore):
    rows = held_out_rows(store, 12)
    share = {}
    for direction in ("down", "up"):
        factors = driver_programmes("immune_infiltration", direction)
        found = true_readings(store, rows, factors, TILE_UM)
        for row, one in zip(rows[:4], found, strict=False):
            n, lymphoid = lymphocytes(store, row, factors)
            assert one["density"] == pytest.approx(n / 0.064**2)
            assert one["fraction:Lymphocyte"] == pytest.approx(lymphoid / n)
        share[direction] = np.mean([one["fraction:Lymphocyte"] for one in found])
    base = np.mean([one["fraction:Lymphocyte"] for one in true_readings(store, rows, {}, TILE_UM)])
    assert share["down"] < base < share["up"]


def test_effects_are_changes_of_true_and_of_read_nuclei_under_the_same_noise(model: GE2Hist, store: TissueStore):
    rows, seed = store.rows(["donor006"])[:4], 3
    effects = effects_against_truth(model, store, rows, FAST, seed, TILE_UM)
    assert [(e["programme"], e["direction"]) for e in effects] == [(p, d) for p in PROGRAMMES for d in ("down", "up")]

    def read(factors: dict[str, float]) -> np.ndarray:
        """Share of lymphocytes that the reader finds in the model's pictures, ``[cell]``."""
        cells = store.cells.take(rows)
        counts = cells.counts.toarray()
        for gene, factor in factors.items():
            counts[:, list(cells.genes).index(gene)] *= factor
        latent = model.encode(model.embed(cells.with_counts(counts), seed))
        tables = model.read_nuclei(model.generate(latent, noise_seeds(seed, rows), FAST))
        return np.array([(t["cell_type"] == "Lymphocyte").mean() for t in tables])

    (up,) = (e for e in effects if (e["programme"], e["direction"]) == ("fibrosis", "up"))
    assert up["genes"] == driver_programmes("fibrosis", "up")
    base, edited = (np.array([lymphocytes(store, row, f) for row in rows]) for f in ({}, up["genes"]))
    change = (edited[:, 0] - base[:, 0]).mean() / 0.064**2
    assert up["all"]["density"]["true"] == pytest.approx(change)
    share = edited[:, 1] / edited[:, 0] - base[:, 1] / base[:, 0]
    assert up["all"]["fraction:Lymphocyte"]["true"] == pytest.approx(share.mean())
    model_change = (read(up["genes"]) - read({})).mean()
    assert model_change != 0
    assert up["all"]["fraction:Lymphocyte"]["model"] == pytest.approx(model_change)

    kinds = [niche_stats(store.nuclei(row), (TILE_UM, TILE_UM), READER_CLASSES).readouts() for row in rows]
    spread = {name: np.std([k[name] for k in kinds], ddof=1) / 2 for name in up["all"]}
    for e in effects:
        strength = {k: abs(v["true"]) / spread[k] for k, v in e["all"].items() if spread[k] > 0}
        best = max(strength, key=lambda k: strength[k])
        assert e["main_readout"] == best and e["true_over_standard_error"] == pytest.approx(strength[best])
        clear = [k for k, s in strength.items() if s > 2]
        right = [k for k in clear if e["all"][k]["true"] * e["all"][k]["model"] > 0]
        assert (e["clear_readouts"], e["clear_signs_right"]) == (len(clear), len(right))
        assert e["exceeds_noise"] == (best in clear) and (not clear or e["sign_right"] == (best in right))
    assert any(e["exceeds_noise"] for e in effects)
    assert 0 in spread.values(), "a class that no tile holds: its change must not count as infinitely clear"


def test_every_cell_has_its_own_noise_whatever_cells_are_with_it():
    seeds = noise_seeds(0, np.arange(50))
    assert len(set(seeds)) == 50
    assert noise_seeds(0, np.array([40, 7])) == [seeds[40], seeds[7]]
    assert noise_seeds(1, np.array([7])) != [seeds[7]]


# --- a bundle and a store --------------------------------------------------------------------------------------------


def pooled(tables: list[pd.DataFrame]) -> tuple[float, np.ndarray]:
    """Nuclei per tile and the composition of all tiles together, smoothed by half a nucleus."""
    counts = pd.concat(tables)["cell_type"].value_counts().reindex(READER_CLASSES, fill_value=0).to_numpy() + 0.5
    return len(pd.concat(tables)) / len(tables), counts / counts.sum()


def test_the_figures_are_those_of_the_tiles_read_one_by_one(result: dict[str, Any], model: GE2Hist, store: TissueStore):
    held_out = ["donor003", "donor004", "donor006", "donor007"]
    pool = np.flatnonzero(store.interior & np.isin(store.cells.donor, held_out))
    rows = np.sort(stream(5, "evaluation_cells").choice(pool, 30, replace=False))
    latent = model.encode(model.embed(store.cells.take(rows), 5))
    read = {
        "generated": model.read_nuclei(model.generate(latent, noise_seeds(5, rows), FAST)),
        "real": model.read_nuclei(store.tiles(rows)),
        "true": [store.nuclei(row) for row in rows],
        "floor": model.read_nuclei(store.tiles(_matched_other(store, rows, pool, 5))),
    }
    for key, a, b in (
        ("generated_vs_real", "generated", "real"),
        ("floor_real_vs_real", "floor", "real"),
        ("reader_vs_truth_on_real", "real", "true"),
    ):
        (n_a, share_a), (n_b, share_b) = pooled(read[a]), pooled(read[b])
        assert result[key]["n"] == 30
        assert result[key]["density_relative"]["value"] == pytest.approx(n_a / n_b - 1), key
        assert result[key]["composition_kl"]["value"] == pytest.approx(rel_entr(share_b, share_a).sum()), key
        expected = pearsonr([len(t) for t in read[a]], [len(t) for t in read[b]])[0]
        assert result[key]["density_r"] == pytest.approx(expected), key


def test_exchanging_conditions_changes_the_match_and_leaves_out_the_means_that_it_cannot_change(
    result: dict[str, Any],
):
    generated, ceiling = result["generated_vs_real"], result["ceiling_conditions_exchanged"]
    for name in ("density_relative", "composition_kl", "spacing_um"):
        assert ceiling[name] == {"value": None, "low": None, "high": None}
    assert ceiling["density_r"] != generated["density_r"]


def test_held_out_donors_alone_are_used_and_all_their_cells_classified(
    result: dict[str, Any], model: GE2Hist, store: TissueStore
):
    held_out = ["donor003", "donor004", "donor006", "donor007"]
    assert result["donors"] == held_out
    cells = store.cells.take(np.flatnonzero(np.isin(store.cells.donor, held_out)))
    best = model.classify(model.encode(model.embed(cells, 5))).argmax(axis=1)
    right = np.array([CELL_TYPES[k] == name for k, name in zip(best, cells.cell_type, strict=True)])
    assert 0 < right.mean() < 1, "else the test could not tell types apart"
    assert result["classifier"]["n"] == len(cells)
    assert result["classifier"]["accuracy"] == pytest.approx(right.mean())
    expected = pd.Series(right).groupby(cells.cell_type).mean().to_dict()
    assert result["classifier"]["recall"] == pytest.approx(expected)
    assert result["bundle_sha256"] == model.sha256 and result["store"] == store.identity


def test_the_same_seed_gives_the_same_figures_and_another_others(
    result: dict[str, Any], model: GE2Hist, store: TissueStore
):
    assert without_nan(evaluate(model, store, **FEW)) == without_nan(result)
    other = evaluate(model, store, **(FEW | {"seed": 1}))
    for key in ("generated_vs_real", "floor_real_vs_real", "reader_vs_truth_on_real"):
        assert other[key]["density_relative"]["value"] != result[key]["density_relative"]["value"], key


@pytest.mark.slow  # a thousand steps, on the smallest network too
def test_few_tiles_are_drawn_again_with_all_steps(result: dict[str, Any], model: GE2Hist, store: TissueStore):
    slow = evaluate(model, store, **few_of(reference_tiles=4))
    steps = slow.pop("steps")
    assert without_nan(slow | {"counts": None}) == without_nan(result | {"counts": None}), (
        "the reference leaves the other figures alone"
    )
    assert list(steps) == ["dpm++ 2 vs real", "ddpm 1000 vs real", "dpm++ 2 vs ddpm 1000"]
    assert [c["n"] for c in steps.values()] == [4, 4, 4]
    short, many, _ = steps.values()
    assert short["density_relative"]["value"] != many["density_relative"]["value"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": 1000}, r"--tiles is 1000, the held-out donors have (\d+) whole tiles .* at most"),
        ({"tiles": 1}, "--tiles is 1: give at least 2"),
        ({"tiles": -3}, "--tiles is -3: give at least 2"),
        ({"tiles": 10, "reference_tiles": 32}, "--reference-tiles is 32: give 0, or 2 to 10, which is --tiles"),
        ({"tiles": 10, "reference_tiles": 1}, "--reference-tiles is 1: give 0, or 2 to 10"),
        ({"tiles": 10, "edit_cells": 48}, "--edit-cells is 48: give 0, or 2 to 10, which is --tiles"),
    ],
)
def test_numbers_of_tiles_that_cannot_be_are_named_with_what_can(
    options: dict[str, int], message: str, model: GE2Hist, store: TissueStore
):
    with pytest.raises(BadInput, match=message):
        evaluate(model, store, **few_of(**options))


def test_the_number_said_to_be_possible_is_the_largest_possible(model: GE2Hist, store: TissueStore):
    with pytest.raises(BadInput, match="at most") as error:
        evaluate(model, store, **few_of(tiles=1000))
    most = int(str(error.value).split("at most ")[1].split()[0])
    assert evaluate(model, store, **few_of(tiles=most))["floor_real_vs_real"]["n"] == most
    with pytest.raises(BadInput, match="at most"):
        evaluate(model, store, **few_of(tiles=most + 1))


def test_a_bundle_that_has_learned_from_every_donor_is_not_judged(model: GE2Hist, store: TissueStore):
    report = dict(model.report) | {"donors": {"train": store.donors, "validation": [], "test": []}}
    with pytest.raises(BadInput, match="have 0 whole tiles .* simulate more donors"):
        evaluate(replace(model, report=report), store, **FEW)


def test_a_bundle_without_a_reader_is_sent_away_before_anything_is_drawn(
    model: GE2Hist, store: TissueStore, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(BadInput, match="train-reader"):
        evaluate(replace(model, reader=None), store, **FEW)
    assert capsys.readouterr().err == ""


def test_a_store_of_another_resolution_is_refused(scgpt_folder: Path, store: TissueStore):
    fine = GE2Hist.untrained(replace(MODEL, um_per_px=0.25), scgpt_folder)
    with pytest.raises(BadInput, match="has 0.5 um per px, the bundle 0.25: give a store of the bundle's resolution"):
        evaluate(fine, store, **FEW)


# --- the command -----------------------------------------------------------------------------------------------------


def run(*words: object) -> int:
    return run_command("ge2hist", "", COMMANDS, ["evaluate", *map(str, words)])


def test_the_command_writes_what_evaluate_returns_and_prints_it(
    bundle: Path, data: Path, result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "evaluation.json").write_text("of yesterday")
    with (tmp_path / "evaluation.json").open() as reader:
        options = ["--tiles", 30, "--reference-tiles", 0, "--edit-cells", 3, "--steps", 2, "--seed", 5]
        options += ["--type-pictures", 0, "--training-cells", 0]
        assert run(bundle, data, "--out", tmp_path, *options) == 0
        assert reader.read() == "of yesterday", "a reader of the old file is not met by half of the new one"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".work", "evaluation.html", "evaluation.json", "evaluation.md"]
    written = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    effects = written.pop("driver_programmes")
    assert written.pop("counts")["edit_cells"] == 3
    asked = dict(result)
    del asked["counts"]
    assert written == without_nan(asked), "edits leave the other figures alone"
    assert effects["n_cells"] == 3 and len(effects["edits"]) == 2 * len(PROGRAMMES)
    clear = [e for e in effects["edits"] if e["exceeds_noise"]]
    assert effects["edits_exceeding_noise"] == len(clear)
    assert effects["signs_right"] == sum(e["sign_right"] for e in clear)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"classifier accuracy {written['classifier']['accuracy']:.4f} (n = ")
    c = written["generated_vs_real"]
    assert printed[1].startswith(f"generated_vs_real: n = 30: density {100 * c['density_relative']['value']:+.1f}% [")
    assert f"spacing {c['spacing_um']['value']:+.2f} um, r {c['density_r']:.2f}" in printed[1]
    assert printed[-1] == f"driver programmes: sign right for {effects['signs_right']} of {len(clear)}"


def test_pictures_without_nuclei_end_in_a_file_with_empty_figures(
    model: GE2Hist, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """After few steps of training the reader may find nothing; the figures that are left must not be lost."""
    reader = replace(model.reader, threshold=0.999)
    replace(model, reader=reader).save(tmp_path / "blind")
    options = ["--tiles", 10, "--reference-tiles", 0, "--edit-cells", 2, "--type-pictures", 2, "--steps", 1]
    assert run(tmp_path / "blind", data, "--out", tmp_path, *options, "--training-cells", 0) == 0
    written = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert written["reader_vs_truth_on_real"]["density_relative"]["value"] == -1
    assert written["generated_vs_real"]["spacing_um"] == {"value": None, "low": None, "high": None}
    assert written["driver_programmes"]["edits"][0]["all"]["fraction:Fibroblast"]["model"] is None
    assert "generated_vs_real: n = 10: density" in capsys.readouterr().out


def test_a_bad_bundle_is_explained_and_leaves_the_old_figures(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "evaluation.json").write_text("{}")
    assert run(tmp_path, data, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "is not a GE2Hist bundle" in error and error.count("\n") == 1
    assert (tmp_path / "evaluation.json").read_text() == "{}"


def test_a_store_that_is_none_is_explained(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(bundle, tmp_path / "nowhere.zarr", "--out", tmp_path) == 2
    assert "nowhere.zarr is not a folder: give the store that `simulate` or `prepare` wrote" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_settings_of_the_sampler_that_cannot_be_are_explained(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(bundle, data, "--out", tmp_path, "--steps", 0) == 2
    assert "steps is 0: choose a whole number from 1 to 1000" in capsys.readouterr().err


# --- the contest, from rivals' folders to the three files -------------------------------------------------------------

RIVAL_CONFIGS = {
    "transgan": TransGANConfig(
        latent_dim=8, width=64, depth=(1, 1, 1, 1), critic_width=32, critic_depth=(1, 1, 1), batch_size=2
    ),
    "rna-gan": RNAGANConfig(channels=4, batch_size=2, vae_hidden=(8, 4), vae_steps=1, vae_batch=4),
}
SMALL = [
    *("--tiles", "12", "--reference-tiles", "0", "--edit-cells", "0", "--type-pictures", "3"),
    *("--training-cells", "15", "--steps", "1", "--seed", "5"),
]


def train_rival(store: TissueStore, name: str, donors: list[str], out: Path) -> Path:
    rows, config = store.rows(donors), RIVAL_CONFIGS[name]
    for _ in rival_class(name).train(store, rows, Budget(steps=2), 1, out, config=config):
        pass
    return out


@pytest.fixture(scope="module")
def rival_folders(store: TissueStore, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("rivals")
    return [train_rival(store, name, ["donor002"], folder / name) for name in RIVAL_CONFIGS]


@pytest.fixture(scope="module")
def contest(bundle: Path, data: Path, rival_folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole evaluation with two rivals."""
    out = tmp_path_factory.mktemp("contest")
    assert run(bundle, data, "--out", out, *SMALL, "--rivals", *rival_folders) == 0
    return out


def load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


METHODS = ["ge2hist", "transgan", "rna-gan", "nearest-tile", "shuffled"]


def test_every_method_stands_in_every_table_with_n_and_floor(contest: Path):
    found = load(contest)
    assert list(found["methods"]) == METHODS
    assert [m["kind"] for m in found["methods"].values()] == ["model", "rival", "rival", "control", "control"]
    figures = found["table_1"]["figures"]
    assert list(figures) == [
        "KID (reader features)", "KID (stain-texture features)", "LPIPS-type distance (reader features)",
    ]  # fmt: skip
    for name, by_method in figures.items():
        assert list(by_method) == ["floor", *METHODS], name
        assert {f.get("n", f.get("n_generated")) for f in by_method.values()} == {12}
    assert list(found["figure_3"]["methods"]) == METHODS
    assert list(found["read_back"]["methods"]) == ["real", "floor", *METHODS]
    assert found["read_back"]["methods"]["real"]["share_of_real"]["value"] in (1.0, None)
    verdicts = found["table_1"]["verdicts"] + found["figure_3"]["verdicts"]
    assert len(verdicts) >= 3 + 4
    assert all({line["rival"] for line in v["against"]} <= {"transgan", "rna-gan"} for v in verdicts)
    assert found["figure_3"]["methods"]["ge2hist"] == found["generated_vs_real"]
    assert found["methods"]["rna-gan"]["training"]["steps"] == 2 and found["methods"]["rna-gan"]["training"]["macs"] > 0


def test_figures_of_a_rival_are_those_of_its_own_pictures(
    contest: Path, rival_folders: list[Path], model: GE2Hist, store: TissueStore
):
    pool = np.flatnonzero(store.interior & np.isin(store.cells.donor, load(contest)["donors"]))
    rows = np.sort(stream(5, "evaluation_cells").choice(pool, 12, replace=False))
    rival = load_rival(rival_folders[1])
    images = rival.generate(store.cells.take(rows), noise_seeds(5, rows))
    read, real = model.read_nuclei(images), model.read_nuclei(store.tiles(rows))
    (n_a, share_a), (n_b, share_b) = pooled(read), pooled(real)
    found = load(contest)["figure_3"]["methods"]["rna-gan"]
    assert found["density_relative"]["value"] == pytest.approx(n_a / n_b - 1)
    assert found["composition_kl"]["value"] == pytest.approx(rel_entr(share_b, share_a).sum())
    distance = ReaderFeatures(model.reader, 0.5).distance(images, store.tiles(rows)).mean()
    written = load(contest)["table_1"]["figures"]["LPIPS-type distance (reader features)"]["rna-gan"]
    assert written["value"] == pytest.approx(distance)


def test_another_bundle_among_the_rivals_is_a_control_that_draws_as_it_would(
    bundle: Path, model: GE2Hist, store: TissueStore
):
    donors = sorted(set(store.donors) - model.has_learned_from(store))
    rows = store.rows(donors)[:3]
    cells, seeds, sample = store.cells.take(rows), [3, 4, 5], SampleConfig(steps=1)
    (found,) = rivals([bundle], store, cells, seeds, model.config.tile_px, sample, ["asked", 5])
    assert (found.kind, found.title) == ("control", f"GE2Hist ({bundle.name})")
    expected = model.generate(model.encode(model.embed(cells, 5)), seeds, sample)
    np.testing.assert_array_equal(found.draw(np.arange(3)), expected)
    assert found.facts["training"] == trained(model)
    seen = store.cells.take(store.rows(sorted(model.has_learned_from(store)))[:1])
    with pytest.raises(BadInput, match="has learned from donor"):
        rivals([bundle], store, seen, [3], model.config.tile_px, sample, ["asked", 5])


def test_a_drawn_type_is_looked_for_in_the_middle_with_its_environment_kept(
    contest: Path, model: GE2Hist, store: TissueStore
):
    found = load(contest)["central_types"]
    pool = np.flatnonzero(store.interior & np.isin(store.cells.donor, load(contest)["donors"]))
    rows = np.sort(stream(5, "evaluation_cells").choice(pool, 12, replace=False))
    rows = rows[np.sort(stream(5, "evaluation_environments").choice(12, 3, replace=False))]
    z_e = model.encode(model.embed(store.cells.take(rows), 5)).z_e
    sample = SampleConfig(steps=1)
    seen = {}
    for kind in CELL_TYPES:
        images = model.generate(Latent(model.sample_type(kind, 3, 5), z_e), noise_seeds(5, rows), sample)
        seen[kind] = [central_class(table, TILE_UM) for table in model.read_nuclei(images)]
    for kind in ("Fibroblast", "B cell"):
        name = "Lymphocyte" if kind == "B cell" else kind
        share = np.mean([c == name for c in seen[kind]])
        lymphoid = ("CD4 T cell", "CD8 T cell", "B cell")
        others = [k for k in CELL_TYPES if k != kind and not (kind in lymphoid and k in lymphoid)]
        chance = np.mean([c == name for k in others for c in seen[k]])
        row = found["types"][kind]
        assert (row["class"], row["n"]) == (name, 3)
        assert row["share"]["value"] == pytest.approx(share) and row["chance"] == pytest.approx(chance)
        assert row["raised"]["value"] == pytest.approx(share - chance)


def test_a_second_run_draws_only_what_is_missing_and_tells_the_same(
    contest: Path, bundle: Path, data: Path, rival_folders: list[Path], capsys: pytest.CaptureFixture[str]
):
    before, work = load(contest), contest / ".work" / "evaluation"
    files = {path: path.stat().st_mtime_ns for path in work.rglob("*.npy")}
    blocks = [path for path in files if path.parent != work]
    assert len(blocks) >= len(METHODS) + len(CELL_TYPES)
    gone = max(blocks, key=lambda path: path.stat().st_size)
    gone.unlink()
    assert run(bundle, data, "--out", contest, *SMALL, "--rivals", *rival_folders) == 0
    assert load(contest) == before
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.npy") if path != gone} == {
        path: time for path, time in files.items() if path != gone
    }
    assert gone.is_file()
    assert capsys.readouterr().err.startswith("expected: about ")


def test_the_cost_is_said_first_and_names_every_method_that_is_drawn(
    bundle: Path, data: Path, rival_folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--tiles", 2, "--reference-tiles", 0, "--edit-cells", 0, "--type-pictures", 0, "--training-cells", 0]
    assert run(bundle, data, "--out", tmp_path, *options, "--steps", 1, "--rivals", rival_folders[0]) == 0
    first = capsys.readouterr().err.splitlines()[:3]
    assert first[0].startswith("expected: about ") and first[1].startswith("  4 pictures of GE2Hist: ")
    assert first[2].startswith("  2 pictures of TransGAN: ")
    assert list(load(tmp_path)["methods"]) == ["ge2hist", "transgan", "shuffled"], "nothing to retrieve from"


def test_markdown_and_html_tell_every_section(contest: Path):
    text = (contest / "evaluation.md").read_text(encoding="utf-8")
    page = (contest / "evaluation.html").read_text(encoding="utf-8")
    for title in ("Who wins", "Table 1", "Figure 3", "Classifier on z_c", "Figure 4", "Read-back"):
        assert f"## {title}" in text and f"<h2>{title}" in page, title
    assert "nan" not in re.sub(r"[A-Za-z]*nan[A-Za-z]+|[A-Za-z]+nan", "", text)
    for verdict in load(contest)["table_1"]["verdicts"]:
        assert verdict["sentence"] in text


def test_a_rival_that_knows_the_held_out_donors_is_refused(
    bundle: Path, data: Path, store: TissueStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cheat = train_rival(store, "rna-gan", ["donor002", "donor006"], tmp_path / "cheat")
    assert run(bundle, data, "--out", tmp_path / "out", *SMALL, "--rivals", cheat) == 2
    assert "has learned from donor 'donor006', on which it would be judged" in capsys.readouterr().err
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_folder_without_a_rival_and_one_given_twice_are_explained(
    bundle: Path, data: Path, rival_folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(bundle, data, "--out", tmp_path, *SMALL, "--rivals", tmp_path) == 2
    assert "holds no rival (no rival.json): give the folder that `train-rival` wrote" in capsys.readouterr().err
    assert run(bundle, data, "--out", tmp_path, *SMALL, "--rivals", *rival_folders[:1] * 3) == 2
    assert "twice: give each folder once" in capsys.readouterr().err


def test_a_wrong_weight_file_is_explained(bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "w.pth").write_bytes(b"not weights")
    assert run(bundle, data, "--out", tmp_path, *SMALL, "--inception", tmp_path / "w.pth") == 2
    assert "w.pth cannot be read as weights" in capsys.readouterr().err


def test_quick_means_few_and_what_is_given_stands(bundle: Path, data: Path, tmp_path: Path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    base = [str(bundle), str(data), "--out", str(tmp_path)]
    assert counts_of(parser.parse_args(base)) == Counts()
    assert counts_of(parser.parse_args([*base, "--quick"])) == QUICK
    assert counts_of(parser.parse_args([*base, "--quick", "--tiles", "40"])) == replace(QUICK, tiles=40)
    assert counts_of(parser.parse_args([*base, "--tiles", "10"])) == replace(
        Counts(), tiles=10, reference_tiles=10, edit_cells=10, type_pictures=10
    )
