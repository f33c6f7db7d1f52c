"""Train stage 1 with the patch loss, and with flash attention where it is available.

Run `python -m patch_aligned.train_mem --data_path ... --patch_data_path ...`, or pass this file to `deepspeed`.
"""

from patch_aligned.train.plugin import PatchAlignedPlugin  # isort: skip  (first: it refuses another llava)
from llava.train.train import train

if __name__ == "__main__":
    train(attn_implementation="flash_attention_2", plugin=PatchAlignedPlugin())
