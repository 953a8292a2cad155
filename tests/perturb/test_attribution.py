"""The smooth chain against the model's own steps, its gradient against finite differences, its checks at work."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ge2hist_core import rng
from ge2hist_core.autoencoder import to_uint8
from ge2hist_core.config import SampleConfig
from ge2hist_core.model import GE2Hist
from ge2hist_core.sampler import Stopped
from ge2hist_core.types import BadInput, Cells
from perturb import attribution
from perturb.attribution import Attribution, Chain, attribute, readout_names
from perturb.cache import DiskCache

ROW = 3


@pytest.fixture(scope="module")
def cell(demo_cells: Cells) -> Cells:
    return demo_cells.take([ROW])


@pytest.fixture(scope="module")
def found(tiny_bundle: GE2Hist, cell: Cells) -> Attribution:
    return attribute(tiny_bundle, cell, "density", steps=2)


def state(chain: Chain) -> torch.Tensor:
    with torch.no_grad():
        return chain.state(torch.from_numpy(chain.bins)[None])


def test_the_state_of_the_cells_own_bins_is_the_models(tiny_bundle: GE2Hist, cell: Cells) -> None:
    chain = Chain(tiny_bundle, cell, "density")
    latent = tiny_bundle.encode(tiny_bundle.embed(cell, 0))
    np.testing.assert_allclose(state(chain).numpy(), latent.z_s, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_pictures_are_those_of_the_models_ddim(tiny_bundle: GE2Hist, cell: Cells, steps: int) -> None:
    chain = Chain(tiny_bundle, cell, "density", seeds=(0, 5), steps=steps)
    with torch.no_grad():
        mine = to_uint8(chain.pixels(state(chain).expand(2, -1), chain.noise)).astype(int)
    latent = tiny_bundle.encode(tiny_bundle.embed(cell, 0)).take([0, 0])
    theirs = tiny_bundle.generate(latent, [0, 5], SampleConfig("ddim", steps)).astype(int)
    assert np.abs(mine - theirs).max() <= 1


def test_the_smooth_readouts_follow_from_the_readers_map(tiny_bundle: GE2Hist, cell: Cells) -> None:
    pixels = rng.normal(0, "pixels", (2, 3, 32, 32)).clamp(-1, 1)
    with torch.no_grad():
        out = tiny_bundle.reader.net(pixels).double().numpy()
        value = {name: Chain(tiny_bundle, cell, name).read(pixels).numpy() for name in readout_names()}
    heat = 1 / (1 + np.exp(-out[:, 0]))
    odds = np.exp(out[:, 4:])
    share = odds / odds.sum(axis=1, keepdims=True)
    area = (32 * 0.5 / 1000) ** 2
    np.testing.assert_allclose(value["density"], heat.sum(axis=(1, 2)) / area, rtol=1e-4)
    for i, name in enumerate(tiny_bundle.reader.classes):
        mine = (heat * share[:, i]).sum(axis=(1, 2))
        np.testing.assert_allclose(value[f"density:{name}"], mine / area, rtol=1e-4)
        np.testing.assert_allclose(value[f"fraction:{name}"], mine / heat.sum(axis=(1, 2)), rtol=1e-4)


def test_the_smooth_density_is_the_counted_one_in_the_cells_own_pictures(
    found: Attribution, tiny_bundle: GE2Hist, cell: Cells
) -> None:
    latent = tiny_bundle.encode(tiny_bundle.embed(cell, 0)).take([0] * 4)
    nuclei = tiny_bundle.read_nuclei(tiny_bundle.generate(latent, [0, 1, 2, 3], SampleConfig("ddim", 2)))
    counted = np.mean([len(table) for table in nuclei]) / (32 * 0.5 / 1000) ** 2
    assert found.value == pytest.approx(counted, rel=0.05) and found.unit == "cells/mm²"


def test_the_expected_neighbours_are_the_models(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    for row in (3, 30):
        one = demo_cells.take([row])
        expected = tiny_bundle.expected_readouts(tiny_bundle.encode(tiny_bundle.embed(one, 0)))
        for name in readout_names("neighbours"):
            chain = Chain(tiny_bundle, one, name, through="neighbours")
            assert chain.values(chain.bins[None])[0] == pytest.approx(expected[name][0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("through", ["picture", "neighbours"])
def test_the_gradient_is_the_slope_of_the_chain_in_every_gene(tiny_bundle: GE2Hist, cell: Cells, through: str) -> None:
    chain = Chain(tiny_bundle, cell, "density", through=through, seeds=(0,), steps=2)
    slope = chain.gradient()[1][0]
    step = 0.05 * np.eye(len(chain.bins), dtype=np.float32)  # the loud test model bends within half a bin
    difference = (chain.values(chain.bins + step) - chain.values(chain.bins - step)) / 0.1
    assert np.linalg.norm(difference) > 0
    assert np.linalg.norm(slope - difference) < 0.1 * np.linalg.norm(difference)


def test_seeds_are_averaged_and_do_not_meddle(tiny_bundle: GE2Hist, cell: Cells) -> None:
    together = Chain(tiny_bundle, cell, "density", seeds=(0, 7), steps=2).gradient()
    for i, seed in enumerate((0, 7)):
        alone = Chain(tiny_bundle, cell, "density", seeds=(seed,), steps=2).gradient()
        for a, b in zip(alone, together, strict=True):
            # Rounding differs with the batch, and a pixel at the edge of what can be shown is on or off.
            np.testing.assert_allclose(a[0], b[i], rtol=0.02, atol=0.02 * np.abs(b[i]).max())
    assert np.abs(together[1][0] - together[1][1]).max() > 0.05 * np.abs(together[1]).max()
    table = attribute(tiny_bundle, cell, seeds=(0, 7), steps=2, check=False).table
    assert (np.diff(table["gradient"].abs()) <= 0).all()
    mean = dict(zip(Chain(tiny_bundle, cell, "density").genes, together[1].mean(axis=0), strict=True))
    ratio = table["gradient"] / table["gene"].map(mean)  # nuclei counted per sum of centre probabilities
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)


def test_every_gene_that_the_encoder_sees_is_there_once(found: Attribution, tiny_bundle: GE2Hist, cell: Cells) -> None:
    bins = tiny_bundle.scgpt.bins(cell, 0).toarray()[0]
    seen = {gene: n for gene, n in zip(cell.genes, bins, strict=True) if n > 0}
    assert dict(zip(found.table["gene"], found.table["bin"], strict=True)) == seen
    assert (found.table["low"] <= found.table["gradient"]).all()
    assert (found.table["gradient"] <= found.table["high"]).all()


def test_the_checks_are_made_and_passed_is_their_conjunction(found: Attribution) -> None:
    assert found.checks["check"].str.contains("finite differences").sum() == 2
    assert found.checks["check"].str.contains("initialised anew").sum() == 3
    assert found.checks["check"].str.contains("knock-outs").sum() == 1
    by_name = found.checks.set_index("check")
    assert by_name.at["rank correlation with finite differences", "value"] > 0.9
    assert by_name.at["relative error against finite differences", "value"] < 0.3
    assert found.passed == found.checks["passed"].all() and len(found.reasons) == (~found.checks["passed"]).sum()


def test_a_wrong_gradient_does_not_pass(tiny_bundle: GE2Hist, cell: Cells) -> None:
    chain = Chain(tiny_bundle, cell, "density", seeds=(0,), steps=2)
    slopes = chain.gradient()[1]
    assert all(row[3] for row in attribution._finite_differences(chain, slopes))
    assert not any(row[3] for row in attribution._finite_differences(chain, -slopes))
    assert not all(row[3] for row in attribution._finite_differences(chain, 2 * slopes))


def test_an_attribution_that_random_weights_give_too_does_not_pass(tiny_bundle: GE2Hist, cell: Cells) -> None:
    """The attribution of a random U-Net is held against that same random U-Net."""
    chain = Chain(tiny_bundle, cell, "density", seeds=(0, 1), steps=2)
    same = chain.with_part("unet", attribution._initialised_anew(tiny_bundle, "unet", 0), 0).gradient()[1]
    found = attribution._unlike("unet", [same[0]], same)
    assert found[1] == pytest.approx(1.0) and not found[3]


def test_fresh_parts_differ_from_the_trained_ones_and_keep_the_datas_statistics(tiny_bundle: GE2Hist) -> None:
    before = torch.get_rng_state()
    fresh = {part: attribution._initialised_anew(tiny_bundle, part, 0) for part in attribution.PARTS}
    assert torch.equal(torch.get_rng_state(), before)
    own = {"encoder": tiny_bundle.scgpt.network, "vae": tiny_bundle.encoder, "unet": tiny_bundle.denoiser}
    for name, part in fresh.items():
        pairs = list(zip(part.parameters(), own[name].parameters(), strict=True))
        assert sum(not torch.equal(a, b) for a, b in pairs) > 0.4 * len(pairs)
    assert torch.equal(fresh["vae"].embedding_std, tiny_bundle.encoder.embedding_std)


def test_reasons_name_what_failed() -> None:
    checks = pd.DataFrame(
        [("rank correlation with knock-outs", 0.2, 0.5, False), ("relative error against finite differences", 0.4,
         0.2, False), ("rank correlation with finite differences", 0.95, 0.9, True)],
        columns=["check", "value", "limit", "passed"],
    )  # fmt: skip
    assert attribution._reasons(checks) == [
        "The rank correlation with knock-outs is 0.20, it should be at least 0.50.",
        "The relative error against finite differences is 0.40, it should be at most 0.20.",
    ]


def test_without_checks_nothing_counts_as_passed(tiny_bundle: GE2Hist, cell: Cells) -> None:
    assert not attribute(tiny_bundle, cell, through="neighbours", check=False).passed


def test_a_finished_attribution_comes_from_the_cache(tiny_bundle: GE2Hist, cell: Cells, tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    one = attribute(tiny_bundle, cell, "fraction:Fibroblast", through="neighbours", cache=cache)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    two = attribute(tiny_bundle, cell, "fraction:Fibroblast", through="neighbours", cache=cache)
    for name in ("table", "checks"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name))
    assert replace(two, table=one.table, checks=one.checks) is not one
    assert (one.value, one.passed, one.reasons, one.unit) == (two.value, two.passed, two.reasons, two.unit)
    attribute(tiny_bundle, cell.scale_genes({"GAPDH": 2.0}), "fraction:Fibroblast", through="neighbours", cache=cache)
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_progress_rises_to_one_and_cancel_stops(tiny_bundle: GE2Hist, cell: Cells) -> None:
    fractions: list[float] = []
    attribute(tiny_bundle, cell, steps=2, on_progress=lambda p: fractions.append(p.fraction))
    assert fractions == sorted(fractions) and fractions[-1] == pytest.approx(1.0)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Stopped):
        attribute(tiny_bundle, cell, steps=2, cancel=cancel)


def test_what_cannot_be_attributed_is_refused_with_a_cure(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    one = demo_cells.take([ROW])
    with pytest.raises(BadInput, match="2 cells"):
        attribute(tiny_bundle, demo_cells.take([0, 1]))
    with pytest.raises(BadInput, match="choose density"):
        attribute(tiny_bundle, one, "spacing")
    with pytest.raises(BadInput, match="choose picture or neighbours"):
        attribute(tiny_bundle, one, through="mirror")
    with pytest.raises(BadInput, match="each once"):
        attribute(tiny_bundle, one, seeds=(1, 1))
    silent = one.scale_genes(dict.fromkeys(one.genes, 0.0))
    with pytest.raises(BadInput, match="no gene that the encoder knows"):
        attribute(tiny_bundle, silent)
