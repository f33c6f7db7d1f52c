"""Lets tools that still call setup.py find the project; everything is declared in pyproject.toml."""

from setuptools import setup

setup()
