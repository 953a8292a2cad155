"""The model as a whole: same picture in any batch, bundle there and back, and what a broken bundle says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ge2hist_core import rng
from ge2hist_core.config import ModelConfig, SampleConfig
from ge2hist_core.gates import ExpressionGate, Gates, LatentGate
from ge2hist_core.model import CHUNK, GE2Hist
from ge2hist_core.sampler import Stopped
from ge2hist_core.support import Support
from ge2hist_core.types import BadInput, Cells, Latent
from ge2hist_core.vae import fit_mixture

SMALL = ModelConfig(
    embedding_dim=16, d_c=4, d_e=4, vae_hidden=16, tile_px=32, latent_px=4, latent_channels=4, ae_channels=(16, 16),
    unet_channels=(16, 16), condition_tokens=2, condition_dim=8, attention_heads=2, time_embedding_dim=16,
)  # fmt: skip
FAST = SampleConfig(steps=3)


def embeddings(n: int) -> np.ndarray:
    x = rng.stream(0, "embedding").standard_normal((n, 16)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def model(scgpt_folder: Path) -> GE2Hist:
    model = GE2Hist.untrained(SMALL, scgpt_folder, seed=1)
    z_c = model.encode(embeddings(200)).z_c
    model.mixture = fit_mixture(z_c, np.arange(200) % 10, 10, seed=0)
    cell_id = np.array([f"cell {i}" for i in range(50)], dtype=object)
    model.support = Support.fit(embeddings(80)[:50], cell_id, embeddings(80)[50:])
    model.report = {"steps": 0}
    return model


@pytest.fixture(scope="module")
def bundle(model: GE2Hist, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    model.save(folder)
    return folder


def state(n: int, model: GE2Hist) -> Latent:
    z = rng.stream(0, "state").standard_normal((n, 8)).astype(np.float32) * 2
    return Latent(z[:, :4], z[:, 4:])


@pytest.mark.parametrize("solver", ["dpm++", "ddpm"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_picture_is_the_same_in_a_batch_of_any_size_and_order(model: GE2Hist, solver: str, guidance: float):
    config = SampleConfig(solver=solver, steps=3, guidance=guidance)
    latent, seeds = state(2 * CHUNK + 1, model), list(range(2 * CHUNK + 1))
    together = model.generate(latent, seeds, config)
    assert together.shape == (2 * CHUNK + 1, 32, 32, 3) and together.dtype == np.uint8
    backwards = model.generate(latent.take(slice(None, None, -1)), seeds[::-1], config)
    np.testing.assert_array_equal(backwards[::-1], together)
    for i in (0, 3, 2 * CHUNK):
        np.testing.assert_array_equal(model.generate(latent.take([i]), [i], config)[0], together[i])


def test_pictures_answer_to_state_and_to_seed_and_to_nothing_else(model: GE2Hist):
    latent = state(2, model)
    a, b, c, d = model.generate(latent.take([0, 0, 1, 0]), [7, 7, 7, 8], FAST)
    np.testing.assert_array_equal(a, b)
    assert (a != c).any() and (a != d).any()


def test_encoding_a_cell_does_not_depend_on_the_others(model: GE2Hist):
    many = model.encode(embeddings(9))
    one = model.encode(embeddings(9)[4:5])
    np.testing.assert_array_equal(one.z_s[0], many.z_s[4])
    assert model.encode(embeddings(0)).z_s.shape == (0, 8)


def test_probabilities_of_the_types_sum_to_one(model: GE2Hist):
    probability = model.classify(state(3, model))
    assert probability.shape == (3, 10)
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-5)


def test_no_picture_is_asked_for(model: GE2Hist):
    assert model.generate(state(0, model), [], FAST).shape == (0, 32, 32, 3)


def test_a_seed_per_picture_is_required(model: GE2Hist):
    with pytest.raises(ValueError, match="2 states need as many seeds, got 1"):
        model.generate(state(2, model), [1], FAST)


def test_on_step_counts_network_calls_and_shows_the_pictures_under_way(model: GE2Hist):
    seen, last = [], {}
    latent = state(CHUNK + 2, model)

    def on_step(i, n, preview):
        seen.append((i, n, list(preview.rows)))
        last[preview.rows] = preview.images()

    out = model.generate(latent, list(range(CHUNK + 2)), FAST, on_step)
    assert [(i, n) for i, n, _ in seen] == [(i, 6) for i in range(1, 7)]
    assert seen[0][2] == list(range(CHUNK)) and seen[-1][2] == [CHUNK, CHUNK + 1]
    np.testing.assert_array_equal(np.concatenate(list(last.values())), out)


def test_on_step_stops_the_run(model: GE2Hist):
    with pytest.raises(Stopped):
        model.generate(state(1, model), [0], FAST, lambda i, n, preview: True)


def test_a_type_is_drawn_reproducibly_and_an_unknown_one_is_named(model: GE2Hist):
    np.testing.assert_array_equal(model.sample_type("B cell", 3, 5), model.sample_type("B cell", 3, 5))
    assert (model.sample_type("B cell", 3, 5) != model.sample_type("B cell", 3, 6)).any()
    assert model.sample_environment(3, 5).shape == (3, 4)
    with pytest.raises(BadInput, match="'Neuron' is unknown: choose one of Tumour epithelium"):
        model.sample_type("Neuron", 1, 0)


def test_a_bundle_without_a_reader_says_how_to_get_one(model: GE2Hist):
    with pytest.raises(BadInput, match="train-reader"):
        model.read_nuclei(np.zeros((1, 32, 32, 3), np.uint8))


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_loaded_bundle_draws_the_same_pictures_and_holds_the_same_numbers(model: GE2Hist, bundle: Path):
    loaded = GE2Hist.load(bundle)
    assert loaded.config == model.config and loaded.report == {"steps": 0}
    latent = state(3, model)
    np.testing.assert_array_equal(loaded.generate(latent, [1, 2, 3], FAST), model.generate(latent, [1, 2, 3], FAST))
    np.testing.assert_array_equal(loaded.encode(embeddings(3)).z_s, model.encode(embeddings(3)).z_s)
    np.testing.assert_array_equal(loaded.sample_type("B cell", 2, 0), model.sample_type("B cell", 2, 0))
    np.testing.assert_array_equal(loaded.support.p(embeddings(90)), model.support.p(embeddings(90)))
    assert loaded.support.cell_id.tolist() == model.support.cell_id.tolist()


def test_the_hash_follows_the_content_and_not_the_place(model: GE2Hist, bundle: Path, tmp_path: Path):
    first = GE2Hist.load(bundle).sha256
    model.save(tmp_path / "again")
    assert GE2Hist.load(tmp_path / "again").sha256 == first
    (tmp_path / "again" / "evaluation.json").write_text("{}")
    assert GE2Hist.load(tmp_path / "again").sha256 == first, "figures about a model are not the model"
    other = replace(model, encoder=GE2Hist.untrained(SMALL, model.scgpt_folder, seed=2).encoder)
    other.save(tmp_path / "other")
    assert other.sha256 != first


def test_saving_over_itself_keeps_encoder_and_foreign_files(bundle: Path, tmp_path: Path):
    shutil.copytree(bundle, tmp_path / "b")
    (tmp_path / "b" / "MODEL_CARD.md").write_text("mine")
    loaded = GE2Hist.load(tmp_path / "b")
    first = loaded.sha256
    loaded.save(tmp_path / "b")
    assert GE2Hist.load(tmp_path / "b").sha256 == first
    assert (tmp_path / "b" / "MODEL_CARD.md").read_text() == "mine"


@pytest.fixture(scope="module")
def gates(model: GE2Hist) -> Gates:
    draws = rng.stream(0, "gate cells")
    cells = Cells(draws.poisson(3.0, (60, 25)), np.array([f"G{i}" for i in range(25)]), np.arange(60).astype(str))
    kind = np.arange(60) % 10
    expression = ExpressionGate.fit(cells.take(range(40)), kind[:40], 10, cells.take(range(40, 60)), kind[40:])
    latent = model.encode(embeddings(60))
    return Gates(expression, LatentGate.fit(model.mixture, latent.take(range(40)), latent.take(range(40, 60))), None)


def test_gates_travel_with_the_bundle_and_count_in_its_hash(model: GE2Hist, gates: Gates, bundle: Path, tmp_path: Path):
    assert GE2Hist.load(bundle).gates is None
    replace(model, gates=gates).save(tmp_path / "b")
    loaded = GE2Hist.load(tmp_path / "b")
    latent = model.encode(embeddings(9))
    for found, wanted in zip(
        loaded.gates.latent.p(model.mixture, latent), gates.latent.p(model.mixture, latent), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(loaded.gates.expression.mean, gates.expression.mean)
    assert loaded.sha256 != GE2Hist.load(bundle).sha256
    loaded.save(tmp_path / "again")
    assert GE2Hist.load(tmp_path / "again").sha256 == loaded.sha256
    header = json.loads((tmp_path / "b" / "gates.json").read_text())
    (tmp_path / "b" / "gates.json").write_text(json.dumps(header | {"provenance": {"other": 1}}))
    assert GE2Hist.load(tmp_path / "b").sha256 != loaded.sha256


def test_gates_of_earlier_weights_go_when_the_bundle_is_written_anew(model: GE2Hist, gates: Gates, tmp_path: Path):
    folder = tmp_path / "b"
    replace(model, gates=gates).save(folder)
    model.save(folder)
    assert GE2Hist.load(folder).gates is None and not list(folder.glob("gates*"))
    # Gates that do not belong to the weights stop the loading, unless they are to be left aside.
    replace(model, gates=gates).save(folder)
    replace(model, encoder=GE2Hist.untrained(SMALL, model.scgpt_folder, seed=3).encoder).save(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "vae.safetensors", folder / "vae.safetensors")
    with pytest.raises(BadInput, match="fitted on another training of this bundle"):
        GE2Hist.load(folder)
    assert GE2Hist.load(folder, gates=False).gates is None


def test_untrained_weights_come_from_the_seed_and_leave_the_global_state_alone(scgpt_folder: Path, model: GE2Hist):
    import torch

    before = torch.random.get_rng_state()
    again = GE2Hist.untrained(SMALL, scgpt_folder, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in again.denoiser.state_dict().items():
        assert torch.equal(value, model.denoiser.state_dict()[name]), name


@pytest.mark.parametrize(
    "name",
    ["vae.safetensors", "autoencoder.safetensors", "unet/diffusion_pytorch_model.safetensors",
     "unet/condition.safetensors", "mixture.safetensors", "support.safetensors"],
)  # fmt: skip
def test_a_truncated_weights_file_is_named(bundle: Path, tmp_path: Path, name: str):
    shutil.copytree(bundle, tmp_path / "b")
    path = tmp_path / "b" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadInput, match=r"truncated or damaged .* copy the bundle again") as error:
        GE2Hist.load(tmp_path / "b")
    assert name.split("/")[0] in str(error.value)


@pytest.mark.parametrize("name", ["vae.safetensors", "unet/config.json", "unet/condition.safetensors"])
def test_a_missing_file_is_named(bundle: Path, tmp_path: Path, name: str):
    shutil.copytree(bundle, tmp_path / "b")
    (tmp_path / "b" / name).unlink()
    with pytest.raises(BadInput, match="The bundle lacks .*copy it whole"):
        GE2Hist.load(tmp_path / "b")


def test_weights_of_other_sizes_are_refused(bundle: Path, tmp_path: Path):
    shutil.copytree(bundle, tmp_path / "b")
    header = json.loads((bundle / "bundle.json").read_text())
    header["config"]["vae_hidden"] = 17
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(header))
    with pytest.raises(BadInput, match="vae.safetensors does not fit the sizes in bundle.json"):
        GE2Hist.load(tmp_path / "b")


def test_a_bundle_of_format_2_gives_the_niche_vae_the_whole_embedding(bundle: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "b"
    shutil.copytree(bundle, folder)
    header = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(header | {"format": 2}))
    state = load_file(folder / "vae.safetensors")
    save_file({k: v for k, v in state.items() if k not in ("type_mean", "residual_std")}, folder / "vae.safetensors")
    encoder = GE2Hist.load(folder).encoder
    embedding = torch.randn(3, encoder.embedding_mean.shape[0], generator=torch.Generator().manual_seed(0))
    expected = encoder.niche_vae.inference(encoder.standardise(embedding)).loc
    torch.testing.assert_close(encoder(embedding)[1].loc, expected)
    # A newer file must have them.
    (folder / "bundle.json").write_text(json.dumps(header))
    with pytest.raises(BadInput, match="does not fit the sizes"):
        GE2Hist.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 99, "config": {}}', "bundle format 99, this version reads 3"),
    ],
)
def test_a_bad_header_is_explained(bundle: Path, tmp_path: Path, text: str, message: str):
    shutil.copytree(bundle, tmp_path / "b")
    (tmp_path / "b" / "bundle.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        GE2Hist.load(tmp_path / "b")


def test_any_other_folder_is_refused_with_the_cure(tmp_path: Path):
    with pytest.raises(BadInput, match="is not a GE2Hist bundle .* give the folder that `train` wrote"):
        GE2Hist.load(tmp_path)
