"""Cells -> scGPT cell embeddings, from checkpoint folders as the scGPT authors publish them.

scGPT (Cui et al. 2024, doi:10.1038/s41592-024-02201-0) describes a cell by its expressed genes. Each becomes a token
(gene, bin): the gene's embedding plus an encoding of the rank bin (1..50) of its value among the cell's non-zero
values. A token ``<cls>`` goes in front, a transformer without positions mixes the tokens, and the output at ``<cls>``,
scaled to unit length, is the embedding. This is an independent reader of those folders; it neither contains nor needs
the ``scgpt`` package, which serves the tests as a second opinion.

Two steps are random: the bin of a value that many genes share, and the choice of genes in a cell with more than
``max_length`` tokens. Here each (cell, gene) has its own number for either, so a result depends neither on the other
cells nor on the order of cells or genes, and editing one gene of a cell re-draws no other.

``python -m ge2hist_core embed CELLS.h5ad --scgpt DIR --out OUT.h5ad`` writes ``obsm["X_scGPT"]``.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ge2hist_core import rng
from ge2hist_core.files import parse_json, sha256_file
from ge2hist_core.types import BadInput, Cells

__all__ = [
    "MIN_MATCH_RATE",
    "N_BINS",
    "Architecture",
    "Encoder",
    "Match",
    "ScGPT",
    "bin_range",
    "match_genes",
]

N_BINS = 51
"""Bin 0 is "not expressed", expressed genes get 1..50. Fixed in the official code."""

SPECIAL_TOKENS = ("<pad>", "<cls>", "<eoc>")

MIN_MATCH_RATE = 0.1
"""Below this :attr:`Match.rate` cells are refused: too little of them would be seen."""

FILES = ("args.json", "vocab.json", "best_model.pt")

_UNUSED = re.compile(
    r"(flag_encoder|decoder|mvc_decoder|cls_decoder|batch_encoder|grad_reverse_discriminator|pert_encoder|sim)\."
)
_OTHER_MODEL = re.compile(r"(bn|dsbn)\.")
_RENAMES = (
    (re.compile(r"^module\."), ""),
    (re.compile(r"self_attn\.(_impl\.)?Wqkv\."), "self_attn.in_proj_"),
    (re.compile(r"self_attn\._impl\."), "self_attn."),
)


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network: ``tokens`` in the vocabulary, ``dim`` width, ``hidden`` width of the feed-forward part."""

    tokens: int
    dim: int
    heads: int
    hidden: int
    layers: int
    dropout: float = 0.0


class GeneEncoder(nn.Module):
    """Token id -> LayerNorm(embedding), ``[...]`` -> ``[..., dim]``."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, dim)
        self.enc_norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.enc_norm(self.embedding(ids))


class ValueEncoder(nn.Module):
    """Bin as one real feature -> two-layer perceptron -> LayerNorm, ``[...]`` -> ``[..., dim]``."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor) -> Tensor:
        x = values.clamp(max=512).unsqueeze(-1)
        return self.dropout(self.norm(self.linear2(F.relu(self.linear1(x)))))


