"""Training: equation (9) term by term, batches, and that a killed run ends where an uninterrupted one does."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ge2hist_core import config as configuration
from ge2hist_core import rng
from ge2hist_core.__main__ import COMMANDS, run_command
from ge2hist_core.config import ModelConfig, Preset, TrainConfig
from ge2hist_core.denoiser import Denoiser
from ge2hist_core.model import GE2Hist
from ge2hist_core.sampler import alphas_cumprod
from ge2hist_core.store import TissueStore, write_store
from ge2hist_core.training import MainObjective, Trainer, dihedral, learning_rate
from ge2hist_core.types import BadInput
from ge2hist_core.vae import StateEncoder

MODEL = ModelConfig(
    embedding_dim=16, d_c=3, d_e=2, vae_hidden=8, ae_channels=(8, 8), latent_channels=2, unet_channels=(8, 8),
    condition_tokens=2, condition_dim=8, attention_heads=2, time_embedding_dim=16,
)  # fmt: skip
TRAIN = TrainConfig(
    steps=7, batch_size=3, warmup_steps=2, vae_steps=3, state_steps=3, autoencoder_steps=3, autoencoder_batch=2,
    latent_variants=2, checkpoint_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four simulated donors with a handful of whole tiles each."""
    from ge2hist_core.simulator.command import simulate_sections
    from ge2hist_core.simulator.expression import load_genes

    path = tmp_path_factory.mktemp("data") / "tissue.zarr"
    simulation = {"seed": 3, "donors": [0, 1, 2, 3], "size_um": 96.0}
    write_store(path, simulate_sections(3, range(4), 96.0), list(load_genes().symbols), simulation=simulation)
    return path


@pytest.fixture(scope="module")
def store(data: Path) -> TissueStore:
    return TissueStore(data)


