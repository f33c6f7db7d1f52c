"""The miniature's own benchmarks: counting, existence, colour, position and referring expressions."""
