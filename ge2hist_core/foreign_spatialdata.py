"""A SpatialData store that others made (``spatialdata-io``, a lab's own script) -> cells in um of its H&E.

Such a store holds images, outlines or masks, and tables in any number and under any name, each with transformations to
one or more coordinate systems. What is used is named by the user or, where there is one possibility only, found; where
there are several the sentence lists them. Transformations are applied as they stand, so a picture that is turned,
scaled or sheared against the outlines is met where it lies.

Coordinate systems have no unit. Its size in um is given by the user or follows from what the store holds: squares that
are named by their size (Visium HD), Xenium's outlines, which are um scaled to px, or spots in Visium's grid.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core.slide_cells import SlideCells, outlines_of_labels, project, scale_of, whole_counts
from ge2hist_core.slide_image import SlideImage
from ge2hist_core.types import BadInput

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["ElementImage", "is_store", "open_spatialdata"]

OWN = "ge2hist"
ATTRS = "spatialdata_attrs"
BINS = re.compile(r"square_(\d{3})um")
XENIUM_UM = ("nucleus_boundaries", "cell_boundaries", "cell_circles")
RESOLUTIONS = ("_full_image", "_hires_image", "_lowres_image")
"""How Visium's readers name one picture in three sizes, the best first."""
VISIUM_PITCH_UM = 100.0
VISIUM_RADIUS = (0.25, 0.35)
"""Radius of a Visium spot in pitches: 0.275 by its 55 um, 0.325 by Space Ranger's theoretical 65 um."""
MAX_LABEL_PX = 400_000_000


class ElementImage(SlideImage):
    """An image element as a :class:`SlideImage`: read window by window from the store's chunks.

    Parameters
    ----------
    pixels: uint8 ``(c, y, x)`` array, at least three channels: red, green, blue.

    Raises
    ------
    BadInput: another type of pixels, or a scale at which no nucleus or spot can be seen.
    """

    def __init__(self, path: Path, name: str, pixels: Any, um_per_px: float) -> None:
        self.path, self.name = path, f"image {name!r} of {path.name}"
        self._file = None
        self.file_um_per_px = None
        if pixels.dtype != np.uint8:
            raise BadInput(f"{self.name} holds {pixels.dtype} pixels: give the H&E as 8-bit RGB.")
        if not 0.05 <= um_per_px <= 5.0:
            raise BadInput(
                f"{self.name} has {um_per_px:.3g} um per pixel, 0.05 to 5 can be used: check --um-per-unit, or name "
                "another image."
            )
        self._pixels = pixels
        self.height, self.width = (int(n) for n in pixels.shape[1:])
        self.um_per_px = float(um_per_px)

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        return np.moveaxis(np.asarray(self._pixels[:3, rows, columns]), 0, -1)


