"""Calibration: from recorded generations to thresholds whose alpha holds."""
