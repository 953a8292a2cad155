"""Readers of nuclei against planted truth, brute force and annotated H&E."""

from __future__ import annotations

import doctest
import gzip
import io
import json
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from skimage.draw import disk, polygon

from ge2hist_core import nuclei
from ge2hist_core import nuclei_training as training
from ge2hist_core.__main__ import COMMANDS, run_command
from ge2hist_core.autoencoder import TileAutoencoder
from ge2hist_core.config import READER_CLASSES, ModelConfig
from ge2hist_core.nuclei import LearnedReader, classical_reader, confusion, detection_scores, match_detections
from ge2hist_core.store import SectionRecord, write_store
from ge2hist_core.types import NUCLEI_COLUMNS, BadInput
from tests import oracles

CLASSES = ("Small dark", "Large pale")
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
CONFIG = training.ReaderConfig(steps=100, batch_size=8, crop_px=64, warmup_steps=10, checkpoint_every=3)


def planted(n, side_px, seed):
    """Pictures of ellipses on pink: positions, areas and types are known because they were put there."""
    draw = np.random.default_rng(seed)
    pixel = (np.arange(side_px) + 0.5) * 0.5
    x, y = np.meshgrid(pixel, pixel)
    images, tables = [], []
    for _ in range(n):
        image = np.array([226.0, 170.0, 200.0]) + draw.normal(0, 6, (side_px, side_px, 3))
        rows = []
        for _ in range(40):
            cx, cy = draw.uniform(0, side_px / 2, 2)
            if any(np.hypot(cx - r[0], cy - r[1]) < 8.5 for r in rows):
                continue
            kind = int(draw.random() < 0.4)
            a, b, angle = (3.6, 2.8, draw.uniform(0, np.pi)) if kind else (2.2, 2.0, 0.0)
            u, v = (
                (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle),
                (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle),
            )
            inside = (u / a) ** 2 + (v / b) ** 2 < 1
            image[inside] = np.array([(70.0, 40.0, 120.0), (140.0, 100.0, 170.0)][kind])
            image[inside] += draw.normal(0, 8, (inside.sum(), 3))
            rows.append((cx, cy, np.pi * a * b, CLASSES[kind], 1.0))
        images.append(np.clip(image, 0, 255).astype(np.uint8))
        tables.append(pd.DataFrame(rows, columns=list(NUCLEI_COLUMNS)))
    return training.Tiles(np.stack(images), tables, CLASSES)


@pytest.fixture(scope="module")
def reader():
    """Trained for seconds on ellipses and calibrated on others."""
    tiles = planted(48, 96, seed=1)
    net = training.new_net(len(CLASSES), seed=0)
    for _ in training.train(net, tiles, CONFIG):
        pass
    reader = LearnedReader(net, CLASSES)
    training.calibrate(reader, planted(20, 96, seed=2))
    return reader


def test_docstring_examples():
    result = doctest.testmod(nuclei)
    assert result.attempted >= 1 and result.failed == 0


# --- Learned reader ---------------------------------------------------------------------------------------------


def test_planted_nuclei_are_found_typed_and_measured(reader):
    figures = training.judge(reader, planted(20, 96, seed=3))
    assert figures["f1"] > 0.9
    assert figures["f1_3um"] > 0.9
    assert abs(figures["count_bias"]) < 0.05
    assert figures["type_accuracy"] > 0.9
    assert figures["composition_kl_nats"] < 0.01
    assert figures["centre_error_um"] < 0.7
    assert abs(figures["area_bias"]) < 0.2
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_judge_counts_what_the_tables_say(reader):
    """The figures of `judge` from the tables alone, pair by pair."""
    tiles = planted(3, 64, seed=4)
    figures = training.judge(reader, tiles)
    found = reader.read(tiles.images)
    n_pairs = sum(
        oracles.best_matching(*(list(zip(t["x_um"], t["y_um"], strict=True)) for t in pair), 6.0)[0]
        for pair in zip(found, tiles.nuclei, strict=True)
    )
    n_found, n_true = sum(map(len, found)), sum(map(len, tiles.nuclei))
    assert figures["precision"] == n_pairs / n_found and figures["recall"] == n_pairs / n_true
    assert figures["count_bias"] == pytest.approx(n_found / n_true - 1)
    assert sum(sum(row.values()) for row in figures["confusion"].values()) == n_pairs
    for key, tables in (("true_counts", tiles.nuclei), ("found_counts", found)):
        types = [name for table in tables for name in table["cell_type"]]
        assert figures[key] == {name: types.count(name) for name in tiles.classes}


