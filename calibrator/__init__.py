"""Workstation: policies in torch, evidence, sensitivity, allocation, reports."""
