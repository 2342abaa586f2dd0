"""Ideogram-4, where diffusers has it."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from diffusers_adapters.tiny.model import TEXT_TOKENS, TinyModel, call_kwargs


@cache
def _encoder() -> tuple[Any, Any]:
    """Return a text encoder with the layers that the pipeline reads, and a tokenizer of words."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {
        "vocab_size": 512,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 36,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    vision: dict[str, Any] = {"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 4}
    vision |= {"intermediate_size": 8, "deepstack_visual_indexes": []}
    torch.manual_seed(0)
    config = Qwen3VLConfig(text_config=text, vision_config=vision)
    words = Tokenizer(WordLevel({"red": 1, "ring": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = "{{ messages[0].content[0].text }}"
    return Qwen3VLModel(config).eval(), tokenizer


def tiny_ideogram4(
    seed: int = 0, batch: int = 1, size: int = 128, num_layers: int = 4
) -> tuple[Any, dict[str, Any]]:
    """Ideogram-4: 8 x 8 image tokens at 128 x 128 pixels, and a model for each branch of guidance.

    Of 8 places for text the prompt takes 3, behind the padding.
    """
    text_encoder, tokenizer = _encoder()
    torch.manual_seed(seed)
    config = {
        "in_channels": 16,
        "num_layers": num_layers,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "adaln_dim": 16,
        "llm_features_dim": 13 * 4,
        "mrope_section": (2, 1, 1),
    }
    models = [diffusers.Ideogram4Transformer2DModel(**config).eval() for _ in range(2)]
    pipeline = diffusers.Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=models[0],
        unconditional_transformer=models[1],
        vae=None,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    call = {**call_kwargs(batch, size), "prompt": ["red ring"] * batch}
    call.update(guidance_scale=4.0, guidance_schedule=None, max_sequence_length=TEXT_TOKENS)
    return pipeline, call


MODELS = (
    {"ideogram4": TinyModel(tiny_ideogram4, "ideogram4", of_runner=True, models_a_step=2)}
    if hasattr(diffusers, "Ideogram4Pipeline")
    else {}
)
