"""Scripted experts of the simulators: memoryless, so that a policy without memory can imitate them."""
