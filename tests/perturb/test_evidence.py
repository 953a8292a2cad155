"""Evidence as one thing: the parts are those of their modules, each fails alone, the cache and the report keep them."""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ge2hist_core.config import READER_CLASSES, SampleConfig
from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.gates import ExpressionGate, Gates
from ge2hist_core.model import GE2Hist
from ge2hist_core.sampler import Stopped
from ge2hist_core.types import BadInput, Cells
from perturb import evidence as module
from perturb import evidence_words, route, stats, technical
from perturb.__main__ import COMMANDS
from perturb.cache import DiskCache
from perturb.edits import Perturbation
from perturb.evidence import ALL_PARTS, COSTS, PARTS, Evidence, Part, at_hand, gather, kept, niches_of, steps
from perturb.matched import matched_null
from perturb.pdf import _evidence_tables
from perturb.recipe import Recipe
from perturb.replay import read_report
from perturb.report import html, pdf, write_report
from perturb.result import Result
from perturb.run import run

EDIT = "GAPDH:x4"


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, demo_cells: Cells) -> GE2Hist:
    """The small bundle with an expression gate and a reader judged by type."""
    folder = tmp_path_factory.mktemp("evidence") / "bundle"
    shutil.copytree(tiny_folder, folder)
    model = GE2Hist.load(folder)
    assert model.reader is not None
    counts = dict.fromkeys(READER_CLASSES, 100)
    confusion = {t: {f: 90 if t == f else 0 for f in READER_CLASSES} for t in READER_CLASSES}
    model.reader.figures = {
        "recall": 0.9, "precision": 0.9, "n_tiles": 100, "confusion": confusion,
        "true_counts": counts, "found_counts": counts,
    }  # fmt: skip
    kind = model.classify(model.encode(model.embed(demo_cells, 0))).argmax(1)
    one, two = np.arange(0, 60, 2), np.arange(1, 60, 2)
    expression = ExpressionGate.fit(
        demo_cells.take(one), kind[one], len(model.cell_types), demo_cells.take(two), kind[two]
    )
    model.gates = Gates(expression, None, None)
    model.save(folder)
    return GE2Hist.load(folder)


def made(model: GE2Hist, cells: Cells, edit: str = EDIT, ids: tuple[str, ...] = ("cell-3",)) -> Result:
    recipe = Recipe("d" * 64, model.sha256, ids, Perturbation.parse(edit), SampleConfig(steps=2), (4, 7, 9))
    return run(recipe, model, cells)


@pytest.fixture(scope="module")
def result(model: GE2Hist, demo_cells: Cells) -> Result:
    return made(model, demo_cells)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> DiskCache:
    return DiskCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def evidence(result: Result, model: GE2Hist, demo_cells: Cells, cache: DiskCache) -> Evidence:
    return gather(result, model, demo_cells, cache=cache)


def test_every_part_is_there_or_says_why_not(evidence: Evidence) -> None:
    assert set(evidence.parts) | set(evidence.missing) == set(ALL_PARTS)
    assert not set(evidence.parts) & set(evidence.missing)
    assert "python -m perturb baselines" in evidence.missing["baselines"]
    assert "positions in um" in evidence.missing["natural"]
    for name in ("precision", "reader", "technical", "gates", "matched", "route", "technical_drawn", "matched_drawn"):
        assert name in evidence.parts, evidence.missing.get(name)


def test_parts_come_from_cheap_to_expensive_whatever_the_order_asked_for(
    result: Result, model: GE2Hist, demo_cells: Cells, cache: DiskCache
) -> None:
    asked = ("route", "technical", "precision")
    seen = [list(one.parts) for one in steps(result, model, demo_cells, parts=asked, cache=cache)]
    assert seen == [[], ["precision"], ["precision", "technical"], ["precision", "technical", "route"]]
    costs = [list(COSTS).index(cost) for cost in PARTS.values()]
    assert costs == sorted(costs)


