"""Gates: p-values against their guarantee and against other libraries, planted strangers, and the files in a bundle."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ge2hist_core import rng
from ge2hist_core.gates import (
    ExpressionGate,
    GateConfig,
    Gates,
    LatentGate,
    PictureGate,
    _counts,
    _levels,
    alarm_rates,
    exchange_genes,
    fit_gates,
    mixture_log_density,
    picture_features,
    several_pictures,
)
from ge2hist_core.model import GE2Hist
from ge2hist_core.store import TissueStore, write_store
from ge2hist_core.support import bonferroni, conformal_p
from ge2hist_core.types import BadInput, Cells, Latent
from ge2hist_core.vae import fit_mixture

# --- p-values ----------------------------------------------------------------------------------------------------


def test_p_of_exchangeable_scores_is_uniform() -> None:
    """1,000 worlds of 99 calibration scores: each p is one of 1/100 ... 1 with equal chance, on average exactly."""
    draws = rng.stream(0, "worlds").exponential(size=(1000, 100))
    p = np.array([conformal_p(world[0], world[1:]).item() for world in draws])
    assert scipy.stats.kstest(p - 0.005, "uniform").pvalue > 0.01
    assert abs((p <= 0.05).mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 1000)


@given(arrays(float, st.integers(1, 30), elements=st.integers(0, 5).map(float)), st.floats(-1, 6), st.floats(0, 3))
def test_a_stranger_score_never_has_the_larger_p(calibration: np.ndarray, score: float, more: float) -> None:
    n = len(calibration)
    low, high = conformal_p(np.array([score + more, score]), calibration)
    assert 1 / (n + 1) <= low <= high <= 1


def test_missing_scores_have_no_p_and_missing_calibration_does_not_count() -> None:
    p = conformal_p(np.array([np.nan, 2.0]), np.array([1.0, np.nan, 3.0]))
    assert np.isnan(p[0]) and p[1] == 2 / 3


def test_together_means_tests_made_times_the_smallest() -> None:
    p = np.array([[0.01, 0.5, np.nan], [0.9, 0.8, 0.7], [np.nan, np.nan, np.nan], [np.nan, 0.3, np.nan]])
    np.testing.assert_array_equal(bonferroni(p), [0.02, 1.0, np.nan, 0.3])


def test_several_pictures_keep_the_level_when_they_are_the_same_picture_and_when_they_are_independent() -> None:
    uniform = rng.stream(1, "pictures").random((20_000, 5))
    assert (several_pictures(uniform[:, :1]) == uniform[:, 0]).all()
    for p in (uniform, np.repeat(uniform[:, :1], 5, axis=1), uniform[:, :4]):
        assert (several_pictures(p) <= 0.05).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 20_000)
    assert several_pictures(np.array([[0.01, 0.02, 0.9, 0.03, 0.5]])).tolist() == [0.03 * 5 / 3]


# --- expression --------------------------------------------------------------------------------------------------

N_GENES, N_TYPES = 40, 2


def tissue(n: int, name: str) -> tuple[Cells, np.ndarray]:
    """Two types whose means differ in half of the genes; Poisson counts."""
    draw = rng.stream(3, name)
    mean = np.full((N_TYPES, N_GENES), 6.0)
    mean[0, :10], mean[1, 10:20] = 30.0, 30.0
    mean[:, 39] = 0.02
    kind = draw.integers(N_TYPES, size=n)
    counts = draw.poisson(mean[kind] * draw.gamma(8, 1 / 8, size=(n, 1)))
    genes = np.array([f"G{i}" for i in range(N_GENES)])
    return Cells(sp.csr_matrix(counts), genes, np.array([f"{name}{i}" for i in range(n)])), kind


@pytest.fixture(scope="module")
def expression() -> ExpressionGate:
    reference, calibration = tissue(600, "reference"), tissue(400, "calibration")
    return ExpressionGate.fit(*reference, N_TYPES, *calibration)


@given(st.integers(0, 300_000))
def test_kept_counts_are_exact_when_small_and_within_three_percent_when_large(count: int) -> None:
    back = _counts(_levels(np.array([count])))[0]
    assert back == count if count <= 15 else abs(back - count) <= 0.03 * count + 0.5


def test_deviation_is_that_of_the_formula(expression: ExpressionGate) -> None:
    cells, kind = tissue(5, "asked")
    counts = cells.counts.toarray()
    x = np.log(1 + 10_000 * counts / counts.sum(1, keepdims=True))
    expected = (x - expression.mean[kind]) / expression.spread[kind]
    np.testing.assert_allclose(expression.panel(cells.genes).deviation(cells, kind), expected, rtol=1e-5, atol=1e-5)


def test_mean_and_spread_are_those_of_each_type(expression: ExpressionGate) -> None:
    cells, kind = tissue(600, "reference")
    counts = cells.counts.toarray()
    x = np.log(1 + 10_000 * counts / counts.sum(1, keepdims=True))
    own = np.stack([x[kind == t].var(0) for t in range(N_TYPES)])
    n = np.bincount(kind)[:, None]
    pooled = (n * own).sum(0) / n.sum()
    for t in range(N_TYPES):
        np.testing.assert_allclose(expression.mean[t], x[kind == t].mean(0), rtol=1e-5)
    # A prior of 20 cells and a least spread of 0.05.
    np.testing.assert_allclose(expression.spread**2, (n * own + 20 * pooled) / (n + 20) + 0.05**2, rtol=1e-5)


def test_ordinary_cells_are_called_outside_at_the_level_for_any_panel_of_genes(expression: ExpressionGate) -> None:
    cells, kind = tissue(2000, "test")
    for genes in (slice(None), slice(0, 25)):
        part = Cells(cells.counts[:, genes], cells.genes[genes], cells.cell_id)
        profile, inside = expression.panel(part.genes).p(part, kind, edited=("G3", "G12"))
        for p in (profile, inside):
            # Between worlds the rate of 400 calibration cells varies by sqrt(a (1 - a) / 400).
            assert abs((p <= 0.05).mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 * (1 / 400 + 1 / 2000))


def test_a_cell_with_the_genes_of_both_types_is_outside(expression: ExpressionGate) -> None:
    cells, kind = tissue(200, "test")
    strange = cells.counts.toarray()
    strange[:, :20] = np.maximum(strange[:, :20], np.roll(strange[:, :20], 10, axis=1))
    mixed = cells.with_counts(sp.csr_matrix(strange))
    profile, _ = expression.panel(cells.genes).p(mixed, kind)
    assert (profile <= 0.05).mean() > 0.9


def test_cells_whose_genes_were_exchanged_are_outside(expression: ExpressionGate) -> None:
    cells, kind = tissue(300, "test")
    profile, _ = expression.panel(cells.genes).p(exchange_genes(cells, 0), kind)
    assert (profile <= 0.05).mean() > 0.9


def test_the_range_of_an_edited_gene_shrinks_its_p_and_leaves_the_other_genes_alone(expression: ExpressionGate) -> None:
    cells, kind = tissue(1, "one")
    panel = expression.panel(cells.genes)
    before = panel.deviation(cells, kind)
    factors = (1.0, 2.0, 4.0, 16.0, 1000.0)
    p = []
    for factor in factors:
        edited = cells.scale_genes({"G3": factor})
        moved = panel.deviation(edited, kind, unedited=cells) != before
        assert moved.any(axis=0).nonzero()[0].tolist() == ([] if factor == 1 else [3])
        p.append(panel.p(edited, kind, ("G3",), cells)[1][0])
    assert p == sorted(p, reverse=True) and p[-1] == 1 / 401
    _, known = panel.p(cells, kind, ("G3", "ELSEWHERE"))
    _, unknown = panel.p(cells, kind, ("ELSEWHERE",))
    assert known == panel.p(cells, kind, ("G3",))[1] and np.isnan(unknown)


def test_too_few_genes_in_common_and_cells_without_counts_have_no_answer(expression: ExpressionGate) -> None:
    cells, kind = tissue(2, "two")
    few = Cells(cells.counts[:, :19], cells.genes[:19], cells.cell_id)
    assert np.isnan(expression.panel(few.genes).p(few, kind, ("G3",))).all()
    empty = cells.scale_genes(dict.fromkeys(cells.genes, 0.0))
    assert np.isnan(expression.panel(cells.genes).p(empty, kind)[0]).all()


def test_the_order_of_the_genes_does_not_matter_and_columns_of_one_gene_are_added(expression: ExpressionGate) -> None:
    cells, kind = tissue(20, "order")
    order = rng.stream(0, "order").permutation(N_GENES)
    turned = Cells(cells.counts[:, order], cells.genes[order], cells.cell_id)
    half = cells.counts.copy()
    half.data = np.floor(half.data / 2)
    split = Cells(sp.hstack([cells.counts - half, half]), np.tile(cells.genes, 2), cells.cell_id)
    expected = expression.panel(cells.genes).p(cells, kind)[0]
    for other in (turned, split):
        np.testing.assert_array_equal(expression.panel(other.genes).p(other, kind)[0], expected)


# --- states and pictures -----------------------------------------------------------------------------------------


def test_density_of_the_mixture_agrees_with_scipy_and_counts_every_type_alike() -> None:
    draw = rng.stream(0, "mixture")
    z = draw.standard_normal((400, 3)) * [1, 2, 3]
    labels = np.repeat([0, 1, 1, 1], 100)
    mixture = fit_mixture(z, labels, 2, seed=0)
    density = np.zeros(7)
    for t in range(2):
        for w, mean, lower in zip(mixture.weights[t], mixture.means[t], mixture.cholesky[t], strict=True):
            if w > 0:
                density += 0.5 * w * scipy.stats.multivariate_normal(mean, lower @ lower.T).pdf(z[:7])
    np.testing.assert_allclose(mixture_log_density(mixture, z[:7]), np.log(density), rtol=1e-5)


def test_latent_scores_are_negative_log_densities_and_far_states_are_outside() -> None:
    draw = rng.stream(1, "latents")
    shape = draw.standard_normal((3, 3))

    def states(n: int) -> Latent:
        return Latent(draw.standard_normal((n, 4)), draw.standard_normal((n, 3)) @ shape.T + 1)

    reference = states(800)
    mixture = fit_mixture(reference.z_c, np.zeros(800, int), 1, seed=0)
    gate = LatentGate.fit(mixture, reference, states(400))
    asked = states(1500)
    covariance = np.cov(reference.z_e.T) + 1e-4 * np.eye(3)
    theirs = scipy.stats.multivariate_normal(reference.z_e.mean(0), covariance).logpdf(asked.z_e)
    np.testing.assert_allclose(gate.scores(mixture, asked)[1], -theirs, rtol=1e-4, atol=1e-4)
    for p in gate.p(mixture, asked):
        assert abs((p <= 0.05).mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 * (1 / 400 + 1 / 1500))
    far = Latent(asked.z_c, asked.z_e + 30 * shape[:, 0])
    p_c, p_e, both = gate.p(mixture, far)
    assert (p_e == 1 / 401).all() and (both == 1 / 401).all() and (p_c == gate.p(mixture, asked)[0]).all()


def test_the_picture_score_is_a_gaussian_distance_where_all_directions_are_kept() -> None:
    """Few features: principal components plus the one rest direction are the whole covariance."""
    draw = rng.stream(2, "features")
    turn = np.linalg.qr(draw.standard_normal((6, 6)))[0]

    def features(n: int) -> np.ndarray:
        return draw.standard_normal((n, 6)) * [1, 2, 3, 4, 5, 6] @ turn + 10

    reference = features(500)
    gate = PictureGate.fit(reference, features(300))
    asked = features(2000)
    standard = (asked - reference.mean(0)) / reference.std(0)
    correlation = np.corrcoef(reference.T)
    expected = np.einsum("if,fg,ig->i", standard, np.linalg.inv(correlation), standard)
    np.testing.assert_allclose(gate.score(asked), expected, rtol=1e-3)
    assert abs((gate.p(asked) <= 0.05).mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 * (1 / 300 + 1 / 2000))
    assert (gate.p(asked + 100) == 1 / 301).all()


def test_features_of_a_picture_do_not_depend_on_the_others_and_hold_the_stain(tiny_bundle: GE2Hist) -> None:
    images = rng.stream(0, "pixels").integers(0, 256, size=(3, 32, 32, 3)).astype(np.uint8)
    together = picture_features(tiny_bundle, images)
    np.testing.assert_array_equal(together[1], picture_features(tiny_bundle, images[1:2])[0])
    density = -np.log(np.maximum(images[1], 1) / 255)
    np.testing.assert_allclose(together[1, -6:-3], density.mean((0, 1)))
    np.testing.assert_allclose(together[1, -3:], density.std((0, 1)))


# --- fitting, files, command -------------------------------------------------------------------------------------

FEW = GateConfig(reference_cells=60, calibration_cells=300, kept_cells=150, tiles=40)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TissueStore:
    from ge2hist_core.simulator.command import simulate_sections
    from ge2hist_core.simulator.expression import load_genes

    path = tmp_path_factory.mktemp("gates") / "tissue.zarr"
    write_store(path, simulate_sections(5, range(4), 150.0), list(load_genes().symbols))
    return TissueStore(path)


@pytest.fixture(scope="module")
def bundle(store: TissueStore, scgpt_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights that knows the simulator's genes only as far as the small encoder does."""
    import torch

    from ge2hist_core.config import ModelConfig
    from ge2hist_core.nuclei import LearnedReader, ReaderNet
    from ge2hist_core.support import Support

    config = ModelConfig(
        embedding_dim=16, d_c=3, d_e=2, vae_hidden=8, ae_channels=(8, 8), latent_channels=2, unet_channels=(8,),
        condition_tokens=2, condition_dim=8, attention_heads=2, time_embedding_dim=16,
    )  # fmt: skip
    model = GE2Hist.untrained(config, scgpt_folder)
    split = store.split()
    train = store.cells.take(store.rows(split["train"], interior=False)[:200])
    held_out = store.cells.take(store.rows(split["validation"], interior=False)[:200])
    embedding = model.scgpt.embed(train, 0, on_empty="nan")
    known = np.isfinite(embedding[:, 0])
    labels = np.array([model.cell_types.index(name) for name in train.cell_type[known]])
    model.encoder.fit_standardisation(torch.from_numpy(embedding[known]), torch.from_numpy(labels))
    model.mixture = fit_mixture(model.encode(embedding[known]).z_c, labels, len(model.cell_types), seed=0)
    other = model.scgpt.embed(held_out, 0, on_empty="nan")
    model.support = Support.fit(embedding[known], train.cell_id[known], other[np.isfinite(other[:, 0])])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.reader = LearnedReader(ReaderNet(8, (8, 8, 8)))
    folder = tmp_path_factory.mktemp("gates-bundle")
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def gates(bundle: Path, store: TissueStore) -> Gates:
    return fit_gates(GE2Hist.load(bundle), store, FEW)


