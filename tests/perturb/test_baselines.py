"""Baselines: exact where the truth is linear, neighbours and classes by hand, skill in closed form, the file whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge

from ge2hist_core.__main__ import run_command
from ge2hist_core.config import READER_CLASSES, ModelConfig, SampleConfig
from ge2hist_core.model import GE2Hist
from ge2hist_core.niche import niche_stats
from ge2hist_core.nuclei import LearnedReader, ReaderNet
from ge2hist_core.store import TissueStore, write_store
from ge2hist_core.types import BadInput, Cells
from perturb.baselines import (
    BASELINES,
    Baselines,
    fit_baselines,
    fit_ridge,
    load_baselines,
    measure_skill,
    skill_table,
)
from perturb.edits import Perturbation
from perturb.recipe import Recipe
from perturb.run import run

SEED, DONORS, SIZE_UM = 14, range(2, 8), 128.0
MODEL = ModelConfig(
    embedding_dim=16, d_c=3, d_e=2, vae_hidden=8, ae_channels=(8, 8), latent_channels=2, unet_channels=(8,),
    condition_tokens=2, condition_dim=8, attention_heads=2, time_embedding_dim=16,
)  # fmt: skip
FAST = SampleConfig(steps=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six simulated donors with some twenty whole tiles each."""
    from ge2hist_core.simulator.command import simulate_sections
    from ge2hist_core.simulator.expression import load_genes

    path = tmp_path_factory.mktemp("data") / "tissue.zarr"
    simulation = {"seed": SEED, "donors": list(DONORS), "size_um": SIZE_UM}
    write_store(path, simulate_sections(SEED, DONORS, SIZE_UM), list(load_genes().symbols), simulation=simulation)
    return path


@pytest.fixture(scope="module")
def store(data: Path) -> TissueStore:
    return TissueStore(data)


@pytest.fixture
def bundle(model: GE2Hist, tmp_path: Path) -> Path:
    """A copy of the model's folder that a test may write into."""
    model.save(tmp_path / "bundle")
    model.folder = tmp_path / "bundle"
    return tmp_path / "bundle"


