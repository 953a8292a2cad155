"""Features of pictures: the reader's and the texture's by hand, the literature's networks by structure and oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ge2hist_core.image_features import (
    LPIPS,
    TEXTURE_NAMES,
    InceptionFeatures,
    InceptionV3,
    ReaderFeatures,
    Standardised,
    TextureFeatures,
    resize_like_tensorflow,
    texture_features,
)
from ge2hist_core.nuclei import LearnedReader, ReaderNet, to_input
from ge2hist_core.types import BadInput


def pictures(n: int, side: int = 64, seed: int = 0) -> np.ndarray:
    """Pink grounds with dark blue discs."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    out = np.empty((n, side, side, 3))
    for image in out:
        image[:] = draw.normal([230, 170, 200], 6, (side, side, 3))
        for cy, cx, r in draw.uniform([0, 0, 3], [side, side, 6], (12, 3)):
            image[(y - cy) ** 2 + (x - cx) ** 2 < r**2] = draw.normal([90, 60, 140], 8)
    return out.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def reader() -> LearnedReader:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LearnedReader(ReaderNet(8, (8, 16, 24)))


# --- reader ---------------------------------------------------------------------------------------------------------


def test_reader_features_are_the_mean_activations_of_its_levels(reader):
    image = pictures(1)
    net = reader.net
    with torch.inference_mode():
        fine = net.stem(to_input(torch.from_numpy(image)))
        middle = net.down1(fine)
        coarse = net.down2(middle)
        middle_up = net.merge1(middle + F.interpolate(net.up1(coarse), scale_factor=2.0))
        fine_up = net.merge0(fine + F.interpolate(net.up0(middle_up), scale_factor=2.0))
        expected = torch.cat([x.mean((2, 3))[0] for x in (fine, middle, coarse, middle_up, fine_up)])
    found = ReaderFeatures(reader)(image)
    assert found.shape == (1, 8 + 16 + 24 + 16 + 8)
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=1e-5, atol=1e-6)


def test_features_of_a_picture_do_not_depend_on_its_neighbours(reader):
    images = pictures(4)
    for features in (ReaderFeatures(reader), TextureFeatures()):
        np.testing.assert_array_equal(features(images)[2], features(images[2:3])[0])


def test_reader_features_leave_no_hook_behind_and_take_any_size_and_scale(reader):
    features = ReaderFeatures(reader)
    first = features(pictures(1, 60))
    assert all(not module._forward_hooks for module in reader.net.modules())
    np.testing.assert_array_equal(first, features(pictures(1, 60)))
    image = pictures(1, 32)
    larger = image.repeat(2, axis=1).repeat(2, axis=2)
    at_half_the_scale = ReaderFeatures(reader, um_per_px=0.25)(larger)
    # Averaging each doubled pixel over its neighbourhood changes edges, not the picture.
    same, other = features(image)[0], features(pictures(1, 32, seed=9))[0]
    assert np.abs(at_half_the_scale[0] - same).mean() < 0.5 * np.abs(other - same).mean()


def test_the_readers_perceptual_distance_is_zero_symmetric_and_grows(reader):
    features, images = ReaderFeatures(reader), pictures(3)
    noise = np.random.default_rng(0).normal(size=images.shape)
    far = [(images + s * noise).clip(0, 255).astype(np.uint8) for s in (10, 40)]
    assert features.distance(images, images).max() < 1e-9
    np.testing.assert_allclose(features.distance(images, far[0]), features.distance(far[0], images), rtol=1e-5)
    assert (features.distance(images, far[0]) < features.distance(images, far[1])).all()


# --- texture --------------------------------------------------------------------------------------------------------


def named(image: np.ndarray) -> dict[str, float]:
    return dict(zip(TEXTURE_NAMES, texture_features(image), strict=True))


def test_texture_has_one_finite_number_per_name_even_for_a_flat_picture():
    assert len(TEXTURE_NAMES) == len(set(TEXTURE_NAMES))
    for image in (pictures(1)[0], np.full((32, 48, 3), 255, np.uint8), np.zeros((32, 32, 3), np.uint8)):
        values = texture_features(image)
        assert values.shape == (len(TEXTURE_NAMES),) and np.isfinite(values).all()


def test_texture_is_the_same_for_a_turned_or_mirrored_picture():
    image = pictures(1)[0]
    expected = texture_features(image)
    scale = np.abs(expected) + 0.02
    for turned in (np.rot90(image), image[:, ::-1], np.rot90(image, 2)[::-1]):
        assert (np.abs(texture_features(np.ascontiguousarray(turned)) - expected) / scale).max() < 0.02


