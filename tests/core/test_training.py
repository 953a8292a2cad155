"""Training: equation (9) term by term, batches, and that a killed run ends where an uninterrupted one does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ge2hist_core import config as configuration
from ge2hist_core import rng, training
from ge2hist_core.__main__ import COMMANDS, run_command
from ge2hist_core.config import ModelConfig, Preset, TrainConfig, to_json
from ge2hist_core.denoiser import Denoiser
from ge2hist_core.model import GE2Hist
from ge2hist_core.sampler import alphas_cumprod
from ge2hist_core.store import TissueStore, write_store
from ge2hist_core.training import MainObjective, Trainer, class_weights, dihedral, learning_rate, limited_rows
from ge2hist_core.training_cost import Gpu, hours, stage_costs, training_macs
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
    expected = r"other data or settings \(beta was 0.2, now it is 0.3\): use the same, or choose another --out"
    with pytest.raises(BadInput, match=expected):
        list(other.run())


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


# --- parts, processes, workers, precision ----------------------------------------------------------------------------

EVEN = replace(TRAIN, batch_size=4, autoencoder_batch=4)
"""Batches that two can share."""


def losses(out: Path, stage: str) -> np.ndarray:
    """``[step, term]`` of a stage's log."""
    return np.genfromtxt(out / ".work" / f"{stage}.csv", delimiter=",", skip_header=1)


@pytest.fixture(scope="module")
def alone(store: TissueStore, scgpt_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """One process, whole batches."""
    trainer = Trainer(store, scgpt_folder, tmp_path_factory.mktemp("alone") / "b", MODEL, EVEN)
    for _ in trainer.run():
        pass
    return trainer


def assert_same_curves(out: Path, reference: Path) -> None:
    """Rounding differs in the seventh digit of a gradient, and Adam carries it on: 2e-3 of a term, or 2e-4."""
    for stage in ("autoencoder", "vae", "states", "main"):
        ours, theirs = losses(out, stage), losses(reference, stage)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4, err_msg=stage)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_parts_learn_as_the_whole_batch(
    alone: Trainer, store: TissueStore, scgpt_folder: Path, tmp_path: Path, accumulation: int
):
    config = replace(EVEN, accumulation=accumulation)
    for _ in Trainer(store, scgpt_folder, tmp_path / "b", MODEL, config).run():
        pass
    assert_same_curves(tmp_path / "b", alone.out)


def test_any_number_of_workers_ends_in_the_same_bits(
    alone: Trainer, store: TissueStore, scgpt_folder: Path, tmp_path: Path
):
    for _ in Trainer(store, scgpt_folder, tmp_path / "b", MODEL, replace(EVEN, workers=3)).run():
        pass
    assert weights(tmp_path / "b") == weights(alone.out)


def test_a_batch_that_cannot_be_cut_evenly_is_refused(store: TissueStore, scgpt_folder: Path, tmp_path: Path):
    with pytest.raises(BadInput, match="batch_size is 4, which 1 processes with 3 .* choose a multiple of 3"):
        Trainer(store, scgpt_folder, tmp_path / "b", MODEL, replace(EVEN, accumulation=3))


