"""The benchmarks, each a ratio against its reference in one run."""