def test_texture_measures_what_its_names_say():
    from skimage.color import rgb2hed

    image = pictures(1)[0]
    values, hed = named(image), rgb2hed(image)
    assert values["haematoxylin mean"] == pytest.approx(hed[..., 0].mean())
    assert values["eosin quantile 0.95"] == pytest.approx(np.quantile(hed[..., 1], 0.95))
    centred = hed[..., 2] - hed[..., 2].mean()
    assert values["residual skewness"] == pytest.approx((centred**3).mean() / (centred**2).mean() ** 1.5)
    for radius in (1, 2, 4):
        assert sum(values[f"pattern {code} at {radius} px"] for code in range(10)) == pytest.approx(1)
    checks = np.indices((64, 64)).sum(axis=0) % 2
    board = np.where(checks[..., None], [90, 60, 140], [230, 170, 200]).astype(np.uint8)
    coarse = board[:16, :16].repeat(4, axis=0).repeat(4, axis=1)
    assert named(board)["haematoxylin band sd at 1 px"] > named(coarse)["haematoxylin band sd at 1 px"]
    assert named(board)["haematoxylin gradient mean at 2 px"] < named(coarse)["haematoxylin gradient mean at 2 px"]
    assert named(board)["co-occurrence contrast at 1 px"] > named(coarse)["co-occurrence contrast at 1 px"]
    # Diagonal neighbours on a chessboard are equal, the others never: four directions, half of them alike.
    assert named(board)["co-occurrence homogeneity at 4 px"] == pytest.approx(1)


def test_standardised_features_have_mean_0_and_sd_1_over_the_real_tiles_only():
    real, other = pictures(12), pictures(3, seed=5)
    features = Standardised(TextureFeatures(), real)
    values = features(real)
    raw = TextureFeatures()(real)
    varies = raw.std(axis=0) > 1e-9
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(values[:, varies].std(axis=0), 1)
    expected = (TextureFeatures()(other) - raw.mean(axis=0))[:, varies] / raw.std(axis=0)[varies]
    np.testing.assert_allclose(features(other)[:, varies], expected.clip(-6, 6))
    assert np.abs(features(255 - other)).max() == 6
    assert features.name == "stain-texture"
    with pytest.raises(BadInput, match="at least two"):
        Standardised(TextureFeatures(), real[:1])


# --- Inception-v3 -----------------------------------------------------------------------------------------------------


