"""Patch-aligned training: the plugin for stage 1, its flags, and the picture of the first batch."""
