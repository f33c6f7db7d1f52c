"""The miniature's experiment: what patch-aligned training does to a small model, with controls that could refute it."""
