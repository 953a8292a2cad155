"""The simulated slide against itself, scanpy and closed forms: no UMI lost, each where it should be."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from ge2hist_core.simulator.space_ranger import SlideSpec, write_slide
from ge2hist_core.slide_image import SlideImage
from ge2hist_core.types import BadInput
from ge2hist_core.visium_hd import open_space_ranger, read_outlines

SMALL = {"section_um": 96.0, "border_um": 12.0, "glass_um": 16.0}


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """A mosaic of two sections above each other, grid turned, Space Ranger 4."""
    spec = SlideSpec(seed=4, rows=2, rotation_deg=6.0, version=4, extra_genes=3, um_per_px=0.4, **SMALL)
    folder = tmp_path_factory.mktemp("slide") / "turned"
    told: list[int] = []
    write_slide(folder, spec, lambda: told.append(1))
    assert len(told) == 2
    return folder, spec


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """Every UMI stays where it began, in its nucleus."""
    spec = SlideSpec(seed=9, sigma_um=0.0, nuclear_share=1.0, ambient=0.0, **SMALL)
    folder = tmp_path_factory.mktemp("slide") / "sharp"
    write_slide(folder, spec)
    return folder, spec


def truth(folder):
    return (
        pd.read_parquet(folder / "truth" / "cells.parquet"),
        pd.read_parquet(folder / "truth" / "molecules.parquet"),
        sp.load_npz(folder / "truth" / "counts.npz"),
    )


def test_no_umi_is_lost_or_made_on_the_way_to_the_matrix(turned):
    """Bin by bin and gene by gene the raw matrix is the truth's molecules, across the seam of the mosaic."""
    folder, spec = turned
    cells, molecules, counts = truth(folder)
    run = open_space_ranger(folder / "outs", raw=True)
    matrix = sp.vstack([block for _, block in run.blocks()])
    rows, columns = spec.grid
    assert run.n_bins == rows * columns and len(run.genes) == counts.shape[1]
    place = molecules["array_row"] * columns + molecules["array_col"]
    expected = sp.coo_matrix((molecules["n"], (place, molecules["gene"])), shape=matrix.shape).tocsr()
    assert (matrix != expected).nnz == 0
    of_cells = molecules[molecules["cell"] > 0].groupby("cell")["n"].sum()
    on_grid = cells.set_index("cell")["n_umi_on_grid"]
    assert (of_cells.reindex(on_grid.index, fill_value=0) == on_grid).all()
    assert (cells["n_umi_on_grid"] <= cells["n_umi"]).all()
    np.testing.assert_array_equal(cells["n_umi"], np.asarray(counts.sum(axis=1)).ravel())
    assert 0.97 < on_grid.sum() / cells["n_umi"].sum() <= 1


def test_places_are_those_of_the_turned_grid(turned):
    folder, spec = turned
    run = open_space_ranger(folder, raw=True)
    np.testing.assert_allclose(run.xy_um, spec.centres(run.row, run.column), atol=1e-3)
    np.testing.assert_allclose(run.axes, spec.axes, atol=1e-4)
    back = spec.bins_at(spec.centres(run.row, run.column))
    np.testing.assert_array_equal(back, np.stack([run.column, run.row], axis=1))
    filtered = open_space_ranger(folder)
    assert filtered.n_bins == run.in_tissue.sum() and filtered.in_tissue.all()


def test_scanpy_reads_bins_and_cells_and_they_agree(turned):
    """Space Ranger 4's cell matrix is the bins' matrix summed by its own table of barcodes."""
    import scanpy

    folder, _ = turned
    outs = folder / "outs"
    bins = scanpy.read_10x_h5(outs / "binned_outputs/square_002um/raw_feature_bc_matrix.h5")
    cells = scanpy.read_10x_h5(outs / "segmented_outputs/filtered_feature_cell_matrix.h5")
    mapping = pd.read_parquet(outs / "barcode_mappings.parquet").set_index("square_002um")
    owner = mapping["cell_id"].reindex(bins.obs_names)
    known = owner.notna().to_numpy()
    at = cells.obs_names.get_indexer(owner[known])
    assert (at >= 0).all()
    sums = sp.csr_matrix((np.ones(known.sum()), (at, np.flatnonzero(known))), shape=(cells.n_obs, bins.n_obs)) @ bins.X
    assert abs(sums - cells.X).max() == 0
    assert (mapping["in_cell"] == mapping["cell_id"].notna()).all() and (
        mapping["in_cell"] | ~mapping["in_nucleus"]
    ).all()


def test_outlines_are_the_true_nuclei(turned):
    folder, spec = turned
    labels = np.load(folder / "truth" / "labels.npy")
    names, shapes = read_outlines(folder / "outs/segmented_outputs/nucleus_segmentations.geojson", spec.um_per_px)
    area = np.bincount(labels.ravel())[1:] * spec.um_per_px**2
    numbers = np.array([int(name[7:16]) for name in names])
    np.testing.assert_array_equal(numbers, 1 + np.flatnonzero(area))
    # A contour through the pixels' edges cuts their corners.
    large = area[numbers - 1] > 10
    np.testing.assert_allclose([s.area for s in shapes[large]], area[numbers - 1][large], rtol=0.12)


