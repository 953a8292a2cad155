from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ge2hist_core.__main__ import run_command
from ge2hist_core.config import SampleConfig
from ge2hist_core.data import open_h5ad, write_cells
from ge2hist_core.types import BadInput, Cells
from perturb.__main__ import COMMANDS
from perturb.edits import Perturbation
from perturb.grn import Network, Propagation
from perturb.recipe import DEFAULT_SEEDS, MAX_PICTURES, SCHEMA, Recipe
from perturb.run import cells_like

DATA, MODEL = "d" * 64, "e" * 64
PLAIN = Recipe(DATA, MODEL, ("cell-1",))
NETWORK = Network(np.array(["CD8A"]), np.array(["VEGFA"]), np.array([0.5]), "one edge, no more")

recipes = st.builds(
    Recipe,
    st.just(DATA),
    st.just(MODEL),
    st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=3, unique=True).map(tuple),
    st.sampled_from(
        ["", "CD8A:ko", "CD8A:ko,VEGFA:x0.5", "a%3Ab:set=3", "CD8A:p90,IFN%20g@1.5(STAT1:x2;MYC:ko),S(A:ko)"]
    ).map(Perturbation.parse),
    st.builds(
        SampleConfig,
        st.sampled_from(["ddim", "ddpm", "dpm++"]),
        st.integers(1, 1000),
        st.floats(0, 10) | st.integers(0, 10),
    ),
    st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20, unique=True).map(tuple) | st.just(DEFAULT_SEEDS),
    st.integers(0, 2**63 - 1),
    st.none()
    | st.builds(
        Propagation,
        st.just(NETWORK.sha256),
        st.just(NETWORK.name),
        st.integers(0, 10),
        st.sampled_from([(0.0, 0.99), (0, 1), (0.05, 0.95)]),
    ),
    st.none() | st.sampled_from(["raw.X", "counts"]),
    st.none() | st.just("feature_name"),
)


@given(recipes)
def test_json_and_url_read_back_to_the_same_recipe(recipe: Recipe) -> None:
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_json(json.dumps(recipe.to_dict(), indent=3)).hash == recipe.hash
    noted = Recipe.from_json(json.dumps({"notice": "Generated"} | recipe.to_dict()))
    assert noted == recipe and noted.hash == recipe.hash and "notice" not in noted.to_query()
    assert Recipe.from_query(recipe.to_query(), DATA, MODEL, lambda digits: {NETWORK.sha256[:12]: NETWORK}[digits]) == (
        recipe
    )


def test_defaults_stay_out_of_the_url() -> None:
    assert PLAIN.to_query() == {"data": DATA[:12], "model": MODEL[:12], "cell": "cell-1"}
    edited = replace(
        PLAIN, perturbation=Perturbation.parse("CD8A:ko"), seeds=(0, 1, 2, 9), sample=SampleConfig(steps=8)
    )
    extra = {"edit": "CD8A:ko", "seeds": "0-2,9", "steps": "8"}
    assert edited.to_query() == PLAIN.to_query() | extra


def test_hash_is_that_of_the_canonical_text_and_sees_every_field() -> None:
    import hashlib

    assert PLAIN.hash == hashlib.sha256(PLAIN.to_json().encode()).hexdigest()
    others = [
        replace(PLAIN, data_sha256=MODEL),
        replace(PLAIN, model_sha256=DATA),
        replace(PLAIN, cell_ids=("cell-2",)),
        replace(PLAIN, perturbation=Perturbation.parse("CD8A:ko")),
        replace(PLAIN, perturbation=Perturbation.parse("CD8A:x0.5,B:ko")),
        replace(PLAIN, perturbation=Perturbation.parse("B:ko,CD8A:x0.5")),
        replace(PLAIN, perturbation=Perturbation.parse("S(B:ko;CD8A:x0.5)")),
        replace(PLAIN, perturbation=Perturbation.parse("S@1(B:ko;CD8A:x0.5)")),
        replace(PLAIN, sample=SampleConfig(solver="ddim")),
        replace(PLAIN, seeds=(0,)),
        replace(PLAIN, encoder_seed=1),
        replace(PLAIN, propagation=Propagation(NETWORK.sha256, NETWORK.name)),
        replace(PLAIN, propagation=Propagation(NETWORK.sha256, NETWORK.name, 2)),
        replace(PLAIN, propagation=Propagation(NETWORK.sha256, NETWORK.name, control=True)),
        replace(PLAIN, matrix="raw.X"),
        replace(PLAIN, gene_column="index"),
    ]
    assert len({PLAIN.hash, *(other.hash for other in others)}) == len(others) + 1
    assert (
        replace(PLAIN, sample=SampleConfig(guidance=1)).hash == replace(PLAIN, sample=SampleConfig(guidance=1.0)).hash
    )


