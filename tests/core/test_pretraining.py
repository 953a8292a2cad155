"""Pre-training: its targets by hand, its losses by hand, what it learns, and that a killed run ends the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from ge2hist_core import __main__
from ge2hist_core.embedding import Architecture, ScGPT
from ge2hist_core.pretraining import (
    MASK_VALUE,
    PAD_VALUE,
    PretrainConfig,
    Pretrainer,
    _axes,
    _Corpus,
    linear_probe,
    pretrain,
    type_accuracy,
)
from ge2hist_core.store import SectionRecord, TissueStore, write_store
from ge2hist_core.types import BadInput, Cells

SMALL = PretrainConfig(
    dim=16, heads=2, hidden=16, layers=2, steps=8, batch_size=6, tokens=12, warmup_steps=2, checkpoint_every=3, ema=0.9
)
GENES = [f"GENE{i}" for i in range(30)]


def make_cells(n: int = 40, seed: int = 0) -> Cells:
    """Two types of cells with their own halves of the genes; type A's donors are as type B's."""
    draw = np.random.default_rng(seed)
    kind = np.arange(n) % 2
    rate = np.where((np.arange(len(GENES))[None] < 15) == (kind[:, None] == 0), 2.0, 0.1)
    counts = draw.poisson(rate)
    return Cells(sp.csr_matrix(counts), np.array(GENES), np.arange(n).astype(str), np.array(["A", "B"])[kind])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    out = tmp_path_factory.mktemp("run") / "scgpt"
    config = replace(SMALL, steps=150, batch_size=16, learning_rate=3e-3, components=1)
    return out, list(pretrain(make_cells(200), out, config))


def test_batches_hold_the_cells_own_bins() -> None:
    cells = make_cells()
    corpus = _Corpus(cells, SMALL)
    dense = cells.counts.toarray()
    for step in range(10):
        rows, batch = corpus.rows(step), corpus.batch(step)
        assert len(set(rows)) == SMALL.batch_size
        assert batch.ids.shape[1] <= SMALL.tokens
        assert (batch.ids[:, 0] == corpus.vocab["<cls>"]).all()
        assert (batch.values[:, 0] == PAD_VALUE).all()
        for i, row in enumerate(rows):
            padded = batch.ids[i] == corpus.vocab["<pad>"]
            assert (batch.attend is None and not padded.any()) or (batch.attend[i, 0, 0] == ~padded).all()
            genes = batch.ids[i, 1:][~padded[1:]].numpy()
            assert len(set(genes)) == len(genes)
            assert (dense[row, genes] > 0).all()
            values, targets = batch.values[i, 1:][~padded[1:]].numpy(), batch.targets[i, 1:][~padded[1:]].numpy()
            expressed = dense[row][dense[row] > 0].astype(np.float32)
            edges = np.quantile(expressed, np.linspace(0, 1, 50))
            low = np.array([min(np.sum(edges < v) + 1, np.sum(edges <= v)) for v in dense[row, genes]])
            high = np.array([np.sum(edges <= v) for v in dense[row, genes]])
            assert (((low <= values) & (values <= high)) | (values == MASK_VALUE)).all()
            np.testing.assert_array_equal(targets, (low + high) / 2)
            np.testing.assert_array_equal(batch.all_targets[i] > 0, dense[row] > 0)
            np.testing.assert_array_equal(batch.all_targets[i, genes], targets)


def test_an_epoch_visits_every_cell_once_in_a_new_order() -> None:
    corpus = _Corpus(make_cells(42), SMALL)
    epochs = [np.concatenate([corpus.rows(e * 7 + i) for i in range(7)]) for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(42))
    assert (epochs[0] != epochs[1]).any()


def test_losses_by_hand_and_every_parameter_gets_a_finite_gradient() -> None:
    torch.manual_seed(0)
    corpus = _Corpus(make_cells(), SMALL)
    net = Pretrainer(Architecture(len(corpus.vocab), 16, 2, 16, 2))
    batch = corpus.batch(0)
    axes = _axes(corpus)
    gep, gepc = net.losses(batch, axes)
    with torch.no_grad():
        out = net(net.encoder(batch.ids) + net.value_encoder(batch.values), batch.attend)
        errors = [
            ((net.decoder.fc(out[i, t])[0] - batch.targets[i, t]) / 50) ** 2
            for i, t in zip(*np.nonzero(batch.values.numpy() == MASK_VALUE), strict=True)
        ]
        assert gep.item() == pytest.approx(float(np.mean(errors)), rel=1e-5)
        query = net.mvc_decoder.W(torch.sigmoid(net.mvc_decoder.gene2query(net.encoder(torch.arange(len(GENES))))))
        missed = np.array([[float(q @ out[i, 0]) for q in query] for i in range(len(out))]) - batch.all_targets.numpy()
        along = [[float(np.dot(error, axis)) for axis in axes.numpy().T] for error in missed]
        assert gepc.item() == pytest.approx(np.mean(np.square(along)), rel=1e-4)
    (gep + gepc).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


def test_axes_are_uncorrelated_with_unit_variance_and_the_first_tells_types_apart() -> None:
    cells = make_cells(300)
    corpus = _Corpus(cells, replace(SMALL, components=5, batch_size=300))
    order = corpus.rows(0)
    along = corpus.batch(0).all_targets.numpy() @ _axes(corpus).numpy()
    np.testing.assert_allclose(np.cov(along.T), np.eye(5), atol=1e-3)
    kind = cells.cell_type[order] == "A"
    assert abs(along[kind, 0].mean() - along[~kind, 0].mean()) > 1.5
    few = _Corpus(make_cells(1), SMALL)
    assert _axes(few).shape == (len(GENES), 1)


def test_padding_changes_no_output() -> None:
    torch.manual_seed(0)
    net = Pretrainer(Architecture(len(GENES) + 3, 16, 2, 16, 2)).eval()
    x = torch.randn(2, 7, 16)
    attend = (torch.arange(7) < 5)[None, None, None].expand(2, 1, 1, 7)
    torch.testing.assert_close(net(x, attend)[:, :5], net(x[:, :5]), atol=1e-6, rtol=0)


def test_it_learns_and_the_embedding_tells_types_apart(trained: tuple[Path, list]) -> None:
    out, steps = trained
    assert [s.step for s in steps] == list(range(150))
    first, last = (np.mean([s.gepc for s in part]) for part in (steps[:5], steps[-20:]))
    knowing_only_the_mean_of_each_gene = 1.0
    assert last < 0.5 * knowing_only_the_mean_of_each_gene < first
    assert type_accuracy(ScGPT.load(out), make_cells(200), make_cells(100, seed=7), seed=0) > 0.95


def test_the_folder_is_complete_and_says_how_it_was_made(trained: tuple[Path, list]) -> None:
    out, steps = trained
    assert sorted(p.name for p in out.iterdir()) == ["args.json", "best_model.pt", "pretraining.json", "vocab.json"]
    report = json.loads((out / "pretraining.json").read_text())
    assert report["config"]["steps"] == 150
    assert report["final"]["gepc"] == pytest.approx(np.mean([s.gepc for s in steps[-15:]]))
    assert set(json.loads((out / "vocab.json").read_text())) == {*GENES, "<pad>", "<cls>", "<eoc>"}


@pytest.mark.parametrize("stop", [2, 3, 4, 7])
def test_a_killed_run_ends_in_the_same_weights(tmp_path: Path, stop: int) -> None:
    cells = make_cells()
    config = replace(SMALL, dropout=0.3)
    whole = list(pretrain(cells, tmp_path / "whole", config))
    run = pretrain(cells, tmp_path / "killed", config)
    for _ in range(stop):
        next(run)
    run.close()
    torch.manual_seed(stop)  # whatever happens to torch's own generator in between has no influence
    rest = list(pretrain(cells, tmp_path / "killed", config, resume=True))
    assert rest == whole[-len(rest) :]
    weights = [torch.load(tmp_path / name / "best_model.pt", weights_only=True) for name in ("whole", "killed")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert (tmp_path / "whole/pretraining.json").read_bytes() == (tmp_path / "killed/pretraining.json").read_bytes()
    assert list(pretrain(cells, tmp_path / "killed", config, resume=True)) == []


def test_the_seed_decides(tmp_path: Path) -> None:
    losses = [
        [s.loss for s in pretrain(make_cells(), tmp_path / str(i), replace(SMALL, seed=i // 2))] for i in range(3)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_nothing_is_overwritten_or_mixed_up(tmp_path: Path) -> None:
    run = pretrain(make_cells(), tmp_path / "out", SMALL)
    for _ in range(4):
        next(run)
    run.close()
    with pytest.raises(BadInput, match="is not empty: resume"):
        next(pretrain(make_cells(), tmp_path / "out", SMALL))
    with pytest.raises(BadInput, match="made with another learning_rate"):
        next(pretrain(make_cells(), tmp_path / "out", replace(SMALL, learning_rate=1e-5), resume=True))
    with pytest.raises(BadInput, match="made with another data_sha256"):
        next(pretrain(make_cells(seed=1), tmp_path / "out", SMALL, resume=True))


def test_cells_that_cannot_be_learnt_from_are_refused(tmp_path: Path) -> None:
    twice = Cells(np.ones((3, 2)), np.array(["A", "A"]), np.arange(3).astype(str))
    with pytest.raises(BadInput, match="Gene A occurs twice"):
        next(pretrain(twice, tmp_path / "a", SMALL))
    empty = Cells(np.zeros((3, 2)), np.array(["A", "B"]), np.arange(3).astype(str))
    with pytest.raises(BadInput, match="No cell expresses any gene"):
        next(pretrain(empty, tmp_path / "b", SMALL))


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch_size": 0}, {"tokens": 1}, {"precision": "fp16"}])
def test_configs_out_of_range_are_refused(changes: dict) -> None:
    with pytest.raises(BadInput, match=f"{next(iter(changes))} is "):
        replace(SMALL, **changes)


def test_bf16_autocast_trains_fp32_weights(tmp_path: Path) -> None:
    steps = list(pretrain(make_cells(), tmp_path / "out", replace(SMALL, steps=3, precision="bf16")))
    exact = list(pretrain(make_cells(), tmp_path / "exact", replace(SMALL, steps=3)))
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in exact], rel=0.05)
    state = torch.load(tmp_path / "out" / "best_model.pt", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_linear_probe_finds_a_plane_and_only_a_plane() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(600, 4))
    plane = np.where(x @ [1, -2, 0.5, 0] > 0, "up", "down")
    assert np.mean(linear_probe(x[:400], plane[:400], x[400:]) == plane[400:]) > 0.95
    xor = np.where(x[:, 0] * x[:, 1] > 0, "same", "other")
    assert np.mean(linear_probe(x[:400], xor[:400], x[400:]) == xor[400:]) < 0.65


def test_the_command_trains_on_the_training_donors(tmp_path: Path, capsys) -> None:
    cells = make_cells(40)
    side = 24
    labels = np.zeros((side, side), np.int32)
    places = [(x, y) for x in range(0, side, 6) for y in range(0, side, 6)][:10]
    for i, (x, y) in enumerate(places):
        labels[y : y + 4, x : x + 4] = i + 1

    def sections():
        for donor in range(4):
            part = slice(10 * donor, 10 * donor + 10)
            nuclei = pd.DataFrame(places, columns=["x", "y"]).add(2).mul(0.5).set_axis(["x_um", "y_um"], axis=1)
            nuclei["cell_type"] = np.where(cells.cell_type[part] == "A", "Fibroblast", "Endothelium")
            image = np.full((side, side, 3), 200, np.uint8)
            yield SectionRecord(f"d{donor}", image, labels, nuclei, cells.counts[part])

    write_store(tmp_path / "data.zarr", sections(), GENES)
    argv = [
        "pretrain",
        str(tmp_path / "data.zarr"),
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "2",
        "--batch-size",
        "4",
    ]
    assert __main__.run_command("x", "", __main__.COMMANDS, argv) == 0
    store = TissueStore(tmp_path / "data.zarr")
    report = json.loads((tmp_path / "out" / "pretraining.json").read_text())
    assert report["cells"] == len(store.rows(store.split()["train"], interior=False)) < 40
    assert "linear probe: accuracy" in capsys.readouterr().out
