"""Nuclei of a slide in tiles: the same as of the whole picture, whatever the tiles, threads and interruptions."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import shapely
import tifffile
from PIL import Image
from skimage.draw import disk
from skimage.measure import label, regionprops_table
from skimage.segmentation import expand_labels

from ge2hist_core import segmentation
from ge2hist_core.segmentation import (
    Crop,
    expand_labels_tiled,
    load_segmenter,
    nuclei_table,
    paint_outlines,
    segment,
)
from ge2hist_core.slide_image import SlideImage
from ge2hist_core.types import BadInput

UM_PER_PX = 0.5
SIDE = 400


class Threshold:
    """Dark is nucleus: exact on disks that do not touch."""

    um_per_px = UM_PER_PX

    def __call__(self, picture: np.ndarray, um_per_px: float) -> np.ndarray:
        return label(picture[..., 0] < 120)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Dark disks on pink, some on every seam of 64-px tiles: file, centres (x, y) px, true mask."""
    draw = np.random.default_rng(0)
    picture = np.full((SIDE, SIDE, 3), (226, 170, 200), np.uint8)
    seams = [(64 * i + d, 64 * j + e) for i in range(1, 6) for j in range(1, 6) for d, e in [(0, 0), (3, 30)]]
    centres: list[tuple[float, float]] = []
    for x, y in [*seams, *draw.uniform(14, SIDE - 14, (400, 2))]:
        if all(np.hypot(x - a, y - b) > 18 for a, b in centres):
            centres.append((float(x), float(y)))
    mask = np.zeros((SIDE, SIDE), bool)
    for x, y in centres:
        mask[disk((y, x), draw.uniform(5, 7))] = True
    picture[mask] = (80, 50, 130)
    path = tmp_path_factory.mktemp("planted") / "he.tif"
    tifffile.imwrite(path, picture, tile=(128, 128), photometric="rgb", compression="zlib")
    return path, np.array(centres), mask


def run(path, crop, segmenter, **options):
    labels = np.zeros((crop.height, crop.width), np.int32)
    with SlideImage(path, um_per_px=UM_PER_PX) as image:
        steps = list(segment(image, crop, UM_PER_PX, segmenter, labels, **options))
    return labels, steps


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(segmentation, "CORE_UM", 32.0)


WHOLE = Crop(0, 0, SIDE, SIDE)


def test_tiles_give_the_nuclei_of_the_whole_picture(planted, small_tiles):
    """Same pixels, same instances: seams cut, double or lose none."""
    path, centres, mask = planted
    labels, steps = run(path, WHOLE, Threshold())
    assert len(steps) == 49 and steps[-1].done == steps[-1].tiles == 49
    np.testing.assert_array_equal(labels > 0, mask)
    whole = label(mask)
    pairs = np.unique(np.stack([labels[mask], whole[mask]], axis=1), axis=0)
    assert (
        len(pairs) == len(centres) == steps[-1].n_labels == len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1]))
    )


def test_a_crop_is_a_window_of_the_slide(planted, small_tiles):
    path, _, mask = planted
    crop = Crop(70, 33, 200, 250)
    labels, _ = run(path, crop, Threshold())
    inner = (slice(20, -20), slice(20, -20))  # nuclei cut by the crop's edge belong to no core
    np.testing.assert_array_equal((labels > 0)[inner], mask[70:270, 33:283][inner])


def test_threads_and_interruptions_change_nothing(planted, small_tiles):
    path, _, _ = planted
    expected, steps = run(path, WHOLE, Threshold())
    threaded, _ = run(path, WHOLE, Threshold(), workers=3)
    np.testing.assert_array_equal(threaded, expected)

    labels = np.zeros((SIDE, SIDE), np.int32)
    with SlideImage(path, um_per_px=UM_PER_PX) as image:
        for step in segment(image, WHOLE, UM_PER_PX, Threshold(), labels):
            if step.done == 20:
                break
        again = list(segment(image, WHOLE, UM_PER_PX, Threshold(), labels, start=step.done, n_labels=step.n_labels))
    np.testing.assert_array_equal(labels, expected)
    assert again[-1] == steps[-1]


def test_tiles_without_tissue_are_not_looked_at(planted, small_tiles):
    path, centres, _ = planted
    looked: list[int] = []

    class Counting(Threshold):
        def __call__(self, picture, um_per_px):
            looked.append(1)
            return super().__call__(picture, um_per_px)

    labels, _ = run(path, WHOLE, Counting(), where=lambda tile: tile.left < 200)
    assert len(looked) == 7 * 4  # columns at 0, 64, 128, 192
    assert (labels[:, :240] > 0).any() and not labels[:, 280:].any()


