"""Measurements: what may be measured, and the additive numbers that it becomes."""
