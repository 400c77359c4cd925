"""Ratios that must hold: ``python -m tests.benchmarks`` prints them beside their targets."""
