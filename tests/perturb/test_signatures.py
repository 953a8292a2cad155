"""Signatures against oracles that are not this code: pow, pandas, scanpy's own tables, files written by hand."""

from __future__ import annotations

import contextlib
import csv
import doctest
import gzip
import math
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from ge2hist_core.types import BadInput, Cells
from perturb import signatures
from perturb.dose_response import DoseResponse, dose_response, doses
from perturb.edits import MAX_FACTOR, Perturbation
from perturb.signature_files import MAX_TABLE_BYTES, MAX_TEXT_BYTES, read_signatures
from perturb.signatures import LIBRARY_CSV, MAX_DOSE, Signature, expand, library_table, load_library

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data" / "signatures"

SIX_DIGITS = 5e-6
"""Largest relative error of a number rounded to six digits."""

symbols = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=1, max_size=6).map("G".__add__)
changes = st.floats(-20, 20, allow_subnormal=False)
signed = st.dictionaries(symbols, changes, min_size=1, max_size=8).map(
    lambda d: Signature("drawn", tuple(d), tuple(d.values()))
)
allowed_doses = st.floats(-MAX_DOSE, MAX_DOSE, allow_subnormal=False)


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real data not at {path}")
    return path


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def as_dict(signature: Signature) -> dict[str, float]:
    return dict(zip(signature.genes, signature.log2_fc, strict=True))


# ------------------------------------------------------------------ the type


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": " "}, "no name"),
        ({"genes": (), "log2_fc": ()}, "names no gene"),
        ({"genes": ("A", " ")}, "empty gene name"),
        ({"genes": ("A", "A")}, "names the gene 'A' twice"),
        ({"log2_fc": (1.0,)}, "1 values of log2_fc for 2 genes"),
        ({"log2_fc": (1.0, "x")}, "log2_fc that is no number"),
        ({"log2_fc": (1.0, math.nan)}, "B the log2 fold change nan"),
        ({"log2_fc": (1.0, -101)}, "a number from -100 to 100"),
        ({"log2_fc": (1.0, 0.5), "direction_only": True}, r"B the value 0.5: choose \+1 or -1"),
        ({"padj": (0.5, 1.5)}, "adjusted p-value 1.5: choose 0 to 1"),
        ({"padj": (0.5,)}, "1 values of padj"),
        ({"genes": ("A", "\ud800")}, "half of a surrogate pair is no text"),
        ({"log2_fc": (1.0, 10**400)}, "log2_fc that is no number"),
    ],
)
def test_a_malformed_signature_is_refused_in_one_sentence(fields, message):
    good = {"name": "s", "genes": ("A", "B"), "log2_fc": (1.0, -1.0)}
    assert Signature(**good).log2_fc == (1.0, -1.0)
    with pytest.raises(BadInput, match=message) as caught:
        Signature(**(good | fields))
    assert str(caught.value).count(". ") == 0


# ------------------------------------------------------------------ expansion


def test_an_expansion_multiplies_the_counts_by_powers_of_two():
    signature = Signature("s", ("A", "B", "C", "X"), (1.0, -2.0, 3.0, 1.0))
    cells = Cells(sp.csr_matrix(np.array([[2, 8, 1, 5]], np.float32)), np.array(["C", "B", "A", "D"]), np.array(["c"]))
    expansion = expand(signature, cells.genes, 1.5)
    np.testing.assert_allclose(
        expansion.perturbation.apply(cells).counts.toarray(),
        [[2 * MAX_FACTOR, 8 * 2**-3.0, 2**1.5, 5]],
        rtol=SIX_DIGITS,
    )
    assert expansion.perturbation.genes == ("A", "B", "C")  # the signature's order, not the data's
    assert expansion.unmatched == ("X",) and expansion.clipped == ("C",) and expansion.matched == ("A", "B", "C")
    row = expansion.table.set_index("gene").loc["C"]
    assert expand(signature, cells.genes, 0.5).clipped == ()  # rounding a factor is no clipping
    assert row["wanted_factor"] == pytest.approx(2**4.5) and row["factor"] == MAX_FACTOR
    assert any("X" in said for said in expansion.sentences) and any("lowered to 4: C" in s for s in expansion.sentences)


@given(signed, allowed_doses)
def test_factors_are_clipped_powers_and_the_text_form_reads_back(signature, dose):
    expansion = expand(signature, signature.genes, dose)
    for edit in expansion.perturbation.edits:
        wanted = math.pow(2.0, dose * as_dict(signature)[edit.gene])
        assert edit.kind == "factor" and 0 <= edit.amount <= MAX_FACTOR
        assert edit.amount == pytest.approx(min(wanted, MAX_FACTOR), rel=SIX_DIGITS, abs=1e-300)
        assert len(str(edit)) <= len(edit.gene) + len(":x1.23457e-120")  # a link holds hundreds of them
        assert (edit.gene in expansion.clipped) == (wanted > MAX_FACTOR)
    assert Perturbation.parse(str(expansion.perturbation)) == expansion.perturbation


@given(signed, allowed_doses)
def test_the_reverse_dose_is_the_reciprocal_and_doses_add_up(signature, dose):
    def wanted(d: float) -> np.ndarray:
        return expand(signature, signature.genes, d).table["wanted_factor"].to_numpy()

    np.testing.assert_allclose(wanted(dose) * wanted(-dose), 1, rtol=1e-9)
    np.testing.assert_allclose(wanted(dose / 2) ** 2, wanted(dose), rtol=1e-9)
    used = expand(signature, signature.genes, dose).table["factor"].to_numpy()
    back = expand(signature, signature.genes, -dose).table["factor"].to_numpy()
    free = (used < MAX_FACTOR) & (back < MAX_FACTOR)
    np.testing.assert_allclose((used * back)[free], 1, rtol=2 * SIX_DIGITS)


@given(signed)
def test_dose_zero_and_unchanged_genes_give_exactly_nothing(signature):
    expansion = expand(signature, signature.genes, 0)
    assert expansion.perturbation == Perturbation() and not expansion.clipped
    flat = Signature("flat", ("A", "B"), (0.0, 1.0))
    assert expand(flat, ["A", "B"], 1).perturbation.genes == ("B",)


def test_directions_alone_move_every_gene_by_the_dose():
    signature = Signature("s", ("A", "B"), (1, -1), direction_only=True)
    expansion = expand(signature, ["A", "B"], 1.5)
    assert [edit.amount for edit in expansion.perturbation.edits] == pytest.approx([2**1.5, 2**-1.5], rel=SIX_DIGITS)
    assert signature.dose_unit == "log2 fold change per gene" and "directions alone" in expansion.sentences[-1]


