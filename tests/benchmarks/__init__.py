"""Ratios of speed, and the coverage of intervals: measured by hand, not by the suite."""
