"""The model card: every number is that of the bundle's JSON, every command runs with the settings that were used."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ge2hist_core.__main__ import COMMANDS, run_command
from ge2hist_core.config import CELL_TYPES, PRESETS, ModelConfig, TrainConfig, to_json
from ge2hist_core.evaluation import EDIT_FACTORS
from ge2hist_core.files import write_json
from ge2hist_core.model import GE2Hist
from ge2hist_core.model_card import model_card
from ge2hist_core.simulator.expression import load_genes
from ge2hist_core.types import BadInput

PROGRAMMES = ("immune_infiltration", "hypoxia")
TRAIN = TrainConfig(steps=777, batch_size=24, mixed_precision="bf16", seed=13)
TRAINING = {
    "data": "tissue.zarr",
    "simulation": {"seed": 11, "donors": [5, 6, 7, 8], "size_um": 256.0},
    "cells": {"test": 1234, "validation": 345, "train": 23456},
    "steps": 701,
    "train": to_json(TRAIN),
    "separation": {
        "classifier_accuracy": 0.98765,
        "chance": 0.1,
        "type_accuracy_z_c": 0.9432,
        "type_accuracy_z_e": 0.2345,
        "active_units_z_c": 7,
        "active_units_z_e": 19,
        "r2_z_c": {"immune_infiltration": 0.123, "hypoxia": -0.045},
        "r2_z_e": {"immune_infiltration": 0.678, "hypoxia": 0.517},
    },
    "autoencoder_psnr_db": 27.183,
}
READER = {
    "figures": {
        "f1": 0.97846,
        "count_bias": -0.003072,
        "n_tiles": 500,
        "n_nuclei": 11067,
        "confusion": {"Fibroblast": {"Fibroblast": 3}},
        "reconstructed": {"f1": 0.55555},
        "donors": ["donor006"],
        "train": {"steps": 1500, "batch_size": 16, "seed": 3},
    }
}
PRETRAINING = {"config": {"steps": 160, "batch_size": 48, "precision": "bf16", "seed": 9}}


def comparison(n: int, start: float, by_type: bool = True) -> dict[str, Any]:
    """Figures that all differ, from each other and from those with another ``start``."""
    names = ("density_relative", "composition_kl", "spacing_um")
    out: dict[str, Any] = {"n": n, "density_r": 0.5}
    for i, name in enumerate(names):
        out[name] = {key: start * (2 * i + 1) * k for k, key in ((1, "value"), (-2, "low"), (3, "high"))}
    if by_type:
        out["by_type"] = {name: start * (11 + i) for i, name in enumerate(names)} | {"types": 4}
    return out


EVALUATION = {
    "bundle_sha256": "0" * 64,
    "seed": 17,
    "sample": {"solver": "dpm++", "steps": 12, "guidance": 1.5},
    "classifier": {"accuracy": 0.97531, "n": 7927},
    "generated_vs_real": comparison(120, -0.0123),
    "floor_real_vs_real": comparison(120, 0.0217),
    "ceiling_conditions_exchanged": comparison(120, 0.0331),
    "reader_vs_truth_on_real": comparison(120, -0.0071),
    "steps": {"dpm++ 12 vs real": comparison(9, 0.0449, False), "ddpm 1000 vs real": comparison(9, 0.0513, False)},
    "driver_programmes": {
        "n_cells": 14,
        "edits_exceeding_noise": 8,
        "signs_right": 6,
        "clear_readouts": 23,
        "clear_signs_right": 21,
        "edits": [
            {"programme": "immune_infiltration", "direction": "up", "main_readout": "density", "true": 407.4,
             "model": -20.6},
            {"programme": "hypoxia", "direction": "down", "main_readout": "fraction:Macrophage", "true": -0.0391,
             "model": 0.0012},
        ],
    },
}  # fmt: skip


def write(
    folder: Path,
    training: dict[str, Any] | None = TRAINING,
    reader: dict[str, Any] | None = READER,
    pretraining: dict[str, Any] | None = PRETRAINING,
    evaluation: dict[str, Any] | None = EVALUATION,
    config: ModelConfig | None = None,
) -> Path:
    """The JSON files of a bundle, each left out where None; no weights."""
    header = {"format": 2, "config": to_json(config or ModelConfig()), "training": training}
    for name, value in (
        ("bundle.json", header),
        ("reader.json", reader),
        ("scgpt/pretraining.json", pretraining),
        ("evaluation.json", evaluation),
    ):
        if value is not None:
            write_json(folder / name, value)
    return folder


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_card(write(tmp_path_factory.mktemp("card")))


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


def table(text: str) -> list[list[str]]:
    """Cells of the lines of a Markdown table below its heading, all lines of the same width as the heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in rows} == {len(rows[0])}, "a line of the table has lost or gained a cell"
    assert set(rows[1]) == {"---"}
    return rows[2:]


