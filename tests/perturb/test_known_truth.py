"""The harness itself: planted effects come out as they went in, null cases are known to be null, the chain runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ge2hist_core.evaluation import driver_programmes
from ge2hist_core.simulator.expression import load_genes
from ge2hist_core.simulator.programmes import PROGRAMMES
from perturb.known_truth import DOSES, cases, programme_factors
from perturb.known_truth_summary import ARMS, HELD, Case, Effects, rows, share, sign_test, summary
from perturb.true_effects import READOUTS

N = 60


def planted(slopes: dict[str, float], n: int = 40, follows: float = 0.0) -> Effects:
    """Programmes and drivers with clear true effects that each arm shows at a slope; followers show ``follows``."""
    draw = np.random.default_rng(0)
    chosen = [Case("programme", f"p{i}", dose, (("G", dose),)) for i in range(3) for dose in (0.0, 4.0)]
    chosen += [Case("driver", f"d{i}", 4.0, (("G", 4.0),)) for i in range(6)]
    chosen += [Case(role, f"{role}{i}", 4.0, (("G", 4.0),)) for role in ("reporter", "inert") for i in range(N)]
    mean = draw.normal(0, 1, (len(chosen), len(READOUTS), 1))
    mean[12:] = 0
    true = mean + 0.1 * draw.normal(0, 1, (len(chosen), len(READOUTS), n)) * (mean != 0)
    noise = 0.01 * draw.normal(0, 1, true.shape)
    model = {arm: slopes[arm] * mean + noise for arm in slopes}
    for values in model.values():
        values[12 : 12 + N] += follows
    return Effects(chosen, np.repeat([f"donor{i}" for i in range(8)], n // 8), true, model)


def all_at(slope: float) -> dict[str, float]:
    return dict.fromkeys(ARMS, slope)


# --- what the figures say --------------------------------------------------------------------------------------------


def test_planted_slopes_come_out_with_intervals_that_hold_them() -> None:
    slopes = dict(zip(ARMS, (0.2, 0.8, 0.5, 0.6, 0.2), strict=True))
    found = summary(planted(slopes))
    for arm, slope in slopes.items():
        for part in ("density", "shares"):
            one = found["slopes"][arm][part]
            assert one["value"] == pytest.approx(slope, abs=0.03)
            assert one["low"] <= one["value"] <= one["high"]
    assert found["n_cells"] == 40 and found["n_donors"] == 8
    by_dose = {(row["arm"], row["dose"]): row["slopes"]["shares"]["value"] for row in found["doses"]}
    assert by_dose["direct", 0.0] == pytest.approx(0.2, abs=0.03)
    assert by_dose["true network", 4.0] == pytest.approx(0.8, abs=0.03)


def test_a_slope_is_the_least_squares_line_of_mean_effects() -> None:
    effects = planted(all_at(0.5))
    found = summary(effects)
    row = next(r for r in found["roles"] if (r["arm"], r["role"], r["readout"]) == ("direct", "driver", READOUTS[3]))
    true, model = (values[6:12, 3].mean(axis=1) for values in (effects.true, effects.model["direct"]))
    expected = np.linalg.lstsq(true[:, None], model, rcond=None)[0][0]
    assert row["slope"]["value"] == pytest.approx(expected, rel=1e-4)
    assert row["n"] == 6 and row["size"] == pytest.approx(np.abs(model).mean(), rel=1e-4)


def test_a_network_that_helps_is_counted_as_nearer_and_one_that_hurts_as_farther() -> None:
    found = summary(planted(dict(zip(ARMS, (0.2, 0.8, -0.5, 0.2, 0.2), strict=True))))["propagation"]
    by = {(row["arm"], row["role"]): row for row in found}
    helps, hurts = by["true network", "programme"], by["fitted network", "driver"]
    assert helps["effects"]["nearer"] > 30 and helps["effects"]["farther"] == 0
    assert helps["edits"] == {"nearer": 6, "farther": 0, "same": 0, "p": pytest.approx(2 / 2**6)}
    assert hurts["effects"]["nearer"] == 0 and hurts["edits"]["farther"] == 6


def test_a_reporter_whose_edit_does_not_spread_is_neither_nearer_nor_farther() -> None:
    effects = planted(all_at(0.3), follows=0.5)
    effects.model["true network"][:] = effects.model["direct"]
    effects.model["fitted network"][12 : 12 + N] += 0.5
    by = {(row["arm"], row["role"]): row for row in summary(effects)["propagation"]}
    same, hurt = by["true network", "reporter"], by["fitted network", "reporter"]
    assert same["edits"] == {"nearer": 0, "farther": 0, "same": N, "p": None}
    assert hurt["edits"]["farther"] == N and hurt["edits"]["p"] < 1e-10


def test_reporters_that_do_nothing_exceed_inert_genes_as_often_as_the_limit_says() -> None:
    found = summary(planted(all_at(0.5)))
    rates = found["beyond_inert"]["direct"]
    assert rates["reporter"]["value"] == pytest.approx(0.05, abs=0.04)
    assert rates["driver"]["value"] > 0.9 and rates["driver"]["of"] == 6 * len(READOUTS)
    assert found["signs"]["direct"]["right"] == found["signs"]["direct"]["of"] > 40
    wrong = summary(planted(all_at(-0.5)))["signs"]["direct"]
    assert wrong["right"] == 0 and wrong["of"] == found["signs"]["direct"]["of"]


def test_intervals_that_are_too_small_effects_do_not_hold_the_truth_and_null_ones_hold_0() -> None:
    found = summary(planted(all_at(0.2)))
    by = {(row["role"], row["readout"]): row for row in found["roles"] if row["arm"] == "direct"}
    assert by["programme", "density"]["covers_truth"]["value"] < 0.2
    inert = [by["inert", readout]["excludes_0"] for readout in READOUTS]
    right, of = sum(one["right"] for one in inert), sum(one["of"] for one in inert)
    # 540 edits and readouts without effect: four binomial standard errors about 0.05.
    assert of == N * len(READOUTS) and right / of == pytest.approx(0.05, abs=0.04)
    exact = summary(planted(all_at(1.0)))["roles"]
    whole = [r["covers_truth"] for r in exact if r["arm"] == "direct" and r["role"] == "inert"]
    assert np.mean([one["value"] for one in whole]) == pytest.approx(0.95, abs=0.04)


def test_calibration_of_effects_that_are_half_as_large_has_twice_the_truth() -> None:
    found = summary(planted(all_at(0.5)))["calibration"]
    causes = [row for row in found if row["group"] == "causes" and row["arm"] == "direct" and row["part"] == "shares"]
    assert len(causes) == 8 and sum(row["n"] for row in causes) == 12 * (len(READOUTS) - 1)
    assert [row["model"] for row in causes] == sorted(row["model"] for row in causes)
    for row in (causes[0], causes[-1]):
        assert row["true"] / row["model"] == pytest.approx(2.0, rel=0.1)
        assert row["low"] <= row["true"] <= row["high"]
    followers = [row for row in found if row["group"] == "followers"]
    assert followers and all(row["true"] == row["low"] == row["high"] == 0 for row in followers)


# --- what lowers false effects ---------------------------------------------------------------------------------------


def test_each_remedy_is_measured_by_what_it_leaves() -> None:
    effects = planted(all_at(0.5), follows=1.0)
    held = {arm: values.copy() for arm, values in effects.model.items()}
    held[HELD] = 0.001 * held["direct"]
    outside = np.zeros((len(effects.cases), 40), dtype=bool)
    outside[12 : 12 + N // 2] = True  # half of the reporters
    outside[6] = True  # one of six drivers
    effects = replace(effects, model=held, outside=outside)
    found = {row["remedy"]: row for row in summary(effects)["remedies"]}
    assert found["none"]["false_effects"]["value"] == 1.0 and found["none"]["power_drivers"]["value"] > 0.9
    gates = found["refused where most cells leave the data"]
    assert gates["false_effects"]["value"] == 0.5 and gates["refused"]["driver"] == pytest.approx(1 / 6, abs=1e-4)
    assert gates["power_drivers"]["value"] < found["none"]["power_drivers"]["value"]
    known = found["refused unless a known regulator (right by construction)"]
    assert known["false_effects"]["value"] == 0 and known["refused"]["reporter"] == 1
    assert known["power_drivers"] == found["none"]["power_drivers"]
    # Scaled alike, inert genes and all: the share beyond them stays.
    assert found["programmes held at their level"]["false_effects"]["value"] == 1.0


def test_cells_outside_the_data_do_not_count_where_most_are_inside() -> None:
    effects = planted(all_at(0.5))
    outside = np.zeros((len(effects.cases), 40), dtype=bool)
    outside[6, :5] = True
    loud = effects.model["direct"].copy()
    loud[12, :, :5] = 1e3  # a reporter that is loud in five cells
    quiet = summary(replace(effects, model=effects.model | {"direct": loud}, outside=outside))["remedies"]
    outside[12, :5] = True
    silenced = summary(replace(effects, model=effects.model | {"direct": loud}, outside=outside))["remedies"]
    name = "refused where most cells leave the data"
    first, second = (next(r for r in found if r["remedy"] == name) for found in (quiet, silenced))
    assert first["false_effects"]["value"] > second["false_effects"]["value"]
    assert second["refused"] == {"programme": 0.0, "driver": 0.0, "reporter": 0.0, "inert": 0.0}


# --- small parts -----------------------------------------------------------------------------------------------------


def test_the_sign_test_is_the_binomial_one_and_ties_do_not_count() -> None:
    assert sign_test(np.array([1.0, 2.0, 0.0, -1.0, 3.0])) == {"nearer": 3, "farther": 1, "same": 1, "p": 0.625}
    assert sign_test(np.zeros(2))["p"] is None


def test_a_counted_share_has_wilsons_interval() -> None:
    # Closed form for 8 of 10 with z = 1.959964.
    z, k, n = 1.959964, 8, 10
    centre, half = (k + z**2 / 2) / (n + z**2), z * np.sqrt(k * (n - k) / n + z**2 / 4) / (n + z**2)
    found = share(k, n)
    assert (found["low"], found["high"]) == (pytest.approx(centre - half, 1e-4), pytest.approx(centre + half, 1e-4))
    assert share(0, 0)["value"] is None


def test_a_summary_is_json_and_a_row_stands_for_each_case_and_readout() -> None:
    effects = planted(all_at(0.5))
    json.dumps(summary(effects), allow_nan=False)
    table = list(rows(effects))
    assert len(table) == len(effects.cases) * len(READOUTS)
    assert table[10]["true"] == pytest.approx(effects.true[1, 1].mean())
    assert table[10]["direct"] == pytest.approx(effects.model["direct"][1, 1].mean())


def test_one_donor_gives_values_without_intervals() -> None:
    effects = planted(all_at(0.5))
    found = summary(replace(effects, donor=np.repeat("one", 40)))["slopes"]["direct"]["density"]
    assert found["value"] == pytest.approx(0.5, abs=0.03) and found["low"] is None


# --- cases -----------------------------------------------------------------------------------------------------------


def test_cases_are_balanced_over_roles_programmes_and_directions() -> None:
    table, chosen = load_genes(), cases(12)
    role = dict(zip(table.symbols, table.role, strict=True))
    assert sum(case.role == "programme" for case in chosen) == len(PROGRAMMES) * len(DOSES)
    for name, n in (("driver", 12), ("reporter", 12), ("inert", 24)):
        mine = [case for case in chosen if case.role == name]
        assert len(mine) == 2 * n and {role[case.name] for case in mine} == {name}
        assert sum(case.direction == "up" for case in mine) == n
        if name != "inert":
            programmes = [table.programme_of(case.name)[0] for case in mine]
            assert {programmes.count(programme) for programme in set(programmes)} == {4}
    assert chosen == cases(12) and chosen != cases(12, seed=1)


@pytest.mark.parametrize("programme", PROGRAMMES)
def test_the_ends_of_the_doses_are_the_evaluations_edits(programme: str) -> None:
    assert programme_factors(programme, 4.0) == driver_programmes(programme, "up")
    assert programme_factors(programme, 0.0) == driver_programmes(programme, "down")
    weight = {gene: load_genes().programme_of(gene)[1] for gene in programme_factors(programme, 2.0)}
    for gene, factor in programme_factors(programme, 2.0).items():
        assert factor == (2.0 if weight[gene] > 0 else 0.5)


def test_a_dose_that_changes_nothing_or_leaves_the_apps_range_is_refused() -> None:
    from ge2hist_core.types import BadInput

    for doses in ((1.0,), (5.0,), (-1.0,), ()):
        with pytest.raises(BadInput, match="--doses"):
            cases(2, doses=doses)


# --- the whole chain -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle with random weights that is said to have learned from four of six small simulated donors."""
    from ge2hist_core.config import ModelConfig
    from ge2hist_core.embedding import Architecture, Encoder
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.nuclei import LearnedReader, ReaderNet
    from ge2hist_core.simulator.command import simulate_sections
    from ge2hist_core.store import TissueStore, write_store

    folder, donors, genes = tmp_path_factory.mktemp("known truth"), range(2, 8), list(load_genes().symbols)
    simulation = {"seed": 14, "donors": list(donors), "size_um": 128.0}
    write_store(folder / "tissue.zarr", simulate_sections(14, donors, 128.0), genes, simulation=simulation)
    store = TissueStore(folder / "tissue.zarr")
    tokens = [*genes, "<pad>", "<cls>", "<eoc>"]
    size = {"embsize": 16, "nheads": 2, "d_hid": 16, "nlayers": 1, "n_layers_cls": 3, "dropout": 0.0}
    (folder / "scgpt").mkdir()
    (folder / "scgpt/args.json").write_text(json.dumps(size | {"pad_token": "<pad>", "pad_value": -2, "n_bins": 51}))
    (folder / "scgpt/vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    config = ModelConfig(
        embedding_dim=16, d_c=3, d_e=2, vae_hidden=8, tile_px=128, latent_px=16, ae_channels=(8, 8), latent_channels=2,
        unet_channels=(8,), condition_tokens=2, condition_dim=8, attention_heads=2, time_embedding_dim=16,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Encoder(Architecture(tokens=len(tokens), dim=16, heads=2, hidden=16, layers=1, dropout=0.0))
        torch.save(network.state_dict(), folder / "scgpt/best_model.pt")
        net = ReaderNet(8, (8, 8, 8))
    model = GE2Hist.untrained(config, folder / "scgpt")
    for parameter in (*model.encoder.parameters(), *model.denoiser.parameters()):
        parameter.mul_(2.0)
    model.reader = LearnedReader(net, threshold=0.02)
    names = store.donors
    model.report = {
        "store": store.identity,
        "simulation": store.simulation,
        "donors": {"train": names[:3], "validation": names[3:4], "test": names[4:]},
        "neighbours": {name: {"root_mean": 1.5, "root_std": 0.7} for name in model.cell_types},
    }
    model.save(folder / "bundle")
    return folder / "bundle", folder / "tissue.zarr"


def test_the_command_measures_guesses_probes_and_pictures(files: tuple[Path, Path], tmp_path: Path) -> None:
    from ge2hist_core.__main__ import run_command
    from ge2hist_core.model import GE2Hist
    from perturb.__main__ import COMMANDS

    bundle, data = files
    options = ["--quick", "--pictures", "1", "--workers", "1", "--out", str(tmp_path)]
    assert run_command("test", "", COMMANDS, ["known-truth", str(bundle), str(data), *options]) == 0
    found = json.loads((tmp_path / "known_truth.json").read_text())
    assert found["bundle_sha256"] == GE2Hist.load(bundle).sha256 and found["doses"] == [0.0, 4.0]
    niche = found["niche network"]
    assert niche["n_cases"] == {"programme": 12, "driver": 4, "reporter": 4, "inert": 8} and niche["n_donors"] == 2
    # Edits of genes that regulate nothing are the direct edit in the true network.
    reporters = [r for r in niche["propagation"] if r["arm"] == "true network" and r["role"] == "reporter"]
    assert reporters[0]["edits"] == {"nearer": 0, "farther": 0, "same": 2, "p": None}
    assert {row["encoder"] for row in found["encoders"]["r2"]} == set(niche["probes"])
    drawn = found["pictures"]
    assert {row["role"] for row in drawn["tests"]} == {"inert", "reporter", "programme"}
    assert drawn["wide"]["n_cases"] == {"programme": 12}
    assert not (tmp_path / ".work").exists()
    assert len((tmp_path / "known_truth.csv").read_text().splitlines()) == 1 + 28 * len(READOUTS)


def test_too_few_cells_and_real_tissue_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore
    from ge2hist_core.types import BadInput
    from perturb.known_truth import measure
    from perturb.true_effects import TrueTissue

    model, store = GE2Hist.load(files[0]), TissueStore(files[1])
    with pytest.raises(BadInput, match="--cells is 100000"):
        measure(model, store, cases(1), TrueTissue(store, 64.0), cells=100000)
