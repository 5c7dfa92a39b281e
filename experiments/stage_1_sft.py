"""Supervised fine-tuning, the first stage; the same as `jaxrlhf sft`.

    python experiments/stage_1_sft.py --policy DIR --data demonstrations.jsonl

Every stage accepts the folder of the previous stage, or a Hugging Face directory.
"""

import sys

from jaxrlhf.commands.main import run_command

if __name__ == "__main__":
    run_command("sft", sys.argv[1:])
