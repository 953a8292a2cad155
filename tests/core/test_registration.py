"""The shift between stain and transcripts: recovered where it was planted, and not invented where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage.draw import disk

from ge2hist_core.registration import REACH_UM, Registration, check_registration, draw_overlay
from ge2hist_core.slide_image import SlideImage

UM_PER_PX = 0.5
SIDE_UM = 440.0


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Blue nuclei on pink, 440 um wide, and 2-um bins with Poisson UMIs about the nuclei: picture, places, UMIs."""
    draw = np.random.default_rng(5)
    n = round(SIDE_UM / UM_PER_PX)
    picture = np.full((n, n, 3), (235, 180, 205), np.float64)
    centres = draw.uniform(0, SIDE_UM, (700, 2))
    for x, y in centres:
        picture[disk((y / UM_PER_PX, x / UM_PER_PX), 6, shape=(n, n))] = (95, 70, 150)
    picture += draw.normal(0, 4, picture.shape)
    path = tmp_path_factory.mktemp("registration") / "he.png"
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path)
    steps = np.arange(21, SIDE_UM - 20, 2.0)
    xy = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    near = np.zeros(len(xy))
    for start in range(0, len(xy), 4000):
        part = np.linalg.norm(xy[start : start + 4000, None] - centres[None], axis=-1)
        near[start : start + 4000] = np.exp(-((part / 4.0) ** 2) / 2).sum(axis=1)
    return path, xy, draw.poisson(0.1 + 1.5 * near)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (6.0, -4.0), (-17.0, 25.0), (3.0, 0.0)])
def test_a_planted_shift_is_found(planted, shift):
    """Bins written too far by a shift fit when moved back by it."""
    path, xy, umi = planted
    with SlideImage(path, um_per_px=UM_PER_PX) as image:
        found = check_registration(image, xy + np.array(shift), umi)
    np.testing.assert_allclose(found.shift_um, -np.array(shift), atol=1.0)
    assert found.correlation > 0.3 and found.correlation >= found.correlation_at_zero
    assert found.map.shape == (31, 31)
    if shift == (0.0, 0.0):
        assert found.warning is None
    else:
        x, y = found.shift_um
        assert f"--shift-um={x:.1f},{y:.1f}" in found.warning


def test_without_relation_it_says_so(planted):
    path, xy, umi = planted
    shuffled = np.random.default_rng(0).permutation(umi)
    with SlideImage(path, um_per_px=UM_PER_PX) as image:
        found = check_registration(image, xy, shuffled)
    assert "hardly correlate" in found.warning


def test_a_shift_within_its_error_is_no_warning():
    def found(shift, error):
        return Registration((shift, 0.0), error, 0.4, 0.39, 3, np.zeros((31, 31))).warning

    assert found(1.9, 0.1) is None and found(3.0, 2.0) is None and found(3.0, float("nan")) is not None
    assert REACH_UM == 30.0


def test_the_map_is_the_correlation_at_each_shift(planted):
    """Against numpy's correlation coefficient of explicitly shifted maps, at three shifts."""
    from ge2hist_core import registration as module

    path, xy, umi = planted
    with SlideImage(path, um_per_px=UM_PER_PX) as image:
        found = check_registration(image, xy, umi)
        density, corner = module._umi_map(xy, umi)
        height, width = density.shape
        counts = module._band(np.log1p(density))
        haem = module._band(
            module.haematoxylin(
                image, (corner[1] - 15, corner[1] + height + 15), (corner[0] - 15, corner[0] + width + 15)
            )
        )
    assert found.windows == 1
    for dx, dy in ((0, 0), (2, -3), (-15, 15)):
        part = haem[15 + dy : 15 + dy + height, 15 + dx : 15 + dx + width]
        expected = np.corrcoef(part.ravel(), counts.ravel())[0, 1]
        assert found.map[15 + dy, 15 + dx] == pytest.approx(expected, abs=1e-6)


def test_the_overlay_is_a_picture(planted, tmp_path):
    path, xy, umi = planted
    labels = np.zeros((880, 880), np.int32)
    labels[200:240, 200:240] = 1
    with SlideImage(path, um_per_px=UM_PER_PX) as image:
        found = check_registration(image, xy, umi)
        draw_overlay(tmp_path / "overlay.png", image, xy, umi, found, labels)
    with Image.open(tmp_path / "overlay.png") as drawn:
        assert drawn.format == "PNG" and min(drawn.size) > 300
        assert np.asarray(drawn.convert("RGB")).std() > 20
    assert [p.name for p in tmp_path.iterdir()] == ["overlay.png"]
