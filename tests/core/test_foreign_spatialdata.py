"""Stores as `spatialdata-io` lays them out: transformations respected, what is unique found, what is not asked for."""

from __future__ import annotations

import warnings

import geopandas
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import shapely
import spatialdata
from anndata import AnnData
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale

from ge2hist_core.foreign_spatialdata import open_spatialdata
from ge2hist_core.prepare import Settings, prepare, recognise
from ge2hist_core.rng import stream
from ge2hist_core.store import TissueStore
from ge2hist_core.types import BadInput

pytestmark = pytest.mark.filterwarnings("ignore")  # of zarr and spatialdata, while the stores are made
PIXEL_UM, HE_UM = 0.2125, 0.5
SIDE = 360
XY = np.array([(x, y) for x in range(40, 331, 29) for y in range(40, 331, 29)], dtype=float)
"""Centres of nuclei in px of the H&E."""
RADIUS_PX = 9.0
TURN = np.array([[0.0, -2.0, 900.0], [2.0, 0.0, 100.0], [0.0, 0.0, 1.0]])
"""From px of the H&E to the store's coordinate system: turned by 90 degrees, twice as large."""


def picture() -> np.ndarray:
    """Dark discs on pink, uint8 ``[SIDE, SIDE, 3]``."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    out = np.full((SIDE, SIDE, 3), (225, 190, 215), dtype=np.uint8)
    for x, y in XY:
        out[(columns - x) ** 2 + (rows - y) ** 2 <= RADIUS_PX**2] = (90, 60, 140)
    return out


def counts() -> np.ndarray:
    return stream(1, "foreign test").poisson(6.0, (len(XY), 15))


def table(region: str, key: str = "instance", ids: object = None, **columns: object) -> AnnData:
    """Rows in another order than the shapes."""
    ids = np.arange(len(XY)) if ids is None else ids
    order = stream(2, "order").permutation(len(XY))
    obs = pd.DataFrame({key: ids, "region": pd.Categorical([region] * len(XY)), **columns})
    obs.index = [f"cell-{i}" for i in range(len(XY))]
    adata = AnnData(sp.csr_matrix(counts().astype(np.float32)), obs=obs)
    adata.var_names = [f"G{i}" for i in range(15)]
    return TableModel.parse(adata[order].copy(), region=region, region_key="region", instance_key=key)


def to(matrix: np.ndarray) -> Affine:
    return Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))


def image(transformations: dict, pixels: np.ndarray | None = None, **options: object) -> object:
    pixels = picture() if pixels is None else pixels
    return Image2DModel.parse(
        np.moveaxis(pixels, -1, 0), dims=("c", "y", "x"), transformations=transformations, **options
    )


def polygons(centres: np.ndarray, radius: float, transformations: dict, index: object = None) -> object:
    frame = geopandas.GeoDataFrame(geometry=shapely.buffer(shapely.points(centres), radius))
    if index is not None:
        frame.index = pd.Index(index)
    return ShapesModel.parse(frame, transformations=transformations)


def system_um() -> np.ndarray:
    """Centres in um of a stage whose px are the coordinate system "global"."""
    return (XY @ TURN[:2, :2].T + TURN[:2, 2]) * PIXEL_UM


def write(folder, **elements: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spatialdata.SpatialData.init_from_elements(elements).write(folder)


def xenium_like() -> dict[str, object]:
    """Outlines in um, scaled to px of the morphology image; the H&E lies on it by an affine map."""
    scale = Scale([1 / PIXEL_UM, 1 / PIXEL_UM], axes=("x", "y"))
    radius = RADIUS_PX * 2 * PIXEL_UM
    return {
        "he_image": image({"global": to(TURN)}, scale_factors=[2]),
        "nucleus_boundaries": polygons(system_um(), radius, {"global": scale}),
        "table": table("nucleus_boundaries", kind=["a" if x < 180 else "b" for x in XY[:, 0]]),
    }


@pytest.fixture(scope="module")
def xenium(tmp_path_factory):
    path = tmp_path_factory.mktemp("foreign") / "x.zarr"
    write(path, **xenium_like())
    return path


def read(path, **options):
    section = open_spatialdata(path, **options)
    section.image.close()
    return section


def check(section, um_per_px: float) -> None:
    """Every cell where its disc is drawn, with its own counts."""
    which = np.array([int(name.removeprefix("cell-")) for name in section.names])
    np.testing.assert_allclose(section.xy_um, XY[which] * um_per_px, atol=0.3)
    np.testing.assert_array_equal(section.counts.toarray(), counts()[which])
    area = np.pi * (RADIUS_PX * um_per_px) ** 2
    np.testing.assert_allclose(shapely.area(section.outlines), area, rtol=0.06)
    assert section.image.um_per_px == pytest.approx(um_per_px, rel=1e-6)


def test_a_xenium_store_is_read_without_a_word(xenium):
    """The unit follows from outlines in um; a px of the H&E is two of the stage's."""
    assert recognise(xenium) == "spatialdata"
    section = read(xenium)
    assert section.unit == "nucleus" and len(section.names) == len(XY)
    check(section, 2 * PIXEL_UM)