def test_top_keeps_the_strongest_genes_that_the_data_have():
    signature = Signature("s", ("A", "B", "C", "D", "E"), (0.5, -2.0, 1.0, -1.0, 9.0))
    expansion = expand(signature, ["A", "B", "C", "D"], 1, top=2)
    assert expansion.perturbation.genes == ("B", "C")  # E is not in the data; C comes before its equal D
    assert expansion.table["match"].tolist() == ["not in top", "exact", "exact", "not in top", "unmatched"]
    for top in (0, -1, 1.5, True):
        with pytest.raises(BadInput, match="choose a whole number of genes from 1"):
            expand(signature, ["A"], 1, top=top)


@pytest.mark.parametrize(
    ("given_name", "in_data", "how"),
    [
        ("CD8A", "CD8A", "exact"),
        ("cd8a", "CD8A", "case"),
        ("CD8A", "Cd8a", "case"),
        ("1-Mar", "MARCHF1", "mended"),
        ("1-Mar", "MARCH1", "mended"),
        ("01-Mar", "MARCHF1", "mended"),
        ("Mar-1", "MARCHF1", "mended"),
        ("Mar-01", "MARCHF1", "mended"),
        ("MAR-10", "MARCHF10", "mended"),
        ("2-Mar", "MTARC2", "mended"),
        ("2-Sep", "SEPTIN2", "mended"),
        ("2-Sep", "SEPT2", "mended"),
        ("02-Sept", "SEPTIN2", "mended"),
        ("Sep-14", "SEPTIN14", "mended"),
        ("15-Sep", "SELENOF", "mended"),
        ("1-Dec", "DELEC1", "mended"),
        ("Dec-01", "DEC1", "mended"),
        ("4-Oct", "POU5F1", "mended"),
        ("2-Sep-23", "SEPTIN2", "mended"),
        ("2006-09-02", "SEPTIN2", "mended"),
        ("2006/09/02", "SEPT2", "mended"),
        ("2023-03-01 00:00:00", "MARCHF1", "mended"),
        ("SEPT2", "SEPTIN2", "mended"),
        ("SEPTIN2", "SEPT2", "mended"),
        ("MARC1", "MTARC1", "mended"),
        ("MARCH1", "MTARC1", "unmatched"),
        ("1-Mar", "SEPTIN1", "unmatched"),
        ("30-Feb", "SEPTIN2", "unmatched"),
        ("40238", "SEPTIN2", "unmatched"),
        ("A", "AB", "unmatched"),
    ],
)
def test_names_are_found_or_mended(given_name, in_data, how):
    expansion = expand(Signature("s", (given_name, "ANCHOR"), (1.0, 1.0)), ["ANCHOR", in_data], 1)
    row = expansion.table.iloc[0]
    assert row["match"] == how and row["data_gene"] == ("" if how == "unmatched" else in_data)
    assert expansion.mended == ({given_name: in_data} if how == "mended" else {})
    assert (in_data in expansion.perturbation.genes) == (how != "unmatched")


def test_a_name_with_two_meanings_is_left_out_and_no_gene_is_edited_twice():
    signature = Signature("s", ("1-Mar", "cd8a", "CD8A", "Cd8A"), (1.0, 2.0, 1.0, 1.0))
    expansion = expand(signature, ["MARCHF1", "MTARC1", "CD8A"], 1)
    assert expansion.table["match"].tolist() == ["ambiguous", "duplicate", "exact", "duplicate"]
    assert str(expansion.perturbation) == "CD8A:x2" and expansion.unmatched == ("1-Mar",)


@pytest.mark.parametrize("dose", [math.nan, math.inf, -math.inf, 4.01, -5, "much", None, True])
def test_a_dose_out_of_range_is_refused(dose):
    with pytest.raises(BadInput, match="choose a number from -4 to 4"):
        expand(Signature("s", ("A",), (1.0,)), ["A"], dose)


def test_nothing_in_common_is_refused_with_both_kinds_of_names():
    with pytest.raises(BadInput, match=r"None of the 1 genes of 's' \(ENSG00000153563\).*the data \(CD8A, CD4\)"):
        expand(Signature("s", ("ENSG00000153563",), (1.0,)), ["CD8A", "CD4"], 1)


# ------------------------------------------------------------------ dose and response


@given(st.floats(0.01, MAX_DOSE))
def test_seven_doses_double_up_to_the_largest(maximum):
    found = np.array(doses(maximum))
    assert len(found) == 7 and found[0] == 0 and found[-1] == maximum
    np.testing.assert_allclose(found[2:] / found[1:-1], 2)


@pytest.mark.parametrize("maximum", [0, -1, 4.5, math.nan])
def test_a_largest_dose_out_of_range_is_refused(maximum):
    with pytest.raises(BadInput, match="choose a number"):
        doses(maximum)


def hill(dose: np.ndarray, ec50: float, slope: float, bottom: float = 10.0, top: float = 30.0) -> np.ndarray:
    return bottom + (top - bottom) * dose**slope / (ec50**slope + dose**slope)


def responses(value: np.ndarray, half: float, noise: np.ndarray | float = 0.0) -> DoseResponse:
    dose = np.array(doses(4))
    value = value + noise
    return dose_response(dose, value, value - half, value + half)


@pytest.mark.parametrize(("ec50", "slope"), [(0.2, 2.0), (0.5, 1.5), (1.0, 3.0), (0.3, 1.2)])
@pytest.mark.parametrize("top", [30.0, 2.0])
def test_planted_parameters_are_recovered(ec50, slope, top):
    found = responses(hill(np.array(doses(4)), ec50, slope, top=top), half=0.3 if top > 10 else 0.12)
    assert found.reason == "" and found.hill is not None
    assert found.hill.ec50 == pytest.approx(ec50, rel=1e-3) and found.hill.slope == pytest.approx(slope, rel=1e-2)
    assert found.hill.bottom == pytest.approx(10, abs=0.05) and found.hill.top == pytest.approx(top, abs=0.05)
    assert found.hill.ec50_low < ec50 < found.hill.ec50_high


