"""The parts of a record: each module has `record(product)`, whose JSON must not change."""
