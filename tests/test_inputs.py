"""The digest of what a call is given, which `verify_consensus` compares between ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusers_adapters.tiny.wan import tiny_wan
from xfuser_fastcache import apply_cache_on_transformer
from xfuser_fastcache.consensus.collective import Consensus
from xfuser_fastcache.consensus.inputs import digest_of
from xfuser_fastcache.models.forward_layout import ForwardLayout
from xfuser_fastcache.xdit.gloo_waits import tag_of
from xfuser_fastcache.xdit.inputs import told

CALL: dict[str, Any] = {
    "prompt": ["a red ring"],
    "prompt_embeds": torch.arange(8.0).reshape(1, 2, 4),
    "height": 64,
    "guidance_scale": 3.5,
    "generator": [torch.Generator().manual_seed(1)],
    "scale": torch.tensor(2.0, dtype=torch.bfloat16),
    "callback": print,
}


def test_equal_calls_have_equal_digests() -> None:
    again = {
        **CALL,
        "prompt_embeds": CALL["prompt_embeds"].clone(),
        "generator": [torch.Generator().manual_seed(1)],
        "callback": repr,  # code has no value to compare
    }
    assert digest_of((), CALL) == digest_of((), dict(reversed(again.items())))


@pytest.mark.parametrize("items", [1, 2])
def test_a_tensor_that_is_one_number_expanded_is_that_number_repeated(items: int) -> None:
    """So LTX-2's pipeline gives the noise level of each item."""
    expanded, repeated = torch.tensor(0.5).expand(items), torch.full((items,), 0.5)
    assert digest_of((), {"sigma": expanded}) == digest_of((), {"sigma": repeated})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", ["a red rind"]),
        ("prompt", None),
        ("prompt_embeds", torch.arange(8.0).reshape(1, 2, 4).nextafter(torch.tensor(9.0))),
        ("prompt_embeds", torch.arange(8.0).reshape(1, 4, 2)),
        ("prompt_embeds", torch.arange(8.0).reshape(1, 2, 4).double()),
        ("height", 128),
        ("guidance_scale", 3.6),
        ("generator", [torch.Generator().manual_seed(2)]),
        ("generator", [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)]),
        ("scale", torch.tensor(3.0, dtype=torch.bfloat16)),
    ],
)
def test_whatever_differs_changes_the_digest(name: str, value: Any) -> None:
    assert digest_of((), {**CALL, name: value}) != digest_of((), CALL)


def test_shapes_alone_can_be_compared_without_reading_values() -> None:
    def shapes(**changes: Any) -> str:
        return digest_of((), {**CALL, **changes}, values=False)

    other = torch.zeros(1, 2, 4)
    assert shapes() == shapes(prompt_embeds=other, generator=[torch.Generator().manual_seed(2)])
    assert shapes() != shapes(prompt_embeds=torch.zeros(1, 3, 4))
    assert shapes() != shapes(height=128)
    assert digest_of(other.to("meta"), values=False) == digest_of(other, values=False)


def test_equal_values_have_equal_digests_however_they_lie_in_memory() -> None:
    """Diffusers expands one row of embeddings or of ids to a batch."""
    held = torch.arange(8.0).reshape(2, 4)
    assert digest_of(held.T.contiguous().T) == digest_of(held)
    for expanded in (
        torch.ones(1).expand(3),
        torch.ones(1, 1).expand(2, 4),
        held[:, :1].expand(2, 4),
    ):
        assert digest_of(expanded) == digest_of(expanded.clone())


def test_latents_and_timestep_are_left_out_however_they_are_given() -> None:
    layout = ForwardLayout(parameters=("hidden_states", "timestep"))
    text = torch.ones(1, 2)
    by_place = layout.beside((torch.zeros(1), torch.ones(1), text), {"ids": 3})
    assert by_place == {"2": text, "ids": 3}
    assert layout.beside((), {"hidden_states": 1, "timestep": 2, "text": text}) == {"text": text}


def test_messages_of_another_shape_or_dtype_have_another_tag() -> None:
    tags = {tag_of(torch.zeros(2, 3)), tag_of(torch.zeros(3, 2)), tag_of(torch.zeros(2, 3).half())}
    assert len(tags) == 3
    assert tag_of(torch.ones(2, 3)) in tags
    assert all(0 <= tag < 2**31 for tag in tags)


@pytest.mark.parametrize("left_out", ["transformer", "transformer_2"])
def test_a_pipeline_is_called_and_compared_with_either_expert_left_out(
    left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    monkeypatch.setattr(Consensus, "compare", lambda self, value, what: compared.append(value))

    class Pipeline:
        transformer: Any = None
        transformer_2: Any = None
        __call__ = told(lambda self, size: size)

    pipe, (kept,) = Pipeline(), {"transformer", "transformer_2"} - {left_out}
    setattr(pipe, kept, tiny_wan()[0].transformer)
    assert pipe(3) == 3 and not compared
    apply_cache_on_transformer(getattr(pipe, kept), verify_consensus=True)
    assert pipe(3) == 3 and len(compared) == 1
