"""Bugs of xfuser: the mend makes the layout run and compute what one rank computes."""

from __future__ import annotations

import importlib
import json
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
from support.worlds import ROOT, WorldFailed, launch, run_world

from diffusers_adapters.tiny.flux2 import tiny_flux2, tiny_klein
from xfuser_fastcache.xdit import mends
from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform
from xfuser_fastcache.xdit.mends.qwen import real_keys

PIPEFUSION, ULYSSES = ("--pipefusion_parallel_degree", "2"), ("--ulysses_degree", "2")
# Text that two ranks cannot share.
ODD_TEXT = ("--text_tokens", "7")


def lines(printed: str) -> list[dict[str, Any]]:
    """What the ranks that hold latents report."""
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return [line for line in found if line["norm"] is not None]


def assert_close(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal to float32 rounding."""
    assert got["norm"] == pytest.approx(expected["norm"], rel=1e-6)
    assert got["values"] == pytest.approx(expected["values"], rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def one_rank() -> dict[str, dict[str, Any]]:
    models = ("flux", "flux2", "sd3", "sd3.5")
    printed = launch("xdit_control.py", 1, "--model", *models, timeout_s=120)
    return {line["model"]: line for line in lines(printed)}


@pytest.fixture
def mended(tmp_path: Path) -> Path:
    """The script `xdit_control.py` in a mended xfuser."""
    script = tmp_path / "mended.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(ROOT / "tests")!r})
            from xfuser_fastcache.xdit import cpu_platform, mends
            cpu_platform.enable_cpu_platform()
            assert len(mends.mend_xfuser()) == len(mends.MENDS)
            assert mends.mend_xfuser() == []
            import xdit_control
            xdit_control.main()
            """
        )
    )
    return script


