"""Below the genes of the Explore page: drug signatures and gene sets, with their dose."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from ge2hist_core.types import BadInput
from pages import _ui
from pages._experiment import Experiment, with_set
from perturb.edits import Edit, EditSet
from perturb.signature_options import LOG_BASES, Reading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ge2hist_core.data import H5adSource
    from perturb.edits import Perturbation
    from perturb.signatures import Signature

DOSES = (-2.0, 2.0)
"""Range of the dose slider; the command line takes -4 to 4."""
LISTED = 5_000
"""Signatures of an uploaded file that can be chosen from a list, at most."""


def signature_panel(experiment: Experiment, genes: Sequence[str]) -> None:
    """Sets in use, and the choice of a further one."""
    for part in experiment.recipe.perturbation.parts:
        if isinstance(part, EditSet):
            with st.container(border=True, key=f"set-{_slug(part.name)}", gap="small"):
                _card(experiment, part, genes)
    with st.expander("Add a drug signature or gene set", icon=":material/medication:"):
        known = known_signatures()
        chosen = st.selectbox(
            "Signature",
            list(known),
            index=None,
            key="signature",
            placeholder="Choose one, or type to search",
            format_func=lambda name: _label(known[name]),
        )
        if chosen is not None:
            _about(known[chosen])
            st.button(
                "Add it at dose 1",
                key="add signature",
                type="primary",
                on_click=_ui.safely(_set_dose),
                args=(experiment, known[chosen], genes, 1.0),
            )
            st.button(
                "Knock all its genes out",
                key="knock out set",
                on_click=_ui.safely(_knock_out),
                args=(experiment, known[chosen], genes),
            )
        upload("Or upload GMT, CSV, TSV, GCT, GCTX or h5ad")


def upload(label: str) -> None:
    """Upload a file of signatures in place of the one before, and say how it is read."""
    uploaded = st.file_uploader(
        label, key=f"signatures {st.session_state.setdefault('signature turn', 0)}", max_upload_size=100
    )
    if uploaded is not None:
        with _ui.guard():
            st.session_state["signature file"] = _save(uploaded)
            st.session_state["signature turn"] += 1
            st.rerun()
    with st.expander("How the file is read"):
        _choose_reading()


def _choose_reading() -> None:
    """Widgets of the current :class:`perturb.signature_options.Reading`; they apply to a file that is here at once."""
    reading = _reading()
    change = {"on_change": _ui.safely(_set_reading)}
    base = next((name for name, value in LOG_BASES.items() if value == reading.base), "2")
    st.session_state["signature padj"] = reading.padj_below
    st.session_state["signature top"] = reading.top
    st.session_state["signature base"] = base
    st.session_state["signature directions"] = reading.direction_only
    st.number_input(
        "Adjusted p-value below",
        0.0,
        1.0,
        value=None,
        step=0.01,
        format="%.4g",
        placeholder="no limit",
        key="signature padj",
        **change,
    )
    st.number_input(
        "Strongest genes, at most",
        1,
        value=None,
        placeholder="all",
        key="signature top",
        help="Of the genes that these data have, by the size of their change.",
        **change,
    )
    st.segmented_control(
        "Base of the logarithm",
        list(LOG_BASES),
        key="signature base",
        required=True,
        help="Of the fold changes. Seurat before version 4 wrote natural logarithms (base e).",
        **change,
    )
    st.toggle(
        "Directions alone",
        key="signature directions",
        help="Every gene changes by the same factor or its inverse, whatever the size of its fold change.",
        **change,
    )


def _reading() -> Reading:
    found: Reading = st.session_state.get("signature reading", Reading())
    return found


def _set_reading() -> None:
    """Take the widgets' choices; a file that cannot be read so keeps the ones before."""
    state = st.session_state
    base, padj, top = LOG_BASES[state["signature base"]], state["signature padj"], state["signature top"]
    reading = Reading(padj, top, None if base == 2 else base, direction_only=bool(state["signature directions"]))
    if (path := _file()) is not None:
        _read(str(path), path.stat().st_mtime_ns, reading)
    state["signature reading"] = reading


