"""The pictures of ``my_own_slide.md``, from simulated data; run from the project's folder.

python -m ge2hist_core simulate-slide slide --seed 5 --columns 2 --compression jpeg
python -m ge2hist_core prepare slide/outs --image slide/HE.tif --out data.zarr --keep
python -m ge2hist_core simulate tissue.zarr --donors 3
python docs/my_own_slide_pictures.py data.zarr tissue.zarr docs/images
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from skimage.segmentation import find_boundaries

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ge2hist_core.data import open_store
from ge2hist_core.section_picture import overview, section_size_um
from perturb.colours import colour_of

SIDE_PX = 360


def registration(work: Path, out: Path) -> None:
    """The overlay that ``prepare`` wrote, smaller."""
    with Image.open(work / "registration.png") as image:
        small = image.convert("RGB")
        small.thumbnail((1300, 1300))
        small.save(out / "registration.jpg", quality=80)


def segmentation(work: Path, out: Path) -> None:
    """Outlines of the nuclei found, in the middle of the slide, beside the picture without them."""
    picture = np.load(work / "image.npy", mmap_mode="r")
    labels = np.load(work / "labels.npy", mmap_mode="r")
    top, left = ((n - SIDE_PX) // 2 for n in labels.shape)
    window = (slice(top, top + SIDE_PX), slice(left, left + SIDE_PX))
    plain, marked = np.array(picture[window]), np.array(picture[window])
    marked[find_boundaries(np.array(labels[window]), mode="inner")] = (0, 158, 115)
    both = np.concatenate([plain, np.full((SIDE_PX, 8, 3), 255, dtype=np.uint8), marked], axis=1)
    Image.fromarray(both).save(out / "segmentation.jpg", quality=80)


def section_map(store: Path, out: Path) -> None:
    """Cells of the first section over its H&E, as the app's map shows them."""
    with open_store(store) as source:
        assert source.donor is not None and source.cell_type is not None and source.xy is not None
        donor = str(sorted(set(source.donor))[0])
        width, height = section_size_um(store, donor, source.um_per_px)
        figure = Figure(figsize=(7.5, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.imshow(overview(store, donor), extent=(0, width, height, 0))
        for name in sorted(set(source.cell_type)):
            rows = (source.cell_type == name) & (source.donor == donor)
            axes.scatter(*source.xy[rows].T, s=9, color=colour_of(name), alpha=0.65, label=name, linewidths=0)
        axes.set(xlabel="x (µm)", ylabel="y (µm)", xlim=(0, width), ylim=(height, 0))
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), markerscale=2, frameon=False)
        figure.savefig(out / "section_map.jpg", dpi=110, pil_kwargs={"quality": 80})


if __name__ == "__main__":
    prepared, tissue, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    work = prepared.with_name(prepared.name + ".prepare")
    registration(work, folder)
    segmentation(work, folder)
    section_map(tissue, folder)
