"""Referring expression comprehension: RefCOCO, RefCOCO+ and RefCOCOg."""
