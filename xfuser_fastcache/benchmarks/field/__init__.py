"""`fastcache fieldtest`: the cache on a user's own cards, in a file that anyone may see."""