def test_calibration_makes_counts_and_composition_right_where_it_was_done(reader):
    tiles = planted(20, 96, seed=2)
    found = pd.concat(reader.read(tiles.images))
    true = pd.concat(tiles.nuclei)
    assert abs(len(found) / len(true) - 1) < 0.02
    shares = [table["cell_type"].value_counts(normalize=True)[CLASSES[0]] for table in (found, true)]
    assert shares[0] == pytest.approx(shares[1], abs=0.03)


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (70, 90), (8, 8)])
def test_any_size_is_read_and_nuclei_lie_inside(reader, shape):
    images = planted(1, 128, seed=5).images[:, : shape[0], : shape[1]]
    (found,) = reader.read(images)
    assert tuple(found.columns) == NUCLEI_COLUMNS
    assert found["x_um"].between(0, shape[1] / 2).all() and found["y_um"].between(0, shape[0] / 2).all()
    assert set(found["cell_type"]) <= set(CLASSES)
    assert (found["area_um2"] > 0).all() and found["probability"].between(reader.threshold, 1).all()


def test_an_empty_picture_has_no_nuclei_and_the_same_columns(reader):
    (found,) = reader.read(np.full((1, 64, 64, 3), 240, dtype=np.uint8))
    assert len(found) == 0 and tuple(found.columns) == NUCLEI_COLUMNS


def test_a_table_does_not_depend_on_the_batch(reader):
    images = planted(5, 64, seed=6).images
    together = reader.read(images)
    for i in range(len(images)):
        pd.testing.assert_frame_equal(together[i], reader.read(images[i : i + 1])[0], check_exact=True)


def test_another_scale_gives_the_same_nuclei(reader):
    tiles = planted(6, 96, seed=7)
    large = np.repeat(np.repeat(tiles.images, 2, axis=1), 2, axis=2)
    for fine, true in zip(reader.read(large, um_per_px=0.25), reader.read(tiles.images), strict=True):
        assert detection_scores(len(match_detections(fine, true, 1.0).found), len(fine), len(true))["f1"] > 0.9


def test_saved_reader_reads_the_same(reader, tmp_path):
    reader.figures = {"f1": 0.5}
    reader.save(tmp_path)
    again = LearnedReader.load(tmp_path)
    images = planted(2, 64, seed=8).images
    for a, b in zip(reader.read(images), again.read(images), strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert again.figures == {"f1": 0.5} and again.classes == CLASSES


def _truncate(folder):
    path = folder / "reader.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _other_classes(folder):
    settings = json.loads((folder / "reader.json").read_text())
    settings["classes"], settings["class_bias"] = ["One"], [0.0]
    (folder / "reader.json").write_text(json.dumps(settings))


def _other_schema(folder):
    settings = json.loads((folder / "reader.json").read_text())
    (folder / "reader.json").write_text(json.dumps(settings | {"schema": 99}))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "reader.json").unlink(), "reader.json is missing: choose a folder"),
        (lambda folder: (folder / "reader.safetensors").unlink(), "missing: choose a folder"),
        (lambda folder: (folder / "reader.json").write_text("{"), "is damaged"),
        (_truncate, "is damaged"),
        (_other_classes, "is damaged"),
        (_other_schema, "has schema 99, this version reads 1"),
    ],
)
def test_damaged_readers_are_refused_in_one_sentence(reader, tmp_path, damage, match):
    reader.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(BadInput, match=match) as error:
        LearnedReader.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "um_per_px", "match"),
    [
        (np.zeros((64, 64, 3), np.uint8), 0.5, "give uint8 RGB"),
        (np.zeros((1, 64, 64, 3), np.float32), 0.5, "float32"),
        (np.zeros((1, 64, 64, 4), np.uint8), 0.5, "give uint8 RGB"),
        (np.zeros((1, 4, 64, 3), np.uint8), 0.5, "at least 8 x 8 px"),
        (np.zeros((1, 64, 64, 3), np.uint8), 5.0, "um_per_px is 5.0"),
        (np.zeros((1, 64, 64, 3), np.uint8), float("nan"), "um_per_px is nan"),
    ],
)
def test_pictures_that_cannot_be_read_are_refused(reader, images, um_per_px, match):
    for read in (reader.read, classical_reader):
        with pytest.raises(BadInput, match=match):
            read(images, um_per_px)


