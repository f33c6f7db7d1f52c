"""Stage 1 with the patch loss: LLaVA's training, flash attention where the machine has it, and the plugin.

python -m patch_aligned.train_mem --data_path ... --patch_data_path ...      (or this file behind `deepspeed`)
"""

from llava.train.train import train
from patch_aligned.train.plugin import PatchAlignedPlugin

if __name__ == "__main__":
    train(attn_implementation="flash_attention_2", plugin=PatchAlignedPlugin())
