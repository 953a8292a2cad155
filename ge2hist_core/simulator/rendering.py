"""From tissue to H&E: what a section looks like under the microscope at 20x (0.5 um per pixel).

Every structure deposits haematoxylin and eosin; light is absorbed by the Beer-Lambert law
``I = I0 * 10 ** -(c_H * v_H + c_E * v_E + c_B * v_B)`` [1] with one unit vector of optical density per stain, then
blurred, shaded and digitised. Knows numpy, scipy and the section, nothing of genes or models.

Two arms of an intervention share every draw: textures are drawn on the full grid from (seed, donor, name), a
nucleus's own shape and chromatin from (seed, donor, key), and every operation reaches a few um only. So pictures of
the same section with and without an edit differ only where the tissue differs.

References
----------
[1] Ruifrok AC, Johnston DA. Quantification of histochemical staining by color deconvolution. Anal Quant Cytol Histol
    2001;23(4):291-299. ISSN 0884-6812, PMID 11531144. Table of H and E optical densities.
[2] Macenko M et al. A method for normalizing histology slides for quantitative analysis. ISBI 2009:1107-1110.
    doi:10.1109/ISBI.2009.5193250. Data-driven vectors; eosin is more orange there than in [1].
[3] Cabral B, Leedom LC. Imaging vector fields using line integral convolution. SIGGRAPH 1993:263-270.
    doi:10.1145/166117.166151. Collagen fibres.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pandas as pd
from scipy import ndimage

from ge2hist_core.config import CELL_TYPES, UM_PER_PX
from ge2hist_core.rng import stream
from ge2hist_core.types import BadInput

__all__ = ["BLOOD", "EOSIN", "HAEMATOXYLIN", "Stain", "draw_stain", "optical_density", "render", "transmit"]

Array = np.ndarray[Any, Any]


def _unit(values: tuple[float, float, float]) -> Array:
    vector = np.asarray(values, dtype=np.float64)
    return vector / np.linalg.norm(vector)


HAEMATOXYLIN = _unit((0.650, 0.704, 0.286))
"""Optical density in R, G, B, unit length, from [1]."""
EOSIN = _unit((0.072, 0.990, 0.105))
"""From [1]: pure magenta. Slides lie between this and :data:`EOSIN_WARM`."""
HAEMATOXYLIN_WARM = _unit((0.5626, 0.7201, 0.4062))
"""Reference haematoxylin of the common implementation of [2]: more purple."""
EOSIN_WARM = _unit((0.2159, 0.8012, 0.5581))
"""Reference eosin of the common implementation of [2]: salmon."""
BLOOD = _unit((0.18, 0.75, 0.64))
"""Erythrocytes in H&E: eosin plus haemoglobin's own blue absorption (Soret band), by eye on real slides."""


class SectionLike(Protocol):
    """What the renderer needs to know of a section; see ``simulator.tissue.Section``."""

    @property
    def seed(self) -> int: ...
    @property
    def donor(self) -> int: ...
    @property
    def size_um(self) -> float: ...
    @property
    def grid_um(self) -> float: ...
    @property
    def nuclei(self) -> pd.DataFrame: ...
    @property
    def fields(self) -> Mapping[str, Array]: ...


@dataclass(frozen=True)
class Stain:
    """How one slide was cut, stained and scanned.

    Parameters
    ----------
    vectors: ``[3 stains, RGB]`` unit vectors of optical density: haematoxylin, eosin, erythrocytes.
    haematoxylin, eosin: relative strength of the stains.
    background: ``[RGB]`` transmitted light of empty glass, 0..1.
    blur_um: standard deviation of the optics in focus.
    defocus: how much of the slide is out of focus, 0..1.
    noise: standard deviation of the camera at full light, grey levels of 255.
    """

    vectors: Array
    haematoxylin: float
    eosin: float
    background: Array
    blur_um: float
    defocus: float
    noise: float