def test_precision_is_that_of_the_statistics(evidence: Evidence, result: Result) -> None:
    table = evidence.table("precision", "precision").set_index("readout")
    base, edited = (route.values_of(result.readouts, arm, (1, 3)) for arm in ("base", "edited"))
    row = table.loc["density"]
    assert row["pairing_gain"] == pytest.approx(stats.pairing_gain(base["density"], edited["density"]), nan_ok=True)
    half = (row["high"] - row["low"]) / 2
    if half > 0:
        wanted = stats.seeds_for(edited["density"] - base["density"], half / 2)
        assert row["seeds_to_halve"] == wanted


def test_nulls_are_those_of_their_modules_and_q_counts_the_lights_alone(
    evidence: Evidence, result: Result, model: GE2Hist, demo_cells: Cells
) -> None:
    redraws = technical.redraw(model, demo_cells.take([3]), 0)
    wanted = technical.state_null(result.recipe, redraws, result.base_arm, result.edited_arm)
    states = evidence.table("technical", "states")
    np.testing.assert_array_equal(states["distance"], wanted["distance"])
    np.testing.assert_array_equal(states["p"], wanted["p"])

    random = matched_null(result, model, demo_cells, n=module.GUESSED, drawn=False).table.set_index("readout")
    table = evidence.table("matched", "readouts").set_index("readout")
    np.testing.assert_allclose(table["p"], random["p"])
    headline = [name for name in evidence.headline if name in table.index]
    assert headline and table["q"].notna().sum() == len(headline)
    p = table.loc[headline, "p"].sort_values(ascending=False).to_numpy()
    adjusted = np.minimum.accumulate(np.minimum(1, p * len(p) / np.arange(len(p), 0, -1)))
    np.testing.assert_allclose(table.loc[headline, "q"].sort_values(ascending=False), adjusted)


def test_the_route_adds_up_to_the_effect(evidence: Evidence, result: Result) -> None:
    table = evidence.table("route", "effects").pivot(index="readout", columns="part", values="effect")
    np.testing.assert_allclose(table["identity"] + table["environment"], table["total"], atol=1e-9)
    effect = result.comparison.set_index("readout")["effect"]
    assert table.at["density", "total"] == pytest.approx(effect["density"])


def test_a_cell_pushed_out_of_the_data_gets_a_weaker_edit_that_is_inside(model: GE2Hist, demo_cells: Cells) -> None:
    far = made(model, demo_cells, "GAPDH:set=50000")
    found = gather(far, model, demo_cells, parts=["gates"])
    table = found.table("gates", "gates").set_index("arm")
    nearest = found.parts["gates"].facts["nearest"]
    if table.at["base", "inside"] is True and table.at["edited", "inside"] is False:
        assert nearest["share"] < 1 and (nearest["p"] >= 0.05 or nearest["share"] == 0)
        assert any(
            "nearest supported" in text or "weakest form" in text
            for text in evidence_words.sentences(found.parts["gates"], found)
        )
    else:
        assert nearest is None


def test_the_cache_gives_the_same_evidence_without_work(
    evidence: Evidence, result: Result, model: GE2Hist, demo_cells: Cells, cache: DiskCache
) -> None:
    found, complete = at_hand(result, model, demo_cells, cache)
    assert complete and set(found.parts) == set(evidence.parts) and found.missing == evidence.missing
    again = gather(result, model, demo_cells, parts=tuple(evidence.parts), cache=cache)
    for name, part in evidence.parts.items():
        assert again.parts[name].facts == part.facts
        for title, table in part.tables.items():
            pd.testing.assert_frame_equal(again.parts[name].tables[title], table, check_exact=True)
    # Other cells around it are another question.
    assert "matched" not in kept(result, model, demo_cells.take(range(59)), cache)


def test_what_was_missing_is_asked_for_again_once_the_bundle_was_fitted_with_more(
    evidence: Evidence, result: Result, model: GE2Hist, demo_cells: Cells, cache: DiskCache, monkeypatch
) -> None:
    assert at_hand(result, model, demo_cells, cache)[1] and "missing" in kept(result, model, demo_cells, cache)
    # As if the command that fits it had come after the evidence.
    there = module._fitted(model)
    monkeypatch.setattr(module, "_fitted", lambda _: [*there, "later.json"])
    assert not at_hand(result, model, demo_cells, cache)[1] and "missing" not in kept(result, model, demo_cells, cache)


