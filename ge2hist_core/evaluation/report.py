"""The result of ``evaluate`` as Markdown and as one self-contained HTML file: the same sections, tables and sentences.

Reads the JSON alone, whole or in part: a section whose figures are missing is left out. Charts are drawn as SVG, a dot
for the value and a line for its interval.
"""

from __future__ import annotations

import html as escaping
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ge2hist_core.evaluation.contest import FLOOR

__all__ = ["Chart", "Section", "Table", "html", "markdown", "section_markdown", "sections", "summary"]

Figure = Mapping[str, Any]

WEIGHTS = (
    "Inception-v3 and LPIPS need weight files: `--inception weights-inception-2015-12-05-6726825d.pth` "
    "(torch-fidelity) and `--lpips alexnet-owt-7be5be79.pth alex.pth` (torchvision, lpips v0.1)."
)


@dataclass(frozen=True)
class Table:
    """Texts by row under a header of as many columns."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """Dots with lines: ``(label, value, low, high)`` each, on an axis titled with its unit."""

    title: str
    points: Sequence[tuple[str, float | None, float | None, float | None]]


@dataclass(frozen=True)
class Section:
    """A title, paragraphs, tables and charts. ``key``: the part of the JSON that it tells."""

    key: str
    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = field(default=())


# --- numbers ----------------------------------------------------------------------------------------------------------


def number(value: float | None, form: str, factor: float = 1.0) -> str:
    """``value`` in the format ``form``, a dash for a figure without an answer."""
    return "-" if value is None else format(value * factor, form)


def with_interval(figure: Figure, form: str, factor: float = 1.0) -> str:
    """``value [low, high]``, the value alone where there is no interval."""
    text = number(figure.get("value"), form, factor)
    low, high = figure.get("low"), figure.get("high")
    return (
        text if low is None or high is None else f"{text} [{number(low, form, factor)}, {number(high, form, factor)}]"
    )


_COLUMNS = (
    ("density_relative", "density (%)", "+.1f", 100.0),
    ("composition_kl", "composition KL (nats)", ".4f", 1.0),
    ("spacing_um", "nearest neighbour, mean (um)", "+.2f", 1.0),
    ("spacing_var_um2", "nearest neighbour, variance (um2)", "+.2f", 1.0),
)


def _title(result: Figure, name: str) -> str:
    if name == FLOOR:
        return "Floor: real tiles of other cells"
    if name == "real":
        return "Real tile of the cell"
    return str((result.get("methods") or {}).get(name, {}).get("title", name))


# --- sections ---------------------------------------------------------------------------------------------------------


def sections(result: Figure) -> list[Section]:
    """Everything that the result holds, in the order of the paper."""
    builders = (
        _verdicts,
        _methods,
        _table_1,
        _figure_3,
        _old,
        _classifier,
        _separation,
        _central,
        _read_back,
        _effects,
    )
    return [section for section in (build(result) for build in builders) if section is not None]


NO_RIVAL = "No rival was given: `train-rival` trains one, `evaluate --rivals` compares with it."


def _verdicts(result: Figure) -> Section | None:
    found = [v for key in ("table_1", "figure_3") for v in (result.get(key) or {}).get("verdicts", ())]
    if not found:
        told = "methods" in result and not any(m["kind"] == "rival" for m in result["methods"].values())
        return Section("verdicts", "Who wins", [NO_RIVAL]) if told else None
    count = {name: sum(v[name] for v in found) for name in ("nearer", "farther", "undecided")}
    lead = (
        f"In {sum(count.values())} comparisons of GE2Hist with a rival, {len(found)} figures, GE2Hist is nearer to the "
        f"real tiles in {count['nearer']}, farther in {count['farther']}, and not to be told apart in "
        f"{count['undecided']}: a difference counts where its 95 % interval, paired over the same donors and cells, "
        f"excludes 0. It is nearer than every rival in {sum(v['ge2hist_wins'] for v in found)} figures."
    )
    return Section("verdicts", "Who wins", [lead, *_unequal(result), *(f"- {v['sentence']}" for v in found)])


ALIKE = 0.1
"""Budgets that differ by less are called equal."""


def _unequal(result: Figure) -> list[str]:
    """A warning that names the rivals which were trained with another budget than GE2Hist; none where all had one."""
    methods = result.get("methods") or {}
    macs = {name: float((m.get("training") or {}).get("macs") or 0) for name, m in methods.items()}
    own = macs.get("ge2hist", 0.0)
    named = [
        f"{_title(result, name)} with {1e-12 * macs[name]:,.0f}"
        for name, m in methods.items()
        if m["kind"] == "rival" and own and macs[name] and abs(macs[name] / own - 1) > ALIKE
    ]
    if not named:
        return []
    return [
        f"Not equal compute: GE2Hist was trained with {1e-12 * own:,.0f} x 10^12 multiply-accumulates, "
        f"{', '.join(named)}. A rival that was trained for less may be unfinished: look at its pictures before taking "
        "such a comparison for a judgement on the method."
    ]


def _methods(result: Figure) -> Section | None:
    methods = result.get("methods")
    if not methods:
        return None
    rows = []
    for method in methods.values():
        t = method.get("training") or {}
        macs = t.get("macs")
        rows.append(
            [
                method["title"], method["kind"], "yes" if method.get("sees_the_cell") else "no",
                number(t.get("steps"), ",.0f"), number(macs, ",.0f", 1e-12), _time(t),
            ]
        )  # fmt: skip
    header = ["method", "kind", "sees the cell", "training steps", "10^12 multiply-accumulates", "time"]
    return Section("methods", "Methods", (), [Table(header, rows)])


def _time(training: Figure) -> str:
    """CPU hours, or minutes of the GPU that was trained on."""
    device = training.get("device")
    if device in (None, "cpu"):
        cpu = training.get("cpu_seconds")
        return "-" if cpu is None else f"{cpu / 3600:.1f} h of a CPU core"
    return f"{training['seconds'] / 60:.0f} min of one {device}"


def _table_1(result: Figure) -> Section | None:
    figures = (result.get("table_1") or {}).get("figures")
    if not figures:
        return None
    tables, charts = [], []
    for title, methods in figures.items():
        is_kid = title.startswith("KID")
        form = ".4f"
        rows = []
        for name, f in methods.items():
            n = f"{f['n_generated']} / {f['n_real']}" if is_kid else str(f["n"])
            spread = f"{f['subset_sd']:.4f} ({f['subsets']} x {f['subset_size']})" if is_kid else number(f["sd"], form)
            rows.append([_title(result, name), with_interval(f, form), spread, n, str(f["donors"])])
        header = [
            "method", title, "sd over subsets (number x size)" if is_kid else "sd over pictures",
            "n generated / real" if is_kid else "n", "donors",
        ]  # fmt: skip
        tables.append(Table(header, rows))
        charts.append(Chart(title, [(_title(result, k), f["value"], f["low"], f["high"]) for k, f in methods.items()]))
    text = [
        "Smaller is nearer to the real tiles. KID is unbiased and may be negative. Features of reader and "
        "stain-texture are standardised by the real tiles: compare such figures with each other, not with those of "
        "papers.",
        _covers(result),
    ]
    if not any("Inception" in title for title in figures) or not any(title.startswith("LPIPS (") for title in figures):
        text.append(WEIGHTS)
    return Section("table_1", "Table 1: distance to real tiles", text, tables, charts)


def _figure_3(result: Figure) -> Section | None:
    part = result.get("figure_3")
    if not part:
        return None
    lines = {"Floor: real tiles of other cells": part["floor"]}
    lines |= {_title(result, name): c for name, c in part["methods"].items()}
    lines["The reader itself, against true nuclei"] = part["reader"]
    whole = Table(
        ["compared with the real tiles", "n", *(title for _, title, _, _ in _COLUMNS)],
        [[name, str(c["n"]), *(with_interval(c[k], f, x) for k, _, f, x in _COLUMNS)] for name, c in lines.items()],
    )
    by_type = Table(
        ["mean over types of the absolute difference", "types", *(title for _, title, _, _ in _COLUMNS)],
        [
            [name, str(c["by_type"]["types"]),
             *(with_interval({"value": c["by_type"][k], **c["by_type_interval"][k]}, f.lstrip("+"), x)
               for k, _, f, x in _COLUMNS)]
            for name, c in lines.items() if c.get("by_type")
        ],
    )  # fmt: skip
    tables, own = [whole, by_type], part["methods"].get("ge2hist", {})
    if own.get("each_type"):
        rows = [
            [kind, str(c["n"]), *(with_interval(c[k], f, x) for k, _, f, x in _COLUMNS)]
            for kind, c in own["each_type"].items()
        ]
        tables.append(Table(["GE2Hist, type of the central cell", "n", *(title for _, title, _, _ in _COLUMNS)], rows))
    classes = list(own.get("class_density", {}))
    if classes:
        rows = [
            [name, number(own["class_density"][name]["real"], ",.0f"),
             *(with_interval(c["class_density"][name], "+,.0f") for c in lines.values())]
            for name in classes
        ]  # fmt: skip
        tables.append(Table(["class, difference in cells per mm2", "real", *lines], rows))
    charts = [Chart(f"{title}, absolute, mean over types", _by_type_points(lines, k, x)) for k, title, _, x in _COLUMNS]
    text = ["Zero is perfect. Density is that of generated tiles over that of real ones, less 1.", _covers(result)]
    return Section("figure_3", "Figure 3: cells in the niche", text, [t for t in tables if t.rows], charts)


def _by_type_points(
    lines: Mapping[str, Figure], key: str, factor: float
) -> list[tuple[str, float | None, float | None, float | None]]:
    points = []
    for name, c in lines.items():
        if c.get("by_type"):
            ends = c["by_type_interval"][key]
            values = (c["by_type"][key], ends["low"], ends["high"])
            points.append((name, _times(values[0], factor), _times(values[1], factor), _times(values[2], factor)))
    return points


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _old(result: Figure) -> Section | None:
    """Comparisons that are not among the methods: the ceiling, and all steps."""
    names = {
        "ceiling_conditions_exchanged": "Ceiling: GE2Hist's pictures exchanged between cells",
        **{key: key for key in result.get("steps", {})},
    }
    rows = []
    for key, name in names.items():
        c = result.get(key) or result.get("steps", {}).get(key)
        if c:
            figures = [with_interval(c.get(k, {}), f, x) for k, _, f, x in _COLUMNS]
            by_type = c.get("by_type", {})
            rows.append(
                [name, str(c["n"]), *figures, *(number(by_type.get(k), f.lstrip("+"), x) for k, _, f, x in _COLUMNS)]
            )
    if not rows:
        return None
    header = ["compared", "n", *(t for _, t, _, _ in _COLUMNS), *(f"by type: {t}" for _, t, _, _ in _COLUMNS)]
    return Section(
        "steps", "Exchanged conditions, and all steps of the diffusion", [_covers(result)], [Table(header, rows)]
    )


def _classifier(result: Figure) -> Section | None:
    c = result.get("classifier")
    if not c or "wilson" not in c:
        return None
    over = (
        f"{number(c['low'], '.4f')} to {number(c['high'], '.4f')} over {c['donors']} donors and their cells"
        if c["low"] is not None
        else "none over donors, there is one"
    )
    text = (
        f"The type is read from z_c for {c['accuracy']:.4f} of {c['n']:,} held-out cells. 95 % interval: {over}; "
        f"{c['wilson']['low']:.4f} to {c['wilson']['high']:.4f} if cells were independent (Wilson)."
    )
    rows = [
        [
            k,
            f"{v:.4f} [{c['recall_wilson'][k]['low']:.4f}, {c['recall_wilson'][k]['high']:.4f}]",
            f"{c['recall_n'][k]:,}",
        ]
        for k, v in c["recall"].items()
    ]
    return Section("classifier", "Classifier on z_c", [text], [Table(["type", "recall [Wilson]", "n"], rows)])


def _separation(result: Figure) -> Section | None:
    s = result.get("separation")
    if not s:
        return None
    text = (
        f"Linear probes fitted on {s['n_training']:,} cells of training donors, judged on {s['n']:,} cells of "
        f"{s['donors']} held-out donors. z_c should give the type and z_e the niche; a z_e that gives the type well "
        f"above chance ({s['chance']:.2f}) is not separated. Niche: root counts of neighbours of each type in the tile."
    )
    parts = {"z_c": "z_c", "z_e": "z_e", "both": "both"}
    rows = [
        ["type, balanced accuracy", *(with_interval(s[p]["type_accuracy"], ".3f") for p in parts)],
        ["niche, mean R2", *(with_interval(s[p]["niche_r2"], ".3f") for p in parts)],
        *(
            [f"R2 of {name}", *(number(s[p]["niche_r2_each"][name], ".2f") for p in parts)]
            for name in s["z_c"]["niche_r2_each"]
        ),
    ]
    return Section(
        "separation", "Separation of type and environment", [text, _covers(result)], [Table(["", *parts], rows)]
    )


def _central(result: Figure) -> Section | None:
    c = result.get("central_types")
    if not c:
        return None
    text = (
        f"Each type's z_c is drawn from its mixture component in the same {c['environments']} environments (z_e of "
        f"held-out cells of {c['donors']} donors) with the same noise. Counted: pictures whose nucleus nearest to the "
        f"middle (within {c['radius_um']:g} um) is read as that type's class. Chance: the same class in the pictures "
        f"drawn for types of other classes. Raised with an interval above 0: {c['raised_types']} of "
        f"{len(c['types'])} types. Mean share {c['mean_share']:.1%}, by chance {c['mean_chance']:.1%}; no nucleus in "
        f"the middle of {c['no_nucleus']:.1%} of all pictures."
    )
    rows, points = [], []
    for kind, r in c["types"].items():
        real = "-" if r["real"] is None else f"{r['real']:.1%} ({r['n_real']})"
        rows.append(
            [kind, r["class"], str(r["n"]), with_interval(r["share"], ".1f", 100), number(r["chance"], ".1f", 100),
             with_interval(r["raised"], "+.1f", 100), real]
        )  # fmt: skip
        points.append((kind, *(_times(r["raised"][end], 100) for end in ("value", "low", "high"))))
    header = ["type drawn", "class read", "n", "share (%)", "chance (%)", "raised by (points)", "real tiles (n)"]
    classes = list(next(iter(c["shares"].values())))
    shares = Table(
        ["type drawn \\ class in the middle (%)", *classes],
        [[kind, *(number(row[name], ".0f", 100) for name in classes)] for kind, row in c["shares"].items()],
    )
    title = "Figure 4: a type drawn in the middle"
    return Section("central_types", title, [text, _covers(result)], [Table(header, rows), shares], [
        Chart("share above chance (percentage points)", points)
    ])  # fmt: skip


def _read_back(result: Figure) -> Section | None:
    r = result.get("read_back")
    if not r:
        return None
    text = (
        f"Ridge regression from features of the picture to {r['components']} principal components of expression "
        f"({r['variance_in_components']:.0%} of its variance), fitted on {r['n_training']:,} real tiles of training "
        "donors, applied to pictures of held-out cells. R2 below 0: worse than the mean of the cells."
    )
    rows = [
        [_title(result, name), str(m["n"]), with_interval(m["r2"], ".3f"),
         with_interval(m["share_of_real"], ".0f", 100), with_interval(m["correlation"], ".2f")]
        for name, m in r["methods"].items()
    ]  # fmt: skip
    points = [
        (row[0], *(m["correlation"][e] for e in ("value", "low", "high")))
        for row, m in zip(rows, r["methods"].values(), strict=True)
    ]
    header = ["picture", "n", "R2 of expression", "share of the real tile's (%)", "correlation"]
    title = "Read-back: expression recovered from the picture"
    return Section("read_back", title, [text, _covers(result)], [Table(header, rows)], [Chart("correlation", points)])


def _effects(result: Figure) -> Section | None:
    effects = result.get("driver_programmes")
    if not effects:
        return None
    text = (
        f"All drivers of a programme knocked out or multiplied by 4 ({effects['n_cells']} cells); the truth is counted "
        "in the tissue simulated again. The readout is the one whose true change is largest against the standard "
        f"error between tiles. Sign right: {effects['signs_right']} of {effects['edits_exceeding_noise']} edits whose "
        f"true change exceeds two standard errors ({effects['clear_signs_right']} of {effects['clear_readouts']} of "
        "all such readouts)."
    )
    rows = []
    for e in effects["edits"]:
        unit = " cells/mm2" if e["main_readout"] == "density" else ""
        form = "+.0f" if unit else "+.3f"
        rows.append(
            [e["programme"].replace("_", " "), e["direction"], e["main_readout"],
             f"{number(e['true'], form)}{unit}", f"{number(e['model'], form)}{unit}"]
        )  # fmt: skip
    header = ["programme", "direction", "readout", "true change", "model's change"]
    return Section("driver_programmes", "Edits of driver programmes against the truth", [text], [Table(header, rows)])


def _covers(result: Figure) -> str:
    """What the intervals run over, and what they leave out."""
    one = len(result.get("donors", ())) == 1
    over = "the cells of the one held-out donor" if one else "donors and, within each, its cells"
    choice, other = ("cells", "other donors or ") if one else ("held-out donors and cells", "")
    return (
        f"Intervals are 95 % and run over {over}: what another choice of {choice} would change. They do not cover "
        f"{other}another training of any method."
    )


def _about(result: Figure) -> list[str]:
    sample, tissue = result["sample"], "simulated, known-truth" if result.get("simulated") else "measured"
    tiles = result.get("counts", {}).get("tiles") or result["generated_vs_real"]["n"]
    return [
        f"{tiles} cells of {len(result.get('donors', ()))} donors that the bundle has not learned from "
        f"({tissue} tissue), one picture each. GE2Hist: {sample['solver']}, {sample['steps']} steps, guidance "
        f"{sample['guidance']:g}. Seed {result['seed']}. Bundle {result['bundle_sha256'][:12]}, "
        f"store {result['store'][:12]}."
    ]


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(result: Figure) -> str:
    """The whole result."""
    parts = ["# Evaluation", *_about(result), *(section_markdown(section) for section in sections(result))]
    return "\n\n".join(parts) + "\n"


def section_markdown(section: Section) -> str:
    """One section under a heading of the second level."""
    parts = [f"## {section.title}"]
    if section.text:
        joined = "\n".join(_spaced(section.text))
        parts.append(joined)
    for table in section.tables:
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        parts.append("\n".join(f"| {' | '.join(_cell(c) for c in line)} |" for line in lines))
    return "\n\n".join(parts)


def _spaced(text: Sequence[str]) -> list[str]:
    """Paragraphs with a blank line between them, items of one list without."""
    out: list[str] = []
    for i, line in enumerate(text):
        if i and not (line.startswith("- ") and text[i - 1].startswith("- ")):
            out.append("")
        out.append(line)
    return out


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- HTML -------------------------------------------------------------------------------------------------------------

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2330;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{font-size:1.25rem;margin-top:2.2rem}p{max-width:80ch}
.scroll{overflow-x:auto}table{border-collapse:collapse;margin:.8rem 0;font-size:13px}
th,td{padding:.3rem .6rem;border-bottom:1px solid #d8dde6;text-align:left;vertical-align:top}
td{font-variant-numeric:tabular-nums}th{background:#f3f5f9}svg{max-width:100%;height:auto;margin:.4rem 0}
"""