def draw_stain(stain_seed: int, donor: int) -> Stain:
    """The staining of one donor's slide: the same for every section of the donor and for both arms of an edit."""
    rng = stream(stain_seed, "stain", donor)
    purple, warm = rng.uniform(0.0, 0.7), rng.uniform(0.35, 0.95)
    vectors = np.stack(
        [
            (1 - purple) * HAEMATOXYLIN + purple * HAEMATOXYLIN_WARM,
            (1 - warm) * EOSIN + warm * EOSIN_WARM,
            BLOOD,
        ]
    )
    vectors = np.clip(vectors + rng.normal(0, 0.018, vectors.shape), 0.02, None)
    return Stain(
        vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        haematoxylin=float(np.exp(rng.normal(0.03, 0.14))),
        eosin=float(np.exp(rng.normal(-0.05, 0.17))),
        background=np.clip(np.array([0.955, 0.945, 0.955]) + rng.normal(0, 0.008, 3), 0, 0.985),
        blur_um=rng.uniform(0.20, 0.30),
        defocus=rng.uniform(0.0, 0.4),
        noise=rng.uniform(1.0, 2.2),
    )


def transmit(amounts: Array, stain: Stain) -> Array:
    """Beer-Lambert: stain amounts ``[..., 3 stains]`` -> transmitted light ``[..., RGB]``, 0..1 (float32)."""
    density = amounts.astype(np.float32, copy=False) @ stain.vectors.astype(np.float32)
    return np.power(np.float32(10), -density) * stain.background.astype(np.float32)


def optical_density(light: Array, stain: Stain) -> Array:
    """Inverse of :func:`transmit` up to the stains: light ``[..., RGB]`` -> optical density ``[..., RGB]``."""
    return -np.log10(np.maximum(light, 1e-6) / stain.background)


@dataclass(frozen=True)
class _Look:
    """Appearance of one cell type. Amounts are in optical density units, lengths in um.

    ``nucleus`` mean haematoxylin, ``clump`` its relative texture, ``coarse`` share of coarse clumps, ``rim`` extra at
    the nuclear membrane, ``nucleoli`` their strength; ``rough`` irregularity of the outline, ``bend`` curvature (1/um),
    ``power`` of the superellipse (2 = ellipse, less = pointed ends); cytoplasm: ``cyto_h``, ``cyto_e``, ``margin``
    its width beyond the nucleus where nothing holds the cell, ``stretch`` elongation along the nucleus, ``offset`` of
    its centre, ``foam`` vacuoles.
    """

    nucleus: float
    clump: float
    coarse: float
    rim: float
    nucleoli: float
    rough: float
    bend: float
    power: float
    cyto_h: float
    cyto_e: float
    margin: float
    stretch: float = 1.0
    offset: float = 0.0
    foam: float = 0.0


_LYMPHOCYTE = _Look(0.96, 0.30, 0.7, 0.12, 0.0, 0.025, 0.0, 2.0, 0.10, 0.10, 0.7)
_LOOKS = {
    "Tumour epithelium": _Look(0.44, 0.45, 0.4, 0.26, 0.55, 0.045, 0.0, 2.0, 0.125, 0.20, 3.2),
    "Proliferating tumour": _Look(0.86, 0.31, 0.6, 0.12, 0.15, 0.075, 0.0, 2.0, 0.17, 0.20, 3.0),
    "Luminal epithelium": _Look(0.68, 0.22, 0.2, 0.10, 0.0, 0.018, 0.0, 2.0, 0.045, 0.15, 2.6),
    "Fibroblast": _Look(0.60, 0.32, 0.3, 0.08, 0.0, 0.035, 0.05, 1.7, 0.03, 0.20, 0.5, stretch=1.9),
    "Endothelium": _Look(1.08, 0.14, 0.3, 0.0, 0.0, 0.02, 0.065, 1.8, 0.04, 0.26, 0.6, stretch=1.9),
    "CD4 T cell": _LYMPHOCYTE,
    "CD8 T cell": _LYMPHOCYTE,
    "B cell": _LYMPHOCYTE,
    "Plasma cell": _Look(0.88, 0.16, 0.6, 0.0, 0.0, 0.02, 0.0, 2.0, 0.27, 0.17, 2.5, stretch=1.2, offset=2.1),
    "Macrophage": _Look(0.38, 0.26, 0.3, 0.16, 0.12, 0.04, 0.05, 2.0, 0.035, 0.125, 4.4, foam=1.0),
}
_EPITHELIAL = ("Tumour epithelium", "Proliferating tumour", "Luminal epithelium")
_EPITHELIAL_REACH_UM = 10.0
"""An epithelial cell claims cytoplasm up to this far beyond its nucleus inside a nest."""
_MITOTIC_SHARE = 0.10
"""Share of proliferating tumour nuclei drawn as metaphase plates."""


def _smoothstep(value: Array, low: float, high: float) -> Array:
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


