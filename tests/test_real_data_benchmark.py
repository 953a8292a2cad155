"""The figures on real data, on small made-up data whose answer is known."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks import real_data, real_sets
from ge2hist_core.config import CELL_TYPES, READER_CLASSES
from ge2hist_core.model import GE2Hist
from ge2hist_core.simulator.command import simulate_sections
from ge2hist_core.simulator.expression import load_genes
from ge2hist_core.store import TissueStore, write_store
from ge2hist_core.types import BadInput

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def table(x, y, kind):
    return pd.DataFrame({"x_um": x, "y_um": y, "cell_type": np.asarray(kind, dtype=object)})


# --- readers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def consep_folder(tmp_path):
    """One image of 1000 px cut as CoNSeP's are, with a nucleus on the seam of four tiles and one in the overlap."""
    draw = np.random.default_rng(0)
    image = np.repeat(np.repeat(draw.integers(0, 256, (125, 125, 3), dtype=np.uint8), 8, 0), 8, 1)
    labels = np.zeros((1000, 1000), np.uint16)
    labels[250:262, 250:262], labels[745:765, 100:110], labels[5:15, 5:15] = 7, 3, 12
    kind = {7: 3, 3: 2, 12: 4}
    names, maps, rows = [], [], []
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i, (top, left) in enumerate(real_sets.consep_corners()):
            name, part = f"train_1_{i:03d}", (slice(top, top + 256), slice(left, left + 256))
            Image.fromarray(image[part]).save(tmp_path / "tile.png")
            archive.write(tmp_path / "tile.png", f"images/{name}.png")
            names.append(name)
            maps.append(labels[part])
            found = np.unique(labels[part][labels[part] > 0])
            rows += [(name, j, kind[int(label)]) for j, label in enumerate(found, start=1)]
    np.savez(tmp_path / "instances.npz", names=np.array(names), instances=np.stack(maps))
    nuclei = pd.DataFrame(rows, columns=["tile", "instance", "type"])
    nuclei.sample(frac=1, random_state=0).to_csv(tmp_path / "nuclei.csv.gz", index=False)
    return tmp_path, image, labels


def test_consep_is_put_together_from_its_tiles(consep_folder):
    folder, image, labels = consep_folder
    (picture,) = real_sets.consep(folder)
    np.testing.assert_array_equal(picture.image, image)
    np.testing.assert_array_equal(picture.labels, labels)
    assert picture.types == {7: "Epithelial", 3: "Inflammatory", 12: "Spindle"}


def test_a_nucleus_on_a_seam_is_one_nucleus(consep_folder):
    (picture,) = real_sets.consep(consep_folder[0])
    nuclei = real_sets.nuclei_of(picture)
    assert nuclei["cell_type"].tolist() == ["Inflammatory", "Epithelial", "Spindle"]
    np.testing.assert_allclose(nuclei[["x_um", "y_um"]].iloc[1], [64.0, 64.0])
    np.testing.assert_allclose(nuclei["area_um2"], [12.5, 9.0, 6.25])


def test_a_folder_without_the_set_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"holds no instances\.npz"):
        list(real_sets.consep(tmp_path))
    assert real_data.main(["nuclei", str(tmp_path)]) == 2


