"""Measures of a projector: entropy, Align(V, W), cosine."""
