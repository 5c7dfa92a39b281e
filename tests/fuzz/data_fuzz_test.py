"""A short form of `data_fuzz.py`."""

import importlib
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
data_fuzz = importlib.import_module("data_fuzz")
sys.path.pop(0)


@pytest.mark.parametrize("surface", data_fuzz.SURFACES)
def test_random_inputs_end_in_a_right_result_or_one_sentence(surface):
    endings = data_fuzz.run(surface, count=200, seed=1)
    # Neither ending is so rare that the other hides it.
    assert min(endings["read"], endings["refused"]) > 20 and sum(endings.values()) == 200
