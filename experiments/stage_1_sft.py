"""Supervised fine-tuning, the first stage; the same as `jaxrlhf sft`.

    python experiments/stage_1_sft.py --policy DIR --data demonstrations.jsonl

Every stage accepts the folder of the previous stage, or a Hugging Face directory.
"""

import tyro

from jaxrlhf.commands.main import run
from jaxrlhf.commands.supervised import Supervised

if __name__ == "__main__":
    run(tyro.cli(Supervised, description=__doc__))
