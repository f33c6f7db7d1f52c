"""Training data: records on disk, tokenisation with labels, samples, batches and their order."""
