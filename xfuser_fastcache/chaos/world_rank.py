"""One rank of a random world: draws, suffers its fault, and draws again."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from diffusers_adapters.tiny import TINY_MODELS
from xfuser_fastcache.apply import apply_cache_on_pipeline, denoisers_of, get_cache_statistics
from xfuser_fastcache.assembly import adapter_of, blocks_held
from xfuser_fastcache.chaos.families import STEPS, build
from xfuser_fastcache.chaos.faults import REDRAWN, STOPPED_S, World
from xfuser_fastcache.reports.clips import content_of
from xfuser_fastcache.state import prober
from xfuser_fastcache.xdit.groups import XDiTLayout
from xfuser_fastcache.xdit.pipeline import take_off


class Injected(Exception):
    """The exception that a world injects; its own rank may well end with it."""


class Rank:
    """A pipeline on one rank, with a cache on it or, as a control, without.

    Args:
        world: that it is a rank of.
        rank: its number.
        cached: False for the control.
        say: takes `(event, value)` for the process that watches.
    """

    def __init__(self, world: World, rank: int, cached: bool, say: Callable[[str, Any], None]):
        self.world = world
        self.rank = rank
        self.cached = cached
        self.say = say
        self.tiny = TINY_MODELS[world.family]
        self.pipe, self.call = build(world.family, **world.flags)
        self._undo: list[Callable[[], Any]] = []
        self._raises = False

    @property
    def suffers(self) -> bool:
        """Whether the fault is on this rank."""
        everywhere = self.world.fault == "exception in a callback on all ranks"
        return everywhere or self.rank == self.world.rank

    def apply(self, **changes: Any) -> None:
        """Put the cache on."""
        if self.cached:
            apply_cache_on_pipeline(self.pipe, **{**self.world.options, **changes})

    def remove(self) -> None:
        """Take the cache off, if there is one."""
        take_off(self.pipe)

    def draw(self, seed: int = 7, **changes: Any) -> str:
        """Draw a picture; return its digest, or "" where this rank has none."""
        call = {**self.call, **changes}
        batch = len(call["prompt_embeds"])
        generators = [torch.Generator("cpu").manual_seed(seed + item) for item in range(batch)]
        call["generator"] = generators[0] if self.tiny.alone else generators
        if self._callback:
            call[self._callback] = self._in_callback
        output = self.pipe(**call)
        picture = None if output is None else content_of(output)
        if not isinstance(picture, torch.Tensor):  # another rank has it
            return ""
        if not picture.isfinite().all():
            return "not finite"
        return hashlib.sha256(picture.contiguous().numpy().tobytes()).hexdigest()[:16]

    def decisions(self) -> str:
        """Return the digest of all decisions; "" without a cache."""
        if not self.cached:
            return ""
        found = map(get_cache_statistics, denoisers_of(self.pipe).values())
        return " ".join(statistics["decisions_digest"] for statistics in found)

    @property
    def _callback(self) -> str | None:
        """The argument that a function to call at each step is given by; None without any."""
        if self.tiny.adapter == "pixart" and "pipefusion" in self.world.layout:
            return None  # xfuser refuses it
        # A pipeline of xfuser's may take whatever the class above it does.
        calls = [
            vars(kind)["__call__"] for kind in type(self.pipe).__mro__ if "__call__" in vars(kind)
        ]
        takes = {name for call in calls for name in inspect.signature(call).parameters}
        return next((name for name in ("callback_on_step_end", "callback") if name in takes), None)

    # ---- faults ------------------------------------------------------------------------------

    def suffer(self) -> str:
        """Draw a picture while the fault happens."""
        fault = self.world.fault
        if fault in ("other config", "other mask"):
            return self._apply_anew(fault)
        if not self.suffers:
            return self.draw()
        if fault in ("cache removed", "cache applied twice"):
            return self._meddle(fault)
        if fault == "other steps":
            return self._told(num_inference_steps=self.call["num_inference_steps"] + 3)
        if fault == "other size":
            size = 2 * self.call["height"]
            area = {"max_area": size * size} if "max_area" in self.call else {}  # Kontext's limit
            return self._told(height=size, width=size, **area)
        if fault == "other batch":
            twice = self.tiny.make(batch=2)[1]
            return self._told(**{**twice, "num_inference_steps": STEPS})
        if fault == "other embeddings":
            text = self.call["prompt_embeds"]
            shifted = [t + 0.5 for t in text] if isinstance(text, list) else text + 0.5
            return self._told(prompt_embeds=shifted)
        if fault == "other seed":
            return self._told(seed=1007)
        self._set_trap(fault)
        return self.draw()

    def _told(self, **changes: Any) -> str:
        self.say("fault", None)
        return self.draw(**changes)

    def _meddle(self, fault: str) -> str:
        """Change what is on the transformer before the generation begins."""
        self.say("fault", None)
        if fault == "cache applied twice":
            try:
                self.apply()
            except ValueError as error:
                if "cached already" not in str(error):
                    raise
            return self.draw()
        self.remove()
        return self.draw()

    def _apply_anew(self, fault: str) -> str:
        """Put the cache on again on all ranks, with other options on one."""
        other: dict[str, Any] = {"max_consecutive_skips": 2}
        if fault == "other mask":
            mask = [1, 1, 1, 0, 1, 0, 1, 1]
            other = {"use_cache": "Fast", "steps_mask": mask, "cache_interval": None}
        self.say("fault", None)
        self.remove()
        self.apply(**other if self.suffers else {})
        return self.draw()

    def _set_trap(self, fault: str) -> None:
        """Let the fault happen at the world's step."""
        if fault in REDRAWN:
            self._measure_wrongly(float("nan") if fault == "NaN" else float("inf"))
        elif fault.startswith("exception in a callback"):
            self._raises = True
        else:
            blocks = self._blocks()
            block = blocks[int(self.world.block * len(blocks))]
            reached = functools.partial(self._in_block, fault, [0])
            self._undo.append(block.register_forward_pre_hook(reached).remove)

    def _blocks(self) -> list[Any]:
        models = map(XDiTLayout().model_of, denoisers_of(self.pipe).values())
        held = [blocks_held(model, adapter_of(model)) for model in models]
        return [block for lists in held for listed in lists.values() for block in listed]

    def _measure_wrongly(self, number: float) -> None:
        """Let this rank measure a number that is none, at the world's step and later ones."""
        measure, calls = prober.measure, [0]

        def broken(hidden_states: Any, *arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == self.world.step + 1:
                self.say("fault", None)
                hidden_states = hidden_states * number
            return measure(hidden_states, *arguments)

        vars(prober).update(measure=broken)
        self._undo.append(lambda: vars(prober).update(measure=measure))

    def _in_callback(self, *arguments: Any) -> dict[str, Any]:
        step = next(x for x in arguments if isinstance(x, int))
        if isinstance(arguments[-1], dict):
            assert isinstance(arguments[-1]["latents"], torch.Tensor)
        if self._raises and step == self.world.step:
            self.say("fault", None)
            raise Injected(f"in a callback on rank {self.rank} at step {step}")
        return {}

    def _in_block(self, fault: str, calls: list[int], *_: Any) -> None:
        calls[0] += 1
        if fault == "slow rank":
            time.sleep(0.02)
        if calls[0] != self.world.step + 1:
            return
        self.say("fault", STOPPED_S.get(fault, 0.0))
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault in STOPPED_S:
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "exception in a block":
            raise Injected(f"in a block on rank {self.rank} at call {calls[0]}")

    def recover(self) -> str:
        """Take the cache off, put it on again, and draw."""
        while self._undo:
            self._undo.pop()()
        self._raises = False
        try:
            self.remove()
        except RuntimeError as error:  # what the others did wrong; the cache is off all the same
            self.say("removed with", f"{type(error).__name__}: {error}")
        self.apply()
        return self.draw()


def main(world: World, rank: int, port: int, cached: bool, wire: Connection, log: str) -> None:
    """Be a rank: do what is asked for on the wire, and answer each with how it ended."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world.ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="localhost", TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ.update(TORCHELASTIC_RESTART_COUNT="0", LOCAL_WORLD_SIZE=str(world.ranks))
    torch.set_num_threads(1)

    def say(event: str, value: Any = None) -> None:
        wire.send((event, value))

    self = Rank(world, rank, cached, say)

    def reference() -> str:
        self.apply()
        return self.draw()

    phases: dict[str, Callable[[], str]] = {
        "ready": str,
        "reference": reference,
        "fault": self.suffer,
        "recovery": self.recover,
    }
    while (asked := wire.recv()) != "end":
        try:
            say("picture", (phases[asked](), self.decisions() if asked == "fault" else ""))
        except Exception as error:  # what a world is run for: told to the one who watches
            say("error", f"{type(error).__name__}: {error}")
    os._exit(0)
