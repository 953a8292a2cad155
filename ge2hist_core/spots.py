"""Spot data with H&E: classic Spatial Transcriptomics (ST) and Visium; a coarser mode in which a spot is one "cell".

A spot of 100 um (ST) or 55 um (Visium) holds many cells. Their sum stands in for one cell: what is learned from such a
store is what tissue looks like about a spot, not about a cell, and every row is labelled ``unit: spot``.

- ST: a folder with, for each section ``NAME``, ``NAME.counts.tsv`` (spots x genes, rows named ``XxY`` by their place in
  the grid), ``NAME.spots.tsv`` (``x``, ``y``, ``pixel_x``, ``pixel_y`` and, if given, ``new_x``, ``new_y``,
  ``selected``; any further column is kept) and the picture ``NAME.jpg``; each may be gzipped where it is a table.
- Visium: Space Ranger's ``outs`` with ``filtered_feature_bc_matrix.h5`` and ``spatial/`` (``tissue_positions.csv``, or
  ``tissue_positions_list.csv`` without a header, and ``scalefactors_json.json``). The full-resolution picture is given
  beside it; without it, the reduced ``tissue_hires_image.png`` shows tissue but no nuclei, and that is said.

The pitch of the grid is known (ST 200 um, Visium 100 um), so the picture's scale follows from the spots' places.
Nuclei cannot say whether spots lie right; instead the share of spots that lie on tissue is compared with what the same
places give when the picture is turned or mirrored: a swap of x and y shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ge2hist_core.files import atomic_path
from ge2hist_core.slide_cells import SCALE_DIFFERENCE, SlideCells, whole_counts
from ge2hist_core.slide_image import HELD_SUFFIXES, TIFF_SUFFIXES, SlideImage
from ge2hist_core.types import BadInput

__all__ = ["ST_SPOT_UM", "draw_spots", "is_st", "is_visium", "on_tissue", "open_st", "open_visium", "tissue_check"]

ST_PITCH_UM = 200.0
ST_SPOT_UM = 100.0
VISIUM_PITCH_UM = 100.0
VISIUM_SPOT_UM = 55.0
SPOT_DIAMETER_UM = (50.0, 70.0)
"""Space Ranger's ``spot_diameter_fullres`` is of a theoretical spot of 65 um, in some versions of the real one."""
MATRICES = ("filtered_feature_bc_matrix.h5", "raw_feature_bc_matrix.h5")
POSITIONS = ("tissue_positions.csv", "tissue_positions_list.csv")
POSITION_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
GENE_EXPRESSION = "Gene Expression"
THUMBNAIL_UM = 20.0
THUMBNAIL_STRIP = 32
TISSUE_OD = 0.08
"""Mean optical density from which a square of ``THUMBNAIL_UM`` counts as tissue: thin stroma has twice as much."""
BETTER = 0.05
"""Another orientation must hold so much more of the spots before the user is warned."""
ORIENTATIONS = {
    "as given": ((1, 0), (0, 1)),
    "turned by 90 degrees": ((0, 1), (-1, 0)),
    "turned by 180 degrees": ((-1, 0), (0, -1)),
    "turned by 270 degrees": ((0, -1), (1, 0)),
    "mirrored left to right": ((-1, 0), (0, 1)),
    "mirrored top to bottom": ((1, 0), (0, -1)),
    "with x and y swapped": ((0, 1), (1, 0)),
    "with x and y swapped and turned by 180 degrees": ((0, -1), (-1, 0)),
}


@dataclass(frozen=True)
class _Grid:
    """What the spots' places say: px per pitch, and root mean square of their distance to a regular grid in pitches."""

    pitch_px: float
    off: float


def is_st(folder: Path) -> bool:
    """Whether a folder holds sections of classic ST."""
    return bool(_st_sections(folder))


def is_visium(folder: Path) -> bool:
    """Whether a folder is a Visium run's (not Visium HD's)."""
    return _visium_outs(folder) is not None


