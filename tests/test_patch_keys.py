"""Keys and values of PipeFusion's other patches, in xfuser's own cache of them.

Each stands for one attention layer of one stage: keys and values are linear in sigma, so that their
slope carries them to where they would be.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform
from xfuser_fastcache.xdit.mends import MENDS, mended
from xfuser_fastcache.xdit.patch_keys import CarriedKeys

LENGTHS = [2, 3]
LEVELS = [1.0, 0.9, 0.7, 0.6, 0.3, 0.1]


def manager() -> Any:
    """Return xfuser's, mended; it is imported as late as where it is used."""
    enable_cpu_platform()
    from xfuser.core.cache_manager import cache_manager

    for mend in MENDS:
        if mend.module == cache_manager.__name__ and mend.is_needed(cache_manager):
            mend.apply(cache_manager)
            mended(cache_manager).append(mend.line)
    return cache_manager.get_cache_manager()


class Layer:
    """One attention layer on a stage, whose keys are `base + sigma * slope` and values twice that.

    Args:
        slope: of the object under test.
        ranks: of Ulysses, whose tokens each attends to.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slope: float = 1.0, ranks: int = 1):
        held = manager()
        self.attention, self.ranks, self.batch = nn.Identity(), ranks, 1
        self.keys = CarriedKeys(slope)
        self.state: Any = SimpleNamespace(
            num_pipeline_patch=2,
            patch_mode=False,
            pipeline_patch_idx=0,
            pp_patches_token_num=LENGTHS,
            pp_patches_token_start_idx_local=[0, 2, 5],
        )
        parallel = "xfuser.core.distributed"
        for module in (parallel, f"{parallel}.runtime_state"):
            monkeypatch.setattr(f"{module}.get_runtime_state", lambda: self.state)
        monkeypatch.setattr(f"{parallel}.get_ulysses_parallel_world_size", lambda: ranks)
        monkeypatch.setattr(
            f"{parallel}.runtime_state.runtime_state_is_initialized", lambda: True, raising=False
        )
        monkeypatch.setattr(
            "xfuser.core.cache_manager.cache_manager.runtime_state_is_initialized", lambda: True
        )
        kind = "sequence_parallel_attn_cache" if ranks > 1 else "naive_cache"
        held.register_cache_entry(self.attention, "attn", kind)
        self.base = torch.randn(1, 5 * ranks, 2, 4, generator=torch.Generator().manual_seed(0))
        self.drift = torch.randn(1, 5 * ranks, 2, 4, generator=torch.Generator().manual_seed(1))

    def at(self, level: float) -> torch.Tensor:
        """Keys of all patches, each patch's of all ranks in a row."""
        return (self.base + level * self.drift).expand(self.batch, -1, -1, -1)

    def patch(self, keys: torch.Tensor, patch: int) -> torch.Tensor:
        return keys.split([self.ranks * length for length in LENGTHS], dim=1)[patch]

    def __call__(self, step: int, patch: int | None, attends: bool = True) -> torch.Tensor:
        """Run a pass; return the keys that it attends to. A skipped one attends to none."""
        self.state.patch_mode = patch is not None
        self.state.pipeline_patch_idx = patch or 0
        if step == 0 and not patch:
            self.keys.forget()
        self.keys.open(step, LEVELS[step])
        found = torch.empty(0)
        if attends:
            new = self.at(LEVELS[step])
            if patch is not None:
                new = self.patch(new, patch)
            elif self.ranks > 1:  # a rank after the other, as all-to-all leaves them
                parts = [self.patch(new, i).chunk(self.ranks, dim=1) for i in range(2)]
                new = torch.cat([parts[i][r] for r in range(self.ranks) for i in range(2)], dim=1)
            found, values = manager().update_and_get_kv_cache(
                new_kv=[new, 2 * new], layer=self.attention, slice_dim=1, layer_type="attn"
            )
            assert torch.equal(values, 2 * found)
        self.carried = self.keys.close()
        return found.clone()  # xfuser returns a view of what it remembers

    def remembered(self) -> torch.Tensor:
        held = manager().cache["attn", self.attention].tensors[0]
        return torch.as_tensor(held[..., :4])


