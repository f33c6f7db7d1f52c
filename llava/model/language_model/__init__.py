"""LLMs that carry a vision tower and a projector."""
