from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ge2hist_core.model import GE2Hist
from ge2hist_core.real_tiles import RealTiles, load, save
from ge2hist_core.types import BadInput, Cells, Latent


@pytest.fixture
def tiles(tiny_bundle: GE2Hist, demo_cells: Cells) -> RealTiles:
    n = len(demo_cells)
    side = np.linspace(0, 1, 32)
    # Smooth pictures, which JPEG keeps; each with a level of its own.
    waves = [np.outer(np.sin(3 * side + i), np.cos(2 * side))[:, :, None] * [60, 40, 50] + 128 + i for i in range(n)]
    return RealTiles(
        np.array(waves).astype(np.uint8),
        tiny_bundle.encode(tiny_bundle.embed(demo_cells, 0)),
        demo_cells.cell_type,
        demo_cells.donor,
        demo_cells.cell_id,
        tiny_bundle.sha256,
        {"store": "x"},
    )


def opened(tmp_path: Path, tiny_bundle: GE2Hist) -> GE2Hist:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.folder, folder)
    return GE2Hist.load(folder)


def test_tiles_come_back_nearly_alike_and_leave_the_bundles_hash(
    tmp_path: Path, tiny_bundle: GE2Hist, tiles: RealTiles
) -> None:
    model = opened(tmp_path, tiny_bundle)
    assert load(model) is None
    save(tiles, model.folder)
    found = load(GE2Hist.load(model.folder))
    assert GE2Hist.load(model.folder).sha256 == tiny_bundle.sha256
    assert found.images.shape == tiles.images.shape
    assert np.abs(found.images.astype(int) - tiles.images).mean() < 3
    np.testing.assert_array_equal(found.latent.z_e, tiles.latent.z_e)
    assert list(found.cell_id) == list(tiles.cell_id) and list(found.cell_type) == list(tiles.cell_type)


def test_a_cells_own_tile_is_the_nearest_at_no_distance(tiles: RealTiles) -> None:
    index, distance = tiles.nearest(tiles.latent)
    np.testing.assert_array_equal(index, np.arange(len(tiles)))
    np.testing.assert_allclose(distance, 0, atol=1e-6)


def test_the_nearest_weighs_both_parts_alike_in_standard_deviations() -> None:
    draw = np.random.default_rng(0)
    known = Latent(*(draw.normal(3.0, (2.0, 5.0), size=(50, 2)).astype(np.float32) for _ in range(2)))
    some = RealTiles(np.zeros((50, 2, 2, 3), np.uint8), known, *(np.zeros(50, object),) * 3, "", {})
    asked = Latent(*(draw.normal(3.0, (2.0, 5.0), size=(9, 2)).astype(np.float32) for _ in range(2)))
    index, distance = some.nearest(asked)
    for i in range(9):
        gaps = [
            np.mean([(((getattr(asked, p)[i] - z) / getattr(known, p).std(axis=0)) ** 2).mean() for p, z in pair])
            for pair in (((("z_c", c), ("z_e", e))) for c, e in zip(known.z_c, known.z_e, strict=True))
        ]
        assert index[i] == int(np.argmin(gaps)) and distance[i] == pytest.approx(np.sqrt(min(gaps)), rel=1e-5)


def test_tiles_of_other_weights_are_not_shown(tmp_path: Path, tiny_bundle: GE2Hist, tiles: RealTiles) -> None:
    model = opened(tmp_path, tiny_bundle)
    save(replace(tiles, model_sha256="0" * 64), model.folder)
    assert load(model) is None


@pytest.mark.parametrize("name", ["tiles.json", "tiles.jpg", "states.safetensors"])
def test_damaged_tiles_are_refused_with_one_sentence(
    tmp_path: Path, tiny_bundle: GE2Hist, tiles: RealTiles, name: str
) -> None:
    model = opened(tmp_path, tiny_bundle)
    save(tiles, model.folder)
    path = model.folder / "real_tiles" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BadInput, match="are damaged .*: run real-tiles again"):
        load(model)