@pytest.mark.parametrize("scale", [0.125, 0.25, 0.5])
def test_a_finer_segmenter_finds_the_same_places(planted, scale):
    """A segmenter that looks closer sees the picture enlarged; its labels come back on the crop's grid."""
    path, centres, _ = planted

    class Fine(Threshold):
        um_per_px = scale

    labels, steps = run(path, WHOLE, Fine())
    table = nuclei_table(labels, steps[-1].n_labels, UM_PER_PX)
    assert len(table) == len(centres)
    distance = np.linalg.norm(table[["x_um", "y_um"]].to_numpy()[:, None] - (centres + 0.5) * UM_PER_PX, axis=-1)
    assert distance.min(axis=0).max() < 0.75


def test_the_training_free_segmenter_finds_planted_nuclei(planted):
    path, centres, mask = planted
    labels, steps = run(path, WHOLE, load_segmenter("classical"))
    found = labels[centres[:, 1].astype(int), centres[:, 0].astype(int)]
    assert (found > 0).mean() > 0.98
    assert abs(steps[-1].n_labels / len(centres) - 1) < 0.05
    assert ((labels > 0) & mask).sum() / ((labels > 0) | mask).sum() > 0.8


def test_empty_glass_has_no_nuclei(tmp_path):
    Image.fromarray(np.full((200, 200, 3), 243, np.uint8)).save(tmp_path / "glass.png")
    labels, _ = run(tmp_path / "glass.png", Crop(0, 0, 200, 200), load_segmenter("classical"))
    assert not labels.any()


def test_outlines_cover_the_pixels_whose_centre_they_contain():
    draw = np.random.default_rng(1)
    shapes = [shapely.Point(*draw.uniform(5, 45, 2)).buffer(draw.uniform(2, 5)) for _ in range(12)]
    crop = Crop(10, 6, 80, 90)
    labels, contested = np.zeros((80, 90), np.int32), np.zeros((80, 90), bool)
    paint_outlines(shapes, crop, UM_PER_PX, labels, contested)
    y, x = (np.mgrid[:80, :90] + np.array([10, 6])[:, None, None] + 0.5) * UM_PER_PX
    inside = np.stack([shapely.contains_xy(shape, x, y) for shape in shapes])
    expected = np.where(inside.any(axis=0), inside.argmax(axis=0) + 1, 0)
    # Pixels whose centre lies on an outline may go either way.
    edge = np.stack([shapely.distance(shape.exterior, shapely.points(x, y)) < 1e-6 for shape in shapes]).any(axis=0)
    np.testing.assert_array_equal(labels[~edge], expected[~edge])
    np.testing.assert_array_equal(contested[~edge], (inside.sum(axis=0) > 1)[~edge])
    assert contested.any()


def test_growing_in_tiles_is_growing_at_once(planted, monkeypatch):
    monkeypatch.setattr(segmentation, "EXPAND_PX", 61)
    labels = label(planted[2]).astype(np.int32)
    out = np.zeros_like(labels)
    expand_labels_tiled(labels, out, 7.5)
    expected = expand_labels(labels, 7.5)
    np.testing.assert_array_equal(out > 0, expected > 0)
    # Equally near to two nuclei: either may have it.
    assert (out != expected).mean() < 0.002


def test_the_table_measures_as_skimage_does(planted):
    labels = label(planted[2]).astype(np.int32)
    n = labels.max()
    table = nuclei_table(labels, n + 1, UM_PER_PX)
    theirs = regionprops_table(labels, properties=("centroid", "area"))
    np.testing.assert_allclose(table["x_um"][:n], (theirs["centroid-1"] + 0.5) * UM_PER_PX)
    np.testing.assert_allclose(table["y_um"][:n], (theirs["centroid-0"] + 0.5) * UM_PER_PX)
    np.testing.assert_allclose(table["area_um2"][:n], theirs["area"] * UM_PER_PX**2)
    assert np.isnan(table["x_um"].iloc[n]) and table["area_um2"].iloc[n] == 0


def test_unknown_and_absent_segmenters_say_what_to_do(tmp_path):
    with pytest.raises(BadInput, match="'cellpose'.*choose classical, stardist, instanseg"):
        load_segmenter("cellpose")
    with pytest.raises(BadInput, match="has no weights"):
        load_segmenter("classical", tmp_path)
    for name in ("stardist", "instanseg"):
        if importlib.util.find_spec(name) is None:
            with pytest.raises(BadInput, match=f"pip install {name}"):
                load_segmenter(name)
