"""The scGPT reader and writer against the ``scgpt`` package's own code, where that is installed.

The package's fixed dependency torchtext has no build for current torch; of it the package needs one class, so a
stand-in takes its place here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from ge2hist_core.embedding import ScGPT, bin_range
from ge2hist_core.pretraining import PretrainConfig, pretrain
from ge2hist_core.types import Cells

INSTALL = "pip install -r requirements-dev.txt && pip install --no-deps scgpt==0.2.4"
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "scgpt"
GENES = [f"GENE{i}" for i in range(90)]

# The package's warnings (torch's old autocast, missing flash-attn, worker processes) are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


class Vocab:
    """What the package uses of ``torchtext.vocab.Vocab``: a two-way table of tokens and ids with a default id."""

    def __init__(self, vocab: Vocab | list[str]) -> None:
        self.tokens = list(vocab.tokens if isinstance(vocab, Vocab) else vocab)
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.default: int | None = None

    @property
    def vocab(self) -> Vocab:
        return self

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: str) -> bool:
        return token in self.ids

    def __getitem__(self, token: str) -> int:
        if token not in self.ids and self.default is None:
            raise RuntimeError(f"token {token} has no id and there is no default")
        return self.ids.get(token, self.default)

    def __call__(self, tokens: list[str]) -> list[int]:
        return [self[token] for token in tokens]

    def insert_token(self, token: str, index: int) -> None:
        self.tokens.insert(index, token)
        self.ids = {t: i for i, t in enumerate(self.tokens)}

    def append_token(self, token: str) -> None:
        self.insert_token(token, len(self))

    def set_default_index(self, index: int | None) -> None:
        self.default = index

    def get_stoi(self) -> dict[str, int]:
        return dict(self.ids)


@pytest.fixture(scope="module")
def official() -> Iterator[SimpleNamespace]:
    """The package's functions that are compared here."""
    if importlib.util.find_spec("scgpt") is None:
        message = f"the scgpt package is not installed: {INSTALL}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    torchtext, vocab = ModuleType("torchtext"), ModuleType("torchtext.vocab")
    vocab.Vocab = Vocab
    vocab.vocab = lambda ordered, min_freq=1: Vocab(list(ordered))
    torchtext.vocab = vocab
    before = {name: sys.modules.get(name) for name in ("torchtext", "torchtext.vocab")}
    sys.modules |= {"torchtext": torchtext, "torchtext.vocab": vocab}
    try:
        from scgpt.model import TransformerModel
        from scgpt.preprocess import binning
        from scgpt.tasks import embed_data
        from scgpt.tokenizer import GeneVocab

        yield SimpleNamespace(model=TransformerModel, binning=binning, embed=embed_data, vocab=GeneVocab)
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def distinct_counts(n: int = 9) -> anndata.AnnData:
    """Counts that are all different within a cell: nothing of the result is left to chance."""
    draw = np.random.default_rng(0)
    counts = np.array([draw.permutation(np.arange(1, len(GENES) + 1)) for _ in range(n)], dtype=np.float32)
    counts[draw.random(counts.shape) < draw.uniform(0.1, 0.9, size=(n, 1))] = 0
    counts[:, 0] = 1000
    var = pd.DataFrame({"feature_name": GENES}, index=[f"id{i}" for i in range(len(GENES))])
    return anndata.AnnData(sp.csr_matrix(counts), obs=pd.DataFrame(index=[f"cell{i}" for i in range(n)]), var=var)


def as_cells(data: anndata.AnnData) -> Cells:
    return Cells(data.X, data.var["feature_name"].to_numpy(), data.obs_names.to_numpy())


def compare(official: SimpleNamespace, folder: Path, data: anndata.AnnData, tolerance: float = 1e-5) -> None:
    cells = as_cells(data)
    theirs = official.embed(
        data.copy(), folder, gene_col="feature_name", batch_size=4, device="cpu", use_fast_transformer=False
    ).obsm["X_scGPT"]
    assert np.abs(ScGPT.load(folder).embed(cells, seed=0) - theirs).max() < tolerance


