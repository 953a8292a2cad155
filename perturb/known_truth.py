r"""How claims of this kind fare where the truth is known: ``python -m perturb known-truth BUNDLE DATA.zarr``.

On held-out donors of a simulated store, genes are edited in the model and, with the same factors, in the tissue itself
(:mod:`perturb.true_effects`). Four kinds of edits:

- driver programmes: all drivers of a programme at several doses: their true effect is the programme's;
- single drivers, knocked out or at four times their counts: a part of that;
- single reporters: they follow a programme and drive nothing, their true effect on the niche is none;
- single inert genes: none either. What the model makes of them is the null that the others are measured by.

And five ways of making an edit: directly; spread through the tissue's true network; through one fitted to the training
donors' cells with the edited genes as regulators; through one fitted with the tissue's drivers as regulators, as a list
of known regulators would name them; and through networks of random wiring. A model that has learned from observation
answers to reporters too, because it conditions on expression instead of intervening on it: the price is stated as a
rate of false effects, with what lowers it (:func:`perturb.known_truth_summary.summary`).

Effects are those of the niche network (:meth:`GE2Hist.expected_readouts`, no picture), of linear probes on several
descriptions of the cell (:mod:`perturb.encoder_ablation`), and, with ``--pictures``, of drawn pictures through the
whole chain (:mod:`perturb.drawn_truth`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core import rng
from ge2hist_core.types import BadInput, Cells
from perturb.known_truth_summary import ARMS, HELD, ROLES, Case, Effects, rows, summary
from perturb.true_effects import READOUTS, TrueTissue, truth_folder

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore
    from perturb.encoder_ablation import Ablation
    from perturb.grn import Network

__all__ = ["DOSES", "SCHEMA", "cases", "held_out", "measure", "programme_factors"]

SCHEMA = 2
DOSES = (0.0, 0.25, 0.5, 2.0, 4.0)
KNOCKED_OUT, RAISED = 0.0, 4.0
FIT_CELLS = 4000


def programme_factors(programme: str, dose: float) -> dict[str, float]:
    """Factors that push a programme through its drivers: the dose, for those of negative weight one over it.

    Factors stay within 0 to 4, the range of the app: against a knock-out stands 4, against a dose of 4 a knock-out.
    """
    from ge2hist_core.simulator.expression import load_genes

    table = load_genes()
    other = KNOCKED_OUT if dose >= RAISED else min(1.0 / dose, RAISED) if dose > 0 else RAISED
    return {
        gene: dose if table.programme_of(gene)[1] > 0 else other
        for gene in table.drivers
        if table.programme_of(gene)[0] == programme
    }


def cases(per_role: int = 24, seed: int = 0, doses: Sequence[float] = DOSES) -> list[Case]:
    """All driver programmes at every dose; ``per_role`` single drivers and reporters and twice as many inert genes,
    each knocked out and at four times its counts.

    Reporters are as many of each programme; inert genes are drawn among those as highly expressed as reporters.

    Raises
    ------
    BadInput: doses that are no changes or out of the app's range.
    """
    from ge2hist_core.simulator.expression import load_genes
    from ge2hist_core.simulator.programmes import PROGRAMMES

    if not doses or any(not 0 <= dose <= RAISED or dose == 1 for dose in doses):
        raise BadInput(f"--doses is {' '.join(map(str, doses))!r}: give factors from 0 to {RAISED:g} other than 1.")
    found = [
        Case("programme", programme, float(dose), tuple(programme_factors(programme, dose).items()))
        for programme in PROGRAMMES
        for dose in dict.fromkeys(doses)
    ]
    table, draw = load_genes(), rng.stream(seed, "known-truth genes")
    level = table.base.mean(axis=1)
    low, high = np.quantile(level[table.role == "reporter"], (0.1, 0.9))
    for role in ROLES[1:]:
        pool = table.symbols[(table.role == role) & ((role != "inert") | ((level >= low) & (level <= high)))]
        order = draw.permutation(len(pool))
        by_programme: dict[str, list[str]] = {}
        for i in order:
            by_programme.setdefault(table.programme_of(pool[i])[0], []).append(pool[i])
        turns = [
            gene for turn in range(len(pool)) for genes in by_programme.values() for gene in genes[turn : turn + 1]
        ]
        for gene in turns[: per_role * (2 if role == "inert" else 1)]:
            found += [Case(role, gene, factor, ((gene, factor),)) for factor in (KNOCKED_OUT, RAISED)]
    return found


def held_out(model: GE2Hist, store: TissueStore) -> np.ndarray:
    """Rows of cells with a whole tile, of donors that the bundle has not seen."""
    seen = model.has_learned_from(store)
    return store.rows([name for name in store.donors if name not in seen])


@dataclass(frozen=True, eq=False)
class _Spreader:
    """An edit in all ways, for the same cells."""

    some: Cells
    span: tuple[np.ndarray, np.ndarray]
    networks: dict[str, list[Network]]
    """Arm -> one network, or one for each cell."""

    def __call__(self, direct: Cells, arm: str, edited: Iterable[str]) -> Cells:
        """The direct edit spread through the arm's network."""
        from perturb.grn import propagate

        networks, some, edited = self.networks[arm], self.some, list(edited)
        parts = [slice(None)] if len(networks) == 1 else [slice(k, k + 1) for k in range(len(some))]
        counts = [
            sp.csr_matrix(
                propagate(network, some.genes, some.counts[part], direct.counts[part], *self.span, edited=edited).counts
            )
            for network, part in zip(networks, parts, strict=True)
        ]
        return direct.with_counts(sp.vstack(counts, format="csr"))


