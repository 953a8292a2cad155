"""What a simulated tissue itself answers when genes are set by hand; readings are kept beside the store.

A section is simulated again from its own random numbers (:func:`ge2hist_core.simulator.tissue.simulate_section`), which
takes about a second, and its true nuclei are counted in the niche of every cell that has a whole tile. What was counted
once is kept per donor and intervention, so that the next bundle that is compared with the same store need not wait.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ge2hist_core.config import READER_CLASSES, VISIBLE_CLASS
from ge2hist_core.files import atomic_path
from ge2hist_core.types import BadInput

if TYPE_CHECKING:
    from ge2hist_core.store import TissueStore

__all__ = ["READOUTS", "TrueTissue", "truth_folder"]

READOUTS = ("density", *(f"fraction:{name}" for name in READER_CLASSES))
"""Nuclei per mm2, and the share of each class that H&E can tell apart; the order of every readout axis."""


def truth_folder(data: Path) -> Path:
    """Where the readings of a store are kept: ``NAME.truth`` beside ``NAME.zarr``."""
    return data.with_suffix(".truth")


@cache
def _tissue_version() -> str:
    """SHA-256 of the files that decide where a simulated tissue's cells are: readings of another version are not read.

    The store's own identity says which cells it holds, not what the simulator would make of them under an edit.
    """
    import ge2hist_core.simulator

    folder = Path(ge2hist_core.simulator.__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in _TISSUE_FILES)).hexdigest()


_TISSUE_FILES = ("genes.csv", "programmes.py", "tissue.py")


@dataclass(frozen=True, eq=False)
class _Job:
    """One section to simulate: ``factors`` of drivers, ``corner [cell, 2]`` of the tiles in um."""

    donor: str
    seed: int
    number: int
    size_um: float
    factors: tuple[tuple[str, float], ...]
    corner: np.ndarray
    tile_um: float


def _count(job: _Job) -> tuple[np.ndarray, int]:
    """Nuclei in each tile, int16 ``[cell, class]``, and in the whole section."""
    from ge2hist_core.simulator.tissue import simulate_section

    nuclei = simulate_section(job.seed, job.number, job.size_um, dict(job.factors)).nuclei
    classes = [READER_CLASSES.index(VISIBLE_CLASS[name]) for name in nuclei["cell_type"]]
    inside = np.ones((len(job.corner), len(nuclei)), dtype=bool)
    for axis, name in enumerate(("x_um", "y_um")):
        place = nuclei[name].to_numpy()[None] - job.corner[:, axis, None]
        inside &= (place >= 0) & (place <= job.tile_um)
    counts = inside.astype(np.float32) @ np.eye(len(READER_CLASSES), dtype=np.float32)[classes]
    return counts.astype(np.int16), len(nuclei)


class TrueTissue:
    """Readouts of the true nuclei around cells, with driver genes set by hand.

    Parameters
    ----------
    store: simulated tissue.
    tile_um: side of the niche.
    folder: where readings are kept; None keeps them in memory alone.

    Raises
    ------
    BadInput: a store that was not simulated.
    """

    def __init__(self, store: TissueStore, tile_um: float, folder: Path | None = None) -> None:
        from ge2hist_core.simulator.expression import load_genes

        if store.simulation is None:
            raise BadInput(
                f"{store.path} is no simulated tissue, so no truth is known: give a store that simulate wrote."
            )
        self.store, self.tile_um = store, tile_um
        self.folder = None if folder is None else folder / store.identity[:16]
        self._drivers = frozenset(load_genes().drivers)
        self._numbers = {f"donor{number:03d}": number for number in store.simulation["donors"]}
        self._kept: dict[tuple[str, tuple[tuple[str, float], ...]], np.ndarray] = {}

    def _acting(self, factors: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """The part of an intervention that the tissue answers to."""
        return tuple(sorted((gene, float(f)) for gene, f in factors.items() if gene in self._drivers and f != 1.0))

    def _path(self, donor: str, acting: tuple[tuple[str, float], ...]) -> Path | None:
        if self.folder is None:
            return None
        digest = hashlib.sha256(json.dumps([_tissue_version(), donor, self.tile_um, acting]).encode()).hexdigest()
        return self.folder / f"{donor}-{digest[:24]}.npz"

    def _rows(self, donor: str) -> np.ndarray:
        return self.store.rows([donor])

    def _load(self, donor: str, acting: tuple[tuple[str, float], ...]) -> np.ndarray | None:
        key, path = (donor, acting), self._path(donor, acting)
        if key not in self._kept and path is not None and path.is_file():
            try:
                with np.load(path, allow_pickle=False) as file:
                    self._kept[key] = file["counts"]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
                path.unlink(missing_ok=True)
        return self._kept.get(key)

    def _keep(self, job: _Job, counts: np.ndarray, n: int) -> None:
        own = int((np.asarray(self.store.cells.donor) == job.donor).sum())
        if not job.factors and n != own:
            raise BadInput(
                f"{self.store.path} has {own} nuclei of {job.donor}, simulated again it has {n}: "
                "simulate the store with this version."
            )
        self._kept[job.donor, job.factors] = counts
        path = self._path(job.donor, job.factors)
        if path is not None:
            with atomic_path(path) as temporary:
                np.savez_compressed(temporary, counts=counts)

    def missing(self, wanted: Iterable[Mapping[str, float]], donors: Iterable[str]) -> list[_Job]:
        """Sections that have still to be simulated, each once."""
        simulation = self.store.simulation
        assert simulation is not None
        donors, um, jobs = list(donors), self.store.um_per_px, []
        for acting in dict.fromkeys(map(self._acting, wanted)):
            for donor in donors:
                if self._load(donor, acting) is None:
                    # As the store's tiles are: centred on the cell to the nearest pixel.
                    xy = self.store.cells.xy_um
                    assert xy is not None
                    corner = np.floor(xy[self._rows(donor)] / um + 0.5) * um - self.tile_um / 2
                    place = simulation["seed"], self._numbers[donor], simulation["size_um"]
                    jobs.append(_Job(donor, *place, acting, corner, self.tile_um))
        return jobs

    def prepare(
        self,
        wanted: Iterable[Mapping[str, float]],
        donors: Iterable[str],
        workers: int = 1,
        on_section: Callable[[], object] | None = None,
    ) -> None:
        """Simulate what is missing; each section is kept as soon as it is counted.

        Parameters
        ----------
        wanted: gene -> factor, one per intervention. workers: processes.

        Raises
        ------
        BadInput: the tissue without interventions is not the one in the store.
        """
        jobs = self.missing(wanted, donors)
        if workers <= 1 or len(jobs) < 2:
            for job in jobs:
                self._keep(job, *_count(job))
                if on_section is not None:
                    on_section()
            return
        with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
            running = {pool.submit(_count, job): job for job in jobs}
            for done in as_completed(running):
                self._keep(running[done], *done.result())
                if on_section is not None:
                    on_section()

    def readings(self, rows: np.ndarray, factors: Mapping[str, float]) -> np.ndarray:
        """``[readout, cell]`` of :data:`READOUTS` around the cells of these rows; a share of no nuclei is 0.

        Parameters
        ----------
        factors: gene -> factor on its level; genes that drive nothing change nothing.

        Raises
        ------
        BadInput: a cell without a whole tile.
        """
        donor = np.asarray(self.store.cells.donor)[rows]
        outside = rows[~self.store.interior[rows]]
        if len(outside):
            raise BadInput(
                f"The tile of cell {self.store.cells.cell_id[outside[0]]!r} leaves its section: choose inner cells."
            )
        self.prepare([factors], dict.fromkeys(donor))
        counts = np.empty((len(rows), len(READER_CLASSES)))
        for name in dict.fromkeys(donor):
            mine = np.flatnonzero(donor == name)
            found = self._load(name, self._acting(factors))
            assert found is not None
            counts[mine] = found[np.searchsorted(self._rows(name), rows[mine])]
        total = counts.sum(axis=1)
        return np.vstack([total / (self.tile_um / 1000.0) ** 2, (counts / np.maximum(total, 1.0)[:, None]).T])
