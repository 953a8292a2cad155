from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ge2hist_core.config import CELL_TYPES, READER_CLASSES
from perturb import charts
from perturb.colours import TYPE_COLOURS, colour_of

NAN = float("nan")


@pytest.fixture
def summary() -> pd.DataFrame:
    rows = [
        ("base", "density", "cells/mm²", 5000.0, 4800.0, 5300.0, 4),
        ("edited", "density", "cells/mm²", 4000.0, 3900.0, 4200.0, 4),
        ("base", "density:Lymphocyte", "cells/mm²", 1000.0, 900.0, 1200.0, 4),
        ("edited", "density:Lymphocyte", "cells/mm²", 400.0, 300.0, 450.0, 4),
        ("base", "fraction:Lymphocyte", "fraction", 0.2, 0.1, 0.25, 4),
        ("edited", "fraction:Lymphocyte", "fraction", 0.1, 0.05, 0.2, 4),
        ("base", "fraction:Fibroblast", "fraction", 0.8, 0.7, 0.9, 4),
        ("edited", "fraction:Fibroblast", "fraction", NAN, NAN, NAN, 0),
        ("base", "spacing", "µm", 7.0, 6.5, 7.5, 2),
        ("edited", "spacing", "µm", 8.0, 7.0, 9.0, 2),
        ("base", "spacing_var", "µm²", 2.0, 1.0, 3.0, 2),
        ("edited", "spacing_var", "µm²", 2.5, 2.0, 3.0, 2),
    ]
    return pd.DataFrame(rows, columns=["arm", "readout", "unit", "mean", "low", "high", "n"])


@pytest.mark.parametrize("theme", charts.THEMES)
def test_density_bars_carry_means_and_intervals(summary: pd.DataFrame, theme: str) -> None:
    figure = charts.density(summary, theme)
    base, edited = figure.data
    assert (base.name, edited.name) == ("Unedited", "Edited")
    assert list(base.x) == ["All nuclei", "Lymphocyte"]
    assert list(base.y) == [5000, 1000] and list(edited.y) == [4000, 400]
    np.testing.assert_allclose(edited.error_y.array, [200, 50])
    np.testing.assert_allclose(edited.error_y.arrayminus, [100, 100])
    assert edited.marker.color[1] == TYPE_COLOURS["Lymphocyte"]
    assert figure.layout.yaxis.title.text == "Density (cells/mm²)"


def test_composition_is_in_percent_and_keeps_undefined_shares_undefined(summary: pd.DataFrame) -> None:
    figure = charts.composition(summary)
    base, edited = (next(trace for trace in figure.data if trace.name == name) for name in ("Unedited", "Edited"))
    assert list(base.y) == ["Fibroblast", "Lymphocyte"]
    np.testing.assert_allclose(base.x, [80, 20])
    np.testing.assert_allclose(edited.x, [np.nan, 10])
    np.testing.assert_allclose(base.error_x.array, [10, 5])
    np.testing.assert_allclose(base.error_x.arrayminus, [10, 10])
    assert figure.layout.xaxis.title.text == "Share of nuclei (%)"


def test_spacing_joins_the_pairs_of_a_seed(summary: pd.DataFrame) -> None:
    values = {"base": [6.0, 8.0, NAN], "edited": [7.0, 9.0, 5.0]}
    readouts = pd.DataFrame(
        [(arm, "c", seed, "spacing", "µm", v) for arm, vs in values.items() for seed, v in enumerate(vs)],
        columns=["arm", "cell_id", "seed", "readout", "unit", "value"],
    )
    figure = charts.spacing(readouts, summary)
    lines, means = figure.data[:2]
    np.testing.assert_allclose(lines.y, [6, 7, np.nan, 8, 9, np.nan])
    assert list(means.y) == [7.0, 8.0]
    np.testing.assert_allclose(means.error_y.array, [0.5, 1.0])
    assert figure.layout.yaxis.title.text == "Mean (µm)"
    assert figure.layout.yaxis2.title.text == "Variance (µm²)"


def test_effects_have_one_panel_per_unit_and_fill_what_passes_fdr() -> None:
    rows = [
        ("density", "cells/mm²", 5000.0, 4000.0, -1000.0, -1200.0, -700.0, 0.001, 0.01, 16),
        ("spacing", "µm", 7.0, 7.5, 0.5, -0.2, 1.0, 0.2, 0.3, 16),
        ("density:Lymphocyte", "cells/mm²", 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 16),
        ("spacing_var", "µm²", NAN, NAN, NAN, NAN, NAN, NAN, NAN, 0),
    ]
    columns = ["readout", "unit", "base", "edited", "effect", "low", "high", "p", "q", "n"]
    figure = charts.effects(pd.DataFrame(rows, columns=columns))
    assert len(figure.data) == 3
    density = figure.data[0]
    assert list(density.y) == ["Lymphocyte", "All nuclei"] and list(density.x) == [0.0, -1000.0]
    np.testing.assert_allclose(density.error_x.arrayminus, [0, 200])
    assert list(density.marker.symbol) == ["circle-open", "circle"]
    titles = [figure.layout[f"xaxis{i}"].title.text for i in ("", 2, 3)]
    assert titles == ["Edited - unedited (cells/mm²)", "Edited - unedited (µm)", "Edited - unedited (µm²)"]


def test_charts_stand_empty_tables(summary: pd.DataFrame) -> None:
    empty = summary.iloc[:0]
    readouts = pd.DataFrame(columns=["arm", "cell_id", "seed", "readout", "unit", "value"])
    comparison = pd.DataFrame(columns=["readout", "unit", "effect", "low", "high", "p", "q", "n"])
    charts.density(empty)
    charts.composition(empty)
    charts.effects(comparison)
    with_arms = readouts.assign(value=readouts["value"].astype(float))
    charts.spacing(with_arms, empty)


