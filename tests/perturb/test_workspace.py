"""A workspace against a plain list that is treated alike; its file against itself and against bad ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ge2hist_core.types import BadInput
from perturb.edits import Perturbation
from perturb.recipe import Recipe
from perturb.workspace import MAX_SCENARIOS, Scenario, Workspace, load_workspace, save_workspace

PLAIN = Recipe("d" * 64, "e" * 64, ("cell-1",))
THREE = Workspace(tuple(Scenario(name, PLAIN) for name in "abc"))
ID = "0123456789abcdef" * 2


def names(workspace: Workspace) -> list[str]:
    return [scenario.name for scenario in workspace.scenarios]


@given(st.integers(0, 2), st.integers(-5, 5))
def test_moving_is_taking_out_and_putting_in(i: int, step: int) -> None:
    expected = list("abc")
    one = expected.pop(i)
    expected.insert(min(max(i + step, 0), 2), one)
    assert names(THREE.moved(i, step)) == expected


def test_operations_leave_the_workspace_before_as_it_was() -> None:
    assert names(THREE.removed(1)) == ["a", "c"]
    assert names(THREE.renamed(1, "new")) == ["a", "new", "c"]
    assert names(THREE.duplicated(0)) == ["a", "a (2)", "b", "c"]
    assert names(THREE.added("c", PLAIN).added("c", PLAIN)) == ["a", "b", "c", "c (2)", "c (3)"]
    assert names(THREE) == ["a", "b", "c"]
    long = Workspace().added("x" * 100, PLAIN).added("x" * 100, PLAIN)
    assert [len(name) for name in names(long)] == [60, 60]


def test_scenarios_share_the_noise_of_the_first() -> None:
    other = replace(PLAIN, seeds=(7, 8), perturbation=Perturbation.parse("A:ko"), cell_ids=("cell-2",))
    workspace = Workspace((Scenario("first", replace(PLAIN, seeds=(1, 2, 3))), Scenario("other", other)))
    first, second = workspace.on_shared_noise
    assert second.seeds == first.seeds == (1, 2, 3)
    assert second.perturbation == other.perturbation and second.cell_ids == ("cell-2",)
    assert Workspace().on_shared_noise == ()


def test_a_file_reads_back_and_a_strange_name_finds_no_file(tmp_path: Path) -> None:
    assert load_workspace(tmp_path, ID) is None
    save_workspace(THREE, tmp_path, ID)
    assert load_workspace(tmp_path, ID) == THREE
    for name in ("../secret", "A" * 32, "", "0" * 31):
        with pytest.raises(BadInput, match="no valid name"):
            load_workspace(tmp_path, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"workspace_schema": 9, "scenarios": []}', "schema 9, this version reads 1"),
        ('{"workspace_schema": 1, "scenarios": [{"name": "a"}]}', "cannot be read"),
        ('{"workspace_schema": 1, "scenarios": [{"name": "a", "recipe": {}}]}', "no field 'schema'"),
    ],
)
def test_a_bad_file_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Workspace.from_json(text)


def test_names_and_numbers_have_limits() -> None:
    with pytest.raises(BadInput, match="Two scenarios are called 'a'"):
        THREE.renamed(1, "a")
    with pytest.raises(BadInput, match="has no name"):
        THREE.renamed(0, "  ")
    with pytest.raises(BadInput, match="61 characters"):
        THREE.renamed(0, "x" * 61)
    with pytest.raises(BadInput, match=f"at most {MAX_SCENARIOS}"):
        Workspace(tuple(Scenario(str(i), PLAIN) for i in range(9)))
    assert json.loads(json.dumps(THREE.to_dict()))["scenarios"][0]["name"] == "a"
