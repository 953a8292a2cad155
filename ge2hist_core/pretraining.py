"""Train a small scGPT from scratch, in the architecture and file layout of the published ones.

The objective is scGPT's own (Cui et al. 2024, doi:10.1038/s41592-024-02201-0, Methods) on value bins (0 = not
expressed, 1..50 = rank within the cell), as mean squared errors:

- GEP: a part of the input values is masked; a decoder predicts each from the output at its token.
- GEPC (called MVC in the code of its authors): the output at ``<cls>`` alone predicts, by an inner product with a query
  made from a gene's embedding, the bin of that gene. This is what makes ``<cls>`` describe the cell.

What differs from the published training, all of it because minutes on a CPU stand in for days on GPUs:

- GEPC errors are measured along the leading principal components of the training cells' bins, each in units of its own
  standard deviation, not gene by gene: the dozen genes of a niche programme count as much as the hundreds that mark a
  cell type. All genes are asked for, expressed or not: with few counts per cell, most of what is known is *which* genes
  are on.
- Where a value may fall into several bins because many genes share it, the target is their mean (the same minimum, less
  noise); the input stays a random one.
- The start is made from the data, see :meth:`Pretrainer.start_from_data`, and there is no dropout, whose noise at
  ``<cls>`` would exceed the differences between cells for thousands of steps.
- The run is short on purpose. Cell type is readable from ``<cls>`` at once, and with more steps at this scale ``<cls>``
  specialises on it: what a linear probe reads of the niche programmes falls again after a few hundred steps.

``python -m ge2hist_core pretrain DATA.zarr --out DIR`` trains on the store's training donors and writes ``args.json``,
``vocab.json``, ``best_model.pt`` (read by :class:`ge2hist_core.embedding.ScGPT` and by the ``scgpt`` package) and
``pretraining.json`` (what was done).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ge2hist_core import rng
from ge2hist_core.config import to_json
from ge2hist_core.embedding import N_BINS, SPECIAL_TOKENS, Architecture, Encoder, ScGPT, bin_range
from ge2hist_core.files import atomic_path, write_json
from ge2hist_core.types import BadInput, Cells

__all__ = ["PretrainConfig", "Pretrainer", "Step", "linear_probe", "pretrain", "type_accuracy"]

PAD_VALUE = -2
MASK_VALUE = -1
TOP_BIN = N_BINS - 1
CHECKPOINT = "checkpoint.pt"
AXES_CELLS = 10_000
LOADING_SCALE = 0.3
POOL = 16
"""Batches whose cells are sorted by length together."""


@dataclass(frozen=True)
class PretrainConfig:
    """Sizes and course of a training run. All of it decides the weights."""

    dim: int = 256
    heads: int = 8
    hidden: int = 256
    layers: int = 3
    dropout: float = 0.0
    steps: int = 160
    batch_size: int = 32
    tokens: int = 160
    least_kept: float = 0.5
    mask_ratios: tuple[float, ...] = (0.1, 0.2, 0.3)
    learning_rate: float = 7e-4
    warmup_steps: int = 30
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 0.95
    components: int = 16
    gepc_weight: float = 1.0
    precision: str = "fp32"
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: give a whole number of at least 1.")
        if self.tokens < 2:
            raise BadInput(f"tokens is {self.tokens}: give at least 2, room for <cls> and one gene.")
        if self.precision not in ("fp32", "bf16"):
            raise BadInput(f"precision is {self.precision!r}: choose fp32 or bf16.")


@dataclass(frozen=True)
class Step:
    """Values of one training step: ``gep`` in (50 bins)^2, ``gepc`` in variances of a principal component."""

    step: int
    loss: float
    gep: float
    gepc: float
    learning_rate: float


class ExprDecoder(nn.Module):
    """Output at a token -> predicted bin, ``[..., dim]`` -> ``[...]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(dim, dim), nn.LeakyReLU(), nn.Linear(dim, dim), nn.LeakyReLU(), nn.Linear(dim, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).squeeze(-1)


