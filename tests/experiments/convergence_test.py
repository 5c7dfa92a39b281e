"""The convergence studies: their arithmetic on curves with known exponents, the table of optima, and the command."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "experiments"))

from convergence_studies import bias, optima, reports, sample_complexity  # noqa: E402

OPTIMA = ROOT / "experiments" / "results" / "convergence" / "optima.json"


def test_the_exponent_of_a_synthetic_curve_is_recovered():
    """A criterion 1 / t at a batch of 1 / accuracy takes accuracy^-2 pairs; trailing means change the constant."""
    steps = np.arange(1, 4001)
    accuracies = np.geomspace(0.1, 3e-3, 5)
    criterion = np.broadcast_to(1.0 / steps, (3, 4000))
    needed = np.array([sample_complexity.pairs_needed(criterion.mean(axis=0), e, 1.0 / e) for e in accuracies])
    np.testing.assert_allclose(sample_complexity.exponent(accuracies, needed), 2.0, atol=0.1)
    assert np.isinf(sample_complexity.pairs_needed(criterion[0], 1e-5, 1.0))
    assert np.isnan(sample_complexity.exponent(accuracies, np.array([1.0, 2.0, np.inf, np.inf, np.inf])))


def test_the_trailing_mean_is_over_the_last_half():
    values = np.array([8.0, 4.0, 2.0, 6.0, 1.0])
    np.testing.assert_allclose(sample_complexity.trailing_mean(values), [8.0, 4.0, 3.0, 4.0, 3.0])


def test_the_bias_exponent_is_fitted_where_the_curve_is_a_power_law():
    sigmas = np.geomspace(1e-3, 1.0, 16)
    errors = 0.05 * sigmas**2 + np.where(sigmas > 0.4, 1.0, 0.0)
    np.testing.assert_allclose(bias.fitted_exponent(sigmas, errors, 2), 2.0, atol=1e-6)


def test_a_table_has_a_line_per_row():
    text = reports.table(["a", "b"], [["x", 0.123456], ["y", 3]])
    assert text.splitlines() == ["| a | b |", "|---|---|", "| x | 0.1235 |", "| y | 3 |"]


def test_the_table_of_optima_covers_the_catalogue_and_respects_closed_forms():
    table = json.loads(OPTIMA.read_text())
    assert set(table) == set(optima.catalogue())
    for name, entry in table.items():
        assert entry["worth"] <= entry["best_worth"] + 1e-4, name
        if entry["closed_form"] is not None:
            np.testing.assert_allclose(entry["phi"], entry["closed_form"], atol=2e-3, err_msg=name)


@pytest.mark.parametrize("name", ["bandit, utility", "bandit, 3 features, Brier"])
def test_the_table_of_optima_is_not_beaten_by_other_starts(name):
    problem = optima.catalogue()[name]()
    phi, _, _ = optima.descend(problem, count=8, steps=1500, rate=0.05, seed=77)
    listed = json.loads(OPTIMA.read_text())[name]["phi"]
    assert listed - 1e-3 < phi.min() < listed + 1e-2


@pytest.mark.slow
def test_the_command_writes_a_report_and_refuses_a_file(tmp_path):
    script = [sys.executable, str(ROOT / "experiments" / "convergence.py"), "--quick", "--only", "optima"]
    done = subprocess.run([*script, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "out" / "README.md").read_text()
    assert "</table>" in (tmp_path / "out" / "report.html").read_text()
    assert "Best known optima" in report and "| quadratic |" in report and "JAX " + jax.__version__ in report
    assert "left" in done.stdout
    file = tmp_path / "file"
    file.write_text("")
    refused = subprocess.run([*script, "--output", str(file)], capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "give --output another" in refused.stderr
    assert "Traceback" not in refused.stderr