def test_the_interval_of_ec50_is_as_wide_as_its_estimates_scatter():
    """Noise as the intervals say: 95% of 200 intervals cover, give or take three binomial deviations."""
    rng = np.random.Generator(np.random.Philox(5))
    truth = hill(np.array(doses(4)), 0.5, 2.0)
    drawn = [responses(truth, 1.96 * 0.5, rng.normal(0, 0.5, 7)).hill for _ in range(200)]
    fits = [fit for fit in drawn if fit is not None]
    assert len(fits) > 150
    covered = np.mean([fit.ec50_low <= 0.5 <= fit.ec50_high for fit in fits])
    assert covered > 0.95 - 3 * math.sqrt(0.95 * 0.05 / len(fits))
    stated = np.mean([math.log(fit.ec50_high / fit.ec50_low) / (2 * 1.96) for fit in fits])
    assert stated == pytest.approx(np.std([math.log(fit.ec50) for fit in fits]), rel=0.25)


def test_units_of_dose_and_response_carry_over():
    dose, value = np.array(doses(4)), hill(np.array(doses(4)), 0.5, 2.0)
    base = dose_response(dose, value, value - 1, value + 1).hill
    scaled = dose_response(dose / 8, 3 * value - 7, 3 * value - 10, 3 * value - 4).hill
    assert base is not None and scaled is not None
    assert scaled.ec50 == pytest.approx(base.ec50 / 8, rel=1e-4) and scaled.slope == pytest.approx(base.slope, rel=1e-4)
    assert scaled.ec50_high == pytest.approx(base.ec50_high / 8, rel=1e-3)
    assert scaled.top == pytest.approx(3 * base.top - 7, rel=1e-4)


@pytest.mark.parametrize(
    ("value", "half", "reason"),
    [
        ([10.0] * 7, 1.0, "0 doses lie beyond the noise of dose 0"),
        ([10, 10, 10, 10, 10, 20, 20], 1.0, "2 doses lie beyond the noise"),
        ([10, 10.6, 11.3, 12.5, 15, 20, 30], 0.2, "does not visibly level off"),
        ([10, 13, 16, 19, 22, 25, 28], 0.2, "does not visibly level off"),
        ([10, 12, 18, 25, 29, 22, 15], 0.5, "turns back beyond its noise"),
        ([10, 11, 14, 22, 27, 29, 29.5], 12.0, "lie beyond the noise"),
    ],
)
def test_a_fit_is_refused_where_the_points_do_not_carry_one(value, half, reason):
    found = responses(np.array(value, float), half)
    assert found.hill is None and re.search(reason, found.reason)
    mirrored = responses(-np.array(value, float), half)
    assert mirrored.hill is None and mirrored.reason == found.reason


@pytest.mark.parametrize(
    ("value", "half", "reason"),
    [
        # A jump between two doses: any EC50 between them and any steep slope fit alike.
        ([10, 10, 10, 30, 30, 30, 30], 1.5, "leave EC50 or the slope"),
        ([10, 10, 10, 30, 30, 30, 30], 0.2, "does not pass through the points|leave EC50 or the slope"),
        # EC50 below the smallest dose: all of them saturate.
        ([10, 29.9, 30, 30, 30, 30, 30], 0.2, "lies outside the tested doses|leave EC50 or the slope"),
        # Two rises with a shelf between them.
        ([10, 20, 20, 20, 20, 30, 30], 0.1, "does not pass through the points|turns back"),
    ],
)
def test_a_fit_that_says_nothing_is_not_given(value, half, reason):
    found = responses(np.array(value, float), half)
    assert found.hill is None and re.search(reason, found.reason)


def test_a_plateau_is_flagged_with_its_start():
    found = responses(np.array([10, 11, 18, 27, 30, 30.2, 29.9]), 0.4)
    assert found.plateau and found.plateau_from == doses(4)[4]
    flat = responses(np.full(7, 10.0), 0.4)
    assert not flat.plateau and math.isnan(flat.plateau_from)  # no response is no plateau of a response
    rising = np.array([10, 14, 18, 22, 26, 28, 31.0])
    assert not responses(rising, 5.5).plateau  # overlap of wide intervals shows nothing
    assert not responses(rising, 0.5).plateau


def test_undefined_doses_are_left_out_and_malformed_arrays_refused():
    dose, value = np.array(doses(4)), hill(np.array(doses(4)), 0.5, 2.0)
    value[3] = math.nan
    assert dose_response(dose, value, value - 0.3, value + 0.3).hill is not None
    value[:3] = math.nan
    assert "Fewer than 5 doses" in dose_response(dose, value, value - 0.3, value + 0.3).reason
    value = hill(dose, 0.5, 2.0)
    with pytest.raises(ValueError, match="increase from 0"):
        dose_response(dose[::-1], value, value, value)
    with pytest.raises(ValueError, match=r"four \[dose\] arrays"):
        dose_response(dose, value[:3], value, value)
    with pytest.raises(ValueError, match="within its interval"):
        dose_response(dose, value, value + 1, value + 2)


# ------------------------------------------------------------------ GMT


@given(st.dictionaries(symbols, st.sampled_from([1.0, -1.0]), min_size=1, max_size=20), st.sampled_from(["", ".gz"]))
def test_signed_sets_read_back_from_gmt(tmp_path_factory, genes, suffix):
    lines = [
        "\t".join([f"S_{word}", "na", *chosen])
        for word, chosen in (
            ("UP", [g for g, s in genes.items() if s > 0]),
            ("DN", [g for g, s in genes.items() if s < 0]),
        )
        if chosen
    ]
    path = tmp_path_factory.mktemp("gmt") / f"sets.gmt{suffix}"
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if suffix else data)
    (found,) = read_signatures(path)
    assert found.name == "S" and found.direction_only and as_dict(found) == genes


@pytest.mark.parametrize(("up", "down"), [("X_UP", "X_DN"), ("X_up", "X_down"), ("X up", "X down"), ("X-up", "X-down")])
@pytest.mark.parametrize("order", [1, -1])
def test_pairs_are_joined(tmp_path, up, down, order):
    lines = [f"{up}\thttp://x\tA\tB", f"{down}\thttp://x\tC\tA"][::order]
    (found,) = read_signatures(written(tmp_path, "s.gmt", "\r\n".join(lines)))
    assert found.name == "X" and as_dict(found) == {"B": 1, "C": -1} and found.source == "http://x"
    assert any("both up and down were left out: A" in note for note in found.notes)


def test_a_set_without_direction_is_up_unless_the_file_is_of_down_sets(tmp_path):
    (found,) = read_signatures(written(tmp_path, "sets.gmt", "KUPFER\tna\tA\tB\tA\n"))
    assert found.name == "KUPFER" and found.log2_fc == (1, 1) and "read as up" in found.notes[0]
    (found,) = read_signatures(written(tmp_path, "LINCS_L1000_Chem_Pert_down.txt", "X\t\tA\tB\n"))
    assert found.name == "X" and found.log2_fc == (-1, -1) and "ends in 'down'" in found.notes[0]


