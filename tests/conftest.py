"""A small real model and cells to run it on: random weights, every file of a bundle, nothing replaced by a stand-in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import settings

from ge2hist_core import rng
from ge2hist_core.config import CELL_TYPES, ModelConfig
from ge2hist_core.types import Cells

# The same examples on every machine, and no deadline: a busy machine is no fault of the code.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

_NAMES = (
    "CD8A CD8B CD4 CD3E CD3D MS4A1 CD79A MZB1 JCHAIN CD68 CD163 LYZ EPCAM KRT8 KRT18 KRT19 ESR1 PGR ERBB2 MKI67 TOP2A "
    "PECAM1 VWF KDR COL1A1 COL1A2 COL3A1 FAP ACTA2 TGFB1 VEGFA CXCL9 CXCL10 STAT1 HLA-DRA CDH1 HIF1A CA9 GAPDH ACTB"
)
GENES = _NAMES.split()
"""Forty genes that the small encoder knows."""

UNKNOWN_GENE = "NOTINVOCAB1"

SMALL = ModelConfig(
    embedding_dim=16,
    d_c=4,
    d_e=4,
    vae_hidden=16,
    tile_px=32,
    latent_px=4,
    latent_channels=4,
    ae_channels=(16, 16),
    unet_channels=(16, 16),
    condition_tokens=2,
    condition_dim=8,
)

LOUD = 2.0


@pytest.fixture(scope="session")
def scgpt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official-layout encoder folder with random weights: 16 numbers per cell, two layers."""
    from ge2hist_core.embedding import Architecture, Encoder

    folder = tmp_path_factory.mktemp("scgpt")
    tokens = [*GENES, "<pad>", "<cls>", "<eoc>"]
    size = {"embsize": 16, "nheads": 2, "d_hid": 16, "nlayers": 2, "n_layers_cls": 3, "dropout": 0.0}
    (folder / "args.json").write_text(json.dumps(size | {"pad_token": "<pad>", "pad_value": -2, "n_bins": 51}))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Encoder(Architecture(tokens=len(tokens), dim=16, heads=2, hidden=16, layers=2, dropout=0.0))
    torch.save(network.state_dict(), folder / "best_model.pt")
    return folder


@pytest.fixture(scope="session")
def demo_cells() -> Cells:
    """Sixty cells, six of each type, over the forty known genes and one that the encoder does not know."""
    draws = rng.stream(0, "test cells")
    mean = draws.gamma(0.4, 6.0, size=(len(CELL_TYPES), len(GENES) + 1))
    counts = draws.poisson(np.repeat(mean, 6, axis=0)).astype(np.float32)
    counts[:, GENES.index("GAPDH")] += 1  # no cell is empty
    n = len(counts)
    return Cells(
        counts=sp.csr_matrix(counts),
        genes=np.array([*GENES, UNKNOWN_GENE]),
        cell_id=np.array([f"cell-{i}" for i in range(n)]),
        cell_type=np.repeat(CELL_TYPES, 6),
        donor=np.array([f"donor-{i % 3}" for i in range(n)]),
        xy_um=draws.uniform(0, 500, size=(n, 2)),
        source="test cells",
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, scgpt_folder: Path, demo_cells: Cells) -> Path:
    """A whole bundle folder with random weights: tiles of 32 px, reader and support included."""
    from ge2hist_core.model import GE2Hist
    from ge2hist_core.nuclei import LearnedReader, ReaderNet
    from ge2hist_core.support import Support
    from ge2hist_core.vae import fit_mixture

    model = GE2Hist.untrained(SMALL, scgpt_folder)
    # Fresh weights hardly pass differences between cells on; larger ones let an edit move pixels and nuclei.
    for parameter in (*model.encoder.parameters(), *model.denoiser.parameters()):
        parameter.mul_(LOUD)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = ReaderNet(8, (8, 8, 8))
    # An untrained network is unsure everywhere; a low threshold makes its strongest positions nuclei.
    model.reader = LearnedReader(net, threshold=0.02)
    embedding = model.embed(demo_cells, 0)
    labels = np.array([model.cell_types.index(name) for name in demo_cells.cell_type])
    model.mixture = fit_mixture(model.encode(embedding).z_c, labels, len(model.cell_types), seed=0)
    model.support = Support.fit(embedding[::2], demo_cells.cell_id[::2], embedding[1::2])
    model.report = {"neighbours": {name: {"root_mean": 1.5, "root_std": 0.7} for name in model.cell_types}}
    folder = tmp_path_factory.mktemp("bundle")
    model.save(folder)
    (folder / "MODEL_CARD.md").write_text("# Test bundle\nRandom weights, <b>no</b> meaning.\n")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_folder: Path):
    """The model of :func:`tiny_folder`, loaded."""
    from ge2hist_core.model import GE2Hist

    return GE2Hist.load(tiny_folder)