def test_map_leaves_out_rejected_bins(tmp_path):
    rows = [
        ("s_008um_00000_00000-1", "singlet", "Tumor II"),
        ("s_008um_00000_00002-1", "reject", "CAF"),
        ("s_008um_00001_00001-1", "doublet_certain", "Plasma"),
        ("s_008um_00001_00002-1", "NA", "NA"),
    ]
    path = tmp_path / "P.csv.gz"
    columns = ["barcode", "DeconvolutionClass", "DeconvolutionLabel1"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    assert real_sets.crc_map(path).tolist() == [["Tumor II", "", ""], ["", "Plasma", ""]]


# --- classes --------------------------------------------------------------------------------------------------------


def test_every_type_of_the_simulated_tissue_has_a_class():
    assert set(real_data.AS_MAP) == set(CELL_TYPES) and set(real_data.AS_MAP.values()) == set(real_data.MAP_CLASSES)
    assert set(real_data.AS_CONSEP) == set(READER_CLASSES)
    assert set(real_data.AS_CONSEP.values()) < set(real_data.CONSEP_CLASSES)


# --- figures --------------------------------------------------------------------------------------------------------


def test_overlap_above_a_half_counts_once():
    true, found = np.zeros((20, 20), int), np.zeros((20, 20), int)
    true[0:4, 0:4], found[0:4, 0:3] = 1, 5  # 12 of 16
    true[8:12, 0:4], found[8:12, 0:2] = 2, 6  # exactly a half
    true[8:12, 8:12], found[16:18, 16:18] = 3, 7  # missed, invented
    assert real_data.overlapping(found, true) == 1
    assert real_data.overlapping(true, true) == 3 and real_data.overlapping(np.zeros_like(true), true) == 0
    with pytest.raises(ValueError, match="not unique"):
        real_data.overlapping(found, true, 0.3)


def test_interval_is_over_the_rows_and_holds_the_pooled_value():
    counts = np.array([[8, 10, 10], [4, 10, 10], [9, 10, 10], [7, 10, 10], [2, 10, 10]])
    f1 = real_data.with_interval(counts, real_data.scores)["f1"]
    assert f1["value"] == pytest.approx(0.6) and f1["low"] < 0.45 and f1["high"] > 0.75
    even = real_data.with_interval(np.tile([[6, 10, 10]], (5, 1)), real_data.scores)["f1"]
    assert even["low"] == even["high"] == pytest.approx(0.6)
    assert np.isnan(real_data.with_interval(counts[:1], real_data.scores)["f1"]["low"])


def test_no_image_is_in_two_parts():
    names = [f"train_{i}" for i in range(1, 28)]
    split = real_data.split_images(names, 0, 8, 4)
    assert [len(part) for part in split.values()] == [8, 4, 15]
    assert sorted(sum(split.values(), [])) == sorted(names)
    assert split == real_data.split_images(names, 0, 8, 4) != real_data.split_images(names, 1, 8, 4)
    with pytest.raises(BadInput, match="too few"):
        real_data.split_images(names[:12], 0, 8, 4)


def test_halved_is_the_mean_of_four():
    image = np.zeros((5, 4, 3), np.uint8)
    image[0, 0], image[2:4, 2:4] = 100, 200
    assert real_data.halved(image)[..., 0].tolist() == [[25, 0], [0, 200]]


class Said:
    """A reader that says what it was given."""

    def __init__(self, *tables):
        self.tables = list(tables)

    def read(self, images):
        return [self.tables.pop(0) for _ in images]


def test_missed_invented_and_misnamed_nuclei_count_against_a_type():
    true = table([0.0, 20.0, 40.0, 60.0], [0.0] * 4, ["Epithelial", "Epithelial", "Spindle", "Inflammatory"])
    found = table([1.0, 24.0, 40.0, 90.0], [0.0] * 4, ["Luminal", "Luminal", "Luminal", "Fibre"])
    names = {"Luminal": "Epithelial", "Fibre": "Spindle"}
    picture = np.zeros((1, 8, 8, 3), np.uint8)
    tally = real_data.tallied(Said(found), picture, [true], names)
    figures = real_data.typed(tally)
    assert figures["detection 3 um"]["f1"]["value"] == pytest.approx(2 * 2 / 8)
    assert figures["detection 6 um"]["f1"]["value"] == pytest.approx(2 * 3 / 8)
    value = {name: figure["value"] for name, figure in figures["type"].items()}
    assert value["Epithelial"] == pytest.approx(2 * 2 / (3 + 2))
    assert value["Spindle"] == value["Inflammatory"] == 0 and np.isnan(value["Miscellaneous"])
    assert value["right of matched"] == pytest.approx(2 / 3)


def test_a_reader_told_another_scale_finds_the_same_places():
    class Middle:
        def read(self, images, um_per_px):
            middle = images.shape[1] / 2 * um_per_px
            return [table([middle], [middle], ["A"]).assign(area_um2=4.0)]

    (found,) = real_data.Told(Middle(), 0.7).read(np.zeros((1, 64, 64, 3), np.uint8))
    np.testing.assert_allclose(found[["x_um", "y_um"]], 16.0)
    assert found["area_um2"].item() == pytest.approx(4 * (0.5 / 0.7) ** 2)


def test_difference_of_two_readers_is_paired_by_image():
    draw = np.random.default_rng(1)
    true = draw.integers(20, 400, 8)
    hard = draw.uniform(0.2, 0.8, 8)
    tallies = [{"detection 3 um": np.stack([(hard + gain) * true, true, true], 1)} for gain in (0.1, 0.0)]
    alone = real_data.typed(tallies[0])["detection 3 um"]["f1"]
    gain = real_data.typed(*tallies)["detection 3 um"]["f1"]
    assert gain["value"] == pytest.approx(0.1) and gain["high"] - gain["low"] < 1e-9
    assert alone["high"] - alone["low"] > 0.1


# --- neighbourhoods -------------------------------------------------------------------------------------------------


def test_bins_take_the_nearest_nucleus_within_reach():
    nuclei = table([4.0, 28.0], [4.0, 5.0], ["A", "B"])
    got = real_data.binned(nuclei, 32.0)
    kinds = {(x, y): kind for x, y, kind in got.itertuples(index=False)}
    # (20, 4) is 8.06 um from B and 16 um from A: nobody's.
    assert kinds == {(4, 4): "A", (12, 4): "A", (4, 12): "A", (28, 4): "B", (28, 12): "B"}


def checkerboard(square):
    """Bins of two classes in squares of so many bins each way."""
    row, column = np.indices((32, 32))
    return real_data.bins(np.where((row // square + column // square) % 2, "A", "B").astype(object))


def test_neighbourhood_of_coarse_and_fine_boards():
    fine, coarse = (
        real_data.described(real_data.neighbourhood(checkerboard(n), (256.0, 256.0), ("A", "B"), 12.0)) for n in (1, 8)
    )
    for figures in (fine, coarse):
        assert figures["share:A"] == 0.5 and figures["density"] == pytest.approx(1024 / 0.256**2)
    assert fine["log2:A|B"] == pytest.approx(0.0, abs=0.2) and coarse["log2:A|B"] < -1.5 < 0.5 < coarse["log2:A|A"]
    assert fine["classes per tile"] == pytest.approx(2.0) and coarse["classes per tile"] == pytest.approx(1.0)
    assert (fine["tiles of one class"], coarse["tiles of one class"]) == (0.0, 1.0)
    assert fine["spacing:A"] == pytest.approx(np.hypot(8, 8)) and coarse["spacing:A"] == pytest.approx(8.0)


def test_windows_add_up_and_tissue_is_not_apart_from_itself():
    parts = [real_data.neighbourhood(checkerboard(n), (256.0, 256.0), ("A", "B"), 12.0) for n in (4, 8, 8)]
    mixed, alone = real_data.with_spread(parts), real_data.with_spread(parts[1:])
    assert mixed["counts"] == [1536.0, 1536.0] and mixed["units"] == 3
    figure = mixed["figures"]["log2:A|B"]
    assert figure["low"] < figure["value"] < figure["high"]
    assert real_data.apart(mixed, mixed) == {"composition_kl_nats": 0.0, "log2_rms": 0.0, "pairs": 3}
    assert real_data.apart(mixed, alone)["log2_rms"] > 0.1


def test_windows_need_labels_and_tumour():
    labels = np.full((64, 256), "", dtype=object)
    labels[:, :64] = "CAF"  # no tumour
    labels[:4, 64:128] = "Tumor II"  # too few labels
    labels[:40, 128:192], labels[:8, 128:192] = "CAF", "Tumor II"
    labels[:, 192:] = "Smooth Muscle"  # has no class
    (window,) = real_data.windows(labels)
    assert window["cell_type"].value_counts().to_dict() == {"Stroma": 2048, "Epithelium": 512}
    assert window["x_um"].max() < 512 and window["y_um"].max() < 320


def test_quarters_share_no_nucleus():
    nuclei = table([10.0, 300.0, 10.0, 505.0], [10.0, 10.0, 300.0, 505.0], ["A"] * 4)
    total = real_data.summed(real_data.quartered(nuclei, (250.0, 250.0), ("A",)))
    assert total["n:A"] == 3 and total["area_mm2"] == pytest.approx(0.25)


# --- cells ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def xenium_folder(tmp_path):
    """Two nuclei of 12 transcripts, one of 3, some transcripts outside of nuclei and of no cell."""
    draw = np.random.default_rng(0)
    rows = []
    for cell, n, gene, x in ((7, 12, "EPCAM", 110.0), (9, 12, "CD3D", 150.0), (11, 3, "CD3D", 170.0)):
        rows += [(cell, 1, gene, x + dx, 230.0 + dx) for dx in draw.normal(0, 1, n)]
    rows += [(7, 0, "CD3D", 118.0, 230.0)] * 20 + [(-1, 0, "ACTB", 100.0, 200.0)]
    columns = ["cell_id", "overlaps_nucleus", "feature_name", "x_location", "y_location"]
    (tmp_path / "dataset_xenium_breast1_small").mkdir()
    (tmp_path / "sc_references").mkdir()
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "dataset_xenium_breast1_small" / "transcripts_small.csv")
    profiles = {"ACTB": [5.0, 5.2, 5.1], "CD3D": [0.1, 0.2, 3.0], "EPCAM": [4.0, 4.4, 0.2], "ct_idx": [0.0, 0.0, 1.0]}
    kind = {"cell_type": ["Malignant", "Malignant", "CD8T/CD8Tex"], "atlas": ["a", "b", "a"]}
    pd.DataFrame(profiles | kind).to_csv(tmp_path / "sc_references" / "sc_breast.csv")
    return tmp_path


def test_cells_hold_what_lies_over_their_nuclei(xenium_folder):
    cells = real_sets.xenium_cells(xenium_folder)
    assert cells.cell_id.tolist() == ["cell7", "cell9"] and cells.counts.sum() == 24
    assert cells.cell_type.tolist() == ["Malignant", "CD8T/CD8Tex"]
    np.testing.assert_allclose(cells.xy_um, [[10, 30], [50, 30]], atol=1.5)
    assert set(real_sets.XENIUM_CLASSES.values()) == set(real_data.MAP_CLASSES)


# --- spots ----------------------------------------------------------------------------------------------------------


def test_texture_distance_is_nought_to_itself_and_grows_with_foreign_stain():
    draw = np.random.default_rng(0)
    real = draw.integers(120, 240, (6, 32, 32, 3), dtype=np.uint8)
    measure = real_data.TextureDistance(real)
    assert measure.distance(real, real).tolist() == [0.0] * 6
    other, foreign = real[::-1].copy(), (real * 0.4).astype(np.uint8)
    assert measure.distance(foreign, real).mean() > measure.distance(other, real).mean() > 0


def test_asked_and_other_spots_are_apart():
    asked, others = real_data.two_groups(np.arange(10, 31), 8, 0)
    assert (
        len(asked) == len(others) == 8
        and not set(asked) & set(others)
        and set(asked) | set(others) <= set(range(10, 31))
    )
    assert len(real_data.two_groups(np.arange(7), 64, 0)[0]) == 3
    with pytest.raises(BadInput, match="too few"):
        real_data.two_groups(np.arange(3), 64, 0)


def test_spots_judges_a_bundle_on_sections_it_has_not_seen(tmp_path, tiny_folder, capsys):
    """Random weights: their pictures are no tissue, copied tiles are."""
    shutil.copytree(tiny_folder, tmp_path / "bundle")
    data = tmp_path / "data.zarr"
    write_store(data, simulate_sections(3, range(3), 128.0), list(load_genes().symbols))
    model, store = GE2Hist.load(tmp_path / "bundle"), TissueStore(data)
    asked = ["spots", str(tmp_path / "bundle"), str(data), "--tiles", "6", "--out", str(tmp_path / "figures.json")]
    assert real_data.main(asked) == 2 and "give the store of its training" in capsys.readouterr().err
    split = store.split()
    model.report = {"store": store.identity, "simulation": None, "donors": split, "steps": 7}
    model.save(tmp_path / "bundle")
    assert real_data.main(asked) == 0
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result["held out"] == split["test"] and result["tiles"] == 6 and result["training"]["steps"] == 7
    kid = {name: figure["value"] for name, figure in result["figures"]["KID (stain-texture features)"].items()}
    assert kid["ge2hist"] > kid["nearest-tile"] and kid["ge2hist"] > kid["floor"]
    assert set(kid) == {"ge2hist", "nearest-tile", "shuffled", "floor", "autoencoder of the real tile"}
    assert result["read_back"]["real"]["n"] == 6


# --- the real thing -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the real data are not beside the project")
def test_the_segmenter_on_annotated_tissue_is_as_good_as_the_docs_say():
    figures = real_data.nuclei(REAL)
    f1 = {name: figures[name]["IoU 0.5"]["f1"]["value"] for name in figures}
    assert figures["monuseg"]["nuclei"] == 1515 and figures["consep"]["nuclei"] == 15555
    assert f1["monuseg"] > 0.63 and f1["consep"] > 0.31
    assert len(f1) == 3
