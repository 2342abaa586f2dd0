"""Artifacts: the files that a calibration and a fit leave behind."""
