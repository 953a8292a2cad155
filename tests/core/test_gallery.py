"""Galleries are pictures of states: the same as drawn one by one, and states where they are said to be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ge2hist_core import rng
from ge2hist_core.config import SampleConfig
from ge2hist_core.gallery import (
    Gallery,
    axis_environments,
    between,
    cell_types,
    draw,
    prior_environments,
    readouts,
)
from ge2hist_core.types import BadInput, Latent

QUICK = SampleConfig(steps=2)


def test_every_picture_of_a_grid_is_that_of_its_state_drawn_alone(tiny_bundle) -> None:
    types = ("Fibroblast", "B cell", "Endothelium")
    names, z_e = prior_environments(tiny_bundle, 2, seed=5)
    gallery = Gallery(types, names, cell_types(tiny_bundle, types, 5), z_e, seed=9, sample=QUICK)
    images = draw(gallery, tiny_bundle)
    assert images.shape == (6, 32, 32, 3)
    assert gallery.titles[3] == ("B cell", "prior draw 2")
    for i, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1))):
        state = Latent(gallery.z_c[[row]], gallery.z_e[[column]])
        np.testing.assert_array_equal(images[i], tiny_bundle.generate(state, [9], QUICK)[0])
    table = readouts(gallery, tiny_bundle, images)
    assert table["row"].tolist() == [row for row, _ in gallery.titles]
    assert table["n"].tolist() == [len(nuclei) for nuclei in tiny_bundle.read_nuclei(images)]


def test_a_type_is_drawn_from_its_own_component_and_by_the_seed(tiny_bundle) -> None:
    np.testing.assert_array_equal(cell_types(tiny_bundle, ["B cell"], 3), tiny_bundle.sample_type("B cell", 1, 3))
    assert (cell_types(tiny_bundle, ["B cell"], 3) != cell_types(tiny_bundle, ["B cell"], 4)).any()
    with pytest.raises(BadInput, match="Cell type 'Neuron' is unknown"):
        cell_types(tiny_bundle, ["Neuron"], 0)


def test_an_axis_is_the_direction_of_the_largest_variance(tiny_bundle) -> None:
    names, z_e = axis_environments(tiny_bundle, 0)
    assert names == ("-2 sd", "-1 sd", "+0 sd", "+1 sd", "+2 sd")
    reference = tiny_bundle.encode(tiny_bundle.support.reference).z_e.astype(np.float64)
    np.testing.assert_allclose(z_e[2], reference.mean(axis=0), atol=1e-5)
    values, vectors = np.linalg.eigh(np.cov(reference.T))
    step = z_e[3] - z_e[2]
    assert np.linalg.norm(step) == pytest.approx(np.sqrt(values[-1]), rel=1e-4)
    assert abs(step @ vectors[:, -1]) == pytest.approx(np.linalg.norm(step), rel=1e-4)
    assert step[np.abs(step).argmax()] > 0
    with pytest.raises(BadInput, match="axis is 99: choose 0 to 3"):
        axis_environments(tiny_bundle, 99)


@pytest.mark.parametrize("part", ["z_c", "z_e", "both"])
def test_a_way_starts_and_ends_at_its_cells_in_the_part_that_moves(part: str) -> None:
    a, b = (Latent(rng.normal(0, name, (1, 3)).numpy(), rng.normal(1, name, (1, 2)).numpy()) for name in "ab")
    way = between(a, b, 5, part)
    for name in ("z_c", "z_e"):
        start, end, path = getattr(a, name)[0], getattr(b, name)[0], getattr(way, name)
        np.testing.assert_array_equal(path[0], start)
        np.testing.assert_allclose(path[-1], end if part in (name, "both") else start, atol=1e-6)
        np.testing.assert_allclose(path[2], (path[0] + path[-1]) / 2, atol=1e-6)


def test_a_path_draws_its_states_in_their_order(tiny_bundle) -> None:
    a = Latent(np.zeros((1, 4)), np.zeros((1, 4)))
    b = Latent(np.ones((1, 4)), np.ones((1, 4)))
    way = between(a, b, 3, "both")
    titles = ("start", "half way", "end")
    gallery = Gallery(titles, titles, way.z_c, way.z_e, sample=QUICK, paired=True)
    np.testing.assert_array_equal(draw(gallery, tiny_bundle), tiny_bundle.generate(way, [0, 0, 0], QUICK))


def test_the_hash_sees_all_that_decides_the_pictures() -> None:
    base = Gallery(("a",), ("b",), np.zeros((1, 4)), np.zeros((1, 4)))
    others = [
        replace(base, z_c=np.ones((1, 4))),
        replace(base, z_e=np.ones((1, 4))),
        replace(base, seed=1),
        replace(base, sample=QUICK),
    ]
    assert len({base.hash("m"), base.hash("n"), *(other.hash("m") for other in others)}) == 6
    assert replace(base, rows=("another title",)).hash("m") == base.hash("m")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gallery((), ("b",), np.zeros((0, 4)), np.zeros((1, 4))), "The gallery is empty"),
        (lambda: Gallery(("a",) * 20, ("b",) * 20, np.zeros((20, 4)), np.zeros((20, 4))), "400 pictures are more than"),
        (lambda: between(Latent(np.zeros((1, 1)), np.zeros((1, 1))), None, 1, "both"), "1 states make no way"),
        (lambda: between(Latent(np.zeros((1, 1)), np.zeros((1, 1))), None, 3, "z"), "part is 'z'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        call()