def measure(
    model: GE2Hist,
    store: TissueStore,
    chosen: Sequence[Case],
    truth: TrueTissue,
    *,
    cells: int = 48,
    seed: int = 0,
    ablation: Ablation | None = None,
    on_case: Callable[[], object] | None = None,
) -> Effects:
    """Make every edit in the model, in all ways, and in the tissue; no picture is drawn.

    Parameters
    ----------
    truth: of the same store; what it does not hold yet is simulated here, in this process.
    cells: of held-out donors, drawn at random among those with a whole tile.
    ablation: adds effects through its probes, and an arm whose programmes are held.

    Which edited cells are outside the data is said by the bundle's gates, without them by the embedding's alone.

    Raises
    ------
    BadInput: too few held-out cells.
    """
    from perturb.grn import fit_network, observed_range, randomised
    from perturb.networks import known_truth

    pool = held_out(model, store)
    if len(pool) < cells or cells < 2:
        raise BadInput(f"--cells is {cells}, the held-out donors have {len(pool)} whole tiles: give 2 to {len(pool)}.")
    picked = np.sort(rng.stream(seed, "known-truth cells").choice(pool, cells, replace=False))
    some = store.cells.take(picked)
    learned = store.rows(sorted(model.has_learned_from(store, ("train",))), interior=False)
    sample = store.cells.take(np.sort(rng.stream(seed, "known-truth fit").permutation(learned)[:FIT_CELLS]))
    network = known_truth()
    fitted = fit_network(sample, sorted({gene for case in chosen for gene, _ in case.factors}))
    spreader = _Spreader(
        some,
        observed_range(store.cells.take(pool[:FIT_CELLS])),
        {
            ARMS[1]: [network],
            ARMS[2]: [fitted],
            ARMS[3]: [fit_network(sample, list(dict.fromkeys(network.regulators)))],
            # Another wiring for every cell, so that the mean over cells is one over wirings.
            ARMS[4]: [randomised(network, seed + k) for k in range(cells)],
        },
    )
    shape = (len(chosen), len(READOUTS), cells)
    probes = () if ablation is None else ablation.probes
    arms = (*ARMS, *([HELD] if ablation is not None and ablation.programmes is not None else []))
    effects = Effects(
        list(chosen),
        np.asarray(some.donor),
        np.zeros(shape),
        {arm: np.zeros(shape) for arm in arms},
        {probe.encoder: {arm: np.zeros(shape) for arm in ARMS[:3]} for probe in probes},
        outside=np.zeros((len(chosen), cells), dtype=bool),
    )
    assert effects.outside is not None
    embedding = model.embed(some, seed)
    base, base_true = _guess(model, embedding), truth.readings(picked, {})
    base_probes = {probe.encoder: probe(some, embedding) for probe in probes}
    kind = model.classify(model.encode(embedding)).argmax(axis=1)
    for i, case in enumerate(chosen):
        factors = dict(case.factors)
        if case.moves_the_niche:
            effects.true[i] = truth.readings(picked, factors) - base_true
        direct = some.scale_genes(factors)
        for arm in ARMS:
            edited = direct if arm == ARMS[0] else spreader(direct, arm, factors)
            if arm != ARMS[0] and not (edited.counts != direct.counts).nnz:
                effects.model[arm][i] = effects.model[ARMS[0]][i]
                for name in effects.probes:
                    if arm in effects.probes[name]:
                        effects.probes[name][arm][i] = effects.probes[name][ARMS[0]][i]
                continue
            moved = model.embed(edited, seed)
            effects.model[arm][i] = _guess(model, moved) - base
            for probe in probes:
                if arm in effects.probes[probe.encoder]:
                    effects.probes[probe.encoder][arm][i] = probe(edited, moved) - base_probes[probe.encoder]
            if arm == ARMS[0]:
                effects.outside[i] = _outside(model, some, edited, moved, kind, tuple(factors))
                if HELD in effects.model and ablation is not None:
                    effects.model[HELD][i] = _guess(model, ablation.hold_programmes(embedding, moved)) - base
        if on_case is not None:
            on_case()
    return effects


