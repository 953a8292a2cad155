"""One colour per cell type, everywhere, chosen to stay apart for the colour-blind.

Okabe and Ito's palette (jfly.uni-koeln.de/color) and, as the eighth, wine of Paul Tol's (sronpersonalpages.nl/~pault).
H&E shows the eight reader classes; the three lymphocyte types are shades of the lymphocyte's blue.
"""

from __future__ import annotations

__all__ = ["TYPE_COLOURS", "UNKNOWN_COLOUR", "colour_of"]

TYPE_COLOURS = {
    "Tumour epithelium": "#D55E00",
    "Proliferating tumour": "#F0E442",
    "Luminal epithelium": "#E69F00",
    "Fibroblast": "#009E73",
    "Endothelium": "#CC79A7",
    "Lymphocyte": "#0072B2",
    "Plasma cell": "#56B4E9",
    "Macrophage": "#882255",
    "CD4 T cell": "#0072B2",
    "CD8 T cell": "#00436B",
    "B cell": "#4A9BD1",
}

UNKNOWN_COLOUR = "#5E5E5E"
"""Nuclei whose type the reader does not tell, and types of other data."""


def colour_of(name: str) -> str:
    """Hexadecimal colour of a cell type or reader class."""
    return TYPE_COLOURS.get(name, UNKNOWN_COLOUR)
