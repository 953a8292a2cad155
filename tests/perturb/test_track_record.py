"""What is said of the known truth is what the file holds; damaged files are refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ge2hist_core.types import BadInput
from perturb import charts
from perturb.known_truth import SCHEMA
from perturb.known_truth_summary import ARMS, Case, Effects, summary
from perturb.track_record import (
    aims,
    calibration,
    drawn_in_words,
    encoders_in_words,
    false_effects_in_words,
    how_often_right,
    propagation_in_words,
    read_known_truth,
    remedies,
    roles,
)
from perturb.true_effects import READOUTS


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """The summary of effects whose slope is 0.25 directly, 0.5 through any network, and of loud followers."""
    draw = np.random.default_rng(0)
    chosen = [Case("programme", f"p{i}", 4.0, (("G", 4.0),)) for i in range(9)]
    chosen += [Case("reporter", f"r{i}", 4.0, (("G", 4.0),)) for i in range(10)]
    chosen += [Case("inert", f"i{i}", 4.0, (("G", 4.0),)) for i in range(40)]
    mean = draw.normal(0, 1, (len(chosen), len(READOUTS), 1))
    mean[9:] = 0
    true = mean + 0.1 * draw.normal(0, 1, (len(chosen), len(READOUTS), 40)) * (mean != 0)
    noise = 0.01 * draw.normal(0, 1, true.shape)
    model = {arm: (0.25 if arm == "direct" else 0.5) * mean + noise for arm in ARMS}
    for values in model.values():
        values[9:14] += 1.0  # five of ten followers
    model["true network"][9:19] = model["direct"][9:19]
    donor = np.repeat([f"donor{i}" for i in range(8)], 5)
    niche = summary(Effects(chosen, donor, true, model, outside=np.zeros((len(chosen), 40), dtype=bool)))
    niche["probes"] = {"scGPT embedding": {"direct": niche["slopes"]["direct"]}}
    r2 = [
        {"encoder": "scGPT embedding", "what": what, "r2": {"value": 0.5, "low": 0.4, "high": 0.6}}
        for what in ("density", "shares", "programmes")
    ]
    rate = {"value": 0.0625, "low": 0.02, "high": 0.1, "of": 160}
    test = {"role": "inert", "readout": "all", "p": rate, "q": rate | {"value": 0.0}, "covers_truth": rate}
    return {
        "schema": SCHEMA,
        "niche network": niche,
        "encoders": {"r2": r2, "width": {"scGPT embedding": 256}},
        "pictures": {
            "seeds": 16,
            "tests": [test],
            "own_conditional": [
                {"seeds": 16, "what": "all", "n_pairs": 8, "value": 0.94, "low": 0.9, "high": 0.97, "of": 360}
            ],
            "smallest": [{"readout": "density", "effect": 123.4}],
        },
    }


def test_the_sentences_say_the_figures_of_the_file(known: dict[str, Any]) -> None:
    direct, network, basis = how_often_right(known)
    sign = known["niche network"]["signs"]["direct"]
    assert f"{sign['right']} of {sign['of']} clear effects" in direct
    assert "0.25 (" in direct and "0.50 (" in network
    assert "40 cells of 8 donors" in basis and "9 edits of programmes" in basis


def test_the_false_effect_rate_is_said_in_two_sentences(known: dict[str, Any]) -> None:
    said = false_effects_in_words(known)
    figure = known["niche network"]["beyond_inert"]["direct"]["reporter"]
    assert f"{100 * figure['value']:.0f} %" in said and figure["value"] > 0.4
    assert "5 % would be chance" in said
    assert said.count(". ") + said.endswith(".") == 2
    assert false_effects_in_words({"schema": SCHEMA}) == ""


def test_propagation_is_said_for_each_network_and_kind_of_gene(known: dict[str, Any]) -> None:
    said = propagation_in_words(known)
    assert len(said) == 2 * (len(ARMS) - 1)
    assert any(one.endswith("a gene that only follows: nothing spreads.") for one in said)
    first = next(one for one in said if one.startswith("Through the tissue's true network, all drivers"))
    row = next(r for r in known["niche network"]["propagation"] if r["role"] == "programme")
    assert f"{row['effects']['nearer']} effects nearer" in first and "9 nearer, 0 farther, sign test" in first


def test_tables_hold_the_figures_with_units(known: dict[str, Any]) -> None:
    table = roles(known)
    assert len(table) == 4 * 3 * len(READOUTS)
    row = table[(table["arm"] == "direct") & (table["role"] == "programme") & (table["readout"] == "density")].iloc[0]
    assert row["slope"] == pytest.approx(0.25, abs=0.05) and row["slope_low"] < row["slope"] < row["slope_high"]
    assert table.loc[table["role"] == "inert", "slope"].isna().all()
    points = calibration(known)
    shares = [row for row in known["niche network"]["calibration"] if row["part"] == "shares"]
    found = points[points["unit"] == "percentage points"]
    np.testing.assert_allclose(found["model"], [100 * row["model"] for row in shares])
    ways = remedies(known)
    assert ways["remedy"].iloc[0] == "none" and ways["power_drivers"].iloc[0] == "not measured"
    refused = ways.set_index("remedy").at["refused unless a known regulator (right by construction)", "false_effects"]
    assert refused.startswith("0 %")


def test_drawn_and_encoder_sentences(known: dict[str, Any]) -> None:
    tests, own, smallest = drawn_in_words(known)
    assert "6 % (2 to 10) of 160 tests of unlinked genes" in tests
    assert "94 % (90 to 97) of 360 cases (8 pairs)" in own and "not the truth" in own
    assert "123 cells/mm²" in smallest
    (said,) = encoders_in_words(known)
    assert "256 numbers" in said and "density R2 0.50 (0.40 to 0.60)" in said and "0.25 (" in said
    assert drawn_in_words({}) == [] and encoders_in_words({}) == [] and how_often_right({}) == []


def test_the_chart_draws_the_table_on_equal_axes(known: dict[str, Any]) -> None:
    table = calibration(known)
    figure = charts.calibration(table, "dark")
    by = {(trace.name, trace.xaxis): trace for trace in figure.data}
    rows = table[(table["unit"] == "cells/mm²") & (table["arm"] == "direct") & (table["group"] == "followers")]
    np.testing.assert_allclose(by["Genes that only follow, direct", "x"].x, sorted(rows["model"]))
    causes = by["Causes, direct", "x2"]
    assert list(causes.x) == sorted(causes.x) and len(causes.x) == 8
    assert figure.layout.xaxis.range == figure.layout.yaxis.range
    assert figure.layout.xaxis2.title.text == "Modelled change of shares (percentage points)"
    assert by["Modelled = true", "x"].x == by["Modelled = true", "x"].y


def test_files_of_another_version_or_damaged_are_refused(known: dict[str, Any], tmp_path: Path) -> None:
    assert read_known_truth(tmp_path) is None
    path = tmp_path / "known_truth.json"
    path.write_text(json.dumps(known))
    assert read_known_truth(tmp_path) == json.loads(json.dumps(known))
    for text, words in (("{", "not valid JSON"), ("[]", "holds a list"), ('{"seed": 0}', "schema None")):
        path.write_text(text)
        with pytest.raises(BadInput, match=words):
            read_known_truth(tmp_path)
    for function in (how_often_right, false_effects_in_words, propagation_in_words, roles, calibration, remedies):
        with pytest.raises(BadInput, match="run `known-truth` again"):
            function({"niche network": [1]})
    with pytest.raises(BadInput, match="remedies has another form"):
        remedies({"niche network": {"remedies": [{"remedy": "x"}]}})


def test_an_aim_is_met_or_missed_by_its_figure() -> None:
    def share(value: float) -> dict[str, object]:
        return {"value": value, "low": value - 0.02, "high": value + 0.02, "right": 1, "of": 2}

    known = {
        "niche network": {
            "signs": {"direct": share(0.96), "true network": share(0.94)},
            "slopes": {
                "direct": {"density": share(0.21), "shares": share(0.7)},
                "true network": {"density": share(1.31), "shares": {"value": None}},
            },
        },
        "pictures": {
            "tests": [{"role": "inert", "readout": "all", "p": share(0.061)}],
            "own_conditional": [{"what": "all", **share(0.95)}, {"what": "density", **share(0.5)}],
        },
    }
    said = aims(known)
    assert [one.rsplit(" - ", 1)[1] for one in said] == [
        "met.", "missed.", "met.", "missed.", "missed.", "not measured.", "missed.", "met.",
    ]  # fmt: skip
    assert "aim at least 95 %: 96 % (94 to 98)" in said[0] and "aim 0.7 to 1.3: 0.21 (0.19 to 0.23)" in said[1]
    assert "aim at most 6 %" in said[6]
    assert aims({}) == []
