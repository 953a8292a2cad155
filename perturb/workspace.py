"""Named scenarios side by side: an ordered list of recipes, kept as one JSON file.

A workspace never changes: every operation gives a new one, so that undo is the one before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core.files import parse_json, write_json
from ge2hist_core.types import BadInput, check_text
from perturb.recipe import Recipe, _print_seeds

if TYPE_CHECKING:
    from perturb.result import Result

__all__ = [
    "MAX_AGE_DAYS",
    "MAX_SCENARIOS",
    "Scenario",
    "Workspace",
    "contrast_table",
    "effects_table",
    "load_workspace",
    "save_workspace",
]

SCHEMA = 1
MAX_SCENARIOS = 8
MAX_NAME = 60
MAX_AGE_DAYS = 90
"""Workspace files neither saved nor opened for longer are removed when another one is saved."""
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Scenario:
    """A recipe under a name of the user's.

    Raises
    ------
    BadInput: no name, one of more than 60 characters, or one with half of a surrogate pair.
    """

    name: str
    recipe: Recipe

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise BadInput("A scenario has no name: give it one.")
        check_text("The name of a scenario", self.name)
        if len(self.name) > MAX_NAME:
            raise BadInput(f"The name {self.name[:20]!r}... has {len(self.name)} characters: give at most {MAX_NAME}.")


@dataclass(frozen=True)
class Workspace:
    """Scenarios in the user's order, each name once, at most eight.

    Raises
    ------
    BadInput: a name given twice, or more scenarios.
    """

    scenarios: tuple[Scenario, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "scenarios", tuple(self.scenarios))
        names = [scenario.name for scenario in self.scenarios]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise BadInput(f"Two scenarios are called {twice[0]!r}: give each its own name.")
        if len(names) > MAX_SCENARIOS:
            raise BadInput(f"{len(names)} scenarios are more than can be compared: keep at most {MAX_SCENARIOS}.")

    def __len__(self) -> int:
        return len(self.scenarios)

    def _free_name(self, wanted: str) -> str:
        names = {scenario.name for scenario in self.scenarios}
        name, i = wanted[:MAX_NAME], 2
        while name in names:
            ending = f" ({i})"
            name, i = wanted[: MAX_NAME - len(ending)] + ending, i + 1
        return name

    def added(self, name: str, recipe: Recipe) -> Workspace:
        """With a further scenario at the end; a taken name gets a number."""
        return Workspace((*self.scenarios, Scenario(self._free_name(name), recipe)))

    def renamed(self, i: int, name: str) -> Workspace:
        """With another name for scenario ``i``."""
        return self._with(i, replace(self.scenarios[i], name=name))

    def duplicated(self, i: int) -> Workspace:
        """With a copy of scenario ``i`` behind it."""
        copy = replace(self.scenarios[i], name=self._free_name(self.scenarios[i].name))
        return Workspace((*self.scenarios[: i + 1], copy, *self.scenarios[i + 1 :]))

    def moved(self, i: int, step: int) -> Workspace:
        """With scenario ``i`` moved by ``step`` places, not beyond the ends."""
        rest = [*self.scenarios[:i], *self.scenarios[i + 1 :]]
        rest.insert(min(max(i + step, 0), len(rest)), self.scenarios[i])
        return Workspace(tuple(rest))

    def removed(self, i: int) -> Workspace:
        """Without scenario ``i``."""
        return Workspace((*self.scenarios[:i], *self.scenarios[i + 1 :]))

    def _with(self, i: int, scenario: Scenario) -> Workspace:
        return Workspace((*self.scenarios[:i], scenario, *self.scenarios[i + 1 :]))

    @property
    def on_shared_noise(self) -> tuple[Recipe, ...]:
        """The recipes with seeds, sampler and encoder seed of the first: they differ in cells and edits alone."""
        if not self.scenarios:
            return ()
        first = self.scenarios[0].recipe
        same: dict[str, Any] = {"seeds": first.seeds, "sample": first.sample, "encoder_seed": first.encoder_seed}
        return tuple(replace(scenario.recipe, **same) for scenario in self.scenarios)

    @property
    def changed_for_noise(self) -> tuple[str, ...]:
        """What :attr:`on_shared_noise` takes from the first scenario, one sentence per scenario that differs."""
        said = []
        for scenario, shared in zip(self.scenarios, self.on_shared_noise, strict=True):
            own, first = _noise(scenario.recipe), _noise(shared)
            changes = [f"{name} {first[name]} instead of {own[name]}" for name in own if own[name] != first[name]]
            if changes:
                name = " ".join(scenario.name.split())
                said.append(f"The scenario {name} is drawn with {', '.join(changes)}, as the first one is.")
        return tuple(said)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, as in the file."""
        rows = [{"name": scenario.name, "recipe": scenario.recipe.to_dict()} for scenario in self.scenarios]
        return {"workspace_schema": SCHEMA, "scenarios": rows}

    @classmethod
    def from_json(cls, text: str) -> Workspace:
        """Inverse of :meth:`to_dict` as JSON.

        Raises
        ------
        BadInput: not JSON, another schema, or a scenario that cannot be read.
        """
        cure = "give a workspace file that GE2Hist wrote"
        value = parse_json(text, "The workspace", cure)
        try:
            schema = value["workspace_schema"]
            if schema != SCHEMA:
                raise BadInput(f"The workspace has schema {schema!r}, this version reads {SCHEMA}: {cure}.")
            rows = [(row["name"], Recipe.from_json(json.dumps(row["recipe"]))) for row in value["scenarios"]]
        except (KeyError, TypeError) as error:
            raise BadInput(f"The workspace cannot be read ({error}): {cure}.") from None
        return cls(tuple(Scenario(name, recipe) for name, recipe in rows))


