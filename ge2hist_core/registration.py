"""Is the picture where the transcripts are? The shift between nuclear stain and UMI density, measured and drawn.

RNA is made in nuclei and stays near them, so the map of UMIs follows the map of haematoxylin. Both are brought to the
2-um grid, freed of everything broader than ``BROAD_UM`` (cellularity, stain gradients), and correlated for every shift
up to ``REACH_UM``; the shift with the highest correlation is what the registration is off by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ge2hist_core.files import atomic_path
from ge2hist_core.slide_image import SlideImage

__all__ = ["Registration", "check_registration", "draw_overlay"]

GRID_UM = 2.0
REACH_UM = 30.0
BROAD_UM = 16.0
WINDOW_UM = 400.0
WINDOWS = 12
LEAST_SHIFT_UM = 2.0
"""One bin: a smaller shift moves no UMI to another bin."""
LEAST_CORRELATION = 0.1


@dataclass(frozen=True, eq=False)
class Registration:
    """What was measured.

    Parameters
    ----------
    shift_um: (x, y) to add to the bins' places to lie on the picture's nuclei best.
    error_um: standard error of the shift (jackknife over windows), the larger of x and y; NaN with one window.
    correlation: at that shift. correlation_at_zero: as registered by the run.
    windows: number of windows of about ``WINDOW_UM`` that were used.
    map: ``[dy, dx]`` correlation for shifts from -``REACH_UM`` to ``REACH_UM`` in steps of ``GRID_UM``.
    """

    shift_um: tuple[float, float]
    error_um: float
    correlation: float
    correlation_at_zero: float
    windows: int
    map: np.ndarray

    @property
    def warning(self) -> str | None:
        """One sentence if the registration is in doubt, else None."""
        x, y = self.shift_um
        if self.correlation < LEAST_CORRELATION:
            return (
                f"Nuclear stain and UMI density hardly correlate (r = {self.correlation:.2f} at the best of all shifts "
                f"up to {REACH_UM:g} um): look at the overlay, the image may be of another slide or turned."
            )
        if np.hypot(x, y) > max(LEAST_SHIFT_UM, 2 * np.nan_to_num(self.error_um)):
            return (
                f"The transcripts fit the nuclei best when shifted by x {x:+.1f} um, y {y:+.1f} um (r = "
                f"{self.correlation:.2f} instead of {self.correlation_at_zero:.2f}): look at the overlay, and give "
                f"--shift-um={x:.1f},{y:.1f} if you agree."
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """All but the map, for the report."""
        figures = {k: v for k, v in asdict(self).items() if k != "map"}
        return figures | {"error_um": None if np.isnan(self.error_um) else self.error_um, "warning": self.warning}


def check_registration(
    image: SlideImage, xy_um: np.ndarray, umi: np.ndarray, on_window: Callable[[], object] = lambda: None
) -> Registration:
    """Correlate haematoxylin with UMI density.

    Parameters
    ----------
    xy_um: ``[bin, 2]`` centres in um of the picture. umi: ``[bin]`` UMIs.
    on_window: called after each window.
    """
    from skimage.feature import match_template

    reach = round(REACH_UM / GRID_UM)
    density, corner = _umi_map(xy_um, umi)
    maps, weights = [], []
    for top, left, height, width in _windows(density):
        rows = (top + corner[1], top + corner[1] + height)
        columns = (left + corner[0], left + corner[0] + width)
        around = ((rows[0] - reach, rows[1] + reach), (columns[0] - reach, columns[1] + reach))
        haem = _band(haematoxylin(image, *around))
        counts = _band(np.log1p(density[top : top + height, left : left + width]))
        if haem.std() > 1e-6 and counts.std() > 1e-6:
            # Position (i, j) says how well the counts fit (i, j) from the corner: a shift of (i, j) - reach.
            maps.append(match_template(haem, counts))
            weights.append(counts.size)
        on_window()
    size = 2 * reach + 1
    if not maps:
        return Registration((0.0, 0.0), float("nan"), 0.0, 0.0, 0, np.zeros((size, size)))
    stack, weight = np.stack(maps), np.array(weights, dtype=np.float64)
    mean = np.tensordot(weight, stack, 1) / weight.sum()
    shift = _peak(mean, reach)
    error = float("nan")
    n = len(stack)
    if n > 1:
        left_out = np.array(
            [_peak((mean * weight.sum() - weight[i] * stack[i]) / (weight.sum() - weight[i]), reach) for i in range(n)]
        )
        error = float(np.sqrt((n - 1) / n * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0)).max())
    return Registration(shift, error, float(mean.max()), float(mean[reach, reach]), n, mean)


def haematoxylin(image: SlideImage, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    """Haematoxylin density (``skimage.color.rgb2hed``) on the 2-um grid, float ``[h, w]``."""
    from skimage.color import rgb2hed

    # Unmixed at 1 um, then averaged: light adds, density does not.
    fine = rgb2hed(image.at_scale((2 * rows[0], 2 * rows[1]), (2 * columns[0], 2 * columns[1]), GRID_UM / 2))[..., 0]
    return fine.reshape(rows[1] - rows[0], 2, columns[1] - columns[0], 2).mean(axis=(1, 3))


def _umi_map(xy_um: np.ndarray, umi: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """UMIs per cell of the picture's 2-um grid, and the (column, row) of the map's corner in that grid."""
    at = np.floor(xy_um / GRID_UM).astype(np.int64)
    corner = at.min(axis=0)
    width, height = at.max(axis=0) - corner + 1
    place = (at[:, 1] - corner[1]) * width + at[:, 0] - corner[0]
    density = np.bincount(place, umi, minlength=width * height).reshape(height, width)
    return density, (int(corner[0]), int(corner[1]))


def _windows(density: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Windows (top, left, height, width) with the most UMIs, about ``WINDOW_UM`` wide."""
    side = round(WINDOW_UM / GRID_UM)
    cuts = [np.linspace(0, n, max(1, round(n / side)) + 1).round().astype(int) for n in density.shape]
    boxes = [(int(t), int(c), int(b - t), int(d - c)) for t, b in zip(cuts[0], cuts[0][1:], strict=False)
             for c, d in zip(cuts[1], cuts[1][1:], strict=False)]  # fmt: skip
    most = sorted(boxes, key=lambda b: -density[b[0] : b[0] + b[2], b[1] : b[1] + b[3]].sum())
    return [box for box in most[:WINDOWS] if min(box[2:]) >= 16]


