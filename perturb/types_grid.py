"""Cell types x environments, and the way between two cells, as one recipe. ``python -m perturb types``.

The states are those of :mod:`ge2hist_core.gallery`: z_c of a row is drawn from the type's mixture component, z_e of a
column from the prior, along a main axis of the training cells' z_e, or from a cell; on a way, z_c, z_e or both move on
a straight line from one cell to another. All pictures share their noise. What is not in the :class:`TypesGrid` cannot
change a picture.
"""

from __future__ import annotations

import argparse
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ge2hist_core.config import SampleConfig, from_json, to_json
from ge2hist_core.files import parse_json
from ge2hist_core.types import BadInput, Niche, check_sha256, check_text

if TYPE_CHECKING:
    from ge2hist_core.data import H5adSource
    from ge2hist_core.gallery import Gallery
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.real_tiles import RealTiles
    from ge2hist_core.types import Latent
    from perturb.cache import DiskCache
    from perturb.run import Progress

__all__ = ["ENVIRONMENTS", "PARTS", "TypesGrid", "draw_types", "load_types", "statistics", "types_files", "zip_bytes"]

ENVIRONMENTS = ("prior", "axis", "cells")
PARTS = ("z_e", "z_c", "both")
STATES = 5
SCHEMA = 1
SHOWN_PX = 256
"""Width of a written picture, about."""
_CURE = "give a types.json that GE2Hist wrote"


