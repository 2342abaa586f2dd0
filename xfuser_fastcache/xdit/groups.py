"""xDiT's layout: which ranks decide together, and which tokens a forward pass carries."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import weakref
from datetime import timedelta
from types import CodeType
from typing import Any

import torch.distributed as dist
from torch import nn

from xfuser_fastcache.assembly import adapter_of
from xfuser_fastcache.consensus.collective import Consensus
from xfuser_fastcache.consensus.topology import DecisionGroup, NoPatchKeys, PatchKeys, Position
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.wrappers import unwrapped
from xfuser_fastcache.xdit.channels import renew_channels
from xfuser_fastcache.xdit.gloo_waits import wait_limit
from xfuser_fastcache.xdit.patch_keys import CarriedKeys

# Of xfuser's coordinators, what the model communicates by.
_GROUPS = ("device_group", "ulysses_group", "ring_group", "skip_device_group")


def runs_transformer() -> bool:
    """Whether this rank of xfuser runs the transformer; a separate VAE rank does not."""
    from xfuser.core.distributed import parallel_state

    return parallel_state.model_parallel_is_initialized()


def names_in(forward: Any) -> frozenset[str]:
    """Return the names that a function's code uses, and those of the methods that it calls.

    Args:
        forward: a function or method, perhaps wrapped.
    """
    while isinstance(forward, functools.partial):
        forward = forward.func
    function = inspect.unwrap(forward)
    code = getattr(function, "__code__", None)
    return frozenset() if code is None else frozenset(_names_of(code))


def _names_of(code: CodeType) -> set[str]:
    within = [_names_of(const) for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*within)


# By which a forward's code asks for its place among ranks that share tokens; Ideogram-4's keeps it.
_PLACES = {"get_sequence_parallel_rank", "get_ulysses_parallel_rank", "_sp_rank"}


def cuts(transformer: nn.Module) -> tuple[bool, bool]:
    """Say whether a transformer's own forward cuts what it is given: by tokens, by guidance.

    The classes of xfuser's runner do: every rank gives them all latents, and they gather in the
    end. The wrappers of its pipelines are given this rank's share. Told by the groups that the
    code of the forward asks for its place in.
    """
    names = names_in(transformer.forward)
    by_tokens = names & _PLACES
    return bool(by_tokens), "get_classifier_free_guidance_rank" in names


def _coordinators() -> list[Any]:
    """Return xfuser's coordinators of what ranks of one replica communicate by."""
    from xfuser.core.distributed import parallel_state

    return [
        parallel_state.get_tp_group(),
        parallel_state.get_sp_group(),
        parallel_state.get_pp_group(),
        parallel_state.get_cfg_group(),
        parallel_state.get_fs_group(),
    ]


def deciding_ranks(rank: int, replica: int, sharded: int) -> tuple[int, ...]:
    """Return all ranks that a rank shares a collective with during a forward pass, by any way.

    xDiT's replicas are runs of so many ranks, and so are the groups that share weights by FSDP; a
    run of either may reach over a border of the other. Ranks on two sides of a border that both
    have in common share nothing.

    Args:
        rank: global rank.
        replica: ranks of a model replica: SP x PP x CFG x TP.
        sharded: `fully_shard_degree`.

    Example:
        >>> deciding_ranks(5, replica=2, sharded=4)
        (4, 5, 6, 7)
    """
    size = math.lcm(replica, sharded)
    first = rank - rank % size
    return tuple(range(first, first + size))


# xfuser's runtime state -> its counter of forward passes, when the last one began.
_counted: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def _count_skipped() -> None:
    """Let xfuser count the last forward pass where that was skipped and has not counted itself.

    Its schedules of attention backends and of GEMM precision go by the number of passes.
    """
    from xfuser.core.distributed import get_runtime_state

    state = get_runtime_state()
    if state.step_counter is None:
        return
    if _counted.get(state) == int(state.step_counter):
        state.increment_step_counter()
    _counted[state] = int(state.step_counter)


