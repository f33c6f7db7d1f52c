"""Data root of the scripts, and the miniature world under `mini`. Not installed: run from the repository root."""
