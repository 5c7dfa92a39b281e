"""Short forms of the fuzzes beside this file."""

import pathlib
import runpy

import pytest


@pytest.mark.parametrize("script", ["judge_fuzz", "journal_fuzz"])
def test_random_inputs_end_in_a_right_result_or_a_sentence(script):
    outcomes = runpy.run_path(str(pathlib.Path(__file__).with_name(f"{script}.py")))["main"](200, seed=11)
    assert sum(outcomes.values()) == 200
    assert len(outcomes) > 4
