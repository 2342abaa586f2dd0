"""ConsisID: CogVideoX's blocks, with a face attended to between them."""

from __future__ import annotations

from dataclasses import replace

from diffusers_adapters.cogvideox import CogVideoXAdapter
from xfuser_fastcache.models.streams import ENCODER, HIDDEN


class ConsisIDAdapter(CogVideoXAdapter):
    """ConsisID as diffusers' `ConsisIDTransformer3DModel` and as xfuser's wrapper around it.

    Behind every other block the video attends to a face. Where blocks are skipped it does so all
    the same, to no effect within a span; the output forecast skips it too. `Tea`'s polynomial is
    that of CogVideoX-5B, whose width the model has.

    Source: diffusers `models/transformers/consisid_transformer_3d.py`, `pipelines/consisid`.
    """

    model_class = "ConsisIDTransformer3DModel"
    # diffusers' registry has no `ConsisIDBlock`.
    block_lists = {
        name: replace(contract, returns=(HIDDEN, ENCODER))
        for name, contract in CogVideoXAdapter.block_lists.items()
    }
