"""The rooms of scripts/benchmark.py.

settings    what one run measures, as JSON
subject     the pipeline under test: one call, timed
methods     what is compared: our backends, fewer steps
peers       what is compared: other projects' caches, their own code
worker      the measuring loop, one process or one rank of a layout
quality     what is measured on pictures
curves      points, intervals, hulls
report      benchmark.json, benchmark.md, plot, report.html
"""