def test_what_a_bundle_was_fitted_with_is_read_from_its_folder(model: GE2Hist, tmp_path: Path) -> None:
    (tmp_path / "baselines").mkdir()
    (tmp_path / "gates.json").touch()
    assert module._fitted(replace(model, folder=tmp_path)) == ["gates.json"]
    (tmp_path / "baselines" / "baselines.json").touch()
    assert module._fitted(replace(model, folder=tmp_path)) == ["baselines/baselines.json", "gates.json"]


def test_before_anything_is_gathered_only_the_instant_parts_are_at_hand(
    result: Result, model: GE2Hist, demo_cells: Cells, tmp_path: Path
) -> None:
    found, complete = at_hand(result, model, demo_cells, DiskCache(tmp_path))
    assert not complete and set(found.missing) <= {"baselines"}
    assert all(PARTS[name] == "instant" for name in found.parts)


def test_packing_a_part_keeps_it_and_drops_what_json_cannot_hold() -> None:
    table = pd.DataFrame(
        {"readout": ["a", "b"], "ratio": [np.inf, 2.0], "inside": pd.Series([None, True], dtype=object)}
    )
    again = Part.unpack(json.loads(json.dumps(Part("gates", {"gates": table}, {"n": 3}).pack(), allow_nan=False)))
    assert again.name == "gates" and again.facts == {"n": 3}
    assert np.isnan(again.tables["gates"]["ratio"][0]) and again.tables["gates"]["ratio"][1] == 2
    assert again.tables["gates"]["inside"].tolist() == [None, True]


def test_a_reader_judged_by_an_earlier_version_has_no_corrected_interval(
    result: Result, model: GE2Hist, demo_cells
) -> None:
    older = GE2Hist.load(model.folder)
    older.reader.figures.pop("true_counts")
    found = gather(result, older, demo_cells, parts=["reader", "precision"])
    assert "train-reader" in found.missing["reader"] and list(found.parts) == ["precision"]


def test_cancelling_ends_between_parts_and_inside_them(result: Result, model: GE2Hist, demo_cells: Cells) -> None:
    stop = threading.Event()
    under_way = steps(result, model, demo_cells, parts=["precision", "route"], cancel=stop)
    assert not next(under_way).parts and "precision" in next(under_way).parts
    stop.set()
    with pytest.raises(Stopped):
        next(under_way)
    seen: list[float] = []
    stop = threading.Event()

    def on_progress(progress) -> None:
        seen.append(progress.fraction)
        if len(seen) == 3:
            stop.set()

    with pytest.raises(Stopped):
        gather(result, model, demo_cells, parts=["route"], on_progress=on_progress, cancel=stop)


def test_progress_grows_to_one(result: Result, model: GE2Hist, demo_cells: Cells) -> None:
    seen: list[float] = []
    gather(
        result, model, demo_cells, parts=["precision", "gates", "route"],
        on_progress=lambda progress: seen.append(progress.fraction),
    )  # fmt: skip
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"parts": ["colour"]}, "no part 'colour'"),
        ({"edit": ""}, "edits nothing"),
        ({"other": True}, "load that bundle"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    change: dict, says: str, model: GE2Hist, tiny_bundle: GE2Hist, result: Result, demo_cells: Cells
) -> None:
    one = made(model, demo_cells, "") if "edit" in change else result
    with pytest.raises(BadInput, match=says):
        gather(one, tiny_bundle if "other" in change else model, demo_cells, parts=change.get("parts", ["precision"]))


def test_real_cells_are_asked_for_a_single_gene_with_known_niches(model: GE2Hist, demo_cells: Cells) -> None:
    several = made(model, demo_cells, "GAPDH:x4,CD8A:ko")
    niches = pd.DataFrame({"density": np.arange(60.0)}, index=demo_cells.cell_id)
    assert "single gene" in gather(several, model, demo_cells, parts=["natural"], niches=niches).missing["natural"]
    # Many cells of one type, whose density grows with the gene.
    draws = np.random.default_rng(0)
    counts = draws.poisson(4.0, size=(400, len(demo_cells.genes)))
    column = int(np.flatnonzero(demo_cells.genes == "GAPDH")[0])
    many = Cells(
        counts, demo_cells.genes, np.array([f"c{i}" for i in range(400)]), np.repeat("Fibroblast", 400),
        np.array([f"d{i % 8}" for i in range(400)]),
    )  # fmt: skip
    niches = pd.DataFrame({"density": 1000.0 + 50 * counts[:, column] + draws.normal(0, 10, 400)}, index=many.cell_id)
    one = made(model, many, "GAPDH:x4", ("c0",))
    found = gather(one, model, many, parts=["natural"], niches=lambda: niches)
    row = found.table("natural", "beside").set_index("readout").loc["density"]
    assert row["natural_low"] > 0 and row["n"] >= 20
    assert "confounded" in " ".join(evidence_words.sentences(found.parts["natural"], found))