def launched(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """``accelerate launch -m ge2hist_core train`` on two CPU processes, with one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"]
    return subprocess.run(
        [sys.executable, *launch, "-m", "ge2hist_core", "train", *arguments],
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip


def test_two_processes_have_the_loss_curve_of_one_and_one_goes_on_from_two(
    alone: Trainer, data: Path, store: TissueStore, scgpt_folder: Path, tmp_path: Path
):
    (tmp_path / "c.json").write_text(json.dumps({"model": to_json(MODEL), "train": to_json(EVEN)}))
    arguments = [str(data), "--scgpt", str(scgpt_folder), "--config", str(tmp_path / "c.json")]
    done = launched([*arguments, "--out", str(tmp_path / "b"), "--minutes", "0"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"classifier_accuracy":') == 1, "the main process alone prints"
    assert len((tmp_path / "b" / ".work" / "main.csv").read_text().splitlines()) == 2
    shutil.copytree(tmp_path / "b", tmp_path / "two")
    records = list(Trainer(store, scgpt_folder, tmp_path / "b", MODEL, EVEN).run())
    assert [r.step for r in records] == [2, 3, 4, 5, 6, 7], "one process goes on from two"
    assert_same_curves(tmp_path / "b", alone.out)
    done = launched([*arguments, "--out", str(tmp_path / "two"), "--resume"])
    assert done.returncode == 0, done.stderr
    assert_same_curves(tmp_path / "two", alone.out)
    latents = [np.load(out / ".work" / "latents.npy").astype(np.float32) for out in (tmp_path / "two", alone.out)]
    np.testing.assert_allclose(*latents, atol=0.02)


def test_bf16_keeps_weights_in_float32_and_stays_near(
    alone: Trainer, store: TissueStore, scgpt_folder: Path, tmp_path: Path
):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # accelerate fixes the precision once per process
    try:
        trainer = Trainer(store, scgpt_folder, tmp_path / "b", MODEL, replace(EVEN, mixed_precision="bf16"))
        for _ in trainer.run():
            pass
    finally:
        AcceleratorState._reset_state()
    main = torch.load(trainer.work / "main.pt", weights_only=True)["objective"]
    assert {value.dtype for value in main.values()} == {torch.float32}
    ours, theirs = losses(tmp_path / "b", "main"), losses(alone.out, "main")
    assert (ours != theirs).any()
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=0.05)


# --- rare types ------------------------------------------------------------------------------------------------------


def shares(label: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    weight = class_weights(label, alpha, beta)
    return np.bincount(label, weights=weight) / weight.sum()


def test_the_weights_of_38_unequal_types_follow_the_stated_power():
    n = np.maximum(1, 20000 * 0.75 ** np.arange(38)).astype(int)
    label = np.repeat(np.arange(38), n)
    for alpha in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(shares(label, alpha, 1.0), n ** (1 - alpha) / (n ** (1 - alpha)).sum(), rtol=1e-9)
    # The effective number is the sum of a geometric series (Cui et al. 2019, proposition 1).
    series = np.array([(0.99 ** np.arange(k)).sum() for k in n])
    np.testing.assert_allclose(shares(label, 1.0, 0.99), n / series / (n / series).sum(), rtol=1e-9)


def test_the_default_weights_are_the_inverse_square_root_to_the_last_bit():
    label = np.repeat(np.arange(10), rng.stream(0, "sizes").integers(1, 9999, 10))
    expected = 1 / np.sqrt(np.bincount(label)[label])
    assert class_weights(label, 0.5, 1.0).tobytes() == expected.tobytes()


def test_rare_types_are_kept_beyond_the_limit_of_a_donor(store: TissueStore):
    rows = store.rows(store.donors)

    def kept(least: int) -> np.ndarray:
        config = TrainConfig(cells_per_donor=2, cells_per_type=least)
        return limited_rows(store, rows, config)

    table = store.obs.iloc[kept(1)]
    assert set(kept(0)) <= set(kept(1)) and len(np.unique(kept(1))) == len(kept(1))
    there = store.obs.iloc[rows]
    assert set(zip(table["donor"], table["cell_type"], strict=True)) == set(
        zip(there["donor"], there["cell_type"], strict=True)
    )


def test_balanced_accuracy_is_the_mean_recall(finished: Trainer):
    report, right = finished.separation(), finished._right("test")
    label = finished.label[finished.rows["test"]]
    recall = report["classifier_recall"]
    assert set(recall) == {MODEL.cell_types[kind] for kind in np.unique(label)}
    n = {MODEL.cell_types[kind]: (label == kind).sum() for kind in np.unique(label)}
    assert sum(recall[name] * n[name] for name in n) == pytest.approx(right.sum())
    assert report["classifier_balanced_accuracy"] == pytest.approx(np.mean(list(recall.values())))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("mixed_precision", "fp8", "choose no or bf16"),
        ("class_alpha", -1.0, "from 0 to 2"),
        ("class_beta", 0.0, "above 0"),
        ("accumulation", 0, "whole number from 1"),
        ("workers", -1, "whole number from 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: object, text: str):
    with pytest.raises(BadInput, match=f"{field} is {value!r}: choose .*{text}|{field} is {value!r}: {text}"):
        replace(TRAIN, **{field: value})


# --- what can go wrong -----------------------------------------------------------------------------------------------


def test_work_from_before_the_newer_settings_goes_on(finished: Trainer, tmp_path: Path):
    """Checkpoints of the first format know neither settings nor the fields that came later."""
    shutil.copytree(finished.out, tmp_path / "b")
    path = tmp_path / "b" / ".work" / "main.pt"
    state = torch.load(path, weights_only=True)
    known = {k: v for k, v in to_json(TRAIN).items() if k not in training._FREE and k not in training._YOUNGER}
    sizes = {k: v for k, v in to_json(MODEL).items() if k != "grain"}
    digest = hashlib.sha256(json.dumps([sizes, known, finished.model.scgpt.sha256]).encode())
    cells = finished.store.cells
    for array in (cells.counts.data, cells.counts.indices, cells.counts.indptr):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update("\n".join(cells.cell_id).encode())
    digest.update(finished.store.tiles(finished.rows["train"][:8]).tobytes())
    assert state["identity"] == digest.hexdigest()
    torch.save({name: value for name, value in state.items() if name != "settings"}, path)
    trainer = Trainer(finished.store, finished.model.scgpt_folder, tmp_path / "b", MODEL, replace(TRAIN, steps=8))
    assert [r.step for r in trainer.run()] == [8]


@pytest.mark.parametrize("content", [b"", b"PK no archive", None])
def test_a_damaged_checkpoint_is_named(finished: Trainer, tmp_path: Path, content: bytes | None):
    shutil.copytree(finished.out, tmp_path / "b")
    path = tmp_path / "b" / ".work" / "main.pt"
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    trainer = Trainer(finished.store, finished.model.scgpt_folder, tmp_path / "b", MODEL, TRAIN)
    with pytest.raises(BadInput, match="main.pt is damaged: delete it to repeat its stage"):
        list(trainer.run())
    path.unlink()
    assert [r.stage for r in trainer.run()] == ["main"] * TRAIN.steps


def test_a_damaged_array_is_named(finished: Trainer, tmp_path: Path):
    shutil.copytree(finished.out, tmp_path / "b")
    path = tmp_path / "b" / ".work" / "latents.npy"
    path.write_bytes(path.read_bytes()[:-1])
    trainer = Trainer(finished.store, finished.model.scgpt_folder, tmp_path / "b", MODEL, TRAIN)
    with pytest.raises(BadInput, match="latents.npy or latents.json beside it is damaged: delete both"):
        list(trainer.run())


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(finished: Trainer, tmp_path: Path):
    """The system's own limit on the size of a file stands in for the full disk: the same error by another number."""
    resource = pytest.importorskip("resource")
    shutil.copytree(finished.out, tmp_path / "b")
    path = tmp_path / "b" / ".work" / "main.pt"
    before = path.read_bytes()
    trainer = Trainer(finished.store, finished.model.scgpt_folder, tmp_path / "b", MODEL, replace(TRAIN, steps=8))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(BadInput, match="no room to write .*main.pt .*go on with --resume"):
            list(trainer.run())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".main*"))


