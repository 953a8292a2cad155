"""The scGPT reader against the official results, and against a plain torch.nn.TransformerEncoder."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import stats
from torch import nn

from ge2hist_core import __main__, rng
from ge2hist_core.embedding import ScGPT, bin_range, match_genes
from ge2hist_core.types import BadInput, Cells

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "scgpt"
DIM, HEADS, HIDDEN, LAYERS, PAD_VALUE = 24, 3, 40, 2, -2
GENES = [f"GENE{i}" for i in range(120)]


class Reference(nn.Module):
    """scGPT put together from torch's own encoder: slow, obvious, one cell at a time."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"embedding": nn.Embedding(tokens, DIM), "enc_norm": nn.LayerNorm(DIM)})
        self.value_encoder = nn.ModuleDict(
            {"linear1": nn.Linear(1, DIM), "linear2": nn.Linear(DIM, DIM), "norm": nn.LayerNorm(DIM)}
        )
        layer = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, dropout=0.0, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    @torch.no_grad()
    def embed(self, ids: list[int], values: list[float]) -> np.ndarray:
        gene = self.encoder["enc_norm"](self.encoder["embedding"](torch.tensor(ids)))
        value = torch.tensor(values, dtype=torch.float32)[:, None].clamp(max=512)
        value = self.value_encoder["linear2"](self.value_encoder["linear1"](value).relu())
        out = self.transformer_encoder((gene + self.value_encoder["norm"](value))[None])[0, 0].numpy()
        return out / np.linalg.norm(out)


@pytest.fixture(scope="module")
def reference() -> Reference:
    torch.manual_seed(0)
    model = Reference(len(GENES) + 3).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture
def folder(reference: Reference, tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    args = {"embsize": DIM, "nheads": HEADS, "d_hid": HIDDEN, "nlayers": LAYERS, "pad_token": "<pad>"}
    args |= {"pad_value": PAD_VALUE, "n_bins": 51, "input_emb_style": "continuous"}
    (path / "args.json").write_text(json.dumps(args))
    vocab = {name: i for i, name in enumerate(["<cls>", *GENES, "<eoc>", "<pad>"])}
    (path / "vocab.json").write_text(json.dumps(vocab))
    torch.save(reference.state_dict(), path / "best_model.pt")
    return path


@pytest.fixture
def model(folder: Path) -> ScGPT:
    return ScGPT.load(folder)


def make_cells(n: int = 12, genes: list[str] = GENES, seed: int = 1) -> Cells:
    """Counts with many ties, as real ones have; the number of expressed genes differs between cells."""
    draw = np.random.default_rng(seed)
    counts = draw.poisson(draw.uniform(0.1, 3, size=(n, 1)), size=(n, len(genes)))
    counts[:, 0] = 1
    return Cells(sp.csr_matrix(counts), np.array(genes), np.array([f"cell{i}" for i in range(n)]))


def edit(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (value | changes).items() if v is not ...}))


def edit_weights(folder: Path, change) -> None:
    state = torch.load(folder / "best_model.pt", weights_only=True)
    torch.save(change(state) or state, folder / "best_model.pt")


# Agreement