def _noise(recipe: Recipe) -> dict[str, str]:
    """What scenarios have to share to be drawn on the same noise, in words."""
    sample = recipe.sample
    return {
        "seeds": _print_seeds(recipe.seeds),
        "sampler": f"{sample.solver} with {sample.steps} steps and guidance {sample.guidance:g}",
        "encoder seed": str(recipe.encoder_seed),
    }


def save_workspace(workspace: Workspace, folder: str | Path, workspace_id: str) -> None:
    """Keep a workspace under its id; others that were neither saved nor opened for 90 days go."""
    path = _path(folder, workspace_id)
    write_json(path, workspace.to_dict())
    oldest = time.time() - MAX_AGE_DAYS * 86400
    for other in path.parent.glob("[!.]*.json"):
        with contextlib.suppress(FileNotFoundError):  # another session may have removed it
            if other.stat().st_mtime < oldest:
                other.unlink()


def load_workspace(folder: str | Path, workspace_id: str) -> Workspace | None:
    """A kept workspace, or None. Opening it starts its 90 days anew.

    Raises
    ------
    BadInput: an id of another form, or a damaged file.
    """
    path = _path(folder, workspace_id)
    try:
        text = path.read_text(encoding="utf-8")
        os.utime(path)
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise BadInput(f"The workspace cannot be read ({error}): start a new one.") from None
    return Workspace.from_json(text)


def _path(folder: str | Path, workspace_id: str) -> Path:
    if not _ID.fullmatch(workspace_id):
        raise BadInput(
            f"The workspace {workspace_id[:40]!r} has no valid name: open the link again, or start a new one."
        )
    return Path(folder) / f"{workspace_id}.json"


def effects_table(names: Sequence[str], results: Sequence[Result]) -> pd.DataFrame:
    """Paired effects of several scenarios in one table: ``scenario`` and the columns of ``Result.comparison``."""
    return pd.concat(
        [result.comparison.assign(scenario=name) for name, result in zip(names, results, strict=True)],
        ignore_index=True,
    )


