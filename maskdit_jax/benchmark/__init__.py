"""Benchmarks: speed and memory of what the package trains and samples, beside itself and beside torch."""
