"""Videos, and families that no adapter ships for yet: each is a few lines, on `models/`.

Tiny models of diffusers with random weights. What a block and a forward pass are given and put out
is read, and put back to the bit; cached, nothing changes at a threshold of 0, and something at a
high one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn

from diffusers_adapters.wan import WanAdapter
from xfuser_fastcache import apply_cache_on_transformer, get_cache_statistics, remove_cache
from xfuser_fastcache.apply import adapter_of
from xfuser_fastcache.models import block_contract
from xfuser_fastcache.models.adapter import ModelAdapter
from xfuser_fastcache.models.block_contract import BlockContract, Table
from xfuser_fastcache.models.forward_layout import ForwardLayout
from xfuser_fastcache.models.noise import FlowSigma
from xfuser_fastcache.models.streams import ENCODER, HIDDEN
from xfuser_fastcache.models.token_layout import TokenCounts, TokenLayout, leading_zeros
from xfuser_fastcache.plugins import ADAPTERS
from xfuser_fastcache.tokens.base import run_narrowed
from xfuser_fastcache.tokens.saliency import Split

# ---- the adapters: what a package would ship ----------------------------------------------------


class ZImageAdapter(ModelAdapter):
    model_class = "ZImageTransformer2DModel"
    embedder = "t_embedder"
    block_lists = {
        "layers": BlockContract(
            hidden="x", layout=TokenLayout(joined="image"), attention=("attention",)
        )
    }
    forward = ForwardLayout(latents="x", timestep="t", lists=True)
    noise = FlowSigma(given="time")

    @classmethod
    def dim(cls, model: Any) -> int:
        return model.dim

    @classmethod
    def noise_channels(cls, model: Any) -> int:
        return model.in_channels

    @classmethod
    def image_tokens(cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> range:
        """Behind them the model pads to a multiple of 32; patches of 1 x 2 x 2."""
        _, frames, height, width = cls.forward_layout().given(args, kwargs).sizes
        return range(frames * (height // 2) * (width // 2))


class QwenImageAdapter(ModelAdapter):
    model_class = "QwenImageTransformer2DModel"
    embedder = "time_text_embed"
    block_lists = {
        "transformer_blocks": BlockContract(
            tables=(Table("image_rotary_emb", part=0),), attention=("attn",)
        )
    }
    noise = FlowSigma(given="sigma")

    @classmethod
    def noise_channels(cls, model: Any) -> int:
        return model.config.in_channels

    @classmethod
    def image_tokens(cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> range:
        """Edit's pictures stand behind; the sizes of all are on the host."""
        return range(prod(cls.forward_layout().argument("img_shapes", args, kwargs)[0][0]))


_FLUX2 = {"tables": ("image_rotary_emb",), "attention": ("attn",)}


class Flux2Adapter(ModelAdapter):
    model_class = "Flux2Transformer2DModel"
    embedder = "time_guidance_embed"
    block_lists = {
        "transformer_blocks": BlockContract(**_FLUX2),
        "single_transformer_blocks": BlockContract(
            layout=TokenLayout(
                joined="text", text_tokens=("joint_attention_kwargs", "num_txt_tokens")
            ),
            **_FLUX2,
        ),
    }
    noise = FlowSigma(given="sigma")

    @classmethod
    def image_tokens(
        cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> range | None:
        count = leading_zeros(cls.forward_layout().argument("img_ids", args, kwargs))
        return None if count is None else range(count)


FAMILIES: dict[str, type[ModelAdapter]] = {
    adapter.model_class: adapter
    for adapter in (
        ZImageAdapter, QwenImageAdapter, Flux2Adapter,
    )
}  # fmt: skip


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import xfuser_fastcache.assembly

    before = xfuser_fastcache.assembly.loaded
    monkeypatch.setattr(
        xfuser_fastcache.assembly,
        "loaded",
        lambda group: before(group) | (FAMILIES if group == ADAPTERS else {}),
    )
    with torch.no_grad():
        yield


# ---- tiny models --------------------------------------------------------------------------------

_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16,
    "out_channels": 16, "text_dim": 32, "freq_dim": 32, "ffn_dim": 48, "num_layers": 4,
    "rope_max_seq_len": 32,
}  # fmt: skip
VIDEO = (3, 4, 8)  # frames, height and width of latents
TOKENS = 3 * 2 * 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return WanTransformer3DModel(**{**_WAN, **changes}).eval()