@dataclass(frozen=True)
class TypesGrid:
    """What to draw: a grid of types x environments, or the way between two cells where ``part`` is given.

    Parameters
    ----------
    model_sha256: of the bundle.
    types: of the grid's rows, each once.
    environments: of the grid's columns: ``prior`` (``n`` draws), ``axis`` (-2 to 2 standard deviations along axis
        number ``axis``, 1 being that of the largest variance) or ``cells`` (one column for each of ``cell_ids``).
    n: draws from the prior, or states of a way.
    cell_ids: cells that give environments, or the two ends of a way.
    part: what moves on a way: ``z_e``, ``z_c`` or ``both``; "" for a grid.
    seed: of the shared noise and of what is drawn.
    encoder_seed: of the cells' embeddings.
    data_sha256, matrix, gene_column: where the cells come from and how they are read; None without cells.

    Raises
    ------
    BadInput: a field out of range, or one that does not go with the others.
    """

    model_sha256: str
    types: tuple[str, ...] = ()
    environments: str = "prior"
    n: int = STATES
    axis: int = 1
    cell_ids: tuple[str, ...] = ()
    part: str = ""
    seed: int = 0
    sample: SampleConfig = SampleConfig()
    encoder_seed: int = 0
    data_sha256: str | None = None
    matrix: str | None = None
    gene_column: str | None = None

    def __post_init__(self) -> None:
        check_sha256("model_sha256", self.model_sha256)
        if self.data_sha256 is not None:
            check_sha256("data_sha256", self.data_sha256)
        for name in ("matrix", "gene_column"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        for name in ("types", "cell_ids"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            for value in values:
                check_text(f"A name of {name}", value)
                if values.count(value) > 1:
                    raise BadInput(f"{name} holds {value!r} twice: give it once.")
        for name, least in (("n", 1), ("axis", 1), ("seed", 0), ("encoder_seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**63:
                raise BadInput(f"{name} is {value!r}: give a whole number from {least}.")
        if self.environments not in ENVIRONMENTS:
            raise BadInput(f"environments is {self.environments!r}: choose {', '.join(ENVIRONMENTS)}.")
        if self.part not in ("", *PARTS):
            raise BadInput(f"part is {self.part!r}: choose {', '.join(PARTS)}, or leave it out for a grid.")
        if self.part and len(self.cell_ids) != 2:
            raise BadInput(f"A way between cells has {len(self.cell_ids)} ends: give two cells.")
        if not self.part and not self.types:
            raise BadInput("The grid has no row: give at least one cell type.")
        if not self.part and (self.environments == "cells") != bool(self.cell_ids):
            raise BadInput("cell_ids and environments do not go together: give cells for environments 'cells' alone.")
        if bool(self.cell_ids) != (self.data_sha256 is not None):
            raise BadInput("cell_ids and data_sha256 go together: give both or neither.")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, as in ``types.json``."""
        return {"schema": SCHEMA} | to_json(self)

    @classmethod
    def from_text(cls, text: str) -> TypesGrid:
        """Inverse of :meth:`to_dict`, from JSON.

        Raises
        ------
        BadInput: not JSON, another schema, an unknown, missing or malformed field.
        """
        value = parse_json(text, "The file", _CURE)
        schema = value.get("schema") if isinstance(value, dict) else None
        if type(schema) is not int or schema != SCHEMA or not isinstance(value.get("sample"), dict):
            raise BadInput(f"The file has no schema {SCHEMA} or no sample: {_CURE}.")
        value = {name: item for name, item in value.items() if name not in ("schema", "notice")}
        try:
            return from_json(cls, value | {"sample": from_json(SampleConfig, value["sample"])})
        except TypeError as error:
            raise BadInput(f"A field is missing or of another type ({error}): {_CURE}.") from None

    def gallery(self, model: GE2Hist, source: H5adSource | None = None) -> Gallery:
        """The states to draw.

        Raises
        ------
        BadInput: another model or data file, a type, axis or cell that there is not, too many pictures.
        """
        from ge2hist_core.gallery import Gallery, axis_environments, between, cell_types, prior_environments

        if model.sha256 != self.model_sha256:
            raise BadInput(
                f"The grid was made with model {self.model_sha256[:12]}, but {model.sha256[:12]} is loaded: load that "
                "bundle or make the grid again."
            )
        if self.part:
            ends = self._read(model, source)
            way = between(ends.take([0]), ends.take([1]), self.n, self.part)
            titles = tuple(f"{100 * i // (self.n - 1)} %" for i in range(self.n))
            return Gallery(titles, titles, way.z_c, way.z_e, self.seed, self.sample, paired=True)
        if self.environments == "prior":
            titles, z_e = prior_environments(model, self.n, self.seed)
        elif self.environments == "axis":
            if self.axis > model.config.d_e:
                raise BadInput(f"axis is {self.axis}: choose 1 to {model.config.d_e}.")
            titles, z_e = axis_environments(model, self.axis - 1)
        else:
            titles, z_e = tuple(f"as {name}" for name in self.cell_ids), self._read(model, source).z_e
        return Gallery(self.types, titles, cell_types(model, self.types, self.seed), z_e, self.seed, self.sample)

    def _read(self, model: GE2Hist, source: H5adSource | None) -> Latent:
        if source is None or source.sha256 != self.data_sha256:
            here = "none is open" if source is None else f"{source.path.name} is {source.sha256[:12]}"
            raise BadInput(
                f"The grid was made with data {str(self.data_sha256)[:12]}, but {here}: open the grid's file."
            )
        cells = source.take([source.index_of(name) for name in self.cell_ids])
        return model.encode(model.embed(cells, self.encoder_seed))


def draw_types(
    gallery: Gallery,
    model: GE2Hist,
    cache: DiskCache,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: threading.Event | None = None,
) -> np.ndarray:
    """Every picture of a gallery from the same noise, uint8 ``[picture, H, W, 3]``, taken from the cache or kept in it.

    Raises
    ------
    ge2hist_core.sampler.Stopped: cancelled.
    """
    from ge2hist_core.gallery import draw
    from perturb.run import Progress

    def on_step(i: int, n: int, _: object) -> bool:
        if on_progress is not None:
            on_progress(Progress(i / n, "Drawing"))
        return cancel is not None and cancel.is_set()

    images = load_types(gallery, model, cache)
    if images is None:
        images = draw(gallery, model, on_step)
        cache.store_arrays(gallery.hash(model.sha256), {"images": images})
    return images


def load_types(gallery: Gallery, model: GE2Hist, cache: DiskCache) -> np.ndarray | None:
    """The pictures of a gallery that were drawn before, or None."""
    stored = cache.load_arrays(gallery.hash(model.sha256))
    return None if stored is None else stored["images"]


def statistics(gallery: Gallery, model: GE2Hist, images: np.ndarray, real: RealTiles | None = None) -> pd.DataFrame:
    """What the reader sees in each picture, and the real tile whose cell the model reads most alike.

    Returns
    -------
    One row per picture: ``row, column``; ``n`` nuclei, ``density`` (cells/mm2), ``spacing`` (um),
    ``fraction:<class>``, as :func:`ge2hist_core.gallery.readouts`; with real tiles also ``real_cell_type, real_donor,
    real_cell_id`` and ``real_distance`` (see :meth:`RealTiles.nearest`).
    """
    from ge2hist_core.gallery import readouts

    table = readouts(gallery, model, images)
    if real is None:
        return table
    tile, distance = real.nearest(gallery.latent)
    named = {f"real_{name}": getattr(real, name)[tile] for name in ("cell_type", "donor", "cell_id")}
    return table.assign(**named, real_distance=distance)


def types_files(
    recipe: TypesGrid, gallery: Gallery, model: GE2Hist, images: np.ndarray, real: RealTiles | None = None
) -> dict[str, bytes]:
    """Every file by its relative name: pictures, the sheet of all, statistics, recipe, ``README.txt``."""
    from perturb import pictures
    from perturb.page import csv_bytes, json_bytes, noted, readme

    side = model.config.tile_px
    origin = {"gallery_sha256": gallery.hash(model.sha256), "model_sha256": model.sha256}
    names = [_file_name(i, *titles) for i, titles in enumerate(gallery.titles, start=1)]
    files, niches = {}, []
    for name, (row, column), image in zip(names, gallery.titles, images, strict=True):
        niches.append(Niche(image, model.config.um_per_px, seed=gallery.seed, generated=True))
        said = origin | {"generated": "true", "row": row, "column": column}
        files[f"pictures/{name}"] = pictures.png_bytes(pictures.show(niches[-1], max(1, SHOWN_PX // side)), said)
    width = len(gallery.columns)
    files["sheet.png"] = pictures.png_bytes(pictures.contact_sheet(niches, width), origin | {"generated": "true"})
    if real is not None:
        for name, tile in zip(names, real.nearest(gallery.latent)[0], strict=True):
            shown = pictures.show(Niche(real.images[tile], model.config.um_per_px), max(1, SHOWN_PX // side))
            said = {"generated": "false", "cell_type": str(real.cell_type[tile]), "cell_id": str(real.cell_id[tile])}
            files[f"nearest_real/{name}"] = pictures.png_bytes(shown, said)
    table = statistics(gallery, model, images, real)
    files["statistics.csv"] = csv_bytes(table.assign(file=names))
    files["types.json"] = json_bytes(noted(recipe.to_dict()))
    said = {
        "pictures/": "one generated picture per state, all from the same noise",
        "sheet.png": f"all of them, {width} in a row",
        **({"nearest_real/": "beside each, the real tile of the bundle nearest in state"} if real is not None else {}),
        "statistics.csv": "what the reader sees: n nuclei, density in cells/mm2, spacing in um, shares as fractions",
        "types.json": "recipe: `python -m perturb types again types.json` draws the same pictures",
    }
    what = f"the way between cells in {recipe.part}" if recipe.part else "cell types and environments"
    further = "One picture of one noise seed says little about a type: draw several seeds before comparing."
    return files | {"README.txt": readme(f"{len(images)} generated pictures: {what}", said, further)}


def zip_bytes(
    recipe: TypesGrid, gallery: Gallery, model: GE2Hist, images: np.ndarray, real: RealTiles | None = None
) -> bytes:
    """All of :func:`types_files` as one ZIP; the same grid gives the same bytes."""
    from perturb.page import zip_of

    return zip_of(types_files(recipe, gallery, model, images, real))


def _file_name(number: int, row: str, column: str) -> str:
    """``07_B-cell_prior-draw-2.png``: letters, digits and dashes of both titles, one where they are the same."""
    plain = [re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:40] for text in dict.fromkeys((row, column))]
    return "_".join([f"{number:02d}", *filter(None, plain)]) + ".png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m perturb types``."""
    sample = SampleConfig()
    kinds = parser.add_subparsers(dest="what", required=True, metavar="grid | way | again")
    grid = kinds.add_parser("grid", help="cell types x environments")
    grid.add_argument("--types", help="comma-separated cell types (default: all of the model)")
    where = grid.add_mutually_exclusive_group()
    where.add_argument("--prior", type=int, metavar="N", help=f"environments drawn from the prior (default: {STATES})")
    where.add_argument("--axis", type=int, metavar="K", help="environments along the K-th main axis, from 1")
    where.add_argument("--cell", action="append", metavar="ID", help="a cell's environment; may be given several times")
    way = kinds.add_parser("way", help="states on the way from one cell to another")
    way.add_argument("first", help="cell id")
    way.add_argument("second", help="cell id")
    way.add_argument("--part", choices=PARTS, default="both", help="what moves")
    way.add_argument("--states", type=int, default=STATES, help="both ends included")
    again = kinds.add_parser("again", help="draw a types.json once more")
    again.add_argument("recipe", help="types.json")
    for one in (grid, way):
        one.add_argument("--seed", type=int, default=0, help="of the shared noise and of what is drawn")
        one.add_argument("--solver", default=sample.solver, help="ddpm, ddim or dpm++")
        one.add_argument("--steps", type=int, default=sample.steps)
        one.add_argument("--guidance", type=float, default=sample.guidance)
        one.add_argument("--encoder-seed", type=int, default=0)
        one.add_argument("--matrix", metavar="NAME", help="X, raw.X or a layer (default: raw counts that are found)")
        one.add_argument("--gene-column", metavar="NAME", help="column of var, or index (default: best match)")
    for one in (grid, way, again):
        one.add_argument("--out", required=True, help="folder for pictures, statistics.csv and types.json")
        one.add_argument("--bundle", default="assets/demo_bundle", help="folder of the model")
        one.add_argument("--cells", default="assets/demo_cells.h5ad", help="h5ad with raw counts, for named cells")
        one.add_argument("--cache", help="folder in which finished pictures are kept and looked up")


def main(args: argparse.Namespace) -> None:
    """Draw a grid or a way and write its files.

    Raises
    ------
    BadInput: a recipe, bundle, data file, type or cell that cannot be used.
    """
    from contextlib import ExitStack

    from ge2hist_core.data import open_cells
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.real_tiles import load
    from perturb.cache import report_folder
    from perturb.page import write_files
    from perturb.run import print_progress

    model = GE2Hist.load(args.bundle)
    with ExitStack() as stack:
        recipe, source = None, None
        if args.what == "again":
            try:
                recipe = TypesGrid.from_text(Path(args.recipe).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise BadInput(f"Cannot read {args.recipe} ({error}): {_CURE}.") from None
            named, options = recipe.cell_ids, {"matrix": recipe.matrix, "gene_column": recipe.gene_column}
        else:
            named = (args.first, args.second) if args.what == "way" else tuple(args.cell or ())
            options = {"matrix": args.matrix, "gene_column": args.gene_column}
        if named:
            source = stack.enter_context(open_cells(args.cells, model.scgpt.vocab, **options))
        if recipe is None:
            recipe = _asked(args, model, named, source)
        gallery = recipe.gallery(model, source)
        print(f"{len(gallery.latent)} pictures")
        cache = stack.enter_context(report_folder(args.out, args.cache, gallery.hash(model.sha256)))
        images = draw_types(gallery, model, cache, on_progress=print_progress())
        for path in write_files(types_files(recipe, gallery, model, images, load(model)), args.out):
            print(path)


def _asked(args: argparse.Namespace, model: GE2Hist, named: tuple[str, ...], source: H5adSource | None) -> TypesGrid:
    """The recipe that the options of ``grid`` or ``way`` describe."""
    common: dict[str, Any] = {
        "model_sha256": model.sha256,
        "cell_ids": named,
        "seed": args.seed,
        "sample": SampleConfig(args.solver, args.steps, args.guidance),
        "encoder_seed": args.encoder_seed,
        "data_sha256": None if source is None else source.sha256,
        "matrix": args.matrix if named else None,
        "gene_column": args.gene_column if named else None,
    }
    if args.what == "way":
        return TypesGrid(part=args.part, n=args.states, **common)
    types = model.cell_types if args.types is None else [name.strip() for name in args.types.split(",")]
    environments = "cells" if named else "prior" if args.axis is None else "axis"
    n, axis = STATES if args.prior is None else args.prior, 1 if args.axis is None else args.axis
    return TypesGrid(types=tuple(types), environments=environments, n=n, axis=axis, **common)
