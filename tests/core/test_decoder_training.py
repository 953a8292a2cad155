"""Training the decoder on: grain, the critic, what changes in a bundle and what must not."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ge2hist_core import rng
from ge2hist_core.__main__ import COMMANDS, run_command
from ge2hist_core.autoencoder import TileAutoencoder, from_uint8
from ge2hist_core.config import ModelConfig, TrainConfig
from ge2hist_core.decoder_training import ADVERSARIAL, DecoderObjective, PatchCritic, train_decoder
from ge2hist_core.model import GE2Hist
from ge2hist_core.simulator.command import simulate_sections
from ge2hist_core.simulator.expression import load_genes
from ge2hist_core.store import TissueStore, write_store
from ge2hist_core.training import Trainer
from ge2hist_core.types import BadInput

MODEL = ModelConfig(
    embedding_dim=16, d_c=3, d_e=2, vae_hidden=8, ae_channels=(8, 8), latent_channels=2, unet_channels=(8, 8),
    condition_tokens=2, condition_dim=8, attention_heads=2, time_embedding_dim=16,
)  # fmt: skip
TRAIN = TrainConfig(
    steps=1, batch_size=3, warmup_steps=2, vae_steps=1, state_steps=1, autoencoder_steps=4, autoencoder_batch=2,
    checkpoint_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tissue.zarr"
    simulation = {"seed": 3, "donors": [0, 1, 2, 3], "size_um": 96.0}
    write_store(path, simulate_sections(3, range(4), 96.0), list(load_genes().symbols), simulation=simulation)
    return path


@pytest.fixture(scope="module")
def bundle(data: Path, scgpt_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "bundle"
    for _ in Trainer(TissueStore(data), scgpt_folder, out, MODEL, TRAIN).run():
        pass
    return out


def objective(seed: int = 0) -> tuple[DecoderObjective, dict[str, torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        part, critic = TileAutoencoder(replace(MODEL, grain=True)), PatchCritic(4)
    g = rng.stream(seed, "batch")
    batch = {
        "tiles": torch.from_numpy(g.integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)),
        "noise": torch.from_numpy(g.standard_normal((2, 2, 16, 16), dtype=np.float32)),
        "grain": torch.from_numpy(g.standard_normal((2, 48, 32, 32), dtype=np.float32)),
    }
    # Evaluating, so that the spectral norm does not move from call to call.
    return DecoderObjective(part, critic, TRAIN.latent_noise).eval(), batch


def test_a_decoder_without_grain_draws_as_it_did_once_grain_is_added():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        old, new = TileAutoencoder(MODEL), TileAutoencoder(replace(MODEL, grain=True))
    new.load_state_dict({**new.state_dict(), **old.state_dict()})
    latents = rng.normal(0, "latents", (2, 2, 16, 16))
    np.testing.assert_array_equal(old.decode(latents), new.decode(latents))
    torch.nn.init.ones_(new.grain_gate.bias)
    drawn = new.decode(latents)
    assert (drawn != old.decode(latents)).any()
    np.testing.assert_array_equal(drawn, new.decode(latents), "the grain is the same each time")


def test_each_side_learns_from_its_own_term_and_the_encoder_from_none():
    together, batch = objective()
    terms = together(batch)
    terms["loss"].backward()
    part = together.autoencoder
    assert all(p.grad is None for p in part.encoder.parameters())
    learned = [*part.decoder.parameters(), *part.grain_gate.parameters(), *together.critic.parameters()]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learned)
    whole = {name: p.grad.clone() for name, p in together.named_parameters() if p.grad is not None}

    together.zero_grad(set_to_none=True)
    again = together(batch)
    again["critic"].backward(retain_graph=True)
    assert all(p.grad is None for p in part.parameters()), "the critic's term must not reach the decoder"
    for name, p in together.critic.named_parameters():
        torch.testing.assert_close(p.grad, whole[f"critic.{name}"], msg=name)
    together.zero_grad(set_to_none=True)
    (again["rec"] + again["balance"] * again["adversarial"]).backward()
    assert all(p.grad is None for p in together.critic.parameters()), "the decoder's terms must not reach the critic"


def test_the_balance_makes_the_critics_pull_a_set_share_of_the_reconstructions():
    together, batch = objective()
    terms = together(batch)
    weight = together.autoencoder.decoder[-2].weight
    pulls = [torch.autograd.grad(terms[k], weight, retain_graph=True)[0].norm() for k in ("rec", "adversarial")]
    assert float(terms["balance"] * pulls[1] / pulls[0]) == pytest.approx(ADVERSARIAL, rel=1e-3)


def test_critic_terms_are_the_hinge_by_hand():
    together, batch = objective()
    terms = {name: value.detach() for name, value in together(batch).items()}
    part, real = together.autoencoder, from_uint8(batch["tiles"])
    with torch.no_grad():
        raw = part.encoder(real) + TRAIN.latent_noise * part.latent_std * batch["noise"]
        drawn = part.picture(raw, batch["grain"])
        scores = together.critic(real), together.critic(drawn)
        hinge = (1 - scores[0]).clamp_min(0).mean() + (1 + scores[1]).clamp_min(0).mean()
    assert float(terms["critic"]) == pytest.approx(float(hinge), rel=1e-4)
    assert float(terms["adversarial"]) == pytest.approx(-float(scores[1].mean()), rel=1e-4)


def test_killed_and_resumed_the_decoder_is_that_of_an_uninterrupted_run(data: Path, bundle: Path, tmp_path: Path):
    store, whole = TissueStore(data), GE2Hist.load(bundle)
    before = copy.deepcopy(whole.autoencoder.state_dict())
    records = list(train_decoder(whole, store, TRAIN, tmp_path / "a"))
    assert [r.step for r in records] == [1, 2, 3, 4]

    run = train_decoder(GE2Hist.load(bundle), store, TRAIN, tmp_path / "b")
    list(islice(run, 3))
    run.close()
    resumed = GE2Hist.load(bundle)
    assert [r.step for r in train_decoder(resumed, store, TRAIN, tmp_path / "b")] == [3, 4]
    after = whole.autoencoder.state_dict()
    for name, value in resumed.autoencoder.state_dict().items():
        assert torch.equal(value, after[name]), name
    for name, value in before.items():
        kept = name.startswith(("encoder.", "latent_"))
        assert torch.equal(value, after[name]) == kept, name


def test_the_command_writes_a_bundle_that_opens_and_loses_its_gates(data: Path, bundle: Path, tmp_path: Path, capsys):
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    argv = ["train-decoder", str(folder), str(data), "--steps", "2", "--batch-size", "2"]
    assert run_command("x", "", COMMANDS, [*argv, "--minutes", "0"]) == 0
    assert "--resume goes on" in capsys.readouterr().out
    assert not GE2Hist.load(folder).config.grain
    assert run_command("x", "", COMMANDS, argv) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert run_command("x", "", COMMANDS, [*argv, "--resume"]) == 0
    model = GE2Hist.load(folder)
    assert model.config.grain and model.gates is None and model.report["decoder"]["steps"] == 2
    assert not (folder / ".decoder").exists()


def test_the_tissue_must_be_that_of_the_bundle(bundle: Path, tmp_path: Path):
    other = tmp_path / "other.zarr"
    simulation = {"seed": 4, "donors": [0, 1, 2], "size_um": 96.0}
    write_store(other, simulate_sections(4, range(3), 96.0), list(load_genes().symbols), simulation=simulation)
    with pytest.raises(BadInput, match="is not the tissue that the bundle was trained on"):
        list(train_decoder(GE2Hist.load(bundle), TissueStore(other), TRAIN, tmp_path / "w"))