def test_niches_come_from_the_file_or_from_all_its_positions(demo_cells: Cells, tmp_path: Path) -> None:
    truth = pd.DataFrame({"niche_density": np.arange(60.0), "niche_colour": 1.0, "niche_fraction:Fibroblast": 0.5})
    write_cells(demo_cells, tmp_path / "with.h5ad", truth)
    with open_h5ad(tmp_path / "with.h5ad") as source:
        table = niches_of(source)
    assert list(table.columns) == ["density", "fraction:Fibroblast"]
    assert table.loc["cell-7", "density"] == 7
    # Sixty cells strewn over a quarter of a square millimetre are no section.
    write_cells(demo_cells, tmp_path / "sparse.h5ad")
    with open_h5ad(tmp_path / "sparse.h5ad") as source, pytest.raises(BadInput, match="give all cells of the sections"):
        niches_of(source)
    dense = replace(demo_cells, xy_um=demo_cells.xy_um / 4, donor=np.repeat("one", 60))
    write_cells(dense, tmp_path / "dense.h5ad")
    with open_h5ad(tmp_path / "dense.h5ad") as source:
        table = niches_of(source)
    name = table.index[0]
    apart = np.abs(dense.xy_um - dense.xy_um[list(dense.cell_id).index(name)]).max(axis=1)
    assert table.loc[name, "density"] == pytest.approx((apart <= 32).sum() / 0.064**2)


# Words, tables, files


def test_amounts_carry_their_unit() -> None:
    assert evidence_words.amount("density:Fibroblast", -1234.4) == "-1,234 per mm²"
    assert evidence_words.amount("fraction:Fibroblast", 0.031) == "+3.1 percentage points"
    assert evidence_words.amount("spacing_var", 0.5, signed=False) == "0.50 µm²"
    assert (
        evidence_words.amount("spacing", -0.001) == "0 µm" and evidence_words.amount("density", 10.0) == "+10 per mm²"
    )
    assert evidence_words.span("fraction:Fibroblast", -0.0152, 0.00001) == "-1.5 to 0"


def test_the_encoders_own_noise_is_said_with_its_numbers(evidence: Evidence) -> None:
    text = " ".join(evidence_words.sentences(evidence.parts["technical"], evidence))
    row = evidence.table("technical", "states").set_index("space").loc["embedding"]
    assert f"{row['distance']:.3g}" in text
    assert row["point"] or (
        f"{row['cloud']:.3g}" in text and f"{row['distance'] / row['cloud']:.2g} of the encoder's own noise" in text
    )


def test_every_part_says_something_with_its_cover_and_never_promises(evidence: Evidence) -> None:
    for name, title, said, tables in evidence_words.sections(evidence):
        assert title.endswith("?") and len(said) > 1 and said[-1] == evidence_words.COVERS[name]
        assert tables and "predict" not in " ".join(said).lower() and "nan" not in " ".join(said).split()


def test_shares_are_shown_in_percent_and_kept_as_fractions(evidence: Evidence) -> None:
    part = evidence.parts["precision"]
    shown, _ = next(iter(evidence_words.shown_tables(part)))
    kept = part.tables["precision"].set_index("readout")
    name = next(name for name in kept.index if name.startswith("fraction:"))
    row = shown[shown["readout"] == f"Share of {name.partition(':')[2]}"].iloc[0]
    assert row["unit"] == "%" and row["effect"] == pytest.approx(100 * kept.at[name, "effect"])


