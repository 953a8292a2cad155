"""How does it fare on real tissue? ``python benchmarks/real_data.py PART FOLDER [--out FILE.json]``.

Parts: ``nuclei`` and ``reader`` on annotated H&E, ``maps`` on cell-type maps, ``cells`` on Xenium cells; ``spots BUNDLE
DATA.zarr`` on a bundle of paired spots. What each set is and what was measured: ``docs/real_data.md``. Intervals are
95 %, bootstrap over whole images, windows or sections, or over tiles where there is one section, whichever the figure
says.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.real_sets import (  # noqa: E402
    BIN_UM,
    CONSEP_TYPES,
    CONSEP_UM_PER_PX,
    CRC_CLASSES,
    SIDE,
    XENIUM_CLASSES,
    Annotated,
    consep,
    crc_map,
    files,
    monuseg,
    nuclei_of,
    xenium_cells,
)
from ge2hist_core import rng  # noqa: E402
from ge2hist_core.config import UM_PER_PX, VISIBLE_CLASS  # noqa: E402
from ge2hist_core.evaluation.readings import bootstrap_weights, percentiles  # noqa: E402
from ge2hist_core.niche import composition_kl, enrichment, niche_stats  # noqa: E402
from ge2hist_core.nuclei import LearnedReader, confusion, detection_scores, match_detections  # noqa: E402
from ge2hist_core.types import BadInput  # noqa: E402

DISTANCES_UM = (3.0, 6.0)
"""A found centre counts within this distance of a true one: 12 px at 40x as HoVer-Net's authors, and our own 6 um."""
CONSEP_CLASSES = tuple(CONSEP_TYPES.values())
LIKELY_UM_PER_PX = 0.35
LIKELY = f"told {LIKELY_UM_PER_PX:g} um per px"
"""CoNSeP's files name no scale. At 0.25 its nuclei have half the area of others; at this scale they have the same.

What is told this scale is still matched at the same distances in px, those of 0.25.
"""
AS_CONSEP = {
    "Tumour epithelium": "Epithelial",
    "Proliferating tumour": "Epithelial",
    "Luminal epithelium": "Epithelial",
    "Fibroblast": "Spindle",
    "Endothelium": "Spindle",
    "Lymphocyte": "Inflammatory",
    "Plasma cell": "Inflammatory",
    "Macrophage": "Inflammatory",
}
"""The simulated tissue's visible classes in CoNSeP's words; none of them is its Miscellaneous."""


# --- Figures with intervals -----------------------------------------------------------------------------------------


