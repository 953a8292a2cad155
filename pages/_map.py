"""The map of all cells: coloured by type, donor, support or a gene; cells chosen on it; where an edit moves a cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from ge2hist_core.support import OUTSIDE
from ge2hist_core.types import BadInput
from pages import _ui
from pages._choice import choose, gene_counts, gene_input, some

if TYPE_CHECKING:
    import pandas as pd

    from ge2hist_core.data import H5adSource
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.types import Cells
    from pages._experiment import Experiment
    from perturb.cell_map import Reference
    from perturb.grn import Network
    from perturb.recipe import Recipe

MAP_POINTS = 20_000
"""Cells on a map, at most."""
CHUNK = 20
"""Real cells that are encoded at once: what is done is kept when the map is closed meanwhile."""
COLOURS = {"type": "Cell type", "donor": "Donor", "support": "Support", "gene": "A gene"}
PLANES = {"section": "Section", "umap": "UMAP"}
ALL_DONORS = "All, one over the other"


@dataclass(frozen=True)
class MapView:
    """How the map is shown; no part of any recipe.

    Parameters
    ----------
    plane: of ``PLANES``, empty for the first that the file has. colour: of ``COLOURS``. gene: that colours.
    moves: whether arrows show where the edit moves its cells.
    """

    plane: str = ""
    colour: str = "type"
    gene: str = ""
    moves: bool = False

    def to_query(self) -> dict[str, str]:
        """As URL parameters; what is as at the start is left out."""
        colour = f"gene:{self.gene}" if self.colour == "gene" else self.colour
        parts = {"map": self.plane, "colour": "" if colour in ("type", "gene:") else colour}
        return {name: value for name, value in parts.items() if value} | ({"arrows": "1"} if self.moves else {})

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> MapView:
        """From URL parameters; what is not understood is as at the start."""
        colour, _, gene = query.get("colour", "").partition(":")
        plane = query.get("map", "")
        known = colour in COLOURS and (colour == "gene") == bool(gene)
        return cls(
            plane if plane in PLANES else "",
            colour if known else "type",
            gene if known else "",
            query.get("arrows") == "1",
        )


def map_view() -> MapView:
    """This tab's view of the map: from the session, or from the address that it was opened with."""
    if "map view" not in st.session_state:
        st.session_state["map view"] = MapView.from_query(dict(st.query_params))
    return st.session_state["map view"]


def _set_view(name: str) -> None:
    st.session_state["map view"] = replace(map_view(), **{name: st.session_state[f"map {name}"]})


@st.dialog("Map of the cells", width="large")
def map_dialog(experiment: Experiment, source: H5adSource, model: GE2Hist) -> None:
    with _ui.guard():
        plane = _controls(experiment, source, model)
        view = map_view()
        _ui.write_address(experiment, view.to_query())
        moves = None
        try:
            points, kind, value, note = _coloured(experiment, source, model, view, plane)
            if view.moves and plane == "umap" and experiment.recipe.perturbation:
                moves = _moves(experiment, source, model)
        except BadInput as error:
            st.warning(_ui.plain(error), icon=":material/warning:")
            points, kind, value, note = _by_type(source, plane), "type", "", ""
        event = st.plotly_chart(
            _figure(experiment, source, plane, points, kind, value, moves),
            theme=None,
            on_select="rerun",
            selection_mode=("points", "lasso", "box"),
            key=f"map of {plane} {kind} {view.gene}",
            config={"displaylogo": False, "scrollZoom": True},
        )
        if note:
            st.caption(note)
        if moves is not None:
            from perturb.cell_map import in_words

            st.caption(_ui.plain(in_words(moves)))
        _tiles(experiment, source, model)
        if len(points) < len(source):
            st.caption(f"{len(points):,} of {len(source):,} cells are shown; every cell can be found by its id.")
        st.caption(
            "Click a point to choose that cell, or take the lasso or box above the map to choose many: the edit is "
            "then made in each of them. Scroll to zoom, drag to move. From the keyboard, cells are chosen by type, id "
            "or gene beside the map, on the left of the page."
        )
        ids = list(dict.fromkeys(str(point["customdata"]) for point in event["selection"]["points"]))
        if len(ids) == 1:
            choose(experiment, source, tuple(ids))
            st.rerun()
        if ids:
            taken = some(ids)
            drawn = f", drawn at random from the {len(ids):,} selected" * (len(taken) < len(ids))
            if st.button(f"Edit {len(taken)} cells{drawn}", type="primary", key="take selection"):
                choose(experiment, source, taken)
                st.rerun()


