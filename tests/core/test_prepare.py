"""From a Space Ranger folder with known truth to the store: the true cells, every UMI accounted for, no leak."""

from __future__ import annotations

import json
import resource
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from ge2hist_core import cell_labels
from ge2hist_core.__main__ import run_command
from ge2hist_core.cell_labels import UNLABELLED, by_markers, by_table, read_label_table, read_markers
from ge2hist_core.config import TILE_PX, UM_PER_PX
from ge2hist_core.prepare import Settings, prepare, settings_of
from ge2hist_core.simulator.space_ranger import SlideSpec, recovery, write_slide
from ge2hist_core.slide_image import SlideImage
from ge2hist_core.store import TissueStore
from ge2hist_core.types import BadInput
from ge2hist_core.visium_hd import Ledger

COMMANDS = {"prepare": ("ge2hist_core.prepare", "prepare"), "slide": ("ge2hist_core.simulator.space_ranger", "slide")}


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """One section of 192 um as Space Ranger 4 writes it, the grid turned by 4 degrees, diffusion of 2 um."""
    folder = tmp_path_factory.mktemp("slide") / "s"
    write_slide(folder, SlideSpec(seed=11, section_um=192.0, rotation_deg=4.0, version=4))
    return folder


@pytest.fixture(scope="module")
def prepared(slide, tmp_path_factory):
    """By Space Ranger's own nuclei, in two regions: settings, report, store."""
    out = tmp_path_factory.mktemp("store") / "lab.zarr"
    settings = Settings(slide / "outs", slide / "HE.tif", out, segmenter="space-ranger", regions="1x2", keep=True)
    report = prepare(settings)
    return settings, report, TissueStore(out)


def mappings(settings):
    return settings.work / "barcode_mappings.parquet"


def test_every_umi_is_accounted_for(slide, prepared):
    """The report's ledger against scanpy's sum of the matrix, and the store against the bins that the table names."""
    import scanpy

    settings, report, store = prepared
    bins = scanpy.read_10x_h5(slide / "outs/binned_outputs/square_002um/filtered_feature_bc_matrix.h5")
    ledger = Ledger(**report["umi"])
    assert ledger.total == int(bins.X.sum())
    assert ledger.assigned == int(store.cells.counts.sum())
    assert min(ledger.no_nucleus, ledger.ambiguous, ledger.between_regions) > 0
    used = pd.read_parquet(mappings(settings))
    assert used["square_002um"].is_unique
    cell = store.obs.index.get_indexer(used["cell_id"])
    row = bins.obs_names.get_indexer(used["square_002um"])
    sums = sp.csr_matrix((np.ones(len(used)), (cell, row)), shape=(len(store), bins.n_obs)) @ bins.X
    np.testing.assert_array_equal(sums.toarray(), store.cells.counts.toarray())
    np.testing.assert_array_equal(store.obs["n_bins"], np.bincount(cell, minlength=len(store)))


def test_raw_bins_outside_the_tissue_have_a_line_of_their_own(slide, tmp_path):
    settings = Settings(slide / "outs", slide / "HE.tif", tmp_path / "a.zarr", segmenter="space-ranger", raw=True)
    report = prepare(settings)
    assert report["umi"]["outside_tissue"] > 0
    assert report["regions"].keys() == {"a"} and not (settings.work / "labels.npy").exists()


def test_the_true_cells_are_recovered(slide, prepared):
    settings, _, store = prepared
    figures = recovery(slide, store, mappings(settings))
    print("Space Ranger's outlines, diffusion 2 um:", figures)
    assert figures["matched"] > 0.95
    assert figures["umi_right"] > 0.85
    assert figures["correlation"] > max(0.8, figures["correlation_other"] + 0.15)


def test_without_diffusion_the_umis_are_in_the_right_cell(tmp_path):
    write_slide(
        tmp_path / "s", SlideSpec(seed=5, section_um=128.0, sigma_um=0.0, nuclear_share=1.0, ambient=0.0, version=4)
    )
    settings = Settings(
        tmp_path / "s" / "outs", tmp_path / "s" / "HE.tif", tmp_path / "a.zarr", segmenter="space-ranger"
    )
    prepare(settings)
    figures = recovery(tmp_path / "s", TissueStore(settings.out), mappings(settings))
    print("Space Ranger's outlines, no diffusion:", figures)
    assert figures["umi_right"] > 0.97 and figures["correlation"] > 0.9