def numbers(text: str) -> list[float]:
    """Numbers of a text as a reader takes them: thousands by comma, per cent as hundredths."""
    found = re.findall(r"([+-]?\d[\d,]*\.?\d*(?:e[+-]?\d+)?)(%?)", text)
    return [float(digits.replace(",", "")) / (100 if percent else 1) for digits, percent in found]


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_card_says_first_that_it_is_a_demonstration_and_not_diagnostic(card: str):
    what = card.split("\n## ")[0]
    assert what.startswith("# Model card")
    for phrase in ("simulated (known-truth) tissue", "a demonstration, not a model of patients", "not diagnostic",
                   "not a forecast of an experiment"):  # fmt: skip
        assert phrase in what
    assert "not biological replication" in section(card, "Limits")
    assert "CD4 T, CD8 T and B cells look alike" in section(card, "Limits")


def test_a_bundle_of_measured_slides_is_not_said_to_be_simulated(tmp_path: Path):
    card = model_card(write(tmp_path, training=TRAINING | {"simulation": None, "data": "slides.zarr"}))
    assert "Trained on the store `slides.zarr`" in card
    assert "not diagnostic" in card
    assert "a demonstration, not" not in card
    assert "simulat" not in card.lower(), "neither command nor limits of a simulator that had no part in it"


def test_the_simulators_size_in_the_limits_is_that_of_its_table(card: str):
    assert f"ten cell types, {len(load_genes())} genes" in section(card, "Limits")
    assert len(CELL_TYPES) == 10


@pytest.mark.parametrize(("um_per_px", "side"), [(0.5, "64 um"), (0.25, "32 um")])
def test_the_size_of_the_niche_is_the_bundles(tmp_path: Path, um_per_px: float, side: str):
    assert f"niche ({side})" in model_card(write(tmp_path, config=ModelConfig(um_per_px=um_per_px)))


# --- its commands ----------------------------------------------------------------------------------------------------


def commands(card: str) -> dict[str, argparse.Namespace]:
    """The card's commands as the command line itself understands them."""
    out = {}
    for line in section(card, "Made by").split("```")[1].strip().splitlines():
        python, m, package, name, *words = shlex.split(line)
        assert (python, m, package) == ("python", "-m", "ge2hist_core")
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
        out[name] = parser.parse_args(words)
    return out


def test_the_commands_have_the_settings_that_were_used(card: str):
    found = commands(card)
    assert list(found) == ["simulate", "pretrain", "train", "train-reader", "evaluate", "demo-cells", "card"]
    simulate = found["simulate"]
    assert list(range(simulate.first_donor, simulate.first_donor + simulate.donors)) == [5, 6, 7, 8]
    assert (simulate.seed, simulate.size_um) == (11, 256.0)
    pretrain = found["pretrain"]
    assert (pretrain.steps, pretrain.batch_size, pretrain.precision, pretrain.seed) == (160, 48, "bf16", 9)
    train = found["train"]
    assert (train.preset, train.steps, train.mixed_precision, train.seed) == ("demo", 777, "bf16", 13)
    reader = found["train-reader"]
    assert (reader.steps, reader.batch_size, reader.seed) == (1500, 16, 3)
    assert reader.autoencoder == reader.out, "its figures on reconstructed tiles need the bundle's autoencoder"
    judged = found["evaluate"]
    assert (judged.tiles, judged.reference_tiles, judged.edit_cells) == (120, 9, 14)
    assert (judged.steps, judged.guidance, judged.seed) == (12, 1.5, 17)