def open_st(folder: str | Path, pitch_um: float = ST_PITCH_UM, spot_um: float = ST_SPOT_UM) -> list[SlideCells]:
    """All sections of a folder; their pictures stay open. Genes are the union: one that a section lacks has no counts.

    Parameters
    ----------
    pitch_um: distance of neighbouring spots. spot_um: their diameter.

    Raises
    ------
    BadInput: a file of a section is missing or damaged, spots are no grid, counts are no whole numbers.
    """
    folder = Path(folder)
    found = _st_sections(folder)
    if not found:
        raise BadInput(f"{folder} holds no NAME.counts.tsv: give the folder with counts, spots and pictures.")
    tables = {name: _st_tables(folder, name) for name in found}
    genes = list(dict.fromkeys(gene for _, counts, _, _ in tables.values() for gene in counts.columns))
    index = pd.Index(genes)
    sections: list[SlideCells] = []
    try:
        for name, (spots, counts, dropped, n_unselected) in tables.items():
            grid = _grid(spots, _grid_columns(spots), np.ones(2), name)
            um_per_px = pitch_um / grid.pitch_px
            picture = SlideImage(_picture(folder, name), um_per_px=um_per_px)
            _scale_agrees(picture, um_per_px, pitch_um)
            at = index.get_indexer(counts.columns)
            own = sp.coo_matrix(counts.to_numpy())
            wide = sp.csr_matrix((own.data, (own.row, at[own.col])), shape=(len(spots), len(genes)))
            used = {"x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"}
            obs = spots.drop(columns=[c for c in spots.columns if c in used]).reset_index(drop=True)
            xy = spots[["pixel_x", "pixel_y"]].to_numpy(np.float64) * um_per_px
            sections.append(
                _section(name, picture, spots.index.to_numpy(dtype=object), xy, wide,
                         pd.DataFrame(index=index), dropped, obs, spot_um,
                         {"pitch_px": grid.pitch_px, "grid_off": grid.off, "spots_not_selected": n_unselected})
            )  # fmt: skip
    except BaseException:
        for section in sections:
            section.image.close()
        raise
    return sections