class MVCDecoder(nn.Module):
    """Cells ``[cell, dim]`` and gene encodings ``[gene, dim]`` -> predicted bins ``[cell, gene]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gene2query = nn.Linear(dim, dim)
        self.W = nn.Linear(dim, dim, bias=False)

    def forward(self, cells: Tensor, genes: Tensor) -> Tensor:
        return cells @ self.W(torch.sigmoid(self.gene2query(genes))).T


class Pretrainer(Encoder):
    """The encoder with both decoders; its ``state_dict`` is the content of ``best_model.pt``."""

    def __init__(self, size: Architecture) -> None:
        super().__init__(size)
        self.decoder = ExprDecoder(size.dim)
        self.mvc_decoder = MVCDecoder(size.dim)
        nn.init.uniform_(self.encoder.embedding.weight, -0.1, 0.1)

    @torch.no_grad()
    def start_from_data(self, axes: Tensor, batch: Batch) -> None:
        """Starting values that let a small network on a CPU learn in minutes; where it ends is decided by training.

        - Value encoder: Torch's default puts all kinks near bin 0; beyond, its LayerNorm hides the bin's size. They are
          spread over the bins instead.
        - Gene embedding: the gene's loadings on the principal components (``axes``, see :func:`_axes`), turned at
          random into the whole width, on top of the random start: genes of one programme start near each other.
        - Attention: the output at ``<cls>`` is nearly the same for all cells. Its mean over a batch is taken off by the
          bias and its spread scaled to 1 (data-dependent, as Mishkin and Matas 2016, arXiv 1511.06422).
        """
        first = self.value_encoder.linear1
        first.weight.copy_(torch.where(torch.rand(first.weight.shape) < 0.5, -0.1, 0.1))
        first.bias.copy_(-first.weight[:, 0] * TOP_BIN * torch.rand(first.bias.shape))
        loadings = (axes - axes.mean(0)) / axes.std(0).clamp_min(1e-12)
        turn = torch.linalg.qr(torch.randn(self.size.dim, self.size.dim))[0][: loadings.shape[1]]
        self.encoder.embedding.weight[: len(loadings)] += LOADING_SCALE * loadings[:, : len(turn)] @ turn
        x = self.encoder(batch.ids) + self.value_encoder(batch.values)
        layer: Any  # mypy sees members of a ModuleList as tensors or modules
        for layer in self.layers:
            seen = layer.self_attn(x[:, :1], x, batch.attend)[:, 0]
            mean = seen.mean(0)
            spread = (seen - mean).square().mean().sqrt().clamp_min(1e-6)
            layer.self_attn.out_proj.weight /= spread
            layer.self_attn.out_proj.bias.copy_(-mean / spread)
            x = layer(x, x, batch.attend)

    def losses(self, batch: Batch, axes: Tensor) -> tuple[Tensor, Tensor]:
        """GEP loss, a mean over masked values in (50 bins)^2, and GEPC loss, a mean over ``axes`` (:func:`_axes`)."""
        x = self.encoder(batch.ids) + self.value_encoder(batch.values)
        x = self(x, batch.attend)
        masked = batch.values == MASK_VALUE
        gep = F.mse_loss(self.decoder(x[masked]).float() / TOP_BIN, batch.targets[masked] / TOP_BIN, reduction="sum")
        predicted = self.mvc_decoder(x[:, 0], self.encoder(batch.genes))
        gepc = ((predicted.float() - batch.all_targets) @ axes).square().mean()
        return gep / masked.sum().clamp(min=1), gepc


@dataclass(frozen=True, eq=False)
class Batch:
    """Input and targets of one step; ``<cls>`` is token 0.

    Parameters
    ----------
    ids, values, targets: ``[cell, token]``; ``values`` is a bin, ``MASK_VALUE`` or ``PAD_VALUE``.
    attend: bool ``[cell, 1, 1, token]``, or None where nothing is padded.
    genes: ``[gene]`` ids of all genes; all_targets: ``[cell, gene]`` their bins.
    """

    ids: Tensor
    values: Tensor
    targets: Tensor
    attend: Tensor | None
    genes: Tensor
    all_targets: Tensor


class _Corpus:
    """Binned cells, from which a batch is made for any step number without a history."""

    def __init__(self, cells: Cells, config: PretrainConfig) -> None:
        self.config = config
        genes = list(map(str, cells.genes))
        if len(set(genes)) < len(genes):
            twice = next(g for i, g in enumerate(genes) if g in genes[:i])
            raise BadInput(f"Gene {twice} occurs twice: sum its columns before training.")
        self.vocab = {name: i for i, name in enumerate([*genes, *SPECIAL_TOKENS])}
        lengths = np.diff(cells.counts.indptr)
        cells = cells.take(np.flatnonzero(lengths > 0))
        if not len(cells):
            raise BadInput("No cell expresses any gene: give a store with raw counts.")
        self.counts = cells.counts
        self.lengths = np.diff(self.counts.indptr)
        ranges = [bin_range(self.counts.data[start:end]) for start, end in pairwise(self.counts.indptr)]
        self.low = np.concatenate([low for low, _ in ranges]).astype(np.uint8)
        self.high = np.concatenate([high for _, high in ranges]).astype(np.uint8)
        self.batch_size = min(config.batch_size, len(cells))
        self.steps_per_epoch = len(cells) // self.batch_size
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))
        digest = hashlib.sha256("\n".join(genes).encode())
        for part in (self.counts.indptr.astype(np.int64), self.counts.indices.astype(np.int64), self.counts.data):
            digest.update(part.tobytes())
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, step: int) -> np.ndarray:
        """Cells of a step: every epoch in a new order, cells of like length together so that little is padded."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            stream = rng.stream(self.config.seed, "pretraining order", epoch)
            order = stream.permutation(len(self))[: self.steps_per_epoch * self.batch_size]
            pools = np.split(order, np.arange(POOL * self.batch_size, len(order), POOL * self.batch_size))
            alike = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
            self._epoch = (epoch, stream.permutation(alike.reshape(self.steps_per_epoch, self.batch_size)))
        return self._epoch[1][number]

    def batch(self, step: int) -> Batch:
        """Input and targets of a step, the same whenever asked for."""
        config, rows = self.config, self.rows(step)
        stream = rng.stream(config.seed, "pretraining batch", step)
        kept = stream.uniform(config.least_kept, 1.0)
        sizes = np.clip(np.round(kept * self.lengths[rows]).astype(int), 1, config.tokens - 1)
        shape = (len(rows), sizes.max() + 1)
        ids = np.full(shape, self.vocab["<pad>"])
        values = np.full(shape, PAD_VALUE, dtype=np.float32)
        targets = np.zeros(shape, dtype=np.float32)
        all_targets = np.zeros((len(rows), self.counts.shape[1]), dtype=np.float32)
        ids[:, 0] = self.vocab["<cls>"]
        for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            part = slice(self.counts.indptr[row], self.counts.indptr[row + 1])
            genes, low, high = self.counts.indices[part], self.low[part].astype(int), self.high[part].astype(int)
            middle = (low + high) / 2
            all_targets[i, genes] = middle
            chosen = stream.permutation(len(genes))[:size]
            ids[i, 1 : size + 1] = genes[chosen]
            values[i, 1 : size + 1] = stream.integers(low[chosen], high[chosen], endpoint=True)
            targets[i, 1 : size + 1] = middle[chosen]
            masked = 1 + np.flatnonzero(stream.random(size) < stream.choice(config.mask_ratios))
            values[i, masked] = MASK_VALUE
        there = np.arange(shape[1]) <= sizes[:, None]
        return Batch(
            ids=torch.from_numpy(ids),
            values=torch.from_numpy(values),
            targets=torch.from_numpy(targets),
            attend=None if there.all() else torch.from_numpy(there)[:, None, None, :],
            genes=torch.arange(self.counts.shape[1]),
            all_targets=torch.from_numpy(all_targets),
        )


