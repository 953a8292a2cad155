"""``python -m perturb compare A.json B.json ... --out DIR``: several recipes on the same noise, side by side.

The files are those that the Compare page gives: one page with all scenarios side by side, two tables across them, and a
report of each scenario in a folder of its own. Scenarios take seeds, sampler and encoder seed from the first.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ge2hist_core.types import BadInput, Cells
from perturb.grn import pack_network
from perturb.workspace import Workspace, contrast_table, effects_table

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from ge2hist_core.model import GE2Hist
    from perturb.grn import Network
    from perturb.recipe import Recipe
    from perturb.result import Result

__all__ = ["comparison_files", "contrast_chart", "recipe_cells", "zip_bytes"]


def comparison_files(
    workspace: Workspace, results: Sequence[Result], cells: Sequence[Cells], reference: str
) -> dict[str, bytes]:
    """Every file of the comparison by its relative name; ``README.txt`` says what each holds.

    Parameters
    ----------
    results: of :attr:`Workspace.on_shared_noise`, in that order. cells: that each was made from.
    reference: name of the scenario that the others are compared with.

    Raises
    ------
    BadInput: an unknown reference; results or cells that do not belong to the scenarios.
    """
    from perturb import scenario_report
    from perturb.page import csv_bytes, file_name, json_bytes, noted, readme
    from perturb.report import report_files

    if [result.recipe for result in results] != list(workspace.on_shared_noise):
        raise BadInput("The results are not those of the scenarios: draw the scenarios again.")
    names = [scenario.name for scenario in workspace.scenarios]
    contrasts = contrast_table(names, results, reference)
    files = {
        "comparison.html": scenario_report.html(workspace, results, reference).encode(),
        "comparison.pdf": scenario_report.pdf(workspace, results, reference),
        "effects.csv": csv_bytes(effects_table(names, results)),
    }
    said = {
        "comparison.html": "all scenarios side by side as one page, interactive, needs no network",
        "comparison.pdf": "the same for print and mail",
        "effects.csv": "paired effect of each scenario's edits: edited minus unedited, with interval, p and q",
    }
    if len(contrasts):
        files["contrasts.csv"] = csv_bytes(contrasts)
        said["contrasts.csv"] = f"paired difference of each scenario to {_line(reference)}, with interval, p and q"
    files["workspace.json"] = json_bytes(noted(workspace.to_dict() | {"reference": reference}))
    said["workspace.json"] = (
        "the list of scenarios: the Compare page opens it, `python -m perturb replay` runs it again"
    )
    provenance = scenario_report.provenance(workspace, results, reference)
    files["provenance.json"] = json_bytes(noted(provenance))
    said["provenance.json"] = "versions and hashes that the numbers were made with"
    networks = [pack_network(result.network) for result in results if result.network is not None]
    if networks:
        files["networks.json"] = json_bytes(noted({"networks": networks}))
        said["networks.json"] = "the networks through which edits were spread"
    for i, (name, result, some) in enumerate(zip(names, results, cells, strict=True)):
        folder = f"{i + 1}_{file_name(name) or 'scenario'}/"
        said[folder] = f"report of {_line(name)}: `python -m perturb replay` runs this folder again"
        files |= {folder + inner: content for inner, content in report_files(result, some).items()}
    further = "\n".join(
        (
            *workspace.changed_for_noise,
            "Every number and picture here comes from a generative model. It is no measurement.",
        )
    )
    n = len(results[0].recipe.seeds)
    title = f"{len(names)} scenarios on the same noise, {n} seed{'s' * (n != 1)} each"
    return files | {"README.txt": readme(title, said, further)}


def zip_bytes(workspace: Workspace, results: Sequence[Result], cells: Sequence[Cells], reference: str) -> bytes:
    """All of :func:`comparison_files` as one ZIP; the same comparison gives the same bytes."""
    from perturb.page import zip_of

    return zip_of(comparison_files(workspace, results, cells, reference))


def _line(name: str) -> str:
    """A name that starts no further line."""
    return " ".join(name.split())


def contrast_chart(table: pd.DataFrame, readout: str, reference: str, theme: str = "light") -> go.Figure:
    """One readout's paired difference of each scenario to the reference, with interval; filled where q < 0.05.

    Parameters
    ----------
    table: of :func:`perturb.workspace.contrast_table`.
    """
    import html

    from perturb import charts

    figure = charts.scenarios(table, readout, theme)
    said = f"Scenario - {html.escape(_line(reference))}"
    for trace in figure.data:
        trace.update(hovertemplate=trace.hovertemplate.replace("Edited - unedited", "Scenario - reference"))
    axis = figure.layout.xaxis.title.text
    return figure.update_xaxes(title_text=axis.replace("Edited - unedited", said)).update_layout(
        title_text="Difference to the reference; filled: q < 0.05"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb compare``."""
    parser.add_argument("recipes", nargs="+", help="two to eight recipe.json; each scenario is called like its file")
    parser.add_argument("--out", required=True, help="folder for the comparison and a report of each scenario")
    parser.add_argument("--reference", type=int, default=1, help="number of the scenario to compare with, from 1")
    parser.add_argument("--bundle", default="assets/demo_bundle", help="folder of the model")
    parser.add_argument("--cells", default="assets/demo_cells.h5ad", help="the h5ad that the recipes were made with")
    parser.add_argument(
        "--network", nargs="*", default=[], help="networks of recipes whose edits spread (default: network.json beside)"
    )
    parser.add_argument("--cache", help="folder in which finished arms are kept and looked up")