def _card(experiment: Experiment, part: EditSet, genes: Sequence[str]) -> None:
    from perturb.signatures import expand

    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center", gap="small"):
        st.markdown(f"**{_ui.plain(part.name)}**")
        st.button(
            ":material/close:",
            help=f"Remove {_ui.plain(part.name)}",
            key=f"drop set {part.name}",
            type="tertiary",
            on_click=experiment.edit,
            args=(with_set(experiment.recipe.perturbation, part.name, None),),
        )
    if all(edit.kind == "ko" for edit in part.edits):
        st.caption(f"All of its {len(part.edits)} genes in these data are knocked out.")
        return
    from perturb.doses import comes_from

    signature = known_signatures().get(part.name)
    if signature is None or part.dose is None or not comes_from(part, signature, genes):
        st.caption(
            f"{len(part.edits)} genes, from a link, a recipe or a file that was read otherwise. Upload its file again, "
            "read as it was, to change the dose."
        )
        return
    low, high = min(DOSES[0], part.dose), max(DOSES[1], part.dose)
    st.session_state[f"dose {part.name}"] = part.dose
    st.slider(
        f"Dose ({signature.dose_unit}); below 0 it is reversed",
        low,
        high,
        step=0.25,
        key=f"dose {part.name}",
        on_change=_ui.safely(_change_dose),
        args=(experiment, signature, genes),
    )
    for sentence in expand(signature, genes, part.dose).sentences:
        st.caption(_ui.plain(sentence))


def _about(signature: Signature) -> None:
    facts = [signature.description, f"{len(signature.genes)} genes"]
    facts += [f"cell line {signature.cell_line}"] * bool(signature.cell_line)
    facts += ["directions only"] * signature.direction_only
    facts += [] if signature.top is None else [f"the {signature.top} strongest act"]
    st.caption(_ui.plain(" · ".join(fact for fact in facts if fact)))
    if signature.source:
        st.caption(f"Source: {_ui.plain(signature.source)}")
    for note in signature.notes:
        st.caption(f":material/warning: {_ui.plain(note)}")


def _label(signature: Signature) -> str:
    return f"{signature.description or signature.name} ({len(signature.genes)} genes)"


def _set_dose(experiment: Experiment, signature: Signature, genes: Sequence[str], dose: float) -> None:
    from perturb.signatures import expand

    edits = expand(signature, genes, dose).perturbation.edits
    # A dose of 0 changes nothing, but the card with its slider has to stay.
    edits = edits or tuple(Edit(gene, "factor", 1.0) for gene in expand(signature, genes, 1.0).matched[:1])
    part = EditSet(signature.name, edits, dose)
    experiment.edit(with_set(experiment.recipe.perturbation, signature.name, part))
    st.session_state["signature"] = None


def _knock_out(experiment: Experiment, signature: Signature, genes: Sequence[str]) -> None:
    from perturb.signatures import expand

    matched = expand(signature, genes, 1.0).matched
    part = EditSet(signature.name, tuple(Edit(gene, "ko") for gene in matched))
    experiment.edit(with_set(experiment.recipe.perturbation, signature.name, part))
    st.session_state["signature"] = None


def _change_dose(experiment: Experiment, signature: Signature, genes: Sequence[str]) -> None:
    _set_dose(experiment, signature, genes, st.session_state[f"dose {signature.name}"])


def known_signatures() -> dict[str, Signature]:
    """The library's signatures and those of the uploaded file, by name."""
    from perturb.signatures import load_library

    return {signature.name: signature for signature in (*load_library(), *uploaded_signatures())}


def uploaded_signatures() -> list[Signature]:
    """Those of the uploaded file, the first 5,000; none without a file."""
    path = _file()
    return [] if path is None else _read(str(path), path.stat().st_mtime_ns, _reading())[:LISTED]


def edits_of_all(source: H5adSource, dose: float, uploaded: bool) -> tuple[Perturbation, ...]:
    """Every signature of the uploaded file, or of the library, that acts on genes of the data, at one dose."""
    path = str(_file()) if uploaded else None  # the file's folder is named by its content
    return _edits_of_all(source.sha256, source.preview.gene_column, path, _reading(), dose, source)


@st.cache_resource(max_entries=8, show_spinner="Looking for the signatures' genes")
def _edits_of_all(
    data: str, gene_column: str, path: str | None, reading: Reading, dose: float, _source: H5adSource
) -> tuple[Perturbation, ...]:
    from perturb.screen import signature_edits

    return signature_edits(list(_source.genes), dose, None if path is None else uploaded_signatures())


def _file() -> Path | None:
    path: Path | None = st.session_state.get("signature file")
    return path if path is not None and path.is_file() else None


@st.cache_resource(max_entries=4, show_spinner="Reading the signatures")
def _read(path: str, changed: int, reading: Reading) -> list[Any]:
    return reading.read(path)


def _save(uploaded: Any) -> Path:
    """Keep an uploaded file under its SHA-256; one that cannot be read goes again."""
    from ge2hist_core.files import atomic_path

    content = uploaded.getvalue()
    path = _ui.home() / "signatures" / hashlib.sha256(content).hexdigest() / _ui.safe_name(uploaded, "signatures")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    try:
        _read(str(path), path.stat().st_mtime_ns, _reading())
    except BadInput:
        path.unlink(missing_ok=True)
        raise
    return path


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)