@pytest.mark.skipif(not SHARED.is_dir(), reason="the official results lie in shared/scgpt beside the repository")
@pytest.mark.parametrize("layout", ["flash", "plain"])
@pytest.mark.parametrize("case", ["", "_duplicate_symbols"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_agrees_with_the_official_results(layout: str, case: str, batch_size: int) -> None:
    import anndata

    data = anndata.read_h5ad(SHARED / f"input{case}.h5ad")
    cells = Cells(data.X, data.var["feature_name"].to_numpy(), data.obs_names.to_numpy())
    model = ScGPT.load(SHARED / f"checkpoint_{layout}")
    official = np.load(SHARED / f"official_embeddings{case}.npy")
    assert np.abs(model.embed(cells, seed=5, batch_size=batch_size) - official).max() < 1e-5


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_agrees_with_a_plain_transformer(model: ScGPT, reference: Reference, batch_size: int) -> None:
    cells = make_cells()
    bins = model.bins(cells, 3)
    embedding = model.embed(cells, 3, batch_size=batch_size)
    assert embedding.shape == (len(cells), model.dim)
    assert embedding.dtype == np.float32
    for i in range(len(cells)):
        row = bins[i]
        ids = [model.vocab["<cls>"], *(model.vocab[GENES[j]] for j in row.indices)]
        np.testing.assert_allclose(embedding[i], reference.embed(ids, [PAD_VALUE, *row.data]), atol=2e-6)


def test_bf16_is_close(folder: Path) -> None:
    cells = make_cells()
    exact = ScGPT.load(folder).embed(cells, 0)
    rough = ScGPT.load(folder, dtype=torch.bfloat16).embed(cells, 0)
    assert (exact * rough).sum(axis=1).min() > 0.999
    np.testing.assert_allclose(np.linalg.norm(rough, axis=1), 1, atol=1e-6)


# Bins


def test_bin_range_follows_the_definition() -> None:
    draw = np.random.default_rng(0)
    for values in (draw.poisson(1.5, 80) + 1, draw.normal(5, 1, 33), np.arange(1, 51), [4.0], [1, 1, 2]):
        values = np.asarray(values, dtype=np.float32)
        low, high = bin_range(values)
        edges = np.quantile(values, np.linspace(0, 1, 50))
        for value, lo, hi in zip(values, low, high, strict=True):
            below, upto = sum(edges < value), sum(edges <= value)
            possible = {int(np.ceil(upto - u * (upto - below))) for u in np.linspace(0, 1 - 1e-9, 999)}
            assert (min(possible), max(possible)) == (lo, hi)


def test_distinct_values_have_one_bin_that_rises_from_1_to_50() -> None:
    values = np.random.default_rng(0).permutation(np.linspace(1, 9, 101)).astype(np.float32)
    low, high = bin_range(values)
    assert (low == high).all()
    ordered = low[np.argsort(values)]
    assert ordered[0] == 1
    assert ordered[-1] == 50
    assert (np.diff(ordered) >= 0).all()


def test_tied_values_spread_evenly_over_their_bins(model: ScGPT) -> None:
    cells = Cells(np.ones((200, len(GENES))), np.array(GENES), np.arange(200).astype(str))
    bins = model.bins(cells, 0).data
    assert stats.chisquare(np.bincount(bins.astype(int), minlength=51)[1:]).pvalue > 0.01


def test_monotone_transforms_change_nothing(model: ScGPT) -> None:
    cells = make_cells()
    log = cells.with_counts(cells.counts.log1p())
    np.testing.assert_array_equal(model.embed(log, 0), model.embed(cells, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int64, np.float64])
def test_any_number_type(model: ScGPT, dtype: type) -> None:
    cells = make_cells()
    np.testing.assert_array_equal(model.embed(cells.with_counts(cells.counts.astype(dtype)), 0), model.embed(cells, 0))


# Draws belong to (seed, cell, gene)


def test_a_cell_does_not_depend_on_its_company(model: ScGPT) -> None:
    cells = make_cells()
    order = np.random.default_rng(2).permutation(len(cells))[:7]
    whole = model.embed(cells, 1, max_length=30)
    np.testing.assert_array_equal(model.embed(cells.take(order), 1, max_length=30), whole[order])
    np.testing.assert_allclose(model.embed(cells, 1, max_length=30, batch_size=5), whole, atol=2e-6)


def test_the_order_of_genes_does_not_matter(model: ScGPT) -> None:
    cells = make_cells()
    order = np.random.default_rng(3).permutation(len(GENES))
    turned = Cells(cells.counts[:, order], cells.genes[order], cells.cell_id)
    np.testing.assert_array_equal(model.bins(turned, 1).toarray(), model.bins(cells, 1).toarray()[:, order])
    np.testing.assert_allclose(model.embed(turned, 1, max_length=30), model.embed(cells, 1, max_length=30), atol=2e-6)


def test_unknown_genes_take_no_part(model: ScGPT) -> None:
    cells = make_cells()
    extra = sp.csr_matrix(np.random.default_rng(4).poisson(50, size=(len(cells), 30)))
    more = Cells(sp.hstack([extra, cells.counts]), np.array([f"ODD{i}" for i in range(30)] + GENES), cells.cell_id)
    np.testing.assert_array_equal(model.embed(more, 0), model.embed(cells, 0))


def test_seed_and_cell_name_change_the_draws(model: ScGPT) -> None:
    cells = make_cells()
    renamed = Cells(cells.counts, cells.genes, np.array([f"other{i}" for i in range(len(cells))]))
    base = model.bins(cells, 0).data
    for other in (model.bins(cells, 1).data, model.bins(renamed, 0).data):
        assert np.mean(base != other) > 0.3


def test_an_edit_of_one_gene_redraws_no_other(model: ScGPT) -> None:
    """With all counts 1 every gene's bin is its own draw, so a knock-out must leave all others as they are."""
    cells = Cells(np.ones((1, len(GENES))), np.array(GENES), np.array(["a"]))
    edited = cells.counts.tolil()
    edited[0, 17] = 0
    before, after = model.bins(cells, 0).toarray()[0], model.bins(cells.with_counts(edited), 0).toarray()[0]
    assert before[17] > 0
    assert after[17] == 0
    np.testing.assert_array_equal(np.delete(before, 17), np.delete(after, 17))


def chosen_genes(model: ScGPT, reference: Reference, values: np.ndarray, n: int) -> list[set[int]]:
    """Which two genes the embedding of each of ``n`` cells with these (distinct) values is made of: by trying all."""
    counts = np.zeros((n, len(GENES)))
    counts[:, : len(values)] = values
    cells = Cells(counts, np.array(GENES), np.arange(n).astype(str))
    bins = model.bins(cells, 0)[0].toarray()[0]
    pairs = list(combinations(np.flatnonzero(bins), 2))
    tokens = [[model.vocab["<cls>"], *(model.vocab[GENES[g]] for g in pair)] for pair in pairs]
    tried = np.array([reference.embed(t, [PAD_VALUE, *bins[list(p)]]) for t, p in zip(tokens, pairs, strict=True)])
    same = np.abs(model.embed(cells, 0, max_length=3)[:, None] - tried).max(axis=2) < 2e-6
    assert (same.sum(axis=1) == 1).all()
    return [set(pairs[i]) for i in same.argmax(axis=1)]


def test_long_cells_keep_a_uniform_choice_of_genes(model: ScGPT, reference: Reference) -> None:
    values = np.array([3.0, 1.0, 5.0, 2.0, 4.0])
    chosen = chosen_genes(model, reference, values, 200)
    names = list(combinations(range(5), 2))
    assert stats.chisquare([sum(set(pair) == c for c in chosen) for pair in names]).pvalue > 0.01
    for gone in range(5):
        fewer = chosen_genes(model, reference, np.where(np.arange(5) == gone, 0, values), 200)
        assert all(before - {gone} <= after for before, after in zip(chosen, fewer, strict=True))


def test_columns_of_one_symbol_are_tokens_of_their_own(model: ScGPT, reference: Reference) -> None:
    genes = [*GENES[:40], GENES[3], GENES[3]]
    cells = Cells(np.ones((30, len(genes))), np.array(genes), np.arange(30).astype(str))
    bins = model.bins(cells, 0).toarray()
    assert len({tuple(bins[:, 3]), tuple(bins[:, 40]), tuple(bins[:, 41])}) == 3
    ids = [model.vocab["<cls>"], *(model.vocab[g] for g in genes)]
    np.testing.assert_allclose(model.embed(cells, 0)[4], reference.embed(ids, [PAD_VALUE, *bins[4]]), atol=2e-6)


def test_pair_uniforms_are_uniform_and_uncorrelated() -> None:
    cells = rng.hash_keys(0, "a", [f"c{i}" for i in range(300)])
    genes = rng.hash_keys(0, "b", [f"g{i}" for i in range(400)])
    numbers = rng.pair_uniforms(cells[:, None], genes[None])
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 0.01
    rows, columns = np.corrcoef(numbers), np.corrcoef(numbers.T)
    # The largest of 45,000 (80,000) correlations of 400 (300) independent pairs is about 4.4 standard errors.
    assert np.abs(rows - np.eye(300)).max() < 5.5 / np.sqrt(400)
    assert np.abs(columns - np.eye(400)).max() < 5.5 / np.sqrt(300)
    np.testing.assert_array_equal(rng.pair_uniforms(cells[7], genes[[3, 1]]), numbers[7, [3, 1]])


# Matching


def test_match_counts_and_rate(model: ScGPT) -> None:
    match = model.match(["GENE3", "gene3", "<cls>", "GENE5", "GENE3"])
    assert match.ids.tolist() == [model.vocab["GENE3"], -1, -1, model.vocab["GENE5"], model.vocab["GENE3"]]
    assert (match.matched, match.total, match.vocabulary) == (3, 5, len(GENES))
    assert match.rate == pytest.approx(3 / 5)


def test_a_small_vocabulary_reads_a_whole_transcriptome_and_a_large_one_a_small_panel() -> None:
    vocab = {f"G{i}": i for i in range(100)}
    assert match_genes([f"G{i}" for i in range(5000)], vocab).require().rate == 1
    assert match_genes(["G1", "G2", *(f"X{i}" for i in range(18))], vocab).require().rate == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("genes", "said"),
    [
        ([f"ENSG{i:011d}" for i in range(50)], "Only 0 of 50 genes are known .*Ensembl ids"),
        (["GENE1", *(f"X{i}" for i in range(30))], r"Only 1 of 31 genes are known .*GENE1, X0, X1\)"),
        ([], "Only 0 of 0"),
    ],
)
def test_too_few_known_genes_are_refused(model: ScGPT, genes: list[str], said: str) -> None:
    cells = Cells(np.ones((1, len(genes))), np.array(genes, dtype=object), np.array(["a"]))
    with pytest.raises(BadInput, match=said):
        model.embed(cells, 0)


def test_a_cell_without_known_genes_is_named_or_flagged(model: ScGPT) -> None:
    cells = make_cells(6)
    counts = cells.counts.tolil()
    counts[[2, 5]] = 0
    cells = cells.with_counts(counts)
    with pytest.raises(BadInput, match=r"Cell cell2 \(and 1 more\) expresses none of the 120 genes"):
        model.embed(cells, 0)
    embedding = model.embed(cells, 0, on_empty="nan")
    assert np.isnan(embedding).all(axis=1).tolist() == [False, False, True, False, False, True]
    assert not np.isnan(embedding[[0, 1, 3, 4]]).any()


def test_no_cells_and_progress(model: ScGPT) -> None:
    cells = make_cells(9)
    assert model.embed(cells.take(np.arange(0)), 0).shape == (0, DIM)
    assert model.bins(cells.take(np.arange(0)), 0).shape == (0, len(GENES))
    done: list[int] = []
    model.embed(cells, 0, batch_size=4, on_cells=done.append)
    assert sum(done) == 9


def test_max_length_below_two_is_refused(model: ScGPT) -> None:
    with pytest.raises(BadInput, match="max_length is 1"):
        model.embed(make_cells(), 0, max_length=1)


# Folders


def renamed(old: str, new: str):
    return lambda state: {key.replace(old, new): value for key, value in state.items()}


@pytest.mark.parametrize(
    "layout",
    [
        lambda s: renamed("in_proj_", "Wqkv.")(s),
        lambda s: renamed("out_proj", "_impl.out_proj")(renamed("in_proj_", "_impl.Wqkv.")(s)),
        lambda s: {f"module.{key}": value for key, value in s.items()},
        lambda s: {**s, "decoder.fc.0.weight": torch.zeros(2), "flag_encoder.weight": torch.zeros(2, DIM)},
        lambda s: {key: value.double() for key, value in s.items()},
    ],
    ids=["Wqkv", "_impl", "module", "heads", "double"],
)
def test_every_layout_gives_the_same_embedding(folder: Path, layout) -> None:
    cells = make_cells()
    plain = ScGPT.load(folder).embed(cells, 0)
    edit_weights(folder, layout)
    np.testing.assert_array_equal(ScGPT.load(folder).embed(cells, 0), plain)


def test_the_order_of_the_vocabulary_file_does_not_matter(folder: Path) -> None:
    plain = ScGPT.load(folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(dict(sorted(vocab.items(), reverse=True))))
    turned = ScGPT.load(folder)
    np.testing.assert_array_equal(turned.embed(make_cells(), 0), plain.embed(make_cells(), 0))
    assert turned.sha256 != plain.sha256


def test_a_missing_special_token_is_appended(folder: Path) -> None:
    edit(folder / "vocab.json", **{"<pad>": ...})
    assert ScGPT.load(folder).vocab["<pad>"] == len(GENES) + 2
    edit(folder / "vocab.json", **{"<cls>": ..., "GENE0": 0, "GENE1": 1})
    vocab = {gene: i for i, gene in enumerate(GENES)} | {"EXTRA": len(GENES)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(BadInput, match=r"encoder.embedding.weight is \[123, 24\] instead of \[124, 24\]"):
        ScGPT.load(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "value_encoder.norm.bias"},
            "value_encoder.norm.bias is missing",
        ),
        (
            lambda s: s.update({"transformer_encoder.layers.1.linear1.weight": torch.zeros(3, DIM)}),
            r"layers.1.linear1.weight is \[3, 24\] instead of \[40, 24\]",
        ),
        (
            lambda s: s.update({"transformer_encoder.layers.2.linear1.bias": torch.zeros(HIDDEN)}),
            "layers.2.linear1.bias is unknown",
        ),
        (lambda s: s.update({"bn.weight": torch.zeros(DIM)}), "bn.weight as only fine-tuned models do"),
        (lambda s: s.update({"dsbn.bns.0.weight": torch.zeros(DIM)}), "dsbn.bns.0.weight as only"),
        (lambda s: s.update({"encoder.enc_norm.bias": torch.full((DIM,), torch.nan)}), "enc_norm.bias holds NaN"),
        (lambda s: {"model": s}, "not a plain dictionary of tensors"),
        (lambda s: list(s.values()), "not a plain dictionary of tensors"),
        (lambda s: {"encoder.embedding.weight": torch.zeros(123, DIM)}, "and 27 more"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, change, said: str) -> None:
    edit_weights(folder, change)
    with pytest.raises(BadInput, match=said):
        ScGPT.load(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embsize": ...}, "embsize is None"),
        ({"nheads": 5}, "embsize 24 is no multiple of nheads 5"),
        ({"nlayers": 0}, "nlayers is 0"),
        ({"nlayers": 1}, "layers.1.self_attn.in_proj_weight is unknown"),
        ({"nlayers": 3}, "layers.2.self_attn.in_proj_weight is missing"),
        ({"n_bins": 101}, "n_bins is 101"),
        ({"input_emb_style": "category"}, "input_emb_style is 'category'"),
        ({"pad_token": "[PAD]"}, r"pad_token is '\[PAD\]'"),
        ({"pad_value": "x"}, "pad_value is 'x'"),
    ],
)
def test_args_that_cannot_be_read_are_refused(folder: Path, changes: dict[str, object], said: str) -> None:
    edit(folder / "args.json", **changes)
    with pytest.raises(BadInput, match=said):
        ScGPT.load(folder)


