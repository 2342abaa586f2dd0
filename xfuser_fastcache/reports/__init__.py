"""Reports: what the cache did, in numbers and pictures."""