def test_a_bundle_that_went_on_from_another_names_both_runs(tmp_path: Path):
    later = TRAINING | {
        "steps": 50,
        "train": to_json(replace(TRAIN, steps=55, freeze_encoder=True)),
        "started_from": {"bundle_sha256": "a" * 64, "training": TRAINING},
    }
    text = section(model_card(write(tmp_path, training=later)), "Made by")
    lines = [line.split("train ")[1] for line in text.splitlines() if " train " in line]
    assert len(lines) == 2
    assert "--out RUN1" in lines[0] and "--steps 777" in lines[0] and "--freeze-encoder" not in lines[0]
    assert "--out BUNDLE" in lines[1] and "--steps 55" in lines[1]
    assert "--start-from RUN1 --freeze-encoder" in lines[1]
    assert f"Main training: 701 steps of batch {TRAIN.batch_size}, then 50 steps of batch {TRAIN.batch_size}." in text


def test_settings_without_an_option_and_the_decoder_are_named_too(tmp_path: Path):
    train = replace(PRESETS["demo"].train, steps=9, batch_size=512, latent_variants=8, workers=4)
    decoder = {
        "steps": 300,
        "seconds": 90.0,
        "device": "Some GPU",
        "train": {
            "autoencoder_batch": 32, "autoencoder_learning_rate": 2e-4, "adversarial": 0.5,
            "mixed_precision": "no", "seed": 7,
        },
    }  # fmt: skip
    later = TRAINING | {"train": to_json(train), "seconds": 7200.0, "device": "Some GPU", "decoder": decoder}
    card = model_card(write(tmp_path, training=later))
    text, found = section(card, "Made by"), commands(card)
    assert found["train"].config == Path("CONFIG1.json")
    written = text.split("`CONFIG1.json`: `")[1].split("`.")[0]
    assert json.loads(written) == {"train": {"batch_size": 512, "latent_variants": 8}}
    assert (found["train-decoder"].steps, found["train-decoder"].adversarial) == (300, 0.5)
    assert "701 steps of batch 512, 2.0 h on one Some GPU; the decoder: 300 steps of batch 32, 2 min on one" in text


def test_the_preset_is_the_one_whose_network_the_bundle_has(tmp_path: Path):
    card = model_card(write(tmp_path, config=PRESETS["paper"].model))
    assert commands(card)["train"].preset == "paper"


def test_what_was_left_out_is_left_out_of_the_commands(tmp_path: Path):
    reader, evaluation = copy.deepcopy(READER), copy.deepcopy(EVALUATION)
    del reader["figures"]["reconstructed"], evaluation["steps"], evaluation["driver_programmes"]
    found = commands(model_card(write(tmp_path, reader=reader, evaluation=evaluation)))
    assert found["train-reader"].autoencoder is None
    assert (found["evaluate"].reference_tiles, found["evaluate"].edit_cells) == (0, 0)


# --- its numbers -----------------------------------------------------------------------------------------------------


def test_steps_and_cells_are_those_of_the_training(card: str):
    made = section(card, "Made by").split("Main training")[1].split("Beside the three")[0]
    assert numbers(made) == [701, 24, 1234, 345, 23456]
    terms = section(card, "Made by").split("weighted: ")[1]
    assert f"type prior {TRAIN.type_prior:g}, type leak {TRAIN.type_leak:g}" in terms
    assert re.findall(r"\d (\w+)", made)[-3:] == ["test", "validation", "train"]


def test_separation_is_that_of_the_bundle(card: str):
    s, text = TRAINING["separation"], section(card, "Separation of type (z_c) and environment (z_e)")
    accuracy, units, *programmes = table(text)
    assert accuracy == ["balanced accuracy of a linear probe of the type (chance 0.10)", "0.943", "0.234"]
    assert units == ["active units", "7", "19"]
    assert [row[0] for row in programmes] == [f"R2 of a linear probe of {p.replace('_', ' ')}" for p in PROGRAMMES]
    for row, name in zip(programmes, PROGRAMMES, strict=True):
        assert numbers(row[1] + " " + row[2]) == pytest.approx([s["r2_z_c"][name], s["r2_z_e"][name]], abs=0.0051)
    assert numbers(text.splitlines()[-1]) == pytest.approx([0.98765, 27.183], rel=1e-3)


