"""Open a bundle, a store or an ``.h5ad`` that lies on the computer that runs the app, by its path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from ge2hist_core.types import BadInput
from pages import _ui

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist

LISTED = 12
"""Things of a folder that are offered, at most."""
KINDS = {"bundle": "model bundle", "store": "store", "h5ad": "cells"}


def allowed() -> bool:
    """Whether paths may be opened; ``GE2HIST_OPEN=0`` forbids it where the app serves others."""
    return os.environ.get("GE2HIST_OPEN", "1") != "0"


def kind_of(path: Path) -> str | None:
    """Which of ``KINDS`` a path is, None for nothing that can be opened."""
    if path.is_dir():
        if (path / "bundle.json").is_file():
            return "bundle"
        return "store" if (path / "zarr.json").is_file() else None
    return "h5ad" if path.suffix == ".h5ad" and path.is_file() else None


def recognise(text: str) -> tuple[Path, str]:
    """What a user typed, as an absolute path and which of ``KINDS`` it is.

    Raises
    ------
    BadInput: no path, nothing there, or nothing that can be opened.
    """
    if not text.strip() or "\0" in text:
        raise BadInput("No path was given: type that of a bundle, a .zarr store or an .h5ad file.")
    try:
        path = Path(text.strip()).expanduser().resolve()
        there, kind = path.exists(), kind_of(path)
    except (OSError, RuntimeError) as error:  # a name too long, a folder closed to this user, an unknown ~user
        cause = type(error).__name__
        raise BadInput(f"{text.strip()[:80]} cannot be looked at ({cause}): give another path.") from None
    if not there:
        raise BadInput(f"There is no {path} on the computer that runs this app: check the path.")
    if kind is None:
        raise BadInput(
            f"{path} is neither a bundle (a folder with bundle.json), nor a .zarr store, nor an .h5ad file: give one."
        )
    return path, kind


def inside(folder: Path) -> list[Path]:
    """The first things of a folder that can be opened, by name."""
    found = []
    try:
        for path in sorted(folder.iterdir()):
            if not path.name.startswith(".") and kind_of(path):
                found.append(path)
                if len(found) == LISTED:
                    break
    except OSError:
        pass
    return found


def open_panel(model: GE2Hist | None) -> None:
    """A field for a path, and what can be opened in the folder that was typed. ``model``: the one that is open."""
    if not allowed():
        return
    with st.expander("Open a bundle or cells by path", key="open"):
        st.text_input(
            "Path on the computer that runs this app",
            key="open path",
            placeholder="a bundle, a .zarr store, an .h5ad file, or a folder with them",
            on_change=_ui.safely(_open_typed),
            args=(model,),
        )
        typed = st.session_state.get("open folder")
        for i, path in enumerate(inside(typed) if typed is not None else []):
            st.button(
                f"{_ui.plain(path.name)} · {KINDS[kind_of(path) or 'h5ad']}",
                key=f"open {i}",
                on_click=_ui.safely(open_path),
                args=(str(path), model),
            )
        if "opened bundle" in st.session_state:
            st.caption(f"Model of {_ui.plain(_ui.bundle_folder())}, in this tab only.")
            st.button("Back to the model at the start", key="close bundle", on_click=_close_bundle)


def _open_typed(model: GE2Hist | None) -> None:
    text = st.session_state["open path"].strip()
    st.session_state.pop("open folder", None)
    if not text:
        return
    folder = Path(text).expanduser() if not text.startswith("~") or text[1:2] in ("", "/") else Path(text)
    if folder.is_dir() and kind_of(folder) is None and inside(folder):
        st.session_state["open folder"] = folder.resolve()
        return
    open_path(text, model)


def open_path(text: str, model: GE2Hist | None) -> None:
    """Make what lies at a path this tab's model or cells; other tabs keep theirs.

    Raises
    ------
    BadInput: paths may not be opened, or this one cannot.
    """
    if not allowed():
        raise BadInput("This server opens no paths (GE2HIST_OPEN=0): upload an .h5ad file instead.")
    path, kind = recognise(text)
    if kind == "bundle":
        opened = _ui.load_model(path)
        _ui.remember("bundles", opened.sha256, path)
        st.session_state["opened bundle"] = path
        return
    if model is None:
        raise BadInput(f"{path.name} holds cells and there is no model yet: open a bundle first.")
    experiment = _ui.new_experiment(path, model)
    _ui.remember("opened", experiment.recipe.data_sha256, path)
    st.session_state["experiment"] = experiment
    for key in ("type", "cell", "map donor"):
        st.session_state.pop(key, None)


def _close_bundle() -> None:
    st.session_state.pop("opened bundle", None)