class Attention(nn.Module):
    """Weights of multi-head attention; rows of ``in_proj_*`` are query, key, value."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, memory: Tensor, attend: Tensor | None) -> Tensor:
        """``query [cell, q, dim]`` looks at ``memory [cell, k, dim]``; ``attend`` bool ``[cell, 1, 1, k]``, or all."""
        cells, _, dim = query.shape

        def split(x: Tensor) -> Tensor:
            return x.view(cells, -1, self.heads, dim // self.heads).transpose(1, 2)

        q = F.linear(query, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        k, v = F.linear(memory, self.in_proj_weight[dim:], self.in_proj_bias[dim:]).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=attend)
        return self.out_proj(mixed.transpose(1, 2).reshape(cells, -1, dim))


class Layer(nn.Module):
    """Post-norm transformer layer: x = norm1(x + attention(x)); x = norm2(x + linear2(relu(linear1(x))))."""

    def __init__(self, size: Architecture) -> None:
        super().__init__()
        self.self_attn = Attention(size.dim, size.heads)
        self.linear1 = nn.Linear(size.dim, size.hidden)
        self.linear2 = nn.Linear(size.hidden, size.dim)
        self.norm1 = nn.LayerNorm(size.dim)
        self.norm2 = nn.LayerNorm(size.dim)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, query: Tensor, memory: Tensor, attend: Tensor | None) -> Tensor:
        x = self.norm1(query + self.dropout(self.self_attn(query, memory, attend)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class Encoder(nn.Module):
    """The part of scGPT that embeds; its ``state_dict`` has the official key names (attention as ``in_proj_*``)."""

    def __init__(self, size: Architecture) -> None:
        super().__init__()
        self.size = size
        self.encoder = GeneEncoder(size.tokens, size.dim)
        self.value_encoder = ValueEncoder(size.dim, size.dropout)
        self.transformer_encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(size) for _ in range(size.layers))})

    @property
    def layers(self) -> nn.ModuleList:
        return self.transformer_encoder["layers"]  # type: ignore[return-value]

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """Sums of gene and value encodings ``[cell, token, dim]`` -> outputs of the same shape."""
        for layer in self.layers:
            x = layer(x, x, attend)
        return x

    def first(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """As :meth:`forward`, at the first token only, ``[cell, dim]``: the last layer costs next to nothing."""
        *body, last = self.layers
        for layer in body:
            x = layer(x, x, attend)
        return last(x[:, :1], x, attend)[:, 0]


@dataclass(frozen=True, eq=False)
class Match:
    """Which genes the encoder knows.

    Parameters
    ----------
    genes: ``[gene]`` as given.
    ids: ``[gene]`` int64 token id, -1 where unknown.
    vocabulary: number of genes that the encoder knows.
    """

    genes: np.ndarray
    ids: np.ndarray
    vocabulary: int

    @property
    def matched(self) -> int:
        return int((self.ids >= 0).sum())

    @property
    def total(self) -> int:
        return len(self.ids)

    @property
    def rate(self) -> float:
        """Matched genes as a fraction of what could match at most, the smaller of data and vocabulary.

        A whole transcriptome read by an encoder of 700 genes can match 2 % of its genes at best and still be read in
        full; a panel of 280 genes can match 280 of 60,000.
        """
        return min(1.0, self.matched / max(1, min(self.total, self.vocabulary)))

    def require(self) -> Match:
        """Self, if enough genes are known.

        Raises
        ------
        BadInput: fewer than ``MIN_MATCH_RATE`` of the genes that could match do.
        """
        if self.rate >= MIN_MATCH_RATE:
            return self
        seen = ", ".join(map(str, self.genes[:3]))
        ensembl = bool(self.total) and sum(bool(re.match(r"ENS[A-Z]*G\d", str(g))) for g in self.genes) > self.total / 2
        what = "the names are Ensembl ids" if ensembl else f"the first names are {seen}" if seen else "there are none"
        raise BadInput(
            f"Only {self.matched} of {self.total} genes are known to the encoder ({what}): "
            "put HGNC symbols in a column of var such as feature_name, or name the column that has them."
        )


def match_genes(genes: Sequence[str] | np.ndarray, vocab: Mapping[str, int]) -> Match:
    """Exact, case-sensitive look-up of gene names in a vocabulary (token -> id). Special tokens are no genes."""
    names = np.asarray(genes).astype(str).astype(object)
    known = {name: number for name, number in vocab.items() if name not in SPECIAL_TOKENS}
    return Match(names, np.array([known.get(name, -1) for name in names], dtype=np.int64), len(known))


def bin_range(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest bin of each non-zero value of one cell, ``[gene]`` int64 in 1..50.

    The 50 edges are the quantiles 0, 1/49, ..., 1 of the cell's non-zero values. A value on no edge or on one has one
    bin; a value at which several edges coincide, because many genes share it, may fall into any of the bins between.
    """
    values = np.asarray(values, dtype=np.float32)
    edges = np.quantile(values, np.linspace(0, 1, N_BINS - 1))
    high = np.searchsorted(edges, values, side="right")
    low = np.searchsorted(edges, values, side="left")
    return np.minimum(low + 1, high), high


