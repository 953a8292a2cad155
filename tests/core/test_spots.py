"""Spot data: a spot is one row and says so, scale by the grid's pitch, every UMI accounted for, real ST sections."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from PIL import Image

from ge2hist_core.prepare import Settings, prepare, recognise
from ge2hist_core.rng import stream
from ge2hist_core.slide_cells import clusters
from ge2hist_core.spots import on_tissue, open_st, open_visium, tissue_check
from ge2hist_core.store import TissueStore
from ge2hist_core.types import BadInput

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "her2st"
UM_PER_PX = 0.8
GENES = [f"G{i}" for i in range(12)]


def paint(width: int, height: int, shape: np.ndarray) -> np.ndarray:
    """Pink tissue with noise where ``shape`` (um corners x0, y0, x1, y1) says, glass elsewhere."""
    x0, y0, x1, y1 = (shape / UM_PER_PX).round().astype(int)
    picture = np.full((height, width, 3), 238, dtype=np.int16)
    picture[y0:y1, x0:x1] = (190, 120, 170)
    picture += stream(0, "paper").integers(-6, 7, picture.shape).astype(np.int16)
    return picture.clip(0, 255).astype(np.uint8)


def write_section(
    folder: Path, name: str, seed: int, genes: list[str], columns: int = 6, rows: int = 4
) -> pd.DataFrame:
    """A section 200 um apart; the first spot is not selected. Returns all counts."""
    draw = stream(seed, "st test")
    grid = np.array([(x, y) for x in range(3, 3 + columns) for y in range(5, 5 + rows)])
    um = (grid - [3, 5]) * 200.0 + [300.0, 200.0]
    counts = pd.DataFrame(draw.poisson(9.0, (len(grid), len(genes))), columns=genes)
    counts.index = [f"{x}x{y}" for x, y in grid]
    counts.to_csv(folder / f"{name}.counts.tsv.gz", sep="\t")
    spots = pd.DataFrame(
        {"x": grid[:, 0], "y": grid[:, 1], "pixel_x": um[:, 0] / UM_PER_PX, "pixel_y": um[:, 1] / UM_PER_PX,
         "selected": np.arange(len(grid)).clip(0, 1), "annotation": np.where(um[:, 0] > 1000, "invasive", "stroma")}
    )  # fmt: skip
    spots.sample(frac=1.0, random_state=seed).to_csv(folder / f"{name}.spots.tsv", sep="\t", index=False)
    # Tissue wide and low, right of the middle: turned or mirrored it lies elsewhere.
    picture = paint(2400, 1500, np.array([200.0, 100.0, 1400.0, 900.0]))
    Image.fromarray(picture).save(folder / f"{name}.png")
    return counts


@pytest.fixture(scope="module")
def st(tmp_path_factory):
    folder = tmp_path_factory.mktemp("st")
    return folder, {"A1": write_section(folder, "A1", 1, GENES), "A2": write_section(folder, "A2", 2, GENES[::-1][:-1])}


@pytest.fixture(scope="module")
def prepared(st, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "lab.zarr"
    settings = Settings(st[0], None, out, um_per_px=1.0, min_umi=1, label_column="annotation")
    return prepare(settings), TissueStore(out), settings


def test_a_row_is_a_spot_and_says_so(prepared):
    report, store, _ = prepared
    assert set(store.obs["unit"]) == {"spot"} and report["unit"] == "spot"
    assert set(store.obs["spot_diameter_um"]) == {100.0} and report["tile_um"] == 128.0
    assert store.donors == ["A1", "A2"] and len(store) == 2 * 23
    # Circles of 100 um, painted by their pixels' centres.
    np.testing.assert_allclose(store.obs["area_um2"], np.pi * 50**2, rtol=0.02)


def test_spots_keep_their_counts_under_their_genes(st, prepared):
    """Sections measure different genes in another order; one that a section lacks has no counts there."""
    _, store, _ = prepared
    for donor, counts in st[1].items():
        mine = (store.obs["donor"] == donor).to_numpy()
        expected = counts.reindex(columns=store.var.index, fill_value=0).loc[store.obs["slide_cell"][mine]]
        np.testing.assert_array_equal(store.cells.counts[mine].toarray(), expected)


def test_every_umi_is_accounted_for(st, prepared):
    report, store, _ = prepared
    total = sum(int(counts.to_numpy().sum()) for counts in st[1].values())
    unselected = sum(int(counts.loc["3x5"].sum()) for counts in st[1].values())
    assert report["umi"]["total"] == total and report["umi"]["spot_not_selected"] == unselected
    assert report["umi"]["assigned"] == int(store.cells.counts.sum()) == total - unselected


def test_scale_follows_from_the_pitch(prepared):
    report, store, _ = prepared
    assert report["sections"]["A1"]["image"]["um_per_px"] == pytest.approx(UM_PER_PX, rel=1e-6)
    mine = store.obs[store.obs["donor"] == "A1"]
    place = mine["slide_cell"].str.split("x", expand=True).astype(float).to_numpy()
    np.testing.assert_allclose(
        mine[["x_image_px", "y_image_px"]].to_numpy() * UM_PER_PX, (place - [3, 5]) * 200 + [300, 200], atol=1e-6
    )
    labels = {tuple(row) for row in zip(mine["x_image_px"] * UM_PER_PX > 1000, mine["cell_type"], strict=True)}
    assert labels == {(True, "invasive"), (False, "stroma")}


def test_sections_are_held_out_whole_and_spots_checked_against_tissue(prepared):
    report, _, settings = prepared
    assert report["regions"] == {"A1": 23, "A2": 23}
    check = report["registration"]["A1"]
    assert check == {"spots_on_tissue": 1.0, "best_orientation": "as given", "warning": None}
    assert (settings.work / "registration-A1.png").stat().st_size > 5_000


def test_swapped_x_and_y_are_noticed(st, tmp_path):
    for file in st[0].glob("A1.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    picture = Image.open(tmp_path / "A1.png").transpose(Image.Transpose.TRANSPOSE)
    picture.save(tmp_path / "A1.png")
    section = open_st(tmp_path)[0]
    figures, warning = tissue_check(section)
    section.image.close()
    assert figures["spots_on_tissue"] < 0.8 and "the wrong way round" in warning


def test_tissue_is_told_from_glass(st):
    section = open_st(st[0])[0]
    found = on_tissue(section.image)
    section.image.close()
    truth = np.zeros(found.shape, dtype=bool)
    truth[5:45, 10:70] = True  # 100 to 900 um, 200 to 1400 um
    assert (found == truth).mean() > 0.97


def test_a_tile_smaller_than_a_spot_is_said(st, tmp_path, capsys):
    report = prepare(Settings(st[0], None, tmp_path / "a.zarr", um_per_px=0.5, min_umi=1, clusters=2))
    assert "A tile is 64 um wide and shows a part of a spot of 100 um" in report["warnings"][0]
    assert set(report["cell_types"]) == {"Cluster 1", "Cluster 2"}


def test_clusters_find_planted_groups_whatever_the_depth():
    draw = np.random.default_rng(0)
    kind = np.repeat([0, 1, 2], (60, 40, 20))
    mean = np.full((120, 30), 1.0)
    for k in range(3):
        mean[kind == k, 10 * k : 10 * k + 10] = 12.0
    counts = sp.csr_matrix(draw.poisson(mean * draw.uniform(0.3, 3.0, (120, 1))).astype(np.float32))
    names, confidence = clusters(counts, 3)
    assert (names == np.array([f"Cluster {k + 1}" for k in kind])).mean() > 0.97
    assert confidence.min() >= 0 and confidence.max() <= 1
    with pytest.raises(BadInput, match="clusters is 500"):
        clusters(counts, 500)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("A1.spots.tsv", "x\ty\n1\t2\n", "no column 'pixel_x'"),
        ("A1.spots.tsv", "x\ty\tpixel_x\tpixel_y\n90\t90\t1\t1\n", "No spot of A1.spots.tsv is a row"),
        ("A1.spots.tsv", None, "A1.spots.tsv is missing"),
        ("A1.png", None, "has no picture"),
        ("A1.jpg", "x", "has 2 pictures"),
        ("A1.counts.tsv.gz", "no gzip", "truncated or damaged"),
    ],
)
def test_sections_that_cannot_be_used(st, tmp_path, name, text, match):
    for file in st[0].glob("A1.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=match):
        open_st(tmp_path)


def test_places_that_are_no_grid_and_values_that_are_no_counts_are_refused(st, tmp_path):
    for file in st[0].glob("A1.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spots = pd.read_csv(tmp_path / "A1.spots.tsv", sep="\t")
    shuffled = spots.assign(pixel_x=stream(0, "s").permutation(spots["pixel_x"].to_numpy()))
    shuffled.to_csv(tmp_path / "A1.spots.tsv", sep="\t", index=False)
    with pytest.raises(BadInput, match="do not lie on a regular grid"):
        open_st(tmp_path)
    spots.to_csv(tmp_path / "A1.spots.tsv", sep="\t", index=False)
    (st[1]["A1"] * 0.5).to_csv(tmp_path / "A1.counts.tsv.gz", sep="\t")
    with pytest.raises(BadInput, match="no raw counts"):
        open_st(tmp_path)


# --- Visium -------------------------------------------------------------------------------------------------------


def write_visium(folder: Path, old: bool = False) -> np.ndarray:
    """A hexagonal grid 100 um apart; every fifth spot outside the tissue. Returns counts ``[spot, feature]``."""
    draw = stream(5, "visium test")
    (folder / "spatial").mkdir(parents=True)
    grid = np.array([(r, c) for r in range(12) for c in range(r % 2, 20, 2)])
    um = np.stack([grid[:, 1] * 50.0, grid[:, 0] * 100 * np.sqrt(0.75)], axis=1) + 150.0
    px = um / UM_PER_PX
    names = np.array([f"ACGT{i:08d}-1" for i in range(len(grid))])
    table = pd.DataFrame(
        {"barcode": names, "in_tissue": (np.arange(len(grid)) % 5 > 0).astype(int), "array_row": grid[:, 0],
         "array_col": grid[:, 1], "pxl_row_in_fullres": px[:, 1].round().astype(int),
         "pxl_col_in_fullres": px[:, 0].round().astype(int)}
    ).sample(frac=1.0, random_state=0)  # fmt: skip
    name = "tissue_positions_list.csv" if old else "tissue_positions.csv"
    table.to_csv(folder / "spatial" / name, index=False, header=not old)
    scales = {"spot_diameter_fullres": 65.0 / UM_PER_PX, "tissue_hires_scalef": 0.25}
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    features = [*GENES, GENES[3]]  # one symbol of two Ensembl genes
    counts = draw.poisson(4.0, (len(grid), len(features)))
    matrix = sp.csr_matrix(counts)
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        for key, value in (("data", matrix.data), ("indices", matrix.indices), ("indptr", matrix.indptr)):
            group.create_dataset(key, data=value)
        group.create_dataset("shape", data=np.array(matrix.shape[::-1], dtype=np.int32))
        group.create_dataset("barcodes", data=names.astype("S"))
        about = group.create_group("features")
        for key, value in (
            ("id", [f"ENSG{i}" for i in range(len(features))]),
            ("name", features),
            ("feature_type", ["Gene Expression"] * len(features)),
            ("genome", ["GRCh38"] * len(features)),
        ):
            about.create_dataset(key, data=np.array(value, dtype="S"))
    picture = paint(1700, 1700, np.array([100.0, 100.0, 1200.0, 1150.0]))
    Image.fromarray(picture).save(folder.parent / "HE.png")
    Image.fromarray(picture).resize((425, 425)).save(folder / "spatial" / "tissue_hires_image.png")
    return counts


@pytest.mark.parametrize("old", [False, True])
def test_a_visium_run_becomes_spots(tmp_path, old):
    counts = write_visium(tmp_path / "outs", old)
    assert recognise(tmp_path) == recognise(tmp_path / "outs") == "visium"
    section = open_visium(tmp_path, tmp_path / "HE.png")
    section.image.close()
    tissue = np.arange(len(counts)) % 5 > 0
    merged = counts[:, :12].copy()
    merged[:, 3] += counts[:, 12]
    np.testing.assert_array_equal(section.counts.toarray(), merged[tissue])
    assert section.dropped == {"outside_tissue": counts[~tissue].sum()} and section.spot_um == 55.0
    assert section.image.um_per_px == pytest.approx(UM_PER_PX, rel=2e-3)
    row, column = section.obs["array_row"], section.obs["array_col"]
    expected = np.stack([column * 50.0, row * 100 * np.sqrt(0.75)], axis=1) + 150.0
    np.testing.assert_allclose(section.xy_um, expected, atol=1.5)  # places are whole px


def test_visium_without_its_picture_takes_the_reduced_one_and_says_so(tmp_path):
    write_visium(tmp_path / "outs")
    report = prepare(Settings(tmp_path / "outs", None, tmp_path / "a.zarr", min_umi=1, regions="1x1"))
    assert "shows no nuclei" in report["warnings"][0] and report["unit"] == "spot"
    assert report["sections"]["a"]["image"]["um_per_px"] == pytest.approx(4 * UM_PER_PX, rel=2e-3)
    assert report["registration"]["a"]["spots_on_tissue"] > 0.95


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"spot_diameter_fullres": 20.0, "tissue_hires_scalef": 0.25}, "By the pitch of the spots a spot"),
        ({"tissue_hires_scalef": 0.25}, "scalefactors_json.json is truncated or damaged"),
    ],
)
def test_scale_factors_that_cannot_be(tmp_path, change, match):
    write_visium(tmp_path / "outs")
    (tmp_path / "outs/spatial/scalefactors_json.json").write_text(json.dumps(change))
    with pytest.raises(BadInput, match=match):
        open_visium(tmp_path / "outs", tmp_path / "HE.png")


def test_another_genome_is_refused(tmp_path):
    write_visium(tmp_path / "outs")
    with pytest.raises(BadInput, match="genome GRCh38, expected mm10"):
        open_visium(tmp_path / "outs", tmp_path / "HE.png", genome="mm10")


def test_what_is_no_slide_is_said(tmp_path):
    with pytest.raises(BadInput, match="holds nothing known: give a Visium HD run .* or a folder of ST sections"):
        recognise(tmp_path)
    with pytest.raises(BadInput, match="is not a folder"):
        recognise(tmp_path / "absent")


# --- Real sections ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data are not beside the project")
def test_a_real_section_is_read_whole(tmp_path):
    """HER2+ breast cancer: 187 spots, nearly all on tissue, about 0.69 um per px, the counts' own sum."""
    for file in SHARED.glob("C2.*"):
        (tmp_path / file.name).symlink_to(file)
    section = open_st(tmp_path)[0]
    figures, warning = tissue_check(section)
    section.image.close()
    raw = pd.read_csv(SHARED / "C2.counts.tsv.gz", sep="\t", index_col=0)
    assert len(section.names) == 187 and section.image.um_per_px == pytest.approx(0.69, abs=0.01)
    assert int(section.counts.sum()) + sum(section.dropped.values()) == int(raw.to_numpy().sum())
    assert figures["spots_on_tissue"] > 0.9 and warning is None
