"""The rendered slide against what was planted in the section, and against scikit-image's own colour deconvolution."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from skimage.color import rgb2hed, rgb_from_hed

from ge2hist_core.config import CELL_TYPES, UM_PER_PX
from ge2hist_core.simulator import rendering
from ge2hist_core.simulator.rendering import draw_stain, optical_density, render, transmit
from ge2hist_core.simulator.tissue import Section
from ge2hist_core.types import BadInput

SIZE_UM = 160.0
AXES_UM = {
    "Tumour epithelium": (10.0, 8.0),
    "Proliferating tumour": (10.6, 8.6),
    "Luminal epithelium": (7.8, 6.2),
    "Fibroblast": (12.0, 3.2),
    "Endothelium": (9.5, 2.8),
    "Plasma cell": (6.2, 5.9),
    "Macrophage": (8.4, 6.0),
}


def planted_section(seed: int = 5, donor: int = 2) -> Section:
    """Ten nuclei of each type, 15 um apart, a nest in the left half, stroma in the right, one vessel."""
    rng = np.random.default_rng(0)
    n = int(SIZE_UM / 2)
    y, x = (np.mgrid[:n, :n] + 0.5) * 2.0
    nest = 1 / (1 + np.exp((x - 80) / 2))
    fields = {p: np.zeros((n, n)) for p in ("immune_infiltration", "fibrosis", "angiogenesis", "proliferation")}
    fields |= {
        "cohesion": y / 80 - 1,
        "hypoxia": x / 40 - 2,
        "epithelium": nest,
        "lumen": np.zeros((n, n)),
        "vessel_lumen": 1 / (1 + np.exp((np.hypot(x - 130, y - 130) - 12) / 1.0)),
        "aggregate": np.zeros((n, n)),
        "collagen": 0.6 * (1 - nest),
        "fibre_angle": 0.01 * x,
    }
    places = [(12.0 + 15 * j, 12.0 + 15 * i) for i in range(10) for j in range(10)]
    rows = []
    for k, (px, py) in enumerate(places):
        cell_type = CELL_TYPES[k % 10]
        major, minor = AXES_UM.get(cell_type, (5.9, 5.5))
        jitter = rng.uniform(-1, 1, 2)
        rows.append((px + jitter[0], py + jitter[1], cell_type, major, minor, rng.uniform(0, np.pi), 0.5, 0.6, 900 + k))
    columns = ["x_um", "y_um", "cell_type", "major_um", "minor_um", "angle", "chromatin", "darkness", "key"]
    return Section(seed, donor, SIZE_UM, {}, {}, fields, pd.DataFrame(rows, columns=columns))


def without(section: Section, row: int) -> Section:
    return dataclasses.replace(section, nuclei=section.nuclei.drop(index=row).reset_index(drop=True))


@pytest.fixture(scope="module")
def section() -> Section:
    return planted_section()


@pytest.fixture(scope="module")
def slide(section: Section) -> tuple[np.ndarray, np.ndarray]:
    return render(section, stain_seed=3)


def test_shapes_and_types(slide: tuple[np.ndarray, np.ndarray]) -> None:
    image, label = slide
    side = int(SIZE_UM / UM_PER_PX)
    assert image.shape == (side, side, 3) and image.dtype == np.uint8
    assert label.shape == (side, side) and label.dtype == np.int32


def test_every_centre_carries_its_own_label(section: Section, slide: tuple[np.ndarray, np.ndarray]) -> None:
    rows = (section.nuclei["y_um"] / UM_PER_PX).astype(int)
    columns = (section.nuclei["x_um"] / UM_PER_PX).astype(int)
    np.testing.assert_array_equal(slide[1][rows, columns], np.arange(1, 101))


def test_masks_have_the_area_and_place_of_the_planted_ellipses(
    section: Section, slide: tuple[np.ndarray, np.ndarray]
) -> None:
    area = np.bincount(slide[1].ravel(), minlength=101)[1:] * UM_PER_PX**2
    ellipse = np.pi / 4 * section.nuclei["major_um"] * section.nuclei["minor_um"]
    # metaphase plates are thinner than the nucleus they come from
    interphase = section.nuclei["cell_type"] != "Proliferating tumour"
    ratio = (area / ellipse)[interphase]
    assert ratio.between(0.82, 1.18).all(), ratio.describe()
    assert abs(ratio.mean() - 1) < 0.03
    y, x = (np.indices(slide[1].shape) + 0.5) * UM_PER_PX
    for i in np.flatnonzero(interphase):
        mask = slide[1] == i + 1
        away = np.hypot(x[mask].mean() - section.nuclei["x_um"][i], y[mask].mean() - section.nuclei["y_um"][i])
        assert away < 1.0, (section.nuclei["cell_type"][i], away)


def test_masks_lie_along_the_planted_angle(section: Section, slide: tuple[np.ndarray, np.ndarray]) -> None:
    y, x = (np.indices(slide[1].shape) + 0.5) * UM_PER_PX
    for i in np.flatnonzero(section.nuclei["cell_type"] == "Fibroblast"):
        mask = slide[1] == i + 1
        values, vectors = np.linalg.eigh(np.cov(x[mask], y[mask]))
        expected = section.nuclei["angle"][i]
        cosine = abs(vectors[0, 1] * np.cos(expected) + vectors[1, 1] * np.sin(expected))
        assert cosine > np.cos(np.radians(12))
        assert values[1] > 4 * values[0]


def test_the_masks_are_where_the_haematoxylin_is(section: Section, slide: tuple[np.ndarray, np.ndarray]) -> None:
    haematoxylin = rgb2hed(slide[0])[..., 0]
    kinds = section.nuclei["cell_type"].to_numpy()
    mean = {
        kind: haematoxylin[np.isin(slide[1], np.flatnonzero(kinds == kind) + 1)].mean() for kind in dict.fromkeys(kinds)
    }
    outside = haematoxylin[slide[1] == 0].mean()
    assert min(mean.values()) > 2 * outside
    assert mean["B cell"] > 1.2 * mean["Tumour epithelium"]
    assert mean["Proliferating tumour"] > 1.1 * mean["Tumour epithelium"]


def test_stroma_is_pink_and_vessel_lumen_is_nearly_empty(slide: tuple[np.ndarray, np.ndarray]) -> None:
    image, label = slide
    stroma = image[:, 190:][(label == 0)[:, 190:]].mean(axis=0)
    assert stroma[0] > stroma[2] > stroma[1]
    # red cells take part of it
    lumen = image[250:270, 250:270][(label == 0)[250:270, 250:270]]
    assert np.percentile(lumen, 90, axis=0).min() > 200
    assert stroma[1] < 190


def test_rendering_is_deterministic(section: Section, slide: tuple[np.ndarray, np.ndarray]) -> None:
    again = render(planted_section(), stain_seed=3)
    np.testing.assert_array_equal(again[0], slide[0])
    np.testing.assert_array_equal(again[1], slide[1])


def test_the_stain_colours_and_the_tissue_stays(section: Section, slide: tuple[np.ndarray, np.ndarray]) -> None:
    image, label = render(section, stain_seed=4)
    np.testing.assert_array_equal(label, slide[1])
    assert np.abs(image.astype(int) - slide[0]).mean() > 3
    grey, other = image.mean(axis=2).ravel(), slide[0].mean(axis=2).ravel()
    assert np.corrcoef(grey, other)[0, 1] > 0.95


def test_the_order_of_nuclei_is_immaterial(section: Section, slide: tuple[np.ndarray, np.ndarray]) -> None:
    shuffled = dataclasses.replace(section, nuclei=section.nuclei[::-1].reset_index(drop=True))
    image, label = render(shuffled, stain_seed=3)
    assert np.abs(image.astype(int) - slide[0]).max() <= 1
    np.testing.assert_array_equal(np.where(label > 0, 101 - label, 0), slide[1])


@pytest.mark.parametrize("cell_type", CELL_TYPES)
def test_a_lost_nucleus_changes_its_neighbourhood_only(
    section: Section, slide: tuple[np.ndarray, np.ndarray], cell_type: str
) -> None:
    lost = section.nuclei.index[(section.nuclei["cell_type"] == cell_type)][4]
    image, label = render(without(section, lost), stain_seed=3)
    y, x = (np.indices(label.shape) + 0.5) * UM_PER_PX
    away = np.hypot(x - section.nuclei["x_um"][lost], y - section.nuclei["y_um"][lost])
    changed = (image != slide[0]).any(axis=2)
    assert changed[away < 2].mean() > 0.9
    assert away[changed].max() < 32
    assert away[(label > 0) != (slide[1] > 0)].max() < 9


def test_without_nuclei_there_is_tissue_but_no_mask(section: Section) -> None:
    image, label = render(dataclasses.replace(section, nuclei=section.nuclei[:0]), stain_seed=3)
    assert not label.any()
    assert image.std() > 5


def test_published_vectors_are_unit_and_match_the_source() -> None:
    for vector in (rendering.HAEMATOXYLIN, rendering.EOSIN, rendering.BLOOD):
        assert np.linalg.norm(vector) == pytest.approx(1)
    # scikit-image carries Ruifrok & Johnston's vectors rounded to two digits
    np.testing.assert_allclose(rendering.HAEMATOXYLIN, rgb_from_hed[0], atol=0.01)
    np.testing.assert_allclose(rendering.EOSIN, rgb_from_hed[1], atol=0.01)


def test_drawn_stains_are_unit_vectors_and_differ_between_donors() -> None:
    stains = [draw_stain(0, donor) for donor in range(40)]
    lengths = np.linalg.norm([s.vectors for s in stains], axis=2)
    np.testing.assert_allclose(lengths, 1)
    strengths = np.array([[s.haematoxylin, s.eosin] for s in stains])
    assert (strengths.std(axis=0) > 0.08).all() and (strengths > 0.4).all() and (strengths < 2).all()
    for s in stains:
        assert 15 < np.degrees(np.arccos(s.vectors[0] @ s.vectors[1])) < 50


def test_stain_amounts_survive_the_round_trip_through_light() -> None:
    stain = draw_stain(1, 0)
    amounts = np.random.default_rng(0).uniform(0, 0.8, (50, 3))
    density = optical_density(transmit(amounts, stain).astype(float), stain)
    recovered = np.linalg.solve(stain.vectors.T, density.T).T
    np.testing.assert_allclose(recovered, amounts, atol=1e-4)
    np.testing.assert_allclose(transmit(np.zeros((1, 3)), stain)[0], stain.background, rtol=1e-6)


def test_an_unknown_cell_type_is_refused(section: Section) -> None:
    nuclei = section.nuclei.assign(cell_type="Neuron")
    with pytest.raises(BadInput, match="cell_type holds 'Neuron'"):
        render(dataclasses.replace(section, nuclei=nuclei), stain_seed=0)
