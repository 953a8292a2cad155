"""Evidence in words and tables: what each part asked, what came out, over how many, and what its interval covers.

Plain text and plain tables. Whoever shows them escapes them; pages, reports and the command line say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturb.charts import readable
from perturb.wording import NOTICE

if TYPE_CHECKING:
    from perturb.evidence import Evidence, Part
    from perturb.verdict import Verdict

__all__ = [
    "COVERS",
    "TITLES",
    "amount",
    "csv_table",
    "json_value",
    "method",
    "name_of",
    "sections",
    "sentences",
    "shown_tables",
    "span",
]

TITLES = {
    "precision": "How precise is the effect, and what would more seeds add?",
    "baselines": "Does the model tell more than trivial rules?",
    "reader": "What do the errors of the nuclei reader change?",
    "natural": "What do real cells show?",
    "technical": "Does the edit move the cell further than encoding it again does?",
    "gates": "Is the edited cell still inside the data?",
    "matched": "Is the gene special, as far as the niche network can guess?",
    "attribution": "On which genes does the density hang?",
    "route": "Did it act through the cell's identity or through its environment?",
    "technical_drawn": "Do the pictures change by more than encoding the cell again changes them?",
    "matched_drawn": "Is the gene special in what is drawn?",
}

COVERS = {
    "precision": "The interval covers the noise of drawing and, with several cells, their choice; no donors.",
    "baselines": "Intervals of the skill run over donors; of the model's effect over noise seeds and cells.",
    "reader": "The interval covers noise seeds and cells, and the reader's measured errors; no donors.",
    "natural": "Observational and confounded: intervals run over donors (pairs, where fewer than two are known).",
    "technical": "Compared with the same unedited cell under other tie-breaking; nothing here speaks of other cells.",
    "gates": "A p-value ranks the cell among cells of held-out donors; small means unlike them.",
    "matched": "p ranks the edit among random genes alike in expression; q is adjusted over the readouts with a light.",
    "attribution": "Intervals cover noise seeds. A slope says what a small change would do, not a knock-out.",
    "route": "Intervals cover noise seeds and cells; the two parts add up to the total.",
    "technical_drawn": "Same noise in all arms, so that the cloud is that of the encoder alone.",
    "matched_drawn": "p ranks the edit among random genes alike in expression, all drawn with the same noise.",
}
"""What the numbers of a part cover, one sentence each."""

LABELS = {"density": "Density", "spacing": "Distance to the nearest nucleus"}
TOP_GENES = 20
MANY_SEEDS = 4096
"""More seeds than this are no advice."""

Row = Mapping[str, Any]


def name_of(readout: str) -> str:
    """A readout as the beginning of a sentence."""
    return LABELS.get(readout, readable(readout))


def amount(readout: str, value: float, signed: bool = True) -> str:
    """A value in the readout's unit; shares in percentage points.

    Examples
    --------
    >>> amount("density", 120.0), amount("fraction:Fibroblast", -0.031), amount("spacing", 0.42, signed=False)
    ('+120 per mm²', '-3.1 percentage points', '0.42 µm')
    """
    kind = readout.partition(":")[0]
    scale, form, unit = {
        "density": (1.0, ",.0f", " per mm²"),
        "fraction": (100.0, ".1f", " percentage points"),
        "spacing": (1.0, ".2f", " µm"),
    }.get(kind, (1.0, ".2f", " µm²"))
    text = format(value * scale, ("+" if signed else "") + form)
    return f"{text if text.strip('+-0.') else '0'}{unit}"


def span(readout: str, low: float, high: float) -> str:
    """An interval in the readout's unit, for brackets behind :func:`amount`."""
    ends = (amount(readout, end).split(" ", 1)[0] for end in (low, high))
    return " to ".join(ends)


def sections(evidence: Evidence) -> Iterator[tuple[str, str, list[str], list[tuple[pd.DataFrame, str]]]]:
    """Part, title, sentences, and tables with captions, of every part that was made."""
    for name, part in evidence.parts.items():
        yield name, TITLES[name], sentences(part, evidence), list(shown_tables(part))


