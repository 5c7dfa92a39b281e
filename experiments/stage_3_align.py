"""Bilevel alignment, the third stage; the same as `jaxrlhf align`.

    python experiments/stage_3_align.py --policy runs/sft-... --data prompts.jsonl --score module:function

Every stage accepts the folder of the previous stage, or a Hugging Face directory.
"""

import sys

from jaxrlhf.commands.main import run_command

if __name__ == "__main__":
    run_command("align", sys.argv[1:])
