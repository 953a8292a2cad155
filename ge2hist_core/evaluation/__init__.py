"""``python -m ge2hist_core evaluate BUNDLE DATA.zarr --out DIR``: generated against real tiles of the same cells.

The cells come from donors that the bundle has not learned from. In one run the paper's Table 1 (KID and a perceptual
distance), Figure 3 (density, composition, nearest neighbours), classifier accuracy and Figure 4 (a type drawn in the
middle), against the paper's competitors trained on the same donors (``--rivals``); besides, read-back of the expression
from the picture and, on known-truth tissue, effects of edits against the truth.

All kinds of tile go through the bundle's own nuclei reader, which sees pixels only. Every figure stands between a floor
(real tiles of other cells of the same types and donors) and a ceiling (the conditions of the cells exchanged at
random). The means over all cells do not change when conditions are exchanged, so every comparison is also made type by
type of the central cell.

Where is what: :mod:`~ge2hist_core.evaluation.readings` compares readings (Figure 3),
:mod:`~ge2hist_core.evaluation.methods` says who draws, :mod:`~ge2hist_core.evaluation.contest` has Table 1 and who
wins, :mod:`~ge2hist_core.evaluation.states` the classifier, separation and Figure 4,
:mod:`~ge2hist_core.evaluation.read_back` and :mod:`~ge2hist_core.evaluation.truth` what their names say,
:mod:`~ge2hist_core.evaluation.work` keeps what is drawn, :mod:`~ge2hist_core.evaluation.run` puts it together and
:mod:`~ge2hist_core.evaluation.report` writes it as Markdown and HTML.
"""

from __future__ import annotations

from ge2hist_core.evaluation.readings import Readings, compare
from ge2hist_core.evaluation.run import QUICK, Counts, evaluate
from ge2hist_core.evaluation.truth import EDIT_FACTORS, driver_programmes, true_readings

__all__ = ["EDIT_FACTORS", "QUICK", "Counts", "Readings", "compare", "driver_programmes", "evaluate", "true_readings"]
