"""The causal model of the known-truth tissue: what an intervention moves, what it must leave alone."""

from __future__ import annotations

import numpy as np
import pytest

from ge2hist_core.evaluation import driver_programmes
from ge2hist_core.simulator.expression import load_genes
from ge2hist_core.simulator.programmes import PROGRAMMES
from ge2hist_core.simulator.tissue import Section, simulate_section
from ge2hist_core.types import BadInput

SIZE_UM = 256.0


@pytest.fixture(scope="module")
def section() -> Section:
    return simulate_section(5, 0, SIZE_UM)


def count(section: Section, *names: str) -> int:
    return int(section.nuclei["cell_type"].isin(names).sum())


def test_the_same_numbers_give_the_same_tissue_and_another_donor_another(section: Section):
    assert simulate_section(5, 0, SIZE_UM).nuclei.equals(section.nuclei)
    assert not simulate_section(5, 1, SIZE_UM).nuclei.equals(section.nuclei)


def test_an_intervention_that_changes_nothing_changes_nothing(section: Section):
    assert section.intervene({"CXCL9": 1.0}).nuclei.equals(section.nuclei)


@pytest.mark.parametrize("role", ["reporter", "inert"])
def test_only_drivers_move_the_tissue(section: Section, role: str):
    table = load_genes()
    for gene in table.symbols[table.rows(role)][:5]:
        assert section.intervene({gene: 0.0}).nuclei.equals(section.nuclei), gene


def test_a_driver_moves_its_own_programme_by_its_weight_and_no_other(section: Section):
    table = load_genes()
    for gene in table.drivers:
        programme, weight = table.programme_of(gene)
        knocked = section.intervene({gene: 0.0})
        for name in PROGRAMMES:
            change = knocked.fields[name] - section.fields[name]
            if name == programme:
                # tanh(-inf) = -1: the whole contribution of the gene is gone, wherever it was above -1
                assert np.sign(change.mean()) == -np.sign(weight), gene
                assert (np.abs(change) <= 2 * abs(weight)).all(), gene
            else:
                assert not change.any(), (gene, name)


@pytest.mark.parametrize(
    ("programme", "types"),
    [
        ("immune_infiltration", ("CD4 T cell", "CD8 T cell", "B cell")),
        ("fibrosis", ("Fibroblast",)),
        ("angiogenesis", ("Endothelium",)),
        ("proliferation", ("Proliferating tumour",)),
        ("hypoxia", ("Macrophage",)),
    ],
)
def test_programmes_do_what_the_table_says(section: Section, programme: str, types: tuple[str, ...]):
    low, high = (section.intervene(driver_programmes(programme, way)) for way in ("down", "up"))
    assert count(low, *types) < count(section, *types) < count(high, *types)


def test_lost_cohesion_spreads_the_epithelium(section: Section):
    def density(s: Section) -> float:
        inside = s.at("epithelium", s.nuclei[["x_um", "y_um"]].to_numpy()) > 0.5
        return inside.sum() / (s.fields["epithelium"] > 0.5).sum()

    low, high = (section.intervene(driver_programmes("cohesion", way)) for way in ("down", "up"))
    assert density(low) < density(section) < density(high)


def test_a_nucleus_keeps_its_key_place_and_shape_in_every_intervention(section: Section):
    other = section.intervene(driver_programmes("immune_infiltration", "down"))
    merged = section.nuclei.merge(other.nuclei, on="key", suffixes=("", "_after"))
    assert len(merged) > 0.5 * len(section.nuclei)
    for column in ("x_um", "y_um", "major_um", "minor_um", "angle", "cell_type"):
        assert (merged[column] == merged[f"{column}_after"]).all(), column


def test_no_two_nuclei_stand_in_one_place(section: Section):
    from scipy.spatial.distance import pdist

    xy = section.nuclei[["x_um", "y_um"]].to_numpy()
    assert pdist(xy).min() > 2.5
    assert ((xy >= 0) & (xy <= SIZE_UM)).all()


def test_the_programmes_vary_as_intended():
    values = np.stack([[simulate_section(9, d, 128.0).fields[p].mean() for p in PROGRAMMES] for d in range(12)])
    assert (np.abs(values.mean(axis=0)) < 0.8).all()
    assert (values.std(axis=0) > 0.4).all()


@pytest.mark.parametrize(
    ("size_um", "factors", "message"),
    [
        (255.0, {}, "size_um is 255"),
        (20.0, {}, "at least 64"),
        (128.0, {"NOPE": 0.0}, "'NOPE'"),
        (128.0, {"VEGFA": -1.0}, "VEGFA"),
    ],
)
def test_bad_input_is_named(size_um: float, factors: dict[str, float], message: str):
    with pytest.raises(BadInput, match=message):
        simulate_section(0, 0, size_um, factors)
