"""What the model is, what it was measured to do, where its data come from, and what it must not be used for."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import streamlit as st

from pages import _ui
from perturb.workspace import MAX_AGE_DAYS

RESULT_DAYS = round(_ui.get_cache().max_age_s / 86400)
LIBRARIES = ("torch", "diffusers", "streamlit", "anndata", "numpy", "scipy", "plotly")

LIMITS = """
- **Not diagnostic.** Every picture here is generated. It is no tissue, and no basis for a decision about a patient.
- A difference between *before* and *after* says how this model's picture depends on a gene's count. What it learnt
  mixes cause and correlation; no perturbed tissue was in its training data.
- The demo bundle was trained on **simulated tissue** with known causes. What it draws for real cells is extrapolation,
  and the app says so where a cell lies outside of the training data.
- The encoder sees ranks of counts within a cell. An edit that changes no rank changes nothing (a *plateau*).
- Nuclei are found and typed in the pictures by a trained reader that miscounts and mistypes some, in both alike.
- Intervals cover the noise of drawing: other seeds, and other cells where several were chosen. They do not cover other
  donors or the model's errors.
- A UMAP has no place for an edited cell: the map's arrow is the difference between the mean places of the real cells
  nearest to it before and after the edit.
- CD4 T, CD8 T and B cells look alike in H&E; the pictures' nuclei are therefore counted as *Lymphocyte*.
"""

PRIVACY = f"""
What you upload stays on the computer that runs this app, under its SHA-256: cells, signatures and networks. Whatever
nobody used for {_ui.UPLOAD_DAYS} days is removed; the app looks for it at most once an hour, when a page is opened.
Results (pictures and numbers) are removed {RESULT_DAYS} days after their last use, and earlier where they fill their
space. Edits too long for an address are kept on this computer until {_ui.LINK_DAYS} days after their link was last
used. Lists of scenarios are removed {MAX_AGE_DAYS} days after they were last saved or opened, when another list is
saved. Whoever has the address of a result or a list can open it on this server; a list that somebody else opens and
changes is saved as a new one, and yours stays as it is. Nothing is sent elsewhere.
"""

SETTINGS = """
| environment variable | meaning | default |
|---|---|---|
| `GE2HIST_BUNDLE` | folder of the model | `assets/demo_bundle` |
| `GE2HIST_CELLS` | store or h5ad that is open at the start | `assets/demo_cells.h5ad` |
| `GE2HIST_OPEN` | `0`: nobody may open a path of this computer | `1` |
| `GE2HIST_HOME` | results, scenarios and uploaded files | `~/.cache/ge2hist` |

`streamlit run app.py -- --bundle DIR --data STORE.zarr` says the first two at the start, before the variables.
"""

LICENCES = """
GE2Hist follows the paper *GE2Hist* (Cai et al., MICCAI 2025) with code of its own. The cell encoder has the
architecture and file layout of scGPT (Cui et al. 2024, doi:10.1038/s41592-024-02201-0); that of the demo bundle was
trained by this project. Colours: Okabe and Ito, Tol.
"""


def _card(folder: Path) -> str:
    """The bundle's card, or one made of its figures; empty without a bundle."""
    from ge2hist_core.model_card import model_card

    card = folder / "MODEL_CARD.md"
    if card.is_file():
        return card.read_text(encoding="utf-8")
    return model_card(folder) if (folder / "bundle.json").is_file() else ""


def page() -> None:
    _ui.show_message()
    st.markdown("#### About this digital twin")
    st.markdown(
        "GE2Hist draws the H&E picture of a cell's surroundings from the cell's gene expression. Here you edit genes "
        "and see the picture drawn anew from the same noise, so that what differs comes from the edit alone."
    )
    st.markdown("##### Limits")
    st.markdown(LIMITS)
    folder = _ui.bundle_folder()
    st.caption(f"The open bundle is {_ui.plain(folder)}.")
    if text := _card(folder):
        # The card's own headings, two levels down: the page has a title already.
        st.markdown(
            re.sub(r"^#+ ", lambda match: "####" + match[0], text, flags=re.MULTILINE).replace("######", "#####")
        )
    else:
        st.markdown("##### Model card")
        st.caption(f"The bundle folder {_ui.plain(folder)} holds no model card.")
    st.markdown("##### Data and privacy")
    st.markdown(PRIVACY)
    sources = _ui.ROOT / "assets" / "SOURCES.md"
    if sources.is_file():
        with st.expander("Origin and licence of what is shipped"):
            st.markdown(sources.read_text(encoding="utf-8"))
    st.markdown("##### Licences")
    st.markdown(LICENCES)
    licence = _ui.ROOT / "LICENSE"
    if licence.is_file():
        with st.expander("Licence of this software"):
            st.text(licence.read_text(encoding="utf-8"))
    st.markdown("##### Settings and versions")
    st.markdown(SETTINGS)
    st.caption(" · ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES))


with _ui.guard():
    page()
