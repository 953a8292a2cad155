"""The store against its own input: made-up sections whose every pixel and position is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from ge2hist_core import store as store_module
from ge2hist_core.config import CELL_TYPES, TILE_PX, UM_PER_PX
from ge2hist_core.store import SectionRecord, TissueStore, write_store
from ge2hist_core.types import NUCLEI_COLUMNS, BadInput

GENES = pd.DataFrame({"role": ["driver", "reporter", "inert"]}, index=["VEGFA", "PECAM1", "ACTB"])
HEIGHT, WIDTH = 200, 260
# px, not um: x right, y down. The first is the only lymphocyte, the last two are near the edge.
CENTRES = np.array([[130.3, 100.6], [100.0, 80.5], [190.2, 150.0], [10.0, 100.0], [130.0, 190.0]])
TYPES = ["CD8 T cell", "Fibroblast", "Plasma cell", "Fibroblast", "Endothelium"]


def make_section(donor: str, seed: int) -> SectionRecord:
    """Squares of side 6, 8, ... px about each centre on a picture of noise."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    labels = np.zeros((HEIGHT, WIDTH), np.int32)
    for i, (x, y) in enumerate(CENTRES.astype(int)):
        half = 3 + i
        labels[max(0, y - half) : y + half, max(0, x - half) : x + half] = i + 1
    nuclei = pd.DataFrame(
        {
            "x_um": CENTRES[:, 0] * UM_PER_PX,
            "y_um": CENTRES[:, 1] * UM_PER_PX,
            "cell_type": TYPES,
            "fibrosis": np.linspace(0, 1, len(CENTRES)),
        }
    )
    return SectionRecord(donor, image, labels, nuclei, sp.csr_matrix(generator.poisson(1.0, (len(CENTRES), 3))))


@pytest.fixture(scope="module")
def sections() -> list[SectionRecord]:
    return [make_section("D0", 1), make_section("D1", 2), make_section("D-2.b", 3)]


