"""Forecasters: what stands in for a skipped span?"""