class _Canvas:
    """The pixel grid of one section: fields brought to it, and named noise on it."""

    def __init__(self, section: SectionLike) -> None:
        self.section = section
        self.n = round(section.size_um / UM_PER_PX)

    def noise(self, name: str, scale_um: float) -> Array:
        """Smooth Gaussian noise ``[H, W]``, mean 0, variance 1, correlation length ``scale_um``."""
        sigma = scale_um / UM_PER_PX
        step = max(1, int(sigma / 1.5))
        coarse = -(-self.n // step) + 4
        white = stream(self.section.seed, "texture", self.section.donor, name).standard_normal(
            (coarse, coarse), dtype=np.float32
        )
        smooth = ndimage.gaussian_filter(white, sigma / step, mode="wrap") * (2 * np.sqrt(np.pi) * sigma / step)
        if step == 1:
            return smooth[: self.n, : self.n]
        at = (np.arange(self.n, dtype=np.float32) / step) + 1
        return _bilinear_grid(smooth, at, at)

    @cached_property
    def warp(self) -> tuple[Array, Array]:
        """Displacement in um that makes every border irregular, (x, y)."""
        x, y = (0.55 * self.noise(f"warp {a}", 3.0) + 0.28 * self.noise(f"warp fine {a}", 1.0) for a in "xy")
        return x, y

    def field(self, name: str, warped: bool = False) -> Array:
        """A field of the section at every pixel ``[H, W]`` float32; ``warped`` for those with visible borders."""
        return self.resample(self.section.fields[name], warped)

    def resample(self, grid: Array, warped: bool = False) -> Array:
        grid = np.asarray(grid, dtype=np.float32)
        at = (np.arange(self.n, dtype=np.float32) + 0.5) * (UM_PER_PX / self.section.grid_um) - 0.5
        if not warped:
            return _bilinear_grid(grid, at, at)
        dx, dy = self.warp
        scale = np.float32(1 / self.section.grid_um)
        where = np.stack([at[:, None] + 1.3 * scale * dy, at[None, :] + 1.3 * scale * dx])
        return ndimage.map_coordinates(grid, where, order=1, mode="nearest")


def _bilinear_grid(grid: Array, rows: Array, columns: Array) -> Array:
    """Bilinear interpolation at every pair of (rows, columns): two small matrix products."""

    def weights(at: Array, size: int) -> tuple[Array, Array, Array]:
        at = np.clip(at, 0, size - 1)
        low = np.minimum(at.astype(np.int64), max(size - 2, 0))
        return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)

    low, high, w = weights(rows, grid.shape[0])
    tall = grid[low] * (1 - w)[:, None] + grid[high] * w[:, None]
    low, high, w = weights(columns, grid.shape[1])
    return tall[:, low] * (1 - w) + tall[:, high] * w


def _streaks(noise: Array, angle: Array, steps_px: tuple[float, ...]) -> Array:
    """Noise smeared along ``angle`` (line integral convolution [3] by doubling steps), variance about restored."""
    height, width = noise.shape
    dy, dx = np.sin(angle).astype(np.float32), np.cos(angle).astype(np.float32)
    out = noise
    for step in steps_px:
        pad = int(np.ceil(step))
        stride = width + 2 * pad
        here = (np.arange(height, dtype=np.int32)[:, None] + pad) * stride + np.arange(width, dtype=np.int32) + pad
        shift = np.rint(step * dy).astype(np.int32) * stride + np.rint(step * dx).astype(np.int32)
        flat = np.pad(out, pad, mode="reflect").ravel()
        out = np.float32(0.5) * (flat.take(here + shift) + flat.take(here - shift))
    return ndimage.gaussian_filter(out, 0.65) * np.float32(2 ** (0.42 * len(steps_px)))