def test_an_enrichr_library_of_lincs_terms(tmp_path):
    text = (
        "LJP005_A375_24H-afatinib-10 up\t\tGENE1,1.0\tGENE2,1.0\t\n"
        "LJP005_A375_24H-afatinib-10 down\t\tGENE3,1.0\t\n"
        "CPC006_MCF7_6H-BRD-K12345678-0.12 up\t\tGENE4,0.5\tGENE5,2.5\n"
    )
    first, second = read_signatures(written(tmp_path, "LINCS_L1000_Chem_Pert.txt", text))
    assert first.name == "LJP005_A375_24H-afatinib-10" and as_dict(first) == {"GENE1": 1, "GENE2": 1, "GENE3": -1}
    assert (first.cell_line, first.drug, first.dose_um, first.time_h, first.kind) == (
        "A375",
        "afatinib",
        10,
        24,
        "drug",
    )
    assert (second.cell_line, second.drug, second.dose_um, second.time_h) == ("MCF7", "BRD-K12345678", 0.12, 6)
    assert second.genes == ("GENE5", "GENE4") and second.direction_only  # weights order, they do not scale


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SET,na,A,B\n", "Line 1 of s.gmt is no gene set: write a name, a description and genes, separated by tabs"),
        ("S\tna\tA\nT\tna\n", "Line 2 of s.gmt is no gene set"),
        ("S_UP\tna\tA\nS_UP\tna\tB\n", "Line 2 of s.gmt names the set 'S_UP' again"),
        ("S_UP\tna\tA\nS_DN\tna\tA\n", "same genes up and down"),
    ],
)
def test_a_malformed_gmt_is_refused(tmp_path, text, message):
    with pytest.raises(BadInput, match=message):
        read_signatures(written(tmp_path, "s.gmt", text))


def test_real_gene_sets():
    lines = [line.split("\t") for line in shared("hallmark_v7.0.gmt").read_text().splitlines()]
    sets = {name: set(genes) for name, _, *genes in lines}
    found = {signature.name: signature for signature in read_signatures(SHARED / "hallmark_v7.0.gmt")}
    assert len(sets) == 50 and len(found) == 48  # KRAS_SIGNALING and UV_RESPONSE have an up and a down set
    assert set(found["HALLMARK_HYPOXIA"].genes) == sets["HALLMARK_HYPOXIA"]
    kras = as_dict(found["HALLMARK_KRAS_SIGNALING"])
    assert {g for g, s in kras.items() if s > 0} == sets["HALLMARK_KRAS_SIGNALING_UP"]
    assert {g for g, s in kras.items() if s < 0} == sets["HALLMARK_KRAS_SIGNALING_DN"]
    assert len(read_signatures(shared("kegg_2016.gmt"))) == len(shared("kegg_2016.gmt").read_text().splitlines())


# ------------------------------------------------------------------ tables

DESEQ2_CSV = (
    '"","baseMean","log2FoldChange","lfcSE","stat","pvalue","padj"\n"A",10,1.5,0.1,3,1e-4,0.001\n"B",5,-2,1,1,0.2,NA\n'
)
DESEQ2_TSV = (
    "baseMean\tlog2FoldChange\tlfcSE\tstat\tpvalue\tpadj\nA\t10\t1.5\t.1\t3\t1e-4\t0.001\nB\t5\t-2\t1\t1\t.2\tNA\n"
)
LIMMA = "\tlogFC\tAveExpr\tt\tP.Value\tadj.P.Val\tB\nA\t1.5\t3\t3\t1e-4\t0.001\t2\nB\t-2\t3\t1\t0.2\t1\t-4\n"
EDGER = '"","logFC","logCPM","F","PValue","FDR"\n"A",1.5,3,3,1e-4,0.001\n"B",-2,3,1,0.2,1\n'
SEURAT = ",p_val,avg_log2FC,pct.1,pct.2,p_val_adj\nA,1e-4,1.5,0.5,0.1,0.001\nB,0.2,-2,0.1,0.5,1\n"
SCANPY = "names,scores,logfoldchanges,pvals,pvals_adj\nA,5,1.5,1e-4,0.001\nB,-1,-2,0.2,1\n"
PERTPY = ",variable,p_value,log_fc,adj_p_value,contrast\n0,A,1e-4,1.5,0.001,drug\n1,B,0.2,-2,1,drug\n"
GERMAN = "Gene;log2FC;padj\nA;1,5;0,001\nB;-2;1\n"


@pytest.mark.parametrize("text", [DESEQ2_CSV, DESEQ2_TSV, LIMMA, EDGER, SEURAT, SCANPY, PERTPY, GERMAN])
@pytest.mark.parametrize("form", ["plain", "gz", "bom", "utf-16", "comment", "crlf"])
def test_tables_of_common_tools(tmp_path, text, form):
    path = tmp_path / ("result.csv.gz" if form == "gz" else "result.txt")
    data = ("# made by x\n" if form == "comment" else "") + text
    data = data.replace("\n", "\r\n") if form == "crlf" else data
    encoded = data.encode({"bom": "utf-8-sig", "utf-16": "utf-16"}.get(form, "utf-8"))
    path.write_bytes(gzip.compress(encoded) if form == "gz" else encoded)
    (found,) = read_signatures(path)
    assert found.name == ("drug" if "contrast" in text else "result")
    assert as_dict(found) == {"A": 1.5, "B": -2} and found.padj == (0.001, 1.0) and not found.direction_only
    assert found.source == path.name and found.kind == "differential expression"
    assert any("taken as log2" in note for note in found.notes) == ("log2" not in text.lower().split("\n")[0])


@given(st.dictionaries(symbols, st.tuples(changes, st.floats(0, 1)), min_size=1, max_size=10), st.sampled_from("\t,;"))
def test_a_table_written_by_pandas_reads_back(tmp_path_factory, rows, separator):
    table = pd.DataFrame([(g, *v) for g, v in rows.items()], columns=["gene", "log2FoldChange", "padj"])
    path = tmp_path_factory.mktemp("table") / "t.csv"
    table.to_csv(path, sep=separator, index=False)
    (found,) = read_signatures(path)
    assert as_dict(found) == {gene: fc for gene, (fc, _) in rows.items()}
    assert found.padj == tuple(p for _, p in rows.values())