def html(result: Figure) -> str:
    """The whole result as one file: no script, nothing from elsewhere."""
    body = ["<h1>Evaluation</h1>", *(f"<p>{_e(line)}</p>" for line in _about(result))]
    for section in sections(result):
        body.append(f"<h2>{_e(section.title)}</h2>")
        body += _paragraphs(section.text)
        body += [_svg(chart) for chart in section.charts]
        for table in section.tables:
            head = "".join(f"<th>{_e(cell)}</th>" for cell in table.header)
            lines = "".join("<tr>" + "".join(f"<td>{_e(c)}</td>" for c in row) + "</tr>" for row in table.rows)
            body.append(
                f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
            )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>GE2Hist evaluation</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _e(text: str) -> str:
    return escaping.escape(text.replace("`", ""))


def _paragraphs(text: Sequence[str]) -> list[str]:
    items = [line for line in text if line.startswith("- ")]
    out = [f"<p>{_e(line)}</p>" for line in text if not line.startswith("- ")]
    return out + (["<ul>" + "".join(f"<li>{_e(line[2:])}</li>" for line in items) + "</ul>"] if items else [])


_WIDTH, _LEFT, _RIGHT, _ROW = 760, 300, 30, 24


def _svg(chart: Chart) -> str:
    """Dots and intervals over a common axis, with a line at 0 where the axis holds it."""
    points = [p for p in chart.points if p[1] is not None]
    if not points:
        return ""
    ends = [v for p in points for v in p[1:] if v is not None] + [0.0]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0
    low, high = low - 0.04 * span, high + 0.04 * span

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    height = 44 + _ROW * len(points)
    parts = [f'<text x="0" y="16" font-weight="600">{_e(chart.title)}</text>']
    bottom = height - 20
    parts.append(
        f'<line x1="{x(0):.1f}" y1="26" x2="{x(0):.1f}" y2="{bottom}" stroke="#9aa5b8" stroke-dasharray="3 3"/>'
    )
    for i, (label, value, start, end) in enumerate(points):
        assert value is not None
        y = 38 + _ROW * i
        text = f"{value:.4g}" + ("" if start is None or end is None else f" [{start:.4g}, {end:.4g}]")
        own = label == "GE2Hist"
        colour = "#b4235a" if own else "#33507d"
        parts.append(
            f'<text x="0" y="{y + 4}"{" font-weight=" + chr(34) + "600" + chr(34) if own else ""}>{_e(label)}</text>'
        )
        if start is not None and end is not None:
            parts.append(
                f'<line x1="{x(start):.1f}" y1="{y}" x2="{x(end):.1f}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
            )
        parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="4" fill="{colour}"><title>{_e(text)}</title></circle>')
    for value in (min(ends), max(ends)):
        parts.append(
            f'<text x="{x(value):.1f}" y="{height - 4}" text-anchor="middle" fill="#5b6678">{value:.3g}</text>'
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" font-size="12" role="img" '
        f'aria-label="{escaping.escape(chart.title, quote=True)}">{"".join(parts)}</svg>'
    )