def _axes(corpus: _Corpus) -> Tensor:
    """``[gene, component]``: leading principal components of the cells' mean bins, each over its standard deviation."""
    from sklearn.decomposition import PCA

    middle = (corpus.low.astype(np.float64) + corpus.high) / 2
    bins = sp.csr_matrix((middle, corpus.counts.indices, corpus.counts.indptr), shape=corpus.counts.shape)
    draw = rng.stream(corpus.config.seed, "pretraining axes")
    bins = bins[np.sort(draw.permutation(len(corpus))[:AXES_CELLS])]
    most = min(corpus.config.components, min(bins.shape) - 1)
    if most < 1:
        return torch.full((bins.shape[1], 1), 1.0 / TOP_BIN)
    pca = PCA(most, svd_solver="arpack", random_state=int(draw.integers(2**31))).fit(bins)
    scale = np.sqrt(np.maximum(pca.explained_variance_, 1e-6))
    return torch.from_numpy((pca.components_ / scale[:, None]).T.astype(np.float32))


def pretrain(
    cells: Cells,
    out: str | Path,
    config: PretrainConfig,
    *,
    resume: bool = False,
    learned_from: dict[str, Any] | None = None,
) -> Iterator[Step]:
    """Train on ``cells``, yielding each step's values; the folder is complete when the iterator ends.

    The weights depend on cells, config and number of threads alone. A checkpoint is written every
    ``config.checkpoint_every`` steps; killed at any moment and resumed, the run ends in the same weights as an
    uninterrupted one.

    Parameters
    ----------
    cells: raw counts; their genes become the vocabulary. Cells without counts are left out.
    out: folder for ``args.json``, ``vocab.json``, ``best_model.pt`` (exponential moving average of the weights).
    resume: go on from the checkpoint in ``out``, if there is one; a finished folder is left as it is.
    learned_from: provenance of the cells, kept in ``pretraining.json``.

    Raises
    ------
    BadInput: no expressed gene, a gene given twice; ``out`` holds something and ``resume`` is off; the checkpoint
        belongs to other cells or another config.
    """
    out = Path(out)
    checkpoint = out / CHECKPOINT
    if not resume and out.exists() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty: resume the run in it, or choose another folder.")
    if resume and (out / "best_model.pt").exists() and not checkpoint.exists():
        return
    corpus = _Corpus(cells, config)
    identity = {**to_json(config), "mask_ratios": list(config.mask_ratios), "data_sha256": corpus.sha256}
    axes = _axes(corpus)
    size = Architecture(len(corpus.vocab), config.dim, config.heads, config.hidden, config.layers, config.dropout)
    with _torch_seed(config.seed, "pretraining weights"):
        network = Pretrainer(size).train()
        network.start_from_data(axes, corpus.batch(0))
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    log: list[dict[str, Any]] = []
    start = 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        changed = sorted(k for k in identity if state["identity"].get(k) != identity[k])
        if changed:
            raise BadInput(f"{checkpoint} was made with another {changed[0]}: use the same, or choose another folder.")
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, log = state["step"], state["log"]

    for step in range(start, config.steps):
        rate = _learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16")
        with _torch_seed(config.seed, "pretraining dropout", step), autocast:
            gep, gepc = network.losses(corpus.batch(step), axes)
        loss = gep + config.gepc_weight * gepc
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        record = Step(step, loss.item(), gep.item(), gepc.item(), rate)
        log.append(to_json(record))
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            state = {"network": network.state_dict(), "average": average.state_dict(), "log": log, "step": step + 1}
            with atomic_path(checkpoint) as temporary:
                torch.save({**state, "optimizer": optimizer.state_dict(), "identity": identity}, temporary)
        yield record

    _write_folder(out, average, corpus, config, log, learned_from)
    checkpoint.unlink(missing_ok=True)


