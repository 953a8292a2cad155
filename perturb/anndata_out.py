"""Result -> h5ad: what the encoder read and what the model made of it, for scanpy and all that reads AnnData.

One observation per arm and cell. ``X``: raw counts as the encoder saw them, unedited or edited. ``obs``: ``arm``,
``cell_id``, what the data say of the cell (``cell_type``, ``donor``), what the model reads (``ge2hist_type``,
``ge2hist_type_probability``, ``ge2hist_support_p``), and for each readout its mean over the noise seeds and in how many
pictures it is defined (``density``, ``density_n``, ``fraction:Fibroblast``, ...). ``obsm``: ``X_scGPT``, ``X_z_c``,
``X_z_e``, and ``spatial`` where positions are known. ``uns["ge2hist"]``: recipe and provenance as JSON, units, the
notice. The same result gives the same bytes.
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
from perturb.wording import NOTICE, question

if TYPE_CHECKING:
    from perturb.result import Result

__all__ = ["result_h5ad"]

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
    from anndata import AnnData
    from anndata.utils import make_index_unique

    chosen = _chosen(result, cells)
    counts = {
        name: chosen if name == "base" else edited_cells(recipe, chosen, cells, result.network)[0]
        for name, recipe in result.recipe.arms.items()
    }
    _check(result, counts)
    symbols = pd.Index(chosen.genes.astype(str))
    table = AnnData(
        sp.vstack([some.counts for some in counts.values()], format="csr"),
        obs=pd.concat([_obs(result, name, chosen) for name in counts]),
        var=pd.DataFrame({"symbol": symbols.to_numpy()}, index=make_index_unique(symbols)),
    )
    arms = [result.arms[name] for name in counts]
    table.obsm["X_scGPT"] = np.concatenate([arm.embedding for arm in arms])
    table.obsm["X_z_c"] = np.concatenate([arm.latent.z_c for arm in arms])
    table.obsm["X_z_e"] = np.concatenate([arm.latent.z_e for arm in arms])
    if chosen.xy_um is not None:
        table.obsm["spatial"] = np.tile(chosen.xy_um, (len(arms), 1))
    table.uns["ge2hist"] = _about(result)
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
