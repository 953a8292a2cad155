"""Pictures -> feature vectors and perceptual distances, for :mod:`ge2hist_core.metrics`.

Always available: :class:`ReaderFeatures`, the activations of a bundle's nuclei reader, and :func:`texture_features`,
statistics of stain and texture. Comparable with papers, from weight files that the user provides:

- :class:`InceptionFeatures`: ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity, release v0.2.0;
- :class:`LPIPS`: ``alexnet-owt-7be5be79.pth`` (or ``-4df8aa71``) of torchvision's model page, and
  ``lpips/weights/v0.1/alex.pth`` out of the ``lpips`` package.

Nothing is downloaded and no code in a file is run. Pictures pass one by one: a vector does not depend on what else is
in the batch. A network knows neither the generative model nor where a picture comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ge2hist_core.config import UM_PER_PX
from ge2hist_core.nuclei import LearnedReader, to_input
from ge2hist_core.types import BadInput

__all__ = [
    "Features",
    "InceptionFeatures",
    "LPIPS",
    "ReaderFeatures",
    "Standardised",
    "TEXTURE_NAMES",
    "TextureFeatures",
    "resize_like_tensorflow",
    "texture_features",
]


class Features(Protocol):
    """Anything that turns pictures into vectors; ``name`` becomes part of the figure's name."""

    name: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 ``[n, H, W, 3]`` -> float64 ``[n, d]``."""
        ...


def _check(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < 16:
        raise BadInput(
            f"images is {images.dtype} {images.shape}: give uint8 RGB [n, height, width, 3] of at least 16 x 16 px."
        )
    return images


LIMIT = 6.0


class Standardised:
    """Features centred and scaled by the mean and standard deviation of the real tiles.

    KID's kernel is not invariant to scale, and channels of a network or moments of a stain have scales of their own.
    The same real tiles must be the reference of every figure that is compared. Beyond ``LIMIT`` standard deviations a
    picture is foreign in that feature, and how far does not matter: the kernel's cube would let it decide alone.

    Parameters
    ----------
    features: the raw ones; they give the name. real: uint8 ``[n, H, W, 3]`` reference tiles, at least two.
    """

    def __init__(self, features: Features, real: np.ndarray) -> None:
        if len(real) < 2:
            raise BadInput(f"{len(real)} real tiles cannot set the scale of the features: give at least two.")
        self.features, self.name = features, features.name
        values = features(real)
        self.mean = values.mean(axis=0)
        std = values.std(axis=0)
        # A feature that never varies carries nothing between real tiles; it stays at its own scale.
        self.std = np.where(std > 1e-9, std, 1.0)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.clip((self.features(images) - self.mean) / self.std, -LIMIT, LIMIT)


# --- the bundle's reader -----------------------------------------------------------------------------------------

_READER_LEVELS = ("stem", "down1", "down2", "merge1", "merge0")


class ReaderFeatures:
    """Mean activations of every level of a nuclei reader, encoder and decoder: ``[n, 304]`` for the default sizes.

    Parameters
    ----------
    reader: a bundle's. um_per_px: scale of the pictures.
    """

    name = "reader"

    def __init__(self, reader: LearnedReader, um_per_px: float = UM_PER_PX) -> None:
        self.net, self.um_per_px = reader.net.eval(), um_per_px

    def __call__(self, images: np.ndarray) -> np.ndarray:
        vectors = [[level.mean((2, 3))[0] for level in self._levels(image)] for image in _check(images)]
        return np.stack([torch.cat(parts).double().numpy() for parts in vectors])

    def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Perceptual distance of picture i of both sets, ``[n]``: LPIPS's form on the reader, without learned weights.

        Activations of each level are scaled to unit length at every position; the mean squared difference is summed
        over levels and channels.
        """
        a, b = _pairs(a, b)
        out = []
        for one, other in zip(a, b, strict=True):
            levels = zip(self._levels(one), self._levels(other), strict=True)
            out.append(sum(float((_unit(x) - _unit(y)).square().sum(1).mean()) for x, y in levels))
        return np.array(out)

    @torch.inference_mode()
    def _levels(self, image: np.ndarray) -> list[Tensor]:
        x = to_input(torch.from_numpy(np.ascontiguousarray(image[None])))
        size = [max(8, round(side * self.um_per_px / UM_PER_PX)) for side in image.shape[:2]]
        if size != list(image.shape[:2]):
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        x = F.pad(x, (0, -size[1] % 8, 0, -size[0] % 8), mode="replicate")
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda _module, _inputs, output: kept.__setitem__(name, output)

        with ExitStack() as hooks:
            for name in _READER_LEVELS:
                hooks.enter_context(_Hook(getattr(self.net, name).register_forward_hook(keep(name))))
            self.net(x)
        return [kept[name] for name in _READER_LEVELS]