def _write_folder(
    out: Path,
    network: Pretrainer,
    corpus: _Corpus,
    config: PretrainConfig,
    log: list[dict[str, Any]],
    learned_from: dict[str, Any] | None,
) -> None:
    args = {
        "embsize": config.dim,
        "nheads": config.heads,
        "d_hid": config.hidden,
        "nlayers": config.layers,
        "n_layers_cls": 3,
        "dropout": config.dropout,
        "n_bins": N_BINS,
        "max_seq_len": 1200,
        "input_style": "binned",
        "input_emb_style": "continuous",
        "pad_token": "<pad>",
        "pad_value": PAD_VALUE,
        "mask_value": MASK_VALUE,
        "MVC": True,
    }
    write_json(out / "args.json", args)
    write_json(out / "vocab.json", corpus.vocab)
    tail = log[-max(1, len(log) // 10) :]
    report = {
        "config": to_json(config),
        "cells": len(corpus),
        "genes": corpus.counts.shape[1],
        "data_sha256": corpus.sha256,
        "learned_from": learned_from,
        "final": {name: float(np.mean([row[name] for row in tail])) for name in ("loss", "gep", "gepc")},
        "log": log[:: max(1, len(log) // 200)],
    }
    write_json(out / "pretraining.json", report)
    with atomic_path(out / "best_model.pt") as temporary:
        torch.save({key: value.contiguous() for key, value in network.state_dict().items()}, temporary)


def linear_probe(known: np.ndarray, labels: np.ndarray, asked: np.ndarray, penalty: float = 1e-3) -> np.ndarray:
    """Labels of ``asked`` by ridge regression from embedding to one-hot label: what is *linearly* readable.

    Parameters
    ----------
    known, asked: ``[cell, dim]`` embeddings; labels: ``[cell]`` of ``known``.
    penalty: per cell, on weights of standardised features.

    Returns
    -------
    ``[cell]`` label of each asked cell.
    """
    classes, code = np.unique(labels.astype(str), return_inverse=True)
    mean, scale = known.mean(axis=0), known.std(axis=0) + 1e-12
    x = (known - mean) / scale
    y = np.eye(len(classes))[code]
    weights = np.linalg.solve(x.T @ x + penalty * len(x) * np.eye(x.shape[1]), x.T @ (y - y.mean(axis=0)))
    return classes[np.argmax((asked - mean) / scale @ weights + y.mean(axis=0), axis=1)]


def _learning_rate(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@contextmanager
def _torch_seed(seed: int, name: str, *index: int) -> Iterator[None]:
    """Torch's own draws (initial weights, dropout) inside come from one named stream; outside they are untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.stream(seed, name, *index).integers(2**63)))
        yield


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = PretrainConfig()
    parser.add_argument("data", type=Path, metavar="DATA.zarr")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=default.precision)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in DIR")


def main(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ge2hist_core.store import TissueStore

    store = TissueStore(args.data)
    split = store.split()
    config = PretrainConfig(steps=args.steps, batch_size=args.batch_size, seed=args.seed, precision=args.precision)
    train = store.cells.take(store.rows(split["train"], interior=False))
    with tqdm(total=config.steps, unit="step", desc="pretrain") as bar:
        for step in pretrain(train, args.out, config, resume=args.resume, learned_from=store.provenance):
            bar.update(step.step + 1 - bar.n)
            bar.set_postfix(gep=f"{step.gep:.4f}", gepc=f"{step.gepc:.4f}")
    held_out = store.cells.take(store.rows(split["validation"], interior=False))
    if train.cell_type is not None and len(held_out):
        accuracy = type_accuracy(ScGPT.load(args.out), train, held_out, config.seed)
        print(f"cell type of held-out donors by a linear probe: accuracy {accuracy:.3f}")


def type_accuracy(model: ScGPT, known: Cells, asked: Cells, seed: int) -> float:
    """How well types are linearly readable: fraction of at most 1,000 ``asked`` cells right after fitting 3,000 known.

    Cells without any gene known to ``model`` are left out.
    """
    stream = rng.stream(seed, "type probe")
    embeddings, types = [], []
    for cells, most in ((known, 3000), (asked, 1000)):
        some = cells.take(np.sort(stream.permutation(len(cells))[:most]))
        values = model.embed(some, seed, on_empty="nan")
        seen = np.isfinite(values).all(axis=1)
        embeddings.append(values[seen])
        types.append(np.asarray(some.cell_type)[seen])
    found = linear_probe(embeddings[0], types[0], embeddings[1])
    return float(np.mean(found == types[1]))
