"""``python -m ge2hist_core train-reader DATA.zarr --out BUNDLE``: train the nuclei reader and judge it.

Trained on tiles of the training donors; the detection threshold and the type bias are set on the validation donors so
that counts and composition are right on average; the figures in ``reader.json`` come from the test donors.

Loss, per batch: penalty-reduced focal loss of the heat map (Zhou et al. 2019, arXiv:1904.07850, equation 1; Gaussian
targets of 1.5 um) + L1 of the offset (um) + smooth L1 of the logarithm of the area + cross entropy of the type, the
last three at the positions within 2 um of a centre.

Batch ``step`` is a function of (seed, step) alone: a run that was killed and resumed ends with the same weights as one
that was not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from skimage.color import hed_from_rgb, rgb_from_hed
from torch import Tensor

from ge2hist_core import rng
from ge2hist_core.config import READER_CLASSES, UM_PER_PX, VISIBLE_CLASS, to_json
from ge2hist_core.files import atomic_path
from ge2hist_core.niche import composition_kl
from ge2hist_core.nuclei import LearnedReader, ReaderNet, confusion, detection_scores, match_detections, to_input
from ge2hist_core.types import BadInput

if TYPE_CHECKING:
    from ge2hist_core.autoencoder import TileAutoencoder
    from ge2hist_core.store import TissueStore

__all__ = ["ReaderConfig", "Step", "Tiles", "calibrate", "judge", "load_tiles", "reconstructed", "train"]

CHECKPOINT = "reader-training.pt"
STEP_UM = 2 * UM_PER_PX
"""Distance between positions of the network's output."""
BLANK = 0.03
"""Share of training pictures that are bare glass: group normalisation would make nuclei of its noise."""


@dataclass(frozen=True)
class ReaderConfig:
    """How the reader is trained; the learning rate rises linearly, then falls to zero along a cosine."""

    steps: int = 1500
    batch_size: int = 16
    crop_px: int = 96
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 1e-3
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise BadInput(f"steps is {self.steps} and batch_size {self.batch_size}: both must be at least 1.")
        if self.crop_px % 8 or self.crop_px < 8:
            raise BadInput(f"crop_px is {self.crop_px}: choose a multiple of 8.")


@dataclass(frozen=True, eq=False)
class Tiles:
    """Pictures ``[tile, H, W, 3]`` uint8 and the nuclei table of each, types among ``classes``."""

    images: np.ndarray
    nuclei: list[pd.DataFrame]
    classes: tuple[str, ...] = READER_CLASSES

    def __len__(self) -> int:
        return len(self.images)


class Batch(NamedTuple):
    """``x [n, 3, H, W]`` in [-1, 1] and the targets on the output grid ``[n, h, w]``.

    ``heat``: 1 at centres, Gaussian around. ``near``: bool, within 2 um of a centre; there ``offset [n, 2, h, w]``
    (um), ``log_area`` and ``label`` are those of the nearest nucleus.
    """

    x: Tensor
    heat: Tensor
    near: Tensor
    offset: Tensor
    log_area: Tensor
    label: Tensor


class Step(NamedTuple):
    """State after one optimiser step; ``step`` counts the finished ones."""

    step: int
    losses: dict[str, float]


# --- Batches ----------------------------------------------------------------------------------------------------