def _controls(experiment: Experiment, source: H5adSource, model: GE2Hist) -> str:
    """Which plane, which colour, arrows; the plane that is shown."""
    view = map_view()
    planes = [name for name, plane in (("section", source.xy), ("umap", source.umap)) if plane is not None]
    has = {"donor": source.donor is not None, "support": model.support is not None}
    colours = [name for name in COLOURS if has.get(name, True)]
    shown = view.plane if view.plane in planes else planes[0]
    st.session_state["map plane"] = shown
    st.session_state["map colour"] = view.colour if view.colour in colours else "type"
    st.session_state["map moves"] = view.moves
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        if len(planes) > 1:
            st.segmented_control(
                "Map",
                planes,
                key="map plane",
                format_func=PLANES.__getitem__,
                required=True,
                on_change=_set_view,
                args=("plane",),
            )
        st.segmented_control(
            "Colour by",
            colours,
            key="map colour",
            format_func=COLOURS.__getitem__,
            required=True,
            on_change=_set_view,
            args=("colour",),
        )
        if view.colour == "gene":
            if "map gene" not in st.session_state:
                st.session_state["map gene"] = view.gene
            with st.container(width=230):
                st.session_state["map view"] = replace(view, gene=gene_input(source, "map gene") or "")
        if shown == "umap":
            st.toggle(
                "Where the edit moves the cell",
                key="map moves",
                on_change=_set_view,
                args=("moves",),
                disabled=not experiment.recipe.perturbation,
                help="Edit a gene first. Some hundred real cells are then read by the encoder, once, which takes about "
                "ten seconds for the demo cells and longer for cells with many genes.",
            )
        elif source.donor is not None and len(donors := sorted(set(source.donor[~source.empty]))) > 1:
            if "map donor" not in st.session_state:  # sections have coordinates of their own and would overlap
                st.session_state["map donor"] = source.donor[source.index_of(experiment.recipe.cell_ids[0])]
            with st.container(width=200):
                st.selectbox("Section of", [*donors, ALL_DONORS], key="map donor")
        if shown == "section" and _ui.as_store(source) is not None:
            st.toggle("H&E below the cells", value=True, key="map picture")
    return shown


def _tiles(experiment: Experiment, source: H5adSource, model: GE2Hist) -> None:
    """The real tile of the chosen cell beside the generated one, where both are at hand."""
    cell = experiment.recipe.cell_ids[0]
    niche = _ui.real_tile(source, cell, model)
    if niche is None:
        return
    real, drawn, _ = st.columns([1, 1, 1], gap="small")
    with real:
        st.image(_ui.picture_png(niche.image, generated=False), width="stretch", alt="Real H&E picture of this cell")
        st.caption(f"Real tile of {_ui.plain(cell)}")
    draft = replace(experiment.recipe.draft, perturbation=type(experiment.recipe.perturbation)())
    for recipe in (experiment.recipe.draft, draft):
        if (result := _ui.get_result(recipe)) is not None:
            with drawn:
                png = _ui.tile_png(result.recipe.hash, "base", 0, "picture", (), result)
                st.image(png, width="stretch", alt="Generated H&E picture of this cell, unedited")
                st.caption("Generated, unedited")
            return


def _section_shown(source: H5adSource, plane: str) -> str | None:
    """The one section that the map shows, None where it shows several or another plane."""
    if plane != "section" or source.donor is None:
        return None
    donors = sorted(set(source.donor[~source.empty]))
    donor = donors[0] if len(donors) == 1 else st.session_state.get("map donor", ALL_DONORS)
    return None if donor == ALL_DONORS else str(donor)