def is_store(folder: Path) -> bool:
    """Whether a folder is a zarr store."""
    return any((folder / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs"))


def open_spatialdata(
    path: str | Path,
    image: str | None = None,
    cells: str | None = None,
    table: str | None = None,
    coordinate_system: str | None = None,
    um_per_unit: float | None = None,
    layer: str | None = None,
    label_column: str | None = None,
) -> SlideCells:
    """Read a store; the image stays open in the result.

    Parameters
    ----------
    image, cells, table, coordinate_system: names, None where the store leaves no choice. ``cells`` may name outlines
        other than those that the table annotates if its index or its column ``cell_id`` holds the same cells.
    um_per_unit: um of one unit of the coordinate system; None if the store tells.
    layer: layer of the table with the raw counts; None takes ``X``.
    label_column: column of the table's ``obs`` with cell types.

    Raises
    ------
    BadInput: no such element, several possibilities, no raw counts, a unit that nothing tells, one of our own stores.
    """
    import shapely

    path = Path(path)
    sdata = _read(path)
    table_name, annotated = _pick_table(sdata, table)
    element = _pick_cells(sdata, table_name, annotated, cells)
    adata = _rows_of(annotated, element)
    names, shapes, of_row = _shapes(sdata, element, adata)
    image_name = _pick_image(sdata, element, image)
    system, to_system, from_system = _pick_system(sdata, element, image_name, coordinate_system)
    unit = um_per_unit
    if unit is None:
        unit = _um_per_unit(sdata, system, element, shapes, to_system)
    centre = shapely.get_coordinates(shapely.centroid(shapes)).reshape(-1, 2)
    um_per_px = unit / scale_of(from_system, project(to_system, centre))
    picture = ElementImage(path, image_name, _pixels(sdata, image_name), um_per_px)
    to_um = np.diag([um_per_px, um_per_px, 1.0]) @ from_system @ to_system
    outlines = shapely.transform(shapes, lambda xy: project(to_um, xy))

    counts = whole_counts(_matrix(adata, layer), f"Table {table_name!r}" + (f", layer {layer!r}," if layer else ""))
    genes = _genes(adata, table_name)
    obs = pd.DataFrame(index=pd.RangeIndex(len(names)))
    if label_column is not None:
        if label_column not in adata.obs.columns:
            raise BadInput(
                f"Table {table_name!r} has no column {label_column!r}: its columns are {', '.join(adata.obs.columns)}."
            )
        obs[label_column] = adata.obs[label_column].astype("string").fillna("").to_numpy(dtype=object)[of_row]
    known = np.zeros(len(adata), dtype=bool)
    known[of_row] = True
    spot_um = _one_diameter(sdata, element)
    kind = "spot" if spot_um is not None else "nucleus" if "nucle" in element.lower() else "cell"
    kept = counts[of_row]
    where = project(to_um, centre)
    return SlideCells(
        section="",
        image=picture,
        unit=kind,
        names=names,
        outlines=outlines,
        counts=kept,
        genes=genes,
        dropped={"no_outline": int(counts[~known].sum())},
        density=None if kind == "spot" else (where, np.asarray(kept.sum(axis=1)).ravel()),
        obs=obs,
        spot_um=None if spot_um is None else spot_um * scale_of(to_system, centre) * unit,
        figures={
            "image_element": image_name,
            "cells_element": element,
            "table": table_name,
            "coordinate_system": system,
            "um_per_unit": float(unit),
        },
        warnings=()
        if um_per_px <= 1.0
        else (
            f"{picture.name} has {um_per_px:.2g} um per pixel and shows no nuclei: name a finer one by "
            "--image-element.",
        ),
    )


def _read(path: Path) -> SpatialData:
    import spatialdata

    from ge2hist_core.store import _quiet

    try:
        with _quiet():
            sdata = spatialdata.read_zarr(path, selection=("images", "labels", "shapes", "tables"))
    except Exception as error:  # zarr, anndata and spatialdata raise a dozen classes for damaged stores
        raise BadInput(
            f"{path} cannot be read as a SpatialData store ({type(error).__name__}): write it again."
        ) from error
    if OWN in sdata.attrs:
        raise BadInput(f"{path} is a store of this project already: train on it as it is.")
    return sdata


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(repr, names))) or "none"


def _regions(table: AnnData) -> list[str]:
    region = table.uns.get(ATTRS, {}).get("region", [])
    return [region] if isinstance(region, str) else [str(name) for name in region]


def _pick_table(sdata: SpatialData, name: str | None) -> tuple[str, AnnData]:
    tables = {key: value for key, value in sdata.tables.items() if _regions(value)}
    if name is not None:
        if name not in tables:
            raise BadInput(f"The store has no table {name!r} that annotates an element: it has {_listed(tables)}.")
        return name, tables[name]
    cells = {key: value for key, value in tables.items() if not all(BINS.search(r) for r in _regions(value))}
    if not cells:
        raise BadInput(
            f"No table of the store annotates cells or spots (tables: {_listed(sdata.tables)}): bins of Visium HD "
            "become cells by preparing the Space Ranger folder; other tables must annotate an element."
        )
    if len(cells) > 1:
        raise BadInput(f"The store has several tables of cells: say which by --table, {_listed(cells)}.")
    return next(iter(cells.items()))


def _pick_cells(sdata: SpatialData, table_name: str, table: AnnData, name: str | None) -> str:
    elements = {*sdata.shapes, *sdata.labels}
    if name is not None:
        if name not in elements:
            raise BadInput(f"The store has no shapes or labels {name!r}: it has {_listed(elements)}.")
        return name
    regions = [region for region in _regions(table) if region in elements]
    if not regions:
        raise BadInput(
            f"Table {table_name!r} annotates {_listed(_regions(table))}, which the store does not hold: name outlines "
            f"by --cells-element, {_listed(elements)}."
        )
    if len(regions) > 1:
        raise BadInput(
            f"Table {table_name!r} annotates several elements: say which by --cells-element, {_listed(regions)}."
        )
    return regions[0]


