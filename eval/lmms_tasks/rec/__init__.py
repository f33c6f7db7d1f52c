"""Referring expression comprehension, scored in both frames that boxes may be spoken in."""
