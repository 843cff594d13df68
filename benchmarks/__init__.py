"""Measurements that anyone can run. Each prints a table of ratios of things run side by side."""
