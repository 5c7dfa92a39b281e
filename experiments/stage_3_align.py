"""Bilevel alignment, the third stage; the same as `jaxrlhf align`.

    python experiments/stage_3_align.py --policy runs/sft-... --data prompts.jsonl --score module:function

Every stage accepts the folder of the previous stage, or a Hugging Face directory.
"""

import tyro

from jaxrlhf.commands.align import Align
from jaxrlhf.commands.main import run

if __name__ == "__main__":
    run(tyro.cli(Align, description=__doc__))