@pytest.mark.parametrize("name", ["args.json", "vocab.json", "best_model.pt"])
def test_missing_and_truncated_files_are_named(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=name):
        ScGPT.load(folder)
    (folder / name).write_bytes(b"")
    with pytest.raises(BadInput, match=name):
        ScGPT.load(folder)
    (folder / name).unlink()
    with pytest.raises(BadInput, match=f"{name} is missing: give the folder"):
        ScGPT.load(folder)


@pytest.mark.parametrize("vocab", [{"A": 0, "B": 2}, {"A": 0, "B": 0}, {"A": "0"}, {"A": True, "B": 0}, ["A"]])
def test_vocabularies_that_are_none_are_refused(folder: Path, vocab: object) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(BadInput, match=r"vocab\.json"):
        ScGPT.load(folder)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_loading_runs_no_code_from_the_file(folder: Path, tmp_path: Path) -> None:
    torch.save({"encoder.embedding.weight": Payload(tmp_path / "ran")}, folder / "best_model.pt")
    with pytest.raises(BadInput, match=r"best_model\.pt"):
        ScGPT.load(folder)
    assert not (tmp_path / "ran").exists()


def test_the_hash_covers_all_three_files(folder: Path) -> None:
    hashes = {ScGPT.load(folder).sha256}
    edit(folder / "args.json", note=1)
    hashes.add(ScGPT.load(folder).sha256)
    edit_weights(folder, lambda s: {**s, "encoder.enc_norm.bias": s["encoder.enc_norm.bias"] + 1})
    hashes.add(ScGPT.load(folder).sha256)
    assert len(hashes) == 3


