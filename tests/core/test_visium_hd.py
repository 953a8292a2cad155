"""Space Ranger folders: small ones written by hand, so that every number is known, and what is wrong with bad ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import shapely
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter

from ge2hist_core import visium_hd
from ge2hist_core.slide_image import SlideImage
from ge2hist_core.types import BadInput
from ge2hist_core.visium_hd import (
    AMBIGUOUS,
    Ledger,
    assign_bins,
    check_image,
    open_space_ranger,
    read_outlines,
    sum_counts,
)

ROWS, COLUMNS = 12, 15
UM_PER_PX = 0.4
CORNER_PX = (30.0, 20.0)
"""(x, y) of the corner of bin (0, 0)."""
IMAGE = (110, 140)
"""Height and width, px."""
GENES = ["EPCAM", "TBCE", "CD3E", "TBCE", "CD45"]
KINDS = ["Gene Expression"] * 4 + ["Antibody Capture"]


def bin_name(row: int, column: int) -> str:
    return f"s_002um_{row:05d}_{column:05d}-1"


def write_run(folder: Path, um_per_px: float = UM_PER_PX, **change) -> np.ndarray:
    """A whole run by hand; returns the dense counts ``[bin, feature]`` of all bins, row by row.

    ``change``: ``genome``, ``bin_um``, ``diameter``, ``software``, ``names``, ``places``.
    """
    draw = np.random.default_rng(7)
    bins = folder / "outs" / "binned_outputs" / "square_002um"
    (bins / "spatial").mkdir(parents=True)
    row, column = (v.ravel() for v in np.mgrid[:ROWS, :COLUMNS])
    dense = draw.poisson(0.7, (ROWS * COLUMNS, len(GENES))).astype(np.int32)
    in_tissue = (row > 0) & (column < COLUMNS - 2)
    names = np.array(change.get("names", [bin_name(r, c) for r, c in zip(row, column, strict=True)]), dtype="S")
    for name, mask in (("raw", np.ones(len(dense), bool)), ("filtered", in_tissue)):
        matrix = sp.csr_matrix(dense[mask])
        with h5py.File(bins / f"{name}_feature_bc_matrix.h5", "w") as file:
            file.attrs["software_version"] = change.get("software", "spaceranger-3.1.3")
            file.attrs["filetype"] = "matrix"
            group = file.create_group("matrix")
            group["data"], group["indices"] = matrix.data, matrix.indices.astype(np.int64)
            group["indptr"] = matrix.indptr.astype(np.int64)
            group["shape"] = np.array([len(GENES), mask.sum()], dtype=np.int32)
            group["barcodes"] = names[mask]
            features = group.create_group("features")
            features["id"] = np.array([f"ENSG{i:011d}" for i in range(len(GENES))], dtype="S")
            features["name"], features["feature_type"] = np.array(GENES, "S"), np.array(KINDS, "S")
            features["genome"] = np.full(len(GENES), change.get("genome", "GRCh38-2024-A"), dtype="S20")
            features["_all_tag_keys"] = np.array([b"genome"])
    pitch = 2.0 / UM_PER_PX
    places = {
        "barcode": names.astype(str),
        "in_tissue": in_tissue.astype(np.int64),
        "array_row": row,
        "array_col": column,
        "pxl_row_in_fullres": CORNER_PX[1] + (row + 0.5) * pitch,
        "pxl_col_in_fullres": CORNER_PX[0] + (column + 0.5) * pitch,
    }
    frame = pd.DataFrame(places)[change.get("places", slice(None))]
    frame.to_parquet(bins / "spatial" / "tissue_positions.parquet", index=False)
    scales = {
        "microns_per_pixel": um_per_px,
        "bin_size_um": change.get("bin_um", 2.0),
        "spot_diameter_fullres": change.get("diameter", 2.0 / um_per_px),
        "tissue_hires_scalef": 0.5,
        "tissue_lowres_scalef": 0.1,
    }
    (bins / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    picture = texture(0)
    reduced = Image.fromarray(picture).resize((IMAGE[1] // 2, IMAGE[0] // 2), Image.Resampling.BOX)
    reduced.save(bins / "spatial" / "tissue_hires_image.png")
    tifffile.imwrite(folder / "he.tif", picture, tile=(64, 64), photometric="rgb", compression="zlib")
    return dense


def texture(seed: int) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(*IMAGE, 3)), (3, 3, 0))
    return np.clip(190 + 250 * noise, 0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    dense = write_run(folder)
    return open_space_ranger(folder, raw=True), dense


# --- Reading ------------------------------------------------------------------------------------------------------


def test_bins_genes_and_places_are_read(known):
    run, dense = known
    assert run.version == 3 and run.software == "spaceranger-3.1.3" and run.n_bins == ROWS * COLUMNS
    assert list(run.genes.index) == ["EPCAM", "TBCE", "CD3E"]  # one symbol of two Ensembl genes, no antibodies
    np.testing.assert_array_equal(run.feature_gene, [0, 1, 2, 1, -1])
    row, column = (v.ravel() for v in np.mgrid[:ROWS, :COLUMNS])
    np.testing.assert_array_equal(run.row, row)
    np.testing.assert_array_equal(run.column, column)
    expected = np.array(CORNER_PX) * UM_PER_PX + 2.0 * np.stack([column + 0.5, row + 0.5], axis=1)
    np.testing.assert_allclose(run.xy_um, expected, atol=1e-4)
    np.testing.assert_allclose(run.axes, 2.0 * np.eye(2), atol=1e-5)
    np.testing.assert_array_equal(run.in_tissue, (row > 0) & (column < COLUMNS - 2))


@pytest.mark.parametrize("size", [7, 1000])
def test_blocks_together_are_the_matrix(known, size):
    run, dense = known
    expected = np.stack([dense[:, 0], dense[:, 1] + dense[:, 3], dense[:, 2]], axis=1)
    starts, blocks = zip(*run.blocks(size), strict=True)
    assert list(starts) == list(range(0, ROWS * COLUMNS, size))
    np.testing.assert_array_equal(sp.vstack(blocks).toarray(), expected)
    np.testing.assert_array_equal(run.umi, expected.sum(axis=1))


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_scanpy_reads_the_same(folder):
    import scanpy

    theirs = scanpy.read_10x_h5(folder / "outs/binned_outputs/square_002um/filtered_feature_bc_matrix.h5")
    theirs = theirs[:, [name != "TBCE" for name in theirs.var_names]]
    run = open_space_ranger(folder)
    ours = sp.vstack([block for _, block in run.blocks()]).toarray()
    np.testing.assert_array_equal(theirs.X.toarray(), ours[:, [0, 2]])
    assert list(theirs.obs_names) == [bin_name(r, c) for r, c in zip(run.row, run.column, strict=True)]
    assert run.in_tissue.all()


@pytest.mark.parametrize("part", ["", "outs", "outs/binned_outputs", "outs/binned_outputs/square_002um"])
def test_any_level_of_the_folder_will_do(folder, part):
    assert open_space_ranger(folder / part).matrix.name == "filtered_feature_bc_matrix.h5"


# --- Bins to nuclei -----------------------------------------------------------------------------------------------


def test_a_bin_belongs_to_the_nucleus_at_its_centre_and_to_no_two(known):
    """At 0.5 um per px a bin is 4 x 4 px: read off the label image block by block."""
    run, _ = known
    draw = np.random.default_rng(3)
    labels = np.zeros((ROWS * 4, COLUMNS * 4), np.int32)
    for i in range(1, 30):
        y, x = draw.integers(0, ROWS * 4 - 6), draw.integers(0, COLUMNS * 4 - 6)
        labels[y : y + draw.integers(3, 9), x : x + draw.integers(3, 9)] = i
    contested = draw.random(labels.shape) < 0.01
    origin = tuple(np.array(CORNER_PX) * UM_PER_PX - 1e-4)  # off the pixels' edges
    owner = assign_bins(run, labels, 0.5, origin, contested=contested)
    for k, (r, c) in enumerate(zip(run.row, run.column, strict=True)):
        block = (slice(4 * r, 4 * r + 4), slice(4 * c, 4 * c + 4))
        centre = labels[4 * r + 2, 4 * c + 2]
        others = set(labels[block].ravel()) - {0, centre}
        expected = 0 if centre == 0 else AMBIGUOUS if others or contested[block].any() else centre
        assert owner[k] == expected
    assert {AMBIGUOUS, 0} < set(owner)


def test_bins_outside_the_label_image_have_no_nucleus(known):
    run, _ = known
    labels = np.ones((8, 8), np.int32)
    owner = assign_bins(run, labels, 0.5, tuple(np.array(CORNER_PX) * UM_PER_PX))
    assert (owner > 0).sum() == 4


def test_a_shift_moves_the_bins(known):
    run, _ = known
    labels = np.arange(ROWS * COLUMNS, dtype=np.int32).reshape(ROWS, COLUMNS) + 1
    labels = np.kron(labels, np.ones((4, 4), np.int32))
    origin = tuple(np.array(CORNER_PX) * UM_PER_PX - 1e-3)
    straight = assign_bins(run, labels, 0.5, origin).reshape(ROWS, COLUMNS)
    shifted = assign_bins(run, labels, 0.5, origin, (2.0, 4.0)).reshape(ROWS, COLUMNS)
    np.testing.assert_array_equal(straight, labels[::4, ::4])
    np.testing.assert_array_equal(shifted[:-2, :-1], straight[2:, 1:])


def test_a_turned_grid_is_sampled_along_its_own_sides(known):
    """A bin turned by 45 degrees reaches 1.4 um from its centre along x, but only at its corner."""
    run, _ = known
    turned = replace(run, axes=np.array([[1.0, 1.0], [-1.0, 1.0]]) * np.sqrt(2))
    corner = tuple(run.xy_um[0] - 10)
    centre = np.zeros((400, 400), np.int32)
    centre[98:102, 98:102] = 1  # about the centre of bin 0, at 0.1 um per px
    beside, diagonal = centre.copy(), centre.copy()
    beside[98:102, 109:112] = 2  # 0.9 to 1.2 um along x: in the turned square only
    diagonal[106:109, 106:109] = 2  # 0.6 to 0.9 um right and down: in the straight square only
    for grid, image, expected in (
        (turned, beside, AMBIGUOUS), (turned, diagonal, 1), (run, beside, 1), (run, diagonal, AMBIGUOUS)
    ):  # fmt: skip
        assert assign_bins(grid, image, 0.1, corner)[0] == expected


def test_counts_are_summed_per_nucleus_to_the_last_umi(known, monkeypatch):
    run, dense = known
    monkeypatch.setattr(visium_hd, "BLOCK_BINS", 25)
    expected = np.stack([dense[:, 0], dense[:, 1] + dense[:, 3], dense[:, 2]], axis=1)
    owner = np.random.default_rng(2).integers(-1, 9, run.n_bins).astype(np.int32)
    told: list[int] = []
    counts, umi = sum_counts(run, owner, 9, told.append)
    np.testing.assert_array_equal(umi, expected.sum(axis=1))
    assert counts.shape == (9, 3) and sum(told) == run.n_bins
    for label in range(1, 10):
        np.testing.assert_array_equal(counts[label - 1].toarray()[0], expected[owner == label].sum(axis=0))
    nobody, _ = sum_counts(run, np.zeros(run.n_bins, np.int32), 4)
    assert nobody.shape == (4, 3) and nobody.nnz == 0


def test_a_ledger_must_balance():
    ledger = Ledger(total=10, assigned=4, outside_tissue=3, no_nucleus=2, ambiguous=1)
    assert ledger.text() == (
        "10 UMIs = assigned 4 (40.0 %), outside tissue 3 (30.0 %), no nucleus 2 (20.0 %), ambiguous 1 (10.0 %), below "
        "minimum 0 (0.0 %), between regions 0 (0.0 %)"
    )
    with pytest.raises(ValueError, match="9 UMIs are accounted for, the matrix holds 10"):
        Ledger(total=10, assigned=3, outside_tissue=3, no_nucleus=2, ambiguous=1)


def test_outlines_come_in_um_with_space_rangers_names(tmp_path):
    def feature(xy, **properties):
        ring = [[float(a), float(b)] for a, b in [*xy, xy[0]]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        return {"type": "Feature", "properties": properties, "geometry": geometry}

    features = [feature([(10, 20), (30, 20), (30, 40)], cell_id=7), feature([(0, 0), (4, 0), (4, 4)], cell_id=12)]
    path = tmp_path / "cells.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    names, shapes = read_outlines(path, 0.4)
    assert list(names) == ["cellid_000000007-1", "cellid_000000012-1"]
    assert shapes[0].equals(shapely.Polygon([(4, 8), (12, 8), (12, 16)]))
    path.write_text(path.read_text()[:-40])
    with pytest.raises(BadInput, match="cannot be read as GeoJSON"):
        read_outlines(path, 0.4)
    with pytest.raises(BadInput, match="does not exist"):
        read_outlines(tmp_path / "absent.geojson", 0.4)


# --- Bad folders --------------------------------------------------------------------------------------------------

BINS = "outs/binned_outputs/square_002um/"


def cut(folder: Path, name: str) -> None:
    path = folder / BINS / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda f: shutil.rmtree(f / "outs"), "has no binned_outputs/square_002um"),
        (lambda f: [p.unlink() for p in (f / BINS).glob("*.h5")], "lacks filtered_feature_bc_matrix.h5"),
        (lambda f: cut(f, "filtered_feature_bc_matrix.h5"), "filtered_feature_bc_matrix.h5 is truncated"),
        (lambda f: cut(f, "spatial/tissue_positions.parquet"), "tissue_positions.parquet is truncated"),
        (lambda f: (f / BINS / "spatial/tissue_positions.parquet").unlink(), "tissue_positions.parquet is missing"),
        (lambda f: (f / BINS / "spatial/scalefactors_json.json").unlink(), "scalefactors_json.json is missing"),
        (lambda f: cut(f, "spatial/scalefactors_json.json"), "lacks or garbles a scale factor"),
    ],
)  # fmt: skip
def test_missing_and_cut_files_are_named(folder, spoil, text):
    spoil(folder)
    with pytest.raises(BadInput, match=text):
        open_space_ranger(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"genome": "mm10-2020-A"}, "genome mm10-2020-A, expected GRCh38"),
        ({"bin_um": 8.0}, "is of 8-um bins"),
        ({"diameter": 7.0}, "contradicts itself"),
        ({"um_per_px": 0.5}, "lie 2.5 um apart"),
        ({"names": [f"AAAC{i}-1" for i in range(ROWS * COLUMNS)]}, "barcodes like 'AAAC"),
        ({"places": slice(0, 100)}, "has no place for 68 bins .*first s_002um_00006_00010"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(tmp_path, change, text):
    write_run(tmp_path, **change)
    with pytest.raises(BadInput, match=text):
        open_space_ranger(tmp_path)


def test_a_mouse_run_is_read_when_asked_for(tmp_path):
    write_run(tmp_path, genome="mm10-2020-A")
    assert open_space_ranger(tmp_path, genome="mm10").n_bins > 0


def test_segmented_outputs_of_another_run_are_refused(folder):
    cells = folder / "outs" / "segmented_outputs"
    cells.mkdir()
    shutil.copy(folder / BINS / "raw_feature_bc_matrix.h5", cells / "filtered_feature_cell_matrix.h5")
    assert open_space_ranger(folder).version == 4
    with h5py.File(cells / "filtered_feature_cell_matrix.h5", "a") as file:
        file.attrs["software_version"] = "spaceranger-4.0.1"
    with pytest.raises(BadInput, match="spaceranger-3.1.3.*spaceranger-4.0.1.*different runs"):
        open_space_ranger(folder)


def test_damage_inside_the_matrix_is_named_when_met(folder):
    """A chunk that does not decode shows only when it is read."""
    path = folder / BINS / "filtered_feature_bc_matrix.h5"
    with h5py.File(path, "a") as file:
        values = file["matrix/data"][:]
        del file["matrix/data"]
        chunked = file["matrix"].create_dataset("data", data=values, chunks=True, compression="gzip")
        place = chunked.id.get_chunk_info(0).byte_offset
    raw = bytearray(path.read_bytes())
    raw[place : place + 12] = b"\x00" * 12
    path.write_bytes(raw)
    with pytest.raises(BadInput, match="truncated or damaged"):
        list(open_space_ranger(folder).blocks())


# --- The picture --------------------------------------------------------------------------------------------------


def test_the_runs_own_picture_passes(folder):
    run = open_space_ranger(folder)
    with SlideImage(folder / "he.tif", um_per_px=run.um_per_px) as image:
        figures = check_image(run, image)
    assert figures["bins_inside"] == 1.0 and figures["copy_correlation"] > 0.98


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        (lambda: texture(0)[:, ::-1], "does not show what the run's tissue_hires_image.png shows"),
        (lambda: texture(1), "does not show"),
        (lambda: texture(0)[:40], "bins in the tissue lie outside"),
        (lambda: np.pad(texture(0), ((0, 30), (0, 30), (0, 0))), "had by its copy"),
    ],
)
def test_another_picture_is_refused(folder, picture, text):
    Image.fromarray(np.ascontiguousarray(picture())).save(folder / "other.png")
    run = open_space_ranger(folder)
    with SlideImage(folder / "other.png", um_per_px=run.um_per_px) as image, pytest.raises(BadInput, match=text):
        check_image(run, image)


def test_a_picture_of_another_scale_is_refused(folder):
    tifffile.imwrite(
        folder / "zoomed.tif", texture(0), tile=(64, 64), photometric="rgb", resolution=(1e4 / 0.25,) * 2,
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    run = open_space_ranger(folder)
    with (
        SlideImage(folder / "zoomed.tif", um_per_px=run.um_per_px) as image,
        pytest.raises(BadInput, match="has 0.25 um per pixel, the run's scalefactors_json.json says 0.4"),
    ):
        check_image(run, image)


def test_windows_at_any_scale_are_parts_of_one_picture(folder):
    with SlideImage(folder / "he.tif", um_per_px=UM_PER_PX) as image:
        np.testing.assert_array_equal(image.window((0, IMAGE[0]), (0, IMAGE[1])), texture(0))
        for scale in (0.25, 0.4, 0.5, 1.1, 2.0):
            n = int(IMAGE[0] * UM_PER_PX / scale)
            whole = image.at_scale((0, n), (0, n), scale)
            part = image.at_scale((7, 15), (3, 20), scale)
            np.testing.assert_array_equal(part, whole[7:15, 3:20])
        beyond = image.window((-3, 5), (IMAGE[1] - 2, IMAGE[1] + 4))
        assert (beyond[:3] == 255).all() and (beyond[:, 2:] == 255).all()
        np.testing.assert_array_equal(beyond[3:, :2], texture(0)[:5, -2:])


def test_a_reduced_picture_keeps_places_and_means(tmp_path):
    """A ramp stays a ramp: the value at each place is that of the place in um."""
    ramp = np.broadcast_to(np.arange(240, dtype=np.uint8)[None, :, None], (60, 240, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    with SlideImage(tmp_path / "ramp.png", um_per_px=0.25) as image:
        reduced = image.at_scale((5, 8), (10, 50), 1.0)
    np.testing.assert_allclose(reduced[1, :, 0], (np.arange(10, 50) + 0.5) * 4 - 0.5, atol=0.51)


def test_the_scale_in_the_file_is_read(tmp_path):
    picture = texture(0)
    tifffile.imwrite(tmp_path / "a.ome.tif", picture, photometric="rgb", tile=(64, 64), ome=True,
                     metadata={"axes": "YXS", "PhysicalSizeX": 0.27, "PhysicalSizeXUnit": "µm"})  # fmt: skip
    tifffile.imwrite(tmp_path / "b.svs", picture, photometric="rgb", tile=(64, 64), metadata=None,
                     description="Aperio Image Library v12|AppMag = 40|MPP = 0.2498")  # fmt: skip
    tifffile.imwrite(tmp_path / "c.tif", picture, photometric="rgb", tile=(64, 64), resolution=(72, 72),
                     resolutionunit="INCH")  # fmt: skip
    planar = np.moveaxis(picture, -1, 0)
    tifffile.imwrite(tmp_path / "d.ome.tif", planar, tile=(64, 64), ome=True, photometric="minisblack",
                     metadata={"axes": "CYX", "PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm"})  # fmt: skip
    for name, expected in (("a.ome.tif", 0.27), ("b.svs", 0.2498), ("d.ome.tif", 0.5)):
        with SlideImage(tmp_path / name) as image:
            assert image.um_per_px == pytest.approx(expected)
            np.testing.assert_array_equal(image.window((3, 90), (60, 131)), picture[3:90, 60:131])
    with pytest.raises(BadInput, match="does not say how large its pixels are"):
        SlideImage(tmp_path / "c.tif")


def test_pictures_that_cannot_be_read_are_refused(tmp_path):
    picture = texture(0)
    tifffile.imwrite(tmp_path / "cut.tif", picture, tile=(64, 64), photometric="rgb")
    raw = (tmp_path / "cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(raw[: len(raw) - 3000])
    tifffile.imwrite(tmp_path / "grey.tif", picture[..., 0], tile=(64, 64))
    tifffile.imwrite(tmp_path / "deep.tif", picture.astype(np.uint16), tile=(64, 64), photometric="rgb")
    (tmp_path / "text.tif").write_text("not a picture")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "slide.xyz").write_text("")
    for name, text in (
        ("cut.tif", "cut.tif is truncated: its tiles need"),
        ("grey.tif", "uint8 pixels with 1 channel"),
        ("deep.tif", "uint16 pixels"),
        ("text.tif", "cannot be read as TIFF"),
        ("text.png", "cannot be decoded"),
        ("slide.xyz", "is of kind '.xyz'"),
        ("absent.tif", "does not exist"),
    ):
        with pytest.raises(BadInput, match=text):
            SlideImage(tmp_path / name, um_per_px=0.5)


def test_a_picture_in_one_piece_is_refused(tmp_path, monkeypatch):
    from ge2hist_core import slide_image

    monkeypatch.setattr(slide_image, "MAX_CHUNK_PX", 1000)
    tifffile.imwrite(tmp_path / "one.tif", texture(0), photometric="rgb", compression="zlib", rowsperstrip=IMAGE[0])
    with pytest.raises(BadInput, match="stored in one piece: save it in tiles"):
        SlideImage(tmp_path / "one.tif", um_per_px=0.5)


def test_a_tile_that_does_not_decode_is_named(tmp_path):
    tifffile.imwrite(tmp_path / "he.tif", texture(0), tile=(64, 64), photometric="rgb", compression="zlib")
    with tifffile.TiffFile(tmp_path / "he.tif") as file:
        place = file.pages[0].dataoffsets[1]
    raw = bytearray((tmp_path / "he.tif").read_bytes())
    raw[place : place + 40] = b"\xff" * 40
    (tmp_path / "he.tif").write_bytes(raw)
    with (
        SlideImage(tmp_path / "he.tif", um_per_px=0.5) as image,
        pytest.raises(BadInput, match="he.tif cannot be decoded at row 0, column 64"),
    ):
        image.window((0, 20), (64, 128))
