"""What makes the training of a Wan cheap: little text, frames out of a clip, a sense of place."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from toys.captions import PLACES, SIZES


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


def emphasis(caption, moments, shape):
    """Weights of the loss by latent frame, row and column: the shape counts as much as the ground.

    They follow from the caption alone, so what minimises the loss stays what it was, but a gradient
    is about the shape and not about 19 of 20 cells that hold none.

    Args:
        caption: a `ClipCaption`.
        moments: latent frames; None for all in order.
        shape: latent frames of a whole clip, rows and columns.

    Returns:
        (moments, rows, columns), 1 away from the shape.
    """
    frames, rows, columns = shape
    # A latent frame stands for two frames, the first for one.
    times = (2 * torch.tensor(moments or range(frames)) - 0.5).clamp(min=0)
    way = times[:, None] / (2 * frames - 2)
    start, end = (torch.tensor(PLACES[place]) for place in (caption.start, caption.end))
    centres = start + (end - start) * way
    reach = SIZES[caption.size] + 0.05
    near = [
        ((torch.arange(count) + 0.5) / count - centre[:, None]).abs() < reach
        for count, centre in ((rows, centres[:, 1]), (columns, centres[:, 0]))
    ]
    inside = (near[0][:, :, None] & near[1][:, None, :]).float()
    return 1 + inside / inside.mean()


class Locator(torch.nn.Module):
    """Asks hidden states where in the clip they lie; a loss beside the model's own.

    Wan has positions by their differences alone, and all tokens of noise look alike: where the
    edges are must be found out by comparing tokens. The loss of the velocity has next to no slope
    towards that (after 1000 iterations the first blocks knew nothing of places, and no shape was
    where it belonged); asked for it, they know it after 150.

    Args:
        transformer: a Wan; its third block is listened to.
        shape: latent frames, rows and columns of tokens of a whole clip.
    """

    def __init__(self, transformer, shape):
        super().__init__()
        self.shape = shape
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.head = torch.nn.Linear(width, sum(shape))
        transformer.blocks[2].register_forward_hook(self._listen)

    def _listen(self, block, inputs, output):
        self.heard = output

    def loss(self, batch):
        """Cross-entropy of time, row and column, weighted by the noise: clean grounds have none.

        Args:
            batch: what the transformer has just been shown.

        Returns:
            A scalar; the heard states are forgotten.
        """
        frames, *sides = self.shape
        moments = torch.tensor(batch.moments or range(frames))
        places = torch.cartesian_prod(moments, *map(torch.arange, sides)).to(self.heard.device)
        scores = self.head(F.layer_norm(self.heard, self.heard.shape[-1:])).split(self.shape, -1)
        self.heard = None
        count = len(batch.sigma)
        wrong = sum(
            F.cross_entropy(s.transpose(1, 2), p.expand(count, -1), reduction="none")
            for s, p in zip(scores, places.T, strict=True)
        )
        return (batch.sigma[:, None] * wrong).mean()