def turned(image: np.ndarray, xy_um: np.ndarray, quarter_turns: int, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """A square picture and the positions in it, turned by 90 degrees anticlockwise so many times, then mirrored."""
    side = image.shape[0] * UM_PER_PX
    x, y = xy_um[:, 0], xy_um[:, 1]
    for _ in range(quarter_turns % 4):
        x, y = y, side - x
    image = np.rot90(image, quarter_turns)
    return (image[:, ::-1], np.stack([side - x, y], 1)) if flip else (image, np.stack([x, y], 1))


def targets(xy_um: np.ndarray, log_area: np.ndarray, label: np.ndarray, side: int) -> tuple[np.ndarray, ...]:
    """Targets of one picture of ``side x side`` output positions, in the order of :class:`Batch` after ``x``."""
    centre = (np.arange(side) + 0.5) * STEP_UM
    grid = np.stack(np.meshgrid(centre, centre), axis=-1)
    inside = ((xy_um >= 0) & (xy_um < side * STEP_UM)).all(axis=1)
    xy_um, log_area, label = xy_um[inside], log_area[inside], label[inside]
    if not len(xy_um):
        zero = np.zeros((side, side), dtype=np.float32)
        return zero, zero.astype(bool), np.stack([zero, zero]), zero, zero.astype(np.int64)
    offset = xy_um - grid[:, :, None]
    distance2 = (offset**2).sum(axis=-1)
    nearest = distance2.argmin(axis=-1)
    least = np.take_along_axis(distance2, nearest[..., None], -1)[..., 0]
    heat = np.exp(-least / (2 * 1.5**2))
    column, row = (xy_um / STEP_UM).astype(int).T
    heat[row, column] = 1.0
    nearest_offset = np.take_along_axis(offset, nearest[..., None, None], 2)[:, :, 0]
    return (
        heat.astype(np.float32),
        least <= 2.0**2,
        np.moveaxis(nearest_offset, -1, 0).astype(np.float32),
        log_area[nearest].astype(np.float32),
        label[nearest].astype(np.int64),
    )


def stained(x: Tensor, draw: np.random.Generator) -> Tensor:
    """Other stain, sharpness and noise for each picture ``[n, 3, H, W]`` in [-1, 1]; the tissue stays the same.

    In optical density, unmixed with Ruifrok & Johnston's vectors, each stain is multiplied by 0.7-1.4 and shifted by up
    to 0.02 (of skimage's scale); every second picture is blurred with a Gaussian of up to 1.2 px; white noise of up to
    5 % of the range is added. Generated pictures differ from real ones mostly in the last two.
    """
    n = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(draw.uniform(low, high, (n, *shape)).astype(np.float32))

    unmix, mix = (torch.from_numpy(m.astype(np.float32)) for m in (hed_from_rgb, rgb_from_hed))
    density = -torch.log(((x + 1) / 2).clamp(min=1 / 255))
    stain = torch.einsum("nchw,cs->nshw", density, unmix)
    stain = stain * torch.exp(uniform(math.log(0.7), math.log(1.4), 3, 1, 1)) + uniform(-0.02, 0.02, 3, 1, 1)
    x = torch.exp(-torch.einsum("nshw,sc->nchw", stain, mix)).clamp(0, 1) * 2 - 1
    sigma = uniform(-1.2, 1.2, 1).clamp(min=1e-3)
    kernel = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, dim=0)
    flat = F.pad(x.reshape(1, 3 * n, *x.shape[2:]), (3, 3, 3, 3), mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=3 * n)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=3 * n)
    noise = torch.from_numpy(draw.standard_normal(x.shape, dtype=np.float32))
    return (flat.reshape(x.shape) + uniform(0, 0.1, 1, 1, 1) * noise).clamp(-1, 1)