def test_every_number_of_the_reader_is_there_and_counts_are_exact(card: str):
    rows = dict(table(section(card, "Nuclei reader")))
    plain = {k: v for k, v in READER["figures"].items() if isinstance(v, (int, float))}
    assert list(rows) == [name.replace("_", " ") for name in plain]
    assert numbers(rows["f1"]) == pytest.approx([0.97846], abs=5e-5)
    assert numbers(rows["count bias"]) == pytest.approx([-0.003072])
    assert rows["n nuclei"] == "11,067" and rows["n tiles"] == "500"


def test_every_comparison_has_its_line_with_value_interval_and_types(card: str):
    *rows, target = table(section(card, "Generated against real tiles"))
    assert target == ["target", "500", "within 5%", "at most 0.0500", "within 0.50", "", "", ""]
    keys = ["generated_vs_real", "floor_real_vs_real", "ceiling_conditions_exchanged", "reader_vs_truth_on_real"]
    expected = [EVALUATION[key] for key in keys] + list(EVALUATION["steps"].values())
    assert [row[0].split(",")[0].split(":")[0] for row in rows] == [
        "generated", "floor", "ceiling", "reader against truth", "dpm++ 12 vs real", "ddpm 1000 vs real",
    ]  # fmt: skip
    for row, c in zip(rows, expected, strict=True):
        assert row[1] == str(c["n"])
        columns = (("density_relative", 5.1e-4), ("composition_kl", 5.1e-5), ("spacing_um", 5.1e-3))
        for cell, (name, rounding) in zip(row[2:5], columns, strict=True):
            figure = [c[name][key] for key in ("value", "low", "high")]
            assert numbers(cell) == pytest.approx(figure, abs=rounding), (row[0], name)
        if "by_type" not in c:
            assert row[5:] == ["-", "-", "-"]
            continue
        columns = (("density_relative", 5.1e-4), ("composition_kl", 5.1e-4), ("spacing_um", 5.1e-3))
        for cell, (name, rounding) in zip(row[5:], columns, strict=True):
            assert numbers(cell) == pytest.approx([c["by_type"][name]], abs=rounding), (row[0], name)


def test_how_the_comparison_was_made_stands_above_and_the_classifier_below(card: str):
    text = section(card, "Generated against real tiles")
    assert "dpm++ 12 steps, seed 17" in text
    assert text.strip().splitlines()[-1] == "Type classifier: 0.9753 of 7,927 cells."


def test_the_edits_stand_with_their_units_and_the_count_of_right_signs(card: str):
    text = section(card, "Edits of driver programmes against the truth")
    assert "knocked out or multiplied by 4 (14 cells)" in text
    assert EDIT_FACTORS == {"down": 0.0, "up": 4.0}
    assert "Sign right: 6 of 8 edits" in text and "(21 of 23 of all such readouts)" in text
    assert table(text) == [
        ["immune infiltration", "up", "density", "+407 cells/mm2", "-21 cells/mm2"],
        ["hypoxia", "down", "fraction:Macrophage", "-0.039", "+0.001"],
    ]


def contest() -> dict[str, Any]:
    """Two methods in Table 1, with a verdict, and what was drawn for it."""
    kid = {"name": "KID (reader features)", "subset_sd": 0.0071, "n_real": 120, "n_generated": 120, "subset_size": 100,
           "subsets": 100, "donors": 12, "covers": "another choice of donors and of their tiles"}  # fmt: skip
    figures = {
        "ge2hist": kid | {"value": 0.0213, "low": 0.0118, "high": 0.0308},
        "rna-cdm": kid | {"value": 0.0931, "low": 0.0544, "high": 0.1318},
    }
    said = "KID (reader features): GE2Hist (0.1) is nearer than RNA-CDM."
    verdict = {"ge2hist_wins": True, "nearer": 1, "farther": 0, "undecided": 0, "sentence": said}
    return {
        "counts": {"tiles": 120, "type_pictures": 7, "training_cells": 801, "classified_cells": None},
        "methods": {"ge2hist": {"title": "GE2Hist", "kind": "model"}, "rna-cdm": {"title": "RNA-CDM", "kind": "rival"}},
        "table_1": {"figures": {"KID (reader features)": figures}, "verdicts": [verdict]},
    }


