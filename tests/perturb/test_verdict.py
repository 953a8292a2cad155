"""Lights and what ``evaluate`` measured, in words."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ge2hist_core.types import BadInput
from perturb import track_record
from perturb.evidence import Evidence, Part
from perturb.stats import Estimate
from perturb.verdict import RULE, Check, headline_readouts, judge, light

NAN = float("nan")
INSIDE = np.array([[0.4, 0.3]])
CLEAR = {"readout": "density", "effect": 120.0, "low": 60.0, "high": 180.0, "p": 0.001, "q": 0.01, "n": 16}
WIRED = {"effect": 50.0, "low": 20.0, "high": 80.0, "q": 0.01}
BUNDLE = Path(__file__).parents[2] / "assets" / "demo_bundle"


def reasons(verdict: Any) -> str:
    return " ".join(check.reason for check in verdict.checks)


def test_the_light_is_green_only_if_all_is_met_and_grey_whenever_no_effect_is_shown() -> None:
    for interval, q, support, wiring in itertools.product([True, False], repeat=4):
        met = {"interval": interval, "q": q, "support": support, "wiring": wiring}
        found = light([Check(name, passed, "") for name, passed in met.items()])
        wanted = "grey" if not interval and not q else "green" if all(met.values()) else "amber"
        assert found == wanted, met


@pytest.mark.parametrize(
    ("row", "support", "wiring", "wanted", "says"),
    [
        ({}, INSIDE, None, "green", "120 more nuclei per mm²"),
        ({"effect": -120.0, "low": -180.0, "high": -60.0}, INSIDE, None, "green", "120 fewer nuclei per mm²"),
        ({"low": 0.0}, INSIDE, None, "amber", "interval includes 0"),
        ({"q": 0.05}, INSIDE, None, "amber", "q is not below 0.05"),
        ({"low": -1.0, "q": 0.2}, INSIDE, None, "grey", "not told apart from the noise"),
        ({"low": 0.0, "high": 0.0, "effect": 0.0, "p": 1.0, "q": 1.0}, INSIDE, None, "grey", "not told apart"),
        ({}, [[0.4, 0.049]], None, "amber", "outside the data"),
        ({}, [[0.049, 0.4]], None, "amber", "outside the data"),
        ({}, [[0.05, 0.05]], None, "green", "more nuclei"),
        ({}, [[NAN, NAN]], None, "amber", "support is not known"),
        ({}, [[0.4, 0.3], [0.4, 0.01]], None, "amber", "some cells"),
        ({}, INSIDE, WIRED, "green", "more nuclei"),
        ({}, INSIDE, WIRED | {"low": -1.0}, "amber", "random wiring"),
        ({}, INSIDE, WIRED | {"q": 0.06}, "amber", "random wiring"),
        ({}, INSIDE, {"effect": -50.0, "low": -80.0, "high": -20.0, "q": 0.01}, "amber", "random wiring"),
        ({}, INSIDE, dict.fromkeys(WIRED, NAN), "amber", "random wiring"),
        (dict.fromkeys(("effect", "low", "high", "p", "q"), NAN) | {"n": 0}, INSIDE, None, "grey", "Undefined"),
        ({"low": NAN, "high": NAN, "p": 1.0, "q": 1.0, "n": 1}, INSIDE, None, "grey", "not told apart"),
    ],
)
def test_a_readout_gets_the_light_that_its_numbers_allow(
    row: dict[str, float], support: Any, wiring: dict[str, float] | None, wanted: str, says: str
) -> None:
    found = judge(CLEAR | row, np.array(support), len(support), 20, wiring)
    assert found.light == wanted
    assert says in found.claim
    assert "predict" not in found.claim + reasons(found)
    assert all(bool(check.short) != check.passed for check in found.checks)


def test_reasons_carry_n_and_say_what_the_interval_covers() -> None:
    one = reasons(judge(CLEAR, INSIDE, 1, 20))
    assert "n = 16 pairs of pictures)" in one and "the noise of drawing, not donors" in one and "20 readouts" in one
    several = reasons(judge(CLEAR, np.repeat(INSIDE, 4, axis=0), 4, 20))
    assert "of 4 cells" in several and "the choice of these cells, not donors" in several


@pytest.mark.parametrize(("n", "too_few"), [(9, True), (10, False)])
def test_too_few_seeds_for_any_one_readout_are_named(n: int, too_few: bool) -> None:
    """Nine sign flips give p = 2/512 at least, q = 0.078 over 20 readouts; ten give q = 0.039."""
    text = reasons(judge(CLEAR | {"q": 0.5, "n": n}, INSIDE, 1, 20))
    assert ("compare over more seeds" in text) == too_few


def test_shares_and_spacing_are_said_in_their_units() -> None:
    share = CLEAR | {"readout": "fraction:Plasma cell", "effect": -0.031, "low": -0.05, "high": -0.012}
    assert judge(share, INSIDE, 1, 20).claim == ("The model draws a share 3.1 percentage points lower (-5.0 to -1.2).")
    spacing = CLEAR | {"readout": "spacing", "effect": -0.42, "low": -0.6, "high": -0.2}
    assert judge(spacing, INSIDE, 1, 20).claim == "The model draws nearest nuclei 0.42 µm closer (-0.60 to -0.20)."


def test_the_headline_is_chosen_by_frequency_and_not_by_effect() -> None:
    names = ["density", "density:A", "fraction:A", "fraction:B", "fraction:C", "fraction:D", "spacing"]
    table = pd.DataFrame({"readout": names, "base": [5e3, 1e3, 0.1, 0.4, 0.3, NAN, 7.0], "effect": 0.0})
    table.loc[2, "effect"] = 0.9
    assert headline_readouts(table) == ["density", "spacing", "fraction:B", "fraction:C", "fraction:A"]
    assert headline_readouts(table[table["readout"] == "density"]) == ["density"]


# With evidence at hand


def gathered(**change: Any) -> Evidence:
    """Everything speaks for the effect, but for the changes: columns of a part's table, or why it is not there."""
    tables: dict[str, tuple[str, pd.DataFrame]] = {
        "technical": (
            "states",
            pd.DataFrame({"cell_id": "a", "space": ["embedding", "z_c", "z_e"], "p": [0.05, 0.4, 0.05], "n": 19,
                          "point": False}),
        ),
        "technical_drawn": (
            "readouts",
            pd.DataFrame({"readout": ["density"], "effect": 120.0, "cloud": 30.0, "p": 0.05, "n": 19}),
        ),
        "matched": ("readouts", pd.DataFrame({"readout": ["density"], "p": 0.01, "q": 0.04, "n": 99})),
        "matched_drawn": ("readouts", pd.DataFrame({"readout": ["density"], "p": 0.05, "q": 0.2, "n": 19})),
        "gates": (
            "gates",
            pd.DataFrame(
                {"cell_id": "a", "arm": ["base", "edited"], "p": [0.6, 0.3], "gate": "latent",
                 "inside": pd.Series([True, True], dtype=object)}
            ),
        ),
        "baselines": (
            "skill",
            pd.DataFrame({"readout": ["density"], "skill": 0.4, "low": 0.2, "high": 0.5, "best": "ridge", "beats": True,
                          "n": 200, "donors": 7}),
        ),
    }  # fmt: skip
    missing = {name: value for name, value in change.items() if isinstance(value, str)}
    parts = {}
    for name, (title, table) in tables.items():
        if name not in missing:
            for column, value in change.get(name, {}).items():
                table = table.assign(**{column: value})
            parts[name] = Part(name, {title: table}, {"seeds": 3})
    return Evidence("d" * 64, ("density",), 1, parts, missing)


