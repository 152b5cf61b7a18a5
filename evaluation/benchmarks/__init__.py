"""Closed-loop benchmarks behind one interface (`base.BenchmarkEnv`)."""