def wan_call(channels: int = 16, per_token: bool = False) -> dict[str, Any]:
    timestep = torch.tensor([400])
    if per_token:  # of the first frame, which is given, it is 0
        timestep = torch.cat(
            (torch.zeros(1, TOKENS // 3), torch.full((1, TOKENS * 2 // 3), 400.0)), 1
        )
    return {
        "hidden_states": random(1, channels, *VIDEO),
        "timestep": timestep,
        "encoder_hidden_states": random(1, 5, 32, seed=1),
    }


def hunyuan(condition: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1,
        guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
        image_condition_type=condition,
    ).eval()  # fmt: skip
    return model, {
        "hidden_states": random(1, 4, *VIDEO),
        "timestep": torch.tensor([400]),
        "encoder_hidden_states": random(1, 5, 16, seed=1),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "pooled_projections": random(1, 8, seed=2),
        "guidance": torch.tensor([6000.0]),
    }


def hunyuan15() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3,
        num_refiner_layers=1, mlp_ratio=2.0, patch_size=2, patch_size_t=1, text_embed_dim=16,
        text_embed_2_dim=12, image_embed_dim=8, rope_axes_dim=(4, 6, 6),
    ).eval()  # fmt: skip
    return model, {
        "hidden_states": random(1, 9, *VIDEO),
        "timestep": torch.tensor([400.0]),
        "encoder_hidden_states": random(1, 5, 16, seed=1),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "encoder_hidden_states_2": random(1, 4, 12, seed=2),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0]]),
        "image_embeds": torch.zeros(1, 2, 8),
    }


