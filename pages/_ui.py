"""What the pages share: settings, the only caches, the address, uploads, the worker, errors, downloads."""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

import streamlit as st

from ge2hist_core.types import BadInput
from pages._experiment import Experiment

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource, StoreSource
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.real_tiles import RealTiles
    from ge2hist_core.types import Cells
    from perturb.cache import DiskCache
    from perturb.evidence import Evidence
    from perturb.grn import Network
    from perturb.jobs import JobState, Worker
    from perturb.profile import Profile
    from perturb.recipe import Recipe
    from perturb.result import Result
    from perturb.run import Progress

ROOT = Path(__file__).resolve().parents[1]
SHEET = 64
"""Pictures on a contact sheet, at most."""
ADDRESS = 3000
"""Characters of an address that stand for the experiment, at most; escaped they are up to three times as many."""
SECONDS_PER_PICTURE = 0.25
"""On two cores with the demo bundle, as the text beside an estimate says."""
POLL_S = 0.6
"""Seconds between two looks at a job under way."""
UPLOAD_DAYS = 7
"""Uploaded files, signatures and networks unused for longer are removed; see :func:`prune`."""
LINK_DAYS = 90
"""Edits too long for an address are removed when their link was not used for longer."""

log = logging.getLogger("ge2hist")


# Settings: options of the start and environment variables, see the About page


def start_option(name: str) -> str | None:
    """``--bundle`` or ``--data`` of ``streamlit run app.py -- --bundle DIR --data STORE.zarr``, None if not given."""
    if Path(sys.argv[0]).name != "app.py":  # the arguments are those of another program, such as a test's
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}")
    try:
        return getattr(parser.parse_known_args(sys.argv[1:])[0], name)
    except argparse.ArgumentError:
        raise BadInput(f"The app was started with --{name} and no path: give one after it.") from None


def bundle_folder() -> Path:
    """The bundle that this tab opened, that of ``--bundle``, ``GE2HIST_BUNDLE``, or the demo bundle."""
    opened = st.session_state.get("opened bundle")
    return opened if opened is not None else start_bundle()


DEMO_CELLS = ROOT / "assets" / "demo_cells.h5ad"


def name_of(cells: Path) -> str:
    """What a file of cells is called."""
    return "Demo cells" if cells == DEMO_CELLS else cells.name


def start_bundle() -> Path:
    """The bundle that a new tab has."""
    given = start_option("bundle") or os.environ.get("GE2HIST_BUNDLE")
    return Path(given).expanduser() if given else ROOT / "assets" / "demo_bundle"


def start_cells() -> Path:
    """The cells at the start: those of ``--data``, ``GE2HIST_CELLS``, or the demo cells."""
    given = start_option("data") or os.environ.get("GE2HIST_CELLS")
    return Path(given).expanduser() if given else DEMO_CELLS


def is_there(path: Path) -> bool:
    """Whether cells lie at a path: a file, or a store."""
    return path.is_file() or (path / "zarr.json").is_file()


def home() -> Path:
    """``GE2HIST_HOME``, or a folder of the user's cache: results and uploaded files."""
    return Path(os.environ.get("GE2HIST_HOME", Path.home() / ".cache" / "ge2hist"))


# Errors


@contextmanager
def guard() -> Iterator[None]:
    """Turn what goes wrong inside into one sentence; the cause of an unexpected error goes to the log under an id."""
    _through_app()
    try:
        yield
    except BadInput as error:
        st.error(plain(error), icon=":material/error:")
    except Exception:  # the user must not see a traceback, whatever happened
        number = uuid.uuid4().hex[:8]
        log.exception("error %s", number)
        st.error(
            f"Something went wrong that should not have (id {number}). Your choices are kept in this page's address: "
            "reload it, and if that does not help, send the id and the server's log to whoever runs this app.",
            icon=":material/error:",
        )


def _through_app() -> None:
    """Make Streamlit run this page through ``app.py``.

    Until a fresh server has run ``app.py`` once, it takes ``pages/`` for its own older kind of multipage app: who opens
    the address of a page would see that page alone, under a list of all files.
    """
    from streamlit.runtime.pages_manager import PagesManager

    if PagesManager.uses_pages_directory:
        PagesManager.uses_pages_directory = False
        st.rerun()


