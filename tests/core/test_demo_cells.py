"""Example cells: of unseen donors only, balanced over types, with their truth, and read back as a user's file is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.manifold import trustworthiness

from ge2hist_core.__main__ import COMMANDS, run_command
from ge2hist_core.config import CELL_TYPES, READER_CLASSES, VISIBLE_CLASS, ModelConfig
from ge2hist_core.data import H5adSource, open_h5ad
from ge2hist_core.demo_cells import _balanced, _embedded, _umap
from ge2hist_core.model import GE2Hist
from ge2hist_core.rng import stream
from ge2hist_core.simulator.programmes import PROGRAMMES
from ge2hist_core.simulator.tissue import Section, simulate_section
from ge2hist_core.store import TissueStore, write_store
from tests import oracles

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "demo_cells.h5ad"
SEED, DONORS, SIZE_UM = 14, range(2, 8), 128.0
HELD_OUT = ["donor003", "donor004", "donor006", "donor007"]
MODEL = ModelConfig(
    embedding_dim=16, d_c=3, d_e=2, vae_hidden=8, ae_channels=(8, 8), latent_channels=2, unet_channels=(8,),
    condition_tokens=2, condition_dim=8, attention_heads=2, time_embedding_dim=16,
)  # fmt: skip
N = 50


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


def save_bundle(folder: Path, scgpt_folder: Path, store: TissueStore, train: list[str], validation: list[str]) -> Path:
    model = GE2Hist.untrained(MODEL, scgpt_folder)
    donors = {"train": train, "validation": validation, "test": []}
    model.report = {"store": store.identity, "simulation": store.simulation, "donors": donors}
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(store: TissueStore, scgpt_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, said to be trained on donor 2 and validated on donor 5."""
    return save_bundle(tmp_path_factory.mktemp("bundle"), scgpt_folder, store, ["donor002"], ["donor005"])


def run(data: Path, bundle: Path, out: Path, *words: object) -> int:
    words = ("demo-cells", data, "--bundle", bundle, "--out", out, *words)
    return run_command("ge2hist", "", COMMANDS, [str(word) for word in words])


@pytest.fixture(scope="module")
def written(data: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("out") / "cells.h5ad"
    assert run(data, bundle, path, "--cells", N) == 0
    return path


@pytest.fixture(scope="module")
def rows(written: Path, store: TissueStore) -> np.ndarray:
    """Rows of the store that the file's cells are."""
    with open_h5ad(written) as source:
        return pd.Index(store.cells.cell_id).get_indexer(source.cell_id)


# --- which cells -----------------------------------------------------------------------------------------------------


def test_cells_come_from_whole_niches_of_donors_that_the_bundle_has_not_seen(rows: np.ndarray, store: TissueStore):
    assert len(rows) == len(set(rows)) == N and (rows >= 0).all()
    assert set(store.cells.donor[rows]) == set(HELD_OUT)
    xy = store.cells.xy_um[rows]
    # A tile of 64 um, its centre moved to the nearest of pixels of 0.5 um.
    assert (xy >= 32 - 0.25).all() and (xy <= SIZE_UM - 32 + 0.25).all()


def test_every_type_is_there_and_none_is_given_up_for_a_commoner_one(rows: np.ndarray, store: TissueStore):
    taken = pd.Series(store.cells.cell_type[rows]).value_counts()
    pool = store.rows(HELD_OUT)
    there = pd.Series(store.cells.cell_type[pool]).value_counts()
    assert set(taken.index) == set(CELL_TYPES)
    for name in CELL_TYPES:
        assert taken[name] == there[name] or taken[name] >= taken.max() - 1, name
    assert taken.max() < there.max(), "else there was nothing to balance"


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(0, 60), st.integers(0, 3))
def test_as_many_of_each_type_as_there_are_and_none_twice(sizes: list[int], n: int, seed: int):
    """Against filling up one cell at a time, the type with fewest cells so far first."""
    kinds = np.repeat([f"type {i}" for i in range(len(sizes))], sizes).astype(object)
    everything = np.arange(len(kinds))
    pool = everything[everything % 4 != 0]
    chosen = _balanced(kinds, pool, n, seed)
    assert set(chosen) <= set(pool) and len(set(chosen)) == len(chosen) == min(n, len(pool))
    left = [int((kinds[pool] == name).sum()) for name in np.unique(kinds)]
    filled = [0] * len(left)
    for _ in range(min(n, len(pool))):
        open_types = [i for i in range(len(left)) if filled[i] < left[i]]
        filled[min(open_types, key=lambda i: filled[i])] += 1
    found = [int((kinds[chosen] == name).sum()) for name in np.unique(kinds)]
    # Which of equally rare types gets the last cell is left to chance.
    assert sorted(found) == sorted(filled)