@pytest.fixture(scope="module")
def finished(store: TissueStore, scgpt_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """An uninterrupted run."""
    trainer = Trainer(store, scgpt_folder, tmp_path_factory.mktemp("run") / "bundle", MODEL, TRAIN)
    for _ in trainer.run():
        pass
    return trainer


def weights(folder: Path) -> dict[str, bytes]:
    names = ["vae", "autoencoder", "mixture", "support", "unet/diffusion_pytorch_model", "unet/condition"]
    return {name: (folder / f"{name}.safetensors").read_bytes() for name in names}


def test_killed_after_every_few_steps_and_resumed_the_run_ends_in_the_same_weights(
    finished: Trainer, store: TissueStore, scgpt_folder: Path, tmp_path: Path
):
    kills = 0
    while True:
        trainer = Trainer(store, scgpt_folder, tmp_path / "bundle", MODEL, TRAIN)
        run = trainer.run()
        # Checkpoints every two steps and a kill after every five records, wherever that is in a stage.
        seen = list(islice(run, 5))
        run.close()
        if len(seen) < 5:
            break
        kills += 1
        assert kills < 20
    assert kills >= 2
    assert weights(tmp_path / "bundle") == weights(finished.out)
    logs = [(out / ".work" / "main.csv").read_text() for out in (tmp_path / "bundle", finished.out)]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 1 + TRAIN.steps


def test_a_deadline_writes_a_bundle_and_the_run_goes_on_from_there(
    finished: Trainer, store: TissueStore, scgpt_folder: Path, tmp_path: Path
):
    records = list(Trainer(store, scgpt_folder, tmp_path / "b", MODEL, TRAIN).run(deadline=time.monotonic()))
    assert [r.step for r in records if r.stage == "main"] == [1]
    assert GE2Hist.load(tmp_path / "b").report["steps"] == 1
    records = list(Trainer(store, scgpt_folder, tmp_path / "b", MODEL, TRAIN).run())
    assert [r.step for r in records] == [2, 3, 4, 5, 6, 7], "finished stages are not repeated"
    assert weights(tmp_path / "b") == weights(finished.out)


def test_a_bundle_opens_draws_and_reports(finished: Trainer):
    model = GE2Hist.load(finished.out)
    latent = model.encode(finished.embedding[finished.rows["test"][:1]])
    assert model.generate(latent, [0], configuration.SampleConfig(steps=2)).shape == (1, 128, 128, 3)
    report = model.report["separation"]
    assert 0 <= report["classifier_accuracy"] <= 1 and len(report["r2_z_e"]) == 6
    held_out = set(model.report["donors"]["test"] + model.report["donors"]["validation"])
    donor = dict(zip(finished.store.cells.cell_id, finished.store.cells.donor, strict=True))
    assert not {donor[name] for name in model.support.cell_id} & held_out


def test_every_stage_was_trained(finished: Trainer, scgpt_folder: Path):
    fresh = GE2Hist.untrained(MODEL, scgpt_folder, TRAIN.seed)
    # The bundle's U-Net is rounded to float16, which hides changes as small as these: look at its checkpoint.
    main = torch.load(finished.work / "main.pt", weights_only=True)["average"]
    after = {"autoencoder": finished.model.autoencoder.state_dict()} | {
        part: {name.removeprefix(prefix): value for name, value in main.items() if name.startswith(prefix)}
        for part, prefix in (("encoder", "state.encoder."), ("denoiser", "denoiser."))
    }
    for part, weights_after in after.items():
        before = getattr(fresh, part).state_dict()
        assert set(before) == set(weights_after)
        for name, value in weights_after.items():
            assert not torch.equal(value, before[name]), f"{part}.{name}"


def test_the_work_of_other_settings_is_not_mixed_in(finished: Trainer, store: TissueStore, scgpt_folder: Path):
    other = Trainer(store, scgpt_folder, finished.out, MODEL, replace(TRAIN, beta=0.3))
    with pytest.raises(BadInput, match="made with other data or settings: use the same, or choose another --out"):
        next(other.run())


def test_a_run_goes_on_from_a_finished_bundle(
    finished: Trainer, store: TissueStore, scgpt_folder: Path, tmp_path: Path
):
    start = GE2Hist.load(finished.out)
    trainer = Trainer(store, scgpt_folder, tmp_path / "on", MODEL, replace(TRAIN, steps=2), start=start)
    records = list(trainer.run())
    assert {record.stage for record in records} == {"latents", "embeddings", "main"}
    before, after = weights(finished.out), weights(tmp_path / "on")
    assert before["autoencoder"] == after["autoencoder"] and before["vae"] != after["vae"]
    on = GE2Hist.load(tmp_path / "on")
    assert on.report["started_from"]["bundle_sha256"] == start.sha256
    assert on.report["started_from"]["training"]["steps"] == TRAIN.steps
    assert on.has_learned_from(store) == start.has_learned_from(store)
    # The first step is taken from the bundle's weights: with no step to speak of, they are the bundle's.
    still = replace(TRAIN, steps=1, learning_rate=1e-12)
    trainer = Trainer(store, scgpt_folder, tmp_path / "still", MODEL, still, start=start)
    for _ in trainer.run():
        pass
    for name, value in trainer.model.encoder.state_dict().items():
        torch.testing.assert_close(value, start.encoder.state_dict()[name], rtol=0, atol=1e-6)


def test_a_frozen_encoder_stays_to_the_last_bit_while_the_unet_learns(
    finished: Trainer, store: TissueStore, scgpt_folder: Path, tmp_path: Path
):
    config = replace(TRAIN, steps=3, freeze_encoder=True)
    trainer = Trainer(store, scgpt_folder, tmp_path / "b", MODEL, config, start=GE2Hist.load(finished.out))
    records = [record for record in trainer.run() if record.stage == "main"]
    assert all(record.terms["loss"] == record.terms["cdm"] for record in records)
    before, after = weights(finished.out), weights(tmp_path / "b")
    assert before["vae"] == after["vae"] and before["unet/condition"] != after["unet/condition"]


def test_another_encoder_gets_vaes_of_its_own_and_keeps_the_pictures_of_the_start(
    finished: Trainer, store: TissueStore, scgpt_folder: Path, tmp_path: Path
):
    other = tmp_path / "scgpt"
    shutil.copytree(scgpt_folder, other)
    state = torch.load(other / "best_model.pt", weights_only=True)
    torch.save({name: value * 1.01 for name, value in state.items()}, other / "best_model.pt")
    start, config = GE2Hist.load(finished.out), replace(TRAIN, steps=1, freeze_encoder=True, learning_rate=1e-12)
    trainer = Trainer(store, other, tmp_path / "b", MODEL, config, start=start)
    stages = {record.stage for record in trainer.run()}
    assert {"vae", "states"} <= stages and "autoencoder" not in stages
    for part, kept in (("autoencoder", True), ("denoiser", True), ("encoder", False)):
        ours, theirs = (getattr(model, part).state_dict() for model in (trainer.model, start))
        same = all(torch.allclose(value, theirs[name], rtol=0, atol=1e-3) for name, value in ours.items())
        assert same == kept, part


def test_a_finished_run_resumed_still_knows_its_steps(finished: Trainer, store: TissueStore, scgpt_folder: Path):
    trainer = Trainer(store, scgpt_folder, finished.out, MODEL, TRAIN)
    assert list(trainer.run()) == []
    assert GE2Hist.load(finished.out).report["steps"] == TRAIN.steps


def test_a_bundle_that_does_not_fit_is_no_start(finished: Trainer, store: TissueStore, scgpt_folder: Path, tmp_path):
    start = GE2Hist.load(finished.out)
    with pytest.raises(BadInput, match="has another vae_hidden than this run"):
        Trainer(store, scgpt_folder, tmp_path / "b", replace(MODEL, vae_hidden=9), TRAIN, start=start)
    held_out = store.split()["test"][0]
    start.report["donors"]["train"] = [held_out]
    with pytest.raises(BadInput, match=f"has learned from donor '{held_out}', which this store holds out"):
        Trainer(store, scgpt_folder, tmp_path / "b", MODEL, TRAIN, start=start)


# --- equation (9) ----------------------------------------------------------------------------------------------------


def objective_and_batch(config: TrainConfig, t: int = 400) -> tuple[MainObjective, dict[str, torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = MainObjective(StateEncoder(MODEL), Denoiser(MODEL), MODEL, config)
    n, shape = 4, (4, 2, 16, 16)
    return objective, {
        "embedding": rng.normal(0, "embedding", (n, 16)),
        "label": torch.tensor([0, 3, 9, 3]),
        "neighbours": rng.normal(0, "neighbours", (n, 10)),
        "latent": rng.normal(0, "latent", shape),
        "noise": rng.normal(0, "noise", shape),
        "t": torch.full((n,), t),
        "eps_c": rng.normal(0, "eps_c", (n, 3)),
        "eps_e": rng.normal(0, "eps_e", (n, 2)),
        "drop": torch.tensor([True, False, False, False]),
    }


def test_the_loss_is_equation_9_plus_the_named_terms():
    config = TrainConfig(beta=0.2, gamma=0.1, type_prior=0.7, type_leak=0.4, reconstruction=0.05, neighbours=0.6)
    objective, batch = objective_and_batch(config)
    terms = objective(batch)
    expected = terms["cdm"] + 0.2 * terms["cls"] + 0.1 * terms["kl"]
    expected = expected + 0.7 * terms["prior"] + 0.4 * terms["leak"] + 0.05 * terms["rec"]
    expected = expected + 0.6 * terms["neighbours"]
    torch.testing.assert_close(terms["loss"], expected)


@pytest.mark.parametrize("t", [0, 400, 999])
def test_the_diffusion_loss_is_equation_8_weighted_by_one_over_alphabar(t: int):
    """||v_theta - v||^2 = ||eps_theta - eps||^2 / alphabar_t for eps_theta = sigma x_t + alpha v_theta."""
    objective, batch = objective_and_batch(TrainConfig(), t)
    with torch.inference_mode():
        bar = alphas_cumprod(1000)[t]
        alpha, sigma = bar**0.5, (1 - bar) ** 0.5
        x_t = alpha * batch["latent"].double() + sigma * batch["noise"].double()
        q_c, q_e = objective.state.encoder(batch["embedding"])
        z = torch.cat([q_c.loc + q_c.scale * batch["eps_c"], q_e.loc + q_e.scale * batch["eps_e"]], 1)
        v = objective.denoiser(x_t.float(), batch["t"], z, batch["drop"])
        eps = sigma * x_t + alpha * v.double()
        expected = (eps - batch["noise"].double()).square().mean() / bar
        assert float(objective(batch)["cdm"]) == pytest.approx(float(expected), rel=1e-4)


def test_every_weight_gets_a_finite_gradient_from_the_main_loss():
    objective, batch = objective_and_batch(TrainConfig())
    objective(batch)["loss"].backward()
    for name, weight in objective.named_parameters():
        assert weight.grad is not None and torch.isfinite(weight.grad).all(), name
        assert weight.grad.abs().sum() > 0, name


def test_the_encoder_learns_from_the_pictures_and_the_classifier_from_the_labels_alone():
    objective, batch = objective_and_batch(TrainConfig())
    objective(batch)["cdm"].backward()
    assert objective.state.encoder.niche_vae.encoder[0].weight.grad.abs().sum() > 0
    assert objective.state.encoder.type_vae.encoder[0].weight.grad.abs().sum() > 0
    assert objective.state.encoder.type_vae.classifier[0].weight.grad is None


def test_the_neighbours_teach_z_e_and_leave_z_c_alone():
    objective, batch = objective_and_batch(TrainConfig())
    objective(batch)["neighbours"].backward()
    assert objective.state.encoder.niche_vae.encoder[0].weight.grad.abs().sum() > 0
    assert objective.state.encoder.type_vae.encoder[0].weight.grad is None


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_hold_training_donors_only_and_rare_types_by_the_square_root(finished: Trainer):
    picks = np.concatenate([finished._state_batch(finished._stream("x", step))[0] for step in range(2000)])
    rows = finished.rows["train"]
    allowed = finished.store.split()["train"]
    assert set(finished.store.cells.donor[rows]) <= set(allowed)
    label = finished.label[rows]
    root = np.sqrt(np.bincount(label, minlength=10))
    seen = np.bincount(label[picks], minlength=10) / len(picks)
    np.testing.assert_allclose(seen, root / root.sum(), atol=4 * 0.5 / np.sqrt(len(picks)))


def test_labels_follow_the_order_of_the_models_types(finished: Trainer):
    named = np.array(MODEL.cell_types, dtype=object)[finished.label]
    np.testing.assert_array_equal(named, finished.store.cells.cell_type)


def test_neighbours_are_root_counts_standardised_over_training_cells(finished: Trainer):
    rows, kinds = finished.rows, list(MODEL.cell_types)
    some = np.concatenate([rows["train"][:2], rows["test"][:2]])
    counts = finished.store.neighbour_counts(rows["train"])
    mean, std = np.sqrt(counts).mean(axis=0), np.sqrt(counts).std(axis=0)
    order = [finished.store.cell_types.index(name) for name in kinds]
    expected = (np.sqrt(finished.store.neighbour_counts(some)) - mean) / np.maximum(std, 1e-6)
    np.testing.assert_allclose(finished.neighbours[some], expected[:, order], atol=1e-5)
    assert set(finished.model.report["separation"]["neighbours_r2"]) == set(kinds)
    # The model's guess is on the scale of counts: the standardised root counts turned back.
    guess = finished.model.expected_neighbours(finished.model.encode(finished.embedding[some]))
    z = finished.model.encode(finished.embedding[some])
    parts = torch.from_numpy(z.z_c), torch.from_numpy(z.z_e)
    standard = finished.model.encoder.niche_vae.expected_neighbours(*parts).numpy()
    root = standard * np.maximum(std, 1e-6)[order] + mean[order]
    np.testing.assert_allclose(guess, np.maximum(root, 0) ** 2, rtol=1e-4, atol=1e-6)


def test_a_batch_depends_on_its_step_alone_and_its_times_cover_the_range(finished: Trainer):
    a, b, other = finished._main_batch(5), finished._main_batch(5), finished._main_batch(6)
    for name in a:
        assert torch.equal(a[name], b[name])
    assert not torch.equal(a["noise"], other["noise"])
    thirds = [finished._main_batch(step)["t"].numpy() * 3 // 1000 for step in range(20)]
    assert all(times.tolist() == [0, 1, 2] for times in thirds)


def test_latents_are_those_of_the_turned_tiles(finished: Trainer):
    row = finished.rows["train"][:1]
    tile = finished.store.tiles(row)
    encode = finished.model.autoencoder.encode
    np.testing.assert_allclose(finished.latents[0, 0], encode(tile)[0], atol=5e-3)
    np.testing.assert_allclose(finished.latents[0, 1], encode(dihedral(tile, 5))[0], atol=5e-3)


def test_the_eight_elements_are_the_symmetries_of_the_square():
    tile = rng.stream(0, "tile").integers(0, 256, (1, 4, 4, 3), dtype=np.uint8)
    images = {dihedral(tile, k).tobytes() for k in range(8)}
    assert len(images) == 8
    np.testing.assert_array_equal(dihedral(tile, 0), tile)
    np.testing.assert_array_equal(dihedral(tile, 1)[0, 0], tile[0, :, -1])
    for k in range(8):
        for j in range(8):
            assert dihedral(dihedral(tile, k), j).tobytes() in images


def test_learning_rate_warms_up_stays_and_ends_at_zero():
    rates = [learning_rate(step, 100, 10, 1.0) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_trains_refuses_to_overwrite_and_resumes(
    data: Path, scgpt_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(configuration.PRESETS, "demo", Preset(MODEL, TRAIN))
    monkeypatch.setattr("os.cpu_count", lambda: torch.get_num_threads())
    train = ["train", str(data), "--scgpt", str(scgpt_folder), "--out", str(tmp_path / "b")]
    assert run_command("ge2hist", "", COMMANDS, [*train, "--steps", "2"]) == 0
    assert GE2Hist.load(tmp_path / "b").report["steps"] == 2
    assert run_command("ge2hist", "", COMMANDS, train) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert run_command("ge2hist", "", COMMANDS, [*train, "--steps", "3", "--resume"]) == 0
    assert GE2Hist.load(tmp_path / "b").report["steps"] == 3
    assert run_command("ge2hist", "", COMMANDS, [*train, "--steps", "0"]) == 2
    assert "--steps is 0: give at least 1" in capsys.readouterr().err
