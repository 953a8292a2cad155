"""True effects: the simulator's own answer, counted as the readers count, simulated once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ge2hist_core.config import READER_CLASSES, VISIBLE_CLASS
from ge2hist_core.niche import niche_stats
from ge2hist_core.simulator.tissue import simulate_section
from ge2hist_core.store import TissueStore, write_store
from ge2hist_core.types import BadInput
from perturb import true_effects
from perturb.known_truth import programme_factors
from perturb.true_effects import READOUTS, TrueTissue, truth_folder

SEED, DONORS, SIZE_UM, TILE_UM = 14, (2, 3), 128.0, 64.0
EDIT = programme_factors("immune_infiltration", 4.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TissueStore:
    from ge2hist_core.simulator.command import simulate_sections
    from ge2hist_core.simulator.expression import load_genes

    path = tmp_path_factory.mktemp("data") / "tissue.zarr"
    simulation = {"seed": SEED, "donors": list(DONORS), "size_um": SIZE_UM}
    write_store(path, simulate_sections(SEED, DONORS, SIZE_UM), list(load_genes().symbols), simulation=simulation)
    return TissueStore(path)


def tile_by_tile(store: TissueStore, rows: np.ndarray, factors: dict[str, float]) -> np.ndarray:
    """The slow way: one section and one tile at a time, through the statistics that judge pictures."""
    out = []
    for row in rows:
        number = int(store.cells.donor[row].removeprefix("donor"))
        nuclei = simulate_section(SEED, number, SIZE_UM, factors).nuclei
        corner = np.floor(store.cells.xy_um[row] / store.um_per_px + 0.5) * store.um_per_px - TILE_UM / 2
        moved = nuclei.assign(
            x_um=nuclei["x_um"] - corner[0],
            y_um=nuclei["y_um"] - corner[1],
            cell_type=nuclei["cell_type"].map(VISIBLE_CLASS),
        )
        readouts = niche_stats(moved, (TILE_UM, TILE_UM), READER_CLASSES).readouts()
        out.append([readouts[name] for name in READOUTS])
    return np.nan_to_num(np.array(out)).T


def test_readings_are_those_of_each_tile_counted_alone(store: TissueStore) -> None:
    rows = np.flatnonzero(store.interior)[::7]
    truth = TrueTissue(store, TILE_UM)
    assert set(store.cells.donor[rows]) == set(store.donors)
    for factors in ({}, EDIT):
        np.testing.assert_allclose(truth.readings(rows, factors), tile_by_tile(store, rows, factors), rtol=1e-6)
    effect = truth.readings(rows, EDIT) - truth.readings(rows, {})
    assert effect[READOUTS.index("fraction:Lymphocyte")].mean() > 0.02


def test_rows_may_come_in_any_order_and_reporters_change_nothing(store: TissueStore) -> None:
    rows, truth = np.flatnonzero(store.interior), TrueTissue(store, TILE_UM)
    turned = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_array_equal(truth.readings(rows[turned], EDIT), truth.readings(rows, EDIT)[:, turned])
    np.testing.assert_array_equal(truth.readings(rows, {"GAPDH": 0.0, "CD8A": 4.0}), truth.readings(rows, {}))


def test_what_was_simulated_is_not_simulated_again(
    store: TissueStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.flatnonzero(store.interior)
    first = TrueTissue(store, TILE_UM, tmp_path)
    assert len(first.missing([{}, EDIT, EDIT], store.donors)) == 4
    expected = first.readings(rows, EDIT)
    assert len(first.missing([{}, EDIT], store.donors)) == 2
    monkeypatch.setattr(true_effects, "_count", None)  # would fail if it were called
    again = TrueTissue(store, TILE_UM, tmp_path)
    np.testing.assert_array_equal(again.readings(rows, EDIT), expected)
    monkeypatch.undo()
    damaged = next(tmp_path.rglob("*.npz"))
    damaged.write_bytes(b"PK")
    np.testing.assert_array_equal(TrueTissue(store, TILE_UM, tmp_path).readings(rows, EDIT), expected)


def test_two_processes_count_what_one_counts(store: TissueStore, tmp_path: Path) -> None:
    rows, done = np.flatnonzero(store.interior), []
    alone, together = TrueTissue(store, TILE_UM), TrueTissue(store, TILE_UM, tmp_path)
    together.prepare([EDIT], store.donors, workers=2, on_section=lambda: done.append(1))
    assert len(done) == 2 and not together.missing([EDIT], store.donors)
    np.testing.assert_array_equal(together.readings(rows, EDIT), alone.readings(rows, EDIT))


def test_tissue_that_this_simulator_did_not_make_is_refused(store: TissueStore) -> None:
    other = TissueStore(store.path)
    other.simulation = None
    with pytest.raises(BadInput, match="no simulated tissue"):
        TrueTissue(other, TILE_UM)
    other.simulation = store.simulation | {"seed": SEED + 1}
    with pytest.raises(BadInput, match="simulate the store with this version"):
        TrueTissue(other, TILE_UM).readings(np.flatnonzero(store.interior)[:2], {})
    with pytest.raises(BadInput, match="leaves its section"):
        TrueTissue(store, TILE_UM).readings(np.flatnonzero(~store.interior)[:1], {})


def test_the_readings_lie_beside_the_store() -> None:
    assert truth_folder(Path("a/tissue.zarr")) == Path("a/tissue.truth")


def test_readings_of_another_version_of_the_tissue_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from perturb import true_effects

    tissue = object.__new__(true_effects.TrueTissue)
    tissue.folder, tissue.tile_um = Path("kept"), 64.0
    now = tissue._path("donor001", (("VEGFA", 2.0),))
    assert now == tissue._path("donor001", (("VEGFA", 2.0),)) != tissue._path("donor001", (("VEGFA", 3.0),))
    monkeypatch.setattr(true_effects, "_TISSUE_FILES", ("programmes.py", "tissue.py"))
    true_effects._tissue_version.cache_clear()
    try:
        assert tissue._path("donor001", (("VEGFA", 2.0),)) != now
    finally:
        true_effects._tissue_version.cache_clear()
