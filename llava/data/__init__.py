"""Training data: records, tokenisation with labels, samples, batches and samplers."""