# --- Training ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 7), st.booleans(), st.integers(0, 31), st.integers(0, 31))
def test_turned_positions_stay_on_their_pixels(turns, flip, row, column):
    image = np.zeros((32, 32, 3), np.uint8)
    image[row, column] = 255
    xy = np.array([[(column + 0.5) * 0.5, (row + 0.5) * 0.5]])
    turned, moved = training.turned(image, xy, turns, flip)
    (r,), (c,) = np.nonzero(turned[..., 0])
    np.testing.assert_allclose(moved, [[(c + 0.5) * 0.5, (r + 0.5) * 0.5]])


def test_targets_say_where_what_and_how_large():
    xy = np.array([[3.2, 5.9], [12.5, 4.5], [-1.0, 3.0], [16.0, 3.0]])
    heat, near, offset, log_area, label = training.targets(xy, np.log([20.0, 50, 1, 1]), np.array([0, 1, 1, 1]), 16)
    assert np.argwhere(heat == 1).tolist() == [[4, 12], [5, 3]]
    np.testing.assert_allclose(offset[:, 5, 3], [-0.3, 0.4], atol=1e-6)
    assert label[5, 3] == 0 and label[4, 12] == 1
    assert np.exp(log_area[4, 12]) == pytest.approx(50)
    for row, column in np.ndindex(16, 16):
        d = min(np.hypot(x - column - 0.5, y - row - 0.5) for x, y in xy[:2])
        assert near[row, column] == (d <= 2)
        assert heat[row, column] == 1 or heat[row, column] == pytest.approx(np.exp(-(d**2) / 4.5), rel=1e-5)


def test_targets_of_an_empty_picture_are_empty():
    heat, near, *_ = training.targets(np.empty((0, 2)), np.empty(0), np.empty(0, int), 8)
    assert not heat.any() and not near.any()


def test_perfect_output_has_no_loss_and_any_other_has():
    tiles = planted(4, 64, seed=9)
    b = training.batch(tiles, 0, CONFIG)
    logits = 40.0 * torch.nn.functional.one_hot(b.label, 2).movedim(-1, 1) - 20.0
    heat = torch.where(b.heat == 1, 20.0, -20.0)
    perfect = torch.cat([heat[:, None], b.offset, b.log_area[:, None], logits], dim=1)
    assert sum(training.losses(perfect, b).values()) < 1e-3
    for channel, name in enumerate(["heat", "offset", "offset", "area", "type"]):
        wrong = perfect.clone()
        wrong[:, channel] = -wrong[:, channel] if name in ("heat", "type") else wrong[:, channel] + 1.0
        assert training.losses(wrong, b)[name] > 0.1, name


def test_batches_depend_on_seed_and_step_alone():
    tiles = planted(4, 96, seed=10)
    torch.manual_seed(0)
    a = training.batch(tiles, 7, CONFIG)
    torch.manual_seed(1)
    assert all(torch.equal(p, q) for p, q in zip(a, training.batch(tiles, 7, CONFIG), strict=True))
    assert not torch.equal(a.x, training.batch(tiles, 8, CONFIG).x)
    assert a.x.shape == (8, 3, 64, 64) and a.heat.shape == (8, 32, 32) and a.offset.shape == (8, 2, 32, 32)
    assert a.x.abs().max() <= 1


def test_every_parameter_gets_a_finite_gradient():
    net = training.new_net(2, seed=0)
    b = training.batch(planted(4, 64, seed=11), 0, CONFIG)
    torch.stack(list(training.losses(net(b.x), b).values())).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_killed_and_resumed_training_ends_with_the_same_weights(tmp_path):
    tiles = planted(4, 64, seed=12)
    config = training.ReaderConfig(steps=7, batch_size=2, crop_px=32, warmup_steps=2, checkpoint_every=3)
    whole, again, resumed = (training.new_net(2, seed=0) for _ in range(3))
    assert [state.step for state in training.train(whole, tiles, config)] == list(range(1, 8))
    for state in training.train(again, tiles, config, tmp_path / "c.pt"):
        if state.step == 5:
            break
    assert [s.step for s in training.train(resumed, tiles, config, tmp_path / "c.pt")] == [4, 5, 6, 7]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    tiles = planted(2, 64, seed=13)
    config = training.ReaderConfig(steps=1, batch_size=1, crop_px=32, checkpoint_every=1)
    list(training.train(training.new_net(2, 0), tiles, config, tmp_path / "c.pt"))
    other = training.ReaderConfig(steps=2, batch_size=1, crop_px=32, checkpoint_every=1)
    with pytest.raises(BadInput, match="other settings"):
        next(training.train(training.new_net(2, 0), tiles, other, tmp_path / "c.pt"))
    (tmp_path / "c.pt").write_bytes(b"half")
    with pytest.raises(BadInput, match="cannot be read"):
        next(training.train(training.new_net(2, 0), tiles, config, tmp_path / "c.pt"))


