"""Tables -> plotly figures. Knows pandas and plotly only; pages and report draw the same figures.

``theme`` is "light" or "dark". Unedited is an open marker or a pale bar, edited a filled one; colour is the cell type.
Error bars are the intervals of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ge2hist_core.support import OUTSIDE
from perturb.colours import colour_of

__all__ = [
    "CHART_CONFIG",
    "SUPPORT",
    "THEMES",
    "calibration",
    "cell_map",
    "composition",
    "density",
    "dose_response",
    "effects",
    "ranking",
    "readable",
    "scenario_panels",
    "scenarios",
    "spacing",
    "tradeoff",
    "true_against_drawn",
    "volcano",
]

THEMES = {
    "light": {"template": "plotly_white", "ink": "#222222", "muted": "#8A8A8A", "grid": "#E4E4E4"},
    "dark": {"template": "plotly_dark", "ink": "#EDEDED", "muted": "#9A9A9A", "grid": "#3A3A3A"},
}

ARMS = (("base", "Unedited"), ("edited", "Edited"))
ALL = "All nuclei"
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star", "hexagon", "cross")
"""Markers of scenarios, which have no colour of their own."""


def density(summary: pd.DataFrame, theme: str = "light") -> go.Figure:
    """Nuclei per mm2, all and by type: two bars each with the interval of the mean.

    Parameters
    ----------
    summary: ``arm, readout, unit, mean, low, high, n`` (:attr:`perturb.result.Result.summary`).
    """
    rows = summary[summary["readout"].str.split(":").str[0] == "density"]
    names = [ALL if name == "density" else name.partition(":")[2] for name in rows["readout"].unique()]
    figure = go.Figure()
    for arm, title in ARMS:
        part = rows[rows["arm"] == arm]
        edited = arm == "edited"
        figure.add_bar(
            x=names,
            y=part["mean"],
            error_y=_error(part, "mean", theme),
            customdata=part[["low", "high", "n"]],
            name=title,
            marker={
                "color": [_colour(name, theme) for name in names],
                "opacity": 1.0 if edited else 0.4,
                "line": {"color": THEMES[theme]["ink"], "width": 1},
            },
            hovertemplate=_hover(title, "%{x}", "%{y:.0f}", ":.0f", "cells/mm²"),
        )
    figure.update_layout(barmode="group", bargap=0.3)
    figure.update_yaxes(title_text=f"Density ({_unit(rows)})", rangemode="tozero")
    return _finish(figure, theme, "Density")


def composition(summary: pd.DataFrame, theme: str = "light") -> go.Figure:
    """Share of each type among the nuclei, in percent: open marker unedited, filled edited, joined by a line."""
    rows = summary[summary["readout"].str.startswith("fraction:")].copy()
    rows[["mean", "low", "high"]] *= 100.0
    names = [name.partition(":")[2] for name in rows["readout"].unique()][::-1]
    rows["type"] = rows["readout"].str.split(":").str[-1]
    figure = go.Figure()
    means = {arm: rows[rows["arm"] == arm].set_index("type").reindex(names) for arm, _ in ARMS}
    for name in names:
        figure.add_scatter(
            x=[means["base"].at[name, "mean"], means["edited"].at[name, "mean"]],
            y=[name, name],
            mode="lines",
            line={"color": THEMES[theme]["muted"], "width": 2},
            hoverinfo="skip",
            showlegend=False,
        )
    for arm, title in ARMS:
        part = means[arm]
        figure.add_scatter(
            x=part["mean"],
            y=names,
            error_x=_error(part, "mean", theme),
            customdata=part[["low", "high", "n"]],
            name=title,
            mode="markers",
            marker={
                "size": 12,
                "symbol": "circle" if arm == "edited" else "circle-open",
                "color": [_colour(name, theme) for name in names],
                "line": {"color": THEMES[theme]["ink"] if arm == "edited" else None, "width": 2},
            },
            hovertemplate=_hover(title, "%{y}", "%{x:.1f}", ":.1f", "%"),
        )
    figure.update_xaxes(title_text="Share of nuclei (%)", rangemode="tozero")
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names)
    return _finish(figure, theme, "Composition")


def spacing(readouts: pd.DataFrame, summary: pd.DataFrame, theme: str = "light") -> go.Figure:
    """Mean and variance of the distance to the nearest neighbour: a thin line per seed, means with intervals.

    Parameters
    ----------
    readouts: ``arm, cell_id, seed, readout, unit, value`` (:attr:`perturb.result.Result.readouts`); a line is drawn
        for each cell and seed at which the readout is defined in both arms.
    summary: as for :func:`density`.
    """
    ink = THEMES[theme]
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.16)
    titles = [title for _, title in ARMS]
    for column, (readout, label) in enumerate((("spacing", "Mean"), ("spacing_var", "Variance")), start=1):
        rows = readouts[readouts["readout"] == readout]
        wide = rows.pivot(index=["cell_id", "seed"], columns="arm", values="value")
        wide = wide.reindex(columns=[arm for arm, _ in ARMS]).dropna()
        gaps = np.full((len(wide), 1), np.nan)
        figure.add_scatter(
            x=[*titles, None] * len(wide),
            y=np.hstack([wide.to_numpy(), gaps]).ravel(),
            mode="lines",
            line={"color": ink["muted"], "width": 1},
            opacity=0.6,
            name="One picture pair",
            hoverinfo="skip",
            showlegend=column == 1,
            row=1,
            col=column,
        )
        part = summary[summary["readout"] == readout].set_index("arm").reindex([arm for arm, _ in ARMS])
        unit = _unit(summary[summary["readout"] == readout])
        figure.add_scatter(
            x=titles,
            y=part["mean"],
            error_y=_error(part, "mean", theme),
            customdata=part[["low", "high", "n"]],
            mode="markers",
            marker={"size": 11, "color": ink["ink"]},
            name="Mean with interval",
            showlegend=column == 1,
            hovertemplate=_hover("%{x}", label, "%{y:.2f}", ":.2f", unit),
            row=1,
            col=column,
        )
        figure.update_yaxes(title_text=f"{label} ({unit})", row=1, col=column)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=titles, range=[-0.4, 1.4])
    return _finish(figure, theme, "Spacing: distance to the nearest nucleus")


def effects(comparison: pd.DataFrame, theme: str = "light") -> go.Figure:
    """Forest of the paired effects, one panel per unit: edited minus unedited with interval; filled where q < 0.05.

    Parameters
    ----------
    comparison: ``readout, unit, base, edited, effect, low, high, p, q, n``
        (:attr:`perturb.result.Result.comparison`).
    """
    groups = [(unit, rows.iloc[::-1]) for unit, rows in comparison.groupby("unit", sort=False)]
    figure = make_subplots(
        rows=max(len(groups), 1),
        cols=1,
        row_heights=[len(rows) + 1.5 for _, rows in groups] or None,
        vertical_spacing=0.3 / max(len(groups), 1),
    )
    for i, (unit, rows) in enumerate(groups, start=1):
        names = [_label(name) for name in rows["readout"]]
        colours = [_colour(name.partition(":")[2] or ALL, theme) for name in rows["readout"]]
        figure.add_scatter(
            x=rows["effect"],
            y=names,
            error_x=_error(rows, "effect", theme),
            customdata=rows[["low", "high", "n", "p", "q"]],
            mode="markers",
            marker={
                "size": 11,
                "color": colours,
                "symbol": ["circle" if q < 0.05 else "circle-open" for q in rows["q"]],
                "line": {"color": colours, "width": 2},
            },
            hovertemplate=_hover("Edited - unedited", "%{y}", "%{x:.3g}", ":.3g", unit).replace(
                "<extra>", "<br>p = %{customdata[3]:.2g}, q = %{customdata[4]:.2g}<extra>"
            ),
            showlegend=False,
            row=i,
            col=1,
        )
        figure.add_vline(x=0, line={"color": THEMES[theme]["muted"], "dash": "dot"}, row=i, col=1)
        figure.update_xaxes(title_text=f"Edited - unedited ({unit})", row=i, col=1)
        figure.update_yaxes(type="category", row=i, col=1)
    _finish(figure, theme, "Paired effects")
    return figure.update_layout(height=130 + 75 * len(groups) + 24 * len(comparison))


def dose_response(
    table: pd.DataFrame,
    readout: str,
    dose_unit: str,
    theme: str = "light",
    curve: tuple[np.ndarray, np.ndarray] | None = None,
) -> go.Figure:
    """Effect of each dose on one readout, edited minus unedited, with interval.

    Parameters
    ----------
    table: ``dose, readout, unit, effect, low, high, n, ...`` (:func:`perturb.doses.run_doses`).
    curve: ``(dose, effect)`` of a fitted curve to draw behind the points.
    """
    rows = table[table["readout"] == readout].sort_values("dose")
    scale = 100.0 if readout.startswith("fraction") else 1.0
    rows = rows.assign(**{name: rows[name] * scale for name in ("effect", "low", "high")})
    unit = "percentage points" if scale == 100.0 else _unit(rows)
    figure = go.Figure()
    figure.add_hline(y=0, line={"color": THEMES[theme]["muted"], "dash": "dot"})
    if curve is not None:
        figure.add_scatter(
            x=curve[0],
            y=curve[1] * scale,
            mode="lines",
            name="Hill curve",
            line={"color": THEMES[theme]["muted"], "width": 2},
            hoverinfo="skip",
        )
    figure.add_scatter(
        x=rows["dose"],
        y=rows["effect"],
        error_y=_error(rows, "effect", theme),
        customdata=rows[["low", "high", "n"]],
        mode="markers+lines" if curve is None else "markers",
        name="Mean paired effect",
        marker={"size": 10, "color": _colour(readout.partition(":")[2] or ALL, theme)},
        line={"width": 1, "color": THEMES[theme]["muted"]},
        hovertemplate=_hover("Edited - unedited", "Dose %{x:g}", "%{y:.3g}", ":.3g", unit),
    )
    figure.update_xaxes(title_text=f"Dose ({escape(dose_unit, quote=False)})")
    figure.update_yaxes(title_text=f"Edited - unedited ({unit})")
    return _finish(figure, theme, f"Dose response: {readable(readout)}")


def volcano(confirmed: pd.DataFrame, theme: str = "light") -> go.Figure:
    """Effect against -log10 p of the drawn candidates of one readout; filled where q < 0.05 and replicated.

    Parameters
    ----------
    confirmed: ``candidate, unit, effect, low, high, p, q, replicated`` (:func:`perturb.screen.confirm`), one readout.
    """
    rows = confirmed[confirmed["p"].notna()]
    hit = (rows["q"] < 0.05) & rows["replicated"]
    height = -np.log10(rows["p"]) + 0.0  # no -0
    figure = go.Figure()
    figure.add_vline(x=0, line={"color": THEMES[theme]["muted"], "dash": "dot"})
    figure.add_scatter(
        x=rows["effect"],
        y=height,
        customdata=rows[["candidate", "low", "high", "q"]],
        text=_shared_labels(rows["candidate"], rows["effect"], height),
        mode="markers+text",
        textposition="top center",
        cliponaxis=False,
        marker={
            "size": 11,
            "color": [colour_of("CD8 T cell") if h else THEMES[theme]["muted"] for h in hit],
            "symbol": ["circle" if h else "circle-open" for h in hit],
        },
        hovertemplate="%{customdata[0]}<br>effect %{x:.3g}, interval %{customdata[1]:.3g} to %{customdata[2]:.3g}"
        "<br>q = %{customdata[3]:.2g}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(title_text=f"Edited - unedited ({_unit(rows)})")
    figure.update_yaxes(title_text="-log10 p", range=[0, 1.15 * max(1.0, height.max())] if len(rows) else None)
    figure.update_layout(clickmode="event+select")
    return _finish(figure, theme, "Drawn candidates; filled: q < 0.05 and replicated")


def _shared_labels(names: pd.Series, x: pd.Series, y: pd.Series) -> list[str]:
    """A label for each point; points in one place, of which few pairs changed, share one: the first, and how many."""
    place = pd.Series(list(zip(x.round(6), y.round(6), strict=True)), index=names.index)
    more = place.map(place.value_counts()) - 1
    labels = names.str.partition("(")[0] + more.map(lambda n: f" and {n} more" if n else "")
    return labels.where(~place.duplicated(), "").tolist()


def scenarios(table: pd.DataFrame, readout: str, theme: str = "light") -> go.Figure:
    """One readout's paired effect in each scenario, with interval; filled where q < 0.05.

    Parameters
    ----------
    table: ``scenario, readout, unit, effect, low, high, q, n`` (:func:`perturb.workspace.effects_table`).
    """
    rows = table[table["readout"] == readout].iloc[::-1]
    scale = 100.0 if readout.startswith("fraction") else 1.0
    rows = rows.assign(**{name: rows[name] * scale for name in ("effect", "low", "high")})
    unit = "percentage points" if scale == 100.0 else _unit(rows)
    figure = go.Figure()
    figure.add_vline(x=0, line={"color": THEMES[theme]["muted"], "dash": "dot"})
    colour = _colour(readout.partition(":")[2] or ALL, theme)
    figure.add_scatter(
        x=rows["effect"],
        y=[escape(" ".join(name.split())) for name in rows["scenario"]],
        error_x=_error(rows, "effect", theme),
        customdata=rows[["low", "high", "n"]],
        mode="markers",
        marker={
            "size": 12,
            "color": colour,
            "symbol": ["circle" if q < 0.05 else "circle-open" for q in rows["q"]],
            "line": {"color": colour, "width": 2},
        },
        hovertemplate=_hover("Edited - unedited", "%{y}", "%{x:.3g}", ":.3g", unit),
        showlegend=False,
    )
    figure.update_xaxes(title_text=f"Edited - unedited ({unit})")
    figure.update_yaxes(type="category")
    _finish(figure, theme, "Effect by scenario; filled: q < 0.05")
    return figure.update_layout(height=180 + 34 * len(rows))


def scenario_panels(effects: pd.DataFrame, contrasts: pd.DataFrame, theme: str = "light") -> go.Figure:
    """Every readout of several scenarios with intervals, one legend: effects on the left, contrasts on the right.

    One row of panels per unit. A scenario has a marker of its own shape, filled where q < 0.05; colours mean types.

    Parameters
    ----------
    effects: ``scenario, readout, unit, effect, low, high, p, q, n`` (:func:`perturb.workspace.effects_table`).
    contrasts: the same and ``reference`` (:func:`perturb.workspace.contrast_table`); without rows there is no right
        side.
    """
    names = list(dict.fromkeys(effects["scenario"]))
    units = {unit: list(dict.fromkeys(rows["readout"]))[::-1] for unit, rows in effects.groupby("unit", sort=False)}
    sides = [(effects, "Edited - unedited")]
    if len(contrasts):
        sides.append((contrasts, f"Scenario - {escape(' '.join(contrasts['reference'].iloc[0].split()))}"))
    n_rows = max(len(units), 1)
    figure = make_subplots(
        rows=n_rows,
        cols=len(sides),
        shared_yaxes=True,
        row_heights=[len(readouts) + 0.5 for readouts in units.values()] or None,
        vertical_spacing=0.35 / n_rows if n_rows > 1 else 0.0,
        horizontal_spacing=0.04,
    )
    ink, step = THEMES[theme]["ink"], 0.7 / max(len(names), 1)
    for i, name in enumerate(names):
        shape, label = SHAPES[i % len(SHAPES)], escape(" ".join(name.split()))
        marker: dict[str, object] = {"size": 9, "color": ink, "symbol": shape}
        # An empty trace bears the name: the shape in the legend is filled whatever the first point is.
        figure.add_scatter(x=[None], y=[None], mode="markers", name=label, legendgroup=name, marker=marker)
        for column, (table, arm) in enumerate(sides, start=1):
            for row, (unit, readouts) in enumerate(units.items(), start=1):
                part = table[(table["scenario"] == name) & (table["unit"] == unit)]
                scale, shown = (100.0, "percentage points") if unit == "fraction" else (1.0, unit)
                part = part.assign(**{key: part[key] * scale for key in ("effect", "low", "high")})
                figure.add_scatter(
                    x=part["effect"],
                    y=[readouts.index(one) - step * (i - (len(names) - 1) / 2) for one in part["readout"]],
                    error_x=_error(part, "effect", theme) | {"width": 2},
                    customdata=part[["low", "high", "n", "p", "q"]],
                    text=[f"{label}, {readable(one)}" for one in part["readout"]],
                    mode="markers",
                    legendgroup=name,
                    showlegend=False,
                    marker=marker | {"symbol": [shape if q < 0.05 else f"{shape}-open" for q in part["q"]]},
                    hovertemplate=_hover(arm, "%{text}", "%{x:.3g}", ":.3g", shown).replace(
                        "<extra>", "<br>p = %{customdata[3]:.2g}, q = %{customdata[4]:.2g}<extra>"
                    ),
                    row=row,
                    col=column,
                )
                figure.update_xaxes(title_text=f"{arm} ({shown})", title_font_size=12, row=row, col=column)
    for row, readouts in enumerate(units.values(), start=1):
        for column in range(1, len(sides) + 1):
            figure.add_vline(x=0, line={"color": THEMES[theme]["muted"], "dash": "dot"}, row=row, col=column)
            ticks = {"tickvals": list(range(len(readouts))), "ticktext": [_label(one) for one in readouts]}
            figure.update_yaxes(**ticks, range=[-0.6, len(readouts) - 0.4], row=row, col=column)
    _finish(figure, theme, "Filled: q < 0.05")
    lines = sum(len(readouts) for readouts in units.values())
    return figure.update_layout(height=140 + 70 * n_rows + (14 + 11 * len(names)) * lines)


def tradeoff(table: pd.DataFrame, theme: str = "light") -> go.Figure:
    """How much of the gap to a target the best edit sets close, against how unusual they make the cell.

    A line for each number of edits joins sets of which none is both nearer and better supported; open markers lie
    outside the data (p < 0.05 in some cell).

    Parameters
    ----------
    table: ``edits, size, closed, support, outside`` (:func:`perturb.goal.pareto`). Without a support p the sets stand
        at their number of edits.
    """
    rows = table[table["size"] > 0]
    known = bool(rows["support"].notna().any())
    look = THEMES[theme]
    figure = go.Figure()
    figure.add_hline(y=0, line={"color": look["muted"], "dash": "dot"})
    if known:
        figure.add_vline(
            x=OUTSIDE,
            line={"color": look["muted"], "dash": "dash"},
            annotation={"text": "outside the data", "font": {"color": look["ink"]}},
            annotation_position="top left",
        )
    # Shape and shade tell the sizes apart; colours mean cell types.
    symbols, shades = ("circle", "square", "diamond"), (0.45, 0.7, 1.0)
    for size, part in rows.groupby("size"):
        part = part.sort_values("support", kind="stable")
        kind = (int(size) - 1) % len(symbols)
        figure.add_scatter(
            x=part["support"] if known else part["size"],
            y=100.0 * part["closed"],
            customdata=part[["edits", "support", "outside"]],
            name=f"{size} edit{'s' * (size > 1)}",
            mode="lines+markers" if known else "markers",
            line={"color": look["muted"], "width": 1},
            marker={
                "size": 10,
                "color": look["ink"],
                "opacity": shades[kind],
                "symbol": [symbols[kind] + "-open" * (n > 0) for n in part["outside"]],
                "line": {"color": look["ink"], "width": 2},
            },
            hovertemplate="%{customdata[0]}<br>%{y:.0f} % of the gap closed (the model's guess)"
            "<br>support p = %{customdata[1]:.2g}, cells outside the data: %{customdata[2]}<extra></extra>",
        )
    if known:
        figure.update_xaxes(title_text="Support of the edited cell (conformal p, log scale)", type="log")
    else:
        figure.update_xaxes(title_text="Number of edits", dtick=1)
    figure.update_yaxes(title_text="Gap to the target closed (%)")
    figure.update_layout(clickmode="event+select")
    return _finish(figure, theme, "Trade-off; open: outside the data")


def readable(readout: str) -> str:
    """Name of a readout for people: "Share of Fibroblast", "Density of Fibroblast", "All nuclei"."""
    kind, _, name = readout.partition(":")
    return f"Share of {name}" if kind == "fraction" else f"Density of {name}" if name else _label(readout)


def _label(readout: str) -> str:
    kind, _, name = readout.partition(":")
    plain = {"density": ALL, "spacing": "Nearest neighbour, mean", "spacing_var": "Nearest neighbour, variance"}
    return name or plain.get(kind, kind)


def _colour(name: str, theme: str) -> str:
    return THEMES[theme]["muted"] if name == ALL else colour_of(name)


def _unit(rows: pd.DataFrame) -> str:
    return str(rows["unit"].iloc[0]) if len(rows) else ""


def _error(rows: pd.DataFrame, centre: str, theme: str) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": rows["high"] - rows[centre],
        "arrayminus": rows[centre] - rows["low"],
        "color": THEMES[theme]["ink"],
        "thickness": 1.5,
        "width": 4,
    }


def _hover(arm: str, what: str, value: str, form: str, unit: str) -> str:
    interval = f"%{{customdata[0]{form}}} to %{{customdata[1]{form}}}"
    return f"{what}<br>{arm}: {value} {unit}<br>interval {interval}, n = %{{customdata[2]}}<extra></extra>"


def _finish(figure: go.Figure, theme: str, title: str) -> go.Figure:
    look = THEMES[theme]
    figure.update_layout(
        template=look["template"],
        title={"text": title, "x": 0.0, "xanchor": "left"},
        font={"family": "system-ui, sans-serif", "size": 13, "color": look["ink"]},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 20, "t": 60, "b": 60},
        legend={"orientation": "h", "x": 1.0, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        height=380,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": look["muted"], "activecolor": look["ink"]},
    )
    figure.update_xaxes(gridcolor=look["grid"], automargin=True)
    figure.update_yaxes(gridcolor=look["grid"], automargin=True)
    return figure


CHART_CONFIG: dict[str, object] = {
    "displaylogo": False,
    "responsive": True,
    "toImageButtonOptions": {"format": "svg", "filename": "ge2hist-chart"},
}
"""Plotly settings of every chart in pages and reports; the camera in a chart's corner saves it as SVG."""