def test_the_contest_with_the_rivals_stands_on_the_card_with_value_interval_and_n(tmp_path: Path):
    card = model_card(write(tmp_path, evaluation=EVALUATION | contest()))
    rows = table(section(card, "Table 1: distance to real tiles"))
    assert [row[0] for row in rows] == ["GE2Hist", "RNA-CDM"]
    assert rows[1][1] == "0.0931 [0.0544, 0.1318]" and rows[1][3:] == ["120 / 120", "12"]
    told = section(card, "Who wins")
    assert "In 1 comparisons of GE2Hist with a rival, 1 figures, GE2Hist is nearer" in told
    assert "- KID (reader features): GE2Hist (0.1) is nearer than RNA-CDM." in told
    judged = commands(card)["evaluate"]
    assert (judged.type_pictures, judged.training_cells, judged.classified_cells) == (7, 801, None)
    assert judged.rivals == [Path("RNA-CDM")]


def test_a_figure_without_an_answer_is_a_dash(tmp_path: Path):
    evaluation = copy.deepcopy(EVALUATION)
    evaluation["generated_vs_real"]["spacing_um"] = {"value": None, "low": None, "high": None}
    evaluation["generated_vs_real"]["by_type"]["spacing_um"] = None
    evaluation["driver_programmes"]["edits"][1]["model"] = None
    card = model_card(write(tmp_path, evaluation=evaluation))
    generated = table(section(card, "Generated against real tiles"))[0]
    assert generated[4] == "-" and generated[7] == "-"
    assert table(section(card, "Edits of driver programmes against the truth"))[1][4] == "-"


# --- bundles with less in them ---------------------------------------------------------------------------------------


def test_notes_of_the_maker_come_last(tmp_path: Path):
    (write(tmp_path) / "NOTES.md").write_text("Made on a Tuesday.\n")
    assert section(model_card(tmp_path), "Notes").strip() == "Made on a Tuesday."
    assert model_card(tmp_path).endswith("Made on a Tuesday.\n")


def test_a_bundle_not_yet_judged_has_a_card_without_those_figures(tmp_path: Path):
    card = model_card(write(tmp_path, reader=None, pretraining=None, evaluation=None))
    assert re.findall("^## (.*)$", card, re.MULTILINE) == [
        "Made by", "Separation of type (z_c) and environment (z_e)", "Limits",
    ]  # fmt: skip
    assert list(commands(card)) == ["simulate", "train", "demo-cells", "card"]


