"""Thin launchers of `fastcache` and of scripts/dev, by names that outside code rests on."""
