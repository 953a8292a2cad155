"""Readers of the public real data that ``benchmarks/real_data.py`` judges by. None of that data is part of the project.

Every reader takes the folder of its set, named in ``docs/real_data.md``. Pictures are uint8 RGB, label images int32
with 0 for background, lengths um.
"""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core.types import BadInput, Cells

CONSEP_UM_PER_PX = 0.25
CONSEP_TYPES = {1: "Miscellaneous", 2: "Inflammatory", 3: "Epithelial", 4: "Spindle"}
"""The order of HoVer-Net (Graham et al. 2019); the files themselves name no types."""
TILE, SIDE, TILES = 256, 1000, 16
BIN_UM = 8.0
CRC_CLASSES = {
    **dict.fromkeys(["Tumor I", "Tumor II", "Tumor III", "Tumor IV", "Tumor V"], "Epithelium"),
    **dict.fromkeys(["Goblet", "Enterocyte", "Epithelial", "Tuft", "Neuroendocrine"], "Epithelium"),
    **dict.fromkeys(["CAF", "Fibroblast", "Myofibroblast", "Proliferating Fibroblast"], "Stroma"),
    **dict.fromkeys(["Vascular Fibroblast", "Pericytes", "vSM"], "Stroma"),
    **dict.fromkeys(["Endothelial", "Lymphatic Endothelial"], "Endothelium"),
    **dict.fromkeys(["CD4 T cell", "CD8 T cell", "NK"], "T cell"),
    **dict.fromkeys(["Mature B", "Memory B"], "B cell"),
    "Plasma": "Plasma cell",
    **dict.fromkeys(["Macrophage", "Proliferating Macrophages", "Neutrophil", "cDC I", "mRegDC", "pDC"], "Myeloid"),
}
"""Types of the colon cancer maps in coarse classes that simulated tissue has too.

Left out, as if they had no label: the muscle wall (Smooth Muscle, SM Stress Response, Unknown III (SM)), Enteric Glial,
Adipocyte, Mast, and Proliferating Immune II, which may be several.
"""
XENIUM_CLASSES = {
    **dict.fromkeys(["Epithelial", "Malignant"], "Epithelium"),
    **dict.fromkeys(["Fibroblasts", "Myofibroblasts", "SMC"], "Stroma"),
    "Endothelial": "Endothelium",
    **dict.fromkeys(["CD4Tconv/Treg", "CD8T/CD8Tex", "NK"], "T cell"),
    "B": "B cell",
    "Plasma": "Plasma cell",
    **dict.fromkeys(["Mono/Macro", "DC", "Neutrophils"], "Myeloid"),
}
"""Types of the breast reference in the coarse classes of :data:`CRC_CLASSES`; Mast has none."""
LEAST_COUNTS = 10


class Annotated(NamedTuple):
    """One picture ``[H, W, 3]`` with every nucleus: ``labels [H, W]``, and the type of each label where it is known."""

    name: str
    image: np.ndarray
    labels: np.ndarray
    um_per_px: float
    types: dict[int, str]


def files(folder: Path, pattern: str, what: str) -> list[Path]:
    """The files of a set, sorted.

    Raises
    ------
    BadInput: there is none.
    """
    found = sorted(Path(folder).glob(pattern))
    if not found:
        raise BadInput(f"{folder} holds no {pattern}: give the folder of {what}.")
    return found


def monuseg(folder: Path) -> Iterator[Annotated]:
    """Pictures and outlines as the MoNuSeg challenge gives them: ``NAME.tif`` beside ``NAME.xml.gz``."""
    from PIL import Image
    from skimage.draw import polygon

    for path in files(folder, "*.xml.gz", "MoNuSeg"):
        name = path.name.removesuffix(".xml.gz")
        with Image.open(path.with_name(f"{name}.tif")) as opened:
            image = np.asarray(opened.convert("RGB"))
        root = ElementTree.fromstring(gzip.decompress(path.read_bytes()))
        labels = np.zeros(image.shape[:2], dtype=np.int32)
        for i, region in enumerate(root.iter("Region"), start=1):
            yx = np.array([(float(v.get("Y", "nan")), float(v.get("X", "nan"))) for v in region.iter("Vertex")])
            labels[polygon(yx[:, 0], yx[:, 1], labels.shape)] = i
        yield Annotated(name, image, labels, float(root.get("MicronsPerPixel", 0.25)), {})


def consep_corners() -> list[tuple[int, int]]:
    """(top, left) px of the 16 tiles of an image: three by three, then bottom row, right column and corner.

    The last ones overlap the others by 24 px; found from the pixels, which agree there.
    """
    full, last = [0, TILE, 2 * TILE], SIDE - TILE
    corners = [(top, left) for top in full for left in full]
    return corners + [(last, left) for left in full] + [(top, last) for top in full] + [(last, last)]


def stitched(tiles: list[np.ndarray]) -> np.ndarray:
    """The image of 1000 px that 16 tiles ``[256, 256, ...]`` were cut from; of overlaps the first tile counts.

    Examples
    --------
    >>> stitched([np.full((256, 256), i) for i in range(16)])[[0, 0, 999], [0, 999, 999]].tolist()
    [0, 12, 15]
    """
    out = np.zeros((SIDE, SIDE, *tiles[0].shape[2:]), dtype=tiles[0].dtype)
    for (top, left), tile in reversed(list(zip(consep_corners(), tiles, strict=True))):
        out[top : top + TILE, left : left + TILE] = tile
    return out