@dataclass(frozen=True, eq=False)
class _Cells:
    """Nuclei as arrays, with each one's own draws ``u [nucleus, 32]`` in [0, 1).

    ``bow`` -1..1 says to which side a nucleus is bent: around its vessel where there is one, else as it happens.
    """

    x: Array
    y: Array
    a: Array
    b: Array
    cos: Array
    sin: Array
    chromatin: Array
    darkness: Array
    type_index: Array
    bow: Array
    u: Array

    @classmethod
    def of(cls, section: SectionLike) -> _Cells:
        nuclei = section.nuclei
        unknown = set(nuclei["cell_type"].unique()) - set(CELL_TYPES)
        if unknown:
            raise BadInput(f"cell_type holds {sorted(unknown)[0]!r}: use the names {', '.join(CELL_TYPES)}.")
        order = {name: i for i, name in enumerate(CELL_TYPES)}
        columns = {c: nuclei[c].to_numpy(np.float64) for c in ("x_um", "y_um", "major_um", "minor_um", "angle")}
        draws = [stream(section.seed, "nucleus", section.donor, int(key)).random(32) for key in nuclei["key"]]
        u = np.asarray(draws, dtype=np.float64).reshape(len(nuclei), 32)
        vessel = np.asarray(section.fields["vessel_lumen"], dtype=np.float64)
        node = np.stack([columns["y_um"], columns["x_um"]]) / section.grid_um
        node = np.clip(node.astype(np.int64), 0, np.array(vessel.shape)[:, None] - 1)
        down, right = (np.gradient(vessel, axis=axis)[node[0], node[1]] for axis in (0, 1))
        inward = down * np.cos(columns["angle"]) - right * np.sin(columns["angle"])
        beside_vessel = np.hypot(down, right) > 0.02
        return cls(
            x=columns["x_um"],
            y=columns["y_um"],
            a=columns["major_um"] / 2,
            b=columns["minor_um"] / 2,
            cos=np.cos(columns["angle"]),
            sin=np.sin(columns["angle"]),
            chromatin=nuclei["chromatin"].to_numpy(np.float64),
            darkness=nuclei["darkness"].to_numpy(np.float64),
            type_index=nuclei["cell_type"].astype(str).map(order).to_numpy(np.int64),
            bow=np.where(beside_vessel, np.sign(inward), 2 * u[:, 1] - 1),
            u=u,
        )


def _window(x_um: float, y_um: float, half_um: float, n: int) -> tuple[slice, slice] | None:
    """Pixels (rows, columns) within ``half_um`` of a point, cut to the picture; None where nothing is left."""
    x0, x1 = int(np.floor((x_um - half_um) / UM_PER_PX)), int(np.ceil((x_um + half_um) / UM_PER_PX))
    y0, y1 = int(np.floor((y_um - half_um) / UM_PER_PX)), int(np.ceil((y_um + half_um) / UM_PER_PX))
    x0, x1, y0, y1 = max(x0, 0), min(x1, n), max(y0, 0), min(y1, n)
    return (slice(y0, y1), slice(x0, x1)) if x0 < x1 and y0 < y1 else None


def _offsets(window: tuple[slice, slice], x_um: float, y_um: float) -> tuple[Array, Array]:
    """Position of pixel centres relative to a point, um: x ``[1, w]`` and y ``[h, 1]``."""
    rows, columns = window
    x = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5) * UM_PER_PX - np.float32(x_um)
    y = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) * UM_PER_PX - np.float32(y_um)
    return x[None, :], y[:, None]


def _territories(canvas: _Canvas, cells: _Cells) -> tuple[Array, Array, Array]:
    """Which cell's cytoplasm a pixel belongs to.

    Returns
    -------
    owner: int32 ``[H, W]`` row of the cell, -1 where none reaches.
    distance: float32, um beyond the owner's nucleus-sized core.
    gap: float32, um to the border with the next cell (its distance minus the owner's).
    """
    shape = (canvas.n, canvas.n)
    owner = np.full(shape, -1, dtype=np.int32)
    first = np.full(shape, np.inf, dtype=np.float32)
    second = np.full(shape, np.inf, dtype=np.float32)
    warp_x, warp_y = canvas.warp
    for i, kind in enumerate(cells.type_index):
        look = _LOOKS[CELL_TYPES[kind]]
        a, b = cells.a[i], cells.b[i]
        core = float(np.sqrt(a * b)) if look.stretch < 1.5 else b
        reach = _EPITHELIAL_REACH_UM if CELL_TYPES[kind] in _EPITHELIAL else look.margin + 1.2
        stretch = look.stretch * (a / b if look.stretch > 1.5 else min((a / b) ** 0.5, 1.4))
        turn = 2 * np.pi * cells.u[i, 0]
        x, y = cells.x[i] + look.offset * np.cos(turn), cells.y[i] + look.offset * np.sin(turn)
        window = _window(x, y, (core + reach) * stretch, canvas.n)
        if window is None:
            continue
        dx, dy = _offsets(window, x, y)
        dx, dy = dx + warp_x[window], dy + warp_y[window]
        c, s = (cells.cos[i], cells.sin[i]) if not look.offset else (np.cos(turn), np.sin(turn))
        along, across = (dx * c + dy * s) / np.float32(stretch), dy * c - dx * s
        d = np.sqrt(along * along + across * across) - np.float32(core)
        d[d > reach] = np.inf
        best, next_best = first[window], second[window]
        won = d < best
        np.copyto(next_best, np.where(won, best, np.minimum(next_best, d)))
        np.copyto(owner[window], np.int32(i), where=won)
        np.copyto(best, d, where=won)
    gap = np.where(np.isfinite(second), second, np.float32(99)) - np.where(np.isfinite(first), first, 0)
    return owner, first, gap