def ranking(guess: pd.DataFrame, readout: str, drawn: int, theme: str = "light", named: int = 12) -> go.Figure:
    """Guessed change of every candidate against the mean count of its genes.

    Parameters
    ----------
    guess: ``candidate, level, p_matched`` and ``readout``, the largest first (:func:`perturb.screen.guess`).
    readout: the column that ranks. drawn: how many leading candidates were drawn. named: how many bear their name.
    """
    look = THEMES[theme]
    score, level = guess[readout].abs().to_numpy(), guess["level"].to_numpy()
    figure = go.Figure()
    for title, part, colour in (
        ("Not drawn", slice(drawn, None), look["muted"]),
        ("Drawn", slice(0, drawn), colour_of("CD8 T cell")),
    ):
        rows = guess.iloc[part]
        names = [name if i < named else "" for i, name in enumerate(rows["candidate"])]
        figure.add_scatter(
            x=np.maximum(level[part], 0.01),
            y=score[part],
            customdata=rows[["candidate", "p_matched"]],
            text=names if title == "Drawn" else None,
            mode="markers+text" if title == "Drawn" else "markers",
            textposition="top center",
            textfont={"size": 11},
            name=title,
            marker={
                "size": 9 if title == "Drawn" else 6,
                "color": colour,
                "symbol": "circle",
            },
            hovertemplate="%{customdata[0]}<br>change %{y:.3g}, mean count %{x:.3g}<br>"
            "rank above the trend: p matched = %{customdata[1]:.2g}<extra></extra>",
        )
    unit = {"shift": "root counts", "density": "cells/mm²"}.get(readout, "fraction")
    ticks = [n * 10**k for k in range(-2, 6) for n in (1, 3)]
    figure.update_xaxes(title_text="Mean count of the edited genes", type="log", tickvals=ticks)
    figure.update_yaxes(title_text=f"Guessed change ({unit})", rangemode="tozero")
    return _finish(figure, theme, "All candidates by expression and guessed change")


