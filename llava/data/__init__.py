"""Training data: tokenisation with label spans, the dataset, batching and sampling order."""