def _outline(cells: _Cells, i: int, look: _Look, dx: Array, dy: Array, mitotic: bool) -> tuple[Array, Array, Array]:
    """Irregular nucleus in its own polar coordinates: relative radius (1 on the outline), cosine and sine, ``[h, w]``.

    A superellipse bent along its long axis and perturbed by harmonics 2-6, with the area of the ellipse kept.
    """
    u = cells.u[i]
    a, b = (cells.a[i], cells.b[i]) if not mitotic else (cells.a[i] * 0.88, cells.a[i] * 0.33)
    along, across = dx * cells.cos[i] + dy * cells.sin[i], dy * cells.cos[i] - dx * cells.sin[i]
    wave = np.float32(0.5 * look.bend * (2 * u[2] - 1) / a)
    across = across - np.float32(look.bend * cells.bow[i]) * along * along - wave * along**3
    grow = 1.0 if look.power == 2 else 1.07
    p, q = along / np.float32(a * grow), across / np.float32(b * grow)
    radius = np.sqrt(p * p + q * q)
    z = (p + 1j * q) / np.maximum(radius, 1e-3)
    if look.power != 2:
        radius = (np.abs(p) ** look.power + np.abs(q) ** look.power) ** np.float32(1 / look.power)
    rough = look.rough * (2.0 if mitotic else 1.0)
    strength = rough * (0.4 + 1.2 * u[3:8]) * np.array([1.0, 0.9, 0.7, 0.6, 0.5])
    turn, shape, power = np.exp(2j * np.pi * u[8:13]), np.ones_like(radius), z
    for k in range(5):
        power = power * z
        shape = shape + np.float32(strength[k]) * (power * turn[k].astype(np.complex64)).real
    shape = shape / np.float32(np.sqrt(1 + (strength**2).sum() / 2))
    return radius / np.maximum(shape, 0.3), z.real, z.imag