# --- the terminal -----------------------------------------------------------------------------------------------------


def summary(result: Figure) -> str:
    """The main figures as lines of text."""
    lines = [f"classifier accuracy {result['classifier']['accuracy']:.4f} (n = {result['classifier']['n']} cells)"]
    for key in ("generated_vs_real", "floor_real_vs_real", "ceiling_conditions_exchanged", "reader_vs_truth_on_real"):
        lines.append(f"{key}: {_line(result[key])}")
    for key, value in result.get("steps", {}).items():
        lines.append(f"{key}: {_line(value)}")
    for title, methods in (result.get("table_1") or {}).get("figures", {}).items():
        texts = (f"{_title(result, name)} {with_interval(f, '.4f')}" for name, f in methods.items())
        lines.append(f"{title}: {'; '.join(texts)}")
    for key in ("table_1", "figure_3"):
        lines += [v["sentence"] for v in (result.get(key) or {}).get("verdicts", ())]
    c = result.get("central_types")
    if c:
        lines.append(f"a drawn type is raised in the middle for {c['raised_types']} of {len(c['types'])} types")
    for name, m in (result.get("read_back") or {}).get("methods", {}).items():
        lines.append(f"read-back, {_title(result, name)}: R2 {with_interval(m['r2'], '.3f')} (n = {m['n']})")
    if "driver_programmes" in result:
        d = result["driver_programmes"]
        lines.append(f"driver programmes: sign right for {d['signs_right']} of {d['edits_exceeding_noise']}")
    return "\n".join(lines)


def _line(c: Figure) -> str:
    by_type = c.get("by_type", {})
    tail = (
        f"; by type |density| {number(by_type['density_relative'], '.1%')}, KL {by_type['composition_kl']:.3f}, "
        f"|spacing| {number(by_type['spacing_um'], '.2f')} um"
        if by_type
        else ""
    )
    r = number(c["density_r"], ".2f")
    if c["composition_kl"]["value"] is None:
        return f"n = {c['n']}: r {r}{tail}"
    density, kl, spacing = (c[key]["value"] for key in ("density_relative", "composition_kl", "spacing_um"))
    low, high = (number(c["density_relative"][end], "+.1%") for end in ("low", "high"))
    return (
        f"n = {c['n']}: density {number(density, '+.1%')} [{low}, {high}], composition KL {kl:.4f} nats, "
        f"spacing {number(spacing, '+.2f')} um, r {r}{tail}"
    )
