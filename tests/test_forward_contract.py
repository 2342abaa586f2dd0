"""A transformer's forward pass as one block: its latents, its result's form, and cuts of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from xfuser_fastcache.models.forward_layout import ForwardContract
from xfuser_fastcache.models.streams import cut


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "tensor": lambda image, text: image,
    "tuple": lambda image, text: (image,),
    "diffusers' output": lambda image, text: Transformer2DModelOutput(sample=image),
    "xfuser's last stage": lambda image, text: ((image, None),),
    "xfuser's middle stage": lambda image, text: ((image, text),),
    "output of a stage": lambda image, text: Transformer2DModelOutput(sample=(image, text)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 5, 3, 4)], ids=["tokens", "picture"])
def test_a_result_is_put_back_into_the_form_it_came_in(
    form: Callable[[Any, Any], Any], shape: tuple[int, ...]
) -> None:
    image, text = random(*shape), random(2, 3, 7)
    given, contract = form(image, text), ForwardContract()
    streams = contract.unpack(given)
    rows = image if len(shape) == 3 else image.transpose(1, 2)
    assert torch.equal(streams.hidden_states, rows)
    has_text = form(0, 1) != form(0, None)
    assert (streams.encoder_hidden_states is text) == has_text
    found = contract.pack(streams.map(lambda x: (x + 1).contiguous()))
    wanted = form(image + 1, text + 1)
    assert type(found) is type(wanted)
    torch.testing.assert_close(
        *(x.to_tuple() if hasattr(x, "to_tuple") else x for x in (found, wanted)), rtol=0, atol=0
    )
    packed = ForwardContract().unpack(found).hidden_states
    assert (packed if len(shape) == 3 else packed.transpose(1, 2)).is_contiguous()


@pytest.mark.parametrize(
    ("output", "found"),
    [((), "0 tensors in a tuple"), ((None, "x"), "0 tensors in a tuple"),
     ([torch.zeros(1)] * 3, "3 tensors in a list")],
)  # fmt: skip
def test_a_result_without_one_or_two_tensors_is_an_error_that_says_so(
    output: Any, found: str
) -> None:
    with pytest.raises(TypeError, match=f"returned {found}; .* Choose another forecaster"):
        ForwardContract().unpack(output)


def test_latents_are_read_as_tokens_wherever_they_stand() -> None:
    picture, contract = random(2, 5, 3, 4), ForwardContract()
    tokens = torch.stack([picture[:, :, y, x] for y in range(3) for x in range(4)], dim=1)
    for args, kwargs in (((picture, "more"), {}), ((), {"hidden_states": picture})):
        assert torch.equal(contract.read(args, kwargs).hidden_states, tokens)
    assert contract.read((tokens,), {}).hidden_states is tokens


@pytest.mark.parametrize(
    ("held", "lengths", "wanted"),
    [(6, (2, 4), [2, 4]), (6, (6,), [6]), (16, (1, 3), [4, 12]), (3, (4, 8), [1, 2]),
     (8, (24, 16, 24), [3, 2, 3])],
)  # fmt: skip
def test_a_tensor_is_cut_in_proportion(
    held: int, lengths: tuple[int, ...], wanted: list[int]
) -> None:
    x = random(2, held, 3)
    parts = cut(x, lengths)
    assert [part.shape[1] for part in parts] == wanted
    assert torch.equal(torch.cat(parts, dim=1), x)
