"""What executes an engine's graphs."""