# Command line


def test_command_writes_the_embedding_into_a_copy(folder: Path, model: ScGPT, tmp_path: Path) -> None:
    import anndata
    import pandas as pd

    cells = make_cells(10)
    var = pd.DataFrame({"feature_name": GENES}, index=[f"ENSG{i:011d}" for i in range(len(GENES))])
    data = anndata.AnnData(cells.counts, obs=pd.DataFrame(index=cells.cell_id), var=var)
    data.obsm["X_umap"] = np.zeros((10, 2), dtype=np.float32)
    data.write_h5ad(tmp_path / "in.h5ad")
    argv = ["embed", str(tmp_path / "in.h5ad"), "--scgpt", str(folder), "--out", str(tmp_path / "out.h5ad")]
    assert __main__.run_command("x", "", __main__.COMMANDS, [*argv, "--seed", "4", "--max-length", "30"]) == 0
    out = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(out.obsm["X_scGPT"], model.embed(cells, 4, max_length=30))
    assert out.uns["X_scGPT"]["scgpt_sha256"] == model.sha256
    assert (out.uns["X_scGPT"]["genes_known"], out.uns["X_scGPT"]["genes_total"]) == (120, 120)
    assert (out.X != data.X).nnz == 0
    assert "X_umap" in out.obsm
    assert "X_scGPT" not in anndata.read_h5ad(tmp_path / "in.h5ad").obsm


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--gene-column", "nope"], "'nope'"),
        (["--gene-column", "index"], "Ensembl"),
        (["--max-length", "1"], "max_length is 1"),
    ],
)
def test_command_says_what_is_wrong(folder: Path, tmp_path: Path, capsys, extra: list[str], said: str) -> None:
    import anndata
    import pandas as pd

    var = pd.DataFrame({"feature_name": GENES}, index=[f"ENSG{i:011d}" for i in range(len(GENES))])
    cells = make_cells(3)
    anndata.AnnData(cells.counts, obs=pd.DataFrame(index=cells.cell_id), var=var).write_h5ad(tmp_path / "in.h5ad")
    argv = ["embed", str(tmp_path / "in.h5ad"), "--scgpt", str(folder), "--out", str(tmp_path / "out.h5ad"), *extra]
    assert __main__.run_command("x", "", __main__.COMMANDS, argv) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.h5ad").exists()


def test_command_refuses_a_wrong_folder(folder: Path, tmp_path: Path, capsys) -> None:
    shutil.rmtree(folder)
    argv = ["embed", str(tmp_path / "in.h5ad"), "--scgpt", str(folder), "--out", str(tmp_path / "out.h5ad")]
    assert __main__.run_command("x", "", __main__.COMMANDS, argv) == 2
    assert "args.json is missing" in capsys.readouterr().err