def cogvideox(channels: int = 4) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4,
        time_embed_dim=8, text_embed_dim=32, num_layers=3, sample_width=8, sample_height=4,
        sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    ).eval()  # fmt: skip
    frames, height, width = VIDEO
    angles = random(TOKENS, 8, seed=3).repeat_interleave(2, dim=1)
    return model, {
        "hidden_states": random(1, frames, channels, height, width),
        "encoder_hidden_states": random(1, 5, 32, seed=1),
        "timestep": torch.tensor([400]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def z_image() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=3,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, qk_norm=True, cap_feat_dim=16,
        rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    ).eval()  # fmt: skip
    for token in (model.x_pad_token, model.cap_pad_token):
        token.data.zero_()  # made without values
    return model, {
        "x": [random(4, 1, 8, 12, seed=i) for i in range(2)],
        "t": torch.tensor([0.6, 0.6]),
        "cap_feats": [random(7, 16, seed=5), random(9, 16, seed=6)],
    }


def qwen(edit: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip
    shapes = [(1, 4, 6), (1, 2, 3)] if edit else [(1, 4, 6)]
    return model, {
        "hidden_states": random(1, 30 if edit else 24, 16),
        "timestep": torch.tensor([0.6]),
        "encoder_hidden_states": random(1, 7, 16, seed=1),
        "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.long),
        "img_shapes": [shapes],
    }


def flux2(condition: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    ).eval()  # fmt: skip
    ids = torch.zeros(1, 24 + condition, 4)
    ids[0, :, 2] = torch.arange(24 + condition)
    ids[0, 24:, 0] = 10
    return model, {
        "hidden_states": random(1, 24 + condition, 16),
        "encoder_hidden_states": random(1, 7, 32, seed=1),
        "timestep": torch.tensor([0.6]),
        "img_ids": ids,
        "txt_ids": torch.zeros(1, 7, 4),
    }


# Model, its arguments, tokens that are noise, and rows behind them in the first block's image.
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], int, int]] = {
    "Wan T2V": (lambda: (wan(), wan_call()), TOKENS, 0),
    "Wan I2V": (lambda: (wan(in_channels=36), wan_call(36)), TOKENS, 0),
    "Wan TI2V": (lambda: (wan(), wan_call(per_token=True)), TOKENS * 2 // 3, 0),
    "HunyuanVideo": (hunyuan, TOKENS, 0),
    "HunyuanVideo I2V": (lambda: hunyuan("token_replace"), TOKENS * 2 // 3, 0),
    "HunyuanVideo-1.5": (hunyuan15, TOKENS, 0),
    "CogVideoX": (cogvideox, TOKENS, 0),
    "CogVideoX I2V": (lambda: cogvideox(8), TOKENS, 0),
    "Z-Image": (z_image, 24, 8 + 32),  # 24 are padded to 32, and the text to 32 too
    "Qwen-Image": (qwen, 24, 0),
    "Qwen-Image-Edit": (lambda: qwen(edit=True), 24, 6),
    "FLUX.2": (flux2, 24, 0),
    "FLUX.2, a picture to edit": (lambda: flux2(condition=6), 24, 6),
}  # fmt: skip

# Of three frames the first one is given.
FRAME_GIVEN = ("Wan TI2V", "HunyuanVideo I2V")
# Z-Image's adapter above states none: its rows of positions are the text's too.
WITH_TABLES = [name for name in CASES if name != "Z-Image"]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and all(map(equal, a, b))
    return a is b or a == b


class Seen:
    """Runs a model once, and keeps what its blocks and its forward were given and put out."""

    def __init__(self, name: str):
        make, self.noise, self.behind = CASES[name]
        self.model, self.call = make()
        self.adapter = adapter_of(self.model)
        self.counts = TokenCounts(partial(self.adapter.image_tokens, self.model))
        self.contracts = self.adapter.contracts(self.model, self.counts)
        self.blocks: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []
        handles = [
            block.register_forward_hook(
                lambda block, args, kwargs, out: self.blocks.append((block, args, kwargs, out)),
                with_kwargs=True,
            )
            for lists in self.adapter.block_lists
            for block in getattr(self.model, lists)
        ]
        self.output = self.model(**self.call, return_dict=False)
        for handle in handles:
            handle.remove()
        self.counts.open((), self.call)


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_read_and_put_back_to_the_bit(name: str) -> None:
    seen = Seen(name)
    assert len(seen.blocks) == len(seen.contracts) > 2
    for contract, (block, args, kwargs, output) in zip(seen.contracts, seen.blocks, strict=True):
        streams = contract.read(args, kwargs)
        assert streams.hidden_states.shape[1] == seen.noise
        assert streams.ahead == (TOKENS - seen.noise if name in FRAME_GIVEN else 0)
        assert streams.hidden_states.shape[2] == seen.adapter.dim(seen.model)
        assert contract.layout.behind(streams) == seen.behind
        assert equal(contract.pack(contract.unpack(output)), output)
        handed_on = contract.handed_on(args, kwargs)
        assert equal(contract.pack(streams), handed_on)
        assert type(handed_on) is type(output)
        # What is put back in its own place changes nothing.
        again = contract.replaced(args, kwargs, streams.hidden_states, seen.noise, None)
        assert equal(block(*again[0], **again[1]), output)


@pytest.mark.parametrize("name", WITH_TABLES)
def test_a_block_runs_on_fewer_image_tokens_with_the_rows_of_its_tables(name: str) -> None:
    """All tokens in another order come out in that order: every table went with them."""
    seen = Seen(name)
    for contract, (_, args, kwargs, _) in zip(seen.contracts, seen.blocks, strict=True):
        contract.read(args, kwargs)
    contract, (block, args, kwargs, output) = seen.contracts[-1], seen.blocks[-1]
    rows = torch.arange(seen.noise).flip(0)[None]
    tokens = contract.read(args, kwargs).hidden_states
    moved = contract.replaced(args, kwargs, tokens[:, rows[0]], seen.noise, rows)
    found = contract.unpack(block(*moved[0], **moved[1]))
    torch.testing.assert_close(
        found.hidden_states[:, rows[0]], contract.unpack(output).hidden_states, rtol=1e-4, atol=1e-5
    )
    few = Split(torch.rand(1, seen.noise), 10)
    narrowed = contract.unpack(run_narrowed(few, contract, block.forward, args, kwargs))
    assert narrowed.hidden_states.shape == tokens.shape


@pytest.mark.parametrize("name", CASES)
def test_the_forward_is_read_and_put_back_to_the_bit(name: str) -> None:
    seen = Seen(name)
    contract = seen.adapter.forward_contract(seen.model, seen.counts)
    streams = contract.read((), seen.call)
    channels = seen.adapter.noise_channels(seen.model)
    assert streams.hidden_states.shape[2] == channels
    made = contract.unpack(seen.output)
    assert made.hidden_states.shape == streams.hidden_states.shape
    found = contract.pack(made.map(torch.clone))
    assert type(found) is type(seen.output)
    (wanted,), (image,) = seen.output, found
    if seen.behind and isinstance(wanted, torch.Tensor):  # what nobody reads is put back as 0
        assert not image[:, seen.noise :].any() and wanted[:, seen.noise :].any()
        image, wanted = image[:, : seen.noise], wanted[:, : seen.noise]
    if name in FRAME_GIVEN:
        assert not image[:, :, 0].any() and wanted[:, :, 0].any()
        image, wanted = image[:, :, 1:], wanted[:, :, 1:]
    assert equal(image, wanted)
    # By position too, as Z-Image's pipeline gives them.
    names = seen.adapter.forward_layout().parameters
    args = tuple(seen.call.get(name) for name in names[:4])
    assert equal(contract.read(args, seen.call).hidden_states, streams.hidden_states)
    assert equal(seen.adapter.timestep(args, {}), seen.adapter.timestep((), seen.call))


def test_latents_of_a_video_are_tokens_whose_channels_are_those_of_a_pixel() -> None:
    wan_first, cog = Seen("Wan I2V"), Seen("CogVideoX")
    video = wan_first.call["hidden_states"]
    read = wan_first.adapter.forward_contract(wan_first.model, TokenCounts()).read(
        (), wan_first.call
    )
    assert torch.equal(read.hidden_states[0, 8 * 4 + 9], video[0, :16, 1, 1, 1])
    video = cog.call["hidden_states"]
    read = cog.adapter.forward_contract(cog.model, TokenCounts()).read((), cog.call)
    assert torch.equal(read.hidden_states[0, 8 * 4 + 9], video[0, 1, :, 1, 1])


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("Hunyuan", "Cog"))])
def test_the_modulated_input_is_what_the_first_attention_is_given(name: str) -> None:
    seen, given = Seen(name), []
    block, args, kwargs, _ = seen.blocks[0]
    attention = next(iter(seen.contracts[0].attention_of(block).values()))
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["hidden_states"]), with_kwargs=True
    )
    block(*args, **kwargs)
    assert torch.equal(seen.adapter.modulated_input(block, args, kwargs), given[0])