def sentences(part: Part, evidence: Evidence) -> list[str]:
    """What a part says, for the readouts that get a light."""
    return [*SAYERS[part.name](part, evidence), COVERS[part.name]]


def _headline(part: Part, table: str, evidence: Evidence) -> Iterator[Row]:
    rows = part.tables[table].set_index("readout", drop=False)
    for name in evidence.headline:
        if name in rows.index:
            yield rows.loc[name].to_dict()


# --- sentences of each part ------------------------------------------------------------------------------------------


def _precision(part: Part, evidence: Evidence) -> Iterator[str]:
    for row in _headline(part, "precision", evidence):
        name = name_of(row["readout"])
        if not np.isfinite(row["half_width"]):
            yield f"{name}: no interval from {row['n']} pairs of pictures."
            continue
        said = f"{name}: {amount(row['readout'], row['effect'])}, give or take "
        said += f"{amount(row['readout'], row['half_width'], signed=False)} (n = {row['n']} pairs of pictures)"
        said += f". {_more(row['seeds_to_halve'], 'halve the interval', part)}"
        if row["low"] <= 0 <= row["high"] and row["effect"]:
            goal = "tell the difference from 0, if it stays as it is"
            said += f" {_more(row['seeds_to_exclude_0'], goal, part)}"
        yield said.strip()
    gains = [row["pairing_gain"] for row in _headline(part, "precision", evidence)]
    gain = float(np.median(np.array(gains)[np.isfinite(gains)])) if np.isfinite(gains).any() else float("nan")
    if gain > 0:
        yield (
            f"Giving both arms the same noise removes {100 * gain:.0f} % of the variance of such an effect (median "
            "over these readouts)."
        )
    elif gain <= 0:
        yield "Giving both arms the same noise does not lower the variance of these effects."


def _more(seeds: float, goal: str, part: Part) -> str:
    """How many more seeds for a goal; NaN is "no number", or not to be said from one seed, or the goal has no size."""
    if not np.isfinite(seeds):
        if part.facts["cells"] == 1:
            return ""
        if part.facts["seeds"] == 1:
            return f"From one noise seed it cannot be said how many more would {goal}: compare over several."
        return f"No number of seeds would {goal}: the cells differ, take more cells."
    if seeds > MANY_SEEDS:
        return f"More than {MANY_SEEDS:,} further seeds would be needed to {goal}."
    return f"{seeds:,.0f} more seed{'s' * (seeds != 1)} would {goal}."


def _baselines(part: Part, evidence: Evidence) -> Iterator[str]:
    for row in _headline(part, "effects", evidence):
        others = ", ".join(
            f"{name} {amount(row['readout'], row[name])}" for name in ("class mean", "nearest cells", "ridge")
        )
        yield f"{name_of(row['readout'])}: the model draws {amount(row['readout'], row['model'])}; {others}."
    if not len(part.tables["skill"]):
        yield "How much the pictures tell beyond these rules was not measured for this bundle."
    for row in _headline(part, "skill", evidence):
        yield (
            f"{name_of(row['readout'])}: skill {row['skill']:.2f} ({row['low']:.2f} to {row['high']:.2f}, {row['n']} "
            f'real tiles of {row["donors"]} donors) against the best rule, "{row["best"]}"; 1 is perfect, 0 no better.'
        )
    yield from part.facts["doubts"]


def _reader(part: Part, evidence: Evidence) -> Iterator[str]:
    for row in _headline(part, "corrected", evidence):
        said = f"{name_of(row['readout'])}: as found {amount(row['readout'], row['found'])}, corrected "
        said += amount(row["readout"], row["effect"])
        if np.isfinite(row["low"]):
            said += f" ({span(row['readout'], row['low'], row['high'])}, n = {row['n']})"
        share = row["reader_share"]
        yield said + (f"; {100 * share:.0f} % of the variance is the reader's." if np.isfinite(share) else ".")
    yield f"The reader's errors were measured on {part.facts['nuclei']:,} nuclei. Spacing is not corrected."


