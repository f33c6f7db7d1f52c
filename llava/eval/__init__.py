"""Answering questions about images with a checkpoint."""