class ScGPT:
    """A pre-trained scGPT that embeds cells. Make one with :meth:`load`.

    Attributes
    ----------
    dim: length of an embedding.
    vocab: token -> id, genes and special tokens.
    sha256: of the folder's three files, for provenance.
    """

    def __init__(self, network: Encoder, vocab: dict[str, int], pad_token: str, pad_value: float, sha256: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.vocab = vocab
        self.pad_id = vocab[pad_token]
        self.pad_value = pad_value
        self.sha256 = sha256
        weight = network.encoder.embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        # Values are 1..50 or pad_value, so the value encoder is a table; row 0 is pad_value.
        values = torch.arange(N_BINS, dtype=torch.float32)
        values[0] = pad_value
        with torch.inference_mode():
            self._value_table = network.value_encoder(values.to(weight))

    @property
    def dim(self) -> int:
        return self.network.size.dim

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ScGPT:
        """Read ``args.json``, ``vocab.json`` and ``best_model.pt`` of an official folder.

        Attention weights may be named ``in_proj_*``, ``Wqkv.*`` or ``_impl.Wqkv.*``. Weights of heads that embedding
        does not use are ignored; every other key must be there with the right shape, and no further key may be.

        Parameters
        ----------
        dtype: float32 is exact. ``torch.bfloat16`` changes an embedding's direction slightly (cosine to float32 above
            0.999) and pays only on processors with matrix units for it; on others it is several times slower.

        Raises
        ------
        BadInput: not such a folder, a truncated or incomplete file, or another kind of model.
        """
        folder = Path(folder)
        for name in FILES:
            if not (folder / name).is_file():
                raise BadInput(
                    f"{folder} is no scGPT folder, {name} is missing: give the folder that holds {', '.join(FILES)}."
                )
        args = _read_args(folder / "args.json")
        vocab = _read_vocab(folder / "vocab.json")
        if args["pad_token"] not in vocab:
            raise BadInput(
                f"pad_token is {args['pad_token']!r} in {folder / 'args.json'}, which vocab.json does not hold: "
                "use the files of one checkpoint."
            )
        size = Architecture(len(vocab), args["embsize"], args["nheads"], args["d_hid"], args["nlayers"])
        with torch.device("meta"):
            network = Encoder(size)
        weights = _read_weights(folder / "best_model.pt", {k: v.shape for k, v in network.state_dict().items()})
        network.load_state_dict(weights, strict=True, assign=True)
        digest = hashlib.sha256("".join(sha256_file(folder / name) for name in FILES).encode()).hexdigest()
        return cls(network.to(device=device, dtype=dtype), vocab, args["pad_token"], args["pad_value"], digest)

    def match(self, genes: Sequence[str] | np.ndarray) -> Match:
        """Which of ``genes`` the encoder knows."""
        return match_genes(genes, self.vocab)

    def bins(self, cells: Cells, seed: int) -> sp.csr_matrix:
        """Bin 1..50 of every expressed known gene, CSR float32 ``[cell, gene]``; 0 = not seen by the encoder.

        These are what :meth:`embed` sees for the same seed, before any choice of genes by ``max_length``.

        Raises
        ------
        BadInput: too few genes known.
        """
        match = self.match(cells.genes).require()
        ties = _PairDraws(seed, "scgpt ties", match, cells.cell_id)
        rows = [self._cell_bins(cells.counts, i, match, ties) for i in range(len(cells))]
        columns = [c for c, _ in rows]
        indptr = np.cumsum([0, *map(len, columns)])
        indices = np.concatenate(columns) if columns else np.zeros(0, int)
        data = np.concatenate([b for _, b in rows]) if rows else np.zeros(0)
        return sp.csr_matrix((data.astype(np.float32), indices, indptr), shape=cells.counts.shape)

    def embed(
        self,
        cells: Cells,
        seed: int,
        *,
        max_length: int = 1200,
        batch_size: int | None = None,
        on_empty: str = "raise",
        on_cells: Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """Embeddings ``[cell, dim]`` float32 of unit length.

        One cell per network call is the default on a CPU: it is as fast there as batches, nothing is padded, and a
        cell's embedding is the same to the last bit whatever other cells are asked for, in whatever order. In batches
        (default 64 on other devices) cells of like length go together, and the company of a cell changes rounding
        only: about 1e-6 per component in float32.

        Parameters
        ----------
        seed: for ties and for the choice of genes.
        max_length: most tokens per cell, ``<cls>`` included. A longer cell is represented by the ``max_length - 1``
            genes with the smallest numbers drawn for (seed, cell, gene): a uniform choice in which the removal of one
            gene leaves the others chosen.
        on_empty: what a cell without any expressed known gene gives: ``"raise"`` BadInput or a row of ``"nan"``.
        on_cells: called with the number of cells done since the last call.

        Raises
        ------
        BadInput: too few genes known; a cell without any; ``max_length`` below 2.
        """
        if max_length < 2:
            raise BadInput(f"max_length is {max_length}: give at least 2, room for <cls> and one gene.")
        if on_empty not in ("raise", "nan"):
            raise ValueError(f"on_empty is {on_empty!r}: choose raise or nan")
        match = self.match(cells.genes).require()
        ties = _PairDraws(seed, "scgpt ties", match, cells.cell_id)
        choice = _PairDraws(seed, "scgpt genes", match, cells.cell_id)
        out = np.full((len(cells), self.dim), np.nan, dtype=np.float32)

        def tokens(cell: int) -> tuple[np.ndarray, np.ndarray]:
            columns, bins = self._cell_bins(cells.counts, cell, match, ties)
            if len(columns) >= max_length:
                keep = np.sort(np.argsort(choice(cell, columns), kind="stable")[: max_length - 1])
                columns, bins = columns[keep], bins[keep]
            return columns, bins

        known_before = np.concatenate([[0], np.cumsum(match.ids[cells.counts.indices] >= 0)])
        lengths = np.diff(known_before[cells.counts.indptr])
        empty = np.flatnonzero(lengths == 0)
        if len(empty) and on_empty == "raise":
            more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
            raise BadInput(
                f"Cell {cells.cell_id[empty[0]]}{more} expresses none of the {match.matched} genes that the encoder "
                "knows: leave it out, or undo the edits that silenced it."
            )
        order = np.argsort(lengths, kind="stable")[len(empty) :]
        if batch_size is None:
            batch_size = 1 if self.device.type == "cpu" else 256
        with torch.inference_mode():
            known = np.flatnonzero(match.ids >= 0)
            genes = self.network.encoder(torch.from_numpy(match.ids[known]).to(self.device))  # [known gene, dim]
            position = np.full(match.total, -1)
            position[known] = np.arange(len(known))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = [(position[columns], bins) for columns, bins in map(tokens, rows)]
                out[rows] = self._forward(genes, batch)
                if on_cells is not None:
                    on_cells(len(rows))
        return out

    def _forward(self, genes: Tensor, batch: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Tokens (row of ``genes``, bin) of each cell -> unit embeddings ``[cell, dim]``."""
        lengths = [len(columns) for columns, _ in batch]
        longest = max(lengths)
        special = self.network.encoder(torch.tensor([self.vocab["<cls>"], self.pad_id], device=self.device))
        special = special + self._value_table[0]
        # Filled on the CPU: to another device one array per batch travels, not one per cell.
        filled = np.zeros((2, len(batch), longest), dtype=np.int64)
        for i, row in enumerate(batch):
            filled[:, i, : lengths[i]] = row
        columns, bins = torch.from_numpy(filled).to(self.device)
        there = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(self.device)
        tokens = torch.where(there[:, :, None], genes[columns] + self._value_table[bins], special[1])
        x = torch.cat([special[0].repeat(len(batch), 1, 1), tokens], dim=1)
        attend = None
        if min(lengths) < longest:
            attend = F.pad(there, (1, 0), value=True)[:, None, None, :]
        first = self.network.first(x, attend).float().cpu().numpy()
        return first / np.linalg.norm(first, axis=1, keepdims=True)

    @staticmethod
    def _cell_bins(counts: sp.csr_matrix, cell: int, match: Match, ties: _PairDraws) -> tuple[np.ndarray, np.ndarray]:
        """Columns and bins of a cell's expressed known genes, both ``[token]`` int64."""
        part = slice(counts.indptr[cell], counts.indptr[cell + 1])
        known = match.ids[counts.indices[part]] >= 0
        columns, values = counts.indices[part][known].astype(np.int64), counts.data[part][known]
        if not len(columns):
            return columns, columns
        low, high = bin_range(values)
        # Uniform over low..high for u in [0, 1); the maximum catches a u so near 1 that the product rounds up.
        bins = np.ceil(high - ties(cell, columns) * (high - low + 1)).astype(np.int64)
        return columns, np.maximum(bins, low)


class _PairDraws:
    """Numbers in [0, 1) per (cell, gene column). Columns of one symbol are told apart by their occurrence."""

    def __init__(self, seed: int, name: str, match: Match, cell_id: np.ndarray) -> None:
        seen: Counter[str] = Counter()
        keys = []
        for gene in match.genes:
            keys.append(f"{gene}\x1f{seen[gene]}")
            seen[gene] += 1
        self._genes = rng.hash_keys(seed, f"{name}: gene", keys)
        self._cells = rng.hash_keys(seed, f"{name}: cell", list(cell_id))

    def __call__(self, cell: int, columns: np.ndarray) -> np.ndarray:
        return rng.pair_uniforms(self._cells[cell], self._genes[columns])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cells", type=Path, metavar="CELLS.h5ad", help="raw counts")
    parser.add_argument("--scgpt", type=Path, required=True, metavar="DIR", help="scGPT checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.h5ad", help='copy with obsm["X_scGPT"]')
    parser.add_argument("--gene-column", metavar="NAME", help="column of var, or index (default: best match)")
    parser.add_argument("--max-length", type=int, default=1200, metavar="N", help="most tokens per cell")
    parser.add_argument("--seed", type=int, default=0, help="for tied values and cells above max-length")
    parser.add_argument("--on-empty", choices=("raise", "nan"), default="raise", help="cells without any known gene")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def main(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ge2hist_core.data import annotate_h5ad, open_h5ad

    model = ScGPT.load(args.scgpt, args.device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    with open_h5ad(args.cells, model.vocab, gene_column=args.gene_column) as source:
        match = model.match(source.genes)
        print(f"{match.matched} of {match.total} genes known, names from {source.preview.gene_column}")
        for warning in source.preview.warnings:
            print(f"note: {warning}")
        out = np.empty((len(source), model.dim), dtype=np.float32)
        with tqdm(total=len(source), unit="cell", desc="embed") as bar:
            for start in range(0, len(source), 2048):
                rows = np.arange(start, min(start + 2048, len(source)))
                cells = source.take(rows, allow_empty=True)
                out[rows] = model.embed(
                    cells, args.seed, max_length=args.max_length, on_empty=args.on_empty, on_cells=bar.update
                )
    provenance = {
        "scgpt_sha256": model.sha256,
        "seed": args.seed,
        "max_length": args.max_length,
        "precision": args.precision,
        "genes_known": match.matched,
        "genes_total": match.total,
    }
    annotate_h5ad(args.cells, args.out, obsm={"X_scGPT": out}, uns={"X_scGPT": provenance})


def _read_json(path: Path) -> dict[str, Any]:
    value = parse_json(path.read_bytes(), str(path), "copy the file again")
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds a {type(value).__name__}, not an object: use the checkpoint's own file.")
    return value


def _read_args(path: Path) -> dict[str, Any]:
    args = _read_json(path)
    for name in ("embsize", "nheads", "d_hid", "nlayers"):
        value = args.get(name)
        if not (isinstance(value, int) and value > 0):
            raise BadInput(f"{name} is {value!r} in {path}: give the checkpoint's own, a whole number above 0.")
    if args["embsize"] % args["nheads"]:
        raise BadInput(f"embsize {args['embsize']} is no multiple of nheads {args['nheads']} in {path}: correct it.")
    for name, wanted in (("input_emb_style", "continuous"), ("n_bins", N_BINS)):
        if args.get(name, wanted) != wanted:
            raise BadInput(
                f"{name} is {args[name]!r} in {path}: only checkpoints with {name} {wanted!r} can be read, choose one."
            )
    args.setdefault("pad_token", "<pad>")
    value = args.setdefault("pad_value", -2)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadInput(f"pad_value is {value!r} in {path}: it must be a number, as the checkpoint has it.")
    return args


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = _read_json(path)
    ids = list(vocab.values())
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids) or sorted(ids) != list(range(len(ids))):
        raise BadInput(f"Token ids in {path} are not 0 to {len(ids) - 1}, each once: use the checkpoint's own file.")
    for token in SPECIAL_TOKENS:
        vocab.setdefault(token, len(vocab))
    return vocab


def _read_weights(path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Tensors by plain official name, exactly those of ``shapes``. Executes no code from the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} is truncated or no PyTorch weight file: copy it again from its source.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadInput(f"{path} is not a plain dictionary of tensors: save the model's state_dict alone.")
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, new in _RENAMES:
            key = pattern.sub(new, key)
        if _OTHER_MODEL.match(key):
            raise BadInput(f"{path} holds {key} as only fine-tuned models do: use a pre-trained checkpoint.")
        if not _UNUSED.match(key):
            weights[key] = value
    problems = [f"{key} is missing" for key in shapes if key not in weights]
    problems += [
        f"{key} is {list(weights[key].shape)} instead of {list(shape)}"
        for key, shape in shapes.items()
        if key in weights and weights[key].shape != shape
    ]
    problems += [f"{key} is unknown" for key in weights if key not in shapes]
    problems += [f"{key} holds NaN or infinite values" for key, v in weights.items() if not torch.isfinite(v).all()]
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise BadInput(f"{path} does not fit args.json and vocab.json ({listed}): use the files of one checkpoint.")
    return {key: value.float() for key, value in weights.items()}
