"""Folders of own tasks for lmms-eval; give this folder as `--include_path`."""
