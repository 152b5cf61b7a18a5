"""Scripted experts that teach the demo policies; the clones have no memory, so the experts have none."""
