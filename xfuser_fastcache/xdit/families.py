"""The families of models that xfuser 0.7 runs, and what stands for each of them here.

Plain data: xfuser is not imported for it. A test compares it with the names that xfuser's runner
and its pipelines register, so that none is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Example:
    """One model of a family at its usual size, without the batch.

    Attributes:
        hub: its name on the hub.
        latents: channels, frames of a video, height and width.
        patch: of latents that make a token, per frame, height and width; 1 where the pipeline packs
            them before it calls the model.
        width: channels of a token between the blocks.
    """

    hub: str
    latents: tuple[int, ...]
    patch: int
    width: int

    @property
    def tokens(self) -> int:
        """Return the tokens of one picture or video."""
        return prod(self.latents[1:]) // self.patch

    def anchor_bytes(self, whole_forward: bool) -> int:
        """Return what one anchor takes in bf16 on one rank, for one guidance branch.

        A forecaster of order n keeps n + 1 of them.

        Args:
            whole_forward: whether it stands in for the whole forward pass, and keeps latents, or
                for blocks, and keeps their image tokens.
        """
        return 2 * (prod(self.latents) if whole_forward else self.tokens * self.width)


@dataclass(frozen=True)
class Family:
    """A family of models that xfuser 0.7 runs.

    Attributes:
        title: for people.
        names: how those begin, without owner and in lower case, by which its runner knows it; the
            longest of all families decides.
        pipelines: classes of diffusers that xfuser has a pipeline class for.
        adapter: that is registered for it; "" where there is none.
        why_not: the reason, in a sentence, where there is none.
        error: what xDiT itself says, where it cannot draw with the family either.
        since: release of diffusers that xfuser's runner asks for, where it is above 0.37.
        example: None where there is no adapter.
    """

    title: str
    names: tuple[str, ...] = ()
    pipelines: tuple[str, ...] = ()
    adapter: str = ""
    why_not: str = ""
    error: str = ""
    since: str = "0.37"
    example: Example | None = None

    @property
    def reason(self) -> str:
        """Say why there is no adapter, and what xDiT says, in a sentence."""
        return f"{self.why_not}. xDiT says `{self.error}`" if self.error else self.why_not


_NOT_YET = "not yet"
FAMILIES = (
    Family(
        "FLUX.1 dev, schnell, Kontext, Fill, Control",
        ("flux.1-",),
        ("FluxPipeline", "FluxControlPipeline"),
        adapter="flux",
        example=Example("black-forest-labs/FLUX.1-dev", (16, 128, 128), 4, 3072),
    ),
    Family(
        "FLUX.2 dev, klein",
        ("flux.2-",),
        ("Flux2Pipeline", "Flux2KleinPipeline"),
        adapter="flux2",
        example=Example("black-forest-labs/FLUX.2-dev", (32, 128, 128), 4, 6144),
    ),
    Family(
        "Stable Diffusion 3, 3.5",
        ("stable-diffusion-3", "sd3"),
        ("StableDiffusion3Pipeline",),
        adapter="sd3",
        example=Example("stabilityai/stable-diffusion-3.5-large", (16, 128, 128), 4, 2432),
    ),
    Family(
        "PixArt alpha, Sigma",
        pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        adapter="pixart",
        example=Example("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", (4, 128, 128), 4, 1152),
    ),
    Family(
        "Wan 2.1, 2.2",
        ("wan2.",),
        adapter="wan",
        example=Example("Wan-AI/Wan2.1-T2V-14B-Diffusers", (16, 21, 90, 160), 4, 5120),
    ),
    Family(
        "Wan 2.1 VACE",
        ("wan2.1-vace",),
        adapter="wan_vace",
        example=Example("Wan-AI/Wan2.1-VACE-14B-diffusers", (16, 21, 90, 160), 4, 5120),
    ),
    Family(
        "HunyuanVideo",
        ("hunyuanvideo",),
        adapter="hunyuan_video",
        example=Example("hunyuanvideo-community/HunyuanVideo", (16, 33, 90, 160), 4, 3072),
    ),
    Family(
        "HunyuanVideo-1.5",
        ("hunyuanvideo-1.5",),
        adapter="hunyuan_video15",
        example=Example(
            "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v", (32, 31, 45, 80), 1, 2048
        ),
    ),
    Family(
        "CogVideoX",
        pipelines=("CogVideoXPipeline",),
        adapter="cogvideox",
        example=Example("THUDM/CogVideoX-5b", (16, 13, 60, 90), 4, 3072),
    ),
    Family(
        "ConsisID",
        pipelines=("ConsisIDPipeline",),
        adapter="consisid",
        example=Example("BestWishYsh/ConsisID-preview", (16, 13, 60, 90), 4, 3072),
    ),
    Family(
        "Qwen-Image, Qwen-Image-Edit",
        ("qwen-image",),
        adapter="qwen_image",
        example=Example("Qwen/Qwen-Image", (16, 166, 166), 4, 3072),
    ),
    Family(
        "Z-Image, Z-Image-Turbo",
        ("z-image",),
        adapter="z_image",
        example=Example("Tongyi-MAI/Z-Image", (16, 128, 128), 4, 3840),
    ),
    Family(
        "Krea-2 Raw, Turbo",
        ("krea-2",),
        adapter="krea2",
        since="0.39",
        example=Example("krea/krea-2-raw", (16, 256, 256), 4, 6144),
    ),
    Family(
        "Lumina-Image 2.0",
        ("lumina",),
        ("Lumina2Pipeline",),
        adapter="lumina2",
        example=Example("Alpha-VLLM/Lumina-Image-2.0", (16, 128, 128), 4, 2304),
    ),
    Family(
        "SANA",
        pipelines=("SanaPipeline",),
        adapter="sana",
        example=Example(
            "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", (32, 32, 32), 1, 2240
        ),
    ),
    Family(
        "HunyuanDiT",
        pipelines=("HunyuanDiTPipeline",),
        adapter="hunyuan_dit",
        example=Example("Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers", (4, 128, 128), 4, 1408),
    ),
    Family(
        "LTX-2, 2.3, 2.5",
        ("ltx-2",),
        adapter="ltx2",
        example=Example("Lightricks/LTX-2", (128, 16, 16, 24), 1, 4096),
    ),
    Family(
        "Latte",
        pipelines=("LattePipeline",),
        adapter="latte",
        example=Example("maxin-cn/Latte-1", (4, 16, 64, 64), 4, 1152),
    ),
    Family(
        "Ideogram-4",
        ("ideogram-",),
        adapter="ideogram4",
        since="0.39",
        example=Example("ideogram-ai/ideogram-4-fp8", (128, 128, 128), 1, 4608),
    ),
    Family(
        "LingBot-Video",
        ("lingbot-video",),
        why_not="xDiT's runner draws it with a package that PyPI does not have",
        error="No module named 'lingbot_video'",
    ),
    Family(
        "Cosmos3",
        ("cosmos3",),
        why_not=f"{_NOT_YET}; it takes lists of videos, sounds and actions for latents, and puts "
        "such lists out; its blocks are given text and the rest as two tensors of (tokens, width), "
        "without a batch (diffusers 0.42, where it runs)",
    ),
    Family(
        "MiniMax-H3",
        ("minimax-h3",),
        why_not=f"{_NOT_YET}; diffusers 0.42 has a modular pipeline alone for it, and rows of "
        "video, audio and text stand in one sequence in an order that each call brings, each with "
        "a timestep of its own",
    ),
    Family(
        "FastH3",
        ("fasth3", "fastvideo"),
        why_not="it has 4 steps and none to spare",
    ),
    Family(
        "causal Wan",
        ("causalwan",),
        why_not="it draws 3 frames at a time in 8 distilled steps, and each call writes keys that "
        "later frames attend to, so that none can be left out",
    ),
    Family(
        "SANA Sprint",
        pipelines=("SanaSprintPipeline",),
        why_not="it has 1 to 4 steps and none to spare",
    ),
    Family(
        "Stable Diffusion XL",
        pipelines=("StableDiffusionXLPipeline",),
        why_not="its model is a UNet, which has no stack of blocks; DeepCache (arXiv 2312.00858) "
        "is for those",
    ),
)


def family_of(name: str) -> Family | None:
    """Return the family of a name that xfuser's runner knows, or of a diffusers pipeline class.

    Example:
        >>> family_of("Wan-AI/Wan2.1-VACE-1.3B-diffusers").title
        'Wan 2.1 VACE'
        >>> family_of("unheard-of") is None
        True
    """
    for family in FAMILIES:
        if name in family.pipelines:
            return family
    short = name.rpartition("/")[2].lower()
    fitting = [(len(n), f) for f in FAMILIES for n in f.names if short.startswith(n)]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None