def test_reconstructed_passes_every_second_picture_through_the_autoencoder():
    config = ModelConfig(tile_px=32, latent_px=4, latent_channels=4, ae_channels=(16, 16))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = TileAutoencoder(config).eval()
    tiles = planted(70, 32, seed=15)
    got = training.reconstructed(tiles, autoencoder, every=2)
    np.testing.assert_array_equal(got.images[1::2], tiles.images[1::2])
    for i in (0, 2, 64, 68):
        expected = autoencoder.decode(autoencoder.encode(tiles.images[i : i + 1]))[0].astype(int)
        assert np.abs(got.images[i] - expected).max() <= 1  # rounding may differ between batch sizes
    assert got.nuclei is tiles.nuclei


def small_store(path, n_donors):
    """Store of planted sections, written and read by the project's own store."""
    size_px = 192
    sections = []
    for i in range(n_donors):
        tiles = planted(1, size_px, seed=100 + i)
        table = tiles.nuclei[0].assign(
            cell_type=["Fibroblast" if t == CLASSES[0] else "B cell" for t in tiles.nuclei[0]["cell_type"]]
        )
        labels = np.zeros((size_px, size_px), np.int32)
        for k, row in enumerate(table.itertuples(), start=1):
            labels[disk((row.y_um * 2, row.x_um * 2), np.sqrt(row.area_um2 / np.pi) * 2, shape=labels.shape)] = k
        counts = sp.csr_matrix(np.ones((len(table), 2), np.float32))
        nuclei_table = table[["x_um", "y_um", "cell_type"]]
        sections.append(SectionRecord(f"donor{i}", tiles.images[0], labels, nuclei_table, counts))
    write_store(path, sections, ["CD3E", "ACTB"])


def test_the_command_trains_judges_and_saves(tmp_path, capsys):
    small_store(tmp_path / "tissue.zarr", 3)
    command = ["train-reader", str(tmp_path / "tissue.zarr"), "--out", str(tmp_path / "bundle")]
    command += ["--steps", "80", "--batch-size", "4", "--tiles", "20"]
    assert run_command("ge2hist_core", "", COMMANDS, command) == 0
    reader = LearnedReader.load(tmp_path / "bundle")
    assert reader.figures["f1"] > 0.5 and len(reader.figures["donors"]) == 1
    assert set(reader.figures["confusion"]) == set(READER_CLASSES)
    assert "Lymphocyte" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "bundle").iterdir()) == ["reader.json", "reader.safetensors"]


def test_too_few_donors_are_refused(tmp_path, capsys):
    small_store(tmp_path / "tissue.zarr", 1)
    command = ["train-reader", str(tmp_path / "tissue.zarr"), "--out", str(tmp_path / "bundle")]
    assert run_command("ge2hist_core", "", COMMANDS, command) == 2
    assert "has 1 donors: at least 3" in capsys.readouterr().err


# --- Matching ---------------------------------------------------------------------------------------------------

points = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6)


def positions(rows):
    array = np.array(rows, dtype=float).reshape(-1, 2)
    return pd.DataFrame({"x_um": array[:, 0], "y_um": array[:, 1]})


@settings(deadline=None)
@given(points, points)
def test_matching_equals_trying_all(found, true):
    got = match_detections(positions(found), positions(true), max_um=6.0)
    n, total = oracles.best_matching(found, true, 6.0)
    assert len(got.found) == n and got.distance_um.sum() == pytest.approx(total)
    assert len(set(got.found)) == len(got.found) and len(set(got.true)) == len(got.true)
    for i, j, d in zip(*got, strict=True):
        assert d == pytest.approx(np.hypot(*np.subtract(found[i], true[j]))) and d <= 6.0


