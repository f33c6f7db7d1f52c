"""Train stage 1 with the patch loss, and with flash attention where it is available.

Run `python -m patch_aligned.train_mem --data_path ... --patch_data_path ...`, or pass this file to `deepspeed`.
"""

from patch_aligned.train.arguments import PatchArguments  # isort: skip  (first: it refuses another llava)
from llava.command import errors_as_sentences
from llava.train.flags import check_command_line

if __name__ == "__main__":
    check_command_line(PatchArguments)  # before the imports below, which take seconds

from llava.train.train import train
from patch_aligned.train.plugin import PatchAlignedPlugin

if __name__ == "__main__":
    with errors_as_sentences():
        train(attn_implementation="flash_attention_2", plugin=PatchAlignedPlugin())