@pytest.mark.parametrize("name", ["bundle.json", "reader.json", "evaluation.json", "scgpt/pretraining.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str):
    write(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(BadInput, match=rf"{re.escape(name)} is not valid JSON .*: write it again with its command"):
        model_card(tmp_path)


def test_any_other_folder_is_refused_with_the_cure(tmp_path: Path):
    with pytest.raises(BadInput, match="is not a GE2Hist bundle .* give the folder that `train` wrote"):
        model_card(tmp_path)


# --- the command -----------------------------------------------------------------------------------------------------


def run(folder: Path) -> int:
    return run_command("ge2hist", "", COMMANDS, ["card", str(folder)])


def test_the_command_replaces_the_card_and_nothing_else(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "b"
    shutil.copytree(tiny_folder, folder)
    write_json(folder / "evaluation.json", EVALUATION | {"bundle_sha256": GE2Hist.load(folder).sha256})
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    with (folder / "MODEL_CARD.md").open(encoding="utf-8") as old:
        assert run(folder) == 0
        assert old.read().startswith("# Test bundle"), "a reader of the old card is not met by half of the new one"
    assert (folder / "MODEL_CARD.md").read_text(encoding="utf-8") == model_card(folder)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    assert capsys.readouterr().out.strip() == str(folder / "MODEL_CARD.md")


def test_figures_of_other_weights_are_not_put_on_the_card(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A bundle trained on after its evaluation would else carry the old figures as its own."""
    folder = tmp_path / "b"
    shutil.copytree(tiny_folder, folder)
    write_json(folder / "evaluation.json", EVALUATION)
    assert run(folder) == 2
    assert re.search(
        r"evaluation\.json holds figures of other weights .* run `evaluate` again", capsys.readouterr().err
    )
    assert (folder / "MODEL_CARD.md").read_text(encoding="utf-8").startswith("# Test bundle")


def test_the_command_explains_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tmp_path) == 2
    assert "is not a GE2Hist bundle" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_report_of_a_real_training_fills_the_card(scgpt_folder: Path, tmp_path: Path):
    """The names that `train` writes are those that the card reads."""
    from ge2hist_core.simulator.command import simulate_sections
    from ge2hist_core.store import TissueStore, write_store
    from ge2hist_core.training import Trainer

    path = tmp_path / "tissue.zarr"
    simulation = {"seed": 3, "donors": [0, 1, 2, 3], "size_um": 96.0}
    write_store(path, simulate_sections(3, range(4), 96.0), list(load_genes().symbols), simulation=simulation)
    config = ModelConfig(
        embedding_dim=16, d_c=3, d_e=2, vae_hidden=8, ae_channels=(8, 8), latent_channels=2, unet_channels=(8,),
        condition_tokens=2, condition_dim=8, attention_heads=2, time_embedding_dim=16,
    )  # fmt: skip
    train = TrainConfig(
        steps=2,
        batch_size=2,
        warmup_steps=1,
        vae_steps=1,
        state_steps=1,
        autoencoder_steps=1,
        autoencoder_batch=2,
        latent_variants=1,
    )
    trainer = Trainer(TissueStore(path), scgpt_folder, tmp_path / "bundle", config, train)
    for _ in trainer.run():
        pass
    report = json.loads((tmp_path / "bundle" / "bundle.json").read_text(encoding="utf-8"))["training"]
    assert run(tmp_path / "bundle") == 0
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert commands(card)["train"].steps == 2 and commands(card)["simulate"].donors == 4
    made = section(card, "Made by").split("Main training")[1].split("Beside the three")[0]
    assert numbers(made) == [2, 2, round(report["seconds"] / 60), *report["cells"].values()]
    rows = table(section(card, "Separation of type (z_c) and environment (z_e)"))
    assert len(rows) == 2 + len(report["separation"]["r2_z_e"]) == 8
    assert numbers(rows[0][2]) == pytest.approx([report["separation"]["type_accuracy_z_e"]], abs=5.1e-4)
    assert f"{report['autoencoder_psnr_db']:.1f} dB" in card
    assert "nan" not in card


def test_edits_of_known_effect_stand_in_the_card_with_their_command(tmp_path: Path):
    write(tmp_path)
    slope = {"density": {"value": 0.25, "low": 0.1, "high": 0.4}, "shares": {"value": 0.5, "low": None, "high": None}}
    niche = {
        "n_cells": 9, "n_donors": 3, "n_cases": {"driver": 12}, "slopes": {"direct": slope},
        "signs": {"direct": {"right": 7, "of": 8}},
        "beyond_inert": {"direct": {"reporter": {"value": 0.09, "low": 0.05, "high": 0.12, "of": 288}}},
    }  # fmt: skip
    drawn = {
        "cells": 5, "seeds": 16, "further": 64,
        "tests": [{"role": "inert", "readout": "all", "p": {"value": 0.02, "low": 0.01, "high": 0.04, "of": 270}}],
        "own_conditional": [{"what": "all", "seeds": 16, "value": 0.6, "low": 0.3, "high": 0.8, "of": 54,
                             "without": 7}],
    }  # fmt: skip
    write_json(tmp_path / "known_truth.json", {"seed": 4, "niche network": niche, "pictures": drawn})
    card = model_card(tmp_path)
    assert "known-truth BUNDLE DATA.zarr --out BUNDLE --cells 9 --per-role 6 --seed 4 --pictures 5" in card
    assert "below 0.05 in 2 [1, 4] % of 270 tests" in card and "in 60 [30, 80] % of 54 cases; 7 more had none" in card
    assert ["direct", "0.25 [0.10, 0.40]", "0.50", "7 of 8"] in table(section(card, "Edits of known effect"))
    assert "9 [5, 12] % of 288 readouts" in card