def test_half_a_row_of_a_killed_log_is_dropped(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text("step,loss\r\n1,0.5\r\n2,0.25\r\n3,0.1\r\n1")
    log = training._Log(path)
    log.start(2)
    log.add({"step": 3, "loss": 0.125})
    log.flush()
    assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.25", "3,0.125"]


# --- presets and their cost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tile_px"), [("paper", 128), ("paper-256", 256)])
def test_the_paper_presets_have_the_papers_sizes(name: str, tile_px: int):
    preset = configuration.PRESETS[name]
    m = preset.model
    assert (m.embedding_dim, m.d_c + m.d_e, m.train_timesteps, m.tile_px) == (256, 64, 1000, tile_px)
    assert (preset.train.beta, preset.train.gamma) == (0.2, 0.1)


def test_counted_operations_are_those_of_the_layers():
    """A linear layer of a x b takes 2ab forward and 4ab backward, 2ab less where the input needs no gradient."""
    costs = {cost.stage: cost for cost in stage_costs(Preset(MODEL, TRAIN))}
    encoder = StateEncoder(MODEL)
    # q_c, both reconstructions and the classifier; the first layer's input is data.
    linear = [m for m in encoder.modules() if isinstance(m, torch.nn.Linear)]
    unused = [m for m in encoder.niche_vae.neighbours if isinstance(m, torch.nn.Linear)]
    first = [encoder.type_vae.encoder[0], encoder.niche_vae.encoder[0]]
    size = {id(m): m.in_features * m.out_features for m in linear}
    passes = 6 * sum(size.values()) - 6 * sum(size[id(m)] for m in unused) - 2 * sum(size[id(m)] for m in first)
    # The residual, made once as input and once as target, asks the classifier, forward alone, and mixes types' means.
    again = sum(2 * size[id(m)] for m in encoder.type_vae.classifier if isinstance(m, torch.nn.Linear))
    assert costs["vae"].flops_per_cell == passes + 2 * (again + 2 * 10 * 16)
    assert costs["main"].flops == costs["main"].flops_per_cell * 3 * 7
    assert hours(989e12 * 0.2 * 3600, Gpu(989.0, 0.2)) == pytest.approx(1.0)


def test_all_runs_behind_a_bundle_count_for_its_operations():
    costs = {cost.stage: cost.flops_per_cell for cost in stage_costs(Preset(MODEL, TRAIN))}
    first = {"train": to_json(TRAIN), "steps": 7}
    expected = 7 * 3 * costs["main"] + 3 * 2 * costs["autoencoder"]
    assert training_macs(MODEL, first) == expected // 2
    later = {"train": to_json(replace(TRAIN, batch_size=5)), "steps": 2, "started_from": {"training": first}}
    assert training_macs(MODEL, later) == (expected + 2 * 5 * costs["main"]) // 2
    grainy = replace(MODEL, grain=True)
    decoder = {"train": {"autoencoder_batch": 4}, "steps": 1, "started_from": None}
    once = training_macs(grainy, later | {"decoder": decoder})
    twice = training_macs(grainy, later | {"decoder": decoder | {"started_from": decoder}})
    assert 0 < twice - once == once - training_macs(grainy, later)
    assert training_macs(MODEL, {}) == 0


def test_the_command_states_the_cost_of_the_paper_and_its_assumptions(capsys: pytest.CaptureFixture[str]):
    """One real forward and backward pass of every stage at the paper's sizes."""
    train = ["train", "--preset", "paper", "--cost", "--peak-tflops", "312", "--utilisation", "0.3"]
    assert run_command("ge2hist", "", COMMANDS, train) == 0
    text = capsys.readouterr().out
    assert "on one GPU of 312 TFLOP/s at a utilisation of 30%" in text and "assumptions" in text
    main = next(line.split() for line in text.splitlines() if line.startswith("main"))
    flops, steps, asked = float(main[4]) * 1e9, int(main[5].replace(",", "")), float(main[6])
    assert steps == 400_000 and asked == pytest.approx(flops * steps / (312e12 * 0.3) / 3600, abs=0.01)


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
    refused = [*train, "--steps", "4", "--resume", "--tensorboard"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run_command("ge2hist", "", COMMANDS, refused) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert run_command("ge2hist", "", COMMANDS, ["train"]) == 2
    assert "DATA.zarr is not given" in capsys.readouterr().err
    (tmp_path / "c.json").write_text('{"train": {"batchsize": 3}}')
    assert run_command("ge2hist", "", COMMANDS, [*train, "--resume", "--config", str(tmp_path / "c.json")]) == 2
    assert "Unknown field 'batchsize' in TrainConfig" in capsys.readouterr().err
