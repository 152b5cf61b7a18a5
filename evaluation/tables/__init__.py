"""Comparisons of many runs from one configuration: weights made where a run asks for them, episodes, one table."""

# ruff: noqa: F401 - what is imported here are the package's names

from evaluation.tables.config import PlannedRun, Section, read_config
from evaluation.tables.markdown import Row, render
from evaluation.tables.run import run_table