@pytest.fixture(scope="module")
def path(sections, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "tissue.zarr"
    write_store(path, iter(sections), GENES, {"seed": 5, "donors": 3, "size_um": 130.0})
    return path


def test_the_table_round_trips(path, sections):
    store = TissueStore(path)
    assert store.donors == ["D0", "D1", "D-2.b"]
    assert store.cell_types == CELL_TYPES
    assert store.um_per_px == UM_PER_PX
    assert store.simulation == {"seed": 5, "donors": 3, "size_um": 130.0}
    cells = store.cells
    assert list(cells.genes) == list(GENES.index)
    assert list(store.var["role"]) == list(GENES["role"])
    np.testing.assert_array_equal(cells.counts.toarray(), np.vstack([s.counts.toarray() for s in sections]))
    np.testing.assert_allclose(cells.xy_um, np.tile(CENTRES * UM_PER_PX, (3, 1)), rtol=1e-6)
    assert list(cells.cell_type) == TYPES * 3
    assert list(cells.donor) == [name for name in store.donors for _ in TYPES]
    np.testing.assert_array_equal(store.obs["fibrosis"], np.tile(np.linspace(0, 1, 5), 3))


def test_spatialdata_opens_it_and_the_parts_overlay(path, sections):
    """The outline of each nucleus, moved back to pixels by the stored scale, covers its mask and nothing else."""
    import spatialdata
    from shapely import contains_xy
    from spatialdata.transformations import get_transformation

    with store_module._quiet():
        sdata = spatialdata.read_zarr(path)
    assert set(sdata.coordinate_systems) == {"D0", "D1", "D-2.b"}
    table = sdata.tables["cells"]
    assert table.obsm["spatial"].shape == (15, 2)
    for section in sections:
        image = sdata.images[f"{section.donor}_image"]
        np.testing.assert_array_equal(np.asarray(image.data), np.moveaxis(section.image, -1, 0))
        labels = sdata.labels[f"{section.donor}_labels"]
        np.testing.assert_array_equal(np.asarray(labels.data), section.labels)
        matrix = get_transformation(image, section.donor).to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(matrix, np.diag([UM_PER_PX, UM_PER_PX, 1]))
        outlines = sdata.shapes[f"{section.donor}_nuclei"]
        assert list(outlines["cell_type"]) == TYPES
        annotated = table[table.obs["region"] == f"{section.donor}_nuclei"]
        assert list(annotated.obs["instance_id"]) == list(outlines.index)
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        for label, outline in outlines.geometry.items():
            inside = contains_xy(outline, (x + 0.5) * UM_PER_PX, (y + 0.5) * UM_PER_PX)
            np.testing.assert_array_equal(inside, section.labels == label)
        mask_area = [(section.labels == i).sum() * UM_PER_PX**2 for i in outlines.index]
        np.testing.assert_allclose(outlines["area_um2"], mask_area)


def test_squidpy_finds_neighbours_in_the_table(path):
    """Nearest neighbours per donor by squidpy, from the table as stored, equal those of the positions put in."""
    import warnings

    import spatialdata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # squidpy's own, at import
        import squidpy

        table = spatialdata.read_zarr(path).tables["cells"]
        squidpy.gr.spatial_neighbors(table, library_key="donor", coord_type="generic", n_neighs=1)
    found = table.obsp["spatial_connectivities"].toarray().astype(bool)
    distance = np.linalg.norm(CENTRES[:, None] - CENTRES[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    one_donor = np.eye(len(CENTRES), dtype=bool)[distance.argmin(axis=1)]
    np.testing.assert_array_equal(found, np.kron(np.eye(3, dtype=bool), one_donor))


def test_tiles_are_centred_on_the_cell(path, sections):
    store = TissueStore(path)
    rows = [10, 0, 6]
    tiles = store.tiles(rows)
    assert tiles.shape == (3, TILE_PX, TILE_PX, 3) and tiles.dtype == np.uint8
    for tile, row in zip(tiles, rows, strict=True):
        x, y = np.floor(CENTRES[row % 5] + 0.5).astype(int) - TILE_PX // 2
        np.testing.assert_array_equal(tile, sections[row // 5].image[y : y + TILE_PX, x : x + TILE_PX])


def test_tiles_do_not_depend_on_the_cache(path, monkeypatch):
    store = TissueStore(path)
    whole = store.tiles([0, 6, 11])
    assert 0 < store._pictures._held == sum(chunk.nbytes for chunk in store._pictures._chunks.values())
    np.testing.assert_array_equal(store.tiles([0, 6, 11]), whole)
    monkeypatch.setattr(store_module, "CACHE_BYTES", 0)
    store = TissueStore(path)
    np.testing.assert_array_equal(store.tiles([0, 6, 11]), whole)
    assert not store._pictures._chunks and store._pictures._held == 0


def test_tiles_over_the_borders_of_chunks_are_whole(tmp_path, monkeypatch):
    """Chunks of 50 px: every tile lies over nine to sixteen of them; a cache of three evicts all the time."""
    monkeypatch.setattr(store_module, "CHUNK_PX", 50)
    monkeypatch.setattr(store_module, "CACHE_BYTES", 3 * 50 * 50 * 3)
    section = make_section("A", 1)
    write_store(tmp_path / "a.zarr", [section], GENES)
    store = TissueStore(tmp_path / "a.zarr")
    for row in (0, 1):
        x, y = np.floor(CENTRES[row] + 0.5).astype(int) - TILE_PX // 2
        np.testing.assert_array_equal(store.tiles([row])[0], section.image[y : y + TILE_PX, x : x + TILE_PX])
    assert 0 < store._pictures._held <= 3 * 50 * 50 * 3


def test_threads_read_the_same_tiles(path):
    from concurrent.futures import ThreadPoolExecutor

    store, rows = TissueStore(path), [0, 1, 5, 6, 10, 11] * 4
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda row: store.tiles([row])[0], rows))
    np.testing.assert_array_equal(together, TissueStore(path).tiles(rows))


def test_tiles_of_another_size_are_centred_on_the_same_pixel(path):
    small, usual = TissueStore(path, tile_px=64), TissueStore(path)
    np.testing.assert_array_equal(small.tiles([0]), usual.tiles([0])[:, 32:96, 32:96])
    assert small.interior.sum() >= usual.interior.sum()
    assert small.neighbour_counts([5]).sum() <= usual.neighbour_counts([5]).sum()
    with pytest.raises(BadInput, match="tile_px is 63: give an even number"):
        TissueStore(path, tile_px=63)


def test_a_damaged_picture_is_named(path, tmp_path):
    import shutil

    shutil.copytree(path, tmp_path / "a.zarr")
    chunk = next(p for p in (tmp_path / "a.zarr" / "images" / "D1_image").rglob("c/*/*/*") if p.is_file())
    chunk.write_bytes(b"no picture")
    store = TissueStore(tmp_path / "a.zarr")
    store.tiles([0])
    with pytest.raises(BadInput, match="image of donor 'D1' in .* is damaged near pixel .*: write the store again"):
        store.tiles([5, 6])


def test_interior_means_the_whole_tile_is_in_the_section(path):
    store = TissueStore(path)
    expected = [64 <= x <= WIDTH - 64 and 64 <= y <= HEIGHT - 64 for x, y in np.floor(np.tile(CENTRES, (3, 1)) + 0.5)]
    assert list(store.interior) == expected
    assert expected[:5] == [True, True, False, False, False]
    assert list(store.rows(["D1"])) == [5, 6]
    assert list(store.rows(["D1"], interior=False)) == [5, 6, 7, 8, 9]


def test_nuclei_are_relative_to_the_tile(path):
    nuclei = TissueStore(path).nuclei(5)
    assert tuple(nuclei.columns) == NUCLEI_COLUMNS
    corner = np.array([130 - 64, 101 - 64])  # the cell at (130.3, 100.6) px, to the nearest pixel
    relative = CENTRES - corner
    inside = ((relative >= 0) & (relative < TILE_PX)).all(axis=1)
    np.testing.assert_allclose(nuclei[["x_um", "y_um"]], relative[inside] * UM_PER_PX)
    assert list(nuclei["cell_type"]) == ["Lymphocyte", "Fibroblast", "Plasma cell"]
    np.testing.assert_allclose(nuclei["area_um2"], [9.0, 16.0, 25.0])
    assert (nuclei["probability"] == 1).all()


def test_neighbours_are_the_other_nuclei_of_the_tile(path):
    """The middle cell's tile reaches 64 px to each side: the cells at (100, 80.5) and (190.2, 150) are in it."""
    store = TissueStore(path)
    counts = store.neighbour_counts([5, 6])
    expected = np.zeros((2, len(CELL_TYPES)), dtype=int)
    expected[0, [CELL_TYPES.index("Fibroblast"), CELL_TYPES.index("Plasma cell")]] = 1
    expected[1, CELL_TYPES.index("CD8 T cell")] = 1
    np.testing.assert_array_equal(counts, expected)


def test_a_tile_over_the_edge_is_refused_by_name(path):
    with pytest.raises(BadInput, match="'D0_4'.*interior"):
        TissueStore(path).tiles([0, 3])


@pytest.mark.parametrize(("n", "sizes"), [(1, (1, 0, 0)), (3, (1, 1, 1)), (15, (12, 1, 2)), (100, (80, 7, 13))])
def test_split_is_by_donor(path, n, sizes):
    store = TissueStore(path)
    store.donors = [f"donor{i}" for i in range(n)]
    split = store.split()
    assert tuple(len(split[name]) for name in ("train", "validation", "test")) == sizes
    assert sorted(donor for part in split.values() for donor in part) == sorted(store.donors)
    store.donors = store.donors[::-1]
    assert store.split() == split
    if n == 100:
        assert store.split(seed=1) != split


def test_identity_tells_stores_apart(path, sections, tmp_path):
    first = TissueStore(path)
    write_store(tmp_path / "same.zarr", sections, GENES, {"seed": 5, "donors": 3, "size_um": 130.0})
    assert TissueStore(tmp_path / "same.zarr").identity == first.identity
    other = make_section("D0", 1)
    other.counts[0, 0] += 1
    write_store(tmp_path / "other.zarr", [other, *sections[1:]], GENES)
    assert TissueStore(tmp_path / "other.zarr").identity != first.identity


def test_a_nucleus_without_a_pixel_is_kept(tmp_path):
    """Two nuclei may round to the same pixels; the hidden one is still a cell with counts."""
    section = make_section("A", 1)
    section.labels[section.labels == 2] = 0
    write_store(tmp_path / "a.zarr", [section], GENES)
    store = TissueStore(tmp_path / "a.zarr")
    assert len(store) == 5 and store.simulation is None
    assert store.obs["area_um2"].iloc[1] == 0


def test_a_failed_write_leaves_the_old_store_and_no_rubbish(tmp_path, sections):
    path = tmp_path / "a.zarr"
    write_store(path, sections[:1], GENES)

    def breaking():
        yield sections[1]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_store(path, breaking(), GENES)
    assert TissueStore(path).donors == ["D0"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]
    write_store(path, sections[1:2], GENES)
    assert TissueStore(path).donors == ["D1"]


def test_a_folder_that_is_no_store_is_never_replaced(tmp_path, sections):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(BadInput, match="not a zarr store: choose another name"):
        write_store(tmp_path, sections, GENES)
    assert (tmp_path / "thesis.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: {"sections": []}, "no section"),
        (lambda s: {"sections": [s[0], s[0]]}, "'D0' has two sections"),
        (lambda s: {"genes": ["A", "B", "A"]}, "'A' occurs twice"),
    ],
)
def test_writer_refuses(tmp_path, sections, change, text):
    with pytest.raises(BadInput, match=text):
        write_store(tmp_path / "a.zarr", **({"sections": sections, "genes": GENES} | change(sections)))
    assert not list(tmp_path.iterdir())


def test_donor_names_must_be_folder_names():
    with pytest.raises(BadInput, match="'../x' cannot name a folder"):
        make_section("../x", 1)


def test_reader_refuses_what_is_no_store(tmp_path, path, sections):
    import shutil

    import spatialdata

    with pytest.raises(BadInput, match="is not a folder"):
        TissueStore(tmp_path / "absent.zarr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="cannot be read|is not a GE2Hist store"):
        TissueStore(tmp_path / "empty")
    spatialdata.SpatialData().write(tmp_path / "foreign.zarr")
    with pytest.raises(BadInput, match="is not a GE2Hist store"):
        TissueStore(tmp_path / "foreign.zarr")
    shutil.copytree(path, tmp_path / "cut.zarr")
    shutil.rmtree(tmp_path / "cut.zarr" / "tables" / "cells" / "obs")
    with pytest.raises(BadInput, match="write it again"):
        TissueStore(tmp_path / "cut.zarr")
    shutil.copytree(path, tmp_path / "blind.zarr")
    shutil.rmtree(tmp_path / "blind.zarr" / "images" / "D1_image")
    with pytest.raises(BadInput, match="write (it|the store) again"):
        TissueStore(tmp_path / "blind.zarr")
