"""A Xenium folder of known truth, its H&E turned against the stage: true nuclei, every transcript accounted for."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import tifffile

from ge2hist_core.prepare import Settings, prepare, recognise
from ge2hist_core.rng import stream
from ge2hist_core.simulator.expression import draw_counts, load_genes
from ge2hist_core.simulator.rendering import render
from ge2hist_core.simulator.tissue import simulate_section
from ge2hist_core.slide_cells import Account, outlines_of_labels, project, scale_of
from ge2hist_core.store import TissueStore
from ge2hist_core.types import BadInput
from ge2hist_core.xenium import open_xenium, read_alignment

PIXEL_UM, HE_UM = 0.2125, 0.5
ANGLE = np.deg2rad(17.0)
CONTROL = "NegControlProbe_00042"


@dataclass(frozen=True, eq=False)
class Truth:
    """What was written: xy of nuclei in um of the H&E, transcripts per nucleus and gene, and per cell and gene."""

    folder: Path
    xy_um: np.ndarray
    names: np.ndarray
    nuclear: np.ndarray
    whole: np.ndarray
    transcripts: pd.DataFrame

    @property
    def image(self) -> Path:
        return self.folder.parent / "HE.ome.tif"

    @property
    def alignment(self) -> Path:
        return self.folder.parent / "alignment.csv"


def he_to_morphology() -> np.ndarray:
    """Turned, mirrored and moved, as a slide that is scanned again."""
    k = HE_UM / PIXEL_UM
    turn = np.array([[np.cos(ANGLE), -np.sin(ANGLE), 0], [np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1]])
    return np.array([[1, 0, 4000], [0, 1, 1500], [0, 0, 1.0]]) @ turn @ np.diag([-k, k, 1.0])


def write_xenium(root: Path, seed: int = 3, size_um: float = 160.0) -> Truth:
    """Half of a nucleus' transcripts around it, a tenth of all of low quality, some of no cell, some control probes."""
    folder = root / "outs"
    folder.mkdir(parents=True)
    tissue = simulate_section(seed, 0, size_um)
    image, labels = render(tissue, seed)
    counts = draw_counts(tissue).tocoo()
    genes = np.array([str(name) for name in load_genes().symbols])
    draw = stream(seed, "xenium test")
    ids, shapes = outlines_of_labels(labels)
    names = np.array([f"aaaa{i:04d}-1" for i in ids], dtype=object)
    to_stage = np.diag([PIXEL_UM, PIXEL_UM, 1.0]) @ he_to_morphology()

    cell, gene = (np.repeat(v, counts.data.astype(int)) for v in (counts.row + 1, counts.col))
    drawn = np.isin(cell, ids) & (draw.random(len(cell)) < 0.25)  # a panel catches a part
    cell, gene = cell[drawn], gene[drawn]
    rows, columns = np.nonzero(labels)
    order = np.argsort(labels[rows, columns], kind="stable")
    starts = np.searchsorted(labels[rows, columns][order], cell)
    n_px = np.bincount(labels.ravel())[cell]
    pick = order[starts + (draw.random(len(cell)) * n_px).astype(int)]
    px = np.stack([columns[pick], rows[pick]], axis=1) + draw.random((len(cell), 2))
    table = pd.DataFrame(
        {
            "cell_id": names[np.searchsorted(ids, cell)],
            "overlaps_nucleus": (draw.random(len(cell)) < 0.6).astype(np.uint8),
            "feature_name": genes[gene],
            "qv": np.where(draw.random(len(cell)) < 0.1, 12.0, 35.0).astype(np.float32),
        }
    )
    table.loc[draw.random(len(table)) < 0.05, "cell_id"] = "UNASSIGNED"
    table.loc[table["cell_id"] == "UNASSIGNED", "overlaps_nucleus"] = 0
    table.loc[draw.random(len(table)) < 0.01, "feature_name"] = CONTROL
    table[["x_location", "y_location"]] = project(to_stage, px)
    table.to_parquet(folder / "transcripts.parquet", row_group_size=7000)

    good = table[(table["qv"] >= 20) & (table["feature_name"] != CONTROL) & (table["cell_id"] != "UNASSIGNED")]
    whole, nuclear = (
        pd.crosstab(part["cell_id"], part["feature_name"]).reindex(index=names, columns=genes, fill_value=0).to_numpy()
        for part in (good, good[good["overlaps_nucleus"] == 1])
    )
    features = [*genes, CONTROL]
    matrix = sp.csr_matrix(np.column_stack([whole, np.zeros(len(whole), int)]))
    with h5py.File(folder / "cell_feature_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        for key, value in (("data", matrix.data), ("indices", matrix.indices), ("indptr", matrix.indptr)):
            group.create_dataset(key, data=value)
        group.create_dataset("shape", data=np.array(matrix.shape[::-1], dtype=np.int32))
        group.create_dataset("barcodes", data=names.astype("S"))
        about = group.create_group("features")
        about.create_dataset("id", data=np.array([f"ENSG{i:05d}" for i in range(len(features))], dtype="S"))
        about.create_dataset("name", data=np.array(features, dtype="S"))
        kinds = ["Gene Expression"] * len(genes) + ["Negative Control Probe"]
        about.create_dataset("feature_type", data=np.array(kinds, dtype="S"))
    xy_px = np.array([[s.centroid.x, s.centroid.y] for s in shapes])
    centre = project(to_stage, xy_px)
    cells = pd.DataFrame({"cell_id": names, "x_centroid": centre[:, 0], "y_centroid": centre[:, 1]})
    cells.sample(frac=1.0, random_state=0).to_parquet(folder / "cells.parquet")
    for name, grow in (("nucleus", 0.0), ("cell", 4.0)):
        parts = []
        for i, (cell_name, shape) in enumerate(zip(names, shapes, strict=True), start=1):
            ring = project(to_stage, np.asarray(shape.buffer(grow).exterior.coords))
            parts.append(
                pd.DataFrame({"cell_id": cell_name, "vertex_x": ring[:, 0], "vertex_y": ring[:, 1], "label_id": i})
            )
        pd.concat(parts).to_parquet(folder / f"{name}_boundaries.parquet")
    specs = {"pixel_size": PIXEL_UM, "panel_organism": "Human", "analysis_sw_version": "xenium-3.1.0.4"}
    (folder / "experiment.xenium").write_text(json.dumps(specs))
    per_cm = 1e4 / HE_UM
    tifffile.imwrite(root / "HE.ome.tif", image, tile=(256, 256), photometric="rgb", compression="zlib",
                     ome=False, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER")  # fmt: skip
    np.savetxt(root / "alignment.csv", he_to_morphology(), delimiter=",")
    return Truth(folder, xy_px * HE_UM, names, nuclear, whole, table)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return write_xenium(tmp_path_factory.mktemp("xenium"))


@pytest.fixture(scope="module")
def prepared(truth, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "lab.zarr"
    settings = Settings(truth.folder, truth.image, out, alignment=truth.alignment, min_umi=1, regions="1x1")
    return settings, prepare(settings), TissueStore(out)


def read(truth, **options):
    options = {"image": truth.image, "alignment": truth.alignment} | options
    section = open_xenium(truth.folder, **options)
    section.image.close()
    return section


def test_it_is_recognised(truth):
    assert recognise(truth.folder) == "xenium"


def test_nuclei_get_exactly_their_own_transcripts(truth, prepared):
    _, _, store = prepared
    at = pd.Index(truth.names).get_indexer(store.obs["slide_cell"])
    genes = pd.Index([str(name) for name in load_genes().symbols]).get_indexer(store.var.index)
    np.testing.assert_array_equal(store.cells.counts.toarray(), truth.nuclear[at][:, genes])
    assert len(store) == (truth.nuclear.sum(axis=1) > 0).sum()
    assert set(store.obs["unit"]) == {"nucleus"} and CONTROL not in store.var.index


def test_every_transcript_of_a_gene_is_accounted_for(truth, prepared):
    """Against sums of the written table by pandas."""
    _, report, store = prepared
    table = truth.transcripts[truth.transcripts["feature_name"] != CONTROL]
    good = table[table["qv"] >= 20]
    inside = good["cell_id"] != "UNASSIGNED"
    parts = report["umi"]
    assert parts["total"] == len(table) and parts["low_quality"] == len(table) - len(good)
    assert parts["no_cell"] == (~inside).sum()
    assert parts["outside_nucleus"] == (inside & (good["overlaps_nucleus"] == 0)).sum()
    assert parts["assigned"] == int(store.cells.counts.sum())
    assert report["sections"]["lab"]["control_transcripts"] == (truth.transcripts["feature_name"] == CONTROL).sum()
    assert report["sections"]["lab"]["matrix_agreement"] == 1.0
    with pytest.raises(ValueError, match="are accounted for"):
        Account(10, {"assigned": 9})


def test_nuclei_lie_where_the_picture_shows_them(truth, prepared):
    """The picture is turned by 17 degrees, mirrored and scaled against the stage."""
    settings, report, store = prepared
    at = pd.Index(truth.names).get_indexer(store.obs["slide_cell"])
    found = store.obs[["x_image_px", "y_image_px"]].to_numpy() * HE_UM
    np.testing.assert_allclose(found, truth.xy_um[at], atol=0.02)
    check = report["registration"]["lab"]
    assert check["warning"] is None and np.hypot(*check["shift_um"]) < 1.5
    assert (settings.work / "registration.png").stat().st_size > 10_000
    assert report["sections"]["lab"]["image"]["um_per_px"] == pytest.approx(HE_UM, rel=1e-6)


def test_an_alignment_that_is_off_is_measured(truth, tmp_path):
    matrix = he_to_morphology() @ np.array([[1, 0, 8.0 / HE_UM], [0, 1, -6.0 / HE_UM], [0, 0, 1]])
    np.savetxt(tmp_path / "off.csv", matrix, delimiter=",")
    settings = Settings(truth.folder, truth.image, tmp_path / "a.zarr", alignment=tmp_path / "off.csv", regions="1x1")
    report = prepare(settings)
    # The matrix says that a px of the H&E lies 8, -6 um further: cells are drawn so much the other way.
    np.testing.assert_allclose(report["registration"]["a"]["shift_um"], [8.0, -6.0], atol=1.0)
    assert "--shift-um=" in report["registration"]["a"]["warning"] and report["warnings"]


def test_whole_cells_are_the_matrix(truth):
    section = read(truth, whole_cells=True)
    assert section.unit == "cell" and list(section.names) == list(truth.names)
    np.testing.assert_array_equal(section.counts.toarray(), truth.whole)


def test_older_files_read_alike(truth, tmp_path):
    """Version 1.0: whole numbers as ids, bytes as gene names, CSV, no numbers of nuclei."""
    folder = tmp_path / "outs"
    folder.mkdir()
    number = {name: i + 1 for i, name in enumerate(truth.names)} | {"UNASSIGNED": -1}
    (folder / "experiment.xenium").write_text(json.dumps({"pixel_size": PIXEL_UM}))
    for name in ("cells", "nucleus_boundaries", "transcripts"):
        table = pd.read_parquet(truth.folder / f"{name}.parquet")
        table["cell_id"] = table["cell_id"].map(number)
        table.drop(columns="label_id", errors="ignore").to_csv(folder / f"{name}.csv.gz", index=False)
    (folder / "cell_feature_matrix.h5").write_bytes((truth.folder / "cell_feature_matrix.h5").read_bytes())
    with h5py.File(folder / "cell_feature_matrix.h5", "r+") as file:
        del file["matrix/barcodes"]
        file["matrix"].create_dataset("barcodes", data=np.arange(1, len(truth.names) + 1).astype("S"))
    section = open_xenium(folder, truth.image, truth.alignment)
    section.image.close()
    np.testing.assert_array_equal(section.counts.toarray(), truth.nuclear)
    table = pd.read_csv(folder / "transcripts.csv.gz")
    table["feature_name"] = table["feature_name"].str.encode("utf-8")
    (folder / "transcripts.csv.gz").unlink()
    table.to_parquet(folder / "transcripts.parquet")
    again = open_xenium(folder, truth.image, truth.alignment)
    again.image.close()
    np.testing.assert_array_equal(again.counts.toarray(), truth.nuclear)


def test_without_transcripts_whole_cells_are_counted_and_said(truth, tmp_path):
    for file in truth.folder.iterdir():
        if file.name != "transcripts.parquet":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    section = open_xenium(tmp_path, truth.image, truth.alignment)
    section.image.close()
    assert section.unit == "cell" and "whole cells were counted" in section.warnings[0]
    np.testing.assert_array_equal(section.counts.toarray(), truth.whole)
    # The map for the registration: each cell's counts at its own centre, whatever the order of the tables.
    order = np.lexsort(section.density[0].T)
    ours = np.lexsort(truth.xy_um.T)
    np.testing.assert_allclose(section.density[0][order], truth.xy_um[ours], atol=0.02)
    np.testing.assert_array_equal(section.density[1][order], truth.whole.sum(axis=1)[ours])


def test_a_homography_is_applied_point_by_point():
    matrix = np.array([[1.1, 0.2, 3.0], [-0.1, 0.9, 5.0], [1e-5, 2e-5, 1.0]])
    xy = np.array([[10.0, 20.0], [300.0, 5.0]])
    full = np.column_stack([xy, np.ones(2)]) @ matrix.T
    np.testing.assert_allclose(project(matrix, xy), full[:, :2] / full[:, 2:])
    step = 1e-4
    for point in xy:
        corners = project(matrix, point + step * np.array([[0, 0], [1, 0], [0, 1]]))
        area = abs(np.linalg.det(corners[1:] - corners[0])) / step**2
        assert scale_of(matrix, point[None]) == pytest.approx(np.sqrt(area), rel=1e-3)
    with pytest.raises(BadInput, match="scales by"):
        scale_of(np.array([[1, 0, 0], [0, 1, 0], [1e-2, 0, 1.0]]), np.array([[0, 0], [300.0, 0]]))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1,0\n0,1\n", "2 x 2 numbers"),
        ("1,0,0\n1,0,0\n0,0,1\n", "without an inverse"),
        ("fixedX,fixedY,alignmentX\n1,2,3\n", "no alignment matrix"),
        (None, "does not exist"),
    ],
)
def test_alignments_that_cannot_be(tmp_path, text, match):
    if text is not None:
        (tmp_path / "m.csv").write_text(text)
    with pytest.raises(BadInput, match=match):
        read_alignment(tmp_path / "m.csv")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _rename_cells(path: Path) -> None:
    table = pd.read_parquet(path)
    table["cell_id"] = "other-" + table["cell_id"].astype(str)
    table.to_parquet(path)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("transcripts.parquet", _cut, "transcripts.parquet is truncated or damaged"),
        ("cell_feature_matrix.h5", _cut, "cell_feature_matrix.h5 is truncated or damaged"),
        ("cells.parquet", Path.unlink, "cells.parquet is missing"),
        ("experiment.xenium", lambda p: p.write_text("{}"), "experiment.xenium is truncated or damaged"),
        ("cells.parquet", _rename_cells, "0 in common: the two are of different runs"),
        ("transcripts.parquet", _rename_cells, "that cell_feature_matrix.h5 does not hold"),
        ("nucleus_boundaries.parquet", _rename_cells, "outlines none of the"),
    ],
)
def test_folders_that_cannot_be_used(truth, tmp_path, name, change, match):
    for file in truth.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path / name)
    with pytest.raises(BadInput, match=match):
        open_xenium(tmp_path, truth.image, truth.alignment)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"genome": "mm10"}, "The panel is of human genes, expected mm10"),
        ({"alignment": None}, "No cell lies within HE.ome.tif .* --alignment"),
    ],
)
def test_what_does_not_fit_the_picture_is_refused(truth, options, match):
    with pytest.raises(BadInput, match=match):
        read(truth, **options)


def test_a_scale_that_contradicts_the_picture_is_refused(truth, tmp_path):
    centre = truth.xy_um.mean(axis=0) / HE_UM
    about = np.array([[1.2, 0, -0.2 * centre[0]], [0, 1.2, -0.2 * centre[1]], [0, 0, 1]])
    np.savetxt(tmp_path / "m.csv", he_to_morphology() @ about, delimiter=",")
    with pytest.raises(BadInput, match="0.5 um per pixel, by the alignment matrix 0.6"):
        read(truth, alignment=tmp_path / "m.csv")


def test_cut_gzip_is_said(truth, tmp_path):
    for file in truth.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = pd.read_parquet(tmp_path / "cells.parquet").to_csv(index=False).encode()
    (tmp_path / "cells.parquet").unlink()
    (tmp_path / "cells.csv.gz").write_bytes(gzip.compress(text)[:-200])
    with pytest.raises(BadInput, match="cells.csv.gz is truncated or damaged"):
        open_xenium(tmp_path, truth.image, truth.alignment)