def _by_type(source: H5adSource, plane: str) -> pd.DataFrame:
    """One row per cell of the file that is shown: ``row, group``."""
    import pandas as pd

    shown, donor = ~source.empty, st.session_state.get("map donor", ALL_DONORS)
    if plane == "section" and source.donor is not None and donor != ALL_DONORS:
        shown = shown & (source.donor == donor)
    rows = shown.nonzero()[0]
    rows = rows[:: max(1, -(-len(rows) // MAP_POINTS))]
    types = ["Cells"] * len(rows) if source.cell_type is None else source.cell_type[rows]
    return pd.DataFrame({"row": rows, "group": types})


def _coloured(
    experiment: Experiment, source: H5adSource, model: GE2Hist, view: MapView, plane: str
) -> tuple[pd.DataFrame, str, str, str]:
    """Cells with the ``group`` or ``value`` that colours them, which of ``COLOURS`` this is, the value's name and unit,
    and a sentence on them.
    """
    points, recipe = _by_type(source, plane), experiment.recipe
    rows = points["row"].to_numpy()
    if view.colour == "donor" and source.donor is not None:
        return points.assign(group=source.donor[rows]), "donor", "", ""
    if view.colour == "support" and model.support is not None:
        from perturb.charts import SUPPORT

        reference = _reference(recipe, source, model)
        inside = dict(zip(reference.cell_id, model.support.p(reference.embedding) >= OUTSIDE, strict=True))
        names = {True: SUPPORT[0], False: SUPPORT[1], None: SUPPORT[2]}
        groups = [names[None if (one := inside.get(cell)) is None else bool(one)] for cell in source.cell_id[rows]]
        n = sum(not one for one in inside.values())
        return (
            points.assign(group=groups),
            "support",
            "",
            f"{n} of the {len(inside):,} cells looked at, drawn at random, lie outside the training data (p < 0.05); "
            "of cells like those of training 1 in 20 would.",
        )
    if view.colour == "gene" and view.gene:
        from perturb.cell_map import LOG_UNIT, log_normalised

        count, total = gene_counts(recipe, source, view.gene)
        value = log_normalised(count[rows], total[rows])
        n = int((value > 0).sum())
        unit = LOG_UNIT if source.preview.scale == "counts" else LOG_UNIT.replace("counts", "units")
        shown = points.drop(columns="group").assign(value=value)
        return shown, "gene", f"{view.gene}, {unit}", f"{n:,} of {len(rows):,} cells express {_ui.plain(view.gene)}."
    return points, "type", "", ""


def _reference(recipe: Recipe, source: H5adSource, model: GE2Hist) -> Reference:
    """Some real cells with their embeddings, encoded in view; their places are those of the UMAP, 0 without one."""
    import numpy as np

    from perturb.cell_map import Reference, reference_rows

    rows = reference_rows(source.empty)
    bar, parts = None, []
    for start in range(0, len(rows), CHUNK):
        some_rows = tuple(int(row) for row in rows[start : start + CHUNK])
        key = (source.sha256, recipe.matrix, recipe.gene_column, model.sha256, recipe.encoder_seed)
        parts.append(_embedded(key, some_rows, source, model))
        done = min(start + CHUNK, len(rows))
        if bar is None and done < len(rows):
            bar = st.progress(0.0)
        if bar is not None:
            bar.progress(done / len(rows), text=f"Reading real cells with the encoder: {done} of {len(rows)}")
    if bar is not None:
        bar.empty()
    embedding = np.concatenate(parts)
    known = ~np.isnan(embedding).any(axis=1)  # a cell may express nothing that the encoder knows
    plane = np.zeros((len(source), 2)) if source.umap is None else source.umap
    return Reference(source.cell_id[rows[known]], embedding[known], plane[rows[known]])


@st.cache_data(max_entries=128, show_spinner=False)
def _embedded(key: tuple[Any, ...], rows: tuple[int, ...], _source: H5adSource, _model: GE2Hist) -> Any:
    *_, encoder_seed = key
    with _ui.draft_lock():
        return _model.scgpt.embed(_source.take(rows), encoder_seed, on_empty="nan")


def _moves(experiment: Experiment, source: H5adSource, model: GE2Hist) -> pd.DataFrame:
    recipe = experiment.recipe
    reference = _reference(recipe, source, model)
    with st.spinner("Encoding the edited cell"):
        own = source.umap[[source.index_of(cell) for cell in recipe.cell_ids]]
        return _shifts(recipe.hash, recipe, model, _ui.get_cells(recipe, source), reference, own)


@st.cache_data(max_entries=32, show_spinner=False)
def _shifts(
    recipe_hash: str, _recipe: Recipe, _model: GE2Hist, _cells: Cells, _reference: Reference, _own: Any
) -> pd.DataFrame:
    from perturb.cell_map import shifts

    network: Network | None = _ui.network_of(_recipe)
    with _ui.draft_lock():
        return shifts(_recipe, _model, _cells, _reference, _own, network)


def _figure(
    experiment: Experiment, source: H5adSource, plane: str, points: pd.DataFrame, kind: str, value: str, moves: Any
) -> Any:
    from perturb.charts import cell_map

    xy = source.xy if plane == "section" else source.umap
    rows = points["row"].to_numpy()
    drawn = set(rows.tolist())
    of_plane = {cell: source.index_of(cell) for cell in experiment.recipe.cell_ids}
    if plane == "section":  # not the places of another donor's section
        of_plane = {cell: row for cell, row in of_plane.items() if row in drawn}
    chosen = list(of_plane.values())
    unit = {"um": " (µm)", "px": " (pixels)"}.get(source.preview.position_unit or "", "") if plane == "section" else ""
    figure = cell_map(
        points.assign(cell_id=source.cell_id[rows], x=xy[rows, 0], y=xy[rows, 1]),
        {"cell_id": list(of_plane), "x": xy[chosen, 0], "y": xy[chosen, 1]},
        colour=kind,
        value=value,
        axes=(f"x{unit}", f"y{unit}") if plane == "section" else ("UMAP 1", "UMAP 2"),
        downwards=plane == "section",
        moves=moves,
        theme=_ui.theme(),
    )
    donor = _section_shown(source, plane)
    store = _ui.as_store(source)
    if donor is not None and store is not None and st.session_state.get("map picture", True):
        from ge2hist_core.section_picture import section_size_um
        from perturb.section_chart import lay_under

        size_um = section_size_um(store.path, donor, store.um_per_px)
        return lay_under(figure, _ui.section_picture(store, donor), size_um)
    return figure