def test_resizing_reads_pixel_i_at_i_times_the_ratio():
    x = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (1, 2, 5, 7))).float()
    side = 12
    found = resize_like_tensorflow(x, side)
    assert found.shape == (1, 2, side, side)
    for i in range(side):
        for j in range(side):
            v, u = i * 5 / side, j * 7 / side
            a, b = int(v + 1e-6), int(u + 1e-6)
            c, d = min(a + 1, 4), min(b + 1, 6)
            top = x[0, :, a, b] * (1 - u + b) + x[0, :, a, d] * (u - b)
            low = x[0, :, c, b] * (1 - u + b) + x[0, :, c, d] * (u - b)
            torch.testing.assert_close(found[0, :, i, j], top * (1 - v + a) + low * (v - a), rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """Random weights under the published names, with running statistics that are not those of a fresh network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = InceptionV3().state_dict()
        for name in state:
            if name.endswith("running_mean"):
                state[name] = 0.1 * torch.randn_like(state[name])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    # The published file has no counters of batches.
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    return path


def test_inception_gives_2048_numbers_per_picture_whatever_the_batch(inception_file):
    features, images = InceptionFeatures(inception_file), pictures(2, 128)
    both = features(images)
    assert both.shape == (2, 2048) and np.isfinite(both).all() and (both[0] != both[1]).any()
    np.testing.assert_array_equal(both[1:], features(images[1:]))


def test_inception_has_the_published_parameters():
    state = InceptionV3().state_dict()
    convolutions = {name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")}
    assert len(convolutions) == 94
    weights = sum(v.numel() for k, v in state.items() if "running" not in k and "num_batches" not in k)
    # 23,834,568 of torchvision's network without its auxiliary head, and 8 classes of 2048 weights and a bias more.
    assert weights == 23_834_568 + 8 * 2049
    shapes = {
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6a.branch3x3dbl_3.bn.running_var": (96,),
        "Mixed_6b.branch7x7dbl_4.conv.weight": (128, 128, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "fc.weight": (1008, 2048),
    }
    for name, shape in shapes.items():
        assert tuple(state[name].shape) == shape, name


def test_inception_equals_torch_fidelitys_with_the_same_weights(inception_file):
    """``FeatureExtractorInceptionV3`` of torch-fidelity 0.4.0 on these weights and picture, every 256th feature."""
    found = InceptionFeatures(inception_file)(pictures(1, 128))[0]
    expected = [0.076880366, 0.147424966, 0.0, 0.067710541, 0.0, 0.096196041, 0.002618598, 0.182600915]
    np.testing.assert_allclose(found[::256], expected, rtol=1e-3, atol=1e-5)
    assert np.linalg.norm(found) == pytest.approx(3.3442543, rel=1e-4)


def test_other_weights_are_refused(tmp_path, inception_file):
    with pytest.raises(BadInput, match="is not a file: give the weight file of Inception-v3"):
        InceptionFeatures(tmp_path / "absent.pth")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(BadInput, match="does not hold the weights of Inception-v3"):
        InceptionFeatures(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(BadInput, match="cannot be read as weights"):
        InceptionFeatures(tmp_path / "text.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(BadInput, match="holds no table of tensors"):
        InceptionFeatures(tmp_path / "list.pth")
    weights = torch.load(inception_file, weights_only=True)
    torch.save(weights | {"another.weight": torch.zeros(2)}, tmp_path / "more.pth")
    with pytest.raises(BadInput, match="does not hold"):
        InceptionFeatures(tmp_path / "more.pth")


def test_a_file_that_would_run_code_is_not_opened(tmp_path):
    marker = tmp_path / "ran"

    class Harmful:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"x": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(BadInput, match="cannot be read as weights"):
        InceptionFeatures(tmp_path / "harmful.pth")
    assert not marker.exists()


# --- LPIPS ------------------------------------------------------------------------------------------------------------


def alexnet_features() -> nn.Sequential:
    """The published layers, in their order."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("lpips")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = {f"features.{k}": v for k, v in alexnet_features().state_dict().items()}
        backbone["classifier.1.weight"] = torch.zeros(4, 4)
        channels = (64, 192, 384, 256, 256)
        linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    torch.save(backbone, folder / "alexnet.pth")
    torch.save(linear, folder / "alex.pth")
    return folder / "alexnet.pth", folder / "alex.pth"


def test_lpips_is_the_published_sum_over_layers(lpips_files):
    a, b = pictures(2, 64), pictures(2, 64, seed=3)
    net = alexnet_features()
    backbone, linear = (torch.load(path, weights_only=True) for path in lpips_files)
    net.load_state_dict({k.removeprefix("features."): v for k, v in backbone.items() if k.startswith("features.")})
    expected = np.zeros(2)
    for i in range(2):
        kept = []
        for image in (a[i], b[i]):
            x = image.astype(np.float32) / 127.5 - 1
            x = (x - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
            y, outs = torch.from_numpy(x.transpose(2, 0, 1)[None]).float(), []
            for j, layer in enumerate(net):
                y = layer(y)
                if j in (1, 4, 7, 9, 11):
                    outs.append(y.detach().numpy()[0])
            kept.append(outs)
        for layer, (p, q) in enumerate(zip(*kept, strict=True)):
            p, q = (z / (np.sqrt((z**2).sum(axis=0)) + 1e-10) for z in (p, q))
            weight = linear[f"lin{layer}.model.1.weight"].numpy()[0]
            expected[i] += (weight * (p - q) ** 2).sum(axis=0).mean()
    found = LPIPS(*lpips_files)
    np.testing.assert_allclose(found.distance(a, b), expected, rtol=1e-4)
    np.testing.assert_allclose(found.distance(b, a), expected, rtol=1e-4)
    assert found.distance(a, a).max() < 1e-9


def test_lpips_equals_the_packages_with_the_same_weights(lpips_files):
    """``lpips.LPIPS(net="alex")`` of lpips 0.1.4 on these weights and pictures."""
    found = LPIPS(*lpips_files).distance(pictures(2, 64), pictures(2, 64, seed=3))
    np.testing.assert_allclose(found, [0.5126999, 0.46921626], rtol=1e-4)


def test_wrong_lpips_files_are_refused(lpips_files, tmp_path):
    backbone, linear = lpips_files
    with pytest.raises(BadInput, match="does not hold the weights of AlexNet"):
        LPIPS(linear, linear)
    with pytest.raises(BadInput, match="lacks lin0.model.1.weight"):
        LPIPS(backbone, backbone)
    negative = {k: -v for k, v in torch.load(linear, weights_only=True).items()}
    torch.save(negative, tmp_path / "negative.pth")
    with pytest.raises(BadInput, match="negative weights in lin0"):
        LPIPS(backbone, tmp_path / "negative.pth")
    with pytest.raises(BadInput, match="as many pictures of one size"):
        LPIPS(backbone, linear).distance(pictures(2), pictures(1))


def test_pictures_of_another_kind_are_refused(reader):
    for images in (pictures(1).astype(np.float32), pictures(1)[0], pictures(1)[:, :8]):
        with pytest.raises(BadInput, match="give uint8 RGB"):
            ReaderFeatures(reader)(images)
