"""Cells and pictures of a store, read in place: equal to what ``TissueStore`` reads whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from ge2hist_core import data, rng
from ge2hist_core.data import open_cells, open_store
from ge2hist_core.section_picture import kept_overview, overview, real_tile, section_size_um
from ge2hist_core.store import SectionRecord, TissueStore, write_store
from ge2hist_core.types import BadInput

SIZE = {"one": (150, 110), "two": (70, 131)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draws = rng.stream(0, "store source")
    sections = []
    for donor, (height, width) in SIZE.items():
        n = 12
        nuclei = pd.DataFrame(
            {
                "x_um": draws.uniform(0, width / 2, n),
                "y_um": draws.uniform(0, height / 2, n),
                "cell_type": ["Fibroblast", "B cell"] * (n // 2),
            }
        )
        counts = draws.poisson(0.8, (n, 7)).astype(np.float32)
        counts[3] = 0
        image = draws.integers(0, 256, (height, width, 3)).astype(np.uint8)
        labels = np.zeros((height, width), dtype=np.int32)
        sections.append(SectionRecord(donor, image, labels, nuclei, sp.csr_matrix(counts)))
    path = tmp_path_factory.mktemp("store") / "tissue.zarr"
    write_store(path, sections, [f"GENE{i}" for i in range(7)])
    return path


def test_the_cells_are_those_that_the_whole_store_holds(store: Path) -> None:
    whole = TissueStore(store, 16)
    source = open_store(store)
    rows = [20, 3, 7]
    part = source.take(rows, allow_empty=True)
    expected = whole.cells.take(rows)
    assert (part.counts != expected.counts).nnz == 0
    for name in ("cell_id", "cell_type", "donor", "genes"):
        assert list(getattr(part, name)) == list(getattr(expected, name))
    np.testing.assert_array_equal(part.xy_um, expected.xy_um)
    assert source.preview.position_unit == "um" and source.preview.scale == "counts"
    assert list(np.flatnonzero(source.empty)) == [3, 15]


@pytest.mark.parametrize("block", [3, 10**6])
def test_its_identity_is_the_stores_whatever_the_block(
    store: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "BLOCK", block)
    assert open_store(store).sha256 == TissueStore(store).identity


def test_a_tile_is_that_of_training_and_none_beyond_the_edge(store: Path) -> None:
    whole = TissueStore(store, 16)
    source = open_store(store)
    assert source.xy is not None and source.donor is not None
    for row in range(len(whole)):
        x, y = (float(value) for value in source.xy[row])
        tile = real_tile(store, source.donor[row], (x, y), source.um_per_px, 8.0, 16)
        assert (tile is not None) == whole.interior[row]
        if tile is not None:
            np.testing.assert_array_equal(tile.image, whole.tiles([row])[0])
            assert tile.um_per_px == 0.5 and not tile.generated


def test_a_tile_of_another_scale_is_resampled(store: Path) -> None:
    tile = real_tile(store, "one", (25.0, 30.0), 0.5, 16.0, 16)
    fine = real_tile(store, "one", (25.0, 30.0), 0.5, 16.0, 32)
    assert tile is not None and fine is not None and tile.um_per_px == 1.0
    means = fine.image.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(tile.image - means).max() <= 1


@pytest.mark.parametrize("longest", [10, 37, 150, 1200])
def test_an_overview_holds_the_means_of_its_boxes(store: Path, longest: int) -> None:
    import zarr

    picture = np.moveaxis(np.asarray(zarr.open_group(store)["images/one_image/s0"][:]), 0, -1)
    k = max(1, -(-150 // longest))
    small = overview(store, "one", longest)
    assert small.shape == (-(-150 // k), -(-110 // k), 3) and max(small.shape) <= longest
    for i, j in ((0, 0), (small.shape[0] - 1, small.shape[1] - 1)):
        box = picture[i * k : (i + 1) * k, j * k : (j + 1) * k].reshape(-1, 3)
        assert np.abs(small[i, j] - box.mean(axis=0)).max() <= 0.5
    assert section_size_um(store, "one", 0.5) == (55.0, 75.0)


def test_an_overview_is_computed_once(store: Path, tmp_path: Path) -> None:
    first = kept_overview(store, "two", tmp_path / "two.png")
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store, copy)
    shutil.rmtree(copy / "images")
    np.testing.assert_array_equal(kept_overview(copy, "two", tmp_path / "two.png"), first)
    with pytest.raises(BadInput, match="lacks the picture of section 'two'"):
        kept_overview(copy, "two", tmp_path / "other.png")


def test_other_folders_are_refused_in_one_sentence(store: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a zarr store"):
        open_cells(tmp_path)
    (tmp_path / "zarr.json").write_text('{"attributes": {}, "zarr_format": 3, "node_type": "group"}')
    with pytest.raises(BadInput, match="is not a GE2Hist store"):
        open_cells(tmp_path)
    with pytest.raises(BadInput, match="is not a file"):
        open_cells(tmp_path / "absent.h5ad")
    broken = tmp_path / "broken.zarr"
    shutil.copytree(store, broken)
    for chunk in (broken / "tables" / "cells" / "X" / "data" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"nothing")
    with pytest.raises(BadInput, match="is damaged"):
        open_store(broken)
