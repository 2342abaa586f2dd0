"""Text: a tokenizer of the captions' words, and two small encoders that learn what they name."""

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from toys.captions import ATTRIBUTES, VALUES, all_captions
from toys.training.stages import RUNS, Stage, cosine, set_rate

TEXT_TOKENS = 32
# Words of other wordings; all else is [UNK].
FILLERS = "the of with in at and to is picture image photo drawing painting cat dog house".split()


def build_tokenizer():
    """A word-level tokenizer for any English prompt; words outside the grammar become [UNK]."""
    words = {word for values in VALUES.values() for value in values for word in value.split()}
    vocabulary = ["[PAD]", "[EOS]", "[BOS]", "[UNK]", ",", ".", "a", "an", "on"]
    vocabulary += sorted(words) + FILLERS
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # also splits off punctuation
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", vocabulary.index("[EOS]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        eos_token="[EOS]",
        bos_token="[BOS]",
        unk_token="[UNK]",
        model_max_length=TEXT_TOKENS,
    )


def build_text_encoders(vocab_size):
    """The two small text encoders, CLIP-shaped (width 32) and T5-shaped (width 64)."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=128,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    return clip, t5


def reword(caption, rng, partial):
    """A caption's text, sometimes in other words or with attributes left out.

    Args:
        caption: a `Caption`.
        rng: a `numpy.random.Generator`.
        partial: probability of another wording, 0..1.

    Returns:
        The text and the set of attributes that it names.
    """
    if rng.random() >= partial:
        return str(caption), set(ATTRIBUTES)
    named = {name for name in ATTRIBUTES if rng.random() < 0.65}
    words = [w for w in ("size", "colour", "shape") if w in named]
    text = "a " + " ".join(getattr(caption, w) for w in words)
    if "place" in named:
        text += rng.choice([", ", " at the ", " "]) + caption.place
    if "background" in named:
        text += rng.choice([", on ", " on ", " on a "]) + caption.background
    if rng.random() < 0.3:
        filler = " ".join(rng.choice([*FILLERS, "[UNK]"], size=rng.integers(1, 6)))
        text = f"{filler} {text}" if rng.random() < 0.5 else f"{text} {filler}"
    return text, named


def tokens_of(tokenizer, prompts, length):
    """Token ids as the pipelines make them: padded to `length`, (batch, length) int64."""
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


class AttributeHeads(torch.nn.Module):
    """One linear classifier per attribute; the last class of each means "not said"."""

    def __init__(self, width):
        super().__init__()
        self.heads = torch.nn.ModuleDict(
            {name: torch.nn.Linear(width, len(v) + 1) for name, v in VALUES.items()}
        )

    def loss(self, features, labels):
        """Mean cross-entropy; features (batch, [tokens,] width), labels {name: (batch,)}."""
        total = 0.0
        for name, head in self.heads.items():
            target = labels[name]
            if features.ndim == 3:
                target = target[:, None].expand(-1, features.shape[1])
            total = total + F.cross_entropy(head(features).flatten(0, -2), target.flatten())
        return total / len(self.heads)


def train_text(args):
    """Both encoders learn to name what a caption says, pooled and at each token."""
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    clip, t5 = build_text_encoders(len(tokenizer))
    clip_heads, t5_heads, mean_heads = AttributeHeads(32), AttributeHeads(64), AttributeHeads(64)
    modules = torch.nn.ModuleList([clip, t5, clip_heads, t5_heads, mean_heads]).train()
    optimiser = torch.optim.AdamW(modules.parameters(), lr=3e-3, weight_decay=0.01)
    stage = Stage(RUNS / "text.pt")
    stage.load(modules=modules, optimiser=optimiser)
    captions = all_captions("train")

    def step(iteration):
        rng = np.random.default_rng([args.seed, 1, iteration])
        chosen = [captions[i] for i in rng.integers(len(captions), size=128)]
        texts, named = zip(*(reword(c, rng, partial=0.4) for c in chosen), strict=True)
        labels = {
            name: torch.tensor(
                [
                    VALUES[name].index(getattr(c, name)) if name in said else len(VALUES[name])
                    for c, said in zip(chosen, named, strict=True)
                ]
            )
            for name in ATTRIBUTES
        }
        pooled = clip(tokens_of(tokenizer, list(texts), TEXT_TOKENS)).pooler_output
        length = int(rng.choice([16, 24, 32]))
        states = t5(tokens_of(tokenizer, list(texts), length)).last_hidden_state
        loss = clip_heads.loss(pooled, labels) + t5_heads.loss(states, labels)
        loss = loss + mean_heads.loss(states.mean(1), labels)
        # Outputs of unit scale suit the transformer's first projections.
        loss = loss + 0.01 * (states.pow(2).mean() - 1).pow(2)
        set_rate(optimiser, cosine(iteration, args.text_iterations, 3e-3, 3e-5))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimiser.step()
        return loss.detach()

    stage.loop(args.text_iterations, step, "text", modules=modules, optimiser=optimiser)
    modules.eval().requires_grad_(False)
    return {"tokenizer": tokenizer, "clip": clip, "t5": t5}, stage