def batch(tiles: Tiles, step: int, config: ReaderConfig) -> Batch:
    """Random crops of random tiles, or blanks, turned, mirrored, re-stained; a function of (tiles, seed, step)."""
    draw = rng.stream(config.seed, "reader-batch", step)
    crop = min(config.crop_px, *tiles.images.shape[1:3])
    codes = pd.Index(tiles.classes)
    pictures, rest = [], []
    for i in draw.integers(len(tiles), size=config.batch_size):
        table = tiles.nuclei[i]
        image = tiles.images[i]
        if draw.random() < BLANK:
            image, table = np.broadcast_to(np.uint8(np.quantile(image, 0.95, axis=(0, 1))), image.shape), table[:0]
        image, xy = turned(image, table[["x_um", "y_um"]].to_numpy(), int(draw.integers(4)), draw.random() < 0.5)
        row, column = (draw.integers((side - crop) // 2 + 1) * 2 for side in image.shape[:2])
        pictures.append(image[row : row + crop, column : column + crop])
        xy = xy - np.array([column, row]) * UM_PER_PX
        log_area = np.log(table["area_um2"].to_numpy().clip(min=1.0))
        rest.append(targets(xy, log_area, codes.get_indexer(table["cell_type"]), crop // 2))
    x = stained(to_input(torch.from_numpy(np.stack(pictures))), draw)
    return Batch(
        x.contiguous(memory_format=torch.channels_last),
        *(torch.from_numpy(np.stack(part)) for part in zip(*rest, strict=True)),
    )


# --- Training ---------------------------------------------------------------------------------------------------


def losses(out: Tensor, b: Batch) -> dict[str, Tensor]:
    """The terms of the loss by name, each already weighted; their sum is minimised."""
    probability = torch.sigmoid(out[:, 0]).clamp(1e-4, 1 - 1e-4)
    centre = b.heat == 1
    focal = torch.where(
        centre,
        (1 - probability) ** 2 * torch.log(probability),
        (1 - b.heat) ** 4 * probability**2 * torch.log(1 - probability),
    )
    n_near = b.near.sum().clamp(min=1)
    area = F.smooth_l1_loss(out[:, 3], b.log_area, reduction="none")
    offset = (out[:, 1:3] - b.offset).abs().sum(1)
    label = F.cross_entropy(out[:, 4:], b.label, reduction="none")
    return {
        "heat": -focal.sum() / centre.sum().clamp(min=1),
        "offset": 0.5 * (offset * b.near).sum() / n_near,
        "area": 0.5 * (area * b.near).sum() / n_near,
        "type": 0.5 * (label * b.near).sum() / n_near,
    }


def new_net(n_classes: int, seed: int) -> ReaderNet:
    """Network whose first weights depend on the seed alone: He initialisation from a named stream."""
    with torch.random.fork_rng(devices=[]):
        net = ReaderNet(n_classes)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if value.ndim == 4:
                scale = math.sqrt(2.0 / value[0].numel()) * (0.1 if name.startswith("head") else 1.0)
                value.copy_(scale * rng.normal(seed, "reader-weights", tuple(value.shape), name))
            elif name.endswith("bias") and name != "head.bias":
                value.zero_()
    return net


def train(net: ReaderNet, tiles: Tiles, config: ReaderConfig, checkpoint: Path | None = None) -> Iterator[Step]:
    """Train ``net`` in place, one yield per step; the caller logs or stops.

    Parameters
    ----------
    checkpoint: state is written here every ``checkpoint_every`` steps and at the end, and read from here at the start
        if the file exists.

    Raises
    ------
    BadInput: the checkpoint belongs to a run with other settings or other tiles, or cannot be read.
    """
    optimiser = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    pictures = hashlib.blake2b(np.ascontiguousarray(tiles.images).data, digest_size=16).hexdigest()
    origin = json.dumps([to_json(config), list(tiles.classes), pictures])
    first = 0
    if checkpoint is not None and checkpoint.exists():
        try:
            state = torch.load(checkpoint, weights_only=True)
            if state["origin"] != origin:
                raise BadInput(f"{checkpoint} belongs to a run with other settings: repeat those or train anew.")
            net.load_state_dict(state["net"])
            optimiser.load_state_dict(state["optimiser"])
            first = state["step"]
        except (OSError, RuntimeError, KeyError, EOFError) as error:
            raise BadInput(f"{checkpoint} cannot be read ({type(error).__name__}): train anew.") from error

    for step in range(first, config.steps):
        net.train()
        progress = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        rate = config.learning_rate * min(1, (step + 1) / config.warmup_steps) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimiser.param_groups:
            group["lr"] = rate
        b = batch(tiles, step, config)
        terms = losses(net(b.x), b)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        done = step + 1
        if checkpoint is not None and (done % config.checkpoint_every == 0 or done == config.steps):
            with atomic_path(checkpoint) as temporary:
                torch.save(
                    {"origin": origin, "step": done, "net": net.state_dict(), "optimiser": optimiser.state_dict()},
                    temporary,
                )
        yield Step(done, {name: float(value.detach()) for name, value in terms.items()})
    net.eval()


# --- Calibration and judgement ----------------------------------------------------------------------------------


def calibrate(reader: LearnedReader, tiles: Tiles) -> None:
    """Set ``threshold`` and ``class_bias`` so that number and composition of found nuclei equal the true ones.

    The threshold is the heat that as many peaks reach as there are nuclei. The bias of a type is moved by half the
    logarithm of its true over its found share until both agree; at most by 2 nats, so that a type with hardly any
    nuclei cannot be conjured up.
    """
    peaks = [reader.peaks(image) for image in tiles.images]
    heat = np.concatenate([p[3] for p in peaks])
    logits = np.concatenate([p[2] for p in peaks])
    types = pd.concat([table["cell_type"] for table in tiles.nuclei])
    n_true = len(types)
    if not n_true or not len(heat):
        raise BadInput("The validation tiles hold no nuclei, or none was found: give more donors or train longer.")
    ordered = np.sort(heat)[::-1]
    reader.threshold = float(np.clip(ordered[min(n_true, len(ordered)) - 1], 0.05, 0.95))
    logits = logits[heat >= reader.threshold]
    true_share = (pd.Series(types).value_counts().reindex(tiles.classes, fill_value=0).to_numpy() + 0.5) / n_true
    bias = np.zeros(len(tiles.classes))
    for _ in range(50):
        share = (np.bincount((logits + bias).argmax(axis=1), minlength=len(bias)) + 0.5) / len(logits)
        bias = np.clip(bias + 0.5 * np.log(true_share / share), -2.0, 2.0)
    reader.class_bias = tuple(bias.tolist())


def judge(reader: LearnedReader, tiles: Tiles) -> dict[str, Any]:
    """Figures of a reader on tiles with known nuclei, as JSON.

    Returns
    -------
    ``precision``, ``recall``, ``f1`` and ``count_bias`` (found / true - 1) over all nuclei matched within 6 um;
    ``f1_3um``; ``centre_error_um`` and ``area_bias`` (mean found / mean true - 1) of the matched; ``type_accuracy`` of
    the matched; ``composition_kl_nats`` of found from true; ``count_sd`` of found - true per tile; ``confusion``: true
    type -> found type -> matched nuclei; ``true_counts`` and ``found_counts``: type -> all nuclei, matched or not;
    ``n_tiles``, ``n_nuclei``.
    """
    table = pd.DataFrame(0, index=pd.Index(tiles.classes), columns=pd.Index(tiles.classes))
    distances, areas, difference = [], [], []
    n_near = 0
    found_types, true_types = [], []
    for image, true in zip(tiles.images, tiles.nuclei, strict=True):
        (found,) = reader.read(image[None])
        pairs = match_detections(found, true)
        table += confusion(found, true, pairs, tiles.classes)
        distances.append(pairs.distance_um)
        n_near += len(match_detections(found, true, max_um=3.0).found)
        areas.append([found["area_um2"].iloc[pairs.found].sum(), true["area_um2"].iloc[pairs.true].sum()])
        difference.append(len(found) - len(true))
        found_types.append(found["cell_type"])
        true_types.append(true["cell_type"])
    found_count, true_count = (
        pd.concat(types).value_counts().reindex(tiles.classes, fill_value=0).to_numpy()
        for types in (found_types, true_types)
    )
    n_matched = int(table.to_numpy().sum())
    if not n_matched:
        raise BadInput("No nucleus of the test tiles was found: train longer.")
    n_found, n_true = int(found_count.sum()), int(true_count.sum())
    found_area, true_area = np.sum(areas, axis=0)
    return {
        **detection_scores(n_matched, n_found, n_true),
        "f1_3um": detection_scores(n_near, n_found, n_true)["f1"],
        "centre_error_um": float(np.concatenate(distances).mean()),
        "area_bias": float(found_area / true_area - 1),
        "type_accuracy": float(np.trace(table.to_numpy()) / n_matched),
        "composition_kl_nats": composition_kl(true_count, found_count),
        "count_sd": float(np.std(difference)),
        "confusion": table.to_dict("index"),
        "true_counts": dict(zip(tiles.classes, true_count.tolist(), strict=True)),
        "found_counts": dict(zip(tiles.classes, found_count.tolist(), strict=True)),
        "n_tiles": len(tiles),
        "n_nuclei": n_true,
    }


# --- Command ----------------------------------------------------------------------------------------------------


def load_tiles(store: TissueStore, donors: Sequence[str], n: int, seed: int) -> Tiles:
    """At most ``n`` tiles around cells of these donors, drawn from the stream ``(seed, "reader-tiles", donors)``.

    Raises
    ------
    BadInput: another resolution than the network's, or no cell with a whole tile.
    """
    if not math.isclose(store.um_per_px, UM_PER_PX):
        raise BadInput(f"{store.path} has {store.um_per_px} um per px: the reader is trained at {UM_PER_PX}.")
    rows = store.rows(donors)
    if not len(rows):
        raise BadInput(f"No cell of the donors {', '.join(donors) or '(none)'} has a whole tile: simulate more.")
    draw = rng.stream(seed, "reader-tiles", *donors)
    rows = np.sort(draw.choice(rows, size=min(n, len(rows)), replace=False))
    classes = tuple(dict.fromkeys(VISIBLE_CLASS.get(name, name) for name in store.cell_types))
    return Tiles(store.tiles(rows), [store.nuclei(row) for row in rows], classes)


def reconstructed(tiles: Tiles, autoencoder: TileAutoencoder, every: int = 1) -> Tiles:
    """The same tiles with every so-manyth picture as the autoencoder gives it back: sharpness of generated pictures."""
    images = tiles.images.copy()
    for start in range(0, len(images), 32 * every):
        part = slice(start, start + 32 * every, every)
        images[part] = autoencoder.decode(autoencoder.encode(images[part]))
    return replace(tiles, images=images)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA.zarr", help="store written by `simulate`")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder that gets reader.safetensors")
    parser.add_argument("--steps", type=int, default=ReaderConfig.steps)
    parser.add_argument("--batch-size", type=int, default=ReaderConfig.batch_size)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiles", type=int, default=4000, help="training tiles kept in memory (50 kB each)")
    parser.add_argument(
        "--autoencoder",
        type=Path,
        metavar="BUNDLE",
        help="also train and judge on tiles that its autoencoder gives back",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in BUNDLE, if there is one")


def main(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ge2hist_core.model import GATE_FILES
    from ge2hist_core.store import TissueStore

    config = ReaderConfig(steps=args.steps, batch_size=args.batch_size, seed=args.seed)
    if args.tiles < 1:
        raise BadInput(f"--tiles is {args.tiles}: give at least 1.")
    store = TissueStore(args.data)
    split = store.split()
    if not all(split.values()):
        raise BadInput(f"{args.data} has {len(store.donors)} donors: at least 3 are needed to train, tune and judge.")
    tiles = load_tiles(store, split["train"], args.tiles, args.seed)
    autoencoder = None
    if args.autoencoder:
        from ge2hist_core.model import GE2Hist

        autoencoder = GE2Hist.load(args.autoencoder).autoencoder
        tiles = reconstructed(tiles, autoencoder, every=2)
    checkpoint = args.out / CHECKPOINT
    if not args.resume:
        checkpoint.unlink(missing_ok=True)
    net = new_net(len(tiles.classes), config.seed)
    with tqdm(total=config.steps, unit="step", desc="reader") as bar:
        for state in train(net, tiles, config, checkpoint):
            bar.update(state.step - bar.n)
            bar.set_postfix({name: f"{value:.3f}" for name, value in state.losses.items()}, refresh=False)
    reader = LearnedReader(net, tiles.classes)
    calibrate(reader, load_tiles(store, split["validation"], 500, args.seed))
    test = load_tiles(store, split["test"], 500, args.seed)
    reader.figures = judge(reader, test)
    if autoencoder is not None:
        reader.figures["reconstructed"] = judge(reader, reconstructed(test, autoencoder))
    reader.figures |= {"donors": split["test"], "data": store.path.name, "train": to_json(config)}
    reader.figures["learned_from"] = store.provenance
    for name in GATE_FILES:  # those of an earlier reader do not open any more
        (args.out / name).unlink(missing_ok=True)
    reader.save(args.out)
    checkpoint.unlink(missing_ok=True)
    print(json.dumps({name: value for name, value in reader.figures.items() if not isinstance(value, dict)}, indent=1))
    print(pd.DataFrame.from_dict(reader.figures["confusion"], orient="index").to_string())