def _nuclei(canvas: _Canvas, cells: _Cells) -> tuple[Array, Array, Array]:
    """Haematoxylin of all nuclei, how far they cover a pixel (0..1), and the label mask, each ``[H, W]``."""
    shape = (canvas.n, canvas.n)
    amount = np.zeros(shape, dtype=np.float32)
    cover = np.zeros(shape, dtype=np.float32)
    nearest = np.ones(shape, dtype=np.float32)
    label = np.zeros(shape, dtype=np.int32)
    fine, coarse = canvas.noise("chromatin fine", 0.42), canvas.noise("chromatin coarse", 0.8)
    for i, kind in enumerate(cells.type_index):
        name, u = CELL_TYPES[kind], cells.u[i]
        look = _LOOKS[name]
        mitotic = name == "Proliferating tumour" and u[13] < _MITOTIC_SHARE
        window = _window(cells.x[i], cells.y[i], 1.3 * max(cells.a[i], cells.b[i]) + 1.5, canvas.n)
        if window is None:
            continue
        dx, dy = _offsets(window, cells.x[i], cells.y[i])
        radius, cos, sin = _outline(cells, i, look, dx, dy, mitotic)
        size = float(min(cells.a[i], cells.b[i])) * (0.5 if mitotic else 1.0)
        edge = 0.11 + 0.16 * u[14]
        inside = 1 / (1 + np.exp(np.clip((radius - 1) * np.float32(size / edge), -30, 30)))

        # each nucleus sees its own piece of the chromatin noise, else neighbours that move would share one pattern
        h, w = inside.shape
        rows = (window[0].start + int(u[15] * 4096) + np.arange(h)) % canvas.n
        columns = (window[1].start + int(u[16] * 4096) + np.arange(w)) % canvas.n
        piece = np.ix_(rows, columns)
        grain = look.coarse * coarse[piece] + (1 - look.coarse) * fine[piece]
        clump = look.clump * (0.55 + 0.9 * cells.chromatin[i])
        mean = look.nucleus * (0.78 + 0.36 * cells.darkness[i] + 0.2 * (u[17] - 0.5))
        if mitotic:
            density = np.float32(1.5) * (1 + 0.15 * grain)
        else:
            density = mean * np.exp(np.float32(clump) * np.clip(grain, -2, 2) - np.float32(clump**2 / 2))
            rim = np.exp(-(((radius - 0.9) * np.float32(size / 0.42)) ** 2))
            density = density + np.float32(look.rim * (0.7 + 0.6 * u[18])) * rim * (1 + 0.35 * grain)
        if look.nucleoli and not mitotic:
            for k in range(1 + int(u[19] < 0.35)):
                r, t = 0.5 * u[20 + 3 * k], 2 * np.pi * u[21 + 3 * k]
                away = ((radius * cos - r * np.cos(t)) ** 2 + (radius * sin - r * np.sin(t)) ** 2) * size**2
                width = 0.6 + 0.35 * u[22 + 3 * k]
                density = density + np.float32(look.nucleoli * (0.6 + 0.7 * u[26 + k])) * np.exp(-away / width**2)
        if name == "Plasma cell":
            spokes = np.cos(7 * np.arctan2(sin, cos) + 2 * np.pi * u[28])
            density = density + 0.42 * spokes * np.exp(-(((radius - 0.72) / 0.24) ** 2))
            density = density + 0.3 * np.exp(-((radius / 0.28) ** 2))
        amount[window] += inside * density.astype(np.float32)
        np.maximum(cover[window], inside, out=cover[window])
        closer = radius < nearest[window]
        label[window][closer] = i + 1
        np.minimum(nearest[window], radius, out=nearest[window])
    return 1.9 * (1 - np.exp(-amount / 1.9)) * (1 + 0.12 * amount), cover, label


def _stroma(canvas: _Canvas) -> tuple[Array, Array]:
    """Haematoxylin and eosin of the matrix: wavy collagen bundles, clefts, pale loose ground, ``[H, W]``."""
    angle = np.asarray(canvas.section.fields["fibre_angle"])
    angle = 0.5 * np.arctan2(canvas.resample(np.sin(2 * angle)), canvas.resample(np.cos(2 * angle)))
    angle = angle + 0.32 * canvas.noise("crimp", 7.0) + 0.18 * canvas.noise("crimp fine", 3.0)
    collagen = np.clip(canvas.field("collagen"), 0, 1)
    bundle = _streaks(canvas.noise("bundles", 1.3), angle, (2.5, 5.0, 10.0, 16.0)) + 0.5 * canvas.noise("bundle", 6.0)
    fibril = _streaks(canvas.noise("fibrils", 0.5), angle, (1.0, 2.0, 4.0, 7.0))
    dense = _smoothstep(collagen + 0.16 * canvas.noise("density", 9.0), 0.1, 0.75)
    body = 1 / (1 + np.exp(-(bundle + 0.35 * fibril + 2.1 * dense - 0.35) * 3.2))
    eosin = body * (0.10 + 0.18 * dense) * (1 + 0.42 * np.tanh(fibril) + 0.22 * np.tanh(bundle)) + 0.012
    ground = (0.018 + 0.03 * (1 - dense)) * (1 + 0.5 * np.tanh(fibril + 0.6 * bundle))
    return ground + 0.02 * body, np.maximum(eosin, 0)


def _erythrocytes(canvas: _Canvas, vessel: Array) -> Array:
    """Red cells, 5.5-7 um, on a jittered lattice inside vessels: amount ``[H, W]``."""
    pitch = 5.6
    m = int(np.ceil(canvas.section.size_um / pitch))
    u = stream(canvas.section.seed, "texture", canvas.section.donor, "erythrocytes").random((m, m, 6))
    out = np.zeros((canvas.n, canvas.n), dtype=np.float32)
    x, y = (np.arange(m)[None, :] + u[..., 0]) * pitch, (np.arange(m)[:, None] + u[..., 1]) * pitch
    px = np.clip((np.stack([y, x]) / UM_PER_PX).astype(int), 0, canvas.n - 1)
    for j, k in np.argwhere((u[..., 2] < 0.42) & (vessel[px[0], px[1]] > 0.75)):
        window = _window(x[j, k], y[j, k], 5.0, canvas.n)
        if window is None:
            continue
        dx, dy = _offsets(window, x[j, k], y[j, k])
        c, s = np.cos(np.pi * u[j, k, 3]), np.sin(np.pi * u[j, k, 3])
        r = np.hypot(dx * c + dy * s, (dy * c - dx * s) / (0.62 + 0.38 * u[j, k, 4])) / (2.7 + 0.6 * u[j, k, 5])
        disc = (0.72 + 0.28 * np.minimum(r, 1) ** 2) / (1 + np.exp(np.clip((r - 1) * 11, -30, 30)))
        np.maximum(out[window], disc, out=out[window])
    return 0.40 * out