def test_the_training_free_segmenter_recovers_most(slide, tmp_path):
    settings = Settings(slide / "outs", slide / "HE.tif", tmp_path / "a.zarr", workers=1)
    report = prepare(settings)
    figures = recovery(slide, TissueStore(settings.out), mappings(settings))
    print("training-free segmenter, diffusion 2 um:", figures)
    assert figures["matched"] > 0.75 and figures["recall"] > 0.6 and figures["correlation"] > 0.5
    assert report["segmenter"] == "classical"


def test_tiles_come_from_the_slide(slide, prepared):
    """The tile of a cell is the slide's picture about the place that the table names."""
    _, _, store = prepared
    rows = np.flatnonzero(store.interior)
    # A centre on the border of two pixels may be rounded either way.
    place = store.obs[["x_image_px", "y_image_px"]].to_numpy()[rows]
    rows = rows[(np.abs(place % 1 - 0.5) > 1e-6).all(axis=1)][::7]
    with SlideImage(slide / "HE.tif") as image:
        for row, tile in zip(rows, store.tiles(rows), strict=True):
            x, y = store.obs[["x_image_px", "y_image_px"]].to_numpy()[row]
            left, top = (int(np.floor(v + 0.5)) - TILE_PX // 2 for v in (x, y))
            expected = image.window((top, top + TILE_PX), (left, left + TILE_PX))
            np.testing.assert_array_equal(tile, expected)
    assert store.um_per_px == UM_PER_PX and store.simulation is None


def test_no_tile_of_one_region_shows_a_pixel_of_another(prepared):
    _, report, store = prepared
    assert store.donors == ["lab-r0c0", "lab-r0c1"] and report["gap_um"] == TILE_PX * UM_PER_PX
    rows = np.flatnonzero(store.interior)
    x = store.obs["x_image_px"].to_numpy()[rows]
    left = store.obs["donor"].to_numpy()[rows] == "lab-r0c0"
    assert left.any() and (~left).any()
    # Half a tile, the gap of one tile, half a tile; a tile is centred to the nearest pixel.
    assert x[~left].min() - x[left].max() >= 2 * TILE_PX - 1


def test_masks_outlines_and_table_are_of_the_same_nuclei(prepared):
    import spatialdata

    from ge2hist_core.store import _quiet

    settings, report, store = prepared
    with _quiet():
        sdata = spatialdata.read_zarr(settings.out)
    for donor in store.donors:
        labels = np.asarray(sdata.labels[f"{donor}_labels"].data)
        table = store.obs[store.obs["donor"] == donor]
        xy = np.asarray(sdata.tables["cells"].obsm["spatial"])[(store.obs["donor"] == donor).to_numpy()]
        assert labels.max() == len(table) == report["regions"][donor]
        area = np.bincount(labels.ravel(), minlength=len(table) + 1)[1:] * UM_PER_PX**2
        np.testing.assert_allclose(table["area_um2"], area)
        for i in range(0, len(table), 5):
            rows, columns = np.nonzero(labels == i + 1)
            whole = rows.min() > 0 and columns.min() > 0
            if whole and columns.max() < labels.shape[1] - 1 and rows.max() < labels.shape[0] - 1:
                np.testing.assert_allclose(xy[i], np.array([columns.mean(), rows.mean()]) * 0.5 + 0.25, atol=1e-6)


def test_what_training_asks_of_a_store_is_there(prepared):
    _, _, store = prepared
    rows = store.rows(store.donors)
    assert len(rows) > 10 and store.neighbour_counts(rows).shape == (len(rows), 1)
    assert len(store.nuclei(int(rows[0]))) > 1
    assert store.provenance["donors"].keys() == {"train", "validation", "test"}
    assert list(store.var.columns) == ["gene_id"]


def test_growing_nuclei_assigns_more_umis(slide, prepared, tmp_path):
    _, report, _ = prepared
    settings = Settings(
        slide / "outs", slide / "HE.tif", tmp_path / "a.zarr", segmenter="space-ranger", regions="1x2", expand_um=2.0
    )
    grown = prepare(settings)
    cells = prepare(replace(settings, out=tmp_path / "b.zarr", expand_um=0.0, whole_cells=True))
    for wider in (grown, cells):
        assert wider["umi"]["assigned"] > 1.2 * report["umi"]["assigned"]
        assert wider["umi"]["total"] == report["umi"]["total"]


def test_registration_is_measured_on_the_slide(prepared, tmp_path):
    settings, report, _ = prepared
    found = report["registration"]
    assert found["warning"] is None and np.hypot(*found["shift_um"]) < 1.5
    assert (settings.work / "registration.png").stat().st_size > 10_000
    folder = tmp_path / "off"
    write_slide(folder, SlideSpec(seed=11, section_um=160.0, misregistration_um=(8.0, -6.0), version=4))
    moved = Settings(folder / "outs", folder / "HE.tif", tmp_path / "a.zarr", segmenter="space-ranger")
    first = prepare(moved)
    np.testing.assert_allclose(first["registration"]["shift_um"], [-8.0, 6.0], atol=1.0)
    assert "--shift-um=-" in first["registration"]["warning"]
    again = prepare(replace(moved, out=tmp_path / "b.zarr", shift_um=(-8.0, 6.0)))
    assert again["registration"]["warning"] is None
    assert again["umi"]["assigned"] > first["umi"]["assigned"]


# --- Stopping and going on ----------------------------------------------------------------------------------------


def test_a_full_disk_leaves_no_store_and_resume_finishes(slide, prepared, tmp_path, capsys):
    """The kernel's own refusal of a file that grows too large, in the middle of writing."""
    _, report, store = prepared
    settings = Settings(
        slide / "outs", slide / "HE.tif", tmp_path / "lab.zarr", segmenter="space-ranger", regions="1x2"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, hard))
    try:
        with pytest.raises(BadInput, match="disk is full .* run again with --resume"):
            prepare(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["lab.zarr.prepare"]
    again = prepare(replace(settings, resume=True))
    assert again == {**report}
    assert TissueStore(settings.out).identity == store.identity


def test_resume_takes_up_what_is_unchanged(prepared, tmp_path):
    """Stages that were kept are used again for new labels, and made anew for another segmentation."""
    settings, report, store = prepared
    stamps = {n: (settings.work / n).stat().st_mtime_ns for n in ("counts.npz", "image.npy")}
    types = pd.DataFrame({"cell_id": store.obs.index, "cell_type": np.where(store.obs["n_umi"] > 100, "rich", "poor")})
    types.iloc[3:].to_csv(tmp_path / "types.csv", index=False)
    labelled = replace(settings, labels=tmp_path / "types.csv", resume=True, overwrite=True)
    second = prepare(labelled)
    assert {n: (settings.work / n).stat().st_mtime_ns for n in ("counts.npz",)} == {"counts.npz": stamps["counts.npz"]}
    assert second["umi"] == report["umi"] and second["cell_types"][UNLABELLED] == 3
    again = TissueStore(settings.out)
    expected = [UNLABELLED] * 3 + list(types["cell_type"][3:])
    assert list(again.cells.cell_type) == expected
    np.testing.assert_array_equal(again.obs["type_confidence"], [0.0] * 3 + [1.0] * (len(again) - 3))
    third = prepare(replace(settings, expand_um=1.0, resume=True, overwrite=True))
    assert third["umi"]["assigned"] > report["umi"]["assigned"]
    prepare(replace(settings, overwrite=True))  # as the other tests found it


def test_nuclei_of_a_binned_slide_are_labelled_by_clusters_where_asked(prepared):
    settings, report, _ = prepared
    found = prepare(replace(settings, clusters=2, resume=True, overwrite=True))["cell_types"]
    assert set(found) == {"Cluster 1", "Cluster 2"} and sum(found.values()) == report["cells"]
    assert found["Cluster 1"] >= found["Cluster 2"]
    prepare(replace(settings, overwrite=True))  # as the other tests found it


def test_an_interrupted_segmentation_goes_on_to_the_same_labels(slide, tmp_path, monkeypatch):
    from ge2hist_core import prepare as module
    from ge2hist_core import segmentation

    monkeypatch.setattr(segmentation, "CORE_UM", 80.0)
    monkeypatch.setattr(module, "NOTE_TILES", 4)
    whole = Settings(slide / "outs", slide / "HE.tif", tmp_path / "whole.zarr", workers=1, keep=True, donor="x")
    prepare(whole)
    stopped = replace(whole, out=tmp_path / "stopped.zarr")
    reader = segmentation.ClassicalSegmenter.__call__
    seen: list[int] = []

    def until_stopped(self, picture, um_per_px):
        seen.append(1)
        if len(seen) == 7:
            raise KeyboardInterrupt
        return reader(self, picture, um_per_px)

    monkeypatch.setattr(segmentation.ClassicalSegmenter, "__call__", until_stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare(stopped)
    assert not stopped.out.exists()
    assert json.loads((stopped.work / "state.json").read_text())["labels"]["done"] == 8
    prepare(replace(stopped, resume=True))
    np.testing.assert_array_equal(np.load(stopped.work / "labels.npy"), np.load(whole.work / "labels.npy"))
    assert TissueStore(stopped.out).identity == TissueStore(whole.out).identity


# --- Labels -------------------------------------------------------------------------------------------------------


def test_bins_vote_for_the_type_of_their_cell(tmp_path):
    """8-um bins hold 4 x 4 of 2 um; a cell takes the type with most of its bins."""
    row, column = (v.ravel() for v in np.mgrid[:8, :12])
    owner = np.where(column < 7, 1, 2).astype(np.int32)
    owner[row == 7] = 0
    lines = ["barcode,DeconvolutionClass,DeconvolutionLabel1"]
    lines += [f"s_008um_{r:05d}_{c:05d}-1,x,{'ABC'[c]}" for r in range(2) for c in range(3)]
    (tmp_path / "types.csv").write_text("\n".join(lines))
    labels = read_label_table(tmp_path / "types.csv")
    found = by_table(labels, (np.array(["c1", "c2"], dtype=object),), owner, row, column)
    assert list(found.cell_type) == ["A", "C"]
    np.testing.assert_allclose(found.confidence, [4 / 7, 4 / 5])
    elsewhere = labels.set_axis([name.replace("_0000", "_0009", 1) for name in labels.index])
    with pytest.raises(BadInput, match="None of the 6 bins"):
        by_table(elsewhere, (np.array(["c1", "c2"], dtype=object),), owner, row, column)


def test_markers_find_planted_types():
    draw = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(60)]
    kind = np.repeat([0, 1, 2], 80)
    mean = np.full((240, 60), 0.6)
    for t in range(3):
        mean[kind == t, 8 * t : 8 * t + 8] = 4.0
    counts = sp.csr_matrix(draw.poisson(mean))
    table = pd.DataFrame(
        [(f"T{t}", f"G{8 * t + j}", 1.0) for t in range(3) for j in range(6)]
        + [("T0", "G9", -1.0), ("T1", "ABSENT", 1.0)],
        columns=["cell_type", "gene", "weight"],
    )
    found = by_markers(counts, genes, table)
    assert (found.cell_type == np.array([f"T{t}" for t in kind])).mean() > 0.98
    assert found.confidence.min() >= 1 / 3 and found.confidence.mean() > 0.9
    shuffled = draw.permutation(60)
    again = by_markers(counts[:, shuffled], [genes[i] for i in shuffled], table)
    np.testing.assert_array_equal(found.cell_type, again.cell_type)


def test_marker_scores_are_stouffers(monkeypatch):
    """Scores by the formula on a dense matrix; the confidence is the softmax share of the best."""
    draw = np.random.default_rng(1)
    counts = draw.poisson(2.0, (50, 5)).astype(float)
    table = pd.DataFrame({"cell_type": ["a", "a", "b"], "gene": ["0", "1", "2"], "weight": [2.0, -1.0, 1.0]})
    x = np.log1p(counts / counts.sum(axis=1, keepdims=True) * cell_labels.TARGET_SUM)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    score = np.stack([(2 * z[:, 0] - z[:, 1]) / np.sqrt(5), z[:, 2]], axis=1)
    share = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
    found = by_markers(sp.csr_matrix(counts), list("01234"), table)
    np.testing.assert_array_equal(found.cell_type, np.array(["a", "b"])[score.argmax(axis=1)])
    np.testing.assert_allclose(found.confidence, share.max(axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("cell_id,cell_type\na,T\na,B\n", "names 'a' twice"),
        ("cell_id,colour\na,T\n", "no column named like a cell type"),
        ("cell_id,cell_type\n", "labels nothing"),
        ("only\na\n", "one column"),
        ("", "no table"),
    ],
)
def test_label_tables_that_cannot_be_used(tmp_path, text, match):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(BadInput, match=match):
        read_label_table(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("cell_type,symbol\nT,CD3E\n", "no column 'gene'"),
        ("cell_type,gene,weight\nT,CD3E,1\nB,MS4A1,much\n", "weight that is 0 or no number"),
        ("cell_type,gene\nT,CD3E\nT,CD3D\n", "fewer than two cell types"),
    ],
)
def test_marker_tables_that_cannot_be_used(tmp_path, text, match):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(BadInput, match=match):
        read_markers(tmp_path / "t.csv")


