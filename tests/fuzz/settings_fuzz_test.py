"""A short form of `settings_fuzz.py`, and that it can fail."""

import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).with_name("settings_fuzz.py")
SPEC = importlib.util.spec_from_file_location("settings_fuzz", PATH)
assert SPEC is not None and SPEC.loader is not None
fuzz = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)


def test_random_settings_are_read_or_refused_in_a_sentence():
    outcomes = fuzz.run(200, 0)
    assert outcomes["read"] > 50 and outcomes["refused"] > 50


def test_every_change_alone_comes_out_as_expected(tmp_path):
    fuzz.make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tried = 0
    for file, key in [(name, key) for name in fuzz.CHANGES for key in fuzz.CHANGES[name]]:
        for verdict, values in fuzz.CHANGES[file][key].items():
            for value in values:
                files, changes = fuzz.changed([(file, key, verdict, value)])
                fuzz.write(tmp_path, files)
                outcome = fuzz.check(tmp_path, files, changes)
                assert verdict == "either" or outcome == {"fine": "read", "bad": "refused"}[verdict], changes
                tried += 1
    assert tried > 300


def test_the_loop_can_fail(monkeypatch):
    monkeypatch.setattr(fuzz, "expected_stops", lambda files: {99})
    with pytest.raises(AssertionError, match=r"input \d+ of seed 0, .* expected \[99\]"):
        fuzz.run(50, 0)