def test_a_timestep_a_token_is_that_of_the_noise() -> None:
    assert WanAdapter.timestep((), wan_call(per_token=True)).tolist() == [400.0]
    assert WanAdapter.timestep((), wan_call()).tolist() == [400]
    assert WanAdapter.noise_level(400.0) == 0.4


def test_a_joined_tensor_whose_text_nobody_told_is_an_error_that_says_so() -> None:
    model, _ = flux2()
    contract = Flux2Adapter.contracts(model, TokenCounts())[-1]
    with pytest.raises(ValueError, match="text is not known.*TokenLayout.text_tokens"):
        contract.read((random(1, 31, 32), None), {})
    told = {"joint_attention_kwargs": {"num_txt_tokens": 7}}
    assert contract.read((random(1, 31, 32), None), told).encoder_hidden_states.shape[1] == 7


@pytest.mark.parametrize(
    ("image", "counted"),
    [(range(20), [8, 8, 4, 0]), (range(10, 20), [0, 6, 4, 0]), (range(3, 30), [5, 8, 8, 6])],
)
@pytest.mark.parametrize("shard", range(4))
def test_of_a_shard_the_rows_within_conditions_and_padding_are_counted(
    image: range, counted: list[int], shard: int
) -> None:
    """4 ranks of 8 rows: all but the image's are a condition's or padding."""
    counts = TokenCounts(lambda args, kwargs: image, shard)
    counts.open((), {})
    contract = BlockContract((HIDDEN,), (HIDDEN,), counts=counts)
    x = random(1, 8, 3)
    streams = contract.read((x,), {})
    rows = [row for row in range(8) if 8 * shard + row in image]
    assert torch.equal(streams.hidden_states, x[:, rows]) and len(rows) == counted[shard]
    assert (streams.rest is None) == (len(rows) == 8)
    assert torch.equal(contract.pack(streams), x)


def test_tokens_are_counted_once_for_all_forward_passes_of_an_occasion() -> None:
    """Where the model is given a timestep a token, a look at them waits for the device."""
    asked: list[int] = []
    counts = TokenCounts(lambda args, kwargs: asked.append(1) or range(len(asked)))
    for occasion in ("one", "one", "other", None, None):
        counts.open((), {}, occasion)
    assert (len(asked), counts.image) == (4, range(4))


def test_blocks_may_hold_tokens_in_another_axis() -> None:
    """Tokens first, channels second, the batch last."""
    layout = TokenLayout(token_axis=0, channel_axis=1)
    contract = BlockContract((HIDDEN,), (HIDDEN,), layout=layout)
    x = random(5, 3, 2)
    streams = contract.read((x,), {})
    assert torch.equal(streams.hidden_states, x.permute(2, 0, 1))
    assert torch.equal(contract.pack(streams), x)