def with_interval(
    counts: np.ndarray, figures: Callable[[np.ndarray], Mapping[str, float]], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Figures of summed counts, with the interval that drawing the rows again gives.

    Parameters
    ----------
    counts: ``[unit, count]``, one row per image (or window, or section).
    figures: sums ``[count]`` -> figures by name, NaN where one has no answer.

    Returns
    -------
    Name -> ``value``, ``low``, ``high`` (NaN for fewer than two units).
    """
    counts = np.asarray(counts, dtype=float)
    drawn = pd.DataFrame([figures(total) for total in bootstrap_weights(seed, None, len(counts)) @ counts])
    out = {}
    for name, value in figures(counts.sum(axis=0)).items():
        low, high = percentiles(drawn[name].to_numpy(dtype=float), len(counts))
        out[name] = {"value": float(value), "low": low, "high": high}
    return out


def scores(total: np.ndarray) -> dict[str, float]:
    """Precision, recall, F1 and count bias of (matched, found, true)."""
    return detection_scores(*(float(n) for n in total))


# --- Outlines on annotated H&E --------------------------------------------------------------------------------------


def overlapping(found: np.ndarray, true: np.ndarray, iou: float = 0.5) -> int:
    """How many found instances cover a true one with an intersection over union above ``iou`` (at least 0.5).

    Above one half no instance can match two others (Kirillov et al. 2019, arXiv:1801.00868).
    """
    if iou < 0.5:
        raise ValueError(f"iou is {iou}: below 0.5 matches are not unique")
    both = (found > 0) & (true > 0)
    pairs, shared = np.unique(np.stack([found[both], true[both]]), axis=1, return_counts=True)
    area_found, area_true = (np.bincount(labels.ravel()) for labels in (found, true))
    union = area_found[pairs[0]] + area_true[pairs[1]] - shared
    return int((shared / union > iou).sum())


def outlined(picture: Annotated, um_per_px: float | None = None) -> np.ndarray:
    """Labels by the segmenter that needs no weights, led over the picture as ``prepare`` leads it over a slide.

    ``um_per_px``: the scale that it is told, by default the picture's.
    """
    from PIL import Image

    from ge2hist_core.segmentation import Crop, load_segmenter, segment
    from ge2hist_core.slide_image import SlideImage

    labels = np.zeros(picture.labels.shape, dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        Image.fromarray(picture.image).save(path)
        scale = picture.um_per_px if um_per_px is None else um_per_px
        with SlideImage(path, um_per_px=scale) as image:
            for _ in segment(image, Crop(0, 0, *labels.shape), scale, load_segmenter("classical"), labels):
                pass
    return labels


def nuclei(folder: Path) -> dict[str, Any]:
    """The training-free segmenter against every annotated nucleus of ``monuseg`` and ``consep``."""
    result: dict[str, Any] = {}
    for name, pictures, told in (
        ("monuseg", monuseg(folder / "monuseg"), None),
        ("consep", consep(folder / "consep"), None),
        (f"consep, {LIKELY}", consep(folder / "consep"), LIKELY_UM_PER_PX),
    ):
        rows: dict[str, list[tuple[int, int, int]]] = {}
        for picture in pictures:
            labels = outlined(picture, told)
            true, found = nuclei_of(picture), nuclei_of(picture._replace(labels=labels))
            rows.setdefault("IoU 0.5", []).append((overlapping(labels, picture.labels), len(found), len(true)))
            for reach in DISTANCES_UM:
                n = len(match_detections(found, true, reach).found)
                rows.setdefault(f"centres {reach:g} um", []).append((n, len(found), len(true)))
            print(name, picture.name, {k: round(scores(np.array(v[-1]))["f1"], 3) for k, v in rows.items()}, flush=True)
        result[name] = {"images": len(rows["IoU 0.5"]), "nuclei": sum(row[2] for row in rows["IoU 0.5"])}
        result[name] |= {rule: with_interval(np.array(part), scores) for rule, part in rows.items()}
    return result


# --- Types on annotated H&E -----------------------------------------------------------------------------------------


def split_images(names: Sequence[str], seed: int, test: int, validation: int) -> dict[str, list[str]]:
    """Images of ``test``, ``validation`` and ``train``, drawn from the stream ``(seed, "real split")``.

    Raises
    ------
    BadInput: fewer than one image left to train on.
    """
    if len(names) <= test + validation:
        raise BadInput(f"{len(names)} images are too few for {test} to test, {validation} to tune and one to train.")
    order = [names[i] for i in rng.stream(seed, "real split").permutation(len(names))]
    return {
        "test": order[:test],
        "validation": order[test : test + validation],
        "train": order[test + validation :],
    }


def halved(image: np.ndarray) -> np.ndarray:
    """Half as many px each way, means of two by two: 0.25 um per px become the reader's 0.5."""
    height, width, _ = image.shape
    parts = image[: height // 2 * 2, : width // 2 * 2].reshape(height // 2, 2, width // 2, 2, 3)
    return np.round(parts.mean(axis=(1, 3))).astype(np.uint8)


class Told:
    """A reader that takes pictures to be of another scale, and gives places in that of ``UM_PER_PX`` again."""

    def __init__(self, reader: LearnedReader, um_per_px: float) -> None:
        self.reader, self.um_per_px = reader, um_per_px

    def read(self, images: np.ndarray) -> list[pd.DataFrame]:
        """As :meth:`LearnedReader.read`."""
        back = UM_PER_PX / self.um_per_px
        tables = self.reader.read(images, self.um_per_px)
        return [
            t.assign(x_um=t["x_um"] * back, y_um=t["y_um"] * back, area_um2=t["area_um2"] * back**2) for t in tables
        ]


def tallied(
    reader: Any, images: np.ndarray, tables: Sequence[pd.DataFrame], names: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """What a reader gets right in each picture, for :func:`typed`: name of the figures -> ``[image, count]``.

    Parameters
    ----------
    images: uint8 ``[n, H, W, 3]`` at 0.5 um per px. tables: their true nuclei, types among ``CONSEP_CLASSES``.
    names: the reader's types in CoNSeP's words, None where it speaks them.
    """
    rows: dict[str, list[Any]] = {f"detection {d:g} um": [] for d in DISTANCES_UM} | {"type": []}
    for image, true in zip(images, tables, strict=True):
        (found,) = reader.read(image[None])
        if names is not None:
            found = found.assign(cell_type=[names[kind] for kind in found["cell_type"]])
        for reach in DISTANCES_UM:
            pairs = match_detections(found, true, reach)
            rows[f"detection {reach:g} um"].append((len(pairs.found), len(found), len(true)))
        of_found, of_true = (
            t["cell_type"].value_counts().reindex(CONSEP_CLASSES, fill_value=0).to_numpy() for t in (found, true)
        )
        matched = confusion(found, true, pairs, CONSEP_CLASSES).to_numpy()
        rows["type"].append(np.concatenate([of_found, of_true, matched.ravel()]))
    return {name: np.array(part) for name, part in rows.items()}


def by_type(total: np.ndarray) -> dict[str, float]:
    """F1 of each type, the mean of the three that have many nuclei, and the share of matched nuclei named right.

    A nucleus is right when it is matched within 6 um and has the type on both sides; nuclei that were missed, invented
    or misnamed all count against their types.
    """
    k = len(CONSEP_CLASSES)
    of_found, of_true, matched = total[:k], total[k : 2 * k], total[2 * k :].reshape(k, k)
    right = np.diagonal(matched)
    with np.errstate(invalid="ignore"):
        f1 = dict(zip(CONSEP_CLASSES, 2 * right / (of_found + of_true), strict=True))
        main = [f1[name] for name in CONSEP_CLASSES if name != "Miscellaneous"]
        return f1 | {"mean of three": float(np.mean(main)), "right of matched": right.sum() / matched.sum()}


def typed(tally: Mapping[str, np.ndarray], less: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Detection and type figures of a :func:`tallied` reader, or by how much they exceed those of another one.

    Intervals over images; both readers of a difference are drawn again on the same ones.
    """
    out = {}
    for name, counts in tally.items():
        figures = by_type if name == "type" else scores
        if less is None:
            out[name] = with_interval(counts, figures)
        else:
            out[name] = with_interval(np.hstack([counts, less[name]]), lambda total, f=figures: _difference(f, total))
    return out


def _difference(figures: Callable[[np.ndarray], Mapping[str, float]], total: np.ndarray) -> dict[str, float]:
    own, other = (figures(part) for part in np.split(total, 2))
    return {name: own[name] - other[name] for name in own}


def reader(folder: Path, steps: int, batch_size: int, seed: int, test: int, validation: int) -> dict[str, Any]:
    """The small reader trained on some images of CoNSeP and judged on others, beside the demo bundle's."""
    import torch

    from ge2hist_core.nuclei_training import ReaderConfig, Tiles, calibrate, new_net, train

    torch.set_num_threads(1)
    pictures = {p.name: p for p in consep(folder / "consep")}
    split = split_images(list(pictures), seed, test, validation)

    def tiles(part: str) -> Tiles:
        chosen = [pictures[name] for name in split[part]]
        return Tiles(np.stack([halved(p.image) for p in chosen]), [nuclei_of(p) for p in chosen], CONSEP_CLASSES)

    start = time.perf_counter()
    net = new_net(len(CONSEP_CLASSES), seed)
    for state in train(net, tiles("train"), ReaderConfig(steps=steps, batch_size=batch_size, seed=seed)):
        if state.step % 100 == 0:
            print(state.step, {k: round(v, 3) for k, v in state.losses.items()}, flush=True)
    own = LearnedReader(net, CONSEP_CLASSES)
    calibrate(own, tiles("validation"))
    seconds = time.perf_counter() - start
    judged = tiles("test")
    shipped = LearnedReader.load(ROOT / "assets" / "demo_bundle")
    scaled = Told(shipped, LIKELY_UM_PER_PX / CONSEP_UM_PER_PX * UM_PER_PX)
    demo, likely = (tallied(one, judged.images, judged.nuclei, AS_CONSEP) for one in (shipped, scaled))
    here = tallied(own, judged.images, judged.nuclei)
    return {
        "images": split,
        "nuclei": {part: sum(len(t) for t in tiles(part).nuclei) for part in split},
        "um_per_px": UM_PER_PX,
        "steps": steps,
        "batch_size": batch_size,
        "training_s": seconds,
        "trained here": typed(here),
        "demo bundle's": typed(demo),
        f"demo bundle's, {LIKELY}": typed(likely),
        "trained here less demo bundle's": typed(here, demo),
        f"trained here less demo bundle's, {LIKELY}": typed(here, likely),
    }


# --- Neighbourhoods: real tissue against simulated ------------------------------------------------------------------

MAP_CLASSES = tuple(dict.fromkeys(CRC_CLASSES.values()))
AS_MAP = {
    "Tumour epithelium": "Epithelium",
    "Proliferating tumour": "Epithelium",
    "Luminal epithelium": "Epithelium",
    "Fibroblast": "Stroma",
    "Endothelium": "Endothelium",
    "CD4 T cell": "T cell",
    "CD8 T cell": "T cell",
    "B cell": "B cell",
    "Plasma cell": "Plasma cell",
    "Macrophage": "Myeloid",
}
"""The simulated tissue's types in the coarse classes of the maps, see ``real_sets.CRC_CLASSES``."""
WINDOW_UM = 512.0
"""Side of a window of a map: that of a simulated section."""
NICHE_UM = 64.0
"""Side of the tiles whose mixture is described: that of the pictures that are drawn."""
LABELLED, TUMOUR = 0.5, 0.05
"""Windows count where at least these shares of the bins have a class, and of those are tumour."""
PERMUTATIONS = 100
NEAR_UM = 15.0
"""Nuclei are neighbours within this distance, as in the app; bins when they touch, by side or corner."""


def neighbourhood(
    nuclei: pd.DataFrame, size_um: tuple[float, float], classes: Sequence[str], radius_um: float
) -> pd.Series:
    """Sums that describe one window, to be added up over windows and read by :func:`described`.

    Parameters
    ----------
    nuclei: ``x_um``, ``y_um``, ``cell_type`` (nuclei, or the middles of bins) and, where known, ``area_um2``.
    radius_um: two are neighbours within this distance.
    """
    stats = niche_stats(nuclei, size_um, classes)
    pairs = enrichment(nuclei, size_um, classes, radius_um, PERMUTATIONS)
    sums: dict[str, float] = {"area_mm2": stats.area_mm2, "spacing:all": stats.spacing_um}
    for name, row in stats.per_type.iterrows():
        sums |= {f"n:{name}": row["n"], f"spacing:{name}": row["spacing_um"]}
        if "area_um2" in nuclei:
            sums[f"size:{name}"] = nuclei.loc[nuclei["cell_type"] == name, "area_um2"].sum()
    for row in pairs.itertuples():
        sums |= {
            f"observed:{row.type_a}|{row.type_b}": row.observed,
            f"expected:{row.type_a}|{row.type_b}": row.expected,
        }
    place = (nuclei[["x_um", "y_um"]].to_numpy() // NICHE_UM).astype(int)
    counts = pd.crosstab([place[:, 0], place[:, 1]], nuclei["cell_type"]).to_numpy()
    share = counts / counts.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(share > 0, share * np.log(share), 0.0).sum(axis=1)
    sums |= {
        "tiles": len(share),
        "tile classes": np.exp(entropy).sum(),
        "tiles of one": (share.max(axis=1, initial=0.0) > 0.9).sum(),
    }
    for name in [key for key in sums if key.startswith("spacing:")]:
        sums[name.replace("spacing:", "spaced:")] = float(np.isfinite(sums[name]))
        sums[name] = float(np.nan_to_num(sums[name]))
    return pd.Series(sums, dtype=float)


def described(total: pd.Series) -> dict[str, float]:
    """Figures of the sums of :func:`neighbourhood` over some windows.

    ``density`` per mm2; ``share`` of each class; ``spacing`` (um), mean over windows, to the nearest of the same class;
    ``size`` (um2), mean area; ``log2`` of observed over expected neighbouring pairs, NaN where fewer than five were
    expected; ``classes per tile``: exponential of the entropy of a tile of 64 um; ``tiles of one class``: share of
    those in which one class makes up more than 90 %.
    """
    classes = [name[2:] for name in total.index if name.startswith("n:")]
    n = sum(total[f"n:{name}"] for name in classes)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = {"density": n / total["area_mm2"]}
        out |= {f"share:{name}": total[f"n:{name}"] / n for name in classes}
        out |= {f"spacing:{name}": total[f"spacing:{name}"] / total[f"spaced:{name}"] for name in ("all", *classes)}
        out |= {f"size:{c}": total[f"size:{c}"] / total[f"n:{c}"] for c in classes if f"size:{c}" in total}
        for name in [key.removeprefix("expected:") for key in total.index if key.startswith("expected:")]:
            expected = total[f"expected:{name}"]
            out[f"log2:{name}"] = float(np.log2(total[f"observed:{name}"] / expected)) if expected >= 5 else np.nan
        out["classes per tile"] = total["tile classes"] / total["tiles"]
        out["tiles of one class"] = total["tiles of one"] / total["tiles"]
    return out


def with_spread(units: Sequence[pd.Series]) -> dict[str, Any]:
    """:func:`described` with intervals over the units (windows, images or sections)."""
    table = pd.DataFrame(units).fillna(0.0)
    figures = with_interval(table.to_numpy(), lambda total: described(pd.Series(total, table.columns)))
    counts = [float(table[name].sum()) for name in table if name.startswith("n:")]
    return {"units": len(table), "counts": counts, "figures": figures}


def apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, float]:
    """How far two tissues are apart: KL of composition (nats) and root mean square difference of log2 enrichments."""
    figures = (a["figures"], b["figures"])
    pairs = [name for name in figures[0] if name.startswith("log2:")]
    difference = np.array([figures[0][name]["value"] - figures[1][name]["value"] for name in pairs])
    difference = difference[np.isfinite(difference)]
    return {
        "composition_kl_nats": composition_kl(np.array(a["counts"]), np.array(b["counts"])),
        "log2_rms": float(np.sqrt((difference**2).mean())),
        "pairs": len(difference),
    }


def windows(labels: np.ndarray) -> list[pd.DataFrame]:
    """Windows of a map of types ``[row, column]`` that are mostly labelled and hold tumour, as tables of bins."""
    side = round(WINDOW_UM / BIN_UM)
    found = []
    for top in range(0, labels.shape[0] - side + 1, side):
        for left in range(0, labels.shape[1] - side + 1, side):
            part = labels[top : top + side, left : left + side]
            coarse = np.array([[CRC_CLASSES.get(name, "") for name in row] for row in part], dtype=object)
            known = coarse != ""
            tumour = np.char.startswith(part[known].astype(str), "Tumor")
            if known.mean() >= LABELLED and tumour.mean() >= TUMOUR:
                found.append(bins(coarse))
    return found


def bins(classes: np.ndarray) -> pd.DataFrame:
    """The labelled bins of a map of classes ``[row, column]``: middles in um and ``cell_type``."""
    row, column = np.nonzero(classes != "")
    return pd.DataFrame(
        {"x_um": (column + 0.5) * BIN_UM, "y_um": (row + 0.5) * BIN_UM, "cell_type": classes[row, column]}
    )


def binned(nuclei: pd.DataFrame, size_um: float) -> pd.DataFrame:
    """Nuclei as a map would show them: each 8-um bin has the class of the nearest nucleus within 8 um of its middle."""
    from scipy.spatial import cKDTree

    n = int(size_um // BIN_UM)
    middle = (np.arange(n) + 0.5) * BIN_UM
    y, x = np.meshgrid(middle, middle, indexing="ij")
    distance, nearest = cKDTree(nuclei[["x_um", "y_um"]]).query(np.stack([x, y], axis=-1))
    kind = nuclei["cell_type"].to_numpy(dtype=object)[nearest]
    return bins(np.where(distance <= BIN_UM, kind, ""))


def simulated(donors: int, seed: int) -> list[pd.DataFrame]:
    """Nuclei of simulated sections of 512 um, with ``area_um2``."""
    from ge2hist_core.simulator.tissue import simulate_section

    sections = [simulate_section(seed, donor, WINDOW_UM).nuclei for donor in range(donors)]
    return [t.assign(area_um2=np.pi / 4 * t["major_um"] * t["minor_um"]) for t in sections]


def maps(folder: Path, donors: int, seed: int) -> dict[str, Any]:
    """Neighbourhoods of real maps and annotated nuclei against those of the simulated tissue."""
    sections = simulated(donors, seed)
    square, reach = (WINDOW_UM, WINDOW_UM), 1.5 * BIN_UM
    coarse = [binned(t.assign(cell_type=t["cell_type"].map(AS_MAP)), WINDOW_UM) for t in sections]
    result = {"simulated": with_spread([neighbourhood(t, square, MAP_CLASSES, reach) for t in coarse])}
    for path in files(folder / "visiumhd_crc_types", "*.csv.gz", "the Visium HD maps"):
        name = path.name.split(".")[0]
        result[name] = with_spread([neighbourhood(t, square, MAP_CLASSES, reach) for t in windows(crc_map(path))])
        print(name, result[name]["units"], "windows", flush=True)
    real = [name for name in result if name != "simulated"]
    result["apart"] = {f"simulated, {name}": apart(result["simulated"], result[name]) for name in real}
    if len(real) > 1:
        result["apart"][", ".join(real[:2])] = apart(result[real[0]], result[real[1]])

    return {"bins": result, "nuclei": typed_nuclei(folder, sections), "outlines": untyped_nuclei(folder, sections)}


def typed_nuclei(folder: Path, sections: Sequence[pd.DataFrame]) -> dict[str, Any]:
    """Annotated nuclei of CoNSeP's images that hold epithelium, against quarters of simulated sections of like size."""
    side = SIDE * CONSEP_UM_PER_PX
    classes = tuple(name for name in CONSEP_CLASSES if name != "Miscellaneous")
    visible = [t.assign(cell_type=t["cell_type"].replace(VISIBLE_CLASS).map(AS_CONSEP)) for t in sections]
    found = []
    for picture in consep(folder / "consep"):
        table = nuclei_of(picture)
        table = table[table["cell_type"].isin(classes)]
        if (table["cell_type"] == "Epithelial").mean() >= TUMOUR:
            found.append(neighbourhood(table, (side, side), classes, NEAR_UM))
    both = {
        "simulated": with_spread([summed(quartered(t, (side, side), classes)) for t in visible]),
        "consep": with_spread(found),
    }
    return both | {"apart": {"simulated, consep": apart(both["simulated"], both["consep"])}}


def untyped_nuclei(folder: Path, sections: Sequence[pd.DataFrame]) -> dict[str, Any]:
    """Annotated nuclei of MoNuSeg, whose files say their scale, against the same sections: number, spacing and size."""
    side, classes, found = 246.0, ("Nucleus",), []
    for picture in monuseg(folder / "monuseg"):
        size = (picture.labels.shape[1] * picture.um_per_px, picture.labels.shape[0] * picture.um_per_px)
        found.append(neighbourhood(nuclei_of(picture), size, classes, NEAR_UM))
    own = [summed(quartered(t.assign(cell_type="Nucleus"), (side, side), classes)) for t in sections]
    return {"simulated": with_spread(own), "monuseg": with_spread(found)}


def quartered(nuclei: pd.DataFrame, size_um: tuple[float, float], classes: Sequence[str]) -> list[pd.Series]:
    """:func:`neighbourhood` of the four rectangles of this size that meet at ``size_um``."""
    parts = []
    for x in (0.0, size_um[0]):
        for y in (0.0, size_um[1]):
            moved = nuclei.assign(x_um=nuclei["x_um"] - x, y_um=nuclei["y_um"] - y)
            moved = moved[moved["x_um"].between(0, size_um[0]) & moved["y_um"].between(0, size_um[1])]
            parts.append(neighbourhood(moved, size_um, classes, NEAR_UM))
    return parts


def summed(parts: Sequence[pd.Series]) -> pd.Series:
    return pd.DataFrame(parts).sum()


# --- Single cells with places ----------------------------------------------------------------------------------------


def cells(folder: Path, donors: int, seed: int) -> dict[str, Any]:
    """Real Xenium cells through the demo bundle: what z_c and z_e hold; and their neighbourhoods beside simulated ones.

    The probes are fitted on one half of the section and judged on the other, a tile's width apart.
    """
    from scipy.spatial import cKDTree

    from ge2hist_core.evaluation.states import separation
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.support import OUTSIDE

    model, found = GE2Hist.load(ROOT / "assets" / "demo_bundle"), xenium_cells(folder)
    kind = np.array([XENIUM_CLASSES.get(name, "") for name in found.cell_type], dtype=object)
    known = kind != ""
    xy = np.asarray(found.xy_um, dtype=float)
    hits = cKDTree(xy).query_ball_point(xy, NICHE_UM / 2, p=np.inf)
    codes = pd.Index(MAP_CLASSES).get_indexer(kind)
    niche = np.zeros((len(kind), len(MAP_CLASSES)))
    for i, near in enumerate(hits):
        others = codes[[j for j in near if j != i and codes[j] >= 0]]
        niche[i] = np.sqrt(np.bincount(others, minlength=len(MAP_CLASSES)))
    embedding = model.embed(found, seed)
    latent = model.encode(embedding)
    middle = xy[:, 0].max() / 2
    inside = known & (xy > NICHE_UM / 2).all(axis=1) & (xy < xy.max(axis=0) - NICHE_UM / 2).all(axis=1)
    fitted = np.flatnonzero(inside & (xy[:, 0] < middle - NICHE_UM / 2))
    asked = np.flatnonzero(inside & (xy[:, 0] > middle + NICHE_UM / 2))
    asked = asked[np.isin(kind[asked], kind[fitted])]
    probes = separation(
        latent.take(fitted), kind[fitted], niche[fitted], latent.take(asked), kind[asked], niche[asked],
        np.asarray(found.donor)[asked], MAP_CLASSES, seed,
    )  # fmt: skip
    table = pd.DataFrame({"x_um": xy[known, 0], "y_um": xy[known, 1], "cell_type": kind[known]})
    size = (float(xy[:, 0].max()) / 2, float(xy[:, 1].max()) / 2)
    own = [t.assign(cell_type=t["cell_type"].map(AS_MAP)) for t in simulated(donors, seed)]
    both = {
        "simulated": with_spread([summed(quartered(t, size, MAP_CLASSES)) for t in own]),
        "xenium": with_spread(quartered(table, size, MAP_CLASSES)),
    }
    read = np.array([AS_MAP[model.cell_types[i]] for i in model.classify(latent).argmax(axis=1)], dtype=object)
    right = read == kind
    return {
        "cells": len(kind),
        "genes": found.counts.shape[1],
        "median counts": float(np.median(np.asarray(found.counts.sum(axis=1)))),
        "types": pd.Series(found.cell_type).value_counts().to_dict(),
        "outside of the bundle's data": None
        if model.support is None
        else float((model.support.p(embedding) < OUTSIDE).mean()),
        "class as the reference says": {
            "all": float(right[known].mean()),
            **{name: float(right[kind == name].mean()) for name in MAP_CLASSES if (kind == name).any()},
        },
        "probes": probes,
        "neighbourhoods": both | {"apart": apart(both["simulated"], both["xenium"])},
    }


# --- Pictures of real paired spots -----------------------------------------------------------------------------------


class TextureDistance:
    """Root mean square difference of standardised stain-texture features of two pictures of one cell."""

    name = "stain-texture"

    def __init__(self, real: np.ndarray) -> None:
        from ge2hist_core.image_features import Standardised, TextureFeatures

        self.space = Standardised(TextureFeatures(), real)

    def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """``[n]``; ``a`` and ``b`` uint8 ``[n, H, W, 3]``."""
        return np.sqrt(((self.space(a) - self.space(b)) ** 2).mean(axis=1))


def two_groups(rows: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """At most ``n`` rows to ask for and as many others, which say how much real tiles differ among themselves.

    Raises
    ------
    BadInput: fewer than two of each.
    """
    n = min(n, len(rows) // 2)
    if n < 2:
        raise BadInput(f"{len(rows)} held-out cells with whole tiles are too few: at least 4 are needed.")
    order = rng.stream(seed, "real spots").permutation(rows)
    return np.sort(order[:n]), order[n : 2 * n]


def spots(bundle: Path, data: Path, tiles: int, seed: int, work: Path | None) -> dict[str, Any]:
    """A bundle's pictures of held-out cells beside retrieval, shuffled condition, its autoencoder, other real tiles.

    As ``python -m ge2hist_core evaluate``, for bundles without a reader: stain-texture features alone.
    """
    from ge2hist_core.config import SampleConfig
    from ge2hist_core.evaluation.contest import FLOOR, table_1
    from ge2hist_core.evaluation.methods import controls, own
    from ge2hist_core.evaluation.read_back import expression_scores, fit_reader, recovered
    from ge2hist_core.evaluation.truth import noise_seeds
    from ge2hist_core.evaluation.work import Work
    from ge2hist_core.image_features import TextureFeatures
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore

    model = GE2Hist.load(bundle)
    store = TissueStore(data, model.config.tile_px)
    learned = {part: sorted(model.has_learned_from(store, (part,))) for part in ("train", "validation")}
    held_out = [name for name in store.donors if name not in sum(learned.values(), [])]
    rows, others = two_groups(store.rows(held_out), tiles, seed)
    training = store.rows(learned["train"])
    if not len(training):
        raise BadInput(f"{data} has no section that {bundle} was trained on: give the store of its training.")

    those, seeds, sample, kept = store.cells.take(rows), noise_seeds(seed, rows), SampleConfig(), Work(work)
    key = [store.identity, rows.tolist(), seed]
    known = model.embed(store.cells.take(training), seed)
    state = model.encode(model.embed(those, seed))
    methods = [
        own(model, state, seeds, sample, key),
        *controls(model, store, training, those, seeds, sample, seed, key, lambda: known),
    ]
    real = store.tiles(rows)
    pictures = {method.name: method.pictures(len(rows), kept) for method in methods}
    pictures["autoencoder of the real tile"] = model.autoencoder.decode(model.autoencoder.encode(real))
    pictures[FLOOR] = store.tiles(others)
    donor = np.asarray(store.cells.donor)
    figures, _ = table_1(real, pictures, [TextureFeatures()], [TextureDistance(real)], donor[rows], seed)

    texture = TextureFeatures()
    scored, true, share = expression_scores(store.cells.counts[training], store.cells.counts[rows])
    ridge = fit_reader(texture(store.tiles(training)), scored, donor[training])
    guesses = {name: ridge(texture(images)) for name, images in {"real": real, **pictures}.items()}
    return {
        "held out": held_out,
        "training": {**learned, "cells": len(training), "steps": (model.report or {}).get("steps")},
        "separation": (model.report or {}).get("separation"),
        "tiles": len(rows),
        "tile_um": model.config.tile_px * model.config.um_per_px,
        "figures": {
            name: {m: {k: f[k] for k in ("value", "low", "high")} for m, f in by_method.items()}
            for name, by_method in figures.items()
        },
        "read_back": {"variance_in_components": share, **recovered(true, guesses, "real", donor[rows], seed)},
    }


# --- Command --------------------------------------------------------------------------------------------------------


def rounded(value: Any) -> Any:
    """Nested figures with four digits, NaN as None, which JSON has."""
    if isinstance(value, Mapping):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="part", required=True, metavar="PART")

    def part(name: str, text: str) -> argparse.ArgumentParser:
        child = sub.add_parser(name, help=text, description=text)
        child.add_argument("--out", type=Path, metavar="FILE.json")
        child.add_argument("--seed", type=int, default=0)
        if name == "spots":
            child.add_argument("bundle", type=Path, metavar="BUNDLE", help="that was trained on DATA.zarr")
            child.add_argument("data", type=Path, metavar="DATA.zarr", help="that `prepare` wrote")
        else:
            child.add_argument("folder", type=Path, metavar="FOLDER", help="that holds the sets: docs/real_data.md")
        return child

    part("nuclei", "the training-free segmenter on monuseg and consep")
    child = part("reader", "the small reader trained on consep, against the demo bundle's")
    child.add_argument("--steps", type=int, default=1500)
    child.add_argument("--batch-size", type=int, default=8, help="crops of 48 um")
    child.add_argument("--test", type=int, default=8, help="images to judge on")
    child.add_argument("--validation", type=int, default=4, help="images that set threshold and type bias")
    for name, text in (
        ("maps", "neighbourhoods of real maps against the simulated tissue"),
        ("cells", "bidcell's Xenium cells through the demo bundle; FOLDER is `data` of its wheel"),
    ):
        part(name, text).add_argument("--donors", type=int, default=24, help="simulated sections")
    child = part("spots", "pictures of a bundle of paired spots against real tiles")
    child.add_argument("--tiles", type=int, default=64)
    child.add_argument("--work", type=Path, metavar="DIR", help="keeps the pictures, so that a stopped run goes on")
    args = parser.parse_args(argv)
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "nuclei": lambda: nuclei(args.folder),
        "reader": lambda: reader(args.folder, args.steps, args.batch_size, args.seed, args.test, args.validation),
        "maps": lambda: maps(args.folder, args.donors, args.seed),
        "cells": lambda: cells(args.folder, args.donors, args.seed),
        "spots": lambda: spots(args.bundle, args.data, args.tiles, args.seed, args.work),
    }
    try:
        figures = run[args.part]()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(rounded(figures), indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
