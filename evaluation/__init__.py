"""Workstation: closed-loop rollouts and replay comparisons."""
