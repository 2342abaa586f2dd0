"""What makes the training of a Wan cheap: few tokens of text, and frames out of a clip."""

from contextlib import contextmanager

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor


class CountedPadding(WanAttnProcessor):
    """Cross-attention where a few tokens of padding weigh as much as many.

    Wan's pipelines pad to 512 tokens that are all alike, and attention to n of them is attention to
    one whose score is larger by log(n).
    """

    weight = None  # (batch, 1, 1, tokens), what to add to the scores

    def __call__(self, attn, hidden_states, encoder_hidden_states, *ignored):
        """As Wan's, with the weights for a mask; cross-attention has neither mask nor positions."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.weight)


@contextmanager
def set_in_time(rope, moments):
    """Let Wan's positions give latent frames the places in time that they have in a whole clip."""
    whole = rope.freqs_cos, rope.freqs_sin
    frames = [*moments, *range(len(moments), rope.max_seq_len)]
    rope.freqs_cos, rope.freqs_sin = (
        torch.cat([table[frames, : rope.t_dim], table[:, rope.t_dim :]], dim=1) for table in whole
    )
    try:
        yield
    finally:
        rope.freqs_cos, rope.freqs_sin = whole