def test_within_a_type_cells_are_drawn_and_not_taken_from_the_top():
    kinds, pool = np.repeat("one", 400).astype(object), np.arange(400)
    counts = sum((np.isin(pool, _balanced(kinds, pool, 100, seed)).astype(int) for seed in range(200)), np.zeros(400))
    # Binomial(200, 1/4): 50 +- 6.1; the largest of 400 deviations stays within 4.5 standard errors.
    assert abs(counts - 50).max() < 4.5 * math.sqrt(200 / 4 * 3 / 4)


# --- what is known of them -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sections() -> dict[str, Section]:
    return {f"donor{d:03d}": simulate_section(SEED, d, SIZE_UM) for d in DONORS}


def test_counts_genes_and_positions_are_those_of_the_store(written: Path, rows: np.ndarray, store: TissueStore):
    with open_h5ad(written) as source:
        cells = source.take(np.arange(N))
    expected = store.cells.take(rows)
    assert (cells.counts != expected.counts).nnz == 0 and cells.counts.nnz > 0
    for name in ("genes", "cell_id", "cell_type", "donor", "xy_um"):
        np.testing.assert_array_equal(getattr(cells, name), getattr(expected, name), err_msg=name)


def test_the_true_niche_is_that_of_the_simulated_section(
    written: Path, rows: np.ndarray, store: TissueStore, sections: dict[str, Section]
):
    with open_h5ad(written) as source:
        obs = source.obs
    for i, row in enumerate(rows[::5]):
        found = obs.iloc[5 * i]
        nuclei = sections[store.cells.donor[row]].nuclei
        x, y = (math.floor(v / 0.5 + 0.5) * 0.5 - 32 for v in store.cells.xy_um[row])
        inside = [0 <= n.x_um - x < 64 and 0 <= n.y_um - y < 64 for n in nuclei.itertuples()]
        near = nuclei[inside]
        points = [(n.x_um - x, n.y_um - y) for n in near.itertuples()]
        kinds = [VISIBLE_CLASS[name] for name in near["cell_type"]]
        assert found["niche_density"] == pytest.approx(len(points) / 0.064**2)
        spacing, variance = oracles.hanisch(points, (64.0, 64.0))
        assert found["niche_spacing"] == pytest.approx(spacing, nan_ok=True)
        assert found["niche_spacing_var"] == pytest.approx(variance, nan_ok=True)
        for name in READER_CLASSES:
            assert found[f"niche_fraction:{name}"] == pytest.approx(kinds.count(name) / len(kinds)), name
            assert found[f"niche_density:{name}"] == pytest.approx(kinds.count(name) / 0.064**2), name


def test_the_programmes_are_those_at_the_cells_place(
    written: Path, rows: np.ndarray, store: TissueStore, sections: dict[str, Section]
):
    with open_h5ad(written) as source:
        obs = source.obs
    for name in PROGRAMMES:
        for donor in HELD_OUT:
            mine = store.cells.donor[rows] == donor
            field = sections[donor].at(name, store.cells.xy_um[rows[mine]].astype(float))
            np.testing.assert_allclose(obs[f"programme_{name}"].to_numpy()[mine], field, atol=1e-4, err_msg=name)


# --- the file --------------------------------------------------------------------------------------------------------


def everything_is_recognised(source: H5adSource) -> None:
    found = source.preview
    assert (found.matrix, found.scale, found.n_empty, found.warnings) == ("X", "counts", 0, ())
    assert (found.type_column, found.donor_column) == ("cell_type", "donor")
    assert found.position_unit == "um" and "X_umap" in found.umap
    truth = ["niche_density", "niche_spacing", *(f"niche_fraction:{name}" for name in READER_CLASSES)]
    truth += [f"programme_{name}" for name in PROGRAMMES]
    assert set(truth) <= set(source.obs.columns)
    assert np.isfinite(source.obs[["niche_density", *truth[2:]]].to_numpy()).all()


def test_the_file_is_recognised_without_a_question_or_a_warning(written: Path):
    with open_h5ad(written) as source:
        everything_is_recognised(source)
        assert source.preview.n_cells == N