def spread(table: pd.DataFrame, readout: str, theme: str = "light") -> go.Figure:
    """One readout: the direct edit's effect, what the network adds, what random wiring adds; filled where q < 0.05.

    Parameters
    ----------
    table: ``contrast, readout, unit, effect, low, high, q, n`` (:attr:`perturb.result.Result.spread_effects`).
    """
    titles = {
        "direct - unedited": "Direct edit - unedited",
        "network - direct": "Network - direct edit",
        "control - direct": "Random wiring - direct edit",
        "network - control": "Network - random wiring",
    }
    figure = scenarios(table.assign(scenario=table["contrast"].map(titles)), readout, theme)
    figure.update_xaxes(title_text=figure.layout.xaxis.title.text.replace("Edited - unedited", "Paired difference"))
    return figure.update_layout(title_text="What the network does; filled: q < 0.05")


def true_against_drawn(effects: pd.DataFrame, slopes: Mapping[str, float], theme: str = "light") -> go.Figure:
    """Drawn against true change of each edit and readout, a panel per unit; on the diagonal both are equal.

    Both axes of a panel have the same range, so that what is drawn too small lies flat. Triangles point where the
    programme was pushed.

    Parameters
    ----------
    effects: ``programme, direction, readout, unit, true, drawn`` (:func:`perturb.track_record.driver_effects`).
    slopes: unit -> slope of the line through the origin.
    """
    units = list(dict.fromkeys(effects["unit"]))
    look = THEMES[theme]
    figure = make_subplots(rows=1, cols=max(len(units), 1), horizontal_spacing=0.12)
    for column, unit in enumerate(units, start=1):
        rows = effects[(effects["unit"] == unit) & effects[["true", "drawn"]].notna().all(axis=1)]
        end = 1.1 * float(rows[["true", "drawn"]].abs().to_numpy().max(initial=0.0)) or 1.0
        place = {"row": 1, "col": column}
        for name, slope, dash in (
            ("Drawn = true", 1.0, "dot"),
            ("Slope of the drawn changes", slopes.get(unit), "solid"),
        ):
            if slope is None or not np.isfinite(slope):
                continue
            figure.add_scatter(
                x=[-end, end],
                y=[-end * slope, end * slope],
                mode="lines",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line={"color": look["ink"] if dash == "solid" else look["muted"], "dash": dash, "width": 1.5},
                hoverinfo="skip",
                **place,
            )
        for readout, part in rows.groupby("readout", sort=False):
            name = str(readout).partition(":")[2] or ALL
            figure.add_scatter(
                x=part["true"],
                y=part["drawn"],
                customdata=[
                    [escape(str(one).replace("_", " ")) for one in pair]
                    for pair in part[["programme", "direction"]].to_numpy()
                ],
                mode="markers",
                name=escape(name),
                marker={
                    "size": 10,
                    "color": _colour(name, theme),
                    "symbol": [f"triangle-{'up' if way == 'up' else 'down'}" for way in part["direction"]],
                    "line": {"color": look["ink"], "width": 0.5},
                },
                hovertemplate=f"{escape(readable(str(readout)))}<br>%{{customdata[0]}} %{{customdata[1]}}"
                f"<br>true %{{x:+.3g}}, drawn %{{y:+.3g}} {unit}<extra></extra>",
                **place,
            )
        title = "density" if unit == "cells/mm²" else "shares"
        figure.update_xaxes(title_text=f"True change of {title} ({unit})", range=[-end, end], **place)
        figure.update_yaxes(title_text=f"Drawn change ({unit})", range=[-end, end], **place)
    _finish(figure, theme, "Drawn against true changes")
    legend = {"orientation": "h", "x": 0.0, "xanchor": "left", "y": -0.2, "yanchor": "top"}
    return figure.update_layout(height=500, legend=legend)


