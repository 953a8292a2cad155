"""What a goal search aims at: a readout's value or change, or the niche of another cell."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ge2hist_core.types import BadInput
from perturb.screen import READOUTS
from perturb.tables import UNITS

__all__ = ["NicheTarget", "ReadoutTarget", "Target"]


@dataclass(frozen=True)
class ReadoutTarget:
    """A wished value of a readout, or a wished change of it.

    Parameters
    ----------
    readout: ``density`` (cells/mm2) or ``fraction:<class>`` (0 to 1).
    value, change: one of the two, in the readout's unit.

    Raises
    ------
    BadInput: another readout, both or neither of value and change, a number that the readout cannot have.
    """

    readout: str
    value: float | None = None
    change: float | None = None

    def __post_init__(self) -> None:
        known = [name for name in READOUTS if name != "spacing"]
        if self.readout not in known:
            raise BadInput(f"readout is {self.readout!r}: choose {', '.join(known)}.")
        if (self.value is None) == (self.change is None):
            raise BadInput(f"The target for {self.readout} needs either a value or a change: give one of the two.")
        for name in ("value", "change"):
            if getattr(self, name) is None:
                continue
            number = float(getattr(self, name))
            if not math.isfinite(number):
                raise BadInput(f"{name} of {self.readout} is {number!r}: give a finite number.")
            object.__setattr__(self, name, number)
        if self.value is not None and not 0 <= self.value <= self.largest:
            raise BadInput(f"value of {self.readout} is {self.value:g}: choose a number from 0 to {self.largest:g}.")
        if self.change == 0:
            raise BadInput(f"change of {self.readout} is 0: give a change, above 0 for more and below 0 for less.")

    @property
    def largest(self) -> float:
        """Largest possible value."""
        return math.inf if self.readout == "density" else 1.0

    @property
    def unit(self) -> str:
        return UNITS[self.readout.partition(":")[0]]

    def __str__(self) -> str:
        wish = f"{self.change:+g}" if self.value is None else f"to {self.value:g}"
        return f"{self.readout} {wish} {'' if self.unit == 'fraction' else self.unit}".strip()


@dataclass(frozen=True)
class NicheTarget:
    """The niche of another cell. Make one with :func:`perturb.goal_search.niche_target`.

    Parameters
    ----------
    cell_id: of the other cell.
    classes: visible classes of the model's cell types.
    counts: ``[class]`` other nuclei that the model expects in that cell's tile: what the search aims at.
    real: ``[class]`` other nuclei that its real tile holds, where known. One tile is one noisy draw, so it is no aim;
        the distance to it is stated beside.

    Raises
    ------
    BadInput: counts that are not one finite number >= 0 per class.
    """

    cell_id: str
    classes: tuple[str, ...]
    counts: tuple[float, ...]
    real: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("counts", "real"):
            values = getattr(self, name)
            if values is None:
                continue
            values = tuple(float(value) for value in values)
            if len(values) != len(self.classes) or not all(0 <= value < math.inf for value in values):
                raise BadInput(
                    f"{name} of the target {self.cell_id!r} is {values!r}: give one number >= 0 for each of "
                    f"{len(self.classes)} classes."
                )
            object.__setattr__(self, name, values)

    @property
    def unit(self) -> str:
        return "root counts"

    def __str__(self) -> str:
        return f"niche of cell {self.cell_id}"


Target = ReadoutTarget | NicheTarget