def official_folder(official: SimpleNamespace, folder: Path, heads: int, layers: int) -> Path:
    """A folder with random weights made by the package's own model class."""
    tokens = ["<pad>", *GENES, "<cls>", "<eoc>"]
    size = {"d_model": 32, "nhead": heads, "d_hid": 48, "nlayers": layers}
    vocab = official.vocab(tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(heads + layers)
        model = official.model(len(vocab), **size, vocab=vocab, pad_value=-2, do_mvc=True)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    args = {"embsize": 32, "nheads": heads, "d_hid": 48, "nlayers": layers, "n_layers_cls": 3, "dropout": 0.2}
    (folder / "args.json").write_text(json.dumps(args | {"pad_token": "<pad>", "pad_value": -2}))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    torch.save(model.state_dict(), folder / "best_model.pt")
    return folder


@pytest.mark.parametrize(("heads", "layers"), [(4, 1), (8, 3)])
def test_reader_agrees_on_checkpoints_that_the_package_writes(
    official: SimpleNamespace, tmp_path: Path, heads: int, layers: int
) -> None:
    compare(official, official_folder(official, tmp_path / "model", heads, layers), distinct_counts())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the fixture lies in shared/scgpt beside the repository")
def test_reader_agrees_on_the_shared_fixture(official: SimpleNamespace) -> None:
    compare(official, SHARED / "checkpoint_plain", anndata.read_h5ad(SHARED / "input.h5ad"))


def test_package_loads_every_weight_that_pretraining_writes(official: SimpleNamespace, tmp_path: Path) -> None:
    """Its loader drops what does not fit without a word, so names and shapes are compared first."""
    config = PretrainConfig(dim=32, heads=4, hidden=48, layers=2, steps=4, batch_size=4, tokens=20)
    folder, data = tmp_path / "model", distinct_counts()
    for _ in pretrain(as_cells(data), folder, replace(config, warmup_steps=1)):
        pass
    args = json.loads((folder / "args.json").read_text())
    vocab = official.vocab.from_file(folder / "vocab.json")
    model = official.model(
        len(vocab), args["embsize"], args["nheads"], args["d_hid"], args["nlayers"], vocab=vocab, do_mvc=True
    )
    theirs = {key: value.shape for key, value in model.state_dict().items()}
    ours = {k: v.shape for k, v in torch.load(folder / "best_model.pt", weights_only=True).items()}
    assert ours == {
        key: shape for key, shape in theirs.items() if not key.startswith(("cls_decoder.", "flag_encoder."))
    }
    compare(official, folder, data)


@pytest.mark.parametrize(
    ("draw", "bound"), [(np.zeros, 1), (lambda n: np.full(n, 1 - 1e-9), 0)], ids=["highest", "lowest"]
)
@pytest.mark.parametrize("seed", range(5))
def test_bins_span_what_the_package_can_draw(
    official: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, draw: Callable, bound: int, seed: int
) -> None:
    """With its random numbers held at either end, the package gives the highest or lowest bin of each value."""
    values = (np.random.default_rng(seed).negative_binomial(1, 0.3, 150) + 1).astype(np.float32)
    monkeypatch.setattr(np.random, "rand", draw)
    np.testing.assert_array_equal(official.binning(values, 51), bin_range(values)[bound])


def test_tied_bins_are_as_frequent_as_the_package_draws_them(
    official: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = np.random.default_rng(3).negative_binomial(1, 0.4, len(GENES)).astype(np.float32)
    n = 2000
    cells = Cells(np.tile(counts, (n, 1)), np.array(GENES), np.arange(n).astype(str))
    ours = ScGPT.load(official_folder(official, tmp_path / "model", 4, 1)).bins(cells, 0).toarray()
    monkeypatch.setattr(np.random, "rand", np.random.RandomState(0).random_sample)
    theirs = np.array([official.binning(counts, 51) for _ in range(n)])
    # A bin's standard deviation is at most 49 / sqrt(12) = 14.1; of 90 differences of means the largest is < 4 errors.
    assert np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).max() < 4 * 14.1 * np.sqrt(2 / n)
    assert np.abs(ours.std(axis=0) - theirs.std(axis=0)).max() < 1.0