def test_gates_are_fitted_on_three_kinds_of_donors_that_do_not_meet(gates: Gates, store: TissueStore) -> None:
    donors = gates.provenance["donors"]
    assert donors == {
        "reference": store.split()["train"],
        "calibration": store.split()["validation"],
        "test": store.split()["test"],
    }
    assert gates.provenance["store"] == store.identity
    n = gates.provenance["n"]
    assert 60 < n["expression"] == min(150, n["latent"]) and n["picture"] >= 20


def test_a_bundle_that_says_whom_it_learned_from_is_taken_at_its_word(bundle: Path, store: TissueStore) -> None:
    model = GE2Hist.load(bundle)
    names = sorted(store.donors)
    donors = {"train": names[:1], "validation": names[1:2], "test": names[2:]}
    model.report = {"store": store.identity, "simulation": None, "donors": donors}
    fitted = fit_gates(model, store, FEW)
    wanted = {"reference": names[:1], "calibration": names[1:2], "test": names[2:]}
    assert fitted.provenance["donors"] == wanted
    model.report["donors"]["validation"] = []
    with pytest.raises(BadInput, match="no donor left for the gates' calibration: give the store"):
        fit_gates(model, store, FEW)


def test_gates_come_back_from_the_bundle_as_they_were(gates: Gates, bundle: Path, store: TissueStore) -> None:
    assert Gates.load(bundle) is None
    gates.save(bundle)
    loaded = Gates.load(bundle)
    model = GE2Hist.load(bundle)
    cells = store.cells.take(store.rows(store.split()["test"])[:12])
    embedding = model.embed(cells, 0)
    latent = model.encode(embedding)
    kind = model.classify(latent).argmax(1)
    gene = (str(cells.genes[0]),)
    tables = [one.cell_p(model, cells, embedding, latent, kind, edited=gene) for one in (gates, loaded)]
    np.testing.assert_array_equal(*(table.to_numpy() for table in tables))
    assert tables[0].notna().all(axis=None)
    np.testing.assert_allclose(
        tables[0]["expression"], np.minimum(1, 2 * np.minimum(tables[0]["profile"], tables[0]["range"]))
    )
    np.testing.assert_array_equal(tables[0]["embedding"], model.support.p(embedding))
    images = store.tiles(store.rows(store.split()["test"])[:4])
    np.testing.assert_array_equal(gates.picture_p(model, images), loaded.picture_p(model, images))
    assert loaded.provenance == gates.provenance
    assert sum((bundle / f"gates.{end}").stat().st_size for end in ("json", "safetensors")) < 400_000


