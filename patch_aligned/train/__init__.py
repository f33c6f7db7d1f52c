"""Patch-aligned training: the plugin of stage 1, its flags, and the picture of its first batch."""