def _deposit(canvas: _Canvas, cells: _Cells) -> tuple[Array, Array]:
    """Amounts of the three stains ``[H, W, 3]`` in optical density units, and the label mask."""
    haem: Array
    eosin: Array
    haem, eosin = _stroma(canvas)
    grain = 0.55 * canvas.noise("cytoplasm fine", 0.45) + 0.6 * canvas.noise("cytoplasm", 1.3)
    patchy = canvas.noise("patchy", 14.0)
    epithelium = canvas.field("epithelium", warped=True)
    cohesion = np.clip(canvas.field("cohesion"), -3, 3)
    hypoxia = _smoothstep(canvas.field("hypoxia") + 0.3 * patchy, 0.8, 2.6)
    lumen = _smoothstep(canvas.field("lumen", warped=True), 0.38, 0.62)
    vessel_field = canvas.field("vessel_lumen", warped=True)
    vessel = _smoothstep(vessel_field, 0.4, 0.6)
    nest = _smoothstep(epithelium, 0.38, 0.62)

    # a shrinking nest tears off the stroma along parts of its border
    torn = _smoothstep(canvas.noise("retraction", 18.0) - 0.25 * cohesion, 0.5, 1.0)
    tear = torn * np.exp(-(((epithelium - 0.30) / 0.11) ** 2))
    haem, eosin = haem * (1 - 0.9 * tear), eosin * (1 - 0.9 * tear)

    if len(cells.x):
        owner, distance, gap = _territories(canvas, cells)
        owned, of = owner >= 0, np.maximum(owner, 0)
        looks = [_LOOKS[CELL_TYPES[k]] for k in cells.type_index]

        def per_cell(name: str) -> Array:
            return np.array([getattr(look, name) for look in looks], dtype=np.float32)

        tint = (1 + 0.24 * (cells.u[:, 29] - 0.5)).astype(np.float32)
        cyto_h: Array = (per_cell("cyto_h") * tint)[of]
        cyto_e: Array = (per_cell("cyto_e") * tint)[of]
        is_epithelial = np.isin(cells.type_index, [CELL_TYPES.index(t) for t in _EPITHELIAL])[of]
        alone = owned * (1 - _smoothstep(distance - per_cell("margin")[of], -0.5, 0.5))
        held = nest * (1 - _smoothstep(distance, _EPITHELIAL_REACH_UM - 3.5, _EPITHELIAL_REACH_UM - 0.5))
        cyto = np.where(is_epithelial & owned, np.maximum(held, alone), alone)
        # a cell at the edge of a lumen keeps its cytoplasm: the lumen gives way
        lumen = lumen * (1 - (is_epithelial & owned) * (1 - _smoothstep(distance, 0.8, 2.6)))
        # where a nest has no nucleus in this plane of section, its cytoplasm is cut tangentially: pale and granular
        thin = np.clip(1 + 0.2 * grain + 0.25 * patchy, 0.3, 2)
        haem, eosin = haem * (1 - nest) + 0.06 * thin * nest, eosin * (1 - nest) + 0.13 * thin * nest
        foam = per_cell("foam")[of]
        bubbles = _smoothstep(canvas.noise("foam", 0.75), -0.1, 1.0)
        texture = np.clip(1 + (0.27 + 0.08 * foam) * grain + 0.08 * patchy, 0.2, 2) * (1 - 0.5 * foam * bubbles)
        between = np.exp(-((gap / 0.55) ** 2))
        loose = _smoothstep(-cohesion + 0.5 * canvas.noise("loosening", 6.0), 0.4, 1.8)
        line = between * is_epithelial * (0.32 - 1.15 * loose)
        split = np.exp(-((gap / 1.1) ** 2)) * is_epithelial * loose * 0.75
        rind = foam * np.exp(-(((distance - 3.7) / 0.5) ** 2))
        cyto_h = cyto_h * texture * (1 + 0.5 * np.maximum(line, -0.9))
        cyto_e = cyto_e * texture * (1 + np.maximum(line, -0.9)) + 0.05 * rind
        cyto_h, cyto_e = cyto_h * (1 - split), cyto_e * (1 - split)
        haem, eosin = haem * (1 - cyto) + cyto_h * cyto, eosin * (1 - cyto) + cyto_e * cyto

    # gland lumen: secretion in wisps, a denser apical border; vessel lumen: plasma within a pink wall
    apical = np.exp(-(((lumen - 0.3) / 0.22) ** 2)) * (lumen > 0.02)
    secretion = 0.07 * _smoothstep(canvas.noise("secretion", 7.0) + 0.4 * grain, 0.4, 2.2)
    eosin = eosin * (1 + 0.25 * apical) * (1 - lumen) + (0.006 + secretion) * lumen
    haem = haem * (1 - lumen) + 0.25 * secretion * lumen
    wall = np.exp(-(((vessel_field - 0.22) / 0.14) ** 2))
    plasma = 0.035 * (1 + 0.5 * np.tanh(canvas.noise("plasma", 8.0)))
    eosin = (eosin * (1 - 0.5 * wall) + 0.12 * wall) * (1 - vessel) + plasma * vessel
    haem = haem * (1 - vessel) + 0.004 * vessel
    red = _erythrocytes(canvas, vessel)

    nuclear, cover, label = _nuclei(canvas, cells)
    under = 1 - cover
    haem = haem * (1 - 0.25 * hypoxia) * (under + 0.35 * cover) + nuclear * (1 - 0.28 * hypoxia)
    eosin = eosin * (1 + 0.12 * hypoxia) * (under + 0.45 * cover) + 0.05 * cover * np.minimum(nuclear, 1)
    thickness = 1 + 0.05 * patchy + 0.06 * canvas.noise("thickness", 45.0)
    return np.stack([haem * thickness, eosin * thickness, red * under], axis=-1), label


