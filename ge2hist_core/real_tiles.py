"""Some tiles of the training tissue kept in a bundle, to stand beside generated ones: the nearest in state.

``python -m ge2hist_core real-tiles BUNDLE DATA.zarr`` writes the folder ``real_tiles`` into the bundle: ``tiles.jpg``
(one row per type), ``states.safetensors`` and ``tiles.json``. They are for looking: no result depends on them, and the
bundle's hash leaves them out.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ge2hist_core import rng
from ge2hist_core.files import atomic_path, write_json
from ge2hist_core.types import BadInput, Latent

if TYPE_CHECKING:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore

__all__ = ["RealTiles", "choose", "load", "save"]

FOLDER = "real_tiles"
PER_TYPE = 24
JPEG_QUALITY = 90


@dataclass(frozen=True, eq=False)
class RealTiles:
    """Real tiles with the states that the model reads from their cells.

    Parameters
    ----------
    images: uint8 ``[tile, H, W, 3]``. latent: ``[tile]``.
    cell_type, donor, cell_id: ``[tile]`` of the cell in the middle.
    model_sha256: whose states these are. source: plain JSON on the tissue.
    """

    images: np.ndarray
    latent: Latent
    cell_type: np.ndarray
    donor: np.ndarray
    cell_id: np.ndarray
    model_sha256: str
    source: dict[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    def nearest(self, latent: Latent) -> tuple[np.ndarray, np.ndarray]:
        """Nearest tile of each state and how far it is.

        The distance is the root mean square over z_c and z_e of differences in standard deviations of the tiles, the
        two parts weighing the same: 1.4 is what two unrelated cells have.

        Returns
        -------
        index: int ``[state]``. distance: float ``[state]``.
        """
        squares = np.zeros((len(latent), len(self)))
        for part in ("z_c", "z_e"):
            known, asked = (getattr(one, part).astype(np.float64) for one in (self.latent, latent))
            scale = known.std(axis=0) + 1e-9
            gap = asked[:, None] / scale - known / scale
            squares += (gap**2).mean(axis=2) / 2
        index = squares.argmin(axis=1)
        return index, np.sqrt(squares[np.arange(len(latent)), index])


def choose(model: GE2Hist, store: TissueStore, per_type: int = PER_TYPE, seed: int = 0) -> RealTiles:
    """As many cells of each type, drawn from the donors that the model was trained on.

    Raises
    ------
    BadInput: the store has no such donor, or a number below 1.
    """
    if per_type < 1:
        raise BadInput(f"--per-type is {per_type}: keep at least 1 tile of each type.")
    donors = sorted(model.has_learned_from(store, ("train",)))
    rows = store.rows(donors)
    if not len(rows):
        raise BadInput(f"{store.path} has no donor that this bundle was trained on: give the store of its training.")
    kind, draw = np.asarray(store.cells.cell_type)[rows], rng.stream(seed, "real tiles")
    chosen = np.concatenate([draw.permutation(rows[kind == name])[:per_type] for name in model.cell_types])
    cells = store.cells.take(chosen)
    assert cells.cell_type is not None and cells.donor is not None
    return RealTiles(
        store.tiles(chosen),
        model.encode(model.embed(cells, seed)),
        cells.cell_type,
        cells.donor,
        cells.cell_id,
        model.sha256,
        {"store": store.identity, "simulation": store.simulation is not None, "donors": donors},
    )


def save(tiles: RealTiles, folder: str | Path) -> None:
    """Write the tiles into a bundle."""
    from PIL import Image
    from safetensors.numpy import save_file

    n, height, width = tiles.images.shape[:3]
    columns = min(n, PER_TYPE)
    sheet = np.zeros((-(-n // columns) * height, columns * width, 3), dtype=np.uint8)
    for i, image in enumerate(tiles.images):
        y, x = divmod(i, columns)
        sheet[y * height : (y + 1) * height, x * width : (x + 1) * width] = image
    folder = Path(folder) / FOLDER
    with atomic_path(folder / "tiles.jpg") as temporary:
        Image.fromarray(sheet).save(temporary, quality=JPEG_QUALITY, subsampling=0)
    with atomic_path(folder / "states.safetensors") as temporary:
        save_file({"z_c": tiles.latent.z_c, "z_e": tiles.latent.z_e}, temporary)
    names = {name: getattr(tiles, name).astype(str).tolist() for name in ("cell_type", "donor", "cell_id")}
    facts = {"columns": columns, "size": [height, width], "model_sha256": tiles.model_sha256, "source": tiles.source}
    write_json(folder / "tiles.json", names | facts)


def load(model: GE2Hist) -> RealTiles | None:
    """The tiles of a bundle, None where it has none or they belong to other weights.

    Raises
    ------
    BadInput: damaged files.
    """
    if model.folder is None or not (model.folder / FOLDER / "tiles.json").is_file():
        return None
    folder = model.folder / FOLDER
    from PIL import Image
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        facts = json.loads((folder / "tiles.json").read_text(encoding="utf-8"))
        if facts["model_sha256"] != model.sha256:
            return None
        states = load_file(folder / "states.safetensors")
        with Image.open(folder / "tiles.jpg") as opened:
            sheet = np.asarray(opened.convert("RGB"))
        height, width = facts["size"]
        n, columns = len(facts["cell_id"]), facts["columns"]
        grid = sheet.reshape(len(sheet) // height, height, columns, width, 3).swapaxes(1, 2)
        kind, donor, cell_id = (np.array(facts[name], dtype=object) for name in ("cell_type", "donor", "cell_id"))
        return RealTiles(
            grid.reshape(-1, height, width, 3)[:n],
            Latent(states["z_c"], states["z_e"]),
            kind,
            donor,
            cell_id,
            facts["model_sha256"],
            facts["source"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BadInput(f"The tiles in {folder} are damaged ({error}): run real-tiles again.") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m ge2hist_core real-tiles``."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("data", type=Path, metavar="DATA.zarr", help="the store that the bundle was trained on")
    parser.add_argument("--per-type", type=int, default=PER_TYPE)
    parser.add_argument("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> None:
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.store import TissueStore

    model = GE2Hist.load(args.bundle)
    tiles = choose(model, TissueStore(args.data, model.config.tile_px), args.per_type, args.seed)
    save(tiles, args.bundle)
    print(f"{len(tiles)} tiles of {len(set(tiles.donor))} training donors in {args.bundle}")
