from __future__ import annotations

import os
import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from ge2hist_core.config import SampleConfig
from ge2hist_core.model import CHUNK, GE2Hist
from ge2hist_core.sampler import Stopped
from ge2hist_core.types import BadInput, Cells
from perturb.cache import DiskCache
from perturb.edits import Perturbation
from perturb.grn import Network, Propagation, observed_range, propagate, randomised
from perturb.recipe import Recipe
from perturb.result import Result, load_result
from perturb.run import Progress, edited_cells, replay, run
from perturb.tables import edit_table

QUICK = SampleConfig(steps=3)


def make(model: GE2Hist, edit: str, seeds: tuple[int, ...] = (0, 1, 2), cells: tuple[str, ...] = ("cell-3",)) -> Recipe:
    return Recipe("d" * 64, model.sha256, cells, Perturbation.parse(edit), QUICK, seeds)


def same(a: Result, b: Result) -> None:
    for arm in ("base_arm", "edited_arm"):
        one, other = getattr(a, arm).to_arrays(), getattr(b, arm).to_arrays()
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    for name in ("readouts", "summary", "comparison", "states", "edits"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), check_exact=True)
    assert (a.recipe, a.warnings, a.provenance, a.model_card) == (b.recipe, b.warnings, b.provenance, b.model_card)


@pytest.fixture(scope="module")
def result(tiny_bundle: GE2Hist, demo_cells: Cells) -> Result:
    return run(make(tiny_bundle, "GAPDH:x4,CD8A:set=9,NOTINVOCAB1:ko"), tiny_bundle, demo_cells)


def test_the_edited_arm_differs_and_the_unedited_one_does_not_know_of_the_edit(
    result: Result, tiny_bundle: GE2Hist, demo_cells: Cells
) -> None:
    assert (result.base_arm.images != result.edited_arm.images).any()
    other = run(make(tiny_bundle, "GAPDH:ko"), tiny_bundle, demo_cells)
    np.testing.assert_array_equal(other.base_arm.images, result.base_arm.images)


def test_pictures_are_those_of_the_model_drawn_one_by_one(
    result: Result, tiny_bundle: GE2Hist, demo_cells: Cells
) -> None:
    """Both arms share the noise of a seed, whatever was drawn beside it."""
    for edit, niches in (("", result.base), (str(result.recipe.perturbation), result.edited)):
        cell = Perturbation.parse(edit).apply(demo_cells.take([3]))
        state = tiny_bundle.encode(tiny_bundle.embed(cell, 0))
        for niche in niches:
            np.testing.assert_array_equal(tiny_bundle.generate(state, [niche.seed], QUICK)[0], niche.image)
            assert niche.generated and niche.um_per_px == 0.5


