"""`--store` through the command: a run whose folder is gone goes on from the copy, to the bit."""

import shutil

import pytest

from jaxrlhf.commands import align


@pytest.mark.slow
def test_a_run_whose_folder_is_gone_goes_on_from_its_store(here, tmp_path, align_settings):
    settings = align_settings | {"policy": "base", "data": "pairs.jsonl", "score": "annotators:score", "steps": 2}
    settings |= {"held_out": 0.25, "evaluation_answers": 8, "run": "mine", "resume": True, "checkpoint_steps": 1}
    whole = align.main(align.Align(**settings, output=tmp_path / "whole"))
    stored = {"output": tmp_path / "parted", "store": str(tmp_path / "bucket")}
    align.main(align.Align(**settings | stored | {"steps": 1}))
    shutil.rmtree(tmp_path / "parted")
    align.main(align.Align(**settings | stored))
    for name in ("policy/model.safetensors", "reward/model.safetensors"):
        expected = (whole / name).read_bytes()
        for folder in (tmp_path / "parted", tmp_path / "bucket"):
            assert (folder / "mine" / name).read_bytes() == expected
    shutil.rmtree(tmp_path / "parted")
    with pytest.raises(ValueError, match=r"There is a run in .*add --resume"):
        align.main(align.Align(**settings | stored | {"resume": False}))
    assert not (tmp_path / "parted").exists()