def test_the_picture_shows_the_nuclei_where_the_truth_has_them(turned):
    """Pixels of nuclei are darker than others; BigTIFF in tiles, with reduced levels."""
    import tifffile

    folder, spec = turned
    labels = np.load(folder / "truth" / "labels.npy")
    with tifffile.TiffFile(folder / "HE.tif") as file:
        assert file.is_bigtiff and file.pages[0].is_tiled
    with SlideImage(folder / "HE.tif") as image:
        assert image.um_per_px == pytest.approx(spec.um_per_px)
        pixels = image.window((0, image.height), (0, image.width))
    assert pixels.shape[:2] == labels.shape == (spec.height_px, spec.width_px)
    tissue = np.zeros(labels.shape, bool)
    low = round(spec.pad_um / spec.um_per_px) + 2
    tissue[low:-low, low:-low] = True
    red = pixels[..., 0].astype(float)
    assert red[tissue & (labels > 0)].mean() < red[tissue & (labels == 0)].mean() - 30
    assert red[:10].mean() > 230


def test_without_diffusion_every_umi_lies_at_its_nucleus(sharp):
    folder, spec = sharp
    cells, molecules, _ = truth(folder)
    labels = np.load(folder / "truth" / "labels.npy")
    side = round(2.0 / spec.um_per_px)
    for row, column, cell in molecules[["array_row", "array_col", "cell"]].drop_duplicates().to_numpy():
        x, y = np.rint((spec.grid_corner + np.array([column, row]) * 2.0) / spec.um_per_px).astype(int)
        assert cell in labels[y : y + side, x : x + side] or cells["n_umi"][cell - 1] == 0 or not (labels == cell).any()
    assert (cells["n_umi_on_grid"] == cells["n_umi"]).all()


def test_diffusion_adds_its_variance(sharp, tmp_path):
    """The same UMIs with a step of 3 um: each axis spreads by 9 um2 about the cell's centre."""
    folder, spec = sharp
    write_slide(tmp_path / "spread", SlideSpec(**{**vars_of(spec), "sigma_um": 3.0, "border_um": 28.0}))

    def variance(place):
        cells, molecules, _ = truth(place)
        layout = SlideSpec(**spec_of(place))
        where = layout.centres(molecules["array_row"].to_numpy(), molecules["array_col"].to_numpy())
        centre = cells[["x_um", "y_um"]].to_numpy()[molecules["cell"].to_numpy() - 1]
        return np.average((where - centre) ** 2, axis=0, weights=molecules["n"])

    np.testing.assert_allclose(variance(tmp_path / "spread") - variance(folder), 9.0, rtol=0.05)


def vars_of(spec):
    from dataclasses import asdict

    return asdict(spec)


def spec_of(folder):
    stored = json.loads((folder / "truth" / "spec.json").read_text())
    stored.pop("genes")
    return {**stored, "misregistration_um": tuple(stored["misregistration_um"])}


def test_equal_specs_write_equal_slides_and_distinct_repeats(tmp_path):
    spec = SlideSpec(seed=2, columns=3, distinct=2, detection=0.5, **SMALL)
    for name in ("a", "b"):
        write_slide(tmp_path / name, spec)
    first, again = (truth(tmp_path / name) for name in ("a", "b"))
    pd.testing.assert_frame_equal(first[0], again[0])
    pd.testing.assert_frame_equal(first[1], again[1])
    cells = first[0]
    sections = [cells[cells["section"] == i].reset_index(drop=True) for i in range(3)]
    np.testing.assert_allclose(sections[2]["x_um"] - sections[0]["x_um"], 2 * spec.section_um)
    assert len(sections[0]) != len(sections[1]) or not np.allclose(sections[0]["y_um"], sections[1]["y_um"])
    # The repeated section has the same RNA, but every transcript takes its own way.
    n = first[1].merge(cells[["cell", "section"]], on="cell").groupby("section")["n"].size()
    assert n[0] != n[2]


def test_misregistration_is_written_to_the_places_alone(tmp_path):
    spec = SlideSpec(seed=9, misregistration_um=(5.0, -3.0), **SMALL)
    write_slide(tmp_path / "off", spec)
    run = open_space_ranger(tmp_path / "off", raw=True)
    np.testing.assert_allclose(run.xy_um - spec.centres(run.row, run.column), [[5.0, -3.0]] * run.n_bins, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rows": 0}, "0 x 1 sections"),
        ({"sigma_um": -1.0}, "sigma_um must be 0 to 20"),
        ({"rotation_deg": 90.0}, "-45 to 45"),
        ({"version": 5}, "version is 5"),
        ({"version": 4, "rows": 30, "columns": 30}, "up to 200 million px"),
    ],
)
def test_slides_that_cannot_be_are_refused(change, text):
    with pytest.raises(BadInput, match=text):
        SlideSpec(**change)


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(BadInput, match="there exists"):
        write_slide(tmp_path / "there", SlideSpec(**SMALL))
    assert not list((tmp_path / "there").iterdir())
