"""The harness itself: planted effects come out as they went in, and null cases are known to be null."""

from __future__ import annotations

import numpy as np
import pytest

from ge2hist_core.simulator.expression import load_genes
from perturb.known_truth import ARMS, READOUTS, Case, Effects, cases, summary


def planted(slopes: dict[str, float], n: int = 40) -> Effects:
    """Programmes with clear true effects that each arm shows at a slope; inert genes with none."""
    draw = np.random.default_rng(0)
    chosen = [Case("programme", f"p{i}", "up", (("G", 4.0),)) for i in range(6)]
    chosen += [Case("driver", f"d{i}", "up", (("G", 4.0),)) for i in range(6)]
    chosen += [Case(role, f"{role}{i}", "up", (("G", 4.0),)) for role in ("reporter", "inert") for i in range(200)]
    mean = draw.normal(0, 1, (len(chosen), len(READOUTS), 1))
    mean[12:] = 0
    true = mean + 0.1 * draw.normal(0, 1, (len(chosen), len(READOUTS), n)) * (mean != 0)
    noise = 0.01 * draw.normal(0, 1, true.shape)
    model = {arm: slopes[arm] * mean + noise for arm in ARMS}
    return Effects(chosen, np.repeat([f"donor{i}" for i in range(8)], n // 8), true, model)


def test_planted_slopes_come_out_with_intervals_that_hold_them() -> None:
    slopes = dict(zip(ARMS, (0.2, 0.8, 0.5, 0.2), strict=True))
    found = summary(planted(slopes))
    for arm, slope in slopes.items():
        for part in ("density", "shares"):
            one = found["slopes"][arm][part]
            assert one["value"] == pytest.approx(slope, abs=0.03)
            assert one["low"] <= one["value"] <= one["high"]
    assert found["n_cells"] == 40 and found["n_donors"] == 8


def test_a_network_that_helps_is_counted_as_nearer_and_one_that_hurts_as_farther() -> None:
    found = summary(planted(dict(zip(ARMS, (0.2, 0.8, -0.5, 0.2), strict=True))))["against_direct"]
    assert found["true network"]["nearer"] == found["true network"]["of"] > 30
    assert found["fitted network"]["farther"] == found["fitted network"]["of"]


def test_reporters_that_do_nothing_exceed_inert_genes_as_often_as_the_limit_says() -> None:
    found = summary(planted(dict.fromkeys(ARMS, 0.5)))
    share = found["beyond_inert"]["direct"]
    assert share["reporter"]["share"] == pytest.approx(0.05, abs=0.04)
    assert share["driver"]["share"] > 0.9 and share["driver"]["of"] == 6 * len(READOUTS)
    assert found["signs"]["direct"]["right"] == found["signs"]["direct"]["of"]


def test_cases_are_balanced_over_roles_programmes_and_directions() -> None:
    table, chosen = load_genes(), cases(12)
    role = dict(zip(table.symbols, table.role, strict=True))
    assert sum(case.role == "programme" for case in chosen) == 12
    for name in ("driver", "reporter", "inert"):
        mine = [case for case in chosen if case.role == name]
        assert len(mine) == 24 and {role[case.name] for case in mine} == {name}
        assert sum(case.direction == "up" for case in mine) == 12
        if name != "inert":
            programmes = [table.programme_of(case.name)[0] for case in mine]
            assert {programmes.count(programme) for programme in set(programmes)} == {4}
    assert chosen == cases(12) and chosen != cases(12, seed=1)