@pytest.mark.gloo
def test_sd3_under_pipefusion_crashes_unmended_and_equals_one_rank_mended(
    one_rank: dict[str, dict[str, Any]], mended: Path
) -> None:
    """In synchronous steps no patch is stale, so the result is one rank's."""
    arguments = ("--model", "sd3", *PIPEFUSION, "--warmup_steps")
    with pytest.raises(WorldFailed) as failed:
        launch("xdit_control.py", 2, *arguments, "1", timeout_s=120)
    assert "The expanded size of the tensor" in failed.value.output
    # Three steps: all of them synchronous, then two of them asynchronous.
    synchronous, stale = lines(launch(mended, 2, *arguments, "3", "1", timeout_s=120))
    assert_close(synchronous, one_rank["sd3"])
    assert stale["norm"] == pytest.approx(one_rank["sd3"]["norm"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.gloo
def test_pipefusion_with_ulysses_equals_pipefusion_mended(mended: Path) -> None:
    """In asynchronous steps, behind a synchronous one."""
    arguments = ("--model", "sd3", "--num_inference_steps", "6", "--warmup_steps", "1", *PIPEFUSION)
    (alone,) = lines(launch(mended, 2, *arguments, timeout_s=120))
    (unmended,) = lines(launch("xdit_control.py", 4, *arguments, *ULYSSES, timeout_s=200))
    (both,) = lines(launch(mended, 4, *arguments, *ULYSSES, timeout_s=200))
    assert_close(both, alone)
    assert unmended["norm"] != pytest.approx(alone["norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.gloo
def test_flux2_under_pipefusion_crashes_unmended_in_steps_that_are_not_synchronous() -> None:
    with pytest.raises(WorldFailed) as failed:
        launch("xdit_control.py", 2, "--model", "flux2", *PIPEFUSION, timeout_s=120)
    assert "The expanded size of the tensor" in failed.value.output


@pytest.mark.gloo
def test_flux2_under_pipefusion_equals_one_rank_mended(
    one_rank: dict[str, dict[str, Any]], mended: Path
) -> None:
    """In synchronous steps; then two of three are asynchronous, which crash unmended."""
    arguments = ("--model", "flux2", *PIPEFUSION, "--warmup_steps", "3", "1")
    synchronous, stale = lines(launch(mended, 2, *arguments, timeout_s=120))
    assert_close(synchronous, one_rank["flux2"])
    assert stale["norm"] == pytest.approx(one_rank["flux2"]["norm"], rel=1e-2)
    assert stale["sha256"] != synchronous["sha256"]


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("patches", ["1", "2"])
def test_flux2_under_pipefusion_and_ulysses_equals_one_rank_mended(
    one_rank: dict[str, dict[str, Any]], mended: Path, patches: str
) -> None:
    """Unmended, the text of all ranks counts."""
    arguments = ("--model", "flux2", *PIPEFUSION, *ULYSSES, "--num_pipeline_patch", patches)
    arguments += ("--warmup_steps", "3")
    (unmended,) = lines(launch("xdit_control.py", 4, *arguments, timeout_s=200))
    assert unmended["norm"] != pytest.approx(one_rank["flux2"]["norm"], rel=1e-6)
    (output,) = lines(launch(mended, 4, *arguments, timeout_s=200))
    assert_close(output, one_rank["flux2"])


@pytest.mark.gloo
@pytest.mark.parametrize(
    "flags", [("--size", "112"), pytest.param(ODD_TEXT, marks=pytest.mark.slow)], ids=lambda f: f[0]
)
def test_flux_by_the_runner_equals_one_rank_where_tokens_or_text_do_not_divide(
    mended: Path, flags: tuple[str, ...]
) -> None:
    """49 tokens, and 32 of a picture; text of 7 tokens, which only FLUX.1 can hold whole."""
    models = ("flux-kontext", "flux2") if flags is not ODD_TEXT else ("flux-kontext",)
    one = {
        line["model"]: line
        for line in lines(launch("xdit_control.py", 1, "--model", *models, *flags))
    }
    found = lines(launch(mended, 2, "--model", *models, *flags, *ULYSSES))
    assert len(found) == 2 * len(models)
    for line in found:
        assert_close(line, one[line["model"]])


@pytest.mark.slow
@pytest.mark.gloo
def test_flux_by_the_runner_unmended() -> None:
    odd = ("--size", "112", *ULYSSES)
    with pytest.raises(WorldFailed, match="no attribute '_pad_to_sp_divisible'"):
        launch("xdit_control.py", 2, "--model", "flux-kontext", *odd, timeout_s=120)
    for model, flags in (("flux2", odd), ("flux-kontext", (*ULYSSES, *ODD_TEXT))):
        alone = ("--model", model, *(flag for flag in flags if flag not in ULYSSES))
        (one,) = lines(launch("xdit_control.py", 1, *alone))
        for line in lines(launch("xdit_control.py", 2, "--model", model, *flags)):
            assert line["norm"] != pytest.approx(one["norm"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.gloo
def test_klein_under_pipefusion_equals_one_rank_and_what_it_drops_is_refused(
    mended: Path,
) -> None:
    arguments = (*PIPEFUSION, "--warmup_steps", "3")
    unguided = ("--model", "klein", "--guidance_scale", "1")
    (one,) = lines(launch("xdit_control.py", 1, *unguided, timeout_s=120))
    (output,) = lines(launch(mended, 2, *unguided, *arguments, timeout_s=120))
    # One rank undoes the normalisation of its VAE, whose variance here is 1.0001, and unpacks.
    assert output["norm"] * 1.0001**0.5 == pytest.approx(one["norm"], rel=1e-6)
    for model, dropped in (("klein", "guidance_scale"), ("flux2-edit", "image")):
        with pytest.raises(WorldFailed, match=f"drops {dropped} in this layout"):
            launch(mended, 2, "--model", model, *arguments, timeout_s=120)


def test_klein_s_prompt_is_read_from_klein_s_own_layers() -> None:
    """Of the pipeline that is inside; what is given stands."""
    read = []

    class Recorded:
        def __call__(self, text_encoder_out_layers: tuple[int, ...] = (10, 20, 30)) -> None:
            read.append(text_encoder_out_layers)

    module = types.ModuleType("recorded")
    module.xFuserFlux2PipelineBase = Recorded
    mends.flux.read_own_layers(module)
    for inside in (tiny_klein(), tiny_flux2()):
        pipe = Recorded()
        pipe.module = inside[0]
        pipe()
    pipe(text_encoder_out_layers=(1,))
    assert read == [(9, 18, 27), (10, 20, 30), (1,)]


@pytest.mark.gloo
@pytest.mark.parametrize(
    "flag", ["--ulysses_degree", pytest.param("--ring_degree", marks=pytest.mark.slow)]
)
def test_sd35_under_sequence_parallelism_crashes_unmended_and_equals_one_rank_mended(
    one_rank: dict[str, dict[str, Any]], mended: Path, flag: str
) -> None:
    with pytest.raises(WorldFailed) as failed:
        launch("xdit_control.py", 2, "--model", "sd3.5", flag, "2", timeout_s=120)
    assert "cannot access local variable 'joint_strategy'" in failed.value.output
    (output,) = lines(launch(mended, 2, "--model", "sd3.5", flag, "2", timeout_s=120))
    assert_close(output, one_rank["sd3.5"])


@pytest.mark.slow
@pytest.mark.gloo
def test_sd35_under_pipefusion_and_ulysses_equals_one_rank_mended(
    one_rank: dict[str, dict[str, Any]], mended: Path
) -> None:
    """The second attention keeps its own keys and values, of all patches and ranks."""
    arguments = ("--model", "sd3.5", *PIPEFUSION, *ULYSSES, "--warmup_steps", "3", "1")
    synchronous, stale = lines(launch(mended, 4, *arguments, timeout_s=120))
    assert_close(synchronous, one_rank["sd3.5"])
    assert stale["norm"] == pytest.approx(one_rank["sd3.5"]["norm"], rel=1e-2)
    assert stale["norm"] != pytest.approx(one_rank["sd3.5"]["norm"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.gloo
def test_flux_counts_undivided_text_on_every_rank_unmended_and_equals_one_rank_mended(
    one_rank: dict[str, dict[str, Any]], mended: Path
) -> None:
    """Text that Ulysses 2 cannot split, and PipeFusion x Ulysses with one patch: never split."""
    arguments = ("--model", "flux", *ULYSSES, *ODD_TEXT)
    (odd,) = lines(launch("xdit_control.py", 1, "--model", "flux", *ODD_TEXT, timeout_s=120))
    (unmended,) = lines(launch("xdit_control.py", 2, *arguments, timeout_s=120))
    assert unmended["norm"] != pytest.approx(odd["norm"], rel=1e-5)
    (output,) = lines(launch(mended, 2, *arguments, timeout_s=120))
    assert_close(output, odd)

    arguments = ("--model", "flux", *PIPEFUSION, *ULYSSES, "--num_pipeline_patch", "1")
    (output,) = lines(launch(mended, 4, *arguments, timeout_s=120))
    assert_close(output, one_rank["flux"])


@pytest.mark.slow
@pytest.mark.gloo
def test_sd3_pads_to_256_tokens_on_several_ranks_unmended_and_as_asked_mended(
    tmp_path: Path,
) -> None:
    """On the trained toy, since the length is the text encoder's: a step, its text and latents."""
    script = tmp_path / "length.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
            import torch.distributed as dist
            from support.worlds import report
            from xfuser_fastcache.cli.generate import options_from
            from xfuser_fastcache.xdit import loaded
            from xfuser_fastcache.xdit.generator import Generator
            if "unmended" in sys.argv:
                loaded.mend_xfuser = lambda: []
            loaded.start()
            flags = [flag for flag in sys.argv[1:] if flag != "unmended"]
            config = {str(ROOT / "configs" / "toy_sd3_fast.yaml")!r}
            options = options_from(["--config", config, *flags])
            pipe = loaded.load_in_layout(options)
            text = []
            pipe.transformer.register_forward_pre_hook(
                lambda module, args, kwargs: text.append(kwargs["encoder_hidden_states"].shape[1]),
                with_kwargs=True,
            )
            run = Generator(pipe, options).run("", output_type="latent")
            norm = run.images[0].double().norm().item() if run.images else None
            report(dist.get_rank(), tokens=text[0], norm=norm)
            loaded.cpu_platform.finish()
            """
        )
    )
    steps = ("--num_inference_steps", "1")
    alone = run_world(script, 1, *steps, timeout_s=120)[0]
    # Ulysses gives each of two ranks half of the text.
    for flags, ranks in ((ULYSSES, 2), (("--use_cfg_parallel",), 1)):
        unmended = run_world(script, 2, "unmended", *steps, *flags, timeout_s=120)
        mended = run_world(script, 2, *steps, *flags, timeout_s=120)
        for reports, tokens in ((unmended, alone["tokens"] - 32 + 256), (mended, alone["tokens"])):
            assert {ranks * report["tokens"] for report in reports.values()} == {tokens}
        (wrong,), (right,) = (
            {report["norm"] for report in reports.values() if report["norm"] is not None}
            for reports in (unmended, mended)
        )
        assert wrong != pytest.approx(alone["norm"], rel=1e-5)
        assert right == pytest.approx(alone["norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.gloo
def test_text_of_another_length_than_before_equals_one_rank_mended(
    one_rank: dict[str, dict[str, Any]], mended: Path
) -> None:
    """A generation with five tokens of text first; all steps synchronous."""
    arguments = (*PIPEFUSION, "--warmup_steps", "3", "--text_before", "5")
    with pytest.raises(WorldFailed):
        launch("xdit_control.py", 2, "--model", "flux", *arguments, timeout_s=120)
    models = ("flux", "flux2", "sd3")
    for output in lines(launch(mended, 2, "--model", *models, *arguments, timeout_s=120)):
        assert_close(output, one_rank[output["model"]])


@pytest.mark.gloo
def test_padding_is_attended_to_unmended_and_one_rank_is_equalled_mended(mended: Path) -> None:
    """27 tokens, or 9 with 5 of text, on two ranks. Under ring attention the padding stays."""
    models = ("wan", "wan-vace", "qwen")
    arguments = ("--model", *models, "--size", "48", "--text_tokens", "5")
    one = {line["model"]: line for line in lines(launch("xdit_control.py", 1, *arguments))}
    for script, flags, wrong in (
        ("xdit_control.py", ULYSSES, True),
        (mended, ULYSSES, False),
        (mended, ("--ring_degree", "2"), True),
    ):
        found = lines(launch(script, 2, *arguments, *flags))
        assert len(found) == 2 * len(models)
        for line in found:
            if wrong:
                assert line["norm"] != pytest.approx(one[line["model"]]["norm"], rel=1e-5)
            else:
                assert_close(line, one[line["model"]])


@pytest.mark.slow
@pytest.mark.gloo
def test_ltx2_attends_to_padding_unmended_and_equals_one_rank_mended(mended: Path) -> None:
    """9 tokens of video on two ranks, which its audio attends to, too."""
    arguments = ("--model", "ltx2", "--size", "192")
    (one,) = lines(launch("xdit_control.py", 1, *arguments))
    for line in lines(launch("xdit_control.py", 2, *arguments, *ULYSSES)):
        assert line["norm"] != pytest.approx(one["norm"], rel=1e-3)
    for line in lines(launch(mended, 2, *arguments, *ULYSSES)):
        assert_close(line, one)


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("qwen-edit-2511", "The size of tensor a (12) must match the size of tensor b"),
        ("z-image", "size mismatch for x_pad_token"),
    ],
)
def test_what_crashes_unmended_equals_one_rank_mended(mended: Path, model: str, error: str) -> None:
    with pytest.raises(WorldFailed) as failed:
        launch("xdit_control.py", 2, "--model", model, *ULYSSES)
    assert error in failed.value.output
    (one,) = lines(launch(mended, 1, "--model", model))
    for flag in ("--ulysses_degree", "--ring_degree"):
        for line in lines(launch(mended, 2, "--model", model, flag, "2")):
            assert_close(line, one)


@pytest.mark.parametrize(
    ("ranks", "text", "image", "padded"),
    [(2, 8, 16, []), (2, 7, 16, [7 + 8]), (2, 7, 15, [15, 23]), (4, 5, 8, [9, 12, 13])],
)
def test_real_keys_are_those_of_tokens_wherever_their_rank_stands(
    ranks: int, text: int, image: int, padded: list[int]
) -> None:
    """Ranks give their text and behind it their image; padding may reach over several ranks."""
    pieces = -(-text // ranks), -(-image // ranks)
    found = real_keys(ranks, text, image)
    if not padded:
        assert found is None
        return
    assert sorted({*range(ranks * sum(pieces))} - {*(found or ())}) == padded


@pytest.mark.slow
@pytest.mark.gloo
def test_hunyuan_video_says_which_tokens_the_ranks_cannot_share(mended: Path) -> None:
    """27 tokens on two ranks. HunyuanVideo-1.5 attends to the padding; docs/limits.md says so."""
    uneven = ("--model", "hunyuan-video", "--size", "48", *ULYSSES)
    with pytest.raises(WorldFailed) as failed:
        launch("xdit_control.py", 2, *uneven, timeout_s=120)
    assert "do not divide" not in failed.value.output
    with pytest.raises(WorldFailed) as failed:
        launch(mended, 2, *uneven, timeout_s=120)
    assert "(3, 3, 3) tokens (frames, height, width): 27 do not divide" in failed.value.output
    padded = ("--model", "hunyuan-video15", "--size", "24")
    (alone,) = lines(launch("xdit_control.py", 1, *padded))
    for line in lines(launch(mended, 2, *padded, *ULYSSES)):
        assert line["norm"] != pytest.approx(alone["norm"], rel=1e-5)


class MendedJoint:
    """How xfuser could mend its joint attention itself."""

    def __call__(self, attn: Any, encoder_hidden_states: Any) -> None:
        attn_layer = None if self.use_long_ctx_attn_kvcache else attn
        self.update_and_get_kv_cache(attn_layer=attn_layer)
        joint_strategy = None
        if encoder_hidden_states is not None:
            if self.split_text_embed_in_sp:
                joint_strategy = None
            else:
                joint_strategy = "rear"
        self.usp(joint_strategy=joint_strategy)


class MendedFlux:
    """How xfuser could mend its FLUX attention itself."""

    def __call__(self, get_runtime_state: Any) -> None:
        state = get_runtime_state()
        uses_pipeline_parallelism = state.num_pipeline_patch > 1 or not state.split_text_embed_in_sp
        self.usp(uses_pipeline_parallelism)


class MendedFlux1:
    """How xfuser could mend its FLUX.1 transformer itself."""

    def _pad_to_sp_divisible(self, tensor: Any) -> Any:
        return tensor

    def forward(self, hidden_states: Any, padding_length: int) -> None:
        self._pad_to_sp_divisible(hidden_states)
        self.attention_kwargs["valid_kv_len"] = hidden_states.shape[1] - padding_length


class MendedFlux2:
    """How xfuser could mend its FLUX.2 attention itself."""

    def __call__(self, get_runtime_state: Any, attn: Any) -> None:
        state = get_runtime_state()
        self.update_and_get_kv_cache(layer=attn)
        if state.num_pipeline_patch > 1 or not state.split_text_embed_in_sp:
            self.usp(attn_layer=None if self.distri_cache_updated else attn)


class MendedFlux2Pipeline:
    """How xfuser could mend its FLUX.2 pipelines themselves."""

    def __call__(self, image: Any = None, text_encoder_out_layers: Any = None) -> None:
        self.prepare_image_latents(image)

    def _sync_pipeline(self, state: Any, group: Any) -> None:
        state._reset_recv_buffer()
        group.pipeline_recv()


class MendedPipeline:
    """How xfuser could mend its pipelines themselves."""

    def __call__(self, max_sequence_length: int = 256, **kwargs: Any) -> None:
        self.encode_prompt(max_sequence_length=max_sequence_length)

    def _sync_pipeline(self, latents: Any, prompt_embeds: Any, state: Any, group: Any) -> None:
        if prompt_embeds.shape != self.shape:
            state._reset_recv_buffer()
        group.pipeline_recv()


class MendedQwen:
    """How xfuser could mend its Qwen-Image itself."""

    def forward(self, hidden_states: Any, pad_amount: int, modulate_index: Any, chunk: Any) -> None:
        modulate_index = chunk(modulate_index)
        self.attention_kwargs["valid_kv_len"] = modulate_index, pad_amount


class MendedZImage:
    """How xfuser could mend its Z-Image itself."""

    def __init__(self, dim: int) -> None: ...

    def forward(self, x: Any, joint_attention_kwargs: Any = None) -> None: ...


class MendedKrea2:
    """How xfuser could mend its Krea-2 itself."""

    def __init__(self, num_layers: int) -> None: ...

    def forward(self, hidden_states: Any, encoder_attention_mask: Any = None) -> None: ...


class MendedVACE:
    """How xfuser could mend its runner of Wan VACE itself."""

    def _run_pipe(self, input_args: dict[str, Any]) -> Any:
        (prompt,) = input_args["prompt"]
        return self.pipe(prompt=prompt)


class MendedPatchEmbed:
    """How xfuser could mend its table of positions itself."""

    def forward(self, latent: Any, table: Any) -> Any:
        pos_embed = table(output_type="pt").float().unsqueeze(0)
        return latent + pos_embed


class MendedWan:
    """How xfuser could mend its Wan itself."""

    def forward(self, hidden_states: Any, pad_amount: int) -> None:
        self.attention_kwargs["valid_kv_len"] = hidden_states.shape[1] - pad_amount


class MendedCacheManager:
    """How xfuser could mend its cache of keys and values itself."""

    def _sequence_parallel_cache_update(self, kv_list: Any, ranks: int, patches: int) -> list[Any]:
        return [
            kv_list[rank][pp_patch_idx] for pp_patch_idx in range(patches) for rank in range(ranks)
        ]


def mended_writer(frames: Any, path: str, fps: int) -> None:
    """How xfuser could write its videos itself: with PyAV, which it asks for."""


def mended_cleaner(text: str) -> str:
    """How diffusers could clean prompts, as it does for Wan's text to video."""
    return ftfy.fix_text(text) if is_ftfy_available() else text  # noqa: F821


@pytest.mark.parametrize("mend", mends.MENDS, ids=lambda mend: mend.line)
def test_a_mended_xfuser_is_left_alone(mend: mends.Mend) -> None:
    module = types.ModuleType("mended")
    module.xFuserJointAttnProcessor2_0 = MendedJoint
    module.xFuserFluxAttnProcessor = MendedFlux
    module.xFuserFlux1Transformer2DWrapper = MendedFlux1
    module.xFuserFlux2Transformer2DWrapper = MendedFlux1
    module.xFuserFlux2AttnProcessor = MendedFlux2
    module.xFuserFlux2ParallelSelfAttnProcessor = MendedFlux2
    module.xFuserFlux2PipelineBase = MendedFlux2Pipeline
    module.xFuserStableDiffusion3Pipeline = MendedPipeline
    module.xFuserFluxPipeline = MendedPipeline
    module.xFuserWanTransformer3DWrapper = MendedWan
    module.xFuserWanVACETransformer3DWrapper = MendedWan
    module.xFuserWan21VACEModel = MendedVACE
    module.xFuserHunyuanVideoTransformer3DWrapper = MendedWan
    module.xFuserQwenImageTransformerWrapper = MendedQwen
    module.xFuserZImageTransformer2DWrapper = MendedZImage
    module.xFuserKrea2Transformer2DWrapper = MendedKrea2
    module.xFuserLTX2VideoTransformer3DWrapper = MendedWan
    module.xFuserPatchEmbedWrapper = MendedPatchEmbed
    module.CacheManager = MendedCacheManager
    module.export_to_video, module.basic_clean = mended_writer, mended_cleaner
    assert not mend.is_needed(module)


@pytest.mark.parametrize("mend", mends.MENDS, ids=lambda mend: mend.line)
def test_the_installed_xfuser_has_the_bug_or_has_been_mended(mend: mends.Mend) -> None:
    enable_cpu_platform()
    module = importlib.import_module(mend.module)
    assert mend.is_needed(module) or mend.line in mends.mended(module)