def test_the_shipped_cells_are_recognised_hold_all_types_and_stay_small():
    with open_h5ad(SHIPPED) as source:
        everything_is_recognised(source)
        assert set(source.cell_type) == set(CELL_TYPES)
        assert source.preview.n_cells <= 1000
    assert SHIPPED.stat().st_size < 2_000_000, "it comes with every clone"


def test_the_map_keeps_neighbours_together(written: Path, rows: np.ndarray, bundle: Path, store: TissueStore):
    embedding = GE2Hist.load(bundle).embed(store.cells.take(rows), 0)
    with open_h5ad(written) as source:
        umap = source.umap
    assert trustworthiness(embedding, umap, n_neighbors=7) > 0.8
    shuffled = stream(0, "shuffle").permutation(umap)
    assert trustworthiness(embedding, shuffled, n_neighbors=7) < 0.65, "the measure must be able to fail"


def test_a_map_of_the_least_number_of_cells_can_be_drawn():
    x = stream(0, "embedding").standard_normal((4, 16)).astype(np.float32)
    assert len(np.unique(_umap(x, 0), axis=0)) == 4


def test_the_map_does_not_depend_on_threads_or_on_where_its_input_lies(store: TissueStore, bundle: Path):
    """A sum in another order changed a last bit of an embedding or a distance, and the map's places by its width."""
    from threadpoolctl import threadpool_limits

    model, cells = GE2Hist.load(bundle), store.cells.take(store.rows(HELD_OUT)[:N])
    maps, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            with threadpool_limits(n):
                embedding = _embedded(model, cells, 0)
                moved = np.empty(embedding.size + n, np.float32)[n:].reshape(embedding.shape)
                moved[:] = embedding
                maps.append((embedding, _umap(moved, 0)))
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(maps[0][0], maps[1][0])
    np.testing.assert_array_equal(maps[0][1], maps[1][1])
    np.testing.assert_allclose(maps[0][0], model.embed(cells, 0), atol=1e-6)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_bytes_and_another_other_cells(
    written: Path, data: Path, bundle: Path, tmp_path: Path
):
    assert run(data, bundle, tmp_path / "again.h5ad", "--cells", N) == 0
    assert (tmp_path / "again.h5ad").read_bytes() == written.read_bytes()
    assert run(data, bundle, tmp_path / "other.h5ad", "--cells", N, "--seed", 1) == 0
    with open_h5ad(written) as one, open_h5ad(tmp_path / "other.h5ad") as other:
        assert set(one.cell_id) != set(other.cell_id)


def test_the_command_says_how_many_cells_of_how_many_donors(
    data: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(data, bundle, tmp_path / "few.h5ad", "--cells", 4) == 0
    with open_h5ad(tmp_path / "few.h5ad") as source:
        donors, types = len(set(source.donor)), len(set(source.cell_type))
    assert types == 4, "four cells are of four types"
    assert capsys.readouterr().out.strip().endswith(f"4 cells of {donors} held-out donors in {tmp_path / 'few.h5ad'}")
    assert [path.name for path in tmp_path.iterdir()] == ["few.h5ad"]


@pytest.mark.parametrize("cells", [-1, 0, 3, 10_000])
def test_a_number_of_cells_that_cannot_be_is_refused_and_the_old_file_stays(
    cells: int, data: Path, bundle: Path, store: TissueStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "cells.h5ad").write_text("old")
    assert run(data, bundle, tmp_path / "cells.h5ad", "--cells", cells) == 2
    error = capsys.readouterr().err
    there = int((np.isin(store.cells.donor, HELD_OUT) & store.interior).sum())
    assert f"--cells is {cells}: the held-out donors have {there} cells with a whole niche" in error
    assert "at least 4" in error
    assert (tmp_path / "cells.h5ad").read_text() == "old"


def test_a_bundle_that_knows_every_donor_has_no_unseen_cells(
    data: Path, store: TissueStore, scgpt_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    everyone = save_bundle(tmp_path / "b", scgpt_folder, store, store.donors[:3], store.donors[3:])
    assert run(data, everyone, tmp_path / "cells.h5ad", "--cells", 10) == 2
    assert "the held-out donors have 0 cells" in capsys.readouterr().err
    assert not (tmp_path / "cells.h5ad").exists()


def test_a_bad_bundle_is_explained(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(data, tmp_path, tmp_path / "cells.h5ad") == 2
    assert "is not a GE2Hist bundle" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
