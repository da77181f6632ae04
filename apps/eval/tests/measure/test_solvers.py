"""The table of curvatures between two others: order of the means, exact values inside, one row for each run."""

import pytest

from app_eval.measure.solvers import solvers_at, solvers_at_the_end


def test_solvers_lie_between_the_curvatures():
    found = solvers_at(0.05, 0.025, 512)
    assert found["harmonic"] == pytest.approx(2 / (1 / 0.05 + 1 / 0.025))
    assert found["harmonic"] < found["geometric"] < found["arithmetic"] == pytest.approx(0.0375)
    assert found["exact forward"] == pytest.approx(0.037571, abs=1e-6)
    assert found["exact reverse"] == pytest.approx(0.037366, abs=1e-6)
    assert 0.025 < found["exact jeffreys"] < 0.05


def test_the_last_step_counts_and_seeds_are_averaged():
    found = solvers_at_the_end(
        ([[1, 0.9, 0.9, 0.9], [9, 0.04, 0.02, 0.025]], [[1, 0.9, 0.9, 0.9], [9, 0.06, 0.02, 0.035]])
    )
    assert found["c_img"] == pytest.approx(0.05)
    assert found["c_txt"] == pytest.approx(0.02)
    assert found["chord, in training"] == pytest.approx(0.03)
    assert found["arithmetic"] == pytest.approx(0.035)