@pytest.mark.parametrize("first", ["sep=;", "SEP=;", '"sep=;"', "# made by x\nsep=;"])
def test_a_line_that_states_the_separator_is_skipped_and_believed(tmp_path, first):
    (found,) = read_signatures(written(tmp_path, "excel.csv", f"{first}\n{GERMAN}"))
    assert as_dict(found) == {"A": 1.5, "B": -2} and found.padj == (0.001, 1.0)
    with pytest.raises(BadInput, match="Line 4 of excel.csv has 'high' in the column log2FC"):
        read_signatures(written(tmp_path, "excel.csv", "sep=;\nGene;log2FC\nA;1\nB;high\n"))
    (found,) = read_signatures(written(tmp_path, "bars.csv", "sep=|\ngene|logFC\nA|1\n"))
    assert as_dict(found) == {"A": 1}
    with pytest.raises(BadInput, match="read with vertical bars as separators, has no column of log2 fold changes"):
        read_signatures(written(tmp_path, "bars.csv", "sep=|\ngene|FC\nA|1\n"))


def test_natural_logarithms_are_converted(tmp_path):
    path = written(tmp_path, "t.csv", f"gene,avg_logFC\nA,{math.log(2)!r}\nB,{-3 * math.log(2)!r}\n")
    (found,) = read_signatures(path, base=math.e)
    assert found.log2_fc == pytest.approx((1, -3))


def test_repeated_genes_keep_the_surest_row_and_missing_ones_are_counted(tmp_path):
    text = "gene,log2FoldChange,padj\nA,5,0.5\nA,1,0.01\nB,NA,0.1\n,3,0.1\nC,inf,0.1\nD,-1,NA\nNA,2,0.1\n"
    (found,) = read_signatures(written(tmp_path, "t.csv", text))
    assert as_dict(found) == {"A": 1, "D": -1} and found.padj == (0.01, 1)
    assert "4 rows without a gene or a finite number were left out." in found.notes
    assert any("smallest adjusted p-value was kept: A" in note for note in found.notes)
    (found,) = read_signatures(written(tmp_path, "u.csv", "gene,log2FC\nA,1\nB,1\nA,-3\n"))
    assert as_dict(found) == {"B": 1, "A": -3} and any("largest change was kept: A" in note for note in found.notes)


def test_the_cutoff_of_adjusted_p_values(tmp_path):
    path = written(tmp_path, "t.csv", DESEQ2_CSV)
    (found,) = read_signatures(path, padj_below=0.05)
    assert found.genes == ("A",) and any("1 rows with an adjusted p-value of 0.05 or more" in n for n in found.notes)
    with pytest.raises(BadInput, match="passes the cutoffs: lower the cutoffs"):
        read_signatures(path, padj_below=1e-9)
    with pytest.raises(BadInput, match="no column of adjusted p-values"):
        read_signatures(written(tmp_path, "u.csv", "gene,logFC\nA,1\n"), padj_below=0.05)


def test_a_column_of_names_gives_several_signatures(tmp_path):
    text = "group,names,logfoldchanges,pvals_adj\nT,A,1,0.1\nB,A,-1,0.1\nT,C,2,0.1\n"
    path = written(tmp_path, "markers.csv", text)
    assert {s.name: as_dict(s) for s in read_signatures(path)} == {"T": {"A": 1, "C": 2}, "B": {"A": -1}}
    assert [s.name for s in read_signatures(path, names=["B"])] == ["B"]
    with pytest.raises(BadInput, match="no signature 't': choose for example T"):
        read_signatures(path, names=["t"])
    with pytest.raises(BadInput, match="holds 2 signatures, more than the limit of 1: choose some by name"):
        read_signatures(path, limit=1)
    with pytest.raises(BadInput, match="empty list"):
        read_signatures(path, names=[])