@pytest.mark.parametrize("theme", charts.THEMES)
def test_the_trade_off_has_a_line_per_size_and_opens_what_lies_outside(theme: str) -> None:
    rows = [("", 0, 0.0, 0.4, 0), ("A:ko", 1, 0.2, 0.3, 0), ("B:ko", 1, 0.3, 0.02, 1), ("A:ko,B:ko", 2, 0.5, 0.04, 1)]
    table = pd.DataFrame(rows, columns=["edits", "size", "closed", "support", "outside"])
    figure = charts.tradeoff(table, theme)
    one, two = figure.data
    assert (one.name, two.name) == ("1 edit", "2 edits")
    assert list(one.x) == [0.02, 0.3] and list(two.x) == [0.04]
    np.testing.assert_allclose(one.y, [30, 20])
    assert list(one.marker.symbol) == ["circle-open", "circle"] and list(two.marker.symbol) == ["square-open"]
    assert [row[0] for row in one.customdata] == ["B:ko", "A:ko"]
    assert figure.layout.xaxis.type == "log" and figure.layout.yaxis.title.text == "Gap to the target closed (%)"
    assert any(shape.x0 == shape.x1 == 0.05 for shape in figure.layout.shapes)
    blind = charts.tradeoff(table.assign(support=NAN), theme)
    assert list(blind.data[0].x) == [1, 1] and blind.layout.xaxis.title.text == "Number of edits"
    assert not charts.tradeoff(table[:1], theme).data


def test_every_type_has_its_colour_and_all_reader_classes_differ_for_the_colour_blind() -> None:
    """Deuteranopia and protanopia by the matrices of Machado et al. 2009 (severity 1), distance in CIELAB."""
    from skimage.color import rgb2lab

    assert set(TYPE_COLOURS) == set(CELL_TYPES) | set(READER_CLASSES)
    assert colour_of("never heard of") not in TYPE_COLOURS.values()
    rgb = np.array([[int(TYPE_COLOURS[name][i : i + 2], 16) / 255 for i in (1, 3, 5)] for name in READER_CLASSES])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    sight = {
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "normal": np.eye(3).tolist(),
    }
    for name, matrix in sight.items():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1)
        seen = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)
        lab = rgb2lab(seen[None])[0]
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1000 * np.eye(len(lab))
        assert distance.min() > 15, (name, READER_CLASSES[distance.min(axis=0).argmin()], distance.min())


@pytest.mark.parametrize("theme", charts.THEMES)
def test_true_against_drawn_has_a_panel_per_unit_with_diagonal_and_equal_axes(theme: str) -> None:
    rows = [
        ("immune_infiltration", "up", "density", "cells/mm²", 100.0, 20.0),
        ("immune_infiltration", "up", "fraction:Lymphocyte", "percentage points", 10.0, 1.0),
        ("immune_infiltration", "down", "fraction:Lymphocyte", "percentage points", -20.0, -2.0),
        ("immune_infiltration", "down", "fraction:Fibroblast", "percentage points", NAN, 1.0),
    ]
    effects = pd.DataFrame(rows, columns=["programme", "direction", "readout", "unit", "true", "drawn"])
    figure = charts.true_against_drawn(effects, {"cells/mm²": 0.2, "percentage points": 0.1}, theme)
    points = {trace.name: trace for trace in figure.data if trace.mode == "markers"}
    assert set(points) == {"All nuclei", "Lymphocyte"}
    assert list(points["Lymphocyte"].x) == [10, -20] and list(points["Lymphocyte"].y) == [1, -2]
    assert list(points["Lymphocyte"].marker.symbol) == ["triangle-up", "triangle-down"]
    assert points["Lymphocyte"].marker.color == TYPE_COLOURS["Lymphocyte"] and points["Lymphocyte"].xaxis == "x2"
    lines = [trace for trace in figure.data if trace.mode == "lines" and trace.xaxis == "x2"]
    np.testing.assert_allclose([line.y[1] / line.x[1] for line in lines], [1.0, 0.1])
    for x, y in (("xaxis", "yaxis"), ("xaxis2", "yaxis2")):
        assert figure.layout[x].range == figure.layout[y].range
    assert "cells/mm²" in figure.layout.xaxis.title.text and "percentage points" in figure.layout.yaxis2.title.text
    hostile = charts.true_against_drawn(effects.assign(programme="<b>a</b>_b"), {}, theme)
    assert hostile.data[-1].customdata[0][0] == "&lt;b&gt;a&lt;/b&gt; b"
    assert not [trace for trace in charts.true_against_drawn(effects[:0], {}, theme).data if trace.mode == "markers"]


def test_candidates_in_one_place_of_the_volcano_share_a_label() -> None:
    rows = pd.DataFrame(
        {
            "candidate": ["A:ko", "B:ko", "C:ko", "D(1)"],
            "unit": "cells/mm²",
            "effect": [2.0, 2.0, 2.0, -1.0],
            "low": 0.0, "high": 3.0, "p": [0.5, 0.5, 0.5, 1.0], "q": 1.0, "replicated": True,
        }
    )  # fmt: skip
    points = charts.volcano(rows).data[-1]
    assert list(points.text) == ["A:ko and 2 more", "", "", "D"]
    assert [name for name, *_ in points.customdata] == rows["candidate"].tolist()  # each is still found by pointing
    assert points.y.min() == 0
