"""Models behind one contract: towers, projectors and word embeddings of LLaVA and of transformers."""