def consep(folder: Path) -> Iterator[Annotated]:
    """CoNSeP's images put together again from their tiles: ``images.zip``, ``instances.npz``, ``nuclei.csv.gz``.

    An instance keeps its number over the tiles of an image, so that no nucleus is cut but at the border of the image.
    """
    from PIL import Image

    (archive,), (table,) = files(folder, "instances.npz", "CoNSeP"), files(folder, "nuclei.csv.gz", "CoNSeP")
    with np.load(archive) as stored:
        names, maps = stored["names"].astype(str), stored["instances"]
    nuclei = pd.read_csv(table)
    type_of = {name: part["type"].to_numpy() for name, part in nuclei.sort_values("instance").groupby("tile")}
    image_of = np.array([name.rsplit("_", 1)[0] for name in names])
    with zipfile.ZipFile(files(folder, "images.zip", "CoNSeP")[0]) as pictures:
        member = {Path(name).stem: name for name in pictures.namelist()}
        for name in sorted(set(image_of), key=lambda text: int(text.rsplit("_", 1)[1])):
            rows = np.flatnonzero(image_of == name)
            rows = rows[np.argsort(names[rows])]
            if len(rows) != TILES:
                raise BadInput(f"{name} of CoNSeP has {len(rows)} tiles, expected {TILES}: copy the folder again.")
            tiles, types = [], {}
            for row in rows:
                with Image.open(io.BytesIO(pictures.read(member[names[row]]))) as opened:
                    tiles.append(np.asarray(opened.convert("RGB")))
                # The table counts the labels of a tile, the map keeps those of the image.
                labels = np.unique(maps[row][maps[row] > 0]).tolist()
                types |= {i: CONSEP_TYPES[k] for i, k in zip(labels, type_of.get(names[row], ()), strict=True)}
            yield Annotated(
                name, stitched(tiles), stitched([maps[i] for i in rows]).astype(np.int32), CONSEP_UM_PER_PX, types
            )


def nuclei_of(picture: Annotated) -> pd.DataFrame:
    """Centres, areas and types of the annotated nuclei: ``x_um``, ``y_um``, ``area_um2``, ``cell_type``."""
    from ge2hist_core.segmentation import nuclei_table

    table = nuclei_table(picture.labels, int(picture.labels.max()), picture.um_per_px)
    table = table[table["area_um2"] > 0]
    kind = [picture.types.get(i, "Nucleus") for i in table.index]
    return table.assign(cell_type=np.array(kind, dtype=object)).reset_index(drop=True)


def crc_map(path: Path) -> np.ndarray:
    """Type of each 8-um bin of a Visium HD slide, ``[row, column]`` of strings, "" where there is none.

    Reads ``barcode`` (``s_008um_ROW_COLUMN-1``) and ``DeconvolutionLabel1``. Bins that the authors rejected have none.
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    place = table["barcode"].str.extract(r"_(\d+)_(\d+)-").astype(int).to_numpy()
    label = table["DeconvolutionLabel1"].where(table["DeconvolutionClass"] != "reject", "").replace("NA", "")
    out = np.full(place.max(axis=0) + 1, "", dtype=object)
    out[place[:, 0], place[:, 1]] = label.to_numpy(dtype=object)
    return out


def xenium_cells(folder: Path) -> Cells:
    """Cells of bidcell's Xenium example, ``data`` of its wheel: transcripts over a nucleus, summed, at their middle.

    Nuclei of fewer than ten such transcripts are left out. Types are not annotated: :func:`most_like`.
    """
    (table,) = files(folder / "dataset_xenium_breast1_small", "transcripts_small.csv", "bidcell's example")
    (reference,) = files(folder / "sc_references", "sc_breast.csv", "bidcell's example")
    columns = ["cell_id", "overlaps_nucleus", "feature_name", "x_location", "y_location"]
    seen = pd.read_csv(table, usecols=columns)
    corner = seen[["x_location", "y_location"]].min().to_numpy()
    seen = seen[(seen["cell_id"] > 0) & (seen["overlaps_nucleus"] == 1)]
    cell, ids = pd.factorize(seen["cell_id"])
    gene, genes = pd.factorize(seen["feature_name"], sort=True)
    counts = sp.coo_array((np.ones(len(seen)), (cell, gene)), shape=(len(ids), len(genes))).tocsr()
    xy = seen.groupby(cell)[["x_location", "y_location"]].mean().to_numpy() - corner
    kept = np.asarray(counts.sum(axis=1)).ravel() >= LEAST_COUNTS
    counts, genes = sp.csr_matrix(counts[kept], dtype=np.float32), np.asarray(genes, dtype=object)
    profiles = pd.read_csv(reference, index_col=0)
    means = profiles.drop(columns=["ct_idx", "atlas"]).groupby("cell_type").mean()
    return Cells(
        counts=counts,
        genes=genes,
        cell_id=np.array([f"cell{i}" for i in ids[kept]], dtype=object),
        cell_type=most_like(counts, genes, means),
        donor=np.full(int(kept.sum()), "xenium", dtype=object),
        xy_um=xy[kept],
        source="bidcell",
    )


def most_like(counts: sp.csr_matrix, genes: np.ndarray, means: pd.DataFrame) -> np.ndarray:
    """``[cell]`` row of ``means [type, gene]`` (log scale) with which a cell's log counts correlate best.

    Genes that both have, each centred over the cells and over the types: what is high everywhere says nothing.
    """
    shared = [gene for gene in genes if gene in means.columns]
    at = pd.Index(genes).get_indexer(shared)
    dense = np.asarray(counts[:, at].todense(), dtype=float)
    cells = np.log1p(1e3 * dense / np.maximum(dense.sum(axis=1, keepdims=True), 1.0))

    def centred(x: np.ndarray) -> np.ndarray:
        x = x - x.mean(axis=0)
        x = x - x.mean(axis=1, keepdims=True)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)

    best = (centred(cells) @ centred(means[shared].to_numpy(dtype=float)).T).argmax(axis=1)
    return means.index.to_numpy(dtype=object)[best]