@pytest.mark.parametrize(
    ("change", "name", "wanted", "says"),
    [
        ({}, "technical", True, "leaves the cloud of 19 encodings"),
        ({"technical": {"p": [0.1, 0.05, 0.05]}}, "technical", False, "does not leave the cloud"),
        ({"technical": {"p": [0.05, 0.1, 0.1]}}, "technical", False, "does not leave the cloud"),
        ({"technical_drawn": {"p": 0.1}}, "technical", False, "inside that cloud, p = 0.1"),
        ({}, "matched", True, "none moves this readout at least as far (q = 0.04)"),
        ({"matched": {"p": 0.03, "q": 0.05}}, "matched", False, "2 move this readout at least as far"),
        ({"matched_drawn": {"p": 0.1}}, "matched", False, "1 moves this readout at least as far (p = 0.1)"),
        ({"matched": "no network", "matched_drawn": {"p": 0.05}}, "matched", True, "Of 19 that were drawn"),
        ({}, "gates", True, "inside the training data: over all gates p = 0.6 before and 0.3 after"),
        ({"gates": {"p": [0.6, 0.01], "inside": [True, False]}}, "gates", False, "It is the latent that is unlike"),
        ({"gates": {"p": NAN, "inside": None}}, "gates", False, "is not known"),
        ({}, "baseline", True, "skill 0.40"),
        ({"baselines": {"beats": False, "low": -0.1}}, "baseline", False, "are not shown to tell more"),
    ],
)
def test_each_piece_of_evidence_is_a_check_that_the_light_needs(
    change: dict[str, Any], name: str, wanted: bool, says: str
) -> None:
    found = judge(CLEAR, np.array([[NAN, NAN]]), 1, 20, None, gathered(**change))
    checks = {check.name: check for check in found.checks}
    assert "support" not in checks and checks[name].passed == wanted and says in checks[name].reason
    assert bool(checks[name].short) != wanted
    assert found.light == ("green" if wanted else "amber")
    assert "predict" not in found.claim + reasons(found) + " ".join(found.notes)
    grey = judge(CLEAR | {"low": -1.0, "q": 0.2}, INSIDE, 1, 20, None, gathered(**change))
    assert grey.light == "grey" and "grey" in RULE.lower()


