"""Tasks of the miniature; their data is made by `python -m playground.mini.evaluation_set`."""
