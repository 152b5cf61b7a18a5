"""Comparisons of many runs from one configuration: weights made where a run asks for them, episodes, one table."""

from evaluation.tables.config import PlannedRun, Section, read_config
from evaluation.tables.markdown import Row, render
from evaluation.tables.run import run_table

__all__ = ["PlannedRun", "Row", "Section", "read_config", "render", "run_table"]
