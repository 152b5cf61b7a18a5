"""Plan to engine: packed graphs, builders, verification, benchmarks."""