def test_ids_of_no_cell_are_refused():
    labels = pd.Series(["T"], index=["cell-of-another-slide"])
    with pytest.raises(BadInput, match="None of the 1 ids.*ids are like 'lab_1'"):
        by_table(labels, (np.array(["lab_1"], dtype=object),), np.array([1]), np.array([0]), np.array([0]))
    markers = pd.DataFrame({"cell_type": ["T", "B"], "gene": ["CD3E", "MS4A1"], "weight": 1.0})
    with pytest.raises(BadInput, match="None of the markers of 'B' .MS4A1. is measured"):
        by_markers(sp.csr_matrix(np.ones((3, 1))), ["CD3E"], markers)


# --- Settings and command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"segmenter": "magic"}, "segmenter is 'magic'"),
        ({"segmenter": "geojson"}, "belong together"),
        ({"labels": "a", "markers": "b"}, "give one"),
        ({"expand_um": 90.0}, "choose 0 to 20"),
        ({"regions": "three"}, "rows x columns"),
        ({"min_umi": 0}, "at least 1"),
        ({"donor": "a/b"}, "donor is 'a/b'"),
        ({"um_per_px": 3.0}, "0.1 to 1"),
        ({"gap_um": -1.0}, "0 to 1000"),
    ],
)
def test_settings_that_cannot_be(tmp_path, change, match):
    with pytest.raises(BadInput, match=match):
        Settings(tmp_path, tmp_path, tmp_path / "a.zarr", **change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"regions": "9x9"}, "a tile needs 64"),
        ({"image": "absent.tif"}, "does not exist"),
        ({"genome": "mm10"}, "genome GRCh38, expected mm10"),
        ({"whole_cells": True}, "--whole-cells needs"),
        ({"image": None}, "is a Visium HD run .* by --image"),
        ({"alignment": "a.csv"}, "--alignment is for a Xenium output folder"),
        ({"segmenter": "space-ranger", "min_umi": 10**6}, "No nucleus holds 1000000 UMIs"),
    ],
)
def test_what_the_slide_does_not_allow_leaves_no_store(slide, tmp_path, change, match):
    values = {"folder": slide / "outs", "image": slide / "HE.tif", "out": tmp_path / "a.zarr"} | change
    values["image"] = values["image"] and slide / values["image"]
    with pytest.raises(BadInput, match=match):
        prepare(Settings(**values))
    assert not (tmp_path / "a.zarr").exists()


