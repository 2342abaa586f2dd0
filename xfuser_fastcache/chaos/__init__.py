"""Random faults, options, files and requests: each trial is seeded, and says what got through."""