def _natural(part: Part, evidence: Evidence) -> Iterator[str]:
    facts = part.facts
    yield (
        f"{facts['pairs']} pairs of real {facts['cell_type']} cells, alike in the other genes, differ in "
        f"{facts['gene']} ({facts['rule']}). What their niches differ by is {facts['label']}: it is a "
        "second opinion, no test of cause."
    )
    for row in _headline(part, "beside", evidence):
        if not np.isfinite(row["natural"]):
            yield f"{name_of(row['readout'])}: the niches of these real cells give no value."
            continue
        natural = f"{amount(row['readout'], row['natural'])} "
        natural += f"({span(row['readout'], row['natural_low'], row['natural_high'])}, n = {row['n']:.0f} pairs)"
        verdict = {True: "the same way", False: "the other way"}.get(row["agree"], "not decided")
        yield (
            f"{name_of(row['readout'])}, in the direction of the edit: real cells {natural}, the model "
            f"{amount(row['readout'], row['model'])}: {verdict}."
        )
    yield from facts["warnings"]


def _technical(part: Part, evidence: Evidence) -> Iterator[str]:
    states = part.tables["states"].set_index(["cell_id", "space"])
    cells = list(dict.fromkeys(part.tables["states"]["cell_id"]))
    for cell in cells[:3]:
        row = states.loc[(cell, "embedding")]
        who = f"Cell {cell}: the edit" if len(cells) > 1 else "The edit"
        if row["point"]:
            yield (
                f"{who} moves the cell's embedding by {row['distance']:.3g}; the encoder breaks no ties in this cell, "
                "so that encoding it again changes nothing."
            )
            continue
        size = row["distance"] / row["cloud"]
        less = "less than encoding the unedited cell again does" if size < 1 else "more than that"
        yield (
            f"{who} moves the cell's embedding by {row['distance']:.3g}. Breaking the ties between equal counts anew, "
            f"with nothing edited, moves it by {row['cloud']:.3g} (root mean square of {row['n']:.0f} encodings). The "
            f"edit is {size:.2g} of the encoder's own noise, {less} (p = {row['p']:.2g})."
        )
        halves = [states.loc[(cell, name)] for name in ("z_c", "z_e")]
        yield (
            f"In the cell's identity z_c it is {_ratio(halves[0])} of that noise, in its environment z_e "
            f"{_ratio(halves[1])}."
        )
    if len(cells) > 3:
        yield f"The other {len(cells) - 3} cells are in the table."
    yield (
        "Both arms of the comparison break their ties alike, so that this noise is not in the paired difference; a "
        "single knock-out usually stays well inside it all the same."
    )


def _ratio(row: Row) -> str:
    if row["point"]:
        return "no part"
    return f"{row['distance'] / row['cloud']:.2g} (p = {row['p']:.2g})"


def _gates(part: Part, evidence: Evidence) -> Iterator[str]:
    table = part.tables["gates"]
    for arm, when in (("base", "before"), ("edited", "after")):
        rows = table[table["arm"] == arm]
        known = rows[rows["inside"].notna()]
        outside = int((~known["inside"].astype(bool)).sum())
        if not len(known):
            yield f"Whether the cell is inside the data {when} the edit is not known: this bundle has no gates."
        elif len(rows) == 1:
            row = rows.iloc[0]
            answered = ", ".join(
                f"{name} {row[name]:.2g}" for name in ("expression", "embedding", "latent", "picture")
                if np.isfinite(row[name])
            )  # fmt: skip
            yield (
                f"{when.capitalize()} the edit the cell lies {'outside' if outside else 'inside'} the data: p = "
                f"{row['p']:.2g} over all gates ({answered})."
            )
        else:
            yield f"{when.capitalize()} the edit {outside} of {len(known)} cells lie outside the data."
    if not part.facts["fitted"]:
        yield "Only the nearest training cell was asked: this bundle has no gates (`python -m ge2hist_core gates`)."
    nearest = part.facts["nearest"]
    if nearest is None:
        return
    if nearest["share"] == 0:
        yield f"Not even the weakest form of this edit keeps cell {nearest['cell_id']} inside."
    elif nearest["share"] < 1:
        yield (
            f"The nearest supported edit of cell {nearest['cell_id']} is {nearest['edit']}, "
            f"{100 * nearest['share']:.0f} % of the asked strength (p = {nearest['p']:.2g})."
        )
    else:
        yield "Its expression and state are inside at full strength; it is the pictures that are unlike real tiles."