@pytest.mark.parametrize("edit", ["", "CD8B:x1", "NOTINVOCAB1:x3"])
def test_an_edit_of_nothing_gives_exactly_zero(edit: str, tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    found = run(make(tiny_bundle, edit), tiny_bundle, demo_cells)
    np.testing.assert_array_equal(found.base_arm.images, found.edited_arm.images)
    tested = found.comparison[found.comparison["n"] > 0]
    assert len(tested) and (tested[["effect"]] == 0).all(axis=None) and (tested["p"] == 1).all()
    assert (found.states.filter(like="shift_") == 0).all(axis=None)


def test_comparison_follows_from_the_readouts(result: Result) -> None:
    """Recomputed with pandas from the long table, density counted from the nuclei tables."""
    wide = result.readouts.pivot(index=["readout", "seed"], columns="arm", values="value")
    table = result.comparison.set_index("readout")
    for readout in table.index:
        pairs = wide.loc[readout].dropna()
        assert table.at[readout, "n"] == len(pairs)
        if len(pairs):
            assert table.at[readout, "effect"] == pytest.approx((pairs["edited"] - pairs["base"]).mean())
            assert table.at[readout, "base"] == pytest.approx(pairs["base"].mean())
    area_mm2 = (32 * 0.5 / 1000) ** 2
    counts = [len(nuclei) for nuclei in result.base_nuclei]
    assert table.at["density", "base"] == pytest.approx(np.mean(counts) / area_mm2)
    columns = ["readout", "unit", "base", "edited", "effect", "low", "high", "p", "q", "n"]
    assert list(result.comparison.columns) == columns
    assert (result.comparison["q"].dropna() >= result.comparison["p"].dropna()).all()


def test_several_cells_are_drawn_each_with_every_seed(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    both = run(make(tiny_bundle, "GAPDH:x4", (0, 1), ("cell-3", "cell-20")), tiny_bundle, demo_cells)
    parts = [
        run(make(tiny_bundle, "GAPDH:x4", (0, 1), (cell,)), tiny_bundle, demo_cells) for cell in both.recipe.cell_ids
    ]
    np.testing.assert_array_equal(both.edited_arm.images, np.concatenate([part.edited_arm.images for part in parts]))
    effects = [part.comparison.set_index("readout").at["density", "effect"] for part in parts]
    row = both.comparison.set_index("readout").loc["density"]
    assert row["effect"] == pytest.approx(np.mean(effects)) and row["n"] == 4


def test_edit_table_shows_counts_bins_and_percentiles(result: Result, tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    table = result.edits.set_index("gene")
    assert list(table.index) == ["GAPDH", "CD8A", "NOTINVOCAB1"]
    before = demo_cells.counts[3, list(demo_cells.genes).index("GAPDH")]
    assert (table.at["GAPDH", "count_before"], table.at["GAPDH", "count_after"]) == (before, 4 * before)
    assert table.at["GAPDH", "bin_after"] > table.at["GAPDH", "bin_before"] > 0
    assert table.at["CD8A", "count_after"] == 9 and table.at["CD8A", "bin_before"] == 0 < table.at["CD8A", "bin_after"]
    assert not table.at["NOTINVOCAB1", "in_vocabulary"] and table.at["NOTINVOCAB1", "bin_after"] == 0
    assert table["percentile_before"].isna().all()  # six cells of a type are too few
    many = replace(demo_cells, cell_type=np.repeat("One type", len(demo_cells)))
    wide = edit_table(Perturbation.parse("GAPDH:set=1e6"), many.take([3]), tiny_bundle, 0, many)
    levels = demo_cells.counts[:, list(demo_cells.genes).index("GAPDH")].toarray().ravel()
    rank = 100 * ((levels < before).sum() + (levels == before).sum() / 2) / len(levels)
    assert wide["percentile_before"].item() == pytest.approx(rank)
    assert wide["percentile_after"].item() == 100.0


def test_warnings_name_what_is_technically_wrong(result: Result, tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    assert any("does not know the gene NOTINVOCAB1" in text for text in result.warnings)
    assert any("With 3 seeds no difference can reach p < 0.05" in text for text in result.warnings)
    row = demo_cells.counts[3].toarray().ravel()
    silent = demo_cells.genes[:-1][row[:-1] == 0][0]
    top = demo_cells.genes[:-1][row[:-1].argmax()]
    found = run(make(tiny_bundle, f"{silent}:ko,{top}:x2"), tiny_bundle, demo_cells)
    assert any(f"{silent} in cell cell-3 has no counts" in text and "set=COUNT" in text for text in found.warnings)
    assert any(f"{top} in cell cell-3" in text and "plateau" in text for text in found.warnings)
    assert not any("plateau" in text for text in result.warnings)


def test_a_cell_unlike_the_training_data_is_called_so(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    from ge2hist_core.support import Support

    embedding = tiny_bundle.embed(demo_cells, 0)
    strict = Support(embedding[:1], demo_cells.cell_id[:1], np.zeros(99, np.float32))  # nothing but cell-0 is inside
    model = replace(tiny_bundle, support=strict)
    model.__dict__["sha256"] = tiny_bundle.sha256
    found = run(make(model, "GAPDH:x4"), model, demo_cells)
    assert any("Cell cell-3 lies outside of what this model has seen (p = 0.01)" in text for text in found.warnings)
    inside = run(make(model, "GAPDH:x4", cells=("cell-0",)), model, demo_cells)
    assert any("The edit takes cell cell-0 outside" in text for text in inside.warnings)


def test_cache_gives_the_same_result_and_redraws_only_the_edited_arm(
    result: Result, tiny_bundle: GE2Hist, demo_cells: Cells, tmp_path
) -> None:
    cache = DiskCache(tmp_path)
    steps: list[Progress] = []
    same(run(result.recipe, tiny_bundle, demo_cells, cache=cache, on_progress=steps.append), result)
    both = len(steps)
    assert both == -(-6 // CHUNK) * QUICK.steps and steps[-1].fraction == 1.0
    steps.clear()
    same(run(result.recipe, tiny_bundle, demo_cells, cache=cache, on_progress=steps.append), result)
    assert not steps
    run(make(tiny_bundle, "GAPDH:ko"), tiny_bundle, demo_cells, cache=cache, on_progress=steps.append)
    assert len(steps) == -(-3 // CHUNK) * QUICK.steps and steps[0].text == "Drawing the edited niche"
    same(load_result(result.recipe.hash, cache), result)
    assert load_result("0" * 64, cache) is None


def test_a_lost_or_damaged_cache_entry_is_drawn_again(
    result: Result, tiny_bundle: GE2Hist, demo_cells: Cells, tmp_path
) -> None:
    cache = DiskCache(tmp_path)
    run(result.recipe, tiny_bundle, demo_cells, cache=cache)
    (file,) = tmp_path.glob(f"*/{result.recipe.hash}.npz")
    file.write_bytes(file.read_bytes()[:1000])
    assert load_result(result.recipe.hash, cache) is None
    same(run(result.recipe, tiny_bundle, demo_cells, cache=cache), result)


def test_cache_forgets_the_old_and_the_longest_unused(tmp_path) -> None:
    keys = [str(i) * 64 for i in range(4)]
    block = {"x": np.random.default_rng(0).integers(0, 255, 1000, dtype=np.uint8)}
    cache = DiskCache(tmp_path, max_bytes=10**6, max_age_s=3600)
    for key in keys:
        cache.store_arrays(key, block)
    files = {key: next(tmp_path.glob(f"*/{key}.npz")) for key in keys}
    now = files[keys[3]].stat().st_mtime
    for key, age in zip(keys, (7200, 30, 20, 10), strict=True):
        os.utime(files[key], (now - age, now - age))
    cache.prune()
    assert cache.load_arrays(keys[0]) is None
    assert cache.load_arrays(keys[1]) is not None  # now the latest used
    DiskCache(tmp_path, max_bytes=2 * files[keys[1]].stat().st_size + 10).prune()
    assert [files[key].exists() for key in keys] == [False, True, False, True]


def test_cache_takes_no_objects_and_no_paths(tmp_path) -> None:
    with pytest.raises(ValueError, match="Python objects"):
        DiskCache(tmp_path).store_arrays("0" * 64, {"x": np.array([object()])})
    with pytest.raises(ValueError, match="64 hexadecimal"):
        DiskCache(tmp_path).load_json("../../secret")


def test_preview_shows_the_picture_in_work_and_replay_ends_at_it(
    result: Result, tiny_bundle: GE2Hist, demo_cells: Cells
) -> None:
    last: dict[tuple[str, int], np.ndarray] = {}

    def keep(progress: Progress) -> None:
        last.update({(arm, i): image for arm, i, image in progress.preview()})

    run(result.recipe, tiny_bundle, demo_cells, on_progress=keep)
    assert set(last) == {(arm, i) for arm in ("base", "edited") for i in range(3)}
    frames = replay(result.edited_arm, tiny_bundle)
    assert frames.shape == (QUICK.steps, 32, 32, 3)
    # The last estimate of the clean picture is the picture; decoding in another batch may round a level differently.
    for found, expected in ((last["edited", 2], result.edited[2].image), (frames[-1], result.edited[0].image)):
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_long_sampling_keeps_few_frames(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    recipe = replace(make(tiny_bundle, "", (0,)), sample=SampleConfig("ddim", 60))
    frames = run(recipe, tiny_bundle, demo_cells).base_arm.frames
    assert len(frames) == 20


def test_cancel_ends_at_the_next_step_and_leaves_the_cache_whole(
    result: Result, tiny_bundle: GE2Hist, demo_cells: Cells, tmp_path
) -> None:
    cancel, seen, cache = threading.Event(), [], DiskCache(tmp_path)

    def stop_after_two(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == 2:
            cancel.set()

    with pytest.raises(Stopped):
        run(result.recipe, tiny_bundle, demo_cells, cache=cache, on_progress=stop_after_two, cancel=cancel)
    assert len(seen) == 2
    assert load_result(result.recipe.hash, cache) is None
    same(run(result.recipe, tiny_bundle, demo_cells, cache=cache), result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_sha256": "0" * 64}, "made with model 000000000000"),
        ({"cell_ids": ("nobody",)}, "no cell 'nobody'"),
        ({"perturbation": Perturbation.parse("CD8X:ko")}, "no gene 'CD8X': did you mean CD8"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    change: dict, message: str, tiny_bundle: GE2Hist, demo_cells: Cells
) -> None:
    with pytest.raises(BadInput, match=message):
        run(replace(make(tiny_bundle, ""), **change), tiny_bundle, demo_cells)


# ---- Edits that spread through a network ---------------------------------------------------------------------------

NET = Network(np.array(["GAPDH", "GAPDH"]), np.array(["KRT8", "CD68"]), np.array([0.8, -0.6]), "two edges")


def spreading(model: GE2Hist, cells: tuple[str, ...] = ("cell-3",)) -> Recipe:
    recipe = make(model, "GAPDH:x4", seeds=(4, 5), cells=cells)
    return replace(recipe, propagation=Propagation(NET.sha256, NET.name, 1, (0, 1)))


@pytest.fixture(scope="module")
def spread(tiny_bundle: GE2Hist, demo_cells: Cells) -> Result:
    return run(spreading(tiny_bundle, ("cell-3", "cell-9")), tiny_bundle, demo_cells, network=NET)


def test_spreading_draws_the_direct_edit_and_random_wiring_beside_it(
    spread: Result, tiny_bundle: GE2Hist, demo_cells: Cells
) -> None:
    assert list(spread.arms) == ["base", "edited", "direct", "control"]
    direct = run(replace(spread.recipe, propagation=None), tiny_bundle, demo_cells)
    np.testing.assert_array_equal(spread.arms["direct"].images, direct.edited_arm.images)
    np.testing.assert_array_equal(spread.base_arm.images, direct.base_arm.images)
    assert list(direct.arms) == ["base", "edited"] and direct.spread.empty and direct.spread_effects.empty


def test_the_edited_arm_is_drawn_from_propagated_counts(
    spread: Result, tiny_bundle: GE2Hist, demo_cells: Cells
) -> None:
    chosen = demo_cells.take([3, 9])
    direct = spread.recipe.perturbation.apply(chosen, demo_cells)
    counts = propagate(
        NET, chosen.genes, chosen.counts, direct.counts, *observed_range(demo_cells, (0, 1)), steps=1, edited=["GAPDH"]
    ).counts
    latent = tiny_bundle.encode(tiny_bundle.embed(direct.with_counts(counts), 0))
    np.testing.assert_allclose(spread.edited_arm.latent.z_e, latent.z_e, atol=1e-6)
    moved = spread.spread.set_index(["cell_id", "gene"])
    for c, name in enumerate(("cell-3", "cell-9")):
        for g in np.flatnonzero(counts[c].toarray()[0] != direct.counts[c].toarray()[0]):
            assert moved.loc[(name, chosen.genes[g]), "count_after"] == pytest.approx(counts[c, g])
    assert set(spread.spread["gene"]) <= {"KRT8", "CD68"} and len(spread.spread)


def test_each_seed_of_the_control_has_its_own_wiring(spread: Result, demo_cells: Cells) -> None:
    chosen = demo_cells.take([3, 9])
    control = spread.recipe.arms["control"]
    some = edited_cells(control, chosen, demo_cells, NET)
    assert len(some) == 2
    for seed, cells in zip(control.seeds, some, strict=True):
        alone = replace(spread.recipe, propagation=replace(spread.recipe.propagation, network_sha256="0" * 64))
        other = edited_cells(alone, chosen, demo_cells, randomised(NET, seed))[0]
        assert (cells.counts != other.counts).nnz == 0


def test_contrasts_are_paired_differences_of_arms(spread: Result) -> None:
    wide = spread.readouts.pivot(index=["readout", "cell_id", "seed"], columns="arm", values="value").loc["density"]
    effects = spread.spread_effects.set_index(["contrast", "readout"])["effect"]
    for contrast, a, b in (
        ("direct - unedited", "direct", "base"),
        ("network - direct", "edited", "direct"),
        ("control - direct", "control", "direct"),
        ("network - control", "edited", "control"),
    ):
        assert effects[(contrast, "density")] == pytest.approx((wide[a] - wide[b]).mean())


def test_a_result_that_spread_comes_back_from_the_cache(
    tmp_path, tiny_bundle: GE2Hist, demo_cells: Cells, spread: Result
) -> None:
    cache = DiskCache(tmp_path)
    run(spread.recipe, tiny_bundle, demo_cells, network=NET, cache=cache)
    found = load_result(spread.recipe.hash, cache)
    assert found is not None and found.network.sha256 == NET.sha256
    same(found, spread)
    for name in ("direct", "control"):
        np.testing.assert_array_equal(found.arms[name].images, spread.arms[name].images)
    pd.testing.assert_frame_equal(found.spread, spread.spread)
    pd.testing.assert_frame_equal(found.spread_effects, spread.spread_effects)


def test_another_network_or_none_is_refused(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    for network in (None, replace(NET, weights=NET.weights * 2)):
        with pytest.raises(BadInput, match="spreads edits through the network 'two edges'.*open that network"):
            run(spreading(tiny_bundle), tiny_bundle, demo_cells, network=network)


def test_a_network_without_edges_from_the_edit_says_so(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    recipe = replace(spreading(tiny_bundle), perturbation=Perturbation.parse("CD8A:set=9"))
    found = run(recipe, tiny_bundle, demo_cells, network=NET)
    assert any("moves no gene of these cells" in warning for warning in found.warnings)
    np.testing.assert_array_equal(found.edited_arm.images, found.arms["direct"].images)


def test_a_gene_stays_in_the_range_that_its_own_type_shows(tiny_bundle: GE2Hist, demo_cells: Cells) -> None:
    """Of two types, one never expresses the target: there it cannot rise, whatever the other one shows."""
    counts = np.ones((60, 3), np.float32)
    counts[30:, 1] = 0
    counts[:30, 1] = np.arange(30)
    kind = np.repeat(["a", "b"], 30)
    cells = Cells(sp.csr_matrix(counts), np.array(["G", "T", "X"]), np.array([f"c{i}" for i in range(60)]), kind)
    net = Network(np.array(["G"]), np.array(["T"]), np.array([2.0]), "rise")
    recipe = Recipe("d" * 64, tiny_bundle.sha256, ("c3", "c40"), Perturbation.parse("G:x4"))
    recipe = replace(recipe, propagation=Propagation(net.sha256, "rise", 1))
    edited = edited_cells(recipe, cells.take([3, 40]), cells, net)[0].counts.toarray()
    assert edited[0, 1] > counts[3, 1] and edited[1, 1] == 0
    swapped = replace(recipe, cell_ids=("c40", "c3"))
    other = edited_cells(swapped, cells.take([40, 3]), cells, net)[0].counts.toarray()
    np.testing.assert_array_equal(other[::-1], edited)