def test_base_and_draft() -> None:
    edited = replace(PLAIN, perturbation=Perturbation.parse("CD8A:ko"))
    assert edited.base == PLAIN
    several = replace(edited, cell_ids=("cell-1", "cell-2"))
    for recipe in (edited, several):
        assert recipe.draft == replace(edited, seeds=(0,))


def test_canonical_text_of_schema_1_stays_as_it_is() -> None:
    """A file kept by a user must hash alike in later versions of the same schema."""
    recipe = replace(PLAIN, perturbation=Perturbation.parse("CD8A:x0.5"), seeds=(3,))
    assert recipe.to_json() == (
        '{"cell_ids":["cell-1"],"data_sha256":"' + DATA + '","encoder_seed":0,"gene_column":null,"matrix":null,'
        '"model_sha256":"' + MODEL + '","perturbation":[{"amount":0.5,"gene":"CD8A","kind":"factor"}],'
        '"sample":{"guidance":1.0,"solver":"dpm++","steps":16},"schema":1,"seeds":[3]}'
    )


def without(name: str) -> str:
    return json.dumps({key: value for key, value in PLAIN.to_dict().items() if key != name})


KO = {"gene": "CD8A", "kind": "ko"}


def changed(**fields: object) -> str:
    return json.dumps(PLAIN.to_dict() | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "no field 'schema'"),
        ("[" * 100_000, "The recipe is nested more than 50 deep: give a recipe.json"),
        (without("cell_ids")[:-1] + ', "cell_ids": ' + "[" * 400 + "]" * 400 + "}", "nested more than 50 deep"),
        (without("encoder_seed")[:-1] + ', "encoder_seed": ' + "1" * 5000 + "}", "whole number of thousands of digits"),
        (without("schema"), "no field 'schema'"),
        (changed(schema=SCHEMA + 1), f"schema {SCHEMA + 1}, this version of GE2Hist reads schema {SCHEMA}"),
        (changed(schema="1"), "schema '1'"),
        (without("cell_ids"), "no field 'cell_ids'"),
        (changed(cell_ids=[]), "cell_ids is \\(\\): give at least one name"),
        (changed(cell_ids=["a", "a"]), "names 'a' twice"),
        (changed(cell_ids="cell-1"), "cell_ids is 'cell-1'"),
        (changed(seeds=[0.5]), "seeds is"),
        (changed(seeds=[-1]), "A seed is -1"),
        (changed(encoder_seed="x"), "A seed is 'x'"),
        (changed(seeds=list(range(MAX_PICTURES + 1))), f"more than {MAX_PICTURES} pictures"),
        (changed(data_sha256="../../etc"), "data_sha256 is '../../etc': give the 64"),
        (changed(sample={"steps": 0}), "steps is 0"),
        (changed(sample={"steps": "many"}), "steps is 'many'"),
        (changed(sample={"guidance": "much"}), "guidance|another type"),
        (changed(sample=[1]), "malformed"),
        (changed(perturbation=["CD8A:ko"]), "malformed"),
        (changed(perturbation=[{"gene": "CD8A"}]), "missing or of another type"),
        (changed(perturbation=[{"gene": "CD8A", "kind": "exec", "amount": 1}]), "kind 'exec'"),
        (changed(perturbation=[{"gene": "CD8A", "kind": "ko", "code": 1}]), "Unknown field 'code'"),
        (changed(colour="red"), "Unknown field 'colour'"),
        (changed(matrix=3), "matrix is 3"),
        (changed(matrix="\ud800"), "matrix holds '.ud800': half of a surrogate pair"),
        (changed(gene_column="a\udfff"), "gene_column holds 'a.udfff'"),
        (changed(perturbation=[{"gene": "\ud800", "kind": "ko"}]), "gene of an edit holds"),
        (changed(perturbation=[{"name": "\ud800", "edits": [KO]}]), "name of a set of edits holds"),
        (changed(perturbation=[{"gene": "A", "kind": "set", "amount": 10**400}]), "of A has amount 10000"),
        (changed(perturbation=[{"name": "a", "dose": 10**400, "edits": [KO]}]), "dose of a is 10000"),
        (changed(propagation={"network_sha256": MODEL, "network_name": "\ud800"}), "network_name holds"),
        (
            changed(propagation={"network_sha256": MODEL, "network_name": "n", "quantiles": [0, 10**400]}),
            "quantiles is",
        ),
        (changed(sample={"guidance": 10**400}), "guidance is 1000"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        Recipe.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "names no cell"),
        ({"cell": "a", "seeds": "0-"}, "seeds is '0-'"),
        ({"cell": "a", "seeds": "5-2"}, "'5-2'"),
        ({"cell": "a", "seeds": "0-99999999999"}, "at most"),
        ({"cell": "a", "steps": "1.5"}, "steps is '1.5': give a whole number"),
        ({"cell": "a", "guidance": "nan"}, "guidance is nan"),
        ({"cell": "a", "solver": "euler"}, "solver is 'euler'"),
        ({"cell": "a", "schema": "7"}, "schema 7"),
        ({"cell": "a", "data": "0123"}, "other cells \\(data=0123\\)"),
        ({"cell": "a", "model": "0123"}, "other model \\(model=0123\\)"),
    ],
)
def test_bad_links_are_refused(query: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Recipe.from_query(query, DATA, MODEL)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(BadInput, match="Cannot read the recipe"):
        Recipe.read(tmp_path / "none.json")
    with pytest.raises(BadInput, match="Cannot read the recipe"):
        Recipe.read("a\0b")


def test_a_control_and_half_a_character_are_refused() -> None:
    how = Propagation(NETWORK.sha256, NETWORK.name)
    edited = replace(PLAIN, perturbation=Perturbation.parse("CD8A:ko"), propagation=how)
    assert list(edited.arms) == ["base", "edited", "direct", "control"] and edited.arms["direct"].propagation is None
    with pytest.raises(BadInput, match="propagation is a control, which is drawn beside another"):
        Recipe.from_json(edited.arms["control"].to_json())
    with pytest.raises(BadInput, match="half of a surrogate pair is no text"):
        replace(PLAIN, cell_ids=("cell\ud800",))


def test_a_link_with_a_network_needs_that_network_and_keeps_its_name() -> None:
    recipe = replace(PLAIN, propagation=Propagation(NETWORK.sha256, "mine, not theirs", 2))
    other = replace(NETWORK, name="theirs")
    assert Recipe.from_query(recipe.to_query(), DATA, MODEL, lambda digits: other) == recipe
    with pytest.raises(BadInput, match="open that network first"):
        Recipe.from_query(recipe.to_query(), DATA, MODEL)
    for bad in ("xyz", f"{NETWORK.sha256[:12]},3,0,0.99", f"{NETWORK.sha256[:12]},three,0,0.99,n"):
        with pytest.raises(BadInput, match="network is"):
            Recipe.from_query(recipe.to_query() | {"network": bad}, DATA, MODEL, lambda digits: NETWORK)


# The command


@pytest.fixture
def command(tiny_folder: Path, demo_cells: Cells, tmp_path: Path) -> list[str]:
    write_cells(demo_cells, tmp_path / "cells.h5ad")
    (tmp_path / "mine.csv").write_text("gene,logFC,padj\nGAPDH,1,0.001\nACTB,-2,0.2\nNOSUCHGENE,2,0.001\n")
    return ["recipe", "--bundle", str(tiny_folder), "--cells", str(tmp_path / "cells.h5ad")]


def printed(command: list[str], capsys: pytest.CaptureFixture[str]) -> Recipe:
    assert run_command("perturb", "", COMMANDS, command) == 0
    return Recipe.from_json(capsys.readouterr().out)


def refusal(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run_command("perturb", "", COMMANDS, command) == 2
    return capsys.readouterr().err


def test_the_command_takes_n_cells_of_a_type_as_the_app_does(command: list[str], demo_cells: Cells, capsys) -> None:
    kind = "Fibroblast"
    of_type = demo_cells.cell_id[demo_cells.cell_type == kind].tolist()
    assert printed([*command, "--type", kind], capsys).cell_ids == (of_type[0],)
    several = printed([*command, "--type", kind, "--n-cells", "4"], capsys).cell_ids
    with open_h5ad(command[-1]) as source:
        assert several == cells_like(source, of_type[0], 4)
    assert len(set(several)) == 4 and set(several) <= set(of_type)
    assert printed([*command, "--cell", of_type[2], "--n-cells", "2"], capsys).cell_ids[0] == of_type[2]
    assert "has no cell of type 'Fibro' with counts: choose one of B cell" in refusal(
        [*command, "--type", "Fibro"], capsys
    )
    assert "7 cells of type 'Fibroblast' were asked for, the file has 6" in refusal(
        [*command, "--type", kind, "--n-cells", "7"], capsys
    )
    assert "0 cells were asked for" in refusal([*command, "--type", kind, "--n-cells", "0"], capsys)
    two = ["--cell", of_type[0], "--cell", of_type[1], "--n-cells", "2"]
    assert "--n-cells stands beside 2 cells" in refusal([*command, *two], capsys)


def test_the_command_makes_one_dose_of_a_signature(command: list[str], tmp_path: Path, capsys) -> None:
    one = [*command, "--cell", "cell-3"]
    library = printed([*one, "--edit", "CD8A:ko", "--signature", "interferon_gamma", "--dose", "1.5"], capsys)
    assert str(library.perturbation).startswith("CD8A:ko,interferon_gamma@1.5(")
    mine = [*one, "--signature", "mine", "--signature-file", str(tmp_path / "mine.csv")]
    assert run_command("perturb", "", COMMANDS, mine) == 0
    said = capsys.readouterr()
    assert str(Recipe.from_json(said.out).perturbation) == "mine@1(GAPDH:x2;ACTB:x0.25)"
    assert "mine: 2 of 3 genes of the signature are in the data" in said.err
    signs = printed([*mine, "--dose", "-1", "--direction-only"], capsys)
    assert str(signs.perturbation) == "mine@-1(ACTB:x2;GAPDH:x0.5)"
    assert str(printed([*mine, "--padj-below", "0.05"], capsys).perturbation) == "mine@1(GAPDH:x2)"
    assert str(printed([*mine, "--top", "1"], capsys).perturbation) == "mine@1(ACTB:x0.25)"
    both = ["--signature", "interferon_gamma", "--signature", "tgf_beta_stimulation", "--dose", "1", "--dose", "2"]
    parts = printed([*one, *both], capsys).perturbation.parts
    assert [(part.name, part.dose) for part in parts] == [("interferon_gamma", 1.0), ("tgf_beta_stimulation", 2.0)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dose", "1"], "--dose is given without --signature"),
        (["--signature-file", "x.csv"], "--signature-file is given without --signature"),
        (["--signature", "interferon_gama"], "did you mean interferon_gamma"),
        (["--signature", "a", "--signature", "a"], "--signature names 'a' twice"),
        (["--signature", "a", "--dose", "1", "--dose", "2"], "2 doses are given for 1 signatures"),
        (["--signature", "interferon_gamma", "--dose", "9"], "The dose is 9.0"),
        (["--signature", "interferon_gamma", "--top", "3"], "--top says how a signature file is read"),
    ],
)
def test_a_signature_that_cannot_be_used_is_refused(command: list[str], more: list[str], message: str, capsys) -> None:
    assert message in refusal([*command, "--cell", "cell-3", *more], capsys)


def test_the_command_says_what_is_read_in_the_file(command: list[str], capsys) -> None:
    recipe = printed([*command, "--cell", "cell-3", "--matrix", "X", "--gene-column", "index"], capsys)
    assert (recipe.matrix, recipe.gene_column) == ("X", "index")
    assert "none" in refusal([*command, "--cell", "cell-3", "--matrix", "none"], capsys)