def test_confusion_counts_true_in_rows():
    true = positions([(0, 0), (20, 0), (40, 0)]).assign(cell_type=["A", "A", "B"])
    found = positions([(41, 0), (1, 0), (21, 0), (60, 0)]).assign(cell_type=["B", "A", "B", "A"])
    pairs = match_detections(found, true)
    table = confusion(found, true, pairs, ("A", "B"))
    assert table.to_dict("index") == {"A": {"A": 1, "B": 1}, "B": {"A": 0, "B": 1}}
    with pytest.raises(ValueError, match="not among A"):
        confusion(found, true, pairs, ("A",))


def test_scores_without_nuclei_are_nan():
    assert all(np.isnan(value) for value in detection_scores(0, 0, 0).values())
    assert detection_scores(0, 5, 0)["precision"] == 0 and np.isnan(detection_scores(0, 5, 0)["count_bias"])


# --- Training-free reader on annotated H&E ----------------------------------------------------------------------


def test_classical_reader_finds_planted_ellipses():
    tiles = planted(8, 128, seed=14)
    n = np.zeros(3, dtype=int)
    for found, true in zip(classical_reader(tiles.images), tiles.nuclei, strict=True):
        n += len(match_detections(found, true, 3.0).found), len(found), len(true)
        assert set(found["cell_type"]) == {"Nucleus"} and found["probability"].between(0, 1).all()
    assert detection_scores(*n)["f1"] > 0.9


def test_classical_reader_of_an_even_picture_finds_nothing():
    (found,) = classical_reader(np.full((1, 64, 64, 3), 240, dtype=np.uint8))
    assert len(found) == 0 and tuple(found.columns) == NUCLEI_COLUMNS


def monuseg():
    """Pictures, instance maps and scale of the four annotated tiles, the middle quarter of each."""
    for path in sorted((REAL / "monuseg").glob("*.tif")):
        image = np.array(Image.open(path).convert("RGB"))
        root = ElementTree.fromstring(gzip.decompress(path.with_suffix(".xml.gz").read_bytes()))
        labels = np.zeros(image.shape[:2], dtype=np.int32)
        for i, region in enumerate(root.iter("Region"), start=1):
            outline = np.array([(float(v.get("Y")), float(v.get("X"))) for v in region.iter("Vertex")])
            labels[polygon(outline[:, 0], outline[:, 1], labels.shape)] = i
        middle = slice(250, 750)
        yield image[middle, middle], labels[middle, middle], float(root.get("MicronsPerPixel", 0.25))


def consep():
    """One tile of each of the 27 annotated images."""
    instances = np.load(REAL / "consep" / "instances.npz")
    names = [str(name) for name in instances["names"]]
    seen = {name.rsplit("_", 1)[0]: i for i, name in reversed(list(enumerate(names)))}
    with zipfile.ZipFile(REAL / "consep" / "images.zip") as archive:
        member = {Path(name).stem: name for name in archive.namelist()}
        for i in seen.values():
            image = Image.open(io.BytesIO(archive.read(member[Path(names[i]).stem]))).convert("RGB")
            yield np.array(image), instances["instances"][i].astype(np.int32), 0.25


def centres(labels, um_per_px):
    names = np.unique(labels[labels > 0])
    yx = np.array(ndimage.center_of_mass(labels > 0, labels, names)).reshape(-1, 2)
    return positions((yx[:, ::-1] + 0.5) * um_per_px)


def real_f1(pictures):
    """F1 of centres within 6 um, and F1 of instances with intersection over union > 0.5."""
    near, overlap = np.zeros(3, dtype=int), np.zeros(3, dtype=int)
    for image, true, um_per_px in pictures:
        found = nuclei.ClassicalReader().segment(image, um_per_px)
        a, b = centres(found, um_per_px), centres(true, um_per_px)
        near += len(match_detections(a, b).found), len(a), len(b)
        overlap += oracles.overlapping_instances(found.ravel().tolist(), true.ravel().tolist()), len(a), len(b)
    return detection_scores(*near)["f1"], detection_scores(*overlap)["f1"]


@pytest.mark.parametrize(("pictures", "least_near", "least_overlap"), [(monuseg, 0.8, 0.6), (consep, 0.65, 0.3)])
def test_classical_reader_on_annotated_tissue(pictures, least_near, least_overlap):
    folder = REAL / pictures.__name__
    if not folder.is_dir():
        pytest.skip(f"{folder.name}: annotated H&E is not beside this checkout")
    near, overlap = real_f1(pictures())
    print(f"{pictures.__name__}: F1 of centres within 6 um {near:.3f}, of instances with IoU > 0.5 {overlap:.3f}")
    assert near > least_near and overlap > least_overlap
