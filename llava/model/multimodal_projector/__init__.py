"""Projectors: visual features to the width of the LLM."""
