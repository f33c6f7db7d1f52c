"""The command `llava-convert`: LLaVA's checkpoints to Hugging Face's `LlavaForConditionalGeneration`, and back."""