def safely(callback: Callable[..., None]) -> Callable[..., None]:
    """The same widget callback, whose bad input is shown at the top of the next run instead of ending it."""

    def call(*args: Any) -> None:
        try:
            callback(*args)
        except BadInput as error:
            st.session_state["message"] = str(error)

    return call


def show_message() -> None:
    """The sentence that a callback or the address left, once."""
    if message := st.session_state.pop("message", ""):
        st.warning(plain(message), icon=":material/warning:")


def plain(text: object) -> str:
    """Text of users and files for Markdown: nothing in it is taken for formatting."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|$~:])", r"\\\1", str(text))


def escape(text: object) -> str:
    """Text of users and files for HTML."""
    return html.escape(str(text))


# Model, data, results: the only caches


def get_model() -> GE2Hist:
    """The model of the bundle folder; without one the page ends with a sentence on how to get it."""
    _bundle_of_address()
    folder = bundle_folder()
    if not (folder / "bundle.json").is_file():
        no_model(folder)
    return load_model(folder)


def load_model(folder: Path) -> GE2Hist:
    """The model of a bundle folder; the last few stay open, shared by all tabs.

    Raises
    ------
    BadInput: the bundle is damaged or gone.
    """
    header = folder / "bundle.json"
    if not header.is_file():
        raise BadInput(f"{folder} is no bundle (no bundle.json): give a folder that `train` wrote.")
    with st.spinner("Opening the model"):
        return _model(str(folder), header.stat().st_mtime_ns)


def _bundle_of_address() -> None:
    """Open the bundle that a new tab's address names, where it was opened on this server by its path."""
    if "bundle looked up" in st.session_state:
        return
    st.session_state["bundle looked up"] = True
    path = recall("bundles", st.query_params.get("model", ""))
    if path is not None and (path / "bundle.json").is_file():
        st.session_state["opened bundle"] = path


def remember(kind: str, sha256: str, path: Path) -> None:
    """Note where something lies that was opened by its path (``bundles``, ``opened``), for links to it."""
    from ge2hist_core.files import write_json

    write_json(home() / kind / f"{sha256}.json", {"path": str(path)})


def recall(kind: str, digits: str) -> Path | None:
    """Where what begins with these digits of its SHA-256 was opened, None if nowhere or not allowed to be."""
    if os.environ.get("GE2HIST_OPEN", "1") == "0" or not re.fullmatch(r"[0-9a-f]{12,64}", digits):
        return None
    for note in (home() / kind).glob(f"{digits}*.json"):
        with suppress(FileNotFoundError):
            note.touch()
            return Path(json.loads(note.read_text(encoding="utf-8"))["path"])
    return None


@st.cache_resource(max_entries=3, show_spinner=False)
def _model(folder: str, changed: int) -> GE2Hist:
    from ge2hist_core.model import GE2Hist

    return GE2Hist.load(folder)


def no_model(folder: Path) -> NoReturn:
    """The empty state without a model."""
    from pages._open import open_panel

    show_message()
    with st.sidebar:
        open_panel(None)
    with st.container(border=True, key="empty-model"):
        st.subheader("No model bundle found")
        st.markdown(
            f"There is no trained model in `{folder}`. Train one on simulated tissue, or set the environment variable "
            "`GE2HIST_BUNDLE` to a folder that `train` wrote, then reload this page."
        )
        st.code(
            "python -m ge2hist_core simulate --donors 16 --seed 0 tissue.zarr\n"
            "python -m ge2hist_core pretrain tissue.zarr --out scgpt\n"
            "python -m ge2hist_core train tissue.zarr --scgpt scgpt --out assets/demo_bundle\n"
            "python -m ge2hist_core train-reader tissue.zarr --out assets/demo_bundle",
            language="bash",
        )
    st.stop()


def get_source(path: Path, model: GE2Hist, matrix: str | None = None, gene_column: str | None = None) -> H5adSource:
    """The cells of a file, looked over once; shared by all pages."""
    if not is_there(path):
        raise BadInput(f"{path.name} is no longer there: open or upload it again.")
    changed = (path / "zarr.json" if path.is_dir() else path).stat().st_mtime_ns
    with st.spinner(f"Reading {path.name}"):
        source = _source(str(path), changed, model.sha256, matrix, gene_column, model)
    _read_as()[source] = (matrix, gene_column)
    return source


