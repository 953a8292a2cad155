"""What a niche programme does to tissue: one readable table of causal effects.

A programme is a smooth field over the section, about 0 +- 1. Its value is set by its driver genes (``genes.csv``);
here stands what the tissue does in answer. The strengths are chosen, not measured: they are the known truth of a
simulated world, of an order that pathologists would recognise (e.g. Galon et al. 2006, doi:10.1126/science.1129139,
for the spread of T cell densities between tumours).
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["BASE_INTENSITY", "COHESION_SPACING", "LOG_FOLD", "NUCLEUS", "PROGRAMMES"]

PROGRAMMES = ("immune_infiltration", "fibrosis", "angiogenesis", "proliferation", "cohesion", "hypoxia")

BASE_INTENSITY: Mapping[str, Mapping[str, float]] = {
    # Candidates per mm2 before crowding, in each compartment, with every programme at 0.
    "Tumour epithelium": {"tumour": 20000.0},
    "Luminal epithelium": {"luminal": 19000.0},
    "Fibroblast": {"stroma": 2600.0},
    "Endothelium": {"stroma": 150.0},
    "CD4 T cell": {"stroma": 420.0, "tumour": 60.0, "luminal": 60.0, "aggregate": 4500.0},
    "CD8 T cell": {"stroma": 380.0, "tumour": 200.0, "luminal": 60.0, "aggregate": 1500.0},
    "B cell": {"stroma": 90.0, "aggregate": 9000.0},
    "Plasma cell": {"stroma": 200.0, "aggregate": 300.0},
    "Macrophage": {"stroma": 330.0, "tumour": 140.0, "luminal": 40.0},
}
"""Proliferating tumour cells are a share of the tumour epithelium, see ``PROLIFERATING_SHARE``."""

LOG_FOLD: Mapping[str, Mapping[str, float]] = {
    # Change of the log intensity per unit of programme.
    "Tumour epithelium": {"proliferation": 0.30, "cohesion": 0.15, "hypoxia": -0.22},
    "Luminal epithelium": {"cohesion": 0.10, "hypoxia": -0.10},
    "Fibroblast": {"fibrosis": 0.35},
    "Endothelium": {"angiogenesis": 0.60},
    "CD4 T cell": {"immune_infiltration": 0.75, "hypoxia": -0.10},
    "CD8 T cell": {"immune_infiltration": 0.95, "hypoxia": -0.20},
    "B cell": {"immune_infiltration": 0.60},
    "Plasma cell": {"immune_infiltration": 0.50},
    "Macrophage": {"immune_infiltration": 0.40, "hypoxia": 0.40},
}

PROLIFERATING_SHARE = (-1.5, 1.0)
"""Intercept and slope on proliferation of the logit of the share of tumour cells that proliferate."""

NEST_THRESHOLD: Mapping[str, float] = {"fibrosis": 0.22, "proliferation": -0.18}
"""Shift of the epithelial nests' border per unit of programme: fibrosis shrinks nests, proliferation grows them."""

VESSEL_SHARE = (-0.9, 1.1)
"""Intercept and slope on angiogenesis of the logit of the share of candidate vessels that exist."""

AGGREGATE_SHARE = (-1.0, 1.2)
"""The same for lymphoid aggregates on immune infiltration."""

COHESION_SPACING = -0.08
"""Change of the log minimum distance between epithelial nuclei per unit of cohesion."""

NUCLEUS: Mapping[str, tuple[float, float, float, float]] = {
    # Major and minor full axis (um), chromatin clumpiness 0..1, darkness 0..1. After textbook sizes at 20x.
    "Tumour epithelium": (9.6, 7.4, 0.55, 0.45),
    "Proliferating tumour": (10.4, 8.2, 0.80, 0.75),
    "Luminal epithelium": (7.8, 6.0, 0.35, 0.50),
    "Fibroblast": (12.0, 3.2, 0.30, 0.55),
    "Endothelium": (9.5, 2.7, 0.25, 0.75),
    "CD4 T cell": (5.9, 5.4, 0.50, 0.92),
    "CD8 T cell": (5.9, 5.4, 0.50, 0.92),
    "B cell": (6.0, 5.6, 0.50, 0.90),
    "Plasma cell": (6.3, 5.9, 0.95, 0.80),
    "Macrophage": (8.4, 6.0, 0.35, 0.32),
}