def _scan(canvas: _Canvas, light: Array, stain: Stain) -> Array:
    """Optics and camera: blur with drifting focus, slight shading, noise, 8 bits."""
    n, sigma = canvas.n, stain.blur_um / UM_PER_PX
    sharp = ndimage.gaussian_filter(light, (sigma, sigma, 0))
    soft = ndimage.gaussian_filter(sharp, (1.1, 1.1, 0))
    # in focus the scanner's sharpening wins (negative), elsewhere the blur
    away = 1.35 * _smoothstep(canvas.noise("focus", 60.0) + 3 * stain.defocus - 1.5, 0.0, 2.0) - 0.55
    picture = np.clip(sharp + (soft - sharp) * away[..., None], 0, 1)
    shade = 1 + 0.012 * canvas.noise("illumination", 150.0)
    camera = stream(canvas.section.seed, "texture", canvas.section.donor, "camera")
    shot = camera.standard_normal((n, n, 3), dtype=np.float32) * np.float32(stain.noise)
    return np.clip(np.rint(picture * shade[..., None] * 255 + shot * np.sqrt(picture)), 0, 255).astype(np.uint8)


def render(section: SectionLike, stain_seed: int) -> tuple[Array, Array]:
    """The section as a scanned H&E slide.

    Parameters
    ----------
    section: square section with nuclei (um, full axis lengths), fields on its grid, seed and donor.
    stain_seed: draws the donor's staining and optics; the tissue's own texture comes from ``section.seed``.

    Returns
    -------
    image: uint8 ``[H, W, 3]`` RGB at 0.5 um per pixel, ``H = W = size_um / 0.5``.
    label: int32 ``[H, W]``, 0 outside nuclei, ``i + 1`` in the nucleus of row ``i`` of ``section.nuclei``. Where two
        overlap, a pixel goes to the one it is deeper in, so every centre carries its own label.

    Raises
    ------
    BadInput: a cell type that is not one of ``config.CELL_TYPES``.
    """
    canvas, cells = _Canvas(section), _Cells.of(section)
    stain = draw_stain(stain_seed, section.donor)
    amounts, label = _deposit(canvas, cells)
    strength = np.array([stain.haematoxylin, stain.eosin, 1.0], dtype=np.float32)
    return _scan(canvas, transmit(amounts * strength, stain), stain), label
