"""Captions of a checkpoint, and their scores by pycocoevalcap's metrics (Table 4 of the paper)."""
