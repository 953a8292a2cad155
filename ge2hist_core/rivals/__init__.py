"""The paper's competitors, small and trained on the same donors: TransGAN, RNA-CDM and RNA-GAN, with two controls.

Each is a :class:`ge2hist_core.rivals.common.Rival`: ``train`` is a generator that yields its progress, ``generate``
draws pictures of cells, ``save`` and :func:`load_rival` keep it as safetensors and JSON.

Equal budget. A rival is trained until its steps have taken a given number of multiply-accumulates, as PyTorch counts
them on one step (:func:`ge2hist_core.rivals.common.count_macs` counts GE2Hist's in the same way), or a given CPU time
summed over cores and runs. The count depends on neither the machine nor what else runs on it. CPU time does: threads
that wait for each other use it too, so compare it only between runs on one machine with nothing beside them. The
rival's report has the count, CPU time, time on the clock and the number of threads. Everything that is learned counts,
the beta-VAE of the expression too; GE2Hist's cell encoder, which is trained once for all uses, does not.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ge2hist_core.types import BadInput

if TYPE_CHECKING:
    from ge2hist_core.rivals.common import Rival

__all__ = ["RIVALS", "load_rival", "rival_class"]

RIVALS = {
    "transgan": ("ge2hist_core.rivals.transgan", "TransGAN"),
    "rna-cdm": ("ge2hist_core.rivals.rna_cdm", "RNACDM"),
    "rna-gan": ("ge2hist_core.rivals.rna_gan", "RNAGAN"),
}
"""Name on the command line -> module and class."""


def rival_class(name: str) -> type[Rival]:
    """The class of a rival.

    Raises
    ------
    BadInput: a name that is not in :data:`RIVALS`.
    """
    if name not in RIVALS:
        raise BadInput(f"Rival {name!r} is unknown: choose one of {', '.join(RIVALS)}.")
    module, attribute = RIVALS[name]
    return getattr(importlib.import_module(module), attribute)


def load_rival(folder: str | Path) -> Rival:
    """Open whatever rival ``folder`` holds.

    Raises
    ------
    BadInput: not a rival's folder, one of another schema, or a missing, truncated or unfitting file.
    """
    from ge2hist_core.rivals.common import read_header

    header = read_header(Path(folder))
    try:
        return rival_class(header["rival"]).load(folder)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise BadInput(f"{folder}/rival.json is damaged ({error!r}): copy or train the rival again.") from error
