"""Result or screen -> h5ad: what the encoder read and what the model made of it, for scanpy and all that reads AnnData.

One observation per arm and cell. ``X``: raw counts as the encoder saw them, unedited or edited. ``obs``: ``arm``,
``cell_id``, what the data say of the cell (``cell_type``, ``donor``), what the model reads (``ge2hist_type``,
``ge2hist_type_probability``, ``ge2hist_support_p``), and for each readout its mean over the noise seeds and in how many
pictures it is defined (``density``, ``density_n``, ``fraction:Fibroblast``, ...). ``obsm``: ``X_scGPT``, ``X_z_c``,
``X_z_e``, and ``spatial`` where positions are known. ``uns["ge2hist"]``: recipe and provenance as JSON, units, the
notice. The same result gives the same bytes.

Of a screen, one observation per candidate and cell, and one per unedited cell; ``obs["candidate"]`` names the edit.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core.types import BadInput, Cells
from perturb.run import edited_cells
from perturb.wording import NOTICE, question, screen_question

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from perturb.result import Arm, Result
    from perturb.screen import Screen

__all__ = ["result_h5ad", "screen_h5ad"]

CONTROL = "Arm control: counts and states of the first seed's random network; readouts over all seeds and networks."


def result_h5ad(result: Result, cells: Cells) -> bytes:
    """The file.

    Parameters
    ----------
    cells: those that the result was made from, as :func:`perturb.run.cells_for` gives them.

    Raises
    ------
    BadInput: cells that lack one of the result, or whose counts are not those that the result saw.
    """
    chosen = _chosen(result, cells)
    counts = {
        name: chosen if name == "base" else edited_cells(recipe, chosen, cells, result.network)[0]
        for name, recipe in result.recipe.arms.items()
    }
    _check(result, counts)
    obs = [_obs(result, name, chosen) for name in counts]
    return _bytes(list(counts.values()), obs, [result.arms[name] for name in counts], _about(result))


def screen_h5ad(screen: Screen, drawn: Mapping[str, Result], cells: Cells) -> bytes:
    """The file of a screen.

    Parameters
    ----------
    drawn: by candidate, as :func:`perturb.screen_report.drawn_results` gives them.
    cells: those that the screen was run with.

    Raises
    ------
    BadInput: no drawn candidate; cells as for :func:`result_h5ad`.
    """
    if not drawn:
        raise BadInput(
            "No candidate's pictures are kept, so there is nothing for candidates.h5ad: run the screen again."
        )
    first = next(iter(drawn.values()))
    chosen = _chosen(first, cells)
    counts, arms = [chosen], [first.base_arm]
    obs = [_obs(first, "base", chosen).assign(candidate="unedited")]
    for name, result in drawn.items():
        edited = edited_cells(result.recipe, chosen, cells)[0]
        _check(result, {"base": chosen, "edited": edited})
        rows = _obs(result, "edited", chosen).assign(candidate=name)
        obs.append(rows.set_index(rows["cell_id"] + "|" + name))
        counts.append(edited)
        arms.append(result.edited_arm)
    about = _about(first) | {
        "question": screen_question(screen),
        "screen": json.dumps(screen.to_dict(), sort_keys=True),
        "screen_sha256": screen.hash,
        "readouts": f"means over the further noise seeds {', '.join(map(str, screen.further_seeds))}",
    }
    del about["recipe"], about["recipe_sha256"]
    return _bytes(counts, obs, arms, about)


def _bytes(counts: Sequence[Cells], obs: Sequence[pd.DataFrame], arms: Sequence[Arm], about: dict[str, Any]) -> bytes:
    """Parts of the same cells, one below the other, as a file."""
    from anndata import AnnData
    from anndata.utils import make_index_unique

    chosen = counts[0]
    symbols = pd.Index(chosen.genes.astype(str))
    table = AnnData(
        sp.vstack([some.counts for some in counts], format="csr"),
        obs=pd.concat(obs),
        var=pd.DataFrame({"symbol": symbols.to_numpy()}, index=make_index_unique(symbols)),
    )
    table.obsm["X_scGPT"] = np.concatenate([arm.embedding for arm in arms])
    table.obsm["X_z_c"] = np.concatenate([arm.latent.z_c for arm in arms])
    table.obsm["X_z_e"] = np.concatenate([arm.latent.z_e for arm in arms])
    if chosen.xy_um is not None:
        table.obsm["spatial"] = np.tile(chosen.xy_um, (len(arms), 1))
    table.uns["ge2hist"] = about
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.h5ad"
        table.write_h5ad(path, compression="gzip")
        return path.read_bytes()


def _chosen(result: Result, cells: Cells) -> Cells:
    row = {name: i for i, name in enumerate(cells.cell_id)}
    missing = [name for name in result.recipe.cell_ids if name not in row]
    if missing:
        raise BadInput(f"The cells given for result.h5ad lack {missing[0]!r}: give the file of the recipe.")
    return cells.take([row[name] for name in result.recipe.cell_ids])


def _check(result: Result, counts: dict[str, Cells]) -> None:
    """The result tells the counts of the edited genes: those of other data differ."""
    direct = counts.get("direct", counts.get("edited", counts["base"]))
    row = {name: i for i, name in enumerate(result.recipe.cell_ids)}
    for edit in result.edits.itertuples():
        column = np.flatnonzero(direct.genes == edit.gene)[0]
        for some, count in ((counts["base"], edit.count_before), (direct, edit.count_after)):
            found = float(some.counts[row[edit.cell_id], column])
            if found != count:
                raise BadInput(
                    f"The cells given for result.h5ad show {found:g} counts of {edit.gene} in cell {edit.cell_id} "
                    f"where the result saw {count:g}: give the file of the recipe."
                )


def _obs(result: Result, name: str, chosen: Cells) -> pd.DataFrame:
    arm, ids = result.arms[name], list(result.recipe.cell_ids)
    columns: dict[str, Any] = {"arm": name, "cell_id": ids}
    for column, value in (("cell_type", chosen.cell_type), ("donor", chosen.donor)):
        if value is not None:
            columns[column] = value
    states = result.states.set_index("cell_id").loc[ids]
    # The table of states names types in the unedited and the edited arm alone.
    columns["ge2hist_type"] = states[f"type_{name}"].to_numpy() if f"type_{name}" in states else ""
    columns["ge2hist_type_probability"] = arm.types.max(axis=1).astype(np.float64)
    columns["ge2hist_support_p"] = arm.support.astype(np.float64)
    rows = result.readouts[result.readouts["arm"] == name]
    values = rows.groupby(["readout", "cell_id"], sort=False)["value"]
    mean, n = values.mean(), values.count()
    for readout in dict.fromkeys(rows["readout"]):
        columns[readout] = mean[readout].loc[ids].to_numpy()
        columns[f"{readout}_n"] = n[readout].loc[ids].to_numpy()
    return pd.DataFrame(columns, index=pd.Index([f"{cell_id}|{name}" for cell_id in ids]))


def _about(result: Result) -> dict[str, Any]:
    units = result.readouts.drop_duplicates("readout").set_index("readout")["unit"]
    about = {
        "notice": NOTICE,
        "question": question(result.recipe),
        "recipe": result.recipe.to_json(),
        "recipe_sha256": result.recipe.hash,
        "provenance": json.dumps(result.provenance, sort_keys=True),
        "units": units.to_dict(),
        "source": result.provenance["source"],
        "position_unit": "um",
    }
    return about | ({"control": CONTROL} if "control" in result.arms else {})