def _band(values: np.ndarray) -> np.ndarray:
    """Structures of the size of nuclei: smoothed by 2 um, freed of what is broader than ``BROAD_UM``."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(values, 1.0) - gaussian_filter(values, BROAD_UM / GRID_UM)


def _peak(correlation: np.ndarray, reach: int) -> tuple[float, float]:
    """Shift (x, y) in um of the highest correlation, between grid points by a parabola through its neighbours."""
    at = np.unravel_index(int(correlation.argmax()), correlation.shape)
    out = []
    for axis in (1, 0):
        k = int(at[axis])
        line = correlation[at[0], :] if axis else correlation[:, at[1]]
        offset = 0.0
        if 0 < k < len(line) - 1:
            before, here, after = line[k - 1 : k + 2]
            bend = before - 2 * here + after
            offset = 0.5 * (before - after) / bend if bend < 0 else 0.0
        out.append(float((k + offset - reach) * GRID_UM))
    return out[0], out[1]


def draw_overlay(
    path: str | Path,
    image: SlideImage,
    xy_um: np.ndarray,
    umi: np.ndarray,
    found: Registration,
    labels: np.ndarray | None = None,
    origin_um: tuple[float, float] = (0.0, 0.0),
    labels_um_per_px: float = 0.5,
) -> None:
    """Three panels as PNG: the slide with its UMIs, the busiest 200 um with UMIs and nuclei, the correlation map."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    density, corner = _umi_map(xy_um, umi)
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    whole, close, heat = figure.subplots(1, 3)

    step = max(1, -(-max(density.shape) // 700))
    height, width = (n // step * step for n in density.shape)
    coarse = density[:height, :width].reshape(height // step, step, width // step, step).mean(axis=(1, 3))
    scale = GRID_UM * step
    # The corner need not be a multiple of the coarse step: read from the next one and shift by less than a pixel.
    rows, columns = ((c // step, c // step + n) for c, n in zip(corner[::-1], coarse.shape, strict=True))
    extent_um = (corner[0] * GRID_UM, corner[0] * GRID_UM + width * GRID_UM)
    depth_um = (corner[1] * GRID_UM + height * GRID_UM, corner[1] * GRID_UM)
    strips = [image.at_scale((r, min(r + 16, rows[1])), columns, scale) for r in range(rows[0], rows[1], 16)]
    whole.imshow(np.concatenate(strips), extent=(*extent_um, *depth_um))
    whole.imshow(np.log1p(coarse), extent=(*extent_um, *depth_um), cmap="viridis", alpha=0.45)
    whole.set(title="UMIs (log, colour) over the H&E", xlabel="x (um)", ylabel="y (um)")

    side = min(100, *density.shape)
    sums = density.cumsum(0).cumsum(1)
    sums = np.pad(sums, ((1, 0), (1, 0)))
    box = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(int(box.argmax()), box.shape)
    x0, y0 = (corner[0] + int(left)) * GRID_UM, (corner[1] + int(top)) * GRID_UM
    span = side * GRID_UM
    fine = round(1 / 0.5)
    picture = image.at_scale((int(y0) * fine, int(y0 + span) * fine), (int(x0) * fine, int(x0 + span) * fine), 1 / fine)
    around = (x0, x0 + span, y0 + span, y0)
    close.imshow(picture, extent=around)
    close.imshow(np.log1p(density[top : top + side, left : left + side]), extent=around, cmap="viridis", alpha=0.4)
    if labels is not None:
        r0, c0 = (round((v - o) / labels_um_per_px) for v, o in ((y0, origin_um[1]), (x0, origin_um[0])))
        n = round(span / labels_um_per_px)
        part = np.asarray(labels[max(r0, 0) : r0 + n, max(c0, 0) : c0 + n])
        if part.any() and not part.all():
            axes = [(np.arange(m) + 0.5 + max(a, 0)) * labels_um_per_px + o
                    for m, a, o in zip(part.shape, (r0, c0), origin_um[::-1], strict=True)]  # fmt: skip
            close.contour(axes[1], axes[0], (part > 0).astype(float), levels=[0.5], colors="k", linewidths=0.5)
    close.set(title="Closest look, with the nuclei found", xlabel="x (um)", ylabel="y (um)")

    edge = REACH_UM + GRID_UM / 2
    drawn = heat.imshow(found.map, extent=(-edge, edge, edge, -edge), cmap="magma")
    figure.colorbar(drawn, ax=heat, label="correlation of haematoxylin and UMI density")
    heat.plot(0, 0, "w+", markersize=12)
    heat.plot(*found.shift_um, "co", fillstyle="none", markersize=10)
    heat.set(
        title=f"Best at x {found.shift_um[0]:+.1f}, y {found.shift_um[1]:+.1f} um (o); as registered +",
        xlabel="shift of the UMIs in x (um)",
        ylabel="shift in y (um)",
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