def open_visium(folder: str | Path, image: str | Path | None = None, genome: str = "GRCh38") -> SlideCells:
    """The spots in the tissue of a Visium run; the picture stays open.

    Parameters
    ----------
    image: full-resolution H&E; None takes the run's reduced picture.

    Raises
    ------
    BadInput: a part is missing, damaged, of another genome, or contradicts the spots' pitch.
    """
    outs = _visium_outs(Path(folder))
    if outs is None:
        raise BadInput(f"{folder} has no spatial/tissue_positions.csv: give the `outs` folder of a Visium run.")
    spatial = outs / "spatial"
    places = _positions(next(spatial / name for name in POSITIONS if (spatial / name).is_file()))
    genes, names, counts = _matrix(
        next((outs / n for n in MATRICES if (outs / n).is_file()), outs / MATRICES[0]), genome
    )
    at = pd.Index(places["barcode"]).get_indexer(names)
    if (at < 0).any():
        raise BadInput(
            f"tissue_positions has no place for {(at < 0).sum():,} spots of the matrix (first {names[at < 0][0]!r}): "
            "the two are of different runs, copy the whole folder again."
        )
    places = places.iloc[at].reset_index(drop=True)
    tissue = places["in_tissue"].to_numpy().astype(bool)
    if not tissue.any():
        raise BadInput("No spot lies in the tissue: look at Space Ranger's tissue detection.")
    dropped = {"outside_tissue": int(counts[~tissue].sum())}

    scales = _scale_factors(spatial / "scalefactors_json.json")
    px = places[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(np.float64)
    # Neighbours in a row are two columns apart; rows are sqrt(3) / 2 of the pitch apart.
    grid = _grid(
        places.assign(pixel_x=px[:, 0], pixel_y=px[:, 1]), ("array_col", "array_row"), np.array([0.5, np.sqrt(0.75)]),
        outs.name,
    )  # fmt: skip
    um_per_px = VISIUM_PITCH_UM / grid.pitch_px
    spot = scales["spot_diameter_fullres"] * um_per_px
    if not SPOT_DIAMETER_UM[0] <= spot <= SPOT_DIAMETER_UM[1]:
        raise BadInput(
            f"By the pitch of the spots a spot of scalefactors_json.json is {spot:.3g} um wide, it is 55 to 65 um: the "
            "positions and the scale factors are of different runs, copy the whole folder again."
        )
    warnings: list[str] = []
    if image is None:
        path = spatial / "tissue_hires_image.png"
        if not path.is_file():
            raise BadInput(f"{spatial} has no tissue_hires_image.png: give the full-resolution H&E by --image.")
        picture_um = um_per_px / scales["tissue_hires_scalef"]
        if picture_um > 1.0:
            warnings.append(
                f"{path.name} has {picture_um:.2g} um per pixel and shows no nuclei: give the full-resolution H&E by "
                "--image."
            )
        picture = SlideImage(path, um_per_px=min(picture_um, 5.0))
    else:
        picture = SlideImage(image, um_per_px=um_per_px)
        _scale_agrees(picture, um_per_px, VISIUM_PITCH_UM)
    obs = places.loc[tissue, ["array_row", "array_col"]].reset_index(drop=True)
    return _section(
        "", picture, names[tissue], px[tissue] * um_per_px, counts[tissue], genes, dropped, obs, VISIUM_SPOT_UM,
        {"pitch_px": grid.pitch_px, "grid_off": grid.off}, tuple(warnings),
    )  # fmt: skip


def on_tissue(image: SlideImage) -> np.ndarray:
    """Tissue or glass, bool ``[h, w]`` in squares of ``THUMBNAIL_UM``: mean optical density against the slide's glass.

    The glass is the 99th percentile of each channel: illumination differs between scanners.
    """
    picture = _thumbnail(image).astype(np.float64) + 1.0
    glass = np.percentile(picture, 99, axis=(0, 1))
    return -np.log10(np.minimum(picture / glass, 1.0)).mean(axis=2) > TISSUE_OD


def tissue_check(section: SlideCells, shift_um: np.ndarray | None = None) -> tuple[dict[str, Any], str | None]:
    """Share of the spots that lie on tissue, as given and in the seven other orientations of the picture.

    Parameters
    ----------
    shift_um: (x, y) added to the spots' places.

    Returns
    -------
    Figures ``spots_on_tissue`` and ``best_orientation``, and a warning if another orientation holds clearly more.
    """
    tissue = on_tissue(section.image)
    size = np.array([section.image.width, section.image.height]) * section.image.um_per_px
    places = section.xy_um if shift_um is None else section.xy_um + shift_um
    share: dict[str, float] = {}
    for name, turn in ORIENTATIONS.items():
        matrix = np.array(turn, dtype=np.float64)
        # About the picture's middle; where x and y change places, so do the picture's sides.
        stretch = size / (np.abs(matrix) @ size)
        xy = ((places - size / 2) @ matrix.T) * stretch + size / 2
        at = np.floor(xy / THUMBNAIL_UM).astype(np.int64)
        inside = ((at >= 0) & (at < tissue.shape[::-1])).all(axis=1)
        share[name] = float(tissue[at[inside, 1], at[inside, 0]].sum() / len(at))
    best = max(share, key=lambda name: share[name])
    given = share["as given"]
    warning = None
    if share[best] > given + BETTER:
        warning = (
            f"{100 * given:.0f} % of the spots{_of(section)} lie on tissue, {100 * share[best]:.0f} % would with the "
            f"picture {best}: look at the overlay, x and y or the picture may be the wrong way round."
        )
        figures = {"spots_on_tissue": given, "best_orientation": best}
        return figures, warning
    return {"spots_on_tissue": given, "best_orientation": "as given"}, None


def draw_spots(path: str | Path, section: SlideCells, shift_um: np.ndarray | None = None) -> None:
    """The section at ``THUMBNAIL_UM`` with its spots in their true size, coloured by log UMIs, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import EllipseCollection
    from matplotlib.figure import Figure

    image = section.image
    picture = _thumbnail(image)
    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(picture, extent=(0, picture.shape[1] * THUMBNAIL_UM, picture.shape[0] * THUMBNAIL_UM, 0))
    places = section.xy_um if shift_um is None else section.xy_um + shift_um
    side = np.full(len(places), section.spot_um)
    drawn = axes.add_collection(
        EllipseCollection(side, side, np.zeros(len(side)), units="x", offsets=places, offset_transform=axes.transData,
                          array=np.log10(1.0 + np.asarray(section.counts.sum(axis=1)).ravel()), alpha=0.7)
    )  # fmt: skip
    figure.colorbar(drawn, ax=axes, label="log10(1 + UMIs)")
    axes.set(title=f"Spots{_of(section)} over the H&E", xlabel="x (um)", ylabel="y (um)")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _thumbnail(image: SlideImage) -> np.ndarray:
    """The whole picture at ``THUMBNAIL_UM``, read strip by strip."""
    height, width = (max(1, round(n * image.um_per_px / THUMBNAIL_UM)) for n in (image.height, image.width))
    strips = [
        image.at_scale((top, min(top + THUMBNAIL_STRIP, height)), (0, width), THUMBNAIL_UM)
        for top in range(0, height, THUMBNAIL_STRIP)
    ]
    return np.concatenate(strips)


def _of(section: SlideCells) -> str:
    return f" of {section.section}" if section.section else ""


def _section(
    name: str, picture: SlideImage, names: np.ndarray, xy_um: np.ndarray, counts: sp.csr_matrix, genes: pd.DataFrame,
    dropped: dict[str, int], obs: pd.DataFrame, spot_um: float, figures: dict[str, object],
    warnings: tuple[str, ...] = (),
) -> SlideCells:  # fmt: skip
    import shapely

    counts = whole_counts(counts, f"The matrix of {name or picture.name}")
    circles = shapely.buffer(shapely.points(xy_um), spot_um / 2)
    return SlideCells(
        section=name, image=picture, unit="spot", names=names, outlines=circles, counts=counts, genes=genes,
        dropped=dropped, density=None, obs=obs, spot_um=spot_um, figures=figures, warnings=warnings,
    )  # fmt: skip


def _grid(spots: pd.DataFrame, columns: tuple[str, str], unit: np.ndarray, name: str) -> _Grid:
    """Fit the px of the spots by their place in the grid.

    Parameters
    ----------
    columns: of the place in the grid, (across, down). unit: pitches per step of each.

    Raises
    ------
    BadInput: places that are no grid with one pitch.
    """
    place = spots[list(columns)].to_numpy(np.float64) * unit
    px = spots[["pixel_x", "pixel_y"]].to_numpy(np.float64)
    design = np.column_stack([place, np.ones(len(place))])
    fit, _, rank, _ = np.linalg.lstsq(design, px, rcond=None)
    pitch = np.linalg.norm(fit[:2], axis=1)
    off = float(np.sqrt(((design @ fit - px) ** 2).sum(axis=1).mean()) / max(pitch.mean(), 1e-9))
    if rank < 3 or np.ptp(pitch) > 0.1 * pitch.mean() or off > 0.5:
        raise BadInput(
            f"The spots of {name} do not lie on a regular grid in px (pitch {pitch[0]:.3g} and {pitch[1]:.3g} px, off "
            f"by {off:.2g} pitches): give the positions of this section."
        )
    return _Grid(float(pitch.mean()), off)


def _grid_columns(spots: pd.DataFrame) -> tuple[str, str]:
    return ("new_x", "new_y") if {"new_x", "new_y"} <= set(spots.columns) else ("x", "y")


def _scale_agrees(picture: SlideImage, um_per_px: float, pitch_um: float) -> None:
    said = picture.file_um_per_px
    if said is not None and abs(said / um_per_px - 1.0) > SCALE_DIFFERENCE:
        picture.close()
        raise BadInput(
            f"{picture.name} has {said:.4g} um per pixel, by spots {pitch_um:g} um apart it is {um_per_px:.4g}: give "
            "the picture that the positions belong to, or the right --spot-pitch-um."
        )


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, KeyError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, BadInput):
            raise
        reason = (str(error).strip("'\"").splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BadInput(f"{path.name} is truncated or damaged ({reason}): copy it again.") from error


# --- Classic ST ---------------------------------------------------------------------------------------------------


def _st_sections(folder: Path) -> list[str]:
    return sorted(
        {path.name.split(".counts.tsv")[0] for pattern in ("*.counts.tsv", "*.counts.tsv.gz")
         for path in folder.glob(pattern)}
    )  # fmt: skip


def _st_file(folder: Path, name: str, kind: str) -> Path:
    for path in (folder / f"{name}.{kind}.tsv", folder / f"{name}.{kind}.tsv.gz"):
        if path.is_file():
            return path
    raise BadInput(f"{folder / name}.{kind}.tsv is missing: each section needs counts, spots and a picture.")


def _picture(folder: Path, name: str) -> Path:
    found = [p for s in (*HELD_SUFFIXES, *TIFF_SUFFIXES) if (p := folder / f"{name}{s}").is_file()]
    if len(found) != 1:
        state = "has no picture" if not found else f"has {len(found)} pictures"
        raise BadInput(f"Section {name} {state} in {folder}: give one, named {name}.jpg, .png or .tif.")
    return found[0]


def _st_tables(folder: Path, name: str) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int], int]:
    """Selected spots with counts (index ``XxY``), their counts, UMIs left out by reason, spots not selected."""
    path = _st_file(folder, name, "spots")
    with _damage(path):
        spots = pd.read_csv(path, sep="\t")
    missing = [c for c in ("x", "y", "pixel_x", "pixel_y") if c not in spots.columns]
    if missing:
        raise BadInput(f"{path.name} has no column {missing[0]!r}: give x, y, pixel_x and pixel_y.")
    numbers = spots[["x", "y", "pixel_x", "pixel_y"]].apply(pd.to_numeric, errors="coerce")
    if not len(spots) or not np.isfinite(numbers.to_numpy()).all():
        raise BadInput(f"{path.name} holds no spots or a place that is no number: give one row per spot.")
    spots.index = pd.Index([f"{round(x)}x{round(y)}" for x, y in zip(numbers["x"], numbers["y"], strict=True)])
    if not spots.index.is_unique:
        raise BadInput(f"{path.name} names the spot {spots.index[spots.index.duplicated()][0]} twice: give it once.")
    path = _st_file(folder, name, "counts")
    with _damage(path):
        counts = pd.read_csv(path, sep="\t", index_col=0)
        counts = counts.astype(np.float64)
    counts.index = counts.index.astype(str)
    if not (counts.index.is_unique and counts.columns.is_unique):
        raise BadInput(f"{path.name} names a spot or gene twice: give each once.")
    selected = spots["selected"].to_numpy() != 0 if "selected" in spots.columns else np.ones(len(spots), dtype=bool)
    chosen = spots[selected]
    common = chosen.index[chosen.index.isin(counts.index)]
    if not len(common):
        raise BadInput(
            f"No spot of {name}.spots.tsv is a row of {path.name}: rows are like {counts.index[0]!r}, the spots "
            f"{spots.index[0]!r}."
        )
    left_out = int(np.nansum(counts.loc[~counts.index.isin(common)].to_numpy()))
    return chosen.loc[common], counts.loc[common], {"spot_not_selected": left_out}, int((~selected).sum())


# --- Visium -------------------------------------------------------------------------------------------------------


def _visium_outs(folder: Path) -> Path | None:
    for place in (folder, folder / "outs"):
        if any((place / "spatial" / name).is_file() for name in POSITIONS):
            return place
    return None


def _positions(path: Path) -> pd.DataFrame:
    with _damage(path):
        with path.open(encoding="utf-8-sig") as file:
            named = "in_tissue" in file.readline()
        table = pd.read_csv(path, header=0 if named else None)
        if not named:
            table.columns = pd.Index(POSITION_COLUMNS)
    missing = [c for c in POSITION_COLUMNS if c not in table.columns]
    if missing:
        raise BadInput(f"{path.name} lacks the column {missing[0]!r}: copy it again from the run.")
    return table.astype({"barcode": str})


def _scale_factors(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise BadInput(f"{path} is missing: copy the whole run folder.")
    with _damage(path):
        scales = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(scales[name]) for name in ("spot_diameter_fullres", "tissue_hires_scalef")}


def _matrix(path: Path, genome: str) -> tuple[pd.DataFrame, np.ndarray, sp.csr_matrix]:
    """Genes, barcodes, counts ``[spot, gene]``; features of one symbol are summed."""
    import h5py

    if not path.is_file():
        raise BadInput(f"{path} is missing: copy the whole run folder.")
    with _damage(path), h5py.File(path) as file:
        group = file["matrix"]
        n_features, n_spots = (int(n) for n in group["shape"][:2])
        ids, symbols, kind, genomes = (
            np.asarray(group["features"][name]).astype(str) for name in ("id", "name", "feature_type", "genome")
        )
        names = np.asarray(group["barcodes"]).astype(str).astype(object)
        counts = sp.csr_matrix(
            tuple(np.asarray(group[name]) for name in ("data", "indices", "indptr")), shape=(n_spots, n_features)
        )
        counts.check_format()
    found = sorted({*genomes} - {""})
    if not all(genome.lower() in g.lower() for g in found):
        raise BadInput(
            f"{path.name} was made with the genome {' + '.join(found)}, expected {genome}: choose a slide of that "
            "species, or say --genome."
        )
    keep = np.flatnonzero(kind == GENE_EXPRESSION)
    if not len(keep):
        raise BadInput(f"{path.name} holds no feature of type {GENE_EXPRESSION!r}: give a gene expression run.")
    codes, unique = pd.factorize(symbols[keep])
    merge = sp.csr_matrix((np.ones(len(keep)), (keep, codes)), shape=(n_features, len(unique)))
    first = keep[np.unique(codes, return_index=True)[1]]
    genes = pd.DataFrame({"gene_id": ids[first]}, index=pd.Index(unique))
    return genes, names, whole_counts((counts @ merge).astype(np.float32), path.name)