def test_the_report_holds_the_evidence_and_replays_as_before(
    evidence: Evidence, result: Result, demo_cells: Cells, tmp_path: Path
) -> None:
    write_report(result, tmp_path, demo_cells, evidence=evidence)
    page = (tmp_path / "report.html").read_text()
    for title in (evidence_words.TITLES[name] for name in evidence.parts):
        assert title.replace("'", "&#39;") in page
    assert evidence.missing["baselines"].split(":")[0] in page
    value = json.loads((tmp_path / "evidence.json").read_text())
    assert set(value["parts"]) == set(evidence.parts) and value["missing"] == evidence.missing
    assert [one["readout"] for one in value["lights"]] == list(evidence.headline)
    table = pd.read_csv(tmp_path / "evidence.csv", float_precision="round_trip")
    kept = evidence.table("precision", "precision").set_index("readout").loc["density"]
    line = table[(table["part"] == "precision") & (table["row"] == "density") & (table["quantity"] == "effect")].iloc[0]
    assert (line["value"], line["low"], line["n"]) == (kept["effect"], kept["low"], kept["n"])
    assert line["unit"] == "cells/mm²" and line["covers"] == evidence_words.COVERS["precision"]
    text = " ".join(re.search(r'<p id="method">(.*?)</p>', page, re.DOTALL)[1].split())
    assert "random genes" in text and "exchanged" in text
    for path in (tmp_path, tmp_path / "report.html"):
        assert read_report(path).recipe == result.recipe
    readme = (tmp_path / "README.txt").read_text()
    assert "evidence.json" in readme and "evidence.csv" in readme


def test_a_report_without_evidence_says_nothing_of_it_and_one_with_another_is_refused(
    evidence: Evidence, result: Result
) -> None:
    assert 'id="evidence"' not in html(result) and 'id="evidence"' in html(result, evidence)
    with_it = pdf(result, evidence)
    assert with_it.startswith(b"%PDF") and len(with_it) > len(pdf(result))
    said = [text.get_text() for page in _evidence_tables(evidence) for text in page.texts]
    for _, title, _, tables in evidence_words.sections(evidence):
        for table, caption in tables:
            assert title in said and any(text.startswith(caption[:40]) for text in said)
            assert {str(name).replace("_", " ") for name in table.columns} <= set(said)
    with pytest.raises(ValueError, match="evidence on recipe"):
        html(result, replace(evidence, recipe_hash="0" * 64))


def test_the_command_line_writes_the_evidence_and_prints_the_lights(
    model: GE2Hist, demo_cells: Cells, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ge2hist_core.__main__ import run_command

    def command(*argv: str) -> int:
        return run_command("python -m perturb", "", COMMANDS, argv)

    write_cells(demo_cells, tmp_path / "cells.h5ad")
    where = ["--bundle", str(model.folder), "--cells", str(tmp_path / "cells.h5ad")]
    assert command("recipe", "--cell", "cell-3", "--edit", EDIT, "--seeds", "0-1", "--steps", "2", *where) == 0
    recipe = tmp_path / "recipe.json"
    recipe.write_text(capsys.readouterr().out)
    out = tmp_path / "out"
    asked = ["--parts", "precision,technical,natural"]
    assert command("evidence", str(recipe), "--out", str(out), *asked, *where) == 0
    said = capsys.readouterr().out
    assert str(out / "evidence.json") in said and re.search(r"^(green|amber|grey) .*Density: ", said, re.MULTILINE)
    value = json.loads((out / "evidence.json").read_text())
    assert list(value["parts"]) == ["precision", "technical"] and "sections" in value["missing"]["natural"]
    assert command("run", str(recipe), "--out", str(tmp_path / "two"), "--evidence", *asked, *where) == 0
    assert (tmp_path / "two" / "evidence.csv").read_bytes() == (out / "evidence.csv").read_bytes()
    assert command("run", str(recipe), "--out", str(tmp_path / "three"), *where) == 0
    assert not (tmp_path / "three" / "evidence.csv").exists()
    assert command("evidence", str(recipe), "--out", str(out), "--parts", "colour", *where) == 2
    assert "choose precision" in capsys.readouterr().err
    assert pd.read_csv(io.BytesIO((out / "evidence.csv").read_bytes()))["notice"].notna().all()
