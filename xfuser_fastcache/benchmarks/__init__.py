"""Measurements that ship with the package; each runs by a command of `fastcache`."""