@st.cache_resource(show_spinner=False)
def _read_as() -> WeakKeyDictionary[H5adSource, tuple[str | None, str | None]]:
    """Which matrix and gene column each open file was asked for."""
    return WeakKeyDictionary()


@st.cache_resource(max_entries=4, show_spinner=False)
def _source(
    path: str, changed: int, model_sha256: str, matrix: str | None, gene_column: str | None, _model: GE2Hist
) -> H5adSource:
    from ge2hist_core.data import open_cells

    return open_cells(path, _model.scgpt.vocab, matrix=matrix, gene_column=gene_column)


def get_cells(recipe: Recipe, source: H5adSource) -> Cells:
    """The recipe's cells and others of their types.

    Raises
    ------
    BadInput: a source that is another file than the recipe's, or was read otherwise.
    """
    if source.sha256 != recipe.data_sha256:
        raise BadInput(
            f"The recipe was made with data {recipe.data_sha256[:12]}, but {source.path.name} is "
            f"{source.sha256[:12]}: open the recipe's file."
        )
    if _read_as().get(source) != (recipe.matrix, recipe.gene_column):
        raise BadInput(
            f"{source.path.name} is not open with the recipe's matrix ({recipe.matrix or 'automatic'}) and gene column "
            f"({recipe.gene_column or 'automatic'}): open it with those."
        )
    return _cells(recipe.data_sha256, recipe.matrix, recipe.gene_column, recipe.cell_ids, source)


@st.cache_resource(max_entries=16, show_spinner=False)
def _cells(
    data: str, matrix: str | None, gene_column: str | None, cell_ids: tuple[str, ...], _source: H5adSource
) -> Cells:
    from perturb.run import cells_for

    return cells_for(_source, cell_ids)


def get_profile(recipe: Recipe, model: GE2Hist, source: H5adSource) -> Profile:
    """The recipe's first cell before any edit."""
    first = recipe.base.draft
    return _profile(first.hash, recipe.encoder_seed, get_cells(first, source), model)


@st.cache_resource(max_entries=64, show_spinner=False)
def _profile(recipe_hash: str, seed: int, _cells: Cells, _model: GE2Hist) -> Profile:
    from perturb.profile import profile

    return profile(_cells, _model, seed)


def get_edits(recipe: Recipe, model: GE2Hist, source: H5adSource) -> dict[str, dict[str, Any]]:
    """What the encoder sees of each edited gene of the first cell; see :func:`perturb.tables.edit_table`."""
    return _edits(recipe.hash, recipe, model, get_cells(recipe, source), network_of(recipe))


@st.cache_data(max_entries=64, show_spinner=False)
def _edits(
    recipe_hash: str, _recipe: Recipe, _model: GE2Hist, _cells: Cells, _network: Network | None
) -> dict[str, dict[str, Any]]:
    from perturb.run import edited_cells
    from perturb.tables import edit_table

    first = _cells.take([0])
    edited = edited_cells(_recipe.draft, first, _cells, _network)[0]
    table = edit_table(_recipe.perturbation, first, _model, _recipe.encoder_seed, _cells, edited)
    return table.drop(columns="cell_id").set_index("gene").to_dict("index")


@st.cache_resource(show_spinner=False)
def draft_lock() -> threading.Lock:
    """Drafts are drawn one after the other: two at once would each take twice as long and twice the memory."""
    return threading.Lock()


@st.cache_resource(show_spinner=False)
def get_worker() -> Worker:
    """The one worker of this server."""
    from perturb.jobs import Worker

    return Worker(max_queue=32)


def get_cache() -> DiskCache:
    """Where results are kept."""
    from perturb.cache import DiskCache

    return DiskCache(home() / "results")


def get_result(recipe: Recipe) -> Result | None:
    """A finished result, or None."""
    try:
        return _result(recipe.hash, str(home()))
    except LookupError:
        return None


@st.cache_resource(max_entries=8, show_spinner=False)
def _result(recipe_hash: str, folder: str) -> Result:
    from perturb.result import load_result

    found = load_result(recipe_hash, get_cache())
    if found is None:
        raise LookupError(recipe_hash)  # errors are not cached: it may be there the next time
    return found


def networks_folder() -> Path:
    """Where networks that were fitted or uploaded are kept by their hash."""
    return home() / "networks"


def get_network(digits: str | None) -> Network | None:
    """The network whose SHA-256 begins with ``digits``, None for None.

    Raises
    ------
    BadInput: no such network here.
    """
    return None if digits is None else _network(digits, str(networks_folder()))