def test_what_could_not_be_had_is_noted_and_lights_nothing() -> None:
    found = judge(CLEAR, INSIDE, 1, 20, None, gathered(baselines="None here.", gates="No gates.", technical="Odd."))
    assert [check.name for check in found.checks] == ["interval", "q", "support", "technical", "matched"]
    assert found.light == "green" and {"Not checked (baselines): None here.", "Not checked (gates): No gates."} <= set(
        found.notes
    )
    unknown = judge(CLEAR, INSIDE, 1, 20, None, gathered(baselines={"readout": "spacing"}))
    assert "baseline" not in {check.name for check in unknown.checks}
    assert any("was not measured" in note for note in unknown.notes)
    assert judge(CLEAR, INSIDE, 1, 20).notes == ()


def test_most_cells_of_a_group_have_to_leave_the_cloud() -> None:
    states = pd.DataFrame({"cell_id": np.repeat(["a", "b", "c"], 3), "space": ["embedding", "z_c", "z_e"] * 3, "n": 19})
    states["point"] = False
    for left, wanted in ((1, False), (2, True), (3, True)):
        table = states.assign(p=np.repeat([0.05] * left + [0.5] * (3 - left), 3))
        evidence = Evidence("d" * 64, ("density",), 3, {"technical": Part("technical", {"states": table})})
        (check,) = (c for c in judge(CLEAR, INSIDE, 3, 20, None, evidence).checks if c.name == "technical")
        assert check.passed == wanted and f"{left} of 3 cells" in check.reason


def test_a_cell_without_ties_is_no_evidence_of_leaving_them() -> None:
    """Its cloud is a point, which any edit leaves."""
    found = judge(CLEAR, INSIDE, 1, 20, None, gathered(technical={"point": True}))
    assert "technical" not in {check.name for check in found.checks}
    table = gathered().table("technical", "states")
    both = pd.concat([table.assign(p=0.5), table.assign(cell_id="b", point=True)])
    evidence = Evidence("d" * 64, ("density",), 2, {"technical": Part("technical", {"states": both})})
    (check,) = (c for c in judge(CLEAR, INSIDE, 2, 20, None, evidence).checks if c.name == "technical")
    assert not check.passed, "the cell with ties decides"


# What was measured of the bundle


@pytest.fixture
def evaluation() -> dict[str, Any]:
    found = track_record.read_evaluation(BUNDLE)
    assert found is not None
    return copy.deepcopy(found)


def linear(slope: float) -> dict[str, Any]:
    """Edits whose drawn changes are ``slope`` times the true ones."""
    true = {"density": 100.0, "fraction:Fibroblast": 0.2}
    return {
        "driver_programmes": {
            "edits": [
                {
                    "programme": name,
                    "direction": way,
                    "all": {k: {"true": sign * v, "model": sign * v * slope} for k, v in true.items()},
                }
                for name in ("one", "two", "three")
                for way, sign in (("up", 1.0), ("down", -1.0))
            ]
        }
    }


