"""Trains LLaVA with flash attention where it can be had, and with torch's own elsewhere."""

from llava.train.train import train

if __name__ == "__main__":
    train(attn_implementation="flash_attention_2")