def _rows_of(table: AnnData, element: str) -> AnnData:
    """The rows that annotate the element; all rows if the table annotates one element only."""
    attrs = table.uns[ATTRS]
    if element in _regions(table) and len(_regions(table)) > 1:
        return table[(table.obs[attrs["region_key"]].astype(str) == element).to_numpy()]
    return table


def _shapes(sdata: SpatialData, element: str, table: AnnData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Names ``[cell]``, outlines in the element's own coordinates, and the row of the table of each."""
    import shapely

    if element in sdata.labels:
        labels = _finest(sdata.labels[element])
        if labels.shape[0] * labels.shape[1] > MAX_LABEL_PX:
            raise BadInput(
                f"Labels {element!r} have {labels.shape[1]} x {labels.shape[0]} px: name shapes by --cells-element."
            )
        ids, shapes = outlines_of_labels(np.asarray(labels))
        keys = [pd.Index(ids.astype(str))]
    else:
        frame = sdata.shapes[element]
        shapes = np.asarray(frame.geometry.array, dtype=object)
        if "radius" in frame.columns:
            shapes = shapely.buffer(shapes, frame["radius"].to_numpy(np.float64))
        keys = [pd.Index(frame.index.astype(str))]
        if "cell_id" in frame.columns:
            keys.append(pd.Index(frame["cell_id"].astype(str)))
    attrs = table.uns[ATTRS]
    wanted = [table.obs[attrs["instance_key"]].astype(str)]
    if element not in _regions(table):
        wanted += [table.obs["cell_id"].astype(str)] if "cell_id" in table.obs.columns else []
        wanted.append(pd.Series(table.obs_names.astype(str)))
    best, ours = max(
        ((key, want) for key in keys for want in wanted), key=lambda pair: int(pair[1].isin(pair[0]).sum())
    )
    found = pd.Index(ours).get_indexer(best)
    if not len(best) or (found < 0).all():
        raise BadInput(
            f"None of the {len(best):,} outlines of {element!r} is a cell of the table (like "
            f"{ours.iloc[0] if len(ours) else ''!r}): name the outlines that belong to it by --cells-element."
        )
    # Several outlines of one cell (several nuclei) are joined.
    rows, first, n = np.unique(found[found >= 0], return_index=True, return_counts=True)
    mine = np.flatnonzero(found >= 0)
    joined = shapes[mine[first]]
    for k in np.flatnonzero(n > 1):
        joined[k] = shapely.union_all(shapes[found == rows[k]])
    names = table.obs_names.to_numpy(dtype=object)[rows]
    if len(set(names)) != len(names):
        raise BadInput("The table's obs_names are not unique: make them unique.")
    return names, joined, rows


def _finest(element: Any) -> Any:
    """The array of an element, of the finest scale if there are several."""
    if hasattr(element, "children") and element.children:
        return next(iter(next(iter(element.children.values())).data_vars.values())).data
    return element.data


def _pixels(sdata: SpatialData, name: str) -> Any:
    return _finest(sdata.images[name])


def _systems(element: Any) -> dict[str, np.ndarray]:
    """Affine ``[3, 3]`` (x, y) to each coordinate system."""
    from spatialdata.transformations import get_transformation

    return {
        str(name): np.asarray(t.to_affine_matrix(input_axes=("x", "y"), output_axes=("x", "y")), dtype=np.float64)
        for name, t in get_transformation(element, get_all=True).items()
    }


def _pick_image(sdata: SpatialData, cells: str, name: str | None) -> str:
    if name is not None:
        if name not in sdata.images:
            raise BadInput(f"The store has no image {name!r}: it has {_listed(sdata.images)}.")
        if _pixels(sdata, name).shape[0] not in (3, 4):
            raise BadInput(f"Image {name!r} has {_pixels(sdata, name).shape[0]} channels: name an RGB image.")
        return name
    reach = set(_systems(sdata[cells]))
    able = [
        key for key, element in sdata.images.items()
        if _finest(element).shape[0] in (3, 4) and reach & set(_systems(element))
    ]  # fmt: skip
    for ending in RESOLUTIONS:
        best = [key for key in able if key.endswith(ending)]
        rest = {key.removesuffix(end) for key in able for end in RESOLUTIONS if key.endswith(end)}
        if len(best) == 1 and len(rest) == 1 and all(key.endswith(RESOLUTIONS) for key in able):
            return best[0]
    if len(able) != 1:
        state = "no RGB image that shares a coordinate system with" if not able else "several RGB images with"
        raise BadInput(
            f"The store has {state} {cells!r}: name one by --image-element, {_listed(able or sdata.images)}."
        )
    return able[0]


def _pick_system(sdata: SpatialData, cells: str, image: str, name: str | None) -> tuple[str, np.ndarray, np.ndarray]:
    """Name of the coordinate system, matrix from the cells to it, and from it to px of the image."""
    theirs, its = _systems(sdata[cells]), _systems(sdata.images[image])
    common = sorted(set(theirs) & set(its), key=lambda key: (len(key), key))
    if name is not None:
        if name not in common:
            raise BadInput(
                f"{cells!r} and image {image!r} do not both lie in {name!r}: in common they have {_listed(common)}."
            )
        common = [name]
    if not common:
        raise BadInput(
            f"{cells!r} lies in {_listed(theirs)}, image {image!r} in {_listed(its)}: give both a transformation to "
            "one coordinate system."
        )
    back = {}
    for key in common:
        if abs(np.linalg.det(its[key])) < 1e-12:
            raise BadInput(f"The transformation of image {image!r} to {key!r} has no inverse: correct it.")
        back[key] = np.linalg.inv(its[key])
    ways = [back[key] @ theirs[key] for key in common]
    if any(not np.allclose(way, ways[0], rtol=1e-4, atol=1e-2) for way in ways[1:]):
        raise BadInput(
            f"{cells!r} lies on image {image!r} in different ways by the coordinate systems {_listed(common)}: say "
            "which is right by --coordinate-system."
        )
    return common[0], theirs[common[0]], back[common[0]]


def _um_per_unit(sdata: SpatialData, system: str, cells: str, shapes: np.ndarray, to_system: np.ndarray) -> float:
    """um of one unit of a coordinate system by what lies in it."""
    import shapely

    for name, frame in sdata.shapes.items():
        bins, systems = BINS.search(name), _systems(frame)
        if system not in systems or not len(frame):
            continue
        own = np.sqrt(abs(np.linalg.det(systems[system])))
        if bins and "radius" in frame.columns:
            return float(int(bins[1]) / (2 * frame["radius"].iloc[0] * own))
        if bins:
            return float(int(bins[1]) / (np.sqrt(frame.geometry.iloc[0].area) * own))
        if name in XENIUM_UM and own > 1.0 and sdata.attrs.get("spatialdata_io_reader", "xenium") == "xenium":
            return float(1.0 / own)
    radius = _one_diameter(sdata, cells)
    if radius is not None and len(shapes) >= 7:
        from scipy.spatial import cKDTree

        xy = shapely.get_coordinates(shapely.centroid(shapes)).reshape(-1, 2)
        pitch = float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))
        if VISIUM_RADIUS[0] <= radius / 2 / pitch <= VISIUM_RADIUS[1]:
            return VISIUM_PITCH_UM / (pitch * float(np.sqrt(abs(np.linalg.det(to_system)))))
    raise BadInput(
        f"Nothing in the store says how long a unit of the coordinate system {system!r} is: give um per unit by "
        "--um-per-unit (the um per pixel of the H&E if the system counts its pixels, 1 if it is in um)."
    )


def _one_diameter(sdata: SpatialData, element: str) -> float | None:
    """Diameter of circles that are all of one size, in the element's own units; None for anything else."""
    if element not in sdata.shapes or "radius" not in sdata.shapes[element].columns:
        return None
    radius = sdata.shapes[element]["radius"].to_numpy(np.float64)
    return 2.0 * float(radius[0]) if len(radius) > 1 and np.ptp(radius) < 1e-6 * radius[0] else None


def _matrix(table: AnnData, layer: str | None) -> Any:
    if layer is None:
        return table.X
    if layer not in table.layers:
        raise BadInput(f"The table has no layer {layer!r}: it has {_listed(table.layers)}.")
    return table.layers[layer]


def _genes(table: AnnData, name: str) -> pd.DataFrame:
    symbols = pd.Index(table.var_names.astype(str)).rename(None)
    if not symbols.is_unique:
        raise BadInput(f"Table {name!r} names the gene {symbols[symbols.duplicated()][0]!r} twice: sum its columns.")
    if "gene_ids" not in table.var.columns:
        return pd.DataFrame(index=symbols)
    return pd.DataFrame({"gene_id": table.var["gene_ids"].astype(str).to_numpy()}, index=symbols)
