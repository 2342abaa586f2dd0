"""`python -m xfuser_fastcache.cli` is `fastcache`."""

import sys

from xfuser_fastcache.cli import main

sys.exit(main())
