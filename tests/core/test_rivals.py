"""The rivals: what they learn, that a killed run ends where an uninterrupted one does, whose picture is whose."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from ge2hist_core import rng
from ge2hist_core.__main__ import COMMANDS, run_command
from ge2hist_core.config import TILE_PX, UM_PER_PX, SampleConfig, TrainConfig
from ge2hist_core.rivals import RIVALS, load_rival, rival_class
from ge2hist_core.rivals.beta_vae import BetaVAE, log_normalised
from ge2hist_core.rivals.common import (
    Budget,
    Rival,
    TrainingTiles,
    _follow,
    count_macs,
    device_called,
    gradient_penalty,
    pixels_of,
)
from ge2hist_core.rivals.controls import NearestTile, ShuffledCondition
from ge2hist_core.rivals.rna_cdm import RNACDMConfig
from ge2hist_core.rivals.rna_gan import RNAGAN, RNAGANConfig
from ge2hist_core.rivals.transgan import TransGAN, TransGANConfig, _Block, augment, augmentation
from ge2hist_core.store import SectionRecord, TissueStore, write_store
from ge2hist_core.training import limited_rows
from ge2hist_core.types import BadInput, Cells

GENES = ("CD8A", "CD4", "EPCAM", "COL1A1", "PECAM1", "GAPDH")
SMALL_VAE = {"vae_hidden": (8, 4), "vae_steps": 2, "vae_batch": 6}
TINY = {
    "transgan": TransGANConfig(
        latent_dim=8, width=64, depth=(1, 1, 1, 1), critic_width=32, critic_depth=(1, 1, 1), batch_size=2,
        checkpoint_every=2,
    ),
    "rna-cdm": RNACDMConfig(
        base_channels=(8, 8), super_channels=(8, 8), heads=2, tokens=2, condition_dim=8, batch_size=3, steps=2,
        warmup_steps=1, checkpoint_every=2, **SMALL_VAE,
    ),
    "rna-gan": RNAGANConfig(channels=4, batch_size=2, checkpoint_every=2, **SMALL_VAE),
}  # fmt: skip
every_rival = pytest.mark.parametrize("name", list(RIVALS))
conditional_rivals = pytest.mark.parametrize("name", ["rna-cdm", "rna-gan"])


def section(donor: str, seed: int) -> SectionRecord:
    """Tumour in the left half, dark; stroma in the right half, pale. Expression says which."""
    draw = np.random.default_rng(seed)
    side = TILE_PX + 40
    image = np.full((side, side, 3), (220, 160, 200), dtype=np.uint8)
    image[:, : side // 2] = (120, 80, 160)
    image = (image + draw.normal(0, 5, image.shape)).clip(0, 255).astype(np.uint8)
    xy = np.column_stack([np.tile([70.0, 98.0], 4), draw.uniform(70, 98, 8)])
    kinds = np.tile(["Tumour epithelium", "Fibroblast"], 4)
    nuclei = pd.DataFrame({"x_um": xy[:, 0] * UM_PER_PX, "y_um": xy[:, 1] * UM_PER_PX, "cell_type": kinds})
    mean = np.where((kinds == "Fibroblast")[:, None], [1, 2, 1, 30, 6, 20], [1, 2, 30, 1, 2, 20])
    return SectionRecord(donor, image, np.zeros((side, side), np.int32), nuclei, sp.csr_matrix(draw.poisson(mean)))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("store") / "tissue.zarr"
    write_store(path, (section(f"D{i}", i) for i in range(4)), list(GENES))
    return path


@pytest.fixture(scope="module")
def store(path) -> TissueStore:
    return TissueStore(path)


@pytest.fixture(scope="module")
def rows(store) -> np.ndarray:
    return store.rows(store.split()["train"])


@pytest.fixture(scope="module")
def cells(store) -> Cells:
    return store.cells.take(store.rows(store.split()["test"])[:6])


def trained(name: str, store: TissueStore, rows: np.ndarray, out: Path, steps: int = 6) -> Rival:
    for _ in rival_class(name).train(store, rows, Budget(steps=steps), 1, out, config=TINY[name]):
        pass
    return load_rival(out)


@pytest.fixture(scope="module")
def finished(store, rows, tmp_path_factory) -> dict[str, Rival]:
    folder = tmp_path_factory.mktemp("rivals")
    return {name: trained(name, store, rows, folder / name) for name in RIVALS}


# --- training ---------------------------------------------------------------------------------------------------------


class Crops(TrainingTiles):
    """The middle 32 px of every tile: small networks suffice for what a single step must do."""

    def pictures(self, chosen: np.ndarray, name: str, step: int) -> torch.Tensor:
        return super().pictures(chosen, name, step)[:, 48:80, 48:80]


def small(name: str, **change) -> Rival:
    """A rival of 32 px."""
    fits = {"depth": (1, 1), "critic_depth": (1, 1)} if name == "transgan" else {}
    return rival_class(name)(replace(TINY[name], tile_px=32, **fits | change), GENES, 0)


def cropped(name: str, store: TissueStore, rows: np.ndarray, **change) -> tuple[Rival, Iterator[dict[str, float]]]:
    """A rival of 32 px and its training steps without end."""
    rival = small(name, **change)
    tiles, optimizers = Crops(store, rows, 0), rival._optimizers()
    rival._fit_statistics(tiles)

    def steps() -> Iterator[dict[str, float]]:
        for step in itertools.count():
            rival.nets.train()
            yield {k: v.item() for k, v in rival._update(step, rival._batch(step, tiles), optimizers).items()}

    return rival, steps()


@every_rival
def test_every_parameter_gets_a_finite_gradient_and_moves(name, store, rows):
    rival, steps = cropped(name, store, rows, **({"condition_dropout": 0.5} if name == "rna-cdm" else {}))
    before = {key: parameter.clone() for key, parameter in rival.nets.named_parameters()}
    reached: set[str] = set()
    for _ in itertools.islice(steps, 6):
        for key, parameter in rival.nets.named_parameters():
            if parameter.grad is not None:
                assert torch.isfinite(parameter.grad).all(), key
                if parameter.grad.abs().max() > 0:
                    reached.add(key)
    assert reached == set(before)
    assert [key for key, value in rival.nets.named_parameters() if torch.equal(value, before[key])] == []


@every_rival
def test_a_run_killed_twice_ends_in_the_weights_of_an_uninterrupted_one(name, store, rows, finished, tmp_path):
    """Checkpoints every two steps; the first kill is within the beta-VAE's steps, the second among the picture's."""
    cls, config = rival_class(name), TINY[name]
    for steps in (3, 2):
        run = cls.train(store, rows, Budget(steps=6), 1, tmp_path / "r", resume=True, config=config)
        list(itertools.islice(run, steps))
        run.close()
    assert not (tmp_path / "r" / "rival.json").exists()
    progress = list(cls.train(store, rows, Budget(steps=6), 1, tmp_path / "r", resume=True, config=config))
    assert [p.step for p in progress] == [5, 6] and progress[-1].spent == 1
    resumed, whole = load_rival(tmp_path / "r"), finished[name]
    for net in whole.drawing:
        for (key, a), b in zip(
            whole.net(net).state_dict().items(), resumed.net(net).state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), (net, key)
    assert resumed.report["terms"] == whole.report["terms"]


@every_rival
def test_threads_that_load_ahead_change_nothing(name, store, rows, finished, tmp_path):
    run = rival_class(name).train(store, rows, Budget(steps=6), 1, tmp_path, config=TINY[name], workers=2)
    terms = [progress.terms for progress in run][-1]
    assert terms == finished[name].report["terms"]
    finished[name].save(tmp_path / "serial")
    files = [folder / "weights.safetensors" for folder in (tmp_path, tmp_path / "serial")]
    assert files[0].read_bytes() == files[1].read_bytes()


@every_rival
def test_a_step_computes_on_one_device_alone(name, store, rows):
    """On the meta device, whose tensors refuse to meet those of the CPU as those of a GPU do."""
    rival, tiles = small(name), Crops(store, rows, 0)
    for net in rival.nets.values():
        net.to("meta").train()
    optimizers = rival._optimizers()
    for step in (0, 2, 3) if rival.conditional else (0, 1):
        batch = {key: value.to("meta") for key, value in rival._batch(step, tiles).items()}
        terms = rival._update(step, batch, optimizers)
        assert {value.device.type for value in terms.values()} == {"meta"}
        assert {value.shape for value in terms.values()} == {torch.Size()}


def test_the_average_lags_behind_the_network_and_takes_its_statistics_along():
    net, average = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        net.weight.fill_(3.0)
    net.running_mean.fill_(8.0)
    net.num_batches_tracked.fill_(5)
    _follow(average, net, 0.75)
    assert average.weight.tolist() == [1.5, 1.5] and average.running_mean.tolist() == [2.0, 2.0]
    assert average.num_batches_tracked == 5 and net.weight.tolist() == [3.0, 3.0]


@every_rival
def test_pictures_are_drawn_with_the_average(name, finished):
    for net in finished[name].averaged:
        assert finished[name].net(net) is finished[name].average[net]
    for net in set(finished[name].drawing) - set(finished[name].averaged):
        assert finished[name].net(net) is finished[name].nets[net]


@pytest.mark.parametrize("name", ["transgan", "rna-gan"])
def test_the_critic_learns_to_tell_real_from_generated(name, store, rows):
    """The generator stands still: the difference of scores grows and is above 0."""
    skip = {"vae_steps": 1} if name == "rna-gan" else {}
    _, steps = cropped(name, store, rows, generator_rate=0.0, critic_rate=1e-3, batch_size=8, **skip)
    distance = [terms.get("distance", 0.0) for terms in itertools.islice(steps, 51)]
    assert np.mean(distance[-10:]) > max(0.1, np.mean(distance[1:11]))


def test_diffusion_and_beta_vae_lower_their_losses_on_a_small_problem(store, rows):
    change = {"vae_hidden": (16, 8), "vae_steps": 120, "vae_batch": 48, "vae_learning_rate": 3e-3}
    _, steps = cropped("rna-cdm", store, rows, learning_rate=3e-3, batch_size=8, **change)
    terms = list(itertools.islice(steps, 180))
    for key, part in (("rec", terms[:120]), ("base", terms[120:]), ("super", terms[120:])):
        values = [t[key] for t in part]
        assert np.mean(values[-15:]) < 0.92 * np.mean(values[:10]), key


def test_the_gradient_penalty_of_a_linear_critic_is_its_slope():
    weight = torch.randn(3 * 4 * 4, generator=torch.Generator().manual_seed(0))

    class Linear(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) @ weight

    real, fake = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    penalty = gradient_penalty(Linear(), real, fake, torch.tensor([0.2, 0.7]))
    assert penalty.item() == pytest.approx((weight.norm().item() - 1) ** 2, rel=1e-5)


def test_windowed_attention_is_attention_within_each_window():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = _Block(8, 2, 8, 4, nn.LayerNorm)
        x = torch.randn(2, 64, 8)
    found = block._attend(x).view(2, 8, 8, 8)
    for row in (0, 4):
        for column in (0, 4):
            window = x.view(2, 8, 8, 8)[:, row : row + 4, column : column + 4].reshape(2, 16, 8)
            expected = block.attention(window).view(2, 4, 4, 8)
            torch.testing.assert_close(found[:, row : row + 4, column : column + 4], expected)


def test_relative_positions_share_their_bias():
    attention = _Block(8, 1, 3, 3, nn.LayerNorm).attention
    index = attention.index
    # From each token to the one right of it is one position; to itself another; nothing else is either.
    right = {int(index[3 * y + x, 3 * y + x + 1]) for y in range(3) for x in range(2)}
    same = {int(index[i, i]) for i in range(9)}
    assert len(right) == len(same) == 1 and right != same
    assert len(torch.unique(index)) == 25


def test_augmentation_is_differentiable_and_depends_on_its_stream_alone():
    pixels = torch.rand(3, 3, 32, 32).mul(2).sub(1).requires_grad_(True)

    def augmented(seed: int) -> torch.Tensor:
        return augment(pixels, *augmentation(3, 32, rng.stream(seed, "test")))

    first = augmented(0)
    assert first.shape == pixels.shape
    assert torch.equal(first, augmented(0)) and not torch.equal(first, augmented(1))
    first.sum().backward()
    assert (pixels.grad.abs().sum((1, 2, 3)) > 0).all()
    # A square of a quarter of the side is cut out of every picture.
    assert ((first == 0).all(1).sum((1, 2)) >= 64).all()


def test_augmentation_moves_and_cuts_out_where_its_numbers_say():
    pixels, at = torch.rand(2, 3, 32, 32), torch.tensor([[0, 7], [4, 1], [3, 24], [20, 0]])
    found = augment(pixels, torch.tensor([0.5, 0.5, 0.5])[:, None].expand(3, 2), at)  # colours stay as they are
    padded = np.pad(pixels.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    for i, (top, left, y, x) in enumerate(at.T.tolist()):
        expected = padded[i, :, top : top + 32, left : left + 32].copy()
        expected[:, y : y + 8, x : x + 8] = 0
        np.testing.assert_allclose(found[i], expected, atol=1e-6)


def test_expression_is_read_without_depth_and_in_the_genes_order(store):
    counts = store.cells.counts[:5]
    values = log_normalised(counts).numpy()
    dense = counts.toarray()
    np.testing.assert_allclose(values, np.log(1 + 1e4 * dense / dense.sum(axis=1, keepdims=True)), rtol=1e-5)
    np.testing.assert_allclose(values, log_normalised(counts * 7).numpy(), rtol=1e-5)
    assert (log_normalised(sp.csr_matrix((1, 6), dtype=np.float32)) == 0).all()
    vae = BetaVAE(6, (8, 4))
    values = log_normalised(store.cells.counts)
    vae.fit_standardisation(values)
    standard = vae.standardise(values)
    torch.testing.assert_close(standard.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(0), torch.ones(6), atol=1e-3, rtol=0)


def test_the_kl_of_the_beta_vae_is_that_of_the_library(store):
    from torch.distributions import Normal, kl_divergence

    vae = BetaVAE(6, (8, 4)).eval()
    x = vae.standardise(log_normalised(store.cells.counts[:7]))
    keep, eps = torch.ones(x.shape, dtype=torch.bool), torch.zeros(7, 4)
    mu, log_variance = vae.encode(2 * x)
    q = Normal(mu, (0.5 * log_variance).exp())
    expected = kl_divergence(q, Normal(0.0, 1.0)).sum(1).mean()
    assert vae.terms(x, keep, eps)["kl"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_tiles_are_turned_and_mirrored_and_repeat(store, rows):
    tiles = TrainingTiles(store, rows, 0)
    chosen = np.repeat(rows[:1], 40)
    pictures = tiles.pictures(chosen, "x", 3)
    original = torch.from_numpy(store.tiles(chosen[:1])[0])
    both = (original, original.flip(1))
    expected = {torch.rot90(tile, k).contiguous().numpy().tobytes() for tile in both for k in range(4)}
    assert len(expected) == 8 and {p.numpy().tobytes() for p in pictures} == expected
    assert torch.equal(pictures, tiles.pictures(chosen, "x", 3))
    pixels = pixels_of(pictures[:2])
    assert torch.equal(pixels[1], pictures[1].permute(2, 0, 1).float().div(127.5).sub(1))


def test_rivals_learn_from_the_cells_that_the_bundle_learns_from(path, store, tmp_path):
    argv = ["train-rival", "rna-gan", str(path), "--out", str(tmp_path / "r"), "--minutes", "0.001"]
    argv += ["--seed", "5", "--cells-per-donor", "3", "--device", "cpu", "--batch-size", "2"]
    assert run_command("x", "", COMMANDS, argv) == 0
    trained = json.loads((tmp_path / "r" / "rival.json").read_text(encoding="utf-8"))["training"]
    expected = limited_rows(store, store.rows(store.split()["train"]), TrainConfig(cells_per_donor=3, seed=5))
    assert trained["cells"] == len(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused():
    assert device_called("auto") == torch.device("cpu")
    with pytest.raises(BadInput, match="finds no GPU here: choose the device auto or cpu"):
        device_called("cuda")


# --- drawing ----------------------------------------------------------------------------------------------------------


@every_rival
def test_a_picture_is_the_same_in_a_batch_of_any_size_and_place(name, finished, cells):
    rival, seeds = finished[name], [5, 3, 8, 5, 1, 2]
    together = rival.generate(cells, seeds)
    assert together.shape == (6, TILE_PX, TILE_PX, 3) and together.dtype == np.uint8
    for i in (0, 4, 5):
        np.testing.assert_array_equal(rival.generate(cells.take([i]), [seeds[i]])[0], together[i])
    np.testing.assert_array_equal(rival.generate(cells.take([4, 1]), [1, 3]), together[[4, 1]])
    assert (rival.generate(cells.take([0]), [77])[0] != together[0]).any()
    assert rival.generate(cells.take(slice(0)), []).shape == (0, TILE_PX, TILE_PX, 3)


@conditional_rivals
def test_conditional_rivals_answer_to_expression(name, finished, cells):
    rival = finished[name]
    other = cells.scale_genes({"EPCAM": 0.0, "COL1A1": 20.0})
    assert (rival.generate(cells, range(6)) != rival.generate(other, range(6))).reshape(6, -1).any(axis=1).all()
    deeper = cells.with_counts(cells.counts * 3)
    difference = np.abs(rival.generate(cells, range(6)).astype(int) - rival.generate(deeper, range(6)))
    assert difference.max() <= 1, "depth alone says nothing"


def test_transgan_draws_without_a_cell_and_the_same_for_any(finished, cells):
    rival = finished["transgan"]
    np.testing.assert_array_equal(rival.generate(None, range(6)), rival.generate(cells, range(6)))
    assert not rival.conditional


@conditional_rivals
def test_genes_are_found_by_name_whatever_their_order(name, finished, cells):
    order = [3, 0, 5, 1, 2, 4]
    shuffled = Cells(cells.counts[:, order], np.array(GENES)[order], cells.cell_id)
    extended = Cells(
        sp.hstack([cells.counts, sp.csr_matrix(np.full((6, 1), 9.0))], format="csr"),
        np.array([*GENES, "ELSE"]),
        cells.cell_id,
    )
    expected = finished[name].generate(cells, range(6))
    np.testing.assert_array_equal(finished[name].generate(shuffled, range(6)), expected)
    np.testing.assert_array_equal(finished[name].generate(extended, range(6)), expected)


# --- saving -----------------------------------------------------------------------------------------------------------


@every_rival
def test_saved_and_loaded_a_rival_draws_the_same(name, finished, cells, tmp_path):
    finished[name].save(tmp_path)
    loaded = load_rival(tmp_path)
    assert loaded.config == TINY[name] and loaded.genes == GENES and loaded.report == finished[name].report
    np.testing.assert_array_equal(loaded.generate(cells, range(6)), finished[name].generate(cells, range(6)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rival.json", "weights.safetensors"]


@every_rival
def test_the_report_says_what_was_learned_from_and_at_what_cost(name, finished, store):
    report = finished[name].report
    assert report["learned_from"] == store.split()["train"] and report["store"] == store.identity
    assert report["steps"] == 6 and report["cells"] == 16
    assert report["cpu_seconds"] > 0 and report["seconds"] > 0 and report["threads"] >= 1
    assert json.loads(json.dumps(report)) == report


def test_a_budget_of_cpu_time_ends_the_run_and_a_larger_one_goes_on(store, rows, tmp_path):
    config = TINY["rna-gan"]

    def steps(budget: Budget) -> list[int]:
        return [p.step for p in RNAGAN.train(store, rows, budget, 1, tmp_path / "r", resume=True, config=config)]

    assert steps(Budget(cpu_seconds=1e-9)) == [1]
    assert steps(Budget(cpu_seconds=1e-9)) == [], "the budget is over all runs"
    assert steps(Budget(cpu_seconds=1e9, steps=4)) == [2, 3, 4]
    assert load_rival(tmp_path / "r").report["steps"] == 4
    budget = Budget(cpu_seconds=100, steps=50, seconds=10)
    assert [budget.spent(0, 50, 10, 1), budget.spent(0, 50, 30, 1), budget.spent(0, 50, 30, 7)] == [0.5, 0.6, 0.7]


def test_a_budget_of_seconds_ends_the_run(store, rows, tmp_path):
    def steps(seconds: float) -> list[int]:
        budget = Budget(seconds=seconds, steps=3)
        return [p.step for p in RNAGAN.train(store, rows, budget, 1, tmp_path, resume=True, config=TINY["rna-gan"])]

    assert (steps(1e-9), steps(1e-9), steps(1e9)) == ([1], [], [2, 3])


def test_the_cost_of_a_linear_layer_is_counted_forward_and_backward():
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    assert count_macs(lambda: layer(x)) == 3 * 5 * 7
    assert count_macs(lambda: layer(x).sum().backward()) == 2 * 3 * 5 * 7, "the input needs no gradient"


@conditional_rivals
def test_a_budget_of_multiply_accumulates_counts_both_kinds_of_step(name, store, rows, finished, tmp_path):
    cls, config = rival_class(name), TINY[name]

    def run(budget: Budget) -> list[int]:
        return [p.macs for p in cls.train(store, rows, budget, 1, tmp_path / "r", resume=True, config=config)]

    vae, _, both = run(Budget(steps=3))
    assert 0 < vae < both - 2 * vae
    pictures = both - 2 * vae
    rest = run(Budget(macs=2 * vae + 3.5 * pictures))
    assert rest == [2 * vae + n * pictures for n in (2, 3, 4)], "over all runs, until the limit is passed"
    assert finished[name].report["macs"] == rest[-1]


def test_the_command_trains_on_the_training_donors(path, store, tmp_path, capsys):
    commands = {"train-rival": ("ge2hist_core.rivals.command", "train a rival")}
    argv = ["train-rival", "rna-gan", str(path), "--out", str(tmp_path / "r"), "--minutes", "1e-6", "--seed", "3"]
    assert run_command("test", "", commands, argv) == 0
    report = load_rival(tmp_path / "r").report
    assert report["learned_from"] == store.split()["train"] and report["steps"] == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 1 and printed["batch_size"] == RNAGANConfig().batch_size
    assert run_command("test", "", commands, argv) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert run_command("test", "", commands, [*argv, "--resume"]) == 0
    assert run_command("test", "", commands, [*argv[:5], "--minutes", "0"]) == 2
    assert "--minutes is 0" in capsys.readouterr().err
    assert run_command("test", "", commands, [*argv[:5], "--batch-size", "0"]) == 2
    assert "--batch-size is 0: give at least 1" in capsys.readouterr().err
    options = ["--wall-minutes", "1e-6", "--batch-size", "3", "--workers", "1", "--device", "cpu"]
    assert run_command("test", "", commands, [*argv[:3], "--out", str(tmp_path / "s"), *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["steps"], printed["batch_size"], printed["device"]) == (1, 3, "cpu")
    assert load_rival(tmp_path / "s").config.batch_size == 3


# --- controls ---------------------------------------------------------------------------------------------------------


def test_the_nearest_tile_of_a_training_cell_is_its_own(tiny_bundle, store, rows):
    control = NearestTile(tiny_bundle, store, rows)
    asked = rows[[4, 0]]
    np.testing.assert_array_equal(control.generate(store.cells.take(asked), [1, 2]), store.tiles(asked))
    held_out = store.cells.take(store.rows(store.split()["test"])[:3])
    chosen = control.nearest(held_out)
    assert set(chosen) <= set(rows)
    a, b = tiny_bundle.embed(held_out, 0), tiny_bundle.embed(store.cells.take(rows), 0)
    distance = np.linalg.norm(a[:, None].astype(float) - b[None], axis=2)
    np.testing.assert_array_equal(chosen, rows[distance.argmin(axis=1)])
    with pytest.raises(BadInput, match="give the cells"):
        control.generate(None, [1])


def test_a_shuffled_condition_is_never_the_cells_own_and_does_not_depend_on_the_batch(tiny_bundle, cells):
    sample = SampleConfig(steps=1)
    control = ShuffledCondition(tiny_bundle, cells.take([0, 1, 2]), sample)
    for i in range(3):
        others = [control._other(cells.cell_id[i], seed) for seed in range(30)]
        assert set(others) == {0, 1, 2} - {i}
    seeds = [4, 9, 4]
    together = control.generate(cells.take([0, 1, 2]), seeds)
    np.testing.assert_array_equal(control.generate(cells.take([1]), [9])[0], together[1])
    state = tiny_bundle.encode(tiny_bundle.embed(cells.take([control._other(cells.cell_id[1], 9)]), 0))
    np.testing.assert_array_equal(tiny_bundle.generate(state, [9], sample)[0], together[1])
    with pytest.raises(BadInput, match="at least 2"):
        ShuffledCondition(tiny_bundle, cells.take([0]))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named(store, rows, finished, cells, tmp_path):
    with pytest.raises(BadInput, match="Rival 'x' is unknown: choose one of transgan, rna-cdm, rna-gan"):
        rival_class("x")
    with pytest.raises(BadInput, match="no limit"):
        Budget()
    with pytest.raises(BadInput, match="budget's steps is 0"):
        Budget(steps=0)
    with pytest.raises(BadInput, match="no cell to train on"):
        TransGAN.train(store, rows[:0], Budget(steps=1), 0, tmp_path)
    with pytest.raises(BadInput, match="tile_px is 64, the store's tiles have 128 px"):
        RNAGAN.train(store, rows, Budget(steps=1), 0, tmp_path, config=RNAGANConfig(tile_px=64))
    with pytest.raises(BadInput, match="number of workers is -1"):
        TransGAN.train(store, rows, Budget(steps=1), 0, tmp_path, workers=-1)
    with pytest.raises(BadInput, match="device is 'tpu': choose one of auto, cpu, cuda"):
        TransGAN.train(store, rows, Budget(steps=1), 0, tmp_path, device="tpu")
    with pytest.raises(BadInput, match="draws from expression: give the cells"):
        finished["rna-gan"].generate(None, [1])
    with pytest.raises(BadInput, match="share none of the 6 genes"):
        finished["rna-cdm"].generate(Cells(sp.csr_matrix([[1.0]]), np.array(["ELSE"]), np.array(["c"])), [1])
    with pytest.raises(ValueError, match="need as many seeds"):
        finished["rna-gan"].generate(cells, [1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TransGANConfig(tile_px=100), "tile_px is 100: 4 stages in depth draw 128 px"),
        (lambda: TransGANConfig(width=100), "width is 100"),
        (lambda: TransGANConfig(critic_width=100), "critic_width is 100"),
        (lambda: RNAGANConfig(tile_px=48), "tile_px is 48"),
        (lambda: RNAGANConfig(channels=6), "channels is 6"),
        (lambda: RNACDMConfig(tile_px=36), "tile_px is 36"),
        (lambda: RNACDMConfig(blur_drawing=0.9), "blur_drawing is 0.9"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, message):
    with pytest.raises(BadInput, match=message):
        make()


def test_a_checkpoint_of_another_run_is_refused(store, rows, tmp_path):
    list(RNAGAN.train(store, rows, Budget(steps=1), 1, tmp_path, config=TINY["rna-gan"]))
    again = {"budget": Budget(steps=2), "seed": 1, "out": tmp_path, "config": TINY["rna-gan"]}
    with pytest.raises(BadInput, match="go on with --resume"):
        RNAGAN.train(store, rows, **again)
    for change in ({"seed": 2}, {"config": replace(TINY["rna-gan"], beta=0.1)}):
        with pytest.raises(BadInput, match="other data or settings"):
            next(RNAGAN.train(store, rows, resume=True, **again | change))
    (tmp_path / ".work" / "state.safetensors").write_bytes(b"cut off")
    with pytest.raises(BadInput, match="damaged"):
        next(RNAGAN.train(store, rows, resume=True, **again))


def test_damaged_folders_are_refused(finished, tmp_path):
    with pytest.raises(BadInput, match="holds no rival"):
        load_rival(tmp_path)
    finished["rna-gan"].save(tmp_path)
    with pytest.raises(BadInput, match="holds 'rna-gan', not 'transgan'"):
        TransGAN.load(tmp_path)
    header = json.loads((tmp_path / "rival.json").read_text())
    for change, message in (
        ({"schema": 9}, "schema 9, this version reads 1"),
        ({"rival": "x"}, "'x' is unknown"),
        ({"config": {"width": 1}}, "is damaged|Unknown field"),
        ({"config": header["config"] | {"channels": 8}}, "is damaged"),
    ):
        (tmp_path / "rival.json").write_text(json.dumps(header | change))
        with pytest.raises(BadInput, match=message):
            load_rival(tmp_path)
    (tmp_path / "rival.json").write_text(json.dumps(header))
    (tmp_path / "weights.safetensors").write_bytes(b"cut off")
    with pytest.raises(BadInput, match="is damaged"):
        load_rival(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(BadInput, match="lacks weights.safetensors|is damaged"):
        load_rival(tmp_path)
    (tmp_path / "rival.json").write_text("{")
    with pytest.raises(BadInput, match="is damaged"):
        load_rival(tmp_path)
