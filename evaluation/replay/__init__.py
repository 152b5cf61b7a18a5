"""Deterministic replay: every observation of a bag answered exactly once, and two answers compared."""