def contrast_table(names: Sequence[str], results: Sequence[Result], reference: str) -> pd.DataFrame:
    """Paired differences of every scenario's edited pictures to those of a reference scenario.

    Where both have the same cells, pictures of the same cell and seed are paired and the interval covers cells and
    seeds (:func:`perturb.stats.crossed_effect`). Otherwise the means over the cells of each seed are paired, and the
    interval covers seeds alone: it says nothing about other cells. A pair with an undefined readout is left out, and so
    is a type that no picture of either scenario shows.

    Parameters
    ----------
    names: of the scenarios, in the order of ``results``.
    results: of recipes on the same noise (:attr:`Workspace.on_shared_noise`).
    reference: one of the names.

    Returns
    -------
    DataFrame ``scenario, reference, readout, unit, reference_mean, mean, effect, low, high, p, q, n, over``: ``effect``
    is scenario minus reference in the readout's unit, ``low`` to ``high`` its 95 % interval, p of the same design, q
    adjusted within each scenario, n the pairs, ``over`` what the interval covers.

    Raises
    ------
    BadInput: a reference that is none of the names, or results with other seeds.
    """
    from perturb.stats import bh_fdr, crossed_effect
    from perturb.tables import LEVEL, steps

    if reference not in names:
        raise BadInput(f"The reference is {reference!r}: choose one of {', '.join(map(repr, names))}.")
    first = results[list(names).index(reference)]
    tables = []
    for name, result in zip(names, results, strict=True):
        if result.recipe.seeds != first.recipe.seeds:
            raise BadInput(f"The scenarios {name!r} and {reference!r} have other seeds: draw both on the same noise.")
        if name == reference:
            continue
        paired = result.recipe.cell_ids == first.recipe.cell_ids
        over = "cells and seeds" if paired and len(first.recipe.cell_ids) > 1 else "seeds"
        before, after = _edited(first), _edited(result)
        both = [one.readouts[one.readouts["arm"] == "edited"] for one in (first, result)]
        size = steps(pd.concat([both[0].assign(arm="base"), both[1]]))
        rows = []
        for readout in (readout for readout in before if readout in after):
            a, b = (values if paired else _over_cells(values) for values in (before[readout][1], after[readout][1]))
            if ":" in readout and not (np.nan_to_num(a).any() or np.nan_to_num(b).any()):
                continue
            defined = np.isfinite(a) & np.isfinite(b)
            seed = first.recipe.encoder_seed
            found = crossed_effect(np.where(defined, a, np.nan), b, seed, LEVEL, size[readout])
            means = [float(values[defined].mean()) if defined.any() else float("nan") for values in (a, b)]
            rows.append((readout, before[readout][0], *means, found.value, found.low, found.high, found.p, found.n))
        columns = ["readout", "unit", "reference_mean", "mean", "effect", "low", "high", "p", "n"]
        table = pd.DataFrame(rows, columns=columns)
        table.insert(8, "q", bh_fdr(table["p"].to_numpy()))
        table.insert(0, "scenario", name)
        table.insert(1, "reference", reference)
        tables.append(table.assign(over=over))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _edited(result: Result) -> dict[str, tuple[str, np.ndarray]]:
    """Readout -> its unit and ``[cell, seed]`` values in the edited pictures."""
    rows = result.readouts[result.readouts["arm"] == "edited"]
    shape = (len(result.recipe.cell_ids), len(result.recipe.seeds))
    return {
        str(readout): (str(part["unit"].iloc[0]), part["value"].to_numpy(dtype=float).reshape(shape))
        for readout, part in rows.groupby("readout", sort=False)
    }


def _over_cells(values: np.ndarray) -> np.ndarray:
    """Mean over the cells of each seed, ``[1, seed]``; NaN where no cell gives a value."""
    defined = np.isfinite(values)
    n = defined.sum(axis=0, keepdims=True)
    return np.where(n > 0, np.where(defined, values, 0.0).sum(axis=0, keepdims=True) / np.maximum(n, 1), np.nan)