@pytest.mark.parametrize(
    ("slope", "says", "small"),
    [(0.25, "smaller", True), (1.0, "not told apart from true ones", False), (2.0, "larger", False)],
)
def test_the_slope_of_a_known_line_is_found_and_said(slope: float, says: str, small: bool) -> None:
    effects = track_record.driver_effects(linear(slope))
    assert set(effects["unit"]) == {"cells/mm²", "percentage points"}
    assert effects["true"].abs().max() == 100.0 and set(effects.loc[effects["unit"] != "cells/mm²", "true"].abs()) == {
        20
    }
    found = track_record.slopes(effects)
    for unit, one in found.items():
        assert one.value == pytest.approx(slope) and one.n == 6
        assert says in track_record.size_in_words(unit, one, 3) and "n = 6" in track_record.size_in_words(unit, one, 3)
    assert track_record.undersized(found) == small


def test_the_slope_is_the_least_squares_line_through_the_origin(evaluation: dict[str, Any]) -> None:
    effects = track_record.driver_effects(evaluation)
    for unit, one in track_record.slopes(effects).items():
        rows = effects[effects["unit"] == unit]
        wanted = np.linalg.lstsq(rows[["true"]].to_numpy(), rows["drawn"].to_numpy(), rcond=None)[0][0]
        assert one.value == pytest.approx(wanted) and one.n == len(rows) and one.low < one.value < one.high


def test_a_slope_whose_interval_holds_0_is_not_called_an_answer() -> None:
    text = track_record.size_in_words("cells/mm²", Estimate(0.1, -0.1, 0.3, 12, 0.95), 6)
    assert "not shown" in text and "smaller" in text


def test_signs_are_those_of_the_file(evaluation: dict[str, Any]) -> None:
    section = evaluation["driver_programmes"]
    assert [(a, n) for _, a, n in track_record.signs(evaluation)] == [
        (section["signs_right"], section["edits_exceeding_noise"]),
        (section["clear_signs_right"], section["clear_readouts"]),
    ]
    assert track_record.signs({}) == []


def test_the_fit_says_size_direction_and_whether_it_is_clear(evaluation: dict[str, Any]) -> None:
    evaluation["generated_vs_real"]["density_relative"] = {"value": -0.12, "low": -0.2, "high": -0.05}
    evaluation["generated_vs_real"]["spacing_um"] = {"value": 0.5, "low": -0.1, "high": 1.1}
    density, composition, spacing = track_record.fits(evaluation)
    assert density.generated == "-12.0 % (-20.0 to -5.0)" and "12.0 % fewer" in density.sentence
    assert "excludes 0" in density.sentence and "includes 0" in spacing.sentence
    assert "farther apart" in spacing.sentence and " nats" in composition.generated
    wrong = evaluation["ceiling_conditions_exchanged"]["by_type"]["composition_kl"]
    assert composition.exchanged_by_type == f"{wrong:.3f} nats" and f"{wrong:.3f} nats" in composition.sentence


def test_an_older_evaluation_gives_what_it_has(evaluation: dict[str, Any]) -> None:
    for edit in evaluation["driver_programmes"]["edits"]:
        del edit["all"]
    assert (
        not len(track_record.driver_effects(evaluation))
        and track_record.slopes(track_record.driver_effects(evaluation)) == {}
    )
    del evaluation["floor_real_vs_real"], evaluation["generated_vs_real"]["by_type"]
    density = track_record.fits(evaluation)[0]
    assert density.floor == density.generated_by_type == "" and density.generated
    assert track_record.fits({}) == [] and not len(track_record.driver_effects({}))


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_evaluation_is_one_sentence(tmp_path: Path, content: str) -> None:
    assert track_record.read_evaluation(tmp_path) is None
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(BadInput, match="run `evaluate` again"):
        track_record.read_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("read", "section"),
    [
        (track_record.fits, {"generated_vs_real": {"n": 5, "density_relative": 3}}),
        (track_record.fits, {"generated_vs_real": {"n": 5}}),
        (
            track_record.driver_effects,
            {"driver_programmes": {"edits": [{"all": {"density": {"true": "x", "model": 0}}}]}},
        ),
        (track_record.driver_effects, {"driver_programmes": 3}),
        (track_record.signs, {"driver_programmes": {"signs_right": [], "edits_exceeding_noise": 3}}),
    ],
)
def test_a_section_of_another_form_is_bad_input(read: Any, section: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="another form"):
        read(section)
