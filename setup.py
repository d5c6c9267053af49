"""Everything is declared in pyproject.toml; extension modules are added here."""

from setuptools import setup

setup()