def _matched(part: Part, evidence: Evidence) -> Iterator[str]:
    facts, drawn = part.facts, part.name == "matched_drawn"
    seeds = f"drawn with {facts['seeds']} noise seed{'s' * (facts['seeds'] != 1)}"
    how = seeds if drawn else "guessed by the niche network"
    like = (
        "expression, detection and number of targets"
        if "targets" in part.tables["genes"]
        else "expression and detection"
    )
    yield f"{facts['edits']} like edits of random genes of like {like}, {how}."
    for row in _headline(part, "readouts", evidence):
        kind = row["readout"]
        adjusted = "" if drawn or not np.isfinite(row["q"]) else f", q = {row['q']:.2g}"
        yield (
            f"{name_of(kind)}: {amount(kind, row['effect'])}; 95 % of the random genes "
            f"{span(kind, row['null_low'], row['null_high'])} (p = {row['p']:.2g}{adjusted}, n = "
            f"{row['n']})."
        )
    yield (
        f"The smallest p that {facts['edits']} random edits can give is {1 / (facts['edits'] + 1):.2g}."
        + " It is not adjusted over the readouts." * drawn
    )


def _attribution(part: Part, evidence: Evidence) -> Iterator[str]:
    genes, facts = part.tables["genes"], part.facts
    steep = ", ".join(f"{row.gene} ({row.gradient:+.3g})" for row in genes.head(5).itertuples())
    yield (
        f"Cell {facts['cell_id']}: the density of its pictures hangs most on {steep}, in cells/mm² per expression bin "
        f"of the encoder, of {len(genes)} genes that it sees. The attribution passed its {len(part.tables['checks'])} "
        "checks."
    )
    for gene, rank in list(facts["ranks"].items())[:5]:
        if rank is None:
            yield f"The encoder does not see {gene} in the unedited cell: it has no slope."
        else:
            yield f"The edited gene {gene} is number {rank} of {len(genes)} by the size of its slope."
    yield from facts["warnings"]


def _route(part: Part, evidence: Evidence) -> Iterator[str]:
    effects = part.tables["effects"].set_index(["readout", "part"])
    shares = part.tables["shares"].set_index("readout")
    for readout in (name for name in evidence.headline if name in shares.index):
        own = {name: effects.loc[(readout, name)] for name in ("identity", "environment")}
        parts = ", ".join(
            f"{name} {amount(readout, row['effect'])} ({span(readout, row['low'], row['high'])})"
            for name, row in own.items()
        )
        share = shares.at[readout, "identity"]
        whole = (
            f"{100 * share:.0f} % of the change came through identity, {100 * (1 - share):.0f} % through environment"
            if np.isfinite(share)
            else "the whole change is not told apart from 0, so that no shares are given"
        )
        yield f"{name_of(readout)}: through {parts}; {whole} (n = {own['identity']['n']:.0f} pictures)."
    yield (
        f"The edit moves the identity z_c by {part.facts['moved_z_c']:.3g} and the environment z_e by "
        f"{part.facts['moved_z_e']:.3g}. A mixture of an edited and an unedited half is a state that no real cell "
        "need have."
    )


def _technical_drawn(part: Part, evidence: Evidence) -> Iterator[str]:
    facts = part.facts
    yield (
        f"The unedited cell was encoded {facts['draws']} times with other tie-breaking and drawn with the same "
        f"{facts['seeds']} noise seed{'s' * (facts['seeds'] != 1)}."
    )
    for row in _headline(part, "readouts", evidence):
        kind = row["readout"]
        if not np.isfinite(row["p"]):
            yield f"{name_of(kind)}: not defined in these pictures."
            continue
        yield (
            f"{name_of(kind)}: the edit {amount(kind, row['effect'])}, encoding again "
            f"{amount(kind, row['cloud'], signed=False)} (root mean square), p = {row['p']:.2g} (n = {row['n']})."
        )


SAYERS: dict[str, Callable[[Part, Evidence], Iterator[str]]] = {
    "precision": _precision,
    "baselines": _baselines,
    "reader": _reader,
    "natural": _natural,
    "technical": _technical,
    "gates": _gates,
    "matched": _matched,
    "attribution": _attribution,
    "route": _route,
    "technical_drawn": _technical_drawn,
    "matched_drawn": _matched,
}

