"""Pictures for a chosen cell type and environment, and the way from one cell to another."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from pages import _tables, _ui
from pages._cells import LISTED_CELLS
from perturb.colours import colour_of

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.gallery import Gallery
    from ge2hist_core.model import GE2Hist
    from pages._experiment import Experiment
    from perturb.types_grid import TypesGrid

ENVIRONMENTS = {"prior": "The prior", "cells": "The chosen cell", "axis": "Along an axis"}
PARTS = {"z_e": "Environment alone", "z_c": "Identity alone", "both": "Both"}


def page() -> None:
    model = _ui.get_model()
    opened = _ui.open_experiment(model)
    _ui.show_message()
    st.markdown("#### Cell types and environments")
    st.markdown(
        "Here no expression is read: the identity z_c is drawn from a cell type's own distribution, and the "
        "environment z_e is chosen apart from it. All pictures share their noise."
    )
    what = st.segmented_control(
        "What", ("Grid", "Between two cells"), default="Grid", key="gallery kind", label_visibility="collapsed",
        required=True,
    )  # fmt: skip
    with _ui.guard():
        recipe = _grid(model, opened) if what == "Grid" else _way(model, opened)
        if recipe is not None:
            _gallery(recipe, model, opened[1] if opened is not None else None)
    if opened is not None:
        _ui.write_address(opened[0])


def _grid(model: GE2Hist, opened: tuple[Experiment, H5adSource] | None) -> TypesGrid | None:
    from perturb.types_grid import TypesGrid

    left, right, last = st.columns([3.2, 1.2, 0.9])
    types = left.multiselect("Cell types", model.cell_types, model.cell_types[:4], key="gallery types")
    kinds = [name for name in ENVIRONMENTS if opened is not None or name != "cells"]
    kind = right.selectbox("Environments from", kinds, key="gallery environments", format_func=ENVIRONMENTS.__getitem__)
    seed = int(last.number_input("Seed", 0, 2**31, 0, key="gallery seed", help="Of the noise and of what is drawn."))
    axis = 1
    if kind == "axis":
        axis = right.number_input(
            "Axis", 1, model.config.d_e, 1, key="gallery axis", help="1: the axis along which z_e varies most."
        )
    if not types:
        st.caption("Choose at least one cell type.")
        return None
    named = _named(opened, ()) if opened is not None and kind == "cells" else {}
    return TypesGrid(model.sha256, tuple(types), environments=kind, axis=int(axis), seed=seed, **named)


def _named(opened: tuple[Experiment, H5adSource], others: tuple[str, ...]) -> dict[str, Any]:
    """The experiment's first cell and others of its file, as a recipe names them."""
    recipe = opened[0].recipe
    fields = ("data_sha256", "encoder_seed", "matrix", "gene_column")
    return {name: getattr(recipe, name) for name in fields} | {"cell_ids": (recipe.cell_ids[0], *others)}


def _way(model: GE2Hist, opened: tuple[Experiment, H5adSource] | None) -> TypesGrid | None:
    from perturb.types_grid import TypesGrid

    if opened is None:
        st.info("There are no cells here yet: upload an `.h5ad` file on the Explore page first.")
        return None
    experiment, source = opened
    left, middle, right = st.columns([1.2, 1.2, 1])
    first = experiment.recipe.cell_ids[0]
    left.text_input("From cell", first, disabled=True, help="The cell of the Explore page.")
    others = [name for name in source.cell_id[~source.empty][:LISTED_CELLS].tolist() if name != first]
    if not others:
        st.caption("These data have a single cell: there is no other to go to.")
        return None
    other = middle.selectbox("To cell", others, key="gallery other")
    part = right.selectbox("What changes", list(PARTS), key="gallery part", format_func=PARTS.__getitem__)
    seed = int(st.number_input("Seed", 0, 2**31, 0, key="gallery seed", width=140))
    return TypesGrid(model.sha256, part=part, seed=seed, **_named(opened, (other,)))


def _gallery(recipe: TypesGrid, model: GE2Hist, source: H5adSource | None) -> None:
    from perturb.types_grid import draw_types, load_types

    gallery, cache = recipe.gallery(model, source), _ui.get_cache()
    images = load_types(gallery, model, cache)
    label = f"Draw {len(gallery.latent)} pictures" if images is None else None
    prepare = partial(partial, draw_types, gallery, model, cache)
    if not _ui.offer(gallery.hash(model.sha256), label, prepare, name="draw gallery") and images is not None:
        _show(recipe, gallery, model, images)


def _show(recipe: TypesGrid, gallery: Gallery, model: GE2Hist, images: Any) -> None:
    from perturb.types_grid import statistics, zip_bytes

    width = len(gallery.columns)
    real = _ui.get_real_tiles(model)
    beside = real is not None and st.toggle(
        "Nearest real tile beneath each picture",
        key="gallery real",
        help="Of those that the bundle keeps of its training tissue, the one whose cell the model reads most alike.",
    )
    nearest = real.nearest(gallery.latent) if real is not None and beside else None
    for start in range(0, len(images), width):
        row = gallery.titles[start][0]
        if not gallery.paired:
            st.html(
                f"<div class='card-title'><span class='dot' style='background:{colour_of(row)}'></span>"
                f"{_ui.escape(row)}</div>"
            )
        for i, column in enumerate(st.columns(width), start):
            title = gallery.titles[i][1]
            column.image(_ui.picture_png(images[i]), width="stretch", alt=f"Generated H&E niche: {row}, {title}")
            column.caption(_ui.plain(title))
            if real is not None and nearest is not None:
                tile, distance = int(nearest[0][i]), nearest[1][i]
                kind = real.cell_type[tile]
                png = _ui.picture_png(real.images[tile], generated=False)
                column.image(png, width="stretch", alt=f"Real tile around a cell of type {kind}")
                column.caption(f"real: {_ui.plain(kind)}, distance {distance:.2f}")
    table = statistics(gallery, model, images, real if beside else None)
    if nearest is not None:
        st.caption(
            "Distance: root mean square over z_c and z_e in standard deviations of the real tiles; about 1.4 lies "
            "between two unrelated cells."
        )
    names = {"column": "way"} if gallery.paired else {"row": "cell type", "column": "environment"}
    _tables.show((table.drop(columns="row") if gallery.paired else table).rename(columns=names))
    st.caption(
        "One picture each, nuclei read from it: density in cells/mm², spacing in µm, shares as fractions. A single "
        "draw says little about a type; change the seed to see others."
    )
    with st.container(horizontal=True, gap="small", key="gallery downloads"):
        for name, content, file, mime in (
            ("Table (CSV)", lambda: _ui.csv(table), "cell_types.csv", "text/csv"),
            (
                "Everything (ZIP)",
                lambda: zip_bytes(recipe, gallery, model, images, real),
                "cell_types.zip",
                "application/zip",
            ),
        ):
            st.download_button(
                name, content, file, mime, key=f"download {file}", on_click="ignore", icon=":material/download:"
            )


with _ui.guard():
    page()