def test_it_becomes_a_store_of_ours(xenium, tmp_path):
    settings = Settings(xenium, None, tmp_path / "a.zarr", um_per_px=2 * PIXEL_UM, regions="1x1", label_column="kind")
    report, store = prepare(settings), TissueStore(tmp_path / "a.zarr")
    assert report["umi"]["total"] == report["umi"]["assigned"] == counts().sum() == int(store.cells.counts.sum())
    place = store.obs[["x_image_px", "y_image_px"]].to_numpy()
    assert ((place[:, 0] < 180) == (store.obs["cell_type"] == "a").to_numpy()).all()
    rows = np.flatnonzero(store.interior)
    tiles = store.tiles(rows)
    assert len(rows) > 20 and (tiles[:, 60:68, 60:68] == (90, 60, 140)).all()  # a nucleus in each tile's middle
    check_place = report["registration"]["a"]
    assert check_place["warning"] is None and np.hypot(*check_place["shift_um"]) < 1.5
    with pytest.raises(BadInput, match="is a store of this project already"):
        prepare(Settings(tmp_path / "a.zarr", None, tmp_path / "b.zarr"))


def test_masks_serve_as_outlines(tmp_path):
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    labels = np.zeros((SIDE, SIDE), dtype=np.int32)
    for i, (x, y) in enumerate(XY):
        labels[(columns - x) ** 2 + (rows - y) ** 2 <= RADIUS_PX**2] = 5 + 3 * i
    write(
        tmp_path / "m.zarr",
        he=image({"global": Identity()}),
        cell_masks=Labels2DModel.parse(labels, dims=("y", "x"), transformations={"global": Identity()}),
        counts=table("cell_masks", ids=5 + 3 * np.arange(len(XY))),
    )
    section = read(tmp_path / "m.zarr", um_per_unit=HE_UM)
    assert section.unit == "cell"
    check(section, HE_UM)
    with pytest.raises(BadInput, match="'global' is: give um per unit by --um-per-unit"):
        open_spatialdata(tmp_path / "m.zarr")


def test_other_outlines_of_the_same_cells_can_be_named(tmp_path):
    """As Xenium's: the table annotates cells, nuclei are numbered anew and name their cell; one cell has two."""
    elements = xenium_like()
    scale = {"global": Scale([1 / PIXEL_UM, 1 / PIXEL_UM], axes=("x", "y"))}
    elements["cell_boundaries"] = polygons(system_um(), 6.0, scale)
    nuclei = polygons(system_um(), RADIUS_PX * 2 * PIXEL_UM, scale, 1000 + np.arange(len(XY)))
    nuclei["cell_id"] = np.arange(len(XY))
    nuclei.loc[1001, "cell_id"] = 0
    elements["nucleus_boundaries"] = nuclei
    elements["table"] = table("cell_boundaries")
    write(tmp_path / "x.zarr", **elements)
    assert read(tmp_path / "x.zarr").unit == "cell"
    section = read(tmp_path / "x.zarr", cells="nucleus_boundaries")
    assert section.unit == "nucleus" and len(section.names) == len(XY) - 1
    assert section.dropped == {"no_outline": counts()[1].sum()}
    area = shapely.area(section.outlines)[list(section.names).index("cell-0")]
    assert area == pytest.approx(2 * np.pi * (RADIUS_PX * 2 * PIXEL_UM) ** 2, rel=0.05)


def visium_hd_like() -> dict[str, object]:
    """Bins of 2 um as squares beside cells; the coordinate system counts px of the picture."""
    own = {"s1": Identity(), "s1_downscaled_hires": Scale([0.25, 0.25], axes=("x", "y"))}
    centre = np.array([(x, y) for x in range(20) for y in range(20)]) * 2.0 / HE_UM
    squares = geopandas.GeoDataFrame(geometry=shapely.buffer(shapely.points(centre), 1.0 / HE_UM, cap_style="square"))
    return {
        "s1_full_image": image({"s1": Identity()}),
        "s1_hires_image": image({"s1": Scale([4, 4], axes=("x", "y")), "s1_downscaled_hires": Identity()},
                                picture()[::4, ::4]),
        "s1_square_002um": ShapesModel.parse(squares, transformations=own),
        "s1_nucleus_segmentations": polygons(XY, RADIUS_PX, own),
        "nucleus_segmentations": table("s1_nucleus_segmentations"),
    }  # fmt: skip


def test_a_visium_hd_store_takes_the_full_picture_and_the_bins_scale(tmp_path):
    write(tmp_path / "v.zarr", **visium_hd_like())
    section = read(tmp_path / "v.zarr")
    assert section.figures["image_element"] == "s1_full_image" and section.unit == "nucleus"
    check(section, HE_UM)
    coarse = read(tmp_path / "v.zarr", image="s1_hires_image")
    np.testing.assert_allclose(coarse.xy_um, section.xy_um, atol=1e-3)
    assert coarse.image.um_per_px == pytest.approx(4 * HE_UM) and "shows no nuclei" in coarse.warnings[0]