# --- tables ----------------------------------------------------------------------------------------------------------

SHOWN = {
    "precision": {"precision": "Effects, and seeds beyond those drawn"},
    "baselines": {"effects": "The model's effect beside that of trivial rules", "skill": "Skill on real tiles"},
    "reader": {"corrected": "Effects corrected for the reader's errors"},
    "natural": {"beside": "Real cells beside the model, in the direction of the edit"},
    "technical": {"states": "How far the edit moves the state, and encoding again (cloud)"},
    "gates": {"gates": "p-values of each gate, and of all together"},
    "matched": {"readouts": "The edit among random genes, guessed"},
    "attribution": {"genes": "The steepest genes", "checks": "Checks that it passed"},
    "route": {"effects": "The effect taken apart"},
    "technical_drawn": {"readouts": "The edit beside encoding again (cloud)"},
    "matched_drawn": {"readouts": "The edit among random genes, drawn"},
}
"""Tables of each part that pages and reports show, with captions; evidence.json has all."""

NAMES = {
    "null_low": "random, 2.5 %", "null_high": "random, 97.5 %", "seeds_to_halve": "more seeds to halve it",
    "seeds_to_exclude_0": "more seeds to exclude 0", "pairing_gain": "variance removed by pairing",
    "half_width": "half width", "found": "as found", "reader_share": "reader's share of variance",
    "cloud": "encoding again", "distance": "edit", "ratio": "edit / again", "q": "q, headline",
}  # fmt: skip
_OF_READOUT = (
    "base", "edited", "effect", "low", "high", "half_width", "model", "no change", "class mean", "nearest cells",
    "ridge", "found", "natural", "natural_low", "natural_high", "model_low", "model_high", "cloud", "null_low",
    "null_high", "rmse model", "rmse no change", "rmse class mean", "rmse nearest cells", "rmse ridge",
)  # fmt: skip
"""Columns in the readout's unit."""
_LEFT_OUT = ("q_all", "point", "profile", "range", "z_c", "z_e")
_SKILL = ("low", "high")
_KEYS = ("cell_id", "arm", "readout", "part", "space", "gene", "check", "covariate")
"""Columns that name a row."""
_MAIN = ("effect", "model", "natural", "skill", "distance", "gradient")
"""The quantity that a table's interval and p belong to."""


def shown_tables(part: Part) -> Iterator[tuple[pd.DataFrame, str]]:
    """Tables for people: readable readouts, shares in percent, intervals in one column."""
    for name, caption in SHOWN[part.name].items():
        table = part.tables[name]
        if not len(table):
            continue
        if (part.name, name) == ("attribution", "genes"):
            table = table.head(TOP_GENES)
        table = table.drop(columns=[column for column in _LEFT_OUT if column in table]).copy()
        if "readout" in table:
            dimensionless = _SKILL if name == "skill" else ()
            scaled = [column for column in _OF_READOUT if column in table and column not in dimensionless]
            share = table["readout"].str.startswith("fraction:").to_numpy(dtype=bool)
            table[scaled] = table[scaled].astype(np.float64)
            table.loc[share, scaled] *= 100.0
            if "unit" in table:
                table.loc[share, "unit"] = "%"
            table["readout"] = [readable(one) for one in table["readout"]]
        for low in [column for column in table if column in ("low", "natural_low", "model_low")]:
            table = _one_column(table, low)
        if "inside" in table:
            table["inside"] = [{True: "yes", False: "no"}.get(one, "unknown") for one in table["inside"]]
        if "agree" in table:
            table["agree"] = [{True: "yes", False: "no"}.get(one, "undecided") for one in table["agree"]]
        yield table.rename(columns=NAMES), caption


def _one_column(table: pd.DataFrame, low: str) -> pd.DataFrame:
    high = low.replace("low", "high")
    text = [
        f"{a:.3g} to {b:.3g}" if np.isfinite(a) and np.isfinite(b) else "undefined"
        for a, b in zip(table[low], table[high], strict=True)
    ]
    name = f"{low.removesuffix('low').replace('_', ' ')}95 % interval"
    table = table.copy()
    table.insert(table.columns.get_loc(low), name, text)
    return table.drop(columns=[low, high])


