"""Reward learning on preferences, the second stage; the same as `jaxrlhf reward`.

    python experiments/stage_2_reward.py --policy runs/sft-... --data preferences.jsonl

Every stage accepts the folder of the previous stage, or a Hugging Face directory.
"""

import tyro

from jaxrlhf.commands.main import run
from jaxrlhf.commands.reward import Reward

if __name__ == "__main__":
    run(tyro.cli(Reward, description=__doc__))
