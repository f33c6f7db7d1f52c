"""Patch-aligned training: the method as a plugin of `llava`, its data and its measures."""
