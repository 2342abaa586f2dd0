"""Text: a tokenizer of the captions' words, and two small encoders that learn what they name."""

from collections.abc import Callable
from dataclasses import dataclass

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

from toys import captions, clips
from toys.training.stages import Stage, cosine, set_rate

TEXT_TOKENS = 32
# Words of other wordings; all else is [UNK].
FILLERS = "the of with in at and to is picture image photo drawing painting cat dog house".split()


@dataclass(frozen=True)
class Language:
    """What captions say, and in what words.

    Args:
        name: of the stage's checkpoint.
        values: {attribute: what it may be}.
        verbs: words of captions that are no value.
        captions: split -> all captions.
        say: (caption, named attributes, rng) -> a text that names those alone.
        iterations: of the encoders' training.
        masked: whether the pipelines hide padding from T5 and set its states to zero, as Wan's do.
    """

    name: str
    values: dict
    verbs: tuple
    captions: Callable
    say: Callable
    iterations: int
    masked: bool


def say_picture(caption, named, rng):
    """A picture's caption with some attributes left out."""
    text = _thing(caption, named)
    if "place" in named:
        text += rng.choice([", ", " at the ", " "]) + caption.place
    return text + _ground(caption, named, rng)


def say_clip(caption, named, rng):
    """A clip's caption with some attributes left out."""
    text = _thing(caption, named)
    if "start" in named:
        text += " moves from " + caption.start
    if "end" in named:
        text += ("" if "start" in named else " moves") + " to " + caption.end
    return text + _ground(caption, named, rng)


def _thing(caption, named):
    words = [w for w in ("size", "colour", "shape") if w in named]
    return "a " + " ".join(getattr(caption, w) for w in words)


def _ground(caption, named, rng):
    if "background" not in named:
        return ""
    return rng.choice([", on ", " on ", " on a "]) + caption.background


PICTURES = Language(
    name="text",
    values=captions.VALUES,
    verbs=(),
    captions=captions.all_captions,
    say=say_picture,
    iterations=1200,
    masked=False,
)
CLIPS = Language(
    name="clip_text",
    values=clips.VALUES,
    verbs=("moves", "from"),
    captions=clips.all_clip_captions,
    say=say_clip,
    iterations=700,
    masked=True,
)


def build_tokenizer(language):
    """A word-level tokenizer for any English prompt; words outside the grammar become [UNK]."""
    values = language.values.values()
    words = {word for names in values for name in names for word in name.split()}
    vocabulary = ["[PAD]", "[EOS]", "[BOS]", "[UNK]", ",", ".", "a", "an", "on"]
    vocabulary += sorted(words) + FILLERS + list(language.verbs)
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


def reword(language, caption, rng, partial):
    """A caption's text, sometimes in other words or with attributes left out.

    Args:
        language: a `Language`.
        caption: one of its captions.
        rng: a `numpy.random.Generator`.
        partial: probability of another wording, 0..1.

    Returns:
        The text and the set of attributes that it names.
    """
    if rng.random() >= partial:
        return str(caption), set(language.values)
    named = {name for name in language.values if rng.random() < 0.65}
    text = language.say(caption, named, rng)
    if rng.random() < 0.3:
        filler = " ".join(rng.choice([*FILLERS, "[UNK]"], size=rng.integers(1, 6)))
        text = f"{filler} {text}" if rng.random() < 0.5 else f"{text} {filler}"
    return text, named


def tokens_of(tokenizer, prompts, length):
    """Token ids as the pipelines make them: padded to `length`, (batch, length) int64."""
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def masked_states(text, prompts, length):
    """T5's states as Wan's pipelines make them: padding is not seen and becomes zero.

    Returns:
        States (batch, length, width), and the mask (batch, length) of what is no padding.
    """
    tokens = text["tokenizer"](
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    mask = tokens.attention_mask
    states = text["t5"](tokens.input_ids, mask).last_hidden_state
    return states * mask[..., None], mask.bool()


class AttributeHeads(torch.nn.Module):
    """One linear classifier per attribute; the last class of each means "not said"."""

    def __init__(self, width, values):
        super().__init__()
        self.heads = torch.nn.ModuleDict(
            {name: torch.nn.Linear(width, len(v) + 1) for name, v in values.items()}
        )

    def loss(self, features, labels, mask=None):
        """Mean cross-entropy; features (batch, [tokens,] width), labels {name: (batch,)}.

        Of tokens, those alone count that a mask (batch, tokens) names.
        """
        total = 0.0
        for name, head in self.heads.items():
            target = labels[name]
            if features.ndim == 3:
                target = target[:, None].expand(-1, features.shape[1])
            scores, target = head(features).flatten(0, -2), target.flatten()
            if mask is not None:
                scores, target = scores[mask.flatten()], target[mask.flatten()]
            total = total + F.cross_entropy(scores, target)
        return total / len(self.heads)


def train_text(args, language):
    """Both encoders learn to name what a caption says, pooled and at each token."""
    torch.manual_seed(args.seed)
    values = language.values
    tokenizer = build_tokenizer(language)
    clip, t5 = build_text_encoders(len(tokenizer))
    text = {"tokenizer": tokenizer, "clip": clip, "t5": t5}
    clip_heads, t5_heads, mean_heads = (AttributeHeads(width, values) for width in (32, 64, 64))
    modules = torch.nn.ModuleList([clip, t5, clip_heads, t5_heads, mean_heads]).train()
    optimiser = torch.optim.AdamW(modules.parameters(), lr=3e-3, weight_decay=0.01)
    stage = Stage(args.runs / f"{language.name}.pt")
    stage.load(modules=modules, optimiser=optimiser)
    captions = language.captions("train")

    def step(iteration):
        rng = np.random.default_rng([args.seed, 1, iteration])
        chosen = [captions[i] for i in rng.integers(len(captions), size=128)]
        texts, named = zip(*(reword(language, c, rng, partial=0.4) for c in chosen), strict=True)
        labels = {
            name: torch.tensor(
                [
                    values[name].index(getattr(c, name)) if name in said else len(values[name])
                    for c, said in zip(chosen, named, strict=True)
                ]
            )
            for name in values
        }
        pooled = clip(tokens_of(tokenizer, list(texts), TEXT_TOKENS)).pooler_output
        length = int(rng.choice([16, 24, 32]))
        if language.masked:
            states, mask = masked_states(text, list(texts), length)
            mean = states.sum(1) / mask.sum(1, keepdim=True)
        else:
            states, mask = t5(tokens_of(tokenizer, list(texts), length)).last_hidden_state, None
            mean = states.mean(1)
        loss = clip_heads.loss(pooled, labels) + t5_heads.loss(states, labels, mask)
        loss = loss + mean_heads.loss(mean, labels)
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
    return text, stage