class _Hook:
    """A forward hook that is removed when its block ends."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _unit(x: Tensor) -> Tensor:
    """``[n, channel, h, w]`` with unit length over channels at every position."""
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _pairs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = _check(a), _check(b)
    if a.shape != b.shape:
        raise BadInput(f"The sets have shapes {a.shape} and {b.shape}: give as many pictures of one size in both.")
    return a, b


# --- stain and texture --------------------------------------------------------------------------------------------

_STAINS = ("haematoxylin", "eosin", "residual")
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_SIGMAS_PX = (1.0, 2.0, 4.0)
_LBP = (1, 2, 4)
_GLCM_PX = (1, 4)
_GLCM_LEVELS = 16
_GLCM_PROPERTIES = ("contrast", "homogeneity", "correlation")
# Range of unmixed density in H&E, from background to the darkest nuclei; 16 grey levels for co-occurrence span it.
_DENSITY = (0.0, 0.3)

TEXTURE_NAMES: tuple[str, ...] = (
    *(
        f"{stain} {what}"
        for stain in _STAINS
        for what in (
            "mean", "sd", "skewness",
            *(f"quantile {q:g}" for q in _QUANTILES),
            *(f"{w} at {sigma:g} px" for sigma in _SIGMAS_PX for w in ("gradient mean", "gradient sd", "band sd")),
        )
    ),
    *(f"pattern {code} at {radius} px" for radius in _LBP for code in range(10)),
    *(f"co-occurrence {name} at {px} px" for px in _GLCM_PX for name in _GLCM_PROPERTIES),
)  # fmt: skip
"""What each of the numbers of :func:`texture_features` is."""


def texture_features(image: np.ndarray) -> np.ndarray:
    """Stain and texture of one uint8 RGB picture ``[H, W, 3]``, float64 ``[len(TEXTURE_NAMES)]``.

    Stains are unmixed with the vectors of Ruifrok and Johnston 2001 (skimage's ``rgb2hed``). Per stain: moments and
    quantiles of its density, and at three scales the Gaussian gradient's mean and spread and the energy of the band
    that the next scale takes away. Of haematoxylin also: uniform local binary patterns (Ojala et al. 2002,
    doi:10.1109/TPAMI.2002.1017623) of eight neighbours at three radii, and co-occurrence of 16 grey levels (Haralick et
    al. 1973, doi:10.1109/TSMC.1973.4309314) averaged over four directions. Lengths are in px: compare pictures of one
    resolution only. Quarter turns and reflections change the numbers by rounding alone.
    """
    from scipy import ndimage
    from scipy.stats import skew
    from skimage.color import rgb2hed

    hed = rgb2hed(_check(image[None])[0])
    out: list[float] = []
    for channel in np.moveaxis(hed, 2, 0):
        spread = float(channel.std())
        asymmetry = float(skew(channel, axis=None)) if spread > 1e-6 else 0.0
        out += [float(channel.mean()), spread, asymmetry, *np.quantile(channel, _QUANTILES).tolist()]
        finer = channel
        for sigma in _SIGMAS_PX:
            gradient = ndimage.gaussian_gradient_magnitude(channel, sigma)
            coarser = ndimage.gaussian_filter(channel, sigma)
            out += [float(gradient.mean()), float(gradient.std()), float((finer - coarser).std())]
            finer = coarser
    return np.array(out + _patterns(hed[..., 0]) + _co_occurrence(hed[..., 0]))


def _grey(density: np.ndarray, levels: int) -> np.ndarray:
    low, high = _DENSITY
    return np.clip((density - low) / (high - low) * levels, 0, levels - 1).astype(np.uint8)


def _patterns(density: np.ndarray) -> list[float]:
    from skimage.feature import local_binary_pattern

    grey, out = _grey(density, 256), []
    for radius in _LBP:
        codes = local_binary_pattern(grey, 8, radius, method="uniform").astype(np.int64)
        inner = codes[radius:-radius, radius:-radius]
        out += (np.bincount(inner.ravel(), minlength=10) / inner.size).tolist()
    return out


def _co_occurrence(density: np.ndarray) -> list[float]:
    from skimage.feature import graycomatrix, graycoprops

    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    grey = _grey(density, _GLCM_LEVELS)
    matrix = graycomatrix(grey, _GLCM_PX, angles, levels=_GLCM_LEVELS, symmetric=True, normed=True)
    values = {name: graycoprops(matrix, name).mean(axis=1) for name in _GLCM_PROPERTIES}
    return [float(values[name][i]) for i in range(len(_GLCM_PX)) for name in _GLCM_PROPERTIES]


class TextureFeatures:
    """:func:`texture_features` of every picture."""

    name = "stain-texture"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.stack([texture_features(image) for image in _check(images)])


# --- networks of the literature, from files of the user -------------------------------------------------------------


def _tensors(path: str | Path, what: str) -> dict[str, Tensor]:
    """Plain tensors of a PyTorch weight file; nothing in it is executed."""
    import pickle

    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path} is not a file: give the weight file of {what}.")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise BadInput(f"{path} cannot be read as weights ({str(error).splitlines()[0]}): get {what} again.") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise BadInput(f"{path} holds no table of tensors: give the weight file of {what}.")
    return weights


def _strict(net: nn.Module, weights: dict[str, Tensor], path: str | Path, what: str) -> None:
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise BadInput(f"{path} does not hold the weights of {what} ({reason[:200]}): give the right file.") from error


class _Conv(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


_Kernel = int | tuple[int, int]
_Step = tuple[str, int, _Kernel]
_WIDE, _HIGH = (1, 7), (7, 1)


class _Mixed(nn.Module):
    """Branches side by side, joined along channels.

    Parameters
    ----------
    branches: each a chain of (name, channels, kernel); names ending in ``a`` and ``b`` at a chain's end fork it.
    pool: "average" (padding left out of the mean), "max", or "none" of the 1 x 1 branch ``branch_pool``, whose channels
        are ``pooled``; with ``pooled`` 0 the block halves the grid: last steps and the pooling have stride 2.
    """

    def __init__(self, inputs: int, branches: Sequence[Sequence[_Step]], pool: str, pooled: int) -> None:
        super().__init__()
        self.pool, self.halves, self.chains = pool, pooled == 0, [[name for name, _, _ in b] for b in branches]
        self.channels = pooled or inputs
        for branch in branches:
            channels = inputs
            for i, (name, outputs, kernel) in enumerate(branch):
                last = self.halves and i == len(branch) - 1
                self.add_module(name, _Conv(channels, outputs, kernel, 2 if last else 1, pad=not last))
                forked = name[-1] in "ab"
                channels = channels if forked else outputs
                if forked or i == len(branch) - 1:
                    self.channels += outputs
        if pooled:
            self.branch_pool = _Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for chain in self.chains:
            y, ends = x, []
            for name in chain:
                step = self.get_submodule(name)
                if name[-1] in "ab":
                    ends.append(step(y))
                else:
                    y = step(y)
            out += ends or [y]
        if self.halves:
            return torch.cat([*out, F.max_pool2d(x, 3, 2)], dim=1)
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*out, self.branch_pool(pooled)], dim=1)


def _block_a(pooled: int) -> tuple[list[list[_Step]], str, int]:
    return (
        [
            [("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ],
        "average",
        pooled,
    )


def _block_c(c: int) -> tuple[list[list[_Step]], str, int]:
    double = [(f"branch7x7dbl_{i + 2}", c if i < 3 else 192, _HIGH if i % 2 == 0 else _WIDE) for i in range(4)]
    return (
        [
            [("branch1x1", 192, 1)],
            [("branch7x7_1", c, 1), ("branch7x7_2", c, _WIDE), ("branch7x7_3", 192, _HIGH)],
            [("branch7x7dbl_1", c, 1), *double],
        ],
        "average",
        192,
    )


def _block_e(pool: str) -> tuple[list[list[_Step]], str, int]:
    return (
        [
            [("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), ("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))],
            [
                ("branch3x3dbl_1", 448, 1),
                ("branch3x3dbl_2", 384, 3),
                ("branch3x3dbl_3a", 384, (1, 3)),
                ("branch3x3dbl_3b", 384, (3, 1)),
            ],
        ],
        pool,
        192,
    )


_BLOCK_B: tuple[list[list[_Step]], str, int] = (
    [
        [("branch3x3", 384, 3)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    ],
    "max",
    0,
)
_BLOCK_D: tuple[list[list[_Step]], str, int] = (
    [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)],
        [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, _WIDE), ("branch7x7x3_3", 192, _HIGH),
         ("branch7x7x3_4", 192, 3)],
    ],
    "max",
    0,
)  # fmt: skip
_MIXED = {
    "Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64), "Mixed_6a": _BLOCK_B,
    "Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160), "Mixed_6e": _block_c(192),
    "Mixed_7a": _BLOCK_D, "Mixed_7b": _block_e("average"), "Mixed_7c": _block_e("max"),
}  # fmt: skip
INCEPTION_PX = 299


class InceptionV3(nn.Module):
    """The network behind FID and KID: Szegedy et al. 2016 (arXiv 1512.00567) as TensorFlow published it in 2015.

    It differs from later versions: padding is left out of average pooling, the last block pools by maximum and the
    classifier, which is loaded but not used, has 1008 classes. Parameter names are torch-fidelity's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, pad=False)
        channels = 192
        for name, spec in _MIXED.items():
            block = _Mixed(channels, *spec)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(channels, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 3, 299, 299]`` in [-1, 1) -> ``[n, 2048]``."""
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name in _MIXED:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def resize_like_tensorflow(x: Tensor, side: int) -> Tensor:
    """Bilinear ``[n, c, H, W]`` -> ``[n, c, side, side]`` as TensorFlow 1 did it: pixel i is read at ``i H / side``.

    There is no half-pixel shift; beyond the last pixel the last one is repeated. FID's features depend on it.
    """
    for dim in (2, 3):
        size = x.shape[dim]
        at = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
        low = at.long()
        high = (low + 1).clamp_max(size - 1)
        shape = [side if d == dim else 1 for d in range(4)]
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), (at - low).view(shape))
    return x


class InceptionFeatures:
    """2048 features of Inception-v3, the standard of KID and FID.

    Parameters
    ----------
    weights: ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity (or the file of another conversion with its
        parameter names).

    Raises
    ------
    BadInput: no such file, or not these weights.

    Notes
    -----
    The pictures are enlarged to 299 px first, as every implementation does; tiles of 128 px are blurred by it, real and
    generated ones alike.
    """

    name = "Inception-v3"

    def __init__(self, weights: str | Path) -> None:
        with torch.random.fork_rng(devices=[]):
            self.net = InceptionV3()
        _strict(self.net, _tensors(weights, "Inception-v3"), weights, "Inception-v3")
        self.net.eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        out = []
        for image in _check(images):
            x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
            x = (resize_like_tensorflow(x, INCEPTION_PX) - 128.0) / 128.0
            out.append(self.net(x)[0].double().numpy())
        return np.stack(out)


_ALEX = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
_ALEX_INDEX = (0, 3, 6, 8, 10)
"""Position of the five convolutions in torchvision's ``features``."""


class LPIPS:
    """Learned perceptual distance, version 0.1 on AlexNet (Zhang et al. 2018, arXiv 1801.03924).

    Activations after each of five ReLUs are scaled to unit length over channels, their squared difference is weighed by
    a learned, non-negative number per channel, averaged over positions and summed over layers. 0 for equal pictures.

    Parameters
    ----------
    backbone: AlexNet's weight file (``alexnet-owt-*.pth``). linear: ``lpips/weights/v0.1/alex.pth``.

    Raises
    ------
    BadInput: a file is missing or holds something else.
    """

    name = "LPIPS (AlexNet v0.1)"

    def __init__(self, backbone: str | Path, linear: str | Path) -> None:
        with torch.random.fork_rng(devices=[]):
            self.convolutions = nn.ModuleList(nn.Conv2d(a, b, k, s, p) for a, b, k, s, p in _ALEX)
        weights = _tensors(backbone, "AlexNet")
        place = {f"features.{index}": i for i, index in enumerate(_ALEX_INDEX)}
        known = {
            f"{place[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value
            for key, value in weights.items()
            if key.rpartition(".")[0] in place
        }
        _strict(self.convolutions, known, backbone, "AlexNet")
        self.convolutions.requires_grad_(False)
        lines, learned = _tensors(linear, "LPIPS"), []
        for i, (_, channels, *_rest) in enumerate(_ALEX):
            weight = lines.get(f"lin{i}.model.1.weight")
            if weight is None or weight.shape != (1, channels, 1, 1):
                raise BadInput(f"{linear} lacks lin{i}.model.1.weight of {channels} channels: give v0.1 alex.pth.")
            if weight.min() < 0:
                raise BadInput(f"{linear} has negative weights in lin{i}, as LPIPS never has: give v0.1 alex.pth.")
            learned.append(weight.float())
        self.linear = learned
        # Mean and scale of ImageNet, for pictures in [-1, 1].
        self.shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
        self.scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]

    def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """LPIPS of picture i of ``a`` and picture i of ``b``, uint8 ``[n, H, W, 3]`` of one size -> float64 ``[n]``."""
        a, b = _pairs(a, b)
        out = []
        for one, other in zip(a, b, strict=True):
            layers = zip(self._layers(one), self._layers(other), self.linear, strict=True)
            out.append(sum(float((w * (_unit(x) - _unit(y)).square()).sum(1).mean()) for x, y, w in layers))
        return np.array(out)

    @torch.inference_mode()
    def _layers(self, image: np.ndarray) -> list[Tensor]:
        x = (to_input(torch.from_numpy(np.ascontiguousarray(image[None]))) - self.shift) / self.scale
        out = []
        for i, convolution in enumerate(self.convolutions):
            if i in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(convolution(x))
            out.append(x)
        return out