def test_what_a_block_returns_is_asked_for_where_nothing_says_it() -> None:
    class Block(nn.Module):
        def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
            return hidden_states

    with pytest.raises(ValueError, match="what Block returns is not known.*BlockContract"):
        BlockContract().of(Block())
    found = BlockContract(returns=(HIDDEN,)).of(Block())
    assert found.parameters == (HIDDEN, "temb")


def test_the_registry_of_diffusers_0_37_has_no_other_name_for_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = SimpleNamespace(
        return_hidden_states_index=1,
        return_encoder_hidden_states_index=0,
        hidden_states_argument_name=HIDDEN,
    )
    monkeypatch.setattr(block_contract, "metadata_of", lambda kind: known)
    found = BlockContract().of(nn.Linear(2, 2))
    assert (found.hidden, found.encoder, found.returns) == (HIDDEN, ENCODER, (ENCODER, HIDDEN))


# ---- cached -------------------------------------------------------------------------------------

_PLAIN = dict.fromkeys(("tokenizer", "text_encoder"))
STEPS = 10


def wan_pipeline() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()  # fmt: skip
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(vae=vae, scheduler=scheduler, transformer=wan(), **_PLAIN)
    return pipe, {
        "height": 32, "width": 32, "num_frames": 9, "guidance_scale": 5.0,
        "prompt_embeds": random(1, 8, 32), "negative_prompt_embeds": random(1, 8, 32, seed=1),
    }  # fmt: skip


def flux2_pipeline() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=1,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = Flux2KleinPipeline(
        vae=vae, scheduler=scheduler, transformer=flux2()[0], is_distilled=False, **_PLAIN
    )
    return pipe, {
        "height": 128, "width": 128, "guidance_scale": 4.0, "max_sequence_length": 8,
        "prompt_embeds": random(1, 8, 32), "negative_prompt_embeds": random(1, 8, 32, seed=1),
    }  # fmt: skip


def qwen_pipeline() -> tuple[Any, dict[str, Any]]:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = QwenImagePipeline(vae=None, scheduler=scheduler, transformer=qwen()[0], **_PLAIN)
    call: dict[str, Any] = {"height": 128, "width": 128, "true_cfg_scale": 4.0}
    for prefix, tokens in (("", 8), ("negative_", 6)):
        call[f"{prefix}prompt_embeds"] = random(1, tokens, 16, seed=tokens)
        call[f"{prefix}prompt_embeds_mask"] = torch.ones(1, tokens).long()
    return pipe, call


def z_image_pipeline() -> tuple[Any, dict[str, Any]]:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = ZImagePipeline(vae=None, scheduler=scheduler, transformer=z_image()[0], **_PLAIN)
    return pipe, {
        "height": 128, "width": 128, "guidance_scale": 4.0,
        "prompt_embeds": [random(8, 16)], "negative_prompt_embeds": [random(6, 16, seed=1)],
    }  # fmt: skip


PIPELINES = {
    "Wan": wan_pipeline, "FLUX.2": flux2_pipeline, "Qwen-Image": qwen_pipeline,
    "Z-Image": z_image_pipeline,
}  # fmt: skip
# All blocks as one span; the first block apart, and a modulated input; spans that end in one kind
# of block and begin in another; the whole forward pass.
WAYS: dict[str, dict[str, Any]] = {
    "stack": {},
    "each block": {"granularity": "block", "forecaster": "linear"},
    "output": {"forecaster": "output"},
    "first block": {"use_cache": "Fb"},
}


def latents_of(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    made = pipe(**call, num_inference_steps=STEPS, output_type="latent", generator=noise)
    found = getattr(made, "frames", None) if hasattr(made, "frames") else made.images
    return torch.stack(list(found)) if isinstance(found, list) else found


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_run_cached(name: str) -> None:
    pipe, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    control = latents_of(pipe, call)
    assert torch.equal(latents_of(pipe, call), control)
    for way, options in WAYS.items():
        for threshold, least in ((0.0, 0.0), (12.0, 0.3)):
            apply_cache_on_transformer(
                pipe.transformer, scheduler=pipe.scheduler, cache_ratio_threshold=threshold,
                **options,
            )  # fmt: skip
            found = latents_of(pipe, call)
            hits = get_cache_statistics(pipe.transformer)["block_approx_ratio"]
            remove_cache(pipe.transformer)
            assert torch.equal(found, control) == (threshold == 0), way
            assert hits >= least and (hits > 0) == (threshold > 0), way
            assert found.isfinite().all(), way
    assert torch.equal(latents_of(pipe, call), control)