@pytest.fixture(autouse=True)
def left_alone() -> Iterator[None]:
    yield
    assert "update_and_get_kv_cache" not in vars(manager())
    manager().cache.clear()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_behind_a_gap_the_other_patches_are_as_old_as_uncached_ones(
    monkeypatch: pytest.MonkeyPatch, slope: float, ranks: int
) -> None:
    layer = Layer(monkeypatch, slope, ranks)
    layer(0, None)
    for step in (1, 2, 3, 4):
        for patch in (0, 1):
            found = layer(step, patch, attends=step in (1, 4))
            assert layer.carried == (step == 4 and patch == 0)
            if layer.carried:
                # Of step 1, on the way to step 3.
                level = 0.9 + slope * (LEVELS[3] - 0.9)
                assert torch.allclose(layer.patch(found, 1), layer.patch(layer.at(level), 1))
                assert torch.equal(layer.patch(found, 0), layer.patch(layer.at(LEVELS[4]), 0))
                assert torch.equal(
                    layer.patch(layer.remembered(), 1), layer.patch(layer.at(0.9), 1)
                )
    # Patch 1 has found patch 0 as of this step.
    assert torch.equal(layer.patch(found, 0), layer.patch(layer.at(LEVELS[4]), 0))


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_a_gap_they_are_xdits_own(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """Behind the synchronous step, too: unmended, two ranks keep a patch's keys elsewhere."""
    layer = Layer(monkeypatch, ranks=ranks)
    layer(0, None)
    for step in range(1, 5):
        first, second = layer(step, 0), layer(step, 1)
        assert torch.equal(layer.patch(first, 1), layer.patch(layer.at(LEVELS[step - 1]), 1))
        assert torch.equal(second, layer.at(LEVELS[step]))
        assert not layer.carried


def test_a_patch_that_was_left_out_of_this_step_is_carried_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stage that is ahead has computed patch 1 alone at step 3."""
    layer = Layer(monkeypatch)
    layer(0, None)
    layer(1, 0), layer(1, 1)
    layer(2, 0, attends=False), layer(2, 1, attends=False)
    layer(3, 0, attends=False)
    assert torch.allclose(layer(3, 1), layer.at(LEVELS[3])) and layer.carried


def test_slopes_lie_between_steps_that_were_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two synchronous steps, and a pass that runs again."""
    layer = Layer(monkeypatch)
    layer(0, None), layer(1, None), layer(1, None)
    layer(2, 0, attends=False), layer(2, 1, attends=False)
    found = layer(3, 0)
    assert torch.allclose(layer.patch(found, 1), layer.patch(layer.at(LEVELS[2]), 1))
    again = layer(3, 0)
    assert torch.equal(found, again)
    assert layer.keys.nbytes() == 5 * 2 * 4 * 2 * 4  # tokens, heads, their width, two, float32
    layer(0, None)
    assert layer.keys.nbytes() == 0


def test_what_was_forgotten_is_never_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a NaN, between two patches of a step."""
    layer = Layer(monkeypatch)
    layer(0, None)
    layer(1, 0)
    layer.keys.forget()
    layer(1, 1)
    layer(2, 0, attends=False), layer(2, 1, attends=False)
    found = layer(3, 0)
    assert not layer.carried
    assert torch.equal(layer.patch(found, 1), layer.patch(layer.at(LEVELS[1]), 1))


def test_another_batch_is_never_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(monkeypatch)
    layer(0, None)
    layer.batch = 2
    layer(1, None)
    layer(2, 0, attends=False), layer(2, 1, attends=False)
    found = layer(3, 0)
    assert not layer.carried and found.shape[0] == 2


@pytest.mark.parametrize("text", [0, 3])
def test_a_single_patch_attends_to_itself(monkeypatch: pytest.MonkeyPatch, text: int) -> None:
    """FLUX's text is remembered beside a single patch, and counted by none."""
    layer = Layer(monkeypatch)
    layer.state.num_pipeline_patch = 1
    layer.state.pp_patches_token_num = [5 - text]
    for step in (0, 1, 4):
        assert torch.equal(layer(step, None), layer.at(LEVELS[step]))
        assert not layer.carried