@st.cache_resource(max_entries=16, show_spinner=False)
def _network(digits: str, folder: str) -> Network:
    from perturb.networks import kept_network

    return kept_network(digits, Path(folder))


def network_of(recipe: Recipe) -> Network | None:
    """The network that a recipe spreads its edits through."""
    return get_network(recipe.propagation.network_sha256 if recipe.propagation is not None else None)


def draw(recipe: Recipe, model: GE2Hist, source: H5adSource, on_progress: Callable[[Progress], None]) -> Result:
    """The result of a recipe, drawn here and now if it is not at hand. Fit for one seed; one draft at a time."""
    from perturb.run import run

    if (found := get_result(recipe)) is None:
        with draft_lock():
            network = network_of(recipe)
            run(recipe, model, get_cells(recipe, source), network=network, cache=get_cache(), on_progress=on_progress)
        found = get_result(recipe)
    if found is None:
        raise BadInput(f"The result could not be kept in {home()}: free some disk space there.")
    return found


@st.cache_data(max_entries=512, show_spinner=False)
def tile_png(recipe_hash: str, arm: str, picture: int, view: str, types: tuple[str, ...], _result: Result) -> bytes:
    """One picture as PNG of some 512 px: ``view`` is ``picture``, ``nuclei`` (of these types) or ``difference``."""
    from perturb import pictures

    niche = getattr(_result, arm)[picture]
    scale = max(1, 512 // len(niche.image))
    if view == "difference":
        image = pictures.difference(_result.base[picture], _result.edited[picture], scale)
    elif view == "nuclei":
        nuclei = getattr(_result, f"{arm}_nuclei")[picture]
        image = pictures.overlay(niche, nuclei[nuclei["cell_type"].isin(types)], scale)
    else:
        image = pictures.show(niche, scale)
    return pictures.png_bytes(image, {"generated": "true", "recipe_sha256": recipe_hash})


@st.cache_data(max_entries=32, show_spinner=False)
def sheet_png(recipe_hash: str, arm: str, _result: Result) -> bytes:
    """All seeds of an arm on one sheet, as PNG."""
    from perturb import pictures

    sheet = pictures.contact_sheet(getattr(_result, arm)[:SHEET], columns=4)
    return pictures.png_bytes(sheet, {"generated": "true", "recipe_sha256": recipe_hash})


@st.cache_data(max_entries=16, show_spinner=False)
def frame_pngs(recipe_hash: str, arm: str, _result: Result, _model: GE2Hist) -> list[bytes]:
    """The first picture of an arm while it was denoised, as PNGs."""
    from perturb import pictures
    from perturb.run import replay

    frames = replay(getattr(_result, f"{arm}_arm"), _model)
    origin = {"generated": "true", "recipe_sha256": recipe_hash}
    return [pictures.png_bytes(enlarged(frame), origin) for frame in frames]


def enlarged(image: Any) -> Any:
    """A picture under way, about 512 px wide and marked as generated."""
    from ge2hist_core.types import Niche
    from perturb import pictures

    return pictures.show(Niche(image, 1.0, generated=True), max(1, 512 // len(image)))


def picture_png(image: Any, generated: bool = True) -> bytes:
    """One picture of some 256 px as PNG; a generated one is marked in its pixels and its metadata."""
    from ge2hist_core.types import Niche
    from perturb import pictures

    shown = pictures.show(Niche(image, 1.0, generated=generated), max(1, 256 // len(image)))
    return pictures.png_bytes(shown, {"generated": str(generated).lower()})


def get_real_tiles(model: GE2Hist) -> RealTiles | None:
    """Real tiles kept in the bundle, or None."""
    return _real_tiles(model.sha256, model)


@st.cache_resource(max_entries=3, show_spinner=False)
def _real_tiles(model_sha256: str, _model: GE2Hist) -> RealTiles | None:
    from ge2hist_core.real_tiles import load

    return load(_model)


def get_evidence(result: Result, model: GE2Hist, source: H5adSource) -> tuple[Evidence, bool]:
    """The evidence on a comparison that is at hand, and whether all of it was gathered."""
    from perturb.evidence import kept

    cells = get_cells(result.recipe, source)
    return _at_hand(result.recipe.hash, kept(result, model, cells, get_cache()), result, model, cells)


@st.cache_resource(max_entries=16, show_spinner=False)
def _at_hand(
    recipe_hash: str, there: tuple[str, ...], _result: Result, _model: GE2Hist, _cells: Cells
) -> tuple[Evidence, bool]:
    from perturb.evidence import at_hand

    return at_hand(_result, _model, _cells, get_cache())


def report_html(result: Result, evidence: Evidence | None) -> str:
    """The report as one page."""
    told = () if evidence is None else (*evidence.parts, "without", *evidence.missing.items())
    return _report_html(result.recipe.hash, told, result, evidence)


@st.cache_data(max_entries=4, show_spinner=False)
def _report_html(recipe_hash: str, told: tuple[object, ...], _result: Result, _evidence: Evidence | None) -> str:
    from perturb.report import html as report

    return report(_result, _evidence)


# Data files


def safe_name(uploaded: Any, otherwise: str) -> str:
    """Name of an uploaded file as letters, digits, ``_``, ``-`` and ``.``, without a folder or a leading dot."""
    return re.sub(r"[^\w.-]+", "_", Path(uploaded.name).name).strip("._")[-80:] or otherwise


def save_upload(uploaded: Any) -> Path:
    """Put an uploaded file on disk under its SHA-256, where it is read block by block."""
    folder = home() / "uploads"
    digest = hashlib.sha256()
    for block in _blocks(uploaded):
        digest.update(block)
    path = folder / digest.hexdigest() / safe_name(uploaded, "cells.h5ad")
    if not path.exists():
        from ge2hist_core.files import atomic_path

        with atomic_path(path) as temporary, temporary.open("wb") as out:
            out.writelines(_blocks(uploaded))
    os.utime(path.parent)
    return path


def in_use(recipe: Recipe, path: Path) -> None:
    """Note that a recipe's file and network are used, and the tab's signatures: :func:`prune` leaves them."""
    used = [path.parent] if path.parent.parent == home() / "uploads" else []
    if recipe.propagation is not None:
        used.append(networks_folder() / f"{recipe.propagation.network_sha256}.json")
    if (signatures := st.session_state.get("signature file")) is not None:
        used.append(signatures.parent)
    for one in used:
        with suppress(FileNotFoundError):
            os.utime(one)


def prune() -> None:
    """Remove uploads, signatures and networks unused for ``UPLOAD_DAYS`` days, edits of links after ``LINK_DAYS``."""
    days = dict.fromkeys(("uploads", "signatures", "networks", "sections"), UPLOAD_DAYS)
    days |= dict.fromkeys(("links", "bundles", "opened"), LINK_DAYS)
    for kind in days:
        oldest = time.time() - days[kind] * 86400
        for path in (home() / kind).glob("*"):
            with suppress(FileNotFoundError):  # another session may have removed it
                if path.stat().st_mtime >= oldest:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


@st.cache_resource(ttl=3600, max_entries=4, show_spinner=False)
def _prune_hourly(folder: str) -> None:
    prune()


def drop_upload(path: Path) -> None:
    """Remove an uploaded file that cannot be used."""
    shutil.rmtree(path.parent, ignore_errors=True)


def _blocks(uploaded: Any) -> Iterator[bytes]:
    uploaded.seek(0)
    while block := uploaded.read(1 << 22):
        yield block


def find_data(digits: str, model: GE2Hist) -> Path:
    """The cells whose SHA-256 begins with ``digits``, among the demo cells and what was uploaded or opened by path.

    Raises
    ------
    BadInput: no such file here.
    """
    if is_there(start_cells()) and get_source(start_cells(), model).sha256.startswith(digits):
        return start_cells()
    if (path := recall("opened", digits)) is not None and is_there(path):
        return path
    if re.fullmatch(r"[0-9a-f]{12,64}", digits):
        for folder in (home() / "uploads").glob(f"{digits}*"):
            for path in folder.glob("[!.]*"):
                return path
    raise BadInput(f"The cells of this link (data={digits[:12]}) are not here: upload their file first.")


# Sections of a store


def as_store(source: H5adSource) -> StoreSource | None:
    """The source where it is a store, whose sections have pictures, else None."""
    from ge2hist_core.data import StoreSource

    return source if isinstance(source, StoreSource) else None


def section_picture(source: StoreSource, donor: str) -> Any:
    """A section's H&E, small; uint8 ``[h, w, 3]``. Computed once and kept on disk."""
    from ge2hist_core.section_picture import kept_overview

    name = hashlib.sha256(f"{source.sha256} {donor}".encode()).hexdigest()[:32]
    path = home() / "sections" / f"{name}.png"
    if path.is_file():
        return kept_overview(source.path, donor, path)
    bar = st.progress(0.0, text="Reading the section's picture, once")
    found = kept_overview(source.path, donor, path, lambda share: bar.progress(share))
    bar.empty()
    return found


def real_tile(source: H5adSource, cell_id: str, model: GE2Hist) -> Any:
    """The real tile of a cell of a store at the model's scale, None where there is none."""
    from ge2hist_core.section_picture import real_tile as tile

    store = as_store(source)
    if store is None or store.xy is None or store.donor is None:
        return None
    row, config = store.index_of(cell_id), model.config
    x, y = (float(value) for value in store.xy[row])
    side_um = config.tile_px * config.um_per_px
    return tile(store.path, str(store.donor[row]), (x, y), store.um_per_px, side_um, config.tile_px)


# The experiment of this tab, and its address


def open_experiment(model: GE2Hist) -> tuple[Experiment, H5adSource] | None:
    """This tab's experiment and its cells: from the session, from the address, or the first demo cell.

    None where there is neither a demo file nor an upload.
    """
    query = dict(st.query_params)
    known = st.session_state.get("experiment")
    # Changing the page clears the address; going back, or editing it by hand, leaves another one than was written.
    if (query.get("cell") or query.get("kept")) and query != st.session_state.get("query"):
        try:
            known = _from_query(_whole(query), model)
        except BadInput as error:
            st.session_state["message"] = str(error)
    if known is not None and not is_there(known.path):
        st.session_state["message"] = f"{known.path.name} is no longer here: open or upload it again."
        known = None
    if known is None:
        if not is_there(start_cells()):
            return None
        known = new_experiment(start_cells(), model)
    source = get_source(known.path, model, known.recipe.matrix, known.recipe.gene_column)
    # The bundle was trained again, or the file replaced, meanwhile.
    known.recipe = replace(known.recipe, model_sha256=model.sha256, data_sha256=source.sha256)
    st.session_state["experiment"] = known
    in_use(known.recipe, known.path)
    _prune_hourly(str(home()))
    return known, source


def write_address(experiment: Experiment, more: dict[str, str] | None = None) -> None:
    """Put the experiment, and what else the page needs, into the page's address."""
    query = _short(experiment.query() | (more or {}))
    st.session_state["query"] = query
    if dict(st.query_params) != query:
        st.query_params.from_dict(query)


def _short(query: dict[str, str]) -> dict[str, str]:
    """The same, its long parts kept on disk where it is too long for an address."""
    if sum(len(name) + len(value) for name, value in query.items()) <= ADDRESS:
        return query
    from ge2hist_core.files import write_json

    long = {name: value for name, value in query.items() if len(value) > ADDRESS // 10}
    digits = hashlib.sha256(repr(sorted(long.items())).encode()).hexdigest()[:32]
    path = home() / "links" / f"{digits}.json"
    if path.is_file():
        path.touch()
    else:
        write_json(path, long)
    return {name: value for name, value in query.items() if name not in long} | {"kept": digits}


def _whole(query: dict[str, str]) -> dict[str, str]:
    """Inverse of :func:`_short`.

    Raises
    ------
    BadInput: what was kept is not here.
    """
    digits = query.get("kept")
    if digits is None:
        return query
    path = home() / "links" / f"{digits}.json"
    if not re.fullmatch(r"[0-9a-f]{32}", digits) or not path.is_file():
        raise BadInput(
            "The edits of this link are kept on the server that made it: open the report's recipe.json here."
        )
    return query | json.loads(path.read_text(encoding="utf-8"))


def _from_query(query: dict[str, str], model: GE2Hist) -> Experiment:
    from perturb.recipe import Recipe

    path = find_data(query.get("data", ""), model)
    source = get_source(path, model, query.get("matrix") or None, query.get("gene_column") or None)
    recipe = Recipe.from_query(
        query, source.sha256, model.sha256, lambda digits: _network(digits, str(networks_folder()))
    )
    genes = tuple(gene for gene in Experiment.idle_genes(query) if gene in set(source.genes))
    check_recipe(recipe, source)
    return Experiment(recipe, path, genes)


def check_recipe(recipe: Recipe, source: H5adSource) -> None:
    """Refuse a recipe whose cells, genes or percentiles the file does not have, or whose network is not here."""
    network_of(recipe)
    cells = get_cells(recipe, source)
    recipe.perturbation.apply(cells.take(slice(len(recipe.cell_ids))), cells)


def new_experiment(path: Path, model: GE2Hist) -> Experiment:
    """The first cell of a file that has counts, unedited."""
    from perturb.recipe import Recipe

    source = get_source(path, model)
    first = str(source.cell_id[int((~source.empty).argmax())])
    return Experiment(Recipe(source.sha256, model.sha256, (first,)), path)


# The worker


def owner() -> str:
    """This tab."""
    return str(st.session_state.setdefault("owner", uuid.uuid4().hex))


def submit(recipe: Recipe, model: GE2Hist, source: H5adSource) -> None:
    """Ask the worker for a recipe."""
    cells, network, cache = get_cells(recipe, source), network_of(recipe), get_cache()

    def work(on_progress: Callable[[Progress], None], cancel: Any) -> None:
        from perturb.run import run

        run(recipe, model, cells, network=network, cache=cache, on_progress=on_progress, cancel=cancel)

    get_worker().submit(recipe.hash, work, owner())
    st.session_state["running"] = recipe


def job(recipe: Recipe) -> JobState | None:
    """How the worker stands with a recipe."""
    return get_worker().state(recipe.hash, owner())


def cancel(recipe: Recipe) -> None:
    """Withdraw this tab's wish."""
    get_worker().cancel(recipe.hash, owner())


def under_way(key: str) -> bool:
    """Shows how a job of the worker stands, polled, while it waits or runs; says why it failed. True while it does."""
    state = get_worker().state(key, owner())
    if state is not None and not state.over:
        st.fragment(_watch, run_every=POLL_S)(key)
        return True
    if state is not None and state.status == "failed":
        st.error(plain(state.message), icon=":material/error:")
    return False


def offer(
    key: str,
    label: str | None,
    prepare: Callable[[], Callable[..., object]],
    *,
    name: str,
    caption: str = "",
    primary: bool = True,
    disabled: bool = False,
) -> bool:
    """A job of the worker on a page: how it stands while it waits or runs, else the button that starts it.

    Parameters
    ----------
    key: hash of what the job makes. label: of the button, None where nothing is left to start.
    prepare: called on a click; what it returns is called in the worker with ``on_progress`` and ``cancel``. Bad input
        that it meets is shown as :func:`safely` does.
    name: the button's widget key. caption: what the work costs, below the button.

    Returns
    -------
    True while the job waits or runs: there is nothing else to show then.
    """
    if under_way(key):
        return True
    if label is not None:
        st.button(
            label,
            type="primary" if primary else "secondary",
            icon=":material/play_arrow:",
            key=name,
            on_click=safely(_submit),
            args=(key, prepare),
            disabled=disabled,
        )
        if caption:
            st.caption(caption)
    return False


def _submit(key: str, prepare: Callable[[], Callable[..., object]]) -> None:
    task = prepare()

    def work(on_progress: Callable[[Progress], None], cancel: threading.Event) -> None:
        task(on_progress=on_progress, cancel=cancel)

    get_worker().submit(key, work, owner())


def csv(table: Any) -> bytes:
    """A table as CSV that no spreadsheet takes for formulas."""
    from perturb.report import csv_bytes

    return csv_bytes(table)


def _watch(key: str) -> None:
    """Place in the queue or progress, and a way to cancel."""
    with guard():
        state = get_worker().state(key, owner())
        if state is None or state.over:
            st.rerun()
        progress = state.progress
        if progress is None:
            text = f"Waiting for {state.position} run(s) before this one" if state.position else "Starting"
            st.progress(0.0, text=text)
        else:
            st.progress(progress.fraction, text=f"{progress.text}: {progress.fraction:.0%}")
        st.button("Cancel", icon=":material/stop_circle:", key=f"cancel {key[:16]}", on_click=_cancel_key, args=(key,))


def _cancel_key(key: str) -> None:
    get_worker().cancel(key, owner())


def theme() -> str:
    """``light`` or ``dark``, as the browser shows the page."""
    return st.context.theme.type or "light"
