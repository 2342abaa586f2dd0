"""Tells the cache of a pipeline's calls: what they are given, and the errors that end them.

Between its stages and after its transformer, a pipeline of xfuser waits for other ranks and runs
its user's callbacks, which the hooks around the transformer do not see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def told(call: Callable[..., Any]) -> Callable[..., Any]:
    """Put the cache's word around a pipeline's `__call__`."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        from xfuser_fastcache.clock.ownership import TransformerInUse
        from xfuser_fastcache.consensus.collective import note_failure
        from xfuser_fastcache.consensus.inputs import digest_of
        from xfuser_fastcache.hooks import hook_on
        from xfuser_fastcache.xdit.groups import XDiTLayout

        # Of Wan 2.2's two experts, either may be left out.
        held = (getattr(self, name, None) for name in ("transformer", "transformer_2"))
        hook = next(filter(None, (hook_on(part) for part in held if part is not None)), None)
        try:
            if hook is not None:
                hook.engine.inputs.check_pipeline(
                    lambda values: digest_of(args, kwargs, values=values)
                )
            return call(self, *args, **kwargs)
        except TransformerInUse:
            raise
        except BaseException as error:
            if hook is None:
                note_failure(XDiTLayout().decision_group().ranks)
            else:
                hook.engine.abandon(error)
            raise

    return __call__
