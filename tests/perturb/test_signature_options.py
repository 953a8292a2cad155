"""How a signature file is read is the same for every command: fold changes are checked by hand."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest

from ge2hist_core.types import BadInput
from perturb.signature_options import Reading, add_reading, file_signatures, find_signature
from perturb.signatures import Signature, directions, expand

TABLE = "gene,avg_logFC,p_val_adj\nA,1,0.001\nB,-3,0.2\nC,2,0.01\nD,0,0.001\n"
GENE_SET = "S_UP\tx\tA\tB\nS_DN\tx\tC\n"


def parsed(*said: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--signature-file")
    add_reading(parser)
    return parser.parse_args(said)


@pytest.fixture
def table(tmp_path: Path) -> str:
    (tmp_path / "mine.csv").write_text(TABLE)
    return str(tmp_path / "mine.csv")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([], {"A": 1, "B": -3, "C": 2, "D": 0}),
        (["--padj-below", "0.05"], {"A": 1, "C": 2, "D": 0}),
        (
            ["--log-base", "e"],
            {"A": math.log2(math.e), "B": -3 * math.log2(math.e), "C": 2 * math.log2(math.e), "D": 0},
        ),
        (["--log-base", "10"], {"A": math.log2(10), "B": -3 * math.log2(10), "C": 2 * math.log2(10), "D": 0}),
        (["--direction-only"], {"B": -1, "C": 1, "A": 1}),
    ],
)
def test_the_options_change_the_fold_changes(table: str, said: list[str], expected: dict[str, float]) -> None:
    (found,) = file_signatures(parsed("--signature-file", table, *said)) or ()
    assert dict(zip(found.genes, found.log2_fc, strict=True)) == pytest.approx(expected)
    assert list(found.genes) == list(expected)
    assert found.direction_only == ("--direction-only" in said)


def test_top_counts_the_genes_that_the_data_have_and_survives_directions(table: str) -> None:
    for more in ([], ["--direction-only"]):
        (found,) = file_signatures(parsed("--signature-file", table, "--top", "1", *more)) or ()
        expansion = expand(found, ["A", "C"], 1.0)
        assert expansion.matched == ("C",)  # B is stronger, but the data lack it
        assert any("1 weaker genes" in sentence for sentence in expansion.sentences)
    assert expand(found, ["A", "C"], 1.0, top=2).perturbation.genes == ("C", "A")
    with pytest.raises(BadInput, match="top is 0: choose a whole number"):
        file_signatures(parsed("--signature-file", table, "--top", "0"))


def test_z_scores_are_read_as_the_options_say(tmp_path: Path) -> None:
    (tmp_path / "z.csv").write_text("gene,zscore\nA,1.5\nB,-4\nC,3\n")
    path = str(tmp_path / "z.csv")
    for said, expected in (
        ([], {"B": -1, "C": 1}),
        (["--z-cutoff", "1"], {"B": -1, "C": 1, "A": 1}),
        (["--z-scale", "0.5"], {"B": -2, "C": 1.5, "A": 0.75}),
    ):
        (found,) = file_signatures(parsed("--signature-file", path, *said)) or ()
        assert dict(zip(found.genes, found.log2_fc, strict=True)) == expected


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["--padj-below", "0.05"], "mine.gmt gives no adjusted p-values: set no limit"),
        (["--log-base", "e"], "mine.gmt holds no fold changes: state no base"),
        (["--z-cutoff", "1"], "mine.gmt holds no z-scores"),
        (["--z-scale", "1"], "mine.gmt holds no z-scores"),
    ],
)
def test_an_option_that_the_file_has_nothing_for_is_refused(tmp_path: Path, said: list[str], message: str) -> None:
    (tmp_path / "mine.gmt").write_text(GENE_SET)
    with pytest.raises(BadInput, match=message):
        file_signatures(parsed("--signature-file", str(tmp_path / "mine.gmt"), *said))


@pytest.mark.parametrize(
    "said",
    [
        ("--padj-below", "0.05"),
        ("--top", "9"),
        ("--log-base", "e"),
        ("--z-cutoff", "1"),
        ("--z-scale", "1"),
        ("--direction-only",),
    ],
)
def test_an_option_without_a_file_is_refused_by_its_name(said: tuple[str, ...]) -> None:
    assert file_signatures(parsed()) is None
    with pytest.raises(BadInput, match=f"{said[0]} says how a signature file is read: give --signature-file too"):
        file_signatures(parsed(*said))


def test_directions_drop_what_does_not_change(tmp_path: Path) -> None:
    assert directions(Signature("flat", ("A", "B"), (0.0, 0.0))) is None
    signed = Signature("s", ("A",), (1.0,), direction_only=True)
    assert directions(signed) is signed
    found = directions(Signature("s", ("A", "B"), (0.5, -2.0), padj=(0.1, 0.2)))
    assert found is not None and (found.genes, found.log2_fc, found.padj) == (("B", "A"), (-1.0, 1.0), (0.2, 0.1))
    (tmp_path / "flat.csv").write_text("gene,logFC\nA,0\n")
    with pytest.raises(BadInput, match="flat.csv has no gene that changes"):
        Reading(direction_only=True).read(tmp_path / "flat.csv")


def test_a_signature_is_looked_for_in_the_file_or_else_in_the_library(table: str) -> None:
    assert find_signature("interferon_gamma", None, None).name == "interferon_gamma"
    read = Reading().read(table)
    assert find_signature("mine", table, read) is read[0]
    with pytest.raises(BadInput, match="no signature 'interferon_gamma' in .*mine.csv"):
        find_signature("interferon_gamma", table, read)
