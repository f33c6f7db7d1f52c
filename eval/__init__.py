"""Benchmarks: the tables of the paper, by lmms-eval; run from the root of the repository, imported by no package."""