SUPPORT = ("Inside the training data", "Outside the training data", "Not looked at")
"""Groups of cells on a map that is coloured by support."""

_DONORS = {
    "light": ["#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499"],
    "dark": ["#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00", "#DDDDDD"],
}
"""Tol's muted and light schemes (sronpersonalpages.nl/~pault); with more donors than colours the marker changes."""
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")


def cell_map(
    cells: pd.DataFrame,
    chosen: Mapping[str, Sequence[object]],
    *,
    colour: str,
    value: str = "",
    axes: tuple[str, str] = ("UMAP 1", "UMAP 2"),
    downwards: bool = False,
    moves: pd.DataFrame | None = None,
    theme: str = "light",
) -> go.Figure:
    """Cells on a map, the chosen ones ringed; ``customdata`` of every point is its cell's id.

    Parameters
    ----------
    cells: ``cell_id, x, y`` and ``group``, or ``value`` where ``colour`` is ``gene``; cells with value 0 or NaN are
        grey and lie below, the others with the highest on top.
    chosen: ``cell_id, x, y``.
    colour: what the groups are: ``type``, ``donor``, ``support`` (of ``SUPPORT``); or ``gene``.
    value: name and unit of the value. axes: titles with units.
    downwards: y counts downwards and both axes share a scale, as in a picture.
    moves: arrows, ``cell_id, x, y, dx, dy, p`` (:func:`perturb.cell_map.shifts`); pale where p > 0.05.
    """
    look = THEMES[theme]
    size = 7 if len(cells) < 3000 else 4
    # A thin outline keeps pale colours apart from the ground; on many small points it would be all that is seen.
    line = {"width": 0.5 if len(cells) < 3000 else 0, "color": look["muted"]}
    figure = go.Figure()

    def points(part: pd.DataFrame, name: str, marker: dict[str, object], says: str, **more: object) -> None:
        figure.add_scattergl(
            x=part["x"],
            y=part["y"],
            customdata=part["cell_id"],
            mode="markers",
            name=name,
            marker={"size": size, "line": line} | marker,
            hovertemplate="%{customdata}<br>" + says + "<extra></extra>",
            **more,
        )

    if colour == "gene":
        shows = cells["value"] > 0
        points(cells[~shows], "Not expressed", {"color": look["grid"]}, "not expressed")
        part = cells[shows].sort_values("value", kind="stable")
        scale = "Viridis" if theme == "dark" else "Viridis_r"
        bar = {"title": {"text": escape(value), "side": "right"}, "thickness": 14}
        shade = {"color": part["value"], "colorscale": scale, "showscale": bool(len(part)), "colorbar": bar}
        span = {"cmin": 0.0, "cmax": float(part["value"].max()) if len(part) else 1.0}
        says = escape(value.partition(",")[0]) + " %{marker.color:.2f}"
        points(part, "Expressed", shade | span, says, showlegend=False)
    else:
        names = sorted(set(cells["group"].astype(str)))
        if colour == "support":
            names = [name for name in SUPPORT[::-1] if name in names]
        shades = _DONORS[theme]
        for i, name in enumerate(names):
            looks: dict[str, dict[str, object]] = {
                "type": {"color": colour_of(name)},
                "support": {"color": dict(zip(SUPPORT, ("#009E73", "#E69F00", look["grid"]), strict=True)).get(name)},
                "donor": {"color": shades[i % len(shades)], "symbol": _SYMBOLS[i // len(shades) % len(_SYMBOLS)]},
            }
            points(cells[cells["group"].astype(str) == name], escape(name), looks[colour], escape(name))
    figure.add_scattergl(
        x=list(chosen["x"]),
        y=list(chosen["y"]),
        customdata=list(chosen["cell_id"]),
        mode="markers",
        name="Chosen cell" if len(chosen["cell_id"]) == 1 else "Chosen cells",
        marker={"size": 16, "symbol": "circle-open", "color": look["ink"], "line": {"width": 3}},
        hovertemplate="%{customdata}<br>chosen<extra></extra>",
    )
    if moves is not None:
        _arrows(figure, moves, theme)
    _finish(figure, theme, "")
    figure.update_layout(
        height=400,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1.0, "yanchor": "top", "itemsizing": "constant"},
        dragmode="pan",
        clickmode="event+select",
        uirevision="map",
    )
    figure.update_xaxes(title_text=axes[0], zeroline=False)
    figure.update_yaxes(title_text=axes[1], zeroline=False)
    if colour == "gene":  # the colour bar stands where the legend would
        figure.update_layout(legend={"orientation": "h", "x": 0.0, "xanchor": "left", "y": 1.0, "yanchor": "bottom"})
    if downwards:
        figure.update_yaxes(autorange="reversed", scaleanchor="x")
    return figure


def _arrows(figure: go.Figure, moves: pd.DataFrame, theme: str) -> None:
    """An arrow from each cell and a marker at its end; pale and open where p > 0.05."""
    look = THEMES[theme]
    for noise, name in ((False, "Where the edit moves it"), (True, "No further than ties")):
        part = moves[((moves["p"] > OUTSIDE) == noise) & (moves["length"] > 0)]
        if not len(part):
            continue
        colour = look["muted" if noise else "ink"]
        end = {axis: part[axis] + part[f"d{axis}"] for axis in "xy"}
        figure.add_scattergl(
            **end,
            customdata=part["cell_id"],
            mode="markers",
            name=name,
            marker={
                "symbol": "diamond-open" if noise else "diamond",
                "size": 10,
                "color": colour,
                "line": {"width": 2, "color": colour},
            },
            hovertemplate="%{customdata}, edited<extra></extra>",
        )
        # Annotations lie above the points, lines of the data below them.
        for x, y, to_x, to_y in zip(part["x"], part["y"], end["x"], end["y"], strict=True):
            figure.add_annotation(
                x=to_x,
                y=to_y,
                ax=x,
                ay=y,
                xref="x",
                yref="y",
                axref="x",
                ayref="y",
                text="",
                showarrow=True,
                arrowhead=2,
                arrowwidth=2,
                arrowcolor=colour,
            )


def methods(
    title: str, points: Sequence[tuple[str, float | None, float | None, float | None]], theme: str
) -> go.Figure:
    """One figure of several methods: a dot for the value and a line for its interval, the first method on top.

    Parameters
    ----------
    title: what is measured, with its unit. points: ``(method, value, low, high)``; None where there is no answer.
    """
    look, figure, shown = THEMES[theme], go.Figure(), 0
    for name, value, low, high in points:
        if value is None:
            continue
        shown += 1
        above, below, interval = 0.0, 0.0, ""
        if low is not None and high is not None:
            above, below, interval = high - value, value - low, f", 95 % interval {low:.4g} to {high:.4g}"
        figure.add_scatter(
            x=[value],
            y=[escape(name)],
            mode="markers",
            marker={"size": 10, "color": look["ink"]},
            error_x={
                "type": "data", "symmetric": False, "array": [above], "arrayminus": [below], "color": look["ink"],
                "thickness": 1.5, "width": 0,
            },
            hovertemplate=f"{escape(name)}: {value:.4g}{interval}<extra></extra>",
            showlegend=False,
        )  # fmt: skip
    _finish(figure, theme, "")
    figure.update_yaxes(autorange="reversed", title=None)
    figure.update_xaxes(title={"text": escape(title)}, rangemode="tozero")
    return figure.update_layout(height=110 + 34 * shown, margin={"l": 60, "r": 20, "t": 10, "b": 50})


def calibration(table: pd.DataFrame, theme: str = "light") -> go.Figure:
    """Mean true effect of edits of like modelled effect, a panel per unit; on the diagonal both are equal.

    Filled: edits of causes, a marker and line per way of editing. Open: direct edits of genes that only follow a cause,
    whose true effect is 0.

    Parameters
    ----------
    table: ``arm, group, unit, model, true, low, high, n`` (:func:`perturb.track_record.calibration`).
    """
    units, look = list(dict.fromkeys(table["unit"])), THEMES[theme]
    figure = make_subplots(rows=1, cols=max(len(units), 1), horizontal_spacing=0.12)
    traces = [("causes", arm) for arm in dict.fromkeys(table["arm"])] + [("followers", "direct")]
    styles = list(zip(("circle", "square", "diamond", "cross"), ("solid", "dash", "dot", "dashdot"), strict=True))
    for column, unit in enumerate(units, start=1):
        rows = table[(table["unit"] == unit) & table[["model", "true"]].notna().all(axis=1)]
        end = 1.1 * float(rows[["model", "true"]].abs().to_numpy().max(initial=0.0)) or 1.0
        place = {"row": 1, "col": column}
        figure.add_scatter(
            x=[-end, end],
            y=[-end, end],
            mode="lines",
            name="Modelled = true",
            showlegend=column == 1,
            legendgroup="diagonal",
            line={"color": look["muted"], "dash": "dot", "width": 1.5},
            hoverinfo="skip",
            **place,
        )
        for k, (group, arm) in enumerate(traces):
            part = rows[(rows["group"] == group) & (rows["arm"] == arm)].sort_values("model", kind="stable")
            if not len(part):
                continue
            follows = group == "followers"
            symbol, dash = styles[k % len(styles)]
            name = "Genes that only follow, direct" if follows else f"Causes, {arm}"
            figure.add_scatter(
                x=part["model"],
                y=part["true"],
                error_y=_error(part, "true", theme),
                customdata=part[["low", "high", "n"]],
                mode="markers" if follows else "lines+markers",
                name=escape(name),
                legendgroup=name,
                showlegend=column == 1,
                line={"color": look["muted"], "width": 1.5, "dash": dash},
                marker={
                    "size": 9,
                    "color": look["ink"],
                    "symbol": "circle-open" if follows else symbol,
                    "line": {"color": look["ink"], "width": 1.5},
                },
                hovertemplate=f"{escape(name)}<br>modelled %{{x:+.3g}}, true %{{y:+.3g}} {unit}"
                "<br>interval %{customdata[0]:.3g} to %{customdata[1]:.3g}, n = %{customdata[2]}<extra></extra>",
                **place,
            )
        title = "density" if unit == "cells/mm²" else "shares"
        figure.update_xaxes(title_text=f"Modelled change of {title} ({unit})", range=[-end, end], **place)
        figure.update_yaxes(title_text=f"Mean true change ({unit})", range=[-end, end], **place)
    _finish(figure, theme, "Are effects as large as they are said to be?")
    legend = {"orientation": "h", "x": 0.0, "xanchor": "left", "y": -0.2, "yanchor": "top"}
    return figure.update_layout(height=460, legend=legend)
