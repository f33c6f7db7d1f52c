"""Results of evaluations as data: what a run leaves behind, the paper's tables, and comparisons of runs."""