# --- files -----------------------------------------------------------------------------------------------------------


def csv_table(evidence: Evidence) -> pd.DataFrame:
    """Every number of every part, one a line.

    Returns
    -------
    ``part, table, row, quantity, value, text, unit, low, high, p, q, n, covers``: ``row`` names what the line is about;
    ``value`` is empty where the quantity is a word, which stands in ``text`` then; ``unit`` is that of the readout for
    numbers in it, else empty.
    """
    lines = []
    for name, part in evidence.parts.items():
        for title, table in part.tables.items():
            keys = [key for key in _KEYS if key in table]
            main = next((key for key in _MAIN if key in table), None)
            beside = [key for key in ("low", "high", "p", "q", "n") if key in table] if main is not None else []
            for row in table.to_dict("records"):
                for quantity in (key for key in row if key not in (*keys, *beside, "unit")):
                    shared = {key: row[key] for key in beside if quantity == main or key == "n"}
                    value, unit = row[quantity], ""
                    if quantity in _OF_READOUT or quantity == "difference":
                        unit = str(row.get("unit", ""))
                    word = isinstance(value, str | bool) or value is None
                    lines.append(
                        {
                            "part": name, "table": title, "row": ", ".join(str(row[key]) for key in keys),
                            "quantity": quantity, "value": np.nan if word else float(value),
                            "text": str(value) if word else "", "unit": unit, **shared, "covers": COVERS[name],
                        }
                    )  # fmt: skip
    columns = ["part", "table", "row", "quantity", "value", "text", "unit", "low", "high", "p", "q", "n", "covers"]
    return pd.DataFrame(lines, columns=columns)


def json_value(evidence: Evidence, verdicts: list[Verdict]) -> dict[str, Any]:
    """All of it as JSON: lights with their reasons, and each part's question, sentences, tables and settings."""
    return {
        "notice": NOTICE,
        "recipe_sha256": evidence.recipe_hash,
        "lights": [
            {
                "readout": one.readout,
                "light": one.light,
                "claim": one.claim,
                "checks": [{"name": c.name, "passed": c.passed, "reason": c.reason} for c in one.checks],
                "notes": list(one.notes),
            }
            for one in verdicts
        ],
        "parts": {
            name: {
                "question": TITLES[name],
                "says": sentences(part, evidence),
                "covers": COVERS[name],
                "settings": dict(part.facts),
                "tables": {title: _records(table) for title, table in part.tables.items()},
            }
            for name, part in evidence.parts.items()
        },
        "missing": dict(evidence.missing),
    }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(key): None if value is None or value != value else value for key, value in zip(table, row, strict=True)}
        for row in zip(*(table[name].tolist() for name in table), strict=True)
    ]


def method(evidence: Evidence) -> str:
    """What was done for the evidence, as a paper's method section would say it; empty without a part."""
    said = {
        "technical": "the unedited cell was encoded again with other tie-breaking (p = (b + 1) / (n + 1))",
        "technical_drawn": "these encodings were drawn with the same noise",
        "matched": "like edits of random genes of like expression and detection were guessed by the niche network and "
        "ranked (Phipson and Smyth 2010; q over the readouts with a light, Benjamini and Hochberg 1995)",
        "matched_drawn": "others of them were drawn with the same noise",
        "baselines": "the effect was set beside those of trivial rules fitted on real tiles",
        "gates": "both arms were ranked among held-out cells by conformal p-values (Vovk et al. 2005)",
        "reader": "density and composition were corrected for the reader's measured errors (Rogan and Gladen 1978)",
        "route": "old and new z_c and z_e were exchanged with the same noise (Shapley 1953)",
        "attribution": "the gradient of the density by gene was taken and checked (Adebayo et al. 2018)",
        "natural": "niches of real cells with little and much of the gene, matched on the other genes, were compared",
    }
    made = [said[name] for name in evidence.parts if name in said]
    return "As further evidence, " + "; ".join(made) + "." if made else ""
