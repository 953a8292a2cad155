"""Pick a cell, move its genes, see the niche drawn anew beside the unedited one, from the same noise."""

from __future__ import annotations

import streamlit as st

from ge2hist_core.types import BadInput
from pages import _ui
from pages._cells import cell_panel, data_panel, upload
from pages._genes import gene_panel
from pages._map import map_view
from pages._network import network_panel
from pages._niche import niche_panel
from pages._open import open_panel
from pages._results import results
from pages._signatures import signature_panel

TOUR = """
1. **Choose a cell** on the left: its gene expression, and a noise, decide what is drawn.
2. **Edit genes** beside it, or add a drug signature: the niche is drawn anew from the same noise, so that what differs
   comes from the edit.
3. **Compare over seeds** to see how large the difference is against the noise, and take the report home.
"""


def tour() -> None:
    """Three sentences for who comes without a link, until they are put away."""
    state = st.session_state
    if "toured" not in state:
        state["toured"] = bool(st.query_params.get("cell"))
    slot = st.container()  # stays, so that nothing below moves in the tree when the sentences go
    if not state["toured"]:
        with slot.container(border=True, key="tour", gap="small"):
            st.markdown(TOUR)
            st.button("Got it", key="end tour", on_click=lambda: state.update(toured=True))


def page() -> None:
    model = _ui.get_model()
    opened = _ui.open_experiment(model)
    if opened is None:
        with st.sidebar:
            upload(model)
            open_panel(model)
        _ui.show_message()
        with st.container(border=True, key="empty-data"):
            st.subheader("No cells yet")
            st.markdown("There are no demo cells here. Upload an `.h5ad` file with raw counts on the left to begin.")
        return
    experiment, source = opened
    _ui.show_message()
    tour()
    with st.sidebar:
        data_panel(experiment, source, model)
        try:
            profile = _ui.get_profile(experiment.recipe, model, source)
        except BadInput:  # a cell that the encoder knows nothing of: the way to others has to stay
            cell_panel(experiment, source, model, None)
            raise
        cell_panel(experiment, source, model, profile)
    genes, niche = st.columns([1, 2.35], gap="medium")
    with genes, _ui.guard():
        gene_panel(experiment, profile, _ui.get_edits(experiment.recipe, model, source))
        signature_panel(experiment, source.genes)
        network_panel(experiment, source)
    with niche:
        shown = niche_panel(experiment, source, model, profile)
        if shown is not None:
            with _ui.guard():
                results(shown, model, source)
    _ui.write_address(experiment, map_view().to_query())


with _ui.guard():
    page()