def test_gates_of_another_training_or_damaged_ones_are_refused(gates: Gates, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    gates.save(folder)
    other = bytearray((folder / "vae.safetensors").read_bytes())
    other[-1] ^= 1
    whole = (folder / "vae.safetensors").read_bytes()
    (folder / "vae.safetensors").write_bytes(other)
    with pytest.raises(BadInput, match="another training of this bundle: run `python -m ge2hist_core gates` again"):
        Gates.load(folder)
    (folder / "vae.safetensors").write_bytes(whole)
    assert Gates.load(folder) is not None
    header = json.loads((folder / "gates.json").read_text())
    (folder / "gates.json").write_text(json.dumps(header | {"schema": 9}))
    with pytest.raises(BadInput, match="schema 9, this version reads 1"):
        Gates.load(folder)
    (folder / "gates.json").write_text(json.dumps({k: v for k, v in header.items() if k != "genes"}))
    with pytest.raises(BadInput, match="damaged"):
        Gates.load(folder)
    gates.save(folder)
    part = (folder / "gates.safetensors").read_bytes()
    (folder / "gates.safetensors").write_bytes(part[: len(part) // 2])
    with pytest.raises(BadInput, match="damaged"):
        Gates.load(folder)


def test_rates_are_those_of_the_test_donors(gates: Gates, bundle: Path, store: TissueStore) -> None:
    model = GE2Hist.load(bundle)
    table = alarm_rates(model, gates, store, n=300).set_index("gate")
    assert list(table.index) == [
        "expression", "embedding", "latent", "picture", "profile", "range", "z_c", "z_e", "all",
    ]  # fmt: skip
    assert (table["donors"] == len(store.split()["test"])).all()
    assert (table["lowest"] <= table["rate"]).all() and (table["rate"] <= table["highest"]).all()
    # One validation donor: the rate of another donor is near the level, not at it.
    assert (table["rate"] < 0.3).all()
    assert table["exchanged"].isna().to_dict() == {name: name in ("picture", "range") for name in table.index}


def test_exchanging_genes_keeps_every_gene_and_changes_the_cells(store: TissueStore) -> None:
    cells = store.cells.take(np.arange(50))
    other = exchange_genes(cells, 0)
    before, after = cells.counts.toarray(), other.counts.toarray()
    np.testing.assert_array_equal(np.sort(before, axis=0), np.sort(after, axis=0))
    assert (before != after).any(axis=1).all()


def test_parts_that_the_bundle_lacks_have_no_answer_and_the_others_do(bundle: Path, store: TissueStore) -> None:
    model = replace(GE2Hist.load(bundle), mixture=None, support=None, reader=None)
    gates = fit_gates(model, store, FEW)
    assert gates.latent is None and gates.picture is None
    cells = store.cells.take(store.rows(store.split()["test"])[:3])
    embedding = model.embed(cells, 0)
    latent = model.encode(embedding)
    table = gates.cell_p(model, cells, embedding, latent, np.zeros(3, int))
    assert table["profile"].notna().all()
    assert table[["embedding", "latent", "z_c", "z_e", "range"]].isna().all(axis=None)
    assert np.isnan(gates.picture_p(model, np.zeros((2, 32, 32, 3), np.uint8))).all()


def test_the_command_writes_gates_with_their_rates(
    bundle: Path, store: TissueStore, capsys: pytest.CaptureFixture[str]
) -> None:
    from ge2hist_core.__main__ import run_command

    command = {"gates": ("ge2hist_core.gates", "fit")}
    options = ["--cells", "100", "--tiles", "25", "--test-cells", "60"]
    assert run_command("x", "", command, ["gates", str(bundle), str(store.path), *options]) == 0
    assert "exchanged" in capsys.readouterr().out
    alarms = Gates.load(bundle).provenance["alarms"]
    assert alarms["level"] == 0.05 and {row["gate"] for row in alarms["gates"]} >= {"expression", "latent", "all"}
    assert run_command("x", "", command, ["gates", str(bundle), str(store.path), "--cells", "3"]) == 2
    assert "calibration_cells is 3: give at least 20" in capsys.readouterr().err
