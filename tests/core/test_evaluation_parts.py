"""Parts of the evaluation on planted figures: who wins, read-back, probes, the middle of a picture, kept work."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from ge2hist_core.evaluation.contest import FLOOR, distance_name, figure_3_verdicts, table_1, verdict
from ge2hist_core.evaluation.methods import OWN, Method
from ge2hist_core.evaluation.read_back import expression_scores, fit_reader, picture_features, recovered
from ge2hist_core.evaluation.readings import Readings, compare_fully
from ge2hist_core.evaluation.report import html, markdown, sections, summary
from ge2hist_core.evaluation.states import central_class, classifier_figures, separation, wilson
from ge2hist_core.evaluation.work import Kept, Work
from ge2hist_core.image_features import TextureFeatures
from ge2hist_core.metrics import polynomial_mmd
from ge2hist_core.types import Latent, NicheStats
from ge2hist_core.vae import probe_accuracy, probe_r2


def method(name: str, kind: str = "rival") -> Method:
    return Method(name, name.upper(), kind, [name], lambda at: np.zeros((len(at), 1)))


OURS, CDM, GAN, COPY = method(OWN, "model"), method("cdm"), method("gan"), method("copy", "control")
ALL = [OURS, CDM, GAN, COPY]

# --- who wins ---------------------------------------------------------------------------------------------------------


SWING = np.random.default_rng(1).normal(size=400)


def judged(entries: dict[str, tuple[float, float | None, float | None]], apart: dict[str, float]) -> dict[str, Any]:
    """Resamples that swing together, less the part by which each rival swings on its own."""
    other = np.random.default_rng(2).normal(size=(len(apart), 400))
    drawn = {OWN: SWING, **{name: SWING + sd * own for (name, sd), own in zip(apart.items(), other, strict=True)}}
    return verdict("KID (reader features)", entries, ALL, drawn, 11)


def test_each_rival_is_judged_by_the_paired_difference_and_not_by_overlap():
    """Intervals overlap everywhere; what counts is what the two have not in common."""
    entries = {OWN: (0.5, -1.5, 2.5), "cdm": (0.8, -1.2, 2.8), "gan": (0.6, -1.4, 2.6)}
    found = judged(entries, {"cdm": 0.1, "gan": 0.1})
    lines = {line["rival"]: line for line in found["against"]}
    half = scipy.stats.t(11).ppf(0.975) * 0.1
    assert lines["cdm"]["difference"] == pytest.approx(-0.3)
    assert (lines["cdm"]["low"], lines["cdm"]["high"]) == pytest.approx((-0.3 - half, -0.3 + half), abs=0.02)
    assert (lines["cdm"]["result"], lines["gan"]["result"]) == ("nearer", "undecided")
    assert (found["nearer"], found["farther"], found["undecided"]) == (1, 0, 1) and not found["ge2hist_wins"]
    assert "nearer than CDM (0.8000, -1.2000 to 2.8000; difference -0.3000" in found["sentence"]
    assert "not told apart from GAN" in found["sentence"]


def test_a_rival_that_is_nearer_is_said_to_be():
    found = judged({OWN: (0.5, 0.1, 0.9), "cdm": (0.05, 0.04, 0.06)}, {"cdm": 0.1})
    assert (found["against"][0]["result"], found["farther"]) == ("farther", 1) and not found["ge2hist_wins"]
    assert "GE2Hist (0.5000, 0.1000 to 0.9000) is farther than CDM" in found["sentence"]


def test_to_win_is_to_be_nearer_than_every_rival():
    entries = {OWN: (1.0, 0.9, 1.1), "cdm": (2.0, 1.2, 3.0), "gan": (3.0, 2.0, 4.0)}
    assert judged(entries, {"cdm": 0.1, "gan": 0.1})["ge2hist_wins"]
    assert not judged(entries, {"cdm": 0.1, "gan": 2.0})["ge2hist_wins"]


def test_controls_do_not_compete_and_without_rivals_or_resamples_there_is_no_contest():
    entries = {OWN: (0.2, 0.1, 0.3), "copy": (0.0, 0.0, 0.01)}
    assert judged(entries, {}) is None
    assert judged({OWN: (math.nan, None, None), "cdm": (0.4, 0.3, 0.5)}, {"cdm": 0.1}) is None
    (line,) = judged(entries | {"cdm": (0.4, 0.3, 0.5)}, {})["against"]
    assert line["result"] == "undecided" and line["low"] is None


def tiles(density: np.ndarray, kinds: np.ndarray, donor: np.ndarray) -> Readings:
    stats = [NicheStats(pd.DataFrame({"n": [int(d), 5]}), int(d) + 5, (d + 5) / 0.01, 8.0, 2.0, 0.01) for d in density]
    return Readings(stats, kinds, donor)


def test_figure_3_sees_a_method_that_is_right_on_the_whole_and_wrong_for_every_type():
    draw = np.random.default_rng(0)
    kinds = np.array(["a", "b"] * 60, dtype=object)
    donor = np.repeat([f"d{i}" for i in range(6)], 20)
    truth = np.where(kinds == "a", 40, 20)
    real = tiles(draw.poisson(truth), kinds, donor)
    ours = compare_fully(tiles(draw.poisson(truth), kinds, donor), real, 0)
    blind = compare_fully(tiles(draw.poisson(30, 120), kinds, donor), real, 0)
    found = {v["figure"]: v for v in figure_3_verdicts({OWN: ours, "cdm": blind}, ALL)}
    by_type = found["Absolute difference of density, mean over types of the central cell"]
    assert by_type["ge2hist_wins"]
    assert "not told apart from CDM" in found["Absolute difference of density, all cells"]["sentence"]
    assert "%" in by_type["sentence"] and len(found) == 8


# --- Table 1 ----------------------------------------------------------------------------------------------------------


class Colour:
    """Mean colour: features that can be computed by hand."""

    name = "colour"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images.mean(axis=(1, 2)).astype(np.float64)

    def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(self(a) - self(b)).mean(axis=1)


def pictures(n: int, shift: float, seed: int) -> np.ndarray:
    colour = np.random.default_rng(seed).normal([120 + shift, 90, 150], 12, (n, 3))
    return np.broadcast_to(colour[:, None, None], (n, 16, 16, 3)).clip(0, 255).astype(np.uint8)


def test_table_1_is_the_unbiased_mmd_of_standardised_features_and_the_mean_distance():
    real, near, far = pictures(40, 0, 1), pictures(40, 2, 2), pictures(40, 30, 3)
    donor = np.repeat(["x", "y", "z", "w"], 10)
    found, _ = table_1(real, {FLOOR: near, OWN: far}, [Colour()], [Colour()], donor, 0)
    kid, distance = found["KID (colour features)"], found["LPIPS-type distance (colour features)"]
    features = Colour()(real)
    scaled = [np.clip((Colour()(x) - features.mean(0)) / features.std(0), -6, 6) for x in (real, near, far)]
    # Subsets are the whole sets here.
    assert kid[FLOOR]["value"] == pytest.approx(polynomial_mmd(scaled[0], scaled[1]))
    assert kid[OWN]["value"] == pytest.approx(polynomial_mmd(scaled[0], scaled[2]))
    assert kid[FLOOR]["value"] < kid[OWN]["value"] / 10
    assert kid[OWN]["low"] < kid[OWN]["value"] < kid[OWN]["high"]
    assert (kid[OWN]["n_real"], kid[OWN]["n_generated"], kid[OWN]["donors"]) == (40, 40, 4)
    by_hand = np.abs(Colour()(far) - Colour()(real)).mean()
    assert distance[OWN]["value"] == pytest.approx(by_hand) and distance[OWN]["n"] == 40
    assert distance_name(type("L", (), {"name": "LPIPS (AlexNet v0.1)"})) == "LPIPS (AlexNet v0.1)"


# --- read-back --------------------------------------------------------------------------------------------------------


def test_components_of_expression_are_those_of_sklearn():
    draw = np.random.default_rng(3)
    factors, loadings = draw.normal(size=(200, 3)), draw.normal(size=(3, 30))
    counts = sp.csr_matrix(draw.poisson(np.exp(1.5 + 0.5 * factors @ loadings)).astype(np.float32))
    fitted, asked, share = expression_scores(counts[:150], counts[150:])
    dense = counts.toarray().astype(np.float64)
    x = np.log1p(1e4 * dense / dense.sum(1, keepdims=True))
    x = (x - x[:150].mean(0)) / x[:150].std(0)
    pca = PCA(20).fit(x[:150])
    assert share == pytest.approx(pca.explained_variance_ratio_.sum())
    for i in range(5):
        for found, expected in ((fitted, pca.transform(x[:150])), (asked, pca.transform(x[150:]))):
            assert abs(np.corrcoef(found[:, i], expected[:, i])[0, 1]) == pytest.approx(1, abs=1e-9)


def test_read_back_finds_what_pictures_hold_and_nothing_in_exchanged_ones():
    draw = np.random.default_rng(4)
    n, donor = 300, np.repeat([f"d{i}" for i in range(10)], 30)
    scores, mixing = draw.normal(size=(n, 4)) * [3, 2, 1, 1], draw.normal(size=(4, 12))
    features = scores @ mixing + draw.normal(0, 2, (n, 12))
    ridge = fit_reader(features, scores, donor)
    true = draw.normal(size=(n, 4)) * [3, 2, 1, 1]
    real = true @ mixing + draw.normal(0, 2, (n, 12))
    half = 0.5 * real + 0.5 * real[draw.permutation(n)]
    guesses = {"real": ridge(real), "half": ridge(half), "other": ridge(real[draw.permutation(n)])}
    found = recovered(true, guesses, "real", donor, 0)
    expected = r2_score(true, guesses["real"], multioutput="variance_weighted")
    assert found["real"]["r2"]["value"] == pytest.approx(expected)
    assert found["real"]["share_of_real"]["value"] == 1 == found["real"]["share_of_real"]["low"]
    assert 0.1 < found["half"]["share_of_real"]["low"] < found["half"]["share_of_real"]["high"] < 0.95
    assert found["other"]["r2"]["high"] < 0.05
    assert abs(found["other"]["correlation"]["value"]) < 0.12
    assert found["real"]["correlation"]["low"] > 0.8 and found["real"]["n"] == n


def test_the_regression_of_read_back_is_ridge_on_standardised_features():
    draw = np.random.default_rng(5)
    features = draw.normal(5, [1, 10, 0.1], (80, 3))
    scores = features @ draw.normal(size=(3, 2)) + draw.normal(size=(80, 2))
    ridge = fit_reader(features, scores, np.repeat(["a", "b", "c", "d"], 20))
    z = (features - features.mean(0)) / features.std(0)
    expected = Ridge(alpha=ridge.alpha).fit(z, scores).predict(z)
    np.testing.assert_allclose(ridge(features), expected)
    assert fit_reader(features, scores, np.array(["a"] * 80))(features).shape == (80, 2), "one donor will do"


def test_features_of_read_back_see_the_middle_apart():
    images = np.full((2, 64, 64, 3), 200, dtype=np.uint8)
    images[1, :4] = 0  # outside the 48 px in the middle
    found = picture_features(images, Colour(), Colour())
    assert found.shape == (2, 9)
    np.testing.assert_array_equal(found[0, 3:6], found[1, 3:6])
    assert (found[0, :3] != found[1, :3]).all()


# --- classifier and probes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 12), (47, 50), (50, 50)])
def test_wilsons_interval_solves_its_equation(right: int, n: int):
    """Its ends are the shares p from which the seen one is z standard errors of p away."""
    z, seen = 1.959963984540054, right / n
    for end, at in wilson(right, n).items():
        if 0 < at < 1:
            assert abs(seen - at) == pytest.approx(z * math.sqrt(at * (1 - at) / n)), end


def test_accuracy_has_an_interval_over_donors_and_one_over_cells():
    donor = np.repeat(["a", "b", "c", "d"], 100)
    truth = np.array(["x", "y"] * 200)
    guess = truth.copy()
    guess[:60] = "neither"  # one donor alone is hard
    found = classifier_figures(guess, truth, donor, 0)
    assert found["accuracy"] == pytest.approx(340 / 400) and (found["n"], found["donors"]) == (400, 4)
    assert found["recall"] == {"x": 0.85, "y": 0.85} and found["recall_n"] == {"x": 200, "y": 200}
    assert found["low"] < found["wilson"]["low"] < 0.85 < found["wilson"]["high"] < found["high"]
    alone = classifier_figures(guess, truth, np.array(["a"] * 400), 0)
    assert alone["low"] is None and alone["wilson"] == found["wilson"]


def test_separation_finds_the_type_in_one_half_and_the_niche_in_the_other():
    draw = np.random.default_rng(6)
    n, kinds = 240, np.array(["a", "b", "c"], dtype=object)
    label, niche = draw.integers(0, 3, 2 * n), draw.normal(size=(2 * n, 2))
    z_c = np.eye(3)[label] + draw.normal(0, 0.3, (2 * n, 3))
    z_e = niche @ draw.normal(size=(2, 4)) + draw.normal(0, 0.3, (2 * n, 4))
    donor = np.repeat([f"d{i}" for i in range(8)], 30)
    both = Latent(z_c, z_e)
    found = separation(
        both.take(slice(0, n)), kinds[label[:n]], niche[:n], both.take(slice(n, None)), kinds[label[n:]], niche[n:],
        donor, ["p", "q"], 0,
    )  # fmt: skip
    for part in ("z_c", "z_e"):
        z = getattr(both, part)
        expected = probe_accuracy(z[:n], label[:n], z[n:], label[n:])
        assert found[part]["type_accuracy"]["value"] == pytest.approx(expected), part
        r2 = probe_r2(z[:n], niche[:n], z[n:], niche[n:])
        np.testing.assert_allclose([*found[part]["niche_r2_each"].values()], r2, atol=1e-6)
        assert found[part]["niche_r2"]["value"] == pytest.approx(r2.mean(), abs=1e-6)
    assert found["z_c"]["type_accuracy"]["low"] > 0.8 > found["chance"] == pytest.approx(1 / 3)
    assert found["z_e"]["type_accuracy"]["low"] < 1 / 3 < found["z_e"]["type_accuracy"]["high"]
    assert found["z_e"]["niche_r2"]["low"] > 0.7 > 0.1 > found["z_c"]["niche_r2"]["high"]
    assert (found["n"], found["n_training"], found["donors"]) == (n, n, 8)


# --- the middle of a picture ------------------------------------------------------------------------------------------


def test_the_central_nucleus_is_the_nearest_to_the_middle_within_ten_um():
    table = pd.DataFrame({"x_um": [33.0, 36.0, 0.0], "y_um": [31.0, 33.0, 0.0], "cell_type": ["A", "B", "C"]})
    assert central_class(table, 64.0) == "A"
    assert central_class(table.iloc[1:], 64.0) == "B"
    assert central_class(table.iloc[2:], 64.0) is None
    assert central_class(table.iloc[:0], 64.0) is None


# --- kept work --------------------------------------------------------------------------------------------------------


def squares(seen: list[int], stop_at: int = 10**9) -> Any:
    def compute(at: np.ndarray) -> np.ndarray:
        if at[0] >= stop_at:
            raise KeyboardInterrupt
        seen.extend(at.tolist())
        return at**2

    return compute


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path):
    work, first, second = Work(tmp_path), [], []
    with pytest.raises(KeyboardInterrupt):
        work.blocks(["a"], 10, squares(first, stop_at=6), "drawing", block=3)
    assert first == [0, 1, 2, 3, 4, 5] and work.missing(["a"], 10, 3) == 4
    found = work.blocks(["a"], 10, squares(second), "drawing", block=3)
    assert second == [6, 7, 8, 9]
    np.testing.assert_array_equal(found, np.arange(10) ** 2)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")], "no half-written file is left"


def test_other_settings_are_other_work_and_damaged_files_are_made_again(tmp_path: Path):
    work, seen = Work(tmp_path), []
    work.blocks(["a", 1], 4, squares([]), "drawing", block=2)
    work.blocks(["a", 2], 4, squares(seen), "drawing", block=2)
    assert seen == [0, 1, 2, 3]
    for path in tmp_path.rglob("000002.npy"):
        path.write_bytes(path.read_bytes()[:20])
    again: list[int] = []
    np.testing.assert_array_equal(work.blocks(["a", 1], 4, squares(again), "drawing", block=2), [0, 1, 4, 9])
    assert again == [2, 3]


def test_work_without_a_folder_keeps_nothing():
    seen: list[int] = []
    for _ in range(2):
        Work(None).blocks(["a"], 3, squares(seen), "drawing", block=2)
    assert seen == [0, 1, 2] * 2


def test_features_are_computed_once_for_the_same_pictures(tmp_path: Path):
    calls = []

    class Counted(Colour):
        def __call__(self, images: np.ndarray) -> np.ndarray:
            calls.append(len(images))
            return super().__call__(images)

    kept, images = Kept(Counted(), ["colour"], Work(tmp_path)), pictures(5, 0, 1)
    np.testing.assert_array_equal(kept(images), Colour()(images))
    np.testing.assert_array_equal(kept(images.copy()), Colour()(images))
    assert calls == [5]
    kept(images[:4])
    Kept(Counted(), ["other"], Work(tmp_path))(images)
    assert calls == [5, 4, 5]
    np.testing.assert_array_equal(kept.distance(images, images[::-1]), Colour().distance(images, images[::-1]))
    assert TextureFeatures.name != kept.name == "colour"


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """A result with two methods, as ``evaluate`` makes it, from planted readings and pictures."""
    draw = np.random.default_rng(8)
    kinds, donor = np.array(["a", "b"] * 20, dtype=object), np.repeat(["d1", "d2", "d3", "d4"], 10)
    truth = np.where(kinds == "a", 40, 20)
    real, ours, theirs = (tiles(draw.poisson(m), kinds, donor) for m in (truth, truth, 0 * truth + 30))
    compared = {OWN: compare_fully(ours, real, 0), "cdm": compare_fully(theirs, real, 0)}
    images = {FLOOR: pictures(40, 0, 5), OWN: pictures(40, 1, 6), "cdm": pictures(40, 40, 7)}
    figures, _ = table_1(pictures(40, 0, 4), images, [Colour()], [Colour()], donor, 0)
    own = compared[OWN].json
    return {
        "bundle_sha256": "b" * 64,
        "store": "s" * 64,
        "donors": ["d1", "d2", "d3", "d4"],
        "seed": 3,
        "sample": {"solver": "dpm++", "steps": 16, "guidance": 1.0},
        "counts": {"tiles": 40},
        "simulated": True,
        "methods": {OWN: {"title": "GE2Hist", "kind": "model"}, "cdm": {"title": "RNA <CDM> | x", "kind": "rival"}},
        "classifier": classifier_figures(kinds, kinds, donor, 0),
        "generated_vs_real": own,
        "floor_real_vs_real": own,
        "ceiling_conditions_exchanged": own,
        "reader_vs_truth_on_real": own,
        "figure_3": {
            "floor": own,
            "reader": own,
            "methods": {name: c.json for name, c in compared.items()},
            "verdicts": figure_3_verdicts(compared, ALL),
        },
        "table_1": {"figures": figures, "verdicts": []},
    }


def test_markdown_tables_are_whole_and_hold_value_interval_and_n(told: dict[str, Any]):
    text = markdown(told)
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            block.append(line)
        elif block:
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block}) == 1, block[0]
            block = []
    kid = told["table_1"]["figures"]["KID (colour features)"]["cdm"]
    line = next(line for line in text.splitlines() if line.startswith("| RNA <CDM> \\| x | ") and "x 40)" in line)
    assert f"{kid['value']:.4f} [{kid['low']:.4f}, {kid['high']:.4f}]" in line and "| 40 / 40 | 4 |" in line
    assert "40 cells of 4 donors that the bundle has not learned from" in text
    assert "run over donors and, within each, its cells" in text and "do not cover another training" in text
    alone = markdown(told | {"donors": ["a"]})
    assert "the cells of the one held-out donor" in alone and "do not cover other donors or another" in alone
    for verdict_ in told["figure_3"]["verdicts"]:
        assert f"- {verdict_['sentence']}" in text
    assert "--inception" in text, "it says how to get the figures of papers"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_one_file_without_scripts_and_with_every_tag_closed(told: dict[str, Any]):
    page = html(told)
    tags = Tags()
    tags.feed(page.removeprefix("<!doctype html>\n"))
    assert tags.open == []
    names = {name for name, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe"} and "svg" in names
    assert not [a for _, attrs in tags.seen for a in attrs if a in ("src", "href")]
    assert "RNA &lt;CDM&gt; | x" in page and "<CDM>" not in page
    assert page.count("<h2>") == len(sections(told))


def test_charts_place_values_in_order_along_one_axis(told: dict[str, Any]):
    svg = next(part for part in html(told).split("<svg")[1:] if "KID (colour features)" in part)
    at = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)]
    values = [f["value"] for f in told["table_1"]["figures"]["KID (colour features)"].values()]
    assert np.argsort(at).tolist() == np.argsort(values).tolist()
    slope = np.diff(at) / np.diff(values)
    assert slope[0] == pytest.approx(slope[1], rel=0.1)


def test_a_result_of_an_earlier_version_is_told_as_far_as_it_goes(told: dict[str, Any]):
    old = {k: v for k, v in told.items() if k not in ("figure_3", "table_1", "methods", "counts")}
    assert [s.key for s in sections(old)] == ["steps", "classifier"]
    assert "40 cells" in markdown(old)


def test_the_summary_has_the_contest_and_the_figures(told: dict[str, Any]):
    lines = summary(told).splitlines()
    assert lines[0] == "classifier accuracy 1.0000 (n = 40 cells)"
    assert any(line.startswith("KID (colour features): Floor") for line in lines)
    assert sum(": GE2Hist (" in line for line in lines) == len(told["figure_3"]["verdicts"])


def test_rivals_that_were_trained_for_less_are_named_before_the_verdicts(told: dict[str, Any]):
    methods = {
        OWN: {"title": "GE2Hist", "kind": "model", "training": {"macs": 600e12}},
        "cdm": {"title": "RNA-CDM", "kind": "rival", "training": {"macs": 426e12}},
        "copy": {"title": "Copy", "kind": "control"},
    }
    (found,) = (s for s in sections(told | {"methods": methods}) if s.key == "verdicts")
    assert found.text[1].startswith("Not equal compute: GE2Hist was trained with 600 x 10^12")
    assert "RNA-CDM with 426." in found.text[1]
    methods["cdm"]["training"]["macs"] = 620e12
    (found,) = (s for s in sections(told | {"methods": methods}) if s.key == "verdicts")
    assert not any("equal compute" in text for text in found.text)
