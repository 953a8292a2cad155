"""Pictures for a chosen cell type and environment, and the way from one cell to another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from pages import _ui
from perturb.colours import colour_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ge2hist_core.data import H5adSource
    from ge2hist_core.gallery import Gallery
    from ge2hist_core.model import GE2Hist
    from pages._experiment import Experiment
    from perturb.run import Progress

ENVIRONMENTS = ("The prior", "The chosen cell", "Along an axis")
PARTS = {"z_e": "Environment alone", "z_c": "Identity alone", "both": "Both"}
STEPS = 5


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
        gallery = _grid(model, opened) if what == "Grid" else _way(model, opened)
        if gallery is not None:
            _gallery(gallery, model)
    if opened is not None:
        _ui.write_address(opened[0])


def _grid(model: GE2Hist, opened: tuple[Experiment, H5adSource] | None) -> Gallery | None:
    from ge2hist_core.gallery import Gallery, axis_environments, cell_types, prior_environments

    left, right, last = st.columns([2.4, 1.4, 1])
    types = left.multiselect("Cell types", model.cell_types, model.cell_types[:4], key="gallery types")
    kinds = ENVIRONMENTS if opened is not None else (ENVIRONMENTS[0], ENVIRONMENTS[2])
    kind = right.selectbox("Environments from", kinds, key="gallery environments")
    seed = int(last.number_input("Seed", 0, 2**31, 0, key="gallery seed", help="Of the noise and of what is drawn."))
    if kind == ENVIRONMENTS[0]:
        titles, z_e = prior_environments(model, STEPS, seed)
    elif kind == ENVIRONMENTS[2]:
        axis = right.number_input(
            "Axis", 1, model.config.d_e, 1, key="gallery axis", help="1: the axis along which z_e varies most."
        )
        titles, z_e = axis_environments(model, int(axis) - 1)
    else:
        assert opened is not None
        cell, z_e = _states(opened, model, [opened[0].recipe.cell_ids[0]])
        titles = (f"as {cell[0]}",)
    if not types:
        st.caption("Choose at least one cell type.")
        return None
    return Gallery(tuple(types), titles, cell_types(model, types, seed), z_e, seed)


def _states(opened: tuple[Experiment, H5adSource], model: GE2Hist, names: list[str]) -> tuple[list[str], Any]:
    experiment, source = opened
    cells = source.take([source.index_of(name) for name in names])
    return names, model.encode(model.embed(cells, experiment.recipe.encoder_seed)).z_e


def _way(model: GE2Hist, opened: tuple[Experiment, H5adSource] | None) -> Gallery | None:
    from ge2hist_core.gallery import Gallery, between

    if opened is None:
        st.info("There are no cells here yet: upload an `.h5ad` file on the Explore page first.")
        return None
    experiment, source = opened
    left, middle, right = st.columns([1.2, 1.2, 1])
    first = experiment.recipe.cell_ids[0]
    left.text_input("From cell", first, disabled=True, help="The cell of the Explore page.")
    others = [name for name in source.cell_id[~source.empty][:2000].tolist() if name != first]
    if not others:
        st.caption("These data have a single cell: there is no other to go to.")
        return None
    other = middle.selectbox("To cell", others, key="gallery other")
    part = right.selectbox("What changes", list(PARTS), key="gallery part", format_func=PARTS.__getitem__)
    seed = int(st.number_input("Seed", 0, 2**31, 0, key="gallery seed", width=140))
    cells = source.take([source.index_of(name) for name in (first, other)])
    latent = model.encode(model.embed(cells, experiment.recipe.encoder_seed))
    way = between(latent.take([0]), latent.take([1]), STEPS, part)
    titles = tuple(f"{100 * i // (STEPS - 1)} %" for i in range(STEPS))
    return Gallery(titles, titles, way.z_c, way.z_e, seed, paired=True)


def _gallery(gallery: Gallery, model: GE2Hist) -> None:
    key = gallery.hash(model.sha256)
    stored = _ui.get_cache().load_arrays(key)
    if stored is not None:
        _show(gallery, model, stored["images"])
        return
    if _ui.under_way(key):
        return
    st.button(
        f"Draw {len(gallery.latent)} pictures",
        type="primary",
        icon=":material/play_arrow:",
        key="draw gallery",
        on_click=_ui.safely(_submit),
        args=(key, gallery, model),
    )


def _submit(key: str, gallery: Gallery, model: GE2Hist) -> None:
    cache = _ui.get_cache()

    def work(on_progress: Callable[[Progress], None], cancel: Any) -> None:
        from ge2hist_core.gallery import draw
        from perturb.run import Progress

        def on_step(i: int, n: int, _: Any) -> bool:
            on_progress(Progress(i / n, "Drawing"))
            return cancel.is_set()

        cache.store_arrays(key, {"images": draw(gallery, model, on_step)})

    _ui.get_worker().submit(key, work, _ui.owner())


def _show(gallery: Gallery, model: GE2Hist, images: Any) -> None:
    from ge2hist_core.gallery import readouts

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
    table = readouts(gallery, model, images)
    if nearest is not None:
        st.caption(
            "Distance: root mean square over z_c and z_e in standard deviations of the real tiles; about 1.4 lies "
            "between two unrelated cells."
        )
    st.dataframe(table, hide_index=True)
    st.caption(
        "One picture each, nuclei read from it: density in cells/mm², spacing in µm, shares as fractions. A single "
        "draw says little about a type; change the seed to see others."
    )
    st.download_button("Table (CSV)", _ui.csv(table), "cell_types.csv", "text/csv", key="download gallery")


with _ui.guard():
    page()