def main(args: argparse.Namespace) -> None:
    """Run the recipes on shared noise and write the comparison.

    Raises
    ------
    BadInput: fewer than two or more than eight recipes, a reference that is none of them, or a recipe, bundle, data
    file or network that cannot be used, or that do not belong together.
    """
    from ge2hist_core.model import GE2Hist
    from perturb.cache import report_folder
    from perturb.page import write_files
    from perturb.recipe import Recipe
    from perturb.run import print_progress, run

    if len(args.recipes) < 2:
        raise BadInput(f"{len(args.recipes)} recipe cannot be compared: give two or more.")
    if not 1 <= args.reference <= len(args.recipes):
        raise BadInput(f"--reference is {args.reference}: give a number from 1 to {len(args.recipes)}.")
    workspace = Workspace()
    for path in args.recipes:
        workspace = workspace.added(Path(path).stem.strip() or "recipe", Recipe.read(path))
    if args.network and all(scenario.recipe.propagation is None for scenario in workspace.scenarios):
        raise BadInput(
            "--network is of no use, as the edits of none of the recipes spread: leave it out, or make a recipe with "
            "`python -m perturb recipe --network`."
        )
    for sentence in workspace.changed_for_noise:
        print(sentence)
    model = GE2Hist.load(args.bundle)
    networks = _networks(args.network)
    recipes = workspace.on_shared_noise
    cells = [recipe_cells(recipe, args.cells, model) for recipe in recipes]
    reference = workspace.scenarios[args.reference - 1].name
    key = hashlib.sha256("".join([reference, *(recipe.hash for recipe in recipes)]).encode()).hexdigest()
    with report_folder(args.out, args.cache, key) as cache:
        results = [
            run(one, model, some, network=_network(one, networks, path), cache=cache, on_progress=print_progress())
            for one, some, path in zip(recipes, cells, args.recipes, strict=True)
        ]
        for written in write_files(comparison_files(workspace, results, cells, reference), args.out):
            print(written)


def recipe_cells(recipe: Recipe, path: str, model: GE2Hist) -> Cells:
    """The recipe's cells, read as the recipe says."""
    from ge2hist_core.data import open_cells
    from perturb.run import cells_for

    options = {"matrix": recipe.matrix, "gene_column": recipe.gene_column}
    with open_cells(path, model.scgpt.vocab, **options) as source:
        if source.sha256 != recipe.data_sha256:
            raise BadInput(
                f"A recipe was made with data {recipe.data_sha256[:12]}, but {path} is {source.sha256[:12]}: "
                "give --cells the file of the recipes."
            )
        return cells_for(source, recipe.cell_ids)


def _networks(paths: Sequence[str]) -> dict[str, Network]:
    """The given tables and the known truth by their SHA-256."""
    from perturb.grn import read_network
    from perturb.networks import known_truth

    return {network.sha256: network for network in (known_truth(), *map(read_network, paths))}


def _network(recipe: Recipe, networks: dict[str, Network], path: str) -> Network | None:
    """The recipe's network: among those at hand, else ``network.json`` beside the recipe."""
    from perturb.networks import network_for

    if recipe.propagation is None:
        return None
    return networks.get(recipe.propagation.network_sha256) or network_for(recipe, None, path)