class XDiTLayout:
    """The layout that xfuser has set up in this process: SP x PP x CFG x TP decide together.

    Data-parallel replicas decide together only where they share weights by FSDP: a block that one
    skips and another one computes would be gathered by one alone. Separate VAE ranks stay outside.
    """

    _stages = 1
    _counts_steps = False

    @classmethod
    def recognises(cls, transformer: nn.Module) -> bool:
        """Say whether xfuser's groups exist; xfuser is not imported to find out.

        A separate VAE rank has its VAE group only. Where torch.distributed was shut down, xfuser's
        groups are still there, and dead.
        """
        if not dist.is_initialized():
            return False
        state = sys.modules.get("xfuser.core.distributed.parallel_state")
        return state is not None and (
            state.model_parallel_is_initialized() or state._VAE is not None
        )

    def model_of(self, transformer: nn.Module) -> nn.Module:
        """Return the diffusers model inside xfuser's and torch's wrappers."""
        from xfuser.model_executor.models import xFuserModelBaseWrapper

        inner = unwrapped(transformer)
        return unwrapped(inner.module) if isinstance(inner, xFuserModelBaseWrapper) else inner

    def decision_group(
        self, transformer: nn.Module | None = None, whole_forward: bool = False
    ) -> DecisionGroup:
        """Return the ranks of this model replica, and those that share its weights by FSDP.

        Of a family whose branches are apart, under CFG parallelism, those of one branch.

        Args:
            transformer: that is cached.
            whole_forward: whether it is measured in front of its forward pass, else at its blocks.

        Raises:
            ValueError: on a separate VAE rank, which runs no transformer; or under PipeFusion, of
                which the transformer knows nothing.
        """
        from xfuser.core.distributed import parallel_state

        if not runs_transformer():
            raise ValueError(
                f"rank {dist.get_rank()} is a VAE rank of xDiT (vae_parallel_size): it runs no "
                "transformer, so it has nothing to cache and no part in the decisions. Call this "
                "on the ranks that run the transformer only."
            )
        replica, sharded = parallel_state.get_model_replica_group(), parallel_state.get_fs_group()
        adapter = ModelAdapter if transformer is None else adapter_of(self.model_of(transformer))
        if adapter.branches_apart:
            replica = parallel_state.get_sp_group()
        rank = dist.get_rank()
        ranks = deciding_ranks(rank, replica.world_size, sharded.world_size)
        self._stages = parallel_state.get_pipeline_parallel_world_size()
        if transformer is not None:
            names = names_in(unwrapped(transformer).forward)
            self._counts_steps = "increment_step_counter" in names
            if self._stages > 1 and "is_pipeline_first_stage" not in names:
                raise ValueError(
                    f"{type(transformer).__name__} under PipeFusion: in xDiT its stages hand "
                    "nothing on, so that what it draws is wrong, cached or not. Give "
                    "ulysses_degree, ring_degree, use_cfg_parallel or data_parallel_degree."
                )
        guidance_is_parallel = parallel_state.get_classifier_free_guidance_world_size() > 1
        guidance_is_parallel = guidance_is_parallel and not adapter.guided_whole
        branch = parallel_state.get_classifier_free_guidance_rank()
        shard, shards, counts = 0, 1, parallel_state.get_tensor_model_parallel_rank() == 0
        cuts_tokens, cuts_guidance = (
            (False, False) if transformer is None else cuts(unwrapped(transformer))
        )
        if cuts_tokens and not whole_forward:
            shard = parallel_state.get_sequence_parallel_rank()
            shards = parallel_state.get_sequence_parallel_world_size()
        # A forward pass that cuts its batch by itself is given both branches, and puts both out.
        sees_both = whole_forward and cuts_guidance
        if whole_forward:
            counts = counts and not (cuts_tokens and parallel_state.get_sequence_parallel_rank())
            counts = counts and not (cuts_guidance and branch)
        return DecisionGroup(
            ranks=ranks,
            rank=rank,
            stage=parallel_state.get_pipeline_parallel_rank(),
            stages=self._stages,
            counts_tokens=counts,
            shard=shard,
            shards=shards,
            branch=branch if guidance_is_parallel and not sees_both else None,
            device_group=next(
                (c.device_group for c in (replica, sharded) if c.world_size == len(ranks)), None
            ),
            whole_inputs=cuts_tokens and (cuts_guidance or not guidance_is_parallel),
            cuts_tokens=cuts_tokens,
            replica=tuple(replica.ranks) if len(ranks) > replica.world_size else (),
        )

    def position(self) -> Position:
        """Return the PipeFusion patch of the current forward pass."""
        if self._counts_steps:
            _count_skipped()
        if self._stages == 1:
            return Position()
        from xfuser.core.distributed import get_runtime_state

        state = get_runtime_state()
        return Position(
            patch=state.pipeline_patch_idx,
            patch_tokens=tuple(state.pp_patches_token_num),
            patched=state.patch_mode,
        )

    def patch_keys(self, slope: float) -> PatchKeys:
        """Return what carries the other patches' keys and values on; see `patch_keys`."""
        return CarriedKeys(slope) if self._stages > 1 and slope else NoPatchKeys()

    def follow(self, consensus: Consensus) -> None:
        """Bound xfuser's waits as those of the cache; after a failure, make its groups anew."""
        if consensus.renewed:
            renew_channels(consensus.board, _coordinators())
        self.limit_waits(consensus.timeout_s)

    def limit_waits(self, seconds: float) -> None:
        """Bound the waits of xfuser's own collectives and sends, in seconds.

        torch offers no public call for it; without one, gloo waits for half an hour.
        """
        wait_limit.seconds = seconds
        for group in self._device_groups():
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def _device_groups(self) -> list[Any]:
        groups = []
        for coordinator in _coordinators():
            found = [getattr(coordinator, name, None) for name in _GROUPS]
            # A pipeline of two stages has a group for each direction.
            found += getattr(coordinator, "device_groups", None) or []
            groups += [g for g in dict.fromkeys(found) if g is not None and g not in groups]
        return groups
