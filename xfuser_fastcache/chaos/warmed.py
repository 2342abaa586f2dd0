"""The last that the process imports which ranks of fault worlds are forked from.

None of them imports a method or an adapter while another one waits for it, nor goes through what is
imported for garbage, which would copy all of its pages.
"""

import atexit
import gc

from xfuser_fastcache.plugins import ADAPTERS, FORECASTERS, GATES, TOKEN_PLANS, loaded

for _group in (ADAPTERS, GATES, FORECASTERS, TOKEN_PLANS):
    loaded(_group)
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # else triton tells of all that it finds left in the end
