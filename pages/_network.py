"""Below the genes of the Explore page: let the edits spread to other genes through a network."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from ge2hist_core.types import BadInput
from pages import _tables, _ui
from pages._experiment import Experiment
from pages._gene_search import choose_genes

if TYPE_CHECKING:
    from collections.abc import Callable

    from ge2hist_core.data import H5adSource
    from perturb.grn import Network
    from perturb.result import Result

OFF = ""


def network_panel(experiment: Experiment, source: H5adSource) -> None:
    """Choice of the network and the number of steps; off at first."""
    now = experiment.recipe.propagation
    known = _known()
    if now is not None and now.network_sha256 not in known:
        try:
            known[now.network_sha256] = _ui.get_network(now.network_sha256)
        except BadInput as error:
            st.warning(_ui.plain(error), icon=":material/warning:")
            st.button("Do without the network", key="drop network", on_click=_become, args=(experiment, OFF))
            return
    with st.expander("Let edits spread through a network", expanded=now is not None, icon=":material/hub:"):
        st.session_state["network"] = OFF if now is None else now.network_sha256
        st.selectbox(
            "Network",
            [OFF, *known],
            key="network",
            format_func=lambda sha: _label(known[sha]) if sha else "Off: an edit moves its own genes alone",
            on_change=_ui.safely(_choose),
            args=(experiment,),
        )
        if now is not None:
            st.session_state["network steps"] = now.steps
            st.slider(
                "Edges in a row, at most",
                1,
                10,
                key="network steps",
                on_change=_ui.safely(_choose),
                args=(experiment,),
                help="Each step passes the changes on by one edge. No gene leaves the range that cells of its type "
                "show.",
            )
            network = known[now.network_sha256]
            st.download_button(
                "This network (CSV)", _ui.csv(network.table()), "network.csv", "text/csv", key="download network",
                on_click="ignore",
            )  # fmt: skip
            edges = sum(gene in set(experiment.recipe.perturbation.genes) for gene in network.regulators)
            st.caption(
                f"{edges:,} of {len(network):,} edges start at an edited gene. The same edit is also drawn directly "
                "and through networks of random wiring: only what exceeds those comes from who regulates whom."
            )
        _more(experiment, source)


def _more(experiment: Experiment, source: H5adSource) -> None:
    _fit(experiment, source)
    turn = st.session_state.setdefault("network turn", 0)
    uploaded = st.file_uploader(
        "Or upload a signed network (source, target, weight)",
        type=["csv", "tsv", "txt", "gz", "parquet", "json"],
        key=f"network file {turn}",
        max_upload_size=100,
        help="CollecTRI or DoRothEA as decoupler gives them. Text may be gzipped.",
    )
    if uploaded is not None:
        with _ui.guard():
            network = _read(uploaded)
            _keep(network)
            _become(experiment, network.sha256)
            st.session_state["network turn"] = turn + 1
            st.rerun()


def _fit(experiment: Experiment, source: H5adSource) -> None:
    """Fit a network in the worker; it is chosen when it is done, if this tab still waits for it."""
    from perturb.networks import fit_and_keep, fit_kept, fit_key

    edited = [gene for gene in experiment.recipe.perturbation.genes if gene in set(source.genes)]
    genes = choose_genes(
        "Fit a network to these cells: regulators",
        source,
        f"regulators of {hash(tuple(edited))}",
        edited,
        "Ridge regression of every other gene on these, within cell types and donors. It shows who varies together; "
        "that an edge is causal, it cannot show.",
    )
    folder, cache = _ui.networks_folder(), _ui.get_cache()
    key = fit_key(source, genes)

    def prepare() -> Callable[..., object]:
        st.session_state["network fit"] = key
        return partial(fit_and_keep, source, genes, folder, cache)

    done = fit_kept(source, genes, folder, cache) if genes else None
    if _ui.offer(key, "Fit" if done is None else None, prepare, name="fit network", primary=False, disabled=not genes):
        return
    if done == OFF:
        st.info("No edge is clear enough in these cells: none is kept.")
    elif done is not None:
        _mine(done)
        if st.session_state.get("network fit") == key:
            del st.session_state["network fit"]
            _become(experiment, done)
            st.rerun()
        st.button(
            "Use the fitted network",
            key="use fitted",
            on_click=_ui.safely(_become),
            args=(experiment, done),
            disabled=_chosen(experiment) == done,
        )


def _chosen(experiment: Experiment) -> str:
    now = experiment.recipe.propagation
    return OFF if now is None else now.network_sha256


def _known() -> dict[str, Any]:
    """Networks of this tab by SHA-256: the known truth, and what was fitted or uploaded here and is still kept."""
    from perturb.networks import known_truth

    found = {}
    for sha in (known_truth().sha256, *st.session_state.get("networks", [])):
        try:
            found[sha] = _ui.get_network(sha)
        except BadInput:
            continue
    return found


def _label(network: Network) -> str:
    return f"{network.name} ({len(network):,} edges)"


def _keep(network: Network) -> None:
    from perturb.networks import keep_network

    if not network.signed:
        raise BadInput(f"The network {network.name!r} has edges without sign: fit it to cells on the command line.")
    if not len(network):
        raise BadInput(f"The network {network.name!r} has no edge from one gene to another: give one that has.")
    keep_network(network, _ui.networks_folder())
    _mine(network.sha256)


def _mine(sha256: str) -> None:
    mine = st.session_state.setdefault("networks", [])
    if sha256 not in mine:
        mine.append(sha256)


def _read(uploaded: Any) -> Network:
    from perturb.grn import read_network

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _ui.safe_name(uploaded, "network")
        path.write_bytes(uploaded.getvalue())
        return read_network(path)


def _choose(experiment: Experiment) -> None:
    _become(experiment, st.session_state["network"])


def _become(experiment: Experiment, sha256: str) -> None:
    from perturb.grn import DEFAULT_STEPS, Propagation

    now = None
    if sha256:
        steps = int(st.session_state.get("network steps", DEFAULT_STEPS))
        now = Propagation(sha256, _ui.get_network(sha256).name, steps)
    experiment.recipe = replace(experiment.recipe, propagation=now)


def spread_section(result: Result) -> None:
    """What spreading did: effects of the direct edit, the network and random wiring, and the genes it moved."""
    from perturb import charts

    table = result.spread_effects
    readouts = list(dict.fromkeys(table["readout"]))
    readout = st.selectbox("Readout", readouts, key="spread readout", width=280)
    st.plotly_chart(
        charts.spread(table, readout, _ui.theme()), theme=None, key="spread chart", config=charts.CHART_CONFIG
    )
    st.caption(
        "Networks of random wiring keep how many genes each regulator moves and how strongly, and draw anew which; "
        "another one for each seed. An effect of the network is due to its edges only where it exceeds theirs."
    )
    moved = result.spread
    st.markdown(f"**{moved['gene'].nunique()} genes moved by the network**")
    names = {"before": "direct edit", "after": "network"}
    titles = {f"{what}_{arm}": f"{what}, {name}" for what in ("count", "bin") for arm, name in names.items()}
    _tables.show(moved.rename(columns=titles | {"cell_id": "cell"}), height=240)
    st.download_button("Genes (CSV)", _ui.csv(moved), "spread.csv", "text/csv", key="download spread")