def _guess(model: GE2Hist, embedding: np.ndarray) -> np.ndarray:
    """``[readout, cell]`` of the niche network."""
    readouts = model.expected_readouts(model.encode(embedding))
    return np.stack([readouts[name] for name in READOUTS])


def _outside(
    model: GE2Hist,
    some: Cells,
    edited: Cells,
    embedding: np.ndarray,
    kind: np.ndarray,
    genes: tuple[str, ...],
) -> np.ndarray:
    """Which edited cells the gates that need no picture call outside the data, bool ``[cell]``."""
    from ge2hist_core.gates import GATES
    from ge2hist_core.support import OUTSIDE, bonferroni

    if model.gates is not None:
        table = model.gates.cell_p(model, edited, embedding, model.encode(embedding), kind, edited=genes, unedited=some)
        p = bonferroni(table[list(GATES[:3])].to_numpy())
    elif model.support is not None:
        p = model.support.p(embedding)
    else:
        return np.zeros(len(some), dtype=bool)
    return np.nan_to_num(p, nan=1.0) < OUTSIDE


# --- the command ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb known-truth``."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("data", type=Path, metavar="DATA.zarr", help="simulated tissue with donors that are held out")
    parser.add_argument("--out", type=Path, required=True, help="folder for known_truth.json and its tables")
    parser.add_argument("--cells", type=int, default=48)
    parser.add_argument(
        "--per-role", type=int, default=24, help="single drivers, single reporters; twice as many inert"
    )
    parser.add_argument("--doses", type=float, nargs="+", default=list(DOSES), help="factors of the programmes")
    parser.add_argument("--pictures", type=int, default=0, metavar="N", help="cells whose pictures are drawn as well")
    parser.add_argument(
        "--probe-cells", type=int, default=4000, help="training cells of the encoder's ablation; 0: none"
    )
    parser.add_argument("--truth", type=Path, help="folder of the true effects; by default beside the data")
    parser.add_argument("--workers", type=int, default=2, help="processes that simulate tissue")
    parser.add_argument("--quick", action="store_true", help="a look at whether all runs: few cells, genes and seeds")
    parser.add_argument("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> None:
    """Write ``known_truth.json`` and the table of all effects; the file is written again after each stage.

    Raises
    ------
    BadInput: a bundle or store that cannot be used, or too few cells.
    """
    from tqdm import tqdm

    from ge2hist_core.files import write_json
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore
    from perturb.encoder_ablation import fit_probes

    if args.quick:
        args.cells, args.per_role, args.doses = min(args.cells, 8), min(args.per_role, 2), [KNOCKED_OUT, RAISED]
        args.pictures, args.probe_cells = min(args.pictures, 1), min(args.probe_cells, 200)
    model = GE2Hist.load(args.bundle)
    store = TissueStore(args.data, model.config.tile_px)
    chosen = cases(args.per_role, args.seed, args.doses)
    tile_um = model.config.tile_px * model.config.um_per_px
    truth = TrueTissue(store, tile_um, args.truth or truth_folder(args.data))
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "bundle_sha256": model.sha256,
        "store": store.identity,
        "seed": args.seed,
        "doses": list(args.doses),
    }
    path = args.out / "known_truth.json"

    seen = model.has_learned_from(store)
    donors = [name for name in store.donors if name not in seen]
    wanted = [{}, *(dict(case.factors) for case in chosen if case.moves_the_niche)]
    with tqdm(total=len(truth.missing(wanted, donors)), desc="true effects", unit="section") as bar:
        truth.prepare(wanted, donors, args.workers, bar.update)
    ablation = None
    if args.probe_cells:
        n = args.probe_cells
        ablation = fit_probes(model, store, cells=(n, max(20, n // 4), max(20, 3 * n // 8)), seed=args.seed)
        result["encoders"] = ablation.figures
        write_json(path, result)
    with tqdm(total=len(chosen), desc="niche network", unit="edit") as bar:
        effects = measure(
            model,
            store,
            chosen,
            truth,
            cells=args.cells,
            seed=args.seed,
            ablation=ablation,
            on_case=bar.update,
        )
    result["niche network"] = summary(effects, args.seed)
    _write_table(args.out / "known_truth.csv", rows(effects))
    write_json(path, result)
    if args.pictures:
        from perturb.drawn_truth import Design, draw

        result["pictures"] = draw(model, store, truth, Design.of(args.pictures, quick=args.quick), args.out, args.seed)
        write_json(path, result)
    for arm, slopes in result["niche network"]["slopes"].items():
        print(arm, {part: value["value"] for part, value in slopes.items()})
    print(path)


def _write_table(path: Path, table: Iterable[dict[str, Any]]) -> None:
    from ge2hist_core.files import atomic_path

    with atomic_path(path) as temporary:
        pd.DataFrame(table).to_csv(temporary, index=False)