def test_real_lincs_z_scores():
    table = pd.read_csv(shared("lincs_overexpression_signif.tsv.gz"), sep="\t", dtype={"perturbagen": str})
    found = {s.name: s for s in read_signatures(SHARED / "lincs_overexpression_signif.tsv.gz")}
    assert set(found) == set(table["perturbagen"]) and len(found) == 2088
    for name, rows in list(table.groupby("perturbagen"))[::40]:
        once = rows.loc[rows.groupby("symbol")["nlog10_bonferroni_pval"].idxmax()]
        expected = dict(zip(once["symbol"], np.sign(once["z_score"]), strict=True))
        assert as_dict(found[name]) == expected and found[name].direction_only and found[name].kind == "z-scores"
        p = dict(zip(once["symbol"], 10.0 ** -once["nlog10_bonferroni_pval"], strict=True))
        assert found[name].padj == pytest.approx([p[gene] for gene in found[name].genes])
        strength = once.set_index("symbol")["z_score"].abs()
        assert strength[list(found[name].genes)].is_monotonic_decreasing
    assert any("how sure a change is and not how large" in note for note in found["2"].notes)
    assert set(expand(found["2"], ["CDC20", "RBP4", "ACTB"], 1).matched) == {"CDC20", "RBP4"}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "t.csv",
            "gene logFC padj\nA 1 0.1\n",
            "one column, 'gene logFC padj': separate columns by commas, tabs or semi",
        ),
        ("t.csv", "gene|logFC\nA|1\n", "one column"),
        ("t.csv", "A,1\nB,2\n", "no column of genes among A, 1: name the columns gene and log2FoldChange"),
        ("t.csv", "gene,FC\nA,2\n", "no column of log2 fold changes among gene, FC"),
        ("t.csv", "gene,logFC\nA,1\nB,2,3\n", "Line 3 of t.csv has 3 fields and the header 2"),
        ("t.csv", "#x\ngene,logFC\n\nA,high\n", "Line 4 of t.csv has 'high' in the column logFC: give a number or NA"),
        ("t.csv", "gene,logFC\n", "a header and no rows"),
        ("t.csv", "gene,logFC\nA,NA\n", "no row with a gene and a change"),
        ("t.csv", "gene,logFC\nA,500\n", "log2 fold change 500: give a number from -100 to 100"),
        ("t.csv", "gene,sign\nA,0.3\n", r"choose \+1 or -1"),
        ("t.csv", "# only\n", "comments alone"),
        ("t.csv", "sep=;\n", "comments alone"),
        (
            "t.csv",
            "gene,z_score,nlog10_bonferroni_pval\nA,3,1\n\nB,3,-400\n",
            "Line 4 of t.csv has -400 in the column nlog",
        ),
        ("t.gct", "#1.2\n\u00b2\t2\nName\tDescription\tX\tY\nr1\tA\t1\t-1\n", "must give 2 sizes"),
        ("t.gct", "#1.2\n" + "9" * 5000 + "\t2\nName\tDescription\tX\tY\nr1\tA\t1\t-1\n", "must give 2 sizes"),
        ("t.csv", " \n", "is empty"),
        ("t.csv", '"' + "x" * 200_000, "are no table"),
        ("t.xlsx", b"PK\x03\x04rest", "Excel workbook: save it as CSV"),
        ("t.csv", b"gene,logFC\nA\xff,1\n", "not a text in UTF-8"),
        ("t.csv", b"a\0b\0", "not a text file"),
        ("t.csv.gz", b"\x1f\x8b\x08\x00garbage", "damaged gzip"),
        ("t.csv.gz", gzip.compress(DESEQ2_CSV.encode())[:-12], "damaged gzip"),
        ("t.gctx.gz", gzip.compress(b"\x89HDF\r\n\x1a\nrest"), "packed HDF5 file: unpack it first"),
        ("t.gctx", b"\x89HDF\r\n\x1a\nrest", "damaged or incomplete HDF5"),
        ("t.gct", "#1.2\n2\nName\tDescription\tX\n", "Line 2 of t.gct must give 2 sizes"),
        ("t.gct", "#1.2\n2\t1\nName\tDescription\tX\nr1\tA\t1\n", "states 2 rows and 1 columns and holds other ones"),
        ("t.gct", "#1.2\n1\t2\nName\tDescription\tX\tX\nr1\tA\t1\t-1\n", "two columns named 'X'"),
        ("t.gct", "#1.2\n1\t1\nName\tDescription\tX\nr1\tA\tx\n", "Line 4 of t.gct has 'x' in the column X"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(BadInput, match=message) as caught:
        read_signatures(path)
    assert "\n" not in str(caught.value)


good_texts = st.sampled_from(
    [DESEQ2_CSV, LIMMA, GERMAN, "S_UP\tna\tA\tB\nS_DN\tna\tC\n", "#1.2\n1\t1\nN\tD\tX\nr\tA\t-3\n"]
)
damaged = st.builds(
    lambda text, at, insert, cut: text[:at] + insert + text[at + cut :],
    good_texts,
    st.integers(0, 120),
    st.text('\t,;"\n#-.10Ax\x1c\u2028', max_size=4),
    st.integers(0, 6),
)


@settings(max_examples=300)
@given(damaged | st.text(max_size=60), st.sampled_from(["x.csv", "x.tsv", "x.txt", "x.gmt", "x.gct"]))
def test_any_text_is_read_or_refused(tmp_path_factory, text, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(BadInput):
        assert all(isinstance(signature, Signature) for signature in read_signatures(path))


def test_a_file_that_is_too_large_or_absent_is_refused(tmp_path):
    path = written(tmp_path, "t.csv", DESEQ2_CSV)
    with pytest.raises(BadInput, match="more than the limit of 0.0 MB"):
        read_signatures(path, max_bytes=20)
    bomb = tmp_path / "bomb.csv.gz"
    bomb.write_bytes(gzip.compress(b"gene,logFC\n" + b"A,1\n" * 500_000))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(BadInput, match="holds 0.1 MB, more than the limit of 0.1 MB"):
        read_signatures(bomb, max_bytes=100_000)
    with pytest.raises(BadInput, match="absent.csv cannot be read .No such file"):
        read_signatures(tmp_path / "absent.csv")
    with pytest.raises(BadInput, match="cannot be read .embedded null byte"):
        read_signatures("a\0b")


def test_text_has_lower_limits_than_binary_files(tmp_path):
    """Above them even short rows, of which a megabyte holds the most, keep a user waiting."""
    row = b"A,1\n"
    path = tmp_path / "t.csv"
    path.write_bytes(b"gene,logFC\n" + row * (MAX_TABLE_BYTES // len(row)))
    with pytest.raises(
        BadInput, match=r"t.csv holds 25.0 MB, more than the limit of 25.0 MB for a table: choose fewer"
    ):
        read_signatures(path)
    sets = tmp_path / "t.gmt"
    sets.write_bytes(b"S_UP\tna" + b"\tA" * (MAX_TEXT_BYTES // 2) + b"\n")
    with pytest.raises(BadInput, match=r"t.gmt holds 50.0 MB, more than the limit of 50.0 MB for text"):
        read_signatures(sets)


@given(
    st.lists(st.tuples(st.sampled_from(["A", "B", "C", "", "NA"]), changes, st.floats(0, 1)), min_size=1, max_size=30),
    st.lists(st.sampled_from(["x", "y", ""]), min_size=30, max_size=30),
)
def test_rows_are_dealt_to_signatures_and_the_surest_of_each_gene_is_kept(tmp_path_factory, rows, names):
    """Against a plain search of every gene's best row."""
    path = tmp_path_factory.getbasetemp() / "several.csv"
    lines = [f"{n},{g},{fc!r},{p!r}" for n, (g, fc, p) in zip(names, rows, strict=False)]
    path.write_text("group,gene,logFC,padj\n" + "\n".join(lines) + "\n")
    best: dict[str, dict[str, tuple[float, float, int]]] = {}
    for i, (name, (gene, change, p)) in enumerate(zip(names, rows, strict=False)):
        if gene in ("", "NA"):
            continue
        of_name = best.setdefault(name or "unnamed", {})
        of_name[gene] = min(of_name.get(gene, (2.0, 0.0, 0)), (p, -abs(change), i))
    expected = {name: {g: rows[i][1] for g, (_, _, i) in genes.items()} for name, genes in best.items()}
    if not expected:
        with pytest.raises(BadInput, match="no row with a gene"):
            read_signatures(path)
        return
    found = read_signatures(path)
    assert {s.name: as_dict(s) for s in found} == expected
    order = list(dict.fromkeys(name or "unnamed" for name, _ in zip(names, rows, strict=False)))
    assert [s.name for s in found] == [name for name in order if name in expected]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"base": 1}, "base of the logarithm is 1"),
        ({"padj_below": 0}, "limit of adjusted p-values"),
        ({"z_cutoff": -1}, r"cutoff of \|z\|"),
        ({"z_scale": 0}, "log2 fold change per z"),
    ],
)
def test_an_option_out_of_range_is_refused(tmp_path, option, message):
    with pytest.raises(BadInput, match=message):
        read_signatures(written(tmp_path, "t.csv", DESEQ2_CSV), **option)


# ------------------------------------------------------------------ GCT and GCTX

Z = np.array([[3.5, -0.5], [-4.25, 2.5], [1.0, -2.0], [2.0, np.nan]])
"""``[gene, column]``"""
ROW_IDS, SYMBOLS, COLUMNS = (
    ["780", "7849", "2978", "-1"],
    ["DDR1", "PAX8", "GUCA1A", "-666"],
    ["p1:A375:24", "p2:MCF7:6"],
)


def gct(version: str) -> str:
    numbers = [["NA" if np.isnan(v) else repr(float(v)) for v in row] for row in Z]
    if version == "1.2":
        head = ["#1.2", f"{len(Z)}\t2", "\t".join(["Name", "Description", *COLUMNS])]
        return "\n".join(
            [*head, *("\t".join([i, s, *row]) for i, s, row in zip(ROW_IDS, SYMBOLS, numbers, strict=True))]
        )
    head = ["#1.3", f"{len(Z)}\t2\t2\t2", "\t".join(["id", "pr_is_lm", "pr_gene_symbol", *COLUMNS])]
    head += ["cell_id\tna\tna\tA375\tMCF7", "pert_iname\tna\tna\tafatinib\t-666"]
    rows = ["\t".join([i, "1", s, *row]) for i, s, row in zip(ROW_IDS, SYMBOLS, numbers, strict=True)]
    return "\n".join([*head, *rows]) + "\n"


def write_gctx(path: Path, matrix: np.ndarray, symbols: list[str] | None = SYMBOLS) -> Path:
    """The layout that CMap writes: one stored row per column, byte strings, optional metadata beside the ids."""
    with h5py.File(path, "w") as file:
        file["0/DATA/0/matrix"] = matrix.T.astype(np.float32)
        file["0/META/ROW/id"] = np.array(ROW_IDS, dtype="S")
        file["0/META/COL/id"] = np.array(COLUMNS, dtype="S")
        file["0/META/COL/cell_id"] = np.array(["A375", "MCF7"], dtype="S")
        file["0/META/COL/pert_iname"] = np.array(["afatinib", "-666"], dtype="S")
        if symbols is not None:
            file["0/META/ROW/pr_gene_symbol"] = np.array(symbols, dtype="S")
    return path


@pytest.fixture(params=["1.2", "1.3", "1.3gz", "gctx"])
def matrix_file(request, tmp_path) -> Path:
    if request.param == "gctx":
        return write_gctx(tmp_path / "z.gctx", Z)
    if request.param == "1.3gz":
        path = tmp_path / "z.gct.gz"
        path.write_bytes(gzip.compress(gct("1.3").encode()))
        return path
    return written(tmp_path, "z.gct", gct(request.param))


def test_columns_of_a_matrix_become_directions_surest_first(matrix_file):
    first, second = read_signatures(matrix_file)
    assert (first.name, second.name) == tuple(COLUMNS) and first.direction_only and first.kind == "z-scores"
    assert first.genes == ("PAX8", "DDR1") and first.log2_fc == (-1, 1)  # -4.25, 3.5; 1.0 is too weak
    assert second.genes == ("PAX8", "GUCA1A") and second.log2_fc == (1, -1)
    assert any("z-scores" in note for note in first.notes)
    if "1.2" not in matrix_file.read_bytes()[:5].decode("latin-1"):
        assert (first.cell_line, first.drug, second.drug) == ("A375", "afatinib", "")


def test_a_stated_scale_turns_z_scores_into_fold_changes(matrix_file):
    (second,) = read_signatures(matrix_file, names=[COLUMNS[1]], z_scale=0.5)
    assert as_dict(second) == {"PAX8": 1.25, "GUCA1A": -1.0, "DDR1": -0.25} and not second.direction_only
    assert any("0.5 log2 fold change per unit of z is assumed" in note for note in second.notes)
    assert len(read_signatures(matrix_file, z_cutoff=4)) == 1  # nothing of the second column is left


def test_matrices_that_are_no_z_scores_or_do_not_fit_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no negative value, as expression levels"):
        read_signatures(write_gctx(tmp_path / "x.gctx", np.abs(Z)))
    with pytest.raises(BadInput, match=r"2 columns and 4 rows and a stored matrix of shape \(4, 2\)"):
        read_signatures(write_gctx(tmp_path / "t.gctx", Z.T))
    with pytest.raises(BadInput, match="more than the limit"):
        read_signatures(write_gctx(tmp_path / "z.gctx", Z), max_bytes=40)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(BadInput, match="neither a GCTX matrix nor scanpy's rank_genes_groups"):
        read_signatures(tmp_path / "other.h5")
    with h5py.File(write_gctx(tmp_path / "half.gctx", Z), "a") as file:
        del file["0/META/ROW/id"]
    with pytest.raises(BadInput, match="damaged or incomplete"):
        read_signatures(tmp_path / "half.gctx")


def gctx(path: Path, ids: int, matrix: tuple[int, int] | None) -> Path:
    """A GCTX that states sizes and holds nothing; a group in place of the matrix where it is None."""
    with h5py.File(path, "w") as file:
        if matrix is None:
            file.create_group("0/DATA/0/matrix")
        else:
            file.create_dataset("0/DATA/0/matrix", matrix, "f4", chunks=(1, 1000))
        file.create_dataset("0/META/ROW/id", (ids,), "S50", chunks=(1000,))
        file["0/META/COL/id"] = [b"S1"]
    return path


def test_sizes_that_a_matrix_file_only_states_are_not_reserved(tmp_path):
    assert gctx(tmp_path / "b.gctx", 10**10, (1, 10**10)).stat().st_size < 100_000
    with pytest.raises(BadInput, match=r"b.gctx holds 500,000.0 MB, more than the limit of 100.0 MB"):
        read_signatures(tmp_path / "b.gctx")
    with pytest.raises(BadInput, match="1 columns and 10000000000 rows and a stored matrix of shape"):
        read_signatures(gctx(tmp_path / "c.gctx", 10**10, (10**6, 10**6)))
    with pytest.raises(BadInput, match="damaged or incomplete"):
        read_signatures(gctx(tmp_path / "g.gctx", 1000, None))


def test_row_ids_stand_in_where_there_are_no_symbols(tmp_path):
    first, _ = read_signatures(write_gctx(tmp_path / "z.gctx", Z, symbols=None))
    assert first.genes == ("7849", "780", "-1")


# ------------------------------------------------------------------ scanpy


def test_scanpys_ranking_reads_as_scanpy_itself_gives_it(tmp_path):
    sc = pytest.importorskip("scanpy")
    rng = np.random.Generator(np.random.Philox(3))
    counts = rng.poisson(2.0, size=(30, 6)).astype(np.float32)
    counts[:10, 0] += 9
    data = sc.AnnData(
        counts, obs=pd.DataFrame({"type": np.repeat(["T", "B", "M"], 10)}, index=[f"c{i}" for i in range(30)])
    )
    data.var_names = [f"GENE{i}" for i in range(6)]
    data.obs["type"] = data.obs["type"].astype("category")
    sc.pp.log1p(data)
    sc.tl.rank_genes_groups(data, "type", method="t-test")
    data.write_h5ad(tmp_path / "ranked.h5ad")
    found = {s.name: s for s in read_signatures(tmp_path / "ranked.h5ad")}
    assert set(found) == {"T", "B", "M"} and found["T"].description == "group T against rest"
    for name, signature in found.items():
        table = sc.get.rank_genes_groups_df(data, name)
        assert signature.genes == tuple(table["names"])
        np.testing.assert_allclose(signature.log2_fc, table["logfoldchanges"], rtol=1e-6)
        np.testing.assert_allclose(signature.padj, table["pvals_adj"], rtol=1e-6)
    (kept,) = read_signatures(tmp_path / "ranked.h5ad", names=["T"], padj_below=1e-4)
    assert kept.genes == ("GENE0",)
    with h5py.File(tmp_path / "ranked.h5ad", "a") as file:
        del file["uns/rank_genes_groups/logfoldchanges"]
    with pytest.raises(BadInput, match="no logfoldchanges"):
        read_signatures(tmp_path / "ranked.h5ad")


# ------------------------------------------------------------------ the curated library


def library_rows() -> list[dict[str, str]]:
    with LIBRARY_CSV.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_library_is_large_signed_and_cited():
    rows = library_rows()
    assert len({row["signature"] for row in rows}) >= 20
    assert {row["sign"] for row in rows} == {"+1", "-1"}
    assert all(re.search(r"\d{4}.*; doi:10\.\d{4,9}/\S+$", row["source"]) for row in rows)
    pairs = [(row["signature"], row["gene"]) for row in rows]
    assert len(set(pairs)) == len(pairs)
    assert all(re.fullmatch(r"[A-Z][A-Z0-9]*(-[A-Z0-9]+)?|C\d+orf\d+", row["gene"]) for row in rows)


def test_every_signature_of_the_library_has_six_to_twenty_genes_with_their_signs():
    rows = library_rows()
    for signature in load_library():
        mine = {row["gene"]: float(row["sign"]) for row in rows if row["signature"] == signature.name}
        assert as_dict(signature) == mine and 6 <= len(mine) <= 20
        assert signature.direction_only and signature.kind == "mechanism" and signature.source
    assert load_library() is load_library()


def test_rows_that_cite_a_hallmark_are_in_it():
    lines = [line.split("\t") for line in shared("hallmark_v7.0.gmt").read_text().splitlines()]
    sets = {name: set(genes) for name, _, *genes in lines}
    cited = [(re.search(r"HALLMARK_\w+", row["source"]), row) for row in library_rows()]
    assert sum(match is not None for match, _ in cited) > 150
    assert [row for match, row in cited if match and row["gene"] not in sets[match[0]]] == []


def test_mechanisms_that_oppose_each_other_have_opposite_signs():
    by_name = {signature.name: as_dict(signature) for signature in load_library()}
    for one, other in [("tgf_beta_inhibition", "tgf_beta_stimulation"), ("jak_stat_inhibition", "interferon_gamma")]:
        common = by_name[one].keys() & by_name[other].keys()
        assert len(common) >= 5 and all(by_name[one][gene] == -by_name[other][gene] for gene in common)


def test_most_of_the_library_acts_on_the_demo_genes():
    with (ROOT / "ge2hist_core" / "simulator" / "genes.csv").open(newline="", encoding="utf-8") as file:
        genes = [row["symbol"] for row in csv.DictReader(file)]
    reach = {signature.name: len(expand(signature, genes, 1).matched) for signature in load_library()}
    assert min(reach.values()) >= 1 and sum(n >= 4 for n in reach.values()) >= 12


def test_the_overview_counts_what_the_file_holds():
    table, rows = library_table(), pd.DataFrame(library_rows())
    counts = rows.groupby("signature")["sign"].value_counts().unstack(fill_value=0)
    for row in table.itertuples():
        assert (row.n_up, row.n_down) == (counts.loc[row.signature, "+1"], counts.loc[row.signature, "-1"])
        assert set(row.up.split(", ")) - {""} == set(rows.query("signature == @row.signature and sign == '+1'")["gene"])
    assert list(table["signature"]) == list(dict.fromkeys(rows["signature"]))


def test_the_reader_reads_the_librarys_own_file():
    assert [as_dict(s) for s in read_signatures(LIBRARY_CSV)] == [as_dict(s) for s in load_library()]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("TFF1,-1", "TFF1,0", "gives TFF1 in s the sign '0'"),
        ("doi:10.1/x", "somewhere", "a source without doi"),
        ("GREB1,-1", "TFF1,-1", "names the gene 'TFF1' twice"),
        ("M,GREB1", "N,GREB1", "more than one mechanism"),
        ("gene,sign", "sign,gene", "give signature, mechanism, gene, sign, source"),
    ],
)
def test_a_library_with_a_mistake_is_refused(tmp_path, old, new, message):
    good = (
        "signature,mechanism,gene,sign,source\ns,M,TFF1,-1,A 2000; doi:10.1234/x\ns,M,GREB1,-1,A 2000; doi:10.1234/x\n"
    )
    assert len(load_library(written(tmp_path, "good.csv", good))) == 1
    old = old.replace("10.1/", "10.1234/")
    assert old in good
    with pytest.raises(BadInput, match=message):
        load_library(written(tmp_path, "bad.csv", good.replace(old, new, 1)))


# ------------------------------------------------------------------ the module


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(signatures)
    assert result.attempted >= 3 and result.failed == 0


def test_importing_the_module_loads_nothing_heavy():
    code = (
        "import perturb.signatures, sys\n"
        "print(sorted(set(sys.modules) & {'streamlit', 'torch', 'scanpy', 'anndata', 'h5py', 'scipy.optimize'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
