"""Captions: a checkpoint writes them, pycocoevalcap's metrics judge them (Table 4 of the paper)."""