@pytest.fixture(scope="module")
def model(store: TissueStore, scgpt_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> GE2Hist:
    """Random weights, large enough that a cell's genes move its picture."""
    model = GE2Hist.untrained(MODEL, scgpt_folder)
    some = store.cells.take(slice(60))
    labels = torch.tensor([model.cell_types.index(name) for name in some.cell_type])
    model.encoder.fit_standardisation(torch.from_numpy(model.embed(some, 0)), labels)
    for parameter in (*model.encoder.parameters(), *model.denoiser.parameters()):
        parameter.mul_(2.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = ReaderNet(8, (8, 8, 8))
    model.reader = LearnedReader(net, threshold=0.02)
    model.save(tmp_path_factory.mktemp("bundle"))
    return model


@pytest.fixture(scope="module")
def fitted(model: GE2Hist, store: TissueStore) -> Baselines:
    return fit_baselines(model, store, cells=100)


# --- the regression ---------------------------------------------------------------------------------------------------


def test_ridge_is_exact_where_the_truth_is_linear() -> None:
    draws = np.random.default_rng(0)
    x, slope = draws.normal(size=(200, 5)), draws.normal(size=(5, 2))
    found = fit_ridge(x, 3.0 + x @ slope, np.arange(200) % 8, penalties=(1e-9, 10.0, 1e3))
    np.testing.assert_allclose(found.coefficients, slope, atol=1e-6)
    assert (found.penalty == 1e-9).all()
    new = draws.normal(size=(3, 5))
    np.testing.assert_allclose(found.predict(new), 3.0 + new @ slope, atol=1e-6)


def test_ridge_agrees_with_sklearn_and_its_penalty_is_the_one_of_least_error_on_donors_left_out() -> None:
    draws = np.random.default_rng(1)
    donor = np.repeat(np.arange(5), 12)
    x = draws.normal(size=(60, 40)) + draws.normal(size=(5, 40))[donor]
    y = x[:, :3].sum(axis=1) + draws.normal(0, 2, 60) + draws.normal(0, 3, 5)[donor]
    penalties = (0.1, 10.0, 1000.0)
    found = fit_ridge(x, y[:, None], donor, penalties)
    error = []
    for penalty in penalties:
        left_out = [(y[donor == d] - SklearnRidge(alpha=penalty).fit(x[donor != d], y[donor != d])
                     .predict(x[donor == d])) ** 2 for d in range(5)]  # fmt: skip
        error.append(np.concatenate(left_out).sum())
    assert found.penalty[0] == penalties[int(np.argmin(error))]
    theirs = SklearnRidge(alpha=found.penalty[0]).fit(x, y)
    np.testing.assert_allclose(found.predict(x)[:, 0], theirs.predict(x), atol=1e-8)


def test_undefined_readouts_are_left_out_target_by_target() -> None:
    draws = np.random.default_rng(2)
    x, donor = draws.normal(size=(80, 6)), np.arange(80) % 4
    y = draws.normal(size=(80, 2))
    y[::3, 1] = np.nan
    found = fit_ridge(x, y, donor, (5.0,))
    keep = np.isfinite(y[:, 1])
    for target, rows in ((0, np.ones(80, bool)), (1, keep)):
        theirs = SklearnRidge(alpha=5.0).fit(x[rows], y[rows, target])
        np.testing.assert_allclose(found.predict(x)[:, target], theirs.predict(x), atol=1e-8)
    y[1:, 1] = np.nan
    with pytest.raises(BadInput, match="more cells"):
        fit_ridge(x, y, donor, (5.0,))


# --- skill ------------------------------------------------------------------------------------------------------------


def planted(noise: float, pictures: int, n: int = 4000) -> dict[str, np.ndarray]:
    """Truth of variance 1 + 1 around a known signal; the model draws the signal with noise of its own."""
    draws = np.random.default_rng(3)
    signal = draws.normal(size=(n, 1))
    drawn = signal[:, None] + noise * draws.normal(size=(n, pictures, 1))
    return {
        "truth": signal + draws.normal(size=(n, 1)),
        "model": drawn.mean(axis=1),
        "variance": drawn.var(axis=1, ddof=1) / pictures,
    }


def test_skill_is_one_less_the_ratio_of_errors_however_few_pictures_were_drawn() -> None:
    """A perfect model errs by 1, the mean of all by 2: skill 1/2; noise of single pictures must not count."""
    for pictures in (2, 8):
        values = planted(noise=2.0, pictures=pictures)
        zero = {"no change": np.zeros_like(values["truth"])}
        table = skill_table(("density",), **values, baselines=zero, donor=np.arange(4000) % 40, seed=0)
        row = table.iloc[0]
        assert row["skill"] == pytest.approx(0.5, abs=0.05)
        assert row["low"] < 0.5 < row["high"] and bool(row["beats"]) and (row["n"], row["donors"]) == (4000, 40)
        assert row["rmse no change"] == pytest.approx(np.sqrt((values["truth"] ** 2).mean()))


def test_the_best_baseline_is_the_measure_and_a_model_that_is_worse_does_not_beat_it() -> None:
    values = planted(noise=0.5, pictures=4)
    good = values["truth"] + 0.1
    others = {"no change": np.zeros_like(good), "ridge": good}
    table = skill_table(("density",), **values, baselines=others, donor=np.arange(4000) % 40, seed=0)
    assert table["best"][0] == "ridge" and not table["beats"][0] and table["skill"][0] < 0
    # A readout that never varies has no skill, an undefined picture does not count.
    values["variance"][:100] = np.nan
    assert skill_table(("density",), **values, baselines=others, donor=np.arange(4000) % 40, seed=0)["n"][0] == 3900
    values["truth"] = np.ones_like(good)
    assert not len(skill_table(("density",), **values, baselines=others, donor=np.arange(4000) % 40, seed=0))


# --- fitted on tiles --------------------------------------------------------------------------------------------------


def test_the_reference_is_what_the_reader_finds_in_tiles_of_training_donors(
    fitted: Baselines, model: GE2Hist, store: TissueStore
) -> None:
    assert fitted.provenance["train"]["cells"] == len(fitted.reference) == len(fitted.reference_readouts)
    assert set(fitted.provenance["train"]["donors"]) <= set(store.split()["train"])
    rows = store.rows(store.split()["train"])
    tables = model.read_nuclei(store.tiles(rows))
    every = pd.DataFrame([niche_stats(t, (64.0, 64.0), READER_CLASSES).readouts() for t in tables])
    if len(rows) <= 100:
        np.testing.assert_allclose(fitted.reference_readouts, every[list(fitted.readouts)], rtol=1e-6)
        np.testing.assert_allclose(fitted.overall, every[list(fitted.readouts)].mean(), rtol=1e-6)
    assert set(fitted.reference_readouts[:, 0].round(3)) <= set(every["density"].to_numpy().astype(np.float32).round(3))


def test_neighbours_and_classes_by_hand(fitted: Baselines, model: GE2Hist, store: TissueStore) -> None:
    some = store.cells.take(store.rows(store.split()["test"])[:7])
    embedding = model.embed(some, 0)
    found = fitted.predict(embedding, some, some.cell_type)
    assert tuple(found) == BASELINES
    query = (embedding - fitted.embedding_mean) @ fitted.components.T
    for i in range(7):
        near = np.argsort(np.linalg.norm(fitted.reference.astype(np.float64) - query[i], axis=1))[:20]
        np.testing.assert_allclose(found["nearest cells"][i, 0], fitted.reference_readouts[near, 0].mean(), rtol=1e-5)
        place = fitted.types.index(some.cell_type[i])
        np.testing.assert_array_equal(found["class mean"][i], fitted.type_means[place])
    np.testing.assert_array_equal(found["no change"], np.tile(fitted.overall, (7, 1)))
    unknown = fitted.predict(embedding, some, np.repeat("Neuron", 7))
    np.testing.assert_array_equal(unknown["class mean"], found["no change"])


def test_order_and_absence_of_genes(fitted: Baselines, store: TissueStore) -> None:
    some = store.cells.take([0, 1, 2])
    embedding = np.zeros((3, 16))
    order = np.random.default_rng(0).permutation(len(some.genes))
    mixed = Cells(some.counts[:, order], some.genes[order], some.cell_id)
    whole, shuffled = (fitted.predict(embedding, c, np.repeat("", 3))["ridge"] for c in (some, mixed))
    np.testing.assert_allclose(shuffled, whole)
    # Without any gene of the panel but those at their usual share there is nothing to say: the mean of all.
    part = Cells(np.tile(fitted.share[:5] * 1e4, (1, 1)), fitted.genes[:5], np.array(["a"]))
    x = np.log1p(fitted.share[:5] * 1000)
    by_hand = fitted.ridge.intercept + (x - fitted.ridge.mean[:5]) @ fitted.ridge.coefficients[:5]
    np.testing.assert_allclose(fitted.predict(embedding[:1], part, np.array([""]))["ridge"][0], by_hand, rtol=1e-5)
    with pytest.raises(BadInput, match="same kind of panel"):
        fitted.predict(embedding[:1], Cells(np.ones((1, 1)), np.array(["X"]), np.array(["a"])), np.array([""]))


def test_effects_of_an_edit_stand_beside_the_models(fitted: Baselines, model: GE2Hist, store: TissueStore) -> None:
    chosen = store.cells.take(store.rows(store.split()["test"])[:2])
    gene = str(chosen.genes[np.asarray(chosen.counts.sum(axis=0)).ravel().argmax()])
    perturbation = Perturbation.parse(f"{gene}:ko")
    recipe = Recipe("d" * 64, model.sha256, tuple(chosen.cell_id), perturbation, FAST, (0, 1))
    result = run(recipe, model, chosen)
    edited = perturbation.apply(chosen)
    table = fitted.effects(result, chosen, edited).set_index("readout")
    comparison = result.comparison.set_index("readout")
    assert (table["no change"] == 0).all()
    np.testing.assert_array_equal(table["model"], comparison.loc[table.index, "effect"])
    x = [np.log1p(c.counts.toarray() / c.counts.toarray().sum(axis=1, keepdims=True) * 1000) for c in (chosen, edited)]
    by_hand = ((x[1] - x[0]) @ fitted.ridge.coefficients).mean(axis=0)
    for name in table.index:
        assert table.at[name, "ridge"] == pytest.approx(by_hand[fitted.readouts.index(name)], rel=1e-4, abs=1e-8)
    before = fitted.predict(result.base_arm.embedding, chosen, chosen.cell_type)["nearest cells"]
    after = fitted.predict(result.edited_arm.embedding, edited, chosen.cell_type)["nearest cells"]
    assert table.at["density", "nearest cells"] == pytest.approx((after - before).mean(axis=0)[0])
    nothing = fitted.effects(run(replace(recipe, perturbation=Perturbation()), model, chosen), chosen, chosen)
    assert (nothing[list(BASELINES)] == 0).all(axis=None)


def test_skill_is_measured_on_validation_donors_and_doubts_say_where_it_is_missing(
    fitted: Baselines, model: GE2Hist, store: TissueStore
) -> None:
    found = measure_skill(fitted, model, store, cells=6, pictures=2, sample=FAST)
    assert set(found.provenance["skill"]["donors"]) <= set(store.split()["validation"])
    assert "density" in set(found.skill["readout"]) and (found.skill["n"] <= 6).all()
    doubtful = set(found.skill.loc[~found.skill["beats"].astype(bool), "readout"])
    assert doubtful and len(found.doubts()) == len(doubtful)  # random weights beat nothing
    one = sorted(doubtful)[0]
    (sentence,) = found.doubts([one])
    row = found.skill.set_index("readout").loc[one]
    assert f'"{row["best"]}"' in sentence and f"{row['skill']:.2f}" in sentence and sentence.endswith(".")
    with pytest.raises(BadInput, match="at least 2 of both"):
        measure_skill(fitted, model, store, cells=6, pictures=1)
    other = replace(fitted, provenance=fitted.provenance | {"model_sha256": "e" * 64})
    with pytest.raises(BadInput, match="another bundle"):
        measure_skill(other, model, store)


def test_the_command_writes_baselines_that_load_and_leave_the_bundle_as_it_was(
    bundle: Path, model: GE2Hist, data: Path, store: TissueStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = GE2Hist.load(bundle).sha256
    assert load_baselines(model) is None
    command = {"baselines": ("perturb.baselines", "fit baselines")}
    words = ["baselines", str(bundle), str(data), "--cells", "100", "--skill-cells", "4", "--pictures", "2"]
    assert run_command("perturb", "", command, words) == 0
    assert "baselines.json" in capsys.readouterr().out
    assert GE2Hist.load(bundle).sha256 == before
    loaded = load_baselines(GE2Hist.load(bundle))
    assert loaded is not None and loaded.provenance["model_sha256"] == before
    assert sum(path.stat().st_size for path in (bundle / "baselines").iterdir()) < 2_000_000
    again = fit_baselines(model, store, cells=100)
    some = store.cells.take([0, 5])
    embedding = model.embed(some, 0)
    a, b = (one.predict(embedding, some, some.cell_type) for one in (loaded, again))
    for name in BASELINES:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-4)
    assert loaded.skill["low"].dtype == np.float64


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "baselines.safetensors").write_bytes(b"x"), "damaged"),
        (lambda folder: (folder / "baselines.safetensors").unlink(), "damaged"),
        (lambda folder: (folder / "baselines.json").write_text("{"), "damaged"),
        (lambda folder: edit_json(folder, format=9), "format 9"),
        (lambda folder: edit_json(folder, provenance={"model_sha256": "e" * 64}), "another bundle"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    spoil: Callable[[Path], object], message: str, bundle: Path, model: GE2Hist, fitted: Baselines
) -> None:
    fitted.save(bundle)
    assert load_baselines(model) is not None
    spoil(bundle / "baselines")
    from perturb import baselines

    baselines._read.cache_clear()
    with pytest.raises(BadInput, match=message):
        load_baselines(model)


def edit_json(folder: Path, **changes: object) -> None:
    path = folder / "baselines.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_too_few_cells_are_refused(model: GE2Hist, store: TissueStore) -> None:
    with pytest.raises(BadInput, match="at least 100"):
        fit_baselines(model, store, cells=99)
