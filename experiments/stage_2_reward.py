"""Reward learning on preferences, the second stage; the same as `jaxrlhf reward`.

    python experiments/stage_2_reward.py --policy runs/sft-... --data preferences.jsonl

Every stage accepts the folder of the previous stage, or a Hugging Face directory.
"""

import sys

from jaxrlhf.commands.main import run_command

if __name__ == "__main__":
    run_command("reward", sys.argv[1:])