def test_an_existing_store_is_kept(slide, prepared):
    settings, _, _ = prepared
    with pytest.raises(BadInput, match="exists: give another name, or --overwrite"):
        prepare(settings)


def test_the_commands_run(tmp_path, capsys):
    """`simulate-slide`, then `prepare` by outlines from a file, as a user types them."""
    folder = tmp_path / "slide"
    words = ["slide", str(folder), "--section-um", "128", "--space-ranger", "4", "--seed", "2"]
    assert run_command("x", "", COMMANDS, words) == 0
    assert f"prepare {folder}/outs --image {folder}/HE.tif" in capsys.readouterr().out
    outlines = folder / "outs/segmented_outputs/nucleus_segmentations.geojson"
    words = [
        "prepare", str(folder / "outs"), "--image", str(folder / "HE.tif"), "--out", str(tmp_path / "a.zarr"),
        "--segmenter", "geojson", "--outlines", str(outlines), "--shift-um=0.5,-0.5", "--regions", "1x1",
    ]  # fmt: skip
    assert run_command("x", "", COMMANDS, words) == 0
    said = capsys.readouterr().out
    assert "UMIs = assigned" in said and "in 1 region(s)" in said and "cells have no type" in said
    assert len(TissueStore(tmp_path / "a.zarr")) > 20
    assert run_command("x", "", COMMANDS, [*words, "--shift-um=here"]) == 2
    assert "shift_um is 'here'" in capsys.readouterr().err


def test_options_become_settings(tmp_path):
    import argparse

    from ge2hist_core.prepare import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    (tmp_path / "binned_outputs").mkdir()
    words = [
        str(tmp_path),
        "--image",
        "i.tif",
        "--out",
        "o.zarr",
        "--shift-um=-3.5,2",
        "--regions",
        "2x3",
        "--min-umi",
        "25",
    ]
    settings = settings_of(parser.parse_args(words))
    assert settings.shift_um == (-3.5, 2.0) and settings.regions == "2x3" and settings.min_umi == 25