def test_visium_spots_are_spots_of_a_known_pitch(tmp_path):
    grid = np.array([(c * 50.0, r * 100 * np.sqrt(0.75)) for r in range(12) for c in range(r % 2, 20, 2)])[: len(XY)]
    spots = ShapesModel.parse((grid + 60) / HE_UM, geometry=0, radius=32.5 / HE_UM, transformations={"s": Identity()})
    pixels = np.full((2200, 2200, 3), 200, dtype=np.uint8)
    write(tmp_path / "v.zarr", s_full_image=image({"s": Identity()}, pixels), spots=spots, table=table("spots"))
    section = read(tmp_path / "v.zarr")
    assert section.unit == "spot" and section.spot_um == pytest.approx(65.0, rel=1e-3)
    assert section.image.um_per_px == pytest.approx(HE_UM, rel=1e-3) and section.density is None


def test_what_is_ambiguous_is_asked_for(tmp_path):
    elements = xenium_like()
    elements["if_image"] = image({"global": Identity()})
    elements["second"] = table("nucleus_boundaries")
    write(tmp_path / "x.zarr", **elements)
    with pytest.raises(BadInput, match="several tables of cells: say which by --table, 'second', 'table'"):
        open_spatialdata(tmp_path / "x.zarr")
    with pytest.raises(BadInput, match="several RGB images .* --image-element, 'he_image', 'if_image'"):
        open_spatialdata(tmp_path / "x.zarr", table="table")
    check(read(tmp_path / "x.zarr", table="table", image="he_image"), 2 * PIXEL_UM)


def test_systems_that_disagree_are_asked_for(tmp_path):
    elements = xenium_like()
    scale = Scale([1 / PIXEL_UM, 1 / PIXEL_UM], axes=("x", "y"))
    elements["nucleus_boundaries"] = polygons(system_um(), 4.0, {"global": scale, "aligned": scale})
    moved = TURN + [[0, 0, 50.0], [0, 0, 0], [0, 0, 0]]
    elements["he_image"] = image({"global": to(TURN), "aligned": to(moved)})
    write(tmp_path / "x.zarr", **elements)
    with pytest.raises(BadInput, match="in different ways .* 'aligned', 'global': say which"):
        open_spatialdata(tmp_path / "x.zarr")
    near, far = (read(tmp_path / "x.zarr", coordinate_system=name) for name in ("global", "aligned"))
    # 50 units of the system along x are 25 px along -y of the turned picture.
    np.testing.assert_allclose(far.xy_um - near.xy_um, np.tile([0, 25 * 2 * PIXEL_UM], (len(XY), 1)), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image": "absent"}, "no image 'absent': it has 'he_image'"),
        ({"cells": "absent"}, "no shapes or labels 'absent'"),
        ({"table": "absent"}, "no table 'absent'"),
        ({"layer": "counts"}, "no layer 'counts'"),
        ({"label_column": "colour"}, "no column 'colour'"),
        ({"coordinate_system": "elsewhere"}, "do not both lie in 'elsewhere'"),
        ({"um_per_unit": 400.0}, "check --um-per-unit"),
    ],
)
def test_names_that_are_not_there(xenium, options, match):
    with pytest.raises(BadInput, match=match):
        open_spatialdata(xenium, **options)


def test_normalised_values_and_bins_without_cells_are_refused(tmp_path):
    elements = xenium_like()
    raw = elements["table"].X.copy()
    elements["table"].X = elements["table"].X * np.float32(0.3)
    elements["table"].layers["counts"] = raw
    write(tmp_path / "x.zarr", **elements)
    with pytest.raises(BadInput, match="no raw counts"):
        open_spatialdata(tmp_path / "x.zarr")
    check(read(tmp_path / "x.zarr", layer="counts"), 2 * PIXEL_UM)
    bins = visium_hd_like()
    bins["square_002um"] = bins.pop("nucleus_segmentations")
    bins["square_002um"].obs["region"] = pd.Categorical(["s1_square_002um"] * len(XY))
    bins["square_002um"].uns["spatialdata_attrs"]["region"] = "s1_square_002um"
    write(tmp_path / "b.zarr", **bins)
    with pytest.raises(BadInput, match="become cells by preparing the Space Ranger folder"):
        open_spatialdata(tmp_path / "b.zarr")


def test_a_damaged_store_is_said(tmp_path):
    (tmp_path / "d.zarr").mkdir()
    (tmp_path / "d.zarr/zarr.json").write_text("{")
    with pytest.raises(BadInput, match="cannot be read as a SpatialData store"):
        prepare(Settings(tmp_path / "d.zarr", None, tmp_path / "a.zarr"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image": "HE.tif"}, "holds the picture: leave out --image"),
        ({"spot_um": 55.0}, "--spot-um is for a folder of ST sections"),
        ({"expand_um": 2.0}, "--expand-um is for a Visium HD run"),
        ({"whole_cells": True}, "--whole-cells is for Visium HD and Xenium"),
    ],
)
def test_options_of_other_kinds_are_refused(xenium, tmp_path, change, match):
    with pytest.raises(BadInput, match=match):
        prepare(Settings(**({"folder": xenium, "image": None, "out": tmp_path / "a.zarr"} | change)))
