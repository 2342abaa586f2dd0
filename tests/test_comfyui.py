"""The nodes of integrations/comfyui: loaded by ComfyUI, on its own FLUX with random weights.

Slow ones need a folder of ComfyUI, and an environment in which it starts:

    COMFYUI_DIR=FOLDER python -m pytest -m slow tests/test_comfyui.py
"""

from __future__ import annotations

import asyncio
import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from support.worlds import ROOT

from xfuser_fastcache import apply_cache_on_transformer, get_cache_trace, remove_cache
from xfuser_fastcache.artifacts.calibration import load_fitted
from xfuser_fastcache.hooks import hook_on
from xfuser_fastcache.plugins import ADAPTERS

FOLDER = os.environ.get("COMFYUI_DIR", "")
PACK = ROOT / "integrations" / "comfyui"
STEPS = 8
TEXT, POOLED = 32, 16
needs_comfyui = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="set COMFYUI_DIR to a folder of ComfyUI"),
]


@pytest.fixture(scope="module")
def comfy() -> SimpleNamespace:
    """ComfyUI, on the CPU, with the pack loaded by its own loader."""
    sys.path.append(FOLDER)
    from comfy.cli_args import args

    args.cpu = True
    import comfy.latent_formats
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils
    import nodes

    assert asyncio.run(nodes.load_custom_node(str(PACK)))
    return SimpleNamespace(
        nodes=nodes,
        latents=comfy.latent_formats,
        utils=comfy.utils,
        models=comfy.supported_models,
        pack=nodes.NODE_CLASS_MAPPINGS,
    )


FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": POOLED,
    "context_in_dim": TEXT,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
}


def model_of(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Return a configuration of ComfyUI's as a MODEL, with random weights."""
    config.set_inference_dtype(dtype, None)
    model = config.get_model({})
    noise = torch.Generator().manual_seed(0)
    for held in (*model.diffusion_model.parameters(), *model.diffusion_model.buffers()):
        held.data = 0.06 * torch.randn(held.shape, generator=noise).to(held.dtype)
    device = torch.device("cpu")
    patcher = sys.modules["comfy.model_patcher"].ModelPatcher
    return patcher(model.eval(), load_device=device, offload_device=device)


def flux(comfy: SimpleNamespace, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a tiny FLUX as a MODEL."""
    return model_of(comfy.models.FluxSchnell({**FLUX, **changes}), dtype)


def sd3(comfy: SimpleNamespace, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Return a tiny SD3 as a MODEL."""
    embedder = {"in_features": TEXT, "out_features": 128}
    shape = {
        "in_channels": 16,
        "depth": 2,
        "num_blocks": 4,
        "input_size": None,
        "pos_embed_max_size": 16,
        "num_patches": 256,
        "adm_in_channels": POOLED,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": embedder},
        **more,
    }
    return model_of(comfy.models.SD3(shape), dtype)


def sd35(comfy: SimpleNamespace, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny SD3.5, whose first blocks attend twice, as a MODEL."""
    return sd3(comfy, dtype, x_block_self_attn_layers=[0, 1], qk_norm="rms")


def wan(comfy: SimpleNamespace, dtype: torch.dtype = torch.float32, kind: str = "t2v") -> Any:
    """Return a tiny Wan as a MODEL."""
    shape = {
        "image_model": "wan2.1",
        "model_type": kind,
        "in_dim": 16 if kind == "t2v" else 36,
        "dim": 48,
        "ffn_dim": 96,
        "freq_dim": 32,
        "text_dim": TEXT,
        "num_heads": 2,
        "num_layers": 4,
    }
    kinds = {
        "t2v": comfy.models.WAN21_T2V,
        "i2v": comfy.models.WAN21_I2V,
        "ti2v": comfy.models.WAN22_T2V,
    }
    if kind == "ti2v":
        shape |= {"model_type": "t2v", "in_dim": 48, "out_dim": 48}
    return model_of(kinds[kind](shape), dtype)


def wan_i2v(comfy: SimpleNamespace, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny Wan that is given a picture."""
    return wan(comfy, dtype, "i2v")


FAMILIES = {"flux": flux, "sd3": sd3, "sd3.5": sd35, "wan": wan, "wan i2v": wan_i2v}
families = pytest.mark.parametrize("family", FAMILIES)


def toy_flux(comfy: SimpleNamespace) -> tuple[Any, list[Any], Any]:
    """Return the toy FLUX as a MODEL, a caption as CONDITIONING, and diffusers' transformer."""
    pipe = FluxPipeline.from_pretrained(ROOT / "toys" / "flux")
    shape = {
        **FLUX,
        "in_channels": 4,
        "out_channels": 4,
        "vec_in_dim": 32,
        "context_in_dim": 64,
        "hidden_size": 96,
        "mlp_ratio": 4.0,
        "num_heads": 4,
        "depth": 4,
        "depth_single_blocks": 8,
        "axes_dim": [4, 10, 10],
    }
    config = comfy.models.Flux(shape)
    config.sampling_settings = {"shift": 0.5}
    config.latent_format = comfy.latents.Flux()
    config.latent_format.latent_channels = 4
    model = model_of(config)
    weights = pipe.transformer.state_dict()
    own = model.model.diffusion_model.state_dict()
    filled = 0
    for name, place in comfy.utils.flux_to_diffusers(shape).items():
        if name not in weights:
            continue
        name_here, cut, change = (*((place,) if isinstance(place, str) else place), None, None)[:3]
        value = weights[name] if change is None else change(weights[name])
        (own[name_here] if cut is None else own[name_here].narrow(*cut)).copy_(value)
        filled += value.numel()
    assert filled == sum(held.numel() for held in own.values())
    embeds, pooled, _ = pipe.encode_prompt(
        "a large red ring, top left, on dark blue", None, max_sequence_length=32
    )
    return model, [[embeds.detach(), {"pooled_output": pooled.detach()}]], pipe.transformer


def condition(value: float, tokens: int = 6, **more: Any) -> list[Any]:
    text = torch.linspace(-value, value, tokens * TEXT).view(1, tokens, TEXT)
    return [[text, {"pooled_output": torch.full((1, POOLED), value), **more}]]


def sampled(
    comfy: SimpleNamespace,
    model: Any,
    *,
    sampler: str = "euler",
    steps: int = STEPS,
    cfg: float = 1.0,
    size: tuple[int, ...] | None = None,
    negative: list[Any] | None = None,
    mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Return what KSampler makes of a seed, in the mode in which ComfyUI runs nodes."""
    latents = model.model.latent_format
    size = size or (3, 8, 8)[-latents.latent_dimensions :]
    latent = {"samples": torch.zeros(1, latents.latent_channels, *size)}
    if mask is not None:
        latent["noise_mask"] = mask
    with torch.inference_mode():
        (found,) = comfy.nodes.common_ksampler(
            model,
            3,
            steps,
            cfg,
            sampler,
            "simple",
            options.pop("positive", condition(1.0)),
            condition(-0.5) if negative is None else negative,
            latent,
            **options,
        )
    return found["samples"]


def cached(comfy: SimpleNamespace, model: Any, **options: Any) -> tuple[Any, Any]:
    """Return what the node makes of a model: the patched one, and its decisions."""
    asked = {
        "budget": "computed_steps",
        "computed_steps": 3,
        "quality": "fast",
        "threshold": 0.1,
        "backend": "Fast",
        **options,
    }
    return comfy.pack["FastCache"]().patch(model, **asked)


class Runs:
    """Counts how often a transformer really runs."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        held = dict(model.model.diffusion_model.named_children())
        (held.get("final_layer") or held["head"]).register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1

    def of(self, act: Any) -> tuple[Any, int]:
        before = self.count
        found = act()
        return found, self.count - before


def untouched(model: Any) -> bool:
    """Say whether nothing is left on any module of a model."""
    return not any(
        {"_diffusers_hook", "forward"} & set(vars(module))
        for module in model.model.diffusion_model.modules()
    )


class Slow:
    pytestmark = needs_comfyui


class TestUnderComfyUI(Slow):
    @families
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_budget_computes_so_many_steps_and_leaves_the_model_alone(
        self, comfy: Any, family: str, dtype: torch.dtype
    ) -> None:
        model = FAMILIES[family](comfy, dtype)
        runs = Runs(model)
        plain, ran = runs.of(lambda: sampled(comfy, model))
        assert ran == STEPS and plain.std() > 0.1
        patched, decisions = cached(comfy, model, computed_steps=3)
        first, ran = runs.of(lambda: sampled(comfy, patched))
        assert ran == 3
        assert untouched(model) and hook_on(model.model.diffusion_model) is None
        again, ran = runs.of(lambda: sampled(comfy, patched))
        assert ran == 3 and torch.equal(first, again)
        assert not torch.equal(first, plain)
        # Nearer to the uncached sample than fewer steps are.
        fewer = sampled(comfy, model, steps=3)
        assert (first - plain).square().mean() < (fewer - plain).square().mean()
        after, ran = runs.of(lambda: sampled(comfy, model))
        assert ran == STEPS and torch.equal(after, plain)
        assert decisions.report.statistics["clock"] == "scheduler"

    @pytest.mark.parametrize("backend", ["Fast", "Fb", "Tea"])
    @pytest.mark.parametrize("cfg", [1.0, 3.0])
    @families
    def test_a_threshold_of_0_is_bit_identical_and_a_large_one_is_not(
        self, comfy: Any, family: str, backend: str, cfg: float
    ) -> None:
        model = FAMILIES[family](comfy)
        plain = sampled(comfy, model, cfg=cfg)
        for threshold, skips in ((0.0, False), (10.0, True)):
            patched, decisions = cached(
                comfy, model, budget="threshold", threshold=threshold, backend=backend
            )
            found = sampled(comfy, patched, cfg=cfg)
            assert torch.equal(found, plain) != skips
            assert (decisions.report.statistics["block_approx_ratio"] > 0.2) == skips
            assert torch.equal(sampled(comfy, patched, cfg=cfg), found)
            assert untouched(model)

    def test_blocks_that_write_into_their_arguments_are_remembered_as_they_were(
        self, comfy: Any
    ) -> None:
        model = flux(comfy).model.diffusion_model
        apply_cache_on_transformer(
            model,
            granularity="block",
            forecaster="reuse",
            cache_ratio_threshold=100.0,
            num_warmup_steps=1,
            num_steps=8,
        )
        ends: list[torch.Tensor] = []
        model.final_layer.register_forward_pre_hook(lambda _, args: ends.append(args[0]))
        noise = torch.Generator().manual_seed(1)
        x = torch.randn(1, 16, 8, 8, generator=noise)
        ((text, others),) = condition(1.0)
        for level in (1.0, 0.9, 0.8):
            model(x, torch.tensor([level]), text, others["pooled_output"])
        trace = get_cache_trace(model)
        remove_cache(model)
        assert {e["decision"] for e in trace if e["step"] == 2} == {"skipped"}
        # From the same inputs, what blocks have added is added again.
        assert torch.allclose(ends[1], ends[2], atol=1e-5)

    @pytest.mark.parametrize("together", [True, False])
    @families
    def test_conditions_are_branches_however_comfyui_calls_them(
        self, comfy: Any, family: str, together: bool
    ) -> None:
        model = FAMILIES[family](comfy)
        runs = Runs(model)
        # ComfyUI joins conditions in a batch where they are of one length.
        negative = condition(-0.5) if together else condition(-0.5, tokens=7)
        options = {"cfg": 3.0, "negative": negative}
        plain, ran = runs.of(lambda: sampled(comfy, model, **options))
        calls = 1 if together else 2
        assert ran == calls * STEPS
        zero, _ = cached(comfy, model, budget="threshold", threshold=0.0)
        assert torch.equal(sampled(comfy, zero, **options), plain)
        patched, decisions = cached(comfy, model, computed_steps=4)
        found, ran = runs.of(lambda: sampled(comfy, patched, **options))
        assert ran == calls * 4
        assert len({entry["branch"] for entry in decisions.report.trace}) == calls
        assert decisions.report.statistics["steps"] == STEPS
        assert (found - plain).abs().max() < plain.std()

    def test_a_condition_that_takes_over_brings_no_memory_of_another(self, comfy: Any) -> None:
        model = flux(comfy)
        runs = Runs(model)
        positive = condition(1.0, end_percent=0.45) + condition(-1.0, start_percent=0.45)
        patched, decisions = cached(comfy, model, computed_steps=2)
        _, ran = runs.of(lambda: sampled(comfy, patched, positive=positive))
        first = {entry["branch"]: entry["step"] for entry in decisions.report.trace[::-1]}
        assert sorted(first) == [0, 1] and first[1] > 1
        assert ran == 3  # the two of the budget, and the other condition's first

    @pytest.mark.parametrize(
        "sampler",
        [
            "euler",
            "euler_ancestral",
            "dpmpp_2m",
            "res_multistep",
            "lcm",
            "ddim",
            "uni_pc",
            "deis",
            "dpmpp_2m_sde",
        ],
    )
    def test_samplers_that_evaluate_once_a_step(self, comfy: Any, sampler: str) -> None:
        model = flux(comfy)
        runs = Runs(model)
        plain = sampled(comfy, model, sampler=sampler)
        zero, _ = cached(comfy, model, budget="threshold", threshold=0.0)
        assert torch.equal(sampled(comfy, zero, sampler=sampler), plain)
        patched, _ = cached(comfy, model, computed_steps=5)
        _, ran = runs.of(lambda: sampled(comfy, patched, sampler=sampler))
        assert ran == 5

    @pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde"])
    def test_samplers_that_evaluate_more_often_are_refused(self, comfy: Any, sampler: str) -> None:
        model = flux(comfy)
        patched, _ = cached(comfy, model)
        with pytest.raises(RuntimeError, match="more than once a step.*such as euler"):
            sampled(comfy, patched, sampler=sampler)
        assert untouched(model)

    def test_image_to_image_begins_in_the_middle(self, comfy: Any) -> None:
        model = flux(comfy)
        runs = Runs(model)
        patched, decisions = cached(comfy, model, computed_steps=3)
        _, ran = runs.of(lambda: sampled(comfy, patched, denoise=0.5))
        assert ran == 3 and decisions.report.statistics["steps"] == STEPS

    def test_another_size_and_pictures_that_are_given(self, comfy: Any) -> None:
        kontext = condition(1.0, reference_latents=[torch.ones(1, 16, 4, 4)])
        fill = condition(1.0, concat_latent_image=torch.ones(1, 16, 8, 8))
        for channels, options in (
            (16, {"size": (6, 12)}),
            (16, {"size": (7, 9)}),
            (16, {"positive": kontext}),
            (32, {"positive": fill}),
        ):
            model = flux(comfy, in_channels=channels)
            plain = sampled(comfy, model, **options)
            zero, _ = cached(comfy, model, budget="threshold", threshold=0.0)
            assert torch.equal(sampled(comfy, zero, **options), plain)
            for asked in ({"computed_steps": 4}, {"budget": "threshold", "threshold": 10.0}):
                found = sampled(comfy, cached(comfy, model, **asked)[0], **options)
                assert not torch.equal(found, plain)
                assert (found - plain).abs().max() < plain.std()

    def test_frames_that_are_given_are_none_of_the_video(self, comfy: Any) -> None:
        model = wan(comfy, kind="ti2v")
        runs = Runs(model)
        mask = torch.ones(1, 1, 3, 8, 8)
        mask[:, :, 0] = 0
        plain = sampled(comfy, model, mask=mask)
        zero, _ = cached(comfy, model, budget="threshold", threshold=0.0)
        assert torch.equal(sampled(comfy, zero, mask=mask), plain)
        patched, _ = cached(comfy, model, computed_steps=3)
        found, ran = runs.of(lambda: sampled(comfy, patched, mask=mask))
        assert ran == 3 and (found - plain).abs().max() < plain.std()
        module, x = model.model.diffusion_model, torch.zeros(1, 48, 3, 8, 8)
        for timestep, rows in (([[0.0, 500.0, 500.0]], range(16, 48)), ([500.0], range(48))):
            call = (x, torch.tensor(timestep))
            assert ADAPTERS["comfyui_wan"].image_tokens(module, call, {}) == rows

    def test_a_model_that_is_compiled_as_a_whole_is_refused(self, comfy: Any) -> None:
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        model = flux(comfy).clone()
        set_torch_compile_wrapper(model=model, backend="eager")
        patched, _ = cached(comfy, model)
        with pytest.raises(RuntimeError, match="torch.compile reached into the cache"):
            sampled(comfy, patched)
        assert untouched(model)

    def test_a_calibration_is_refused_where_it_cannot_be_told_whose_it_is(self, comfy: Any) -> None:
        file = str(ROOT / "toys" / "sd3" / "fastcache.safetensors")
        patched, _ = cached(comfy, sd3(comfy), computed_steps=10, calibration=file)
        with pytest.raises(ValueError, match="leave calibration empty"):
            sampled(comfy, patched)

    def test_tokens_of_pictures_that_are_given_are_none_of_the_image(self, comfy: Any) -> None:
        model = flux(comfy).model.diffusion_model
        rows: list[int] = []
        model.double_blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: rows.append(kwargs["img"].shape[1]), with_kwargs=True
        )
        x = torch.zeros(1, 16, 7, 9)
        ((text, others),) = condition(1.0)
        call = (x, torch.ones(1), text, others["pooled_output"])
        given = {"ref_latents": [torch.ones(1, 16, 4, 4)]}
        model(*call)
        model(*call, **given)
        assert ADAPTERS["comfyui_flux"].image_tokens(model, call, {}) is None
        assert ADAPTERS["comfyui_flux"].image_tokens(model, call, given) == range(rows[0])
        assert rows[1] == rows[0] + 4

    def test_clones_of_a_cached_model_are_cached_and_others_are_not(self, comfy: Any) -> None:
        model = flux(comfy)
        runs = Runs(model)
        patched, _ = cached(comfy, model, computed_steps=3)
        assert patched.model is model.model
        assert runs.of(lambda: sampled(comfy, patched.clone()))[1] == 3
        assert runs.of(lambda: sampled(comfy, model.clone()))[1] == STEPS
        twice, _ = cached(comfy, patched, computed_steps=5)
        with pytest.raises(ValueError, match="cached already"):
            sampled(comfy, twice)
        assert untouched(model)

    def test_what_was_decided_is_drawn(self, comfy: Any) -> None:
        model = flux(comfy)
        patched, decisions = cached(comfy, model, computed_steps=3)
        show = comfy.pack["FastCacheReport"]().show
        with pytest.raises(ValueError, match="nothing was sampled"):
            show(decisions, {})
        latent = {"samples": sampled(comfy, patched)}
        handed_on, picture, text = show(decisions, latent)
        assert handed_on is latent
        assert picture.dtype == torch.float32 and picture.shape[0] == 1 and picture.shape[3] == 3
        assert 0 <= picture.min() < picture.max() <= 1
        row = text.splitlines()[1]
        assert row.startswith("branch 0, double_blocks.0 to single_blocks.2: ")
        assert row.rpartition(" ")[2].count("-") == STEPS - 3

    def test_the_toy_flux_is_drawn_as_in_diffusers_and_forecast_as_well(self, comfy: Any) -> None:
        model, caption, theirs = toy_flux(comfy)
        ((text, others),) = caption
        pooled = others["pooled_output"]
        x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))
        tokens = FluxPipeline._pack_latents(x, 1, 4, 32, 32)
        ids = FluxPipeline._prepare_latent_image_ids(1, 16, 16, x.device, x.dtype)
        with torch.no_grad():
            here = model.model.diffusion_model(x, torch.tensor([0.5]), text, pooled)
            (there,) = theirs(
                tokens,
                text,
                pooled,
                torch.tensor([0.5]),
                ids,
                torch.zeros(text.shape[1], 3),
                return_dict=False,
            )
        there = FluxPipeline._unpack_latents(there, 256, 256, 8)
        assert torch.allclose(here, there, atol=1e-3)
        options = {"positive": caption, "size": (32, 32)}
        plain = sampled(comfy, model, steps=28, **options)

        def error(other: torch.Tensor) -> float:
            return float((other - plain).square().mean())

        fewer = error(sampled(comfy, model, steps=10, **options))
        even = error(
            sampled(comfy, cached(comfy, model, computed_steps=10)[0], steps=28, **options)
        )
        file = str(ROOT / "toys" / "flux" / "fastcache.safetensors")
        fitted, decisions = cached(comfy, model, computed_steps=10, calibration=file)
        found = error(sampled(comfy, fitted, steps=28, **options))
        print(f"fewer {fewer:.2e}, even {even:.2e}, calibrated {found:.2e}")
        computed = [int(entry["decision"] != "skipped") for entry in decisions.report.trace]
        assert computed == load_fitted(file).masks[10]
        assert found < even < fewer
        other, _ = cached(comfy, flux(comfy), calibration=file)
        with pytest.raises(ValueError, match="was made for another model"):
            sampled(comfy, other)

    def test_a_workflow_of_the_nodes_is_valid_and_runs(
        self, comfy: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import execution

        shown: list[Any] = []

        class Source:
            CATEGORY, FUNCTION, RETURN_TYPES = "test", "give", ("MODEL", "CONDITIONING")
            INPUT_TYPES = classmethod(lambda cls: {"required": {}})

            def give(self) -> tuple[Any, Any]:
                return flux(comfy), condition(1.0)

        class Sink:
            CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "take", (), True
            INPUT_TYPES = classmethod(
                lambda cls: {"required": {"image": ("IMAGE",), "text": ("STRING",)}}
            )

            def take(self, image: torch.Tensor, text: str) -> dict[str, Any]:
                shown.append((image, text))
                return {}

        monkeypatch.setitem(comfy.pack, "Source", Source)
        monkeypatch.setitem(comfy.pack, "Sink", Sink)
        given = {"budget": "computed_steps", "computed_steps": 3, "quality": "fast"}
        sampler = {"seed": 1, "steps": STEPS, "cfg": 1.0, "sampler_name": "euler"}
        prompt = {
            "1": {"class_type": "Source", "inputs": {}},
            "2": {
                "class_type": "FastCache",
                "inputs": {"model": ["1", 0], **given, "threshold": 0.1, "backend": "Fast"},
            },
            "3": {
                "class_type": "EmptyLatentImage",
                "inputs": {"width": 64, "height": 64, "batch_size": 1},
            },
            "4": {
                "class_type": "KSampler",
                "inputs": {
                    **sampler,
                    "scheduler": "simple",
                    "denoise": 1.0,
                    "model": ["2", 0],
                    "positive": ["1", 1],
                    "negative": ["1", 1],
                    "latent_image": ["3", 0],
                },
            },
            "5": {
                "class_type": "FastCacheReport",
                "inputs": {"decisions": ["2", 1], "latent": ["4", 0]},
            },
            "6": {"class_type": "Sink", "inputs": {"image": ["5", 1], "text": ["5", 2]}},
        }
        valid, error, outputs, _ = asyncio.run(execution.validate_prompt("a", prompt, None))
        assert valid, error
        said: list[Any] = []
        server = SimpleNamespace(
            client_id=None, last_node_id=None, send_sync=lambda *event: said.append(event)
        )
        executor = execution.PromptExecutor(server)
        executor.execute(prompt, "a", execute_outputs=outputs)
        assert executor.success, said
        ((image, text),) = shown
        assert image.ndim == 4 and text.splitlines()[1].count("-") == STEPS - 3

    def test_other_models_are_refused_at_the_node(self, comfy: Any) -> None:
        other = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)))
        with pytest.raises(ValueError, match="no adapter for .*Linear"):
            cached(comfy, other)


def test_the_pack_loads_without_comfyui_and_registers_its_models() -> None:
    from integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    assert ADAPTERS["comfyui_flux"].model_class == "Flux"
    for node in NODE_CLASS_MAPPINGS.values():
        inputs = [name for held in node.INPUT_TYPES().values() for name in held]
        code = getattr(node, node.FUNCTION).__code__
        assert list(code.co_varnames[1 : code.co_argcount]) == inputs
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)


def test_a_plan_counts_evaluations_and_refuses_others() -> None:
    from integrations.comfyui.sampling import SamplerPlan

    plan = SamplerPlan(torch.tensor([1.0, 0.6, 0.2, 0.0]), lambda sigma: 1000 * sigma)
    assert plan.timesteps.tolist() == pytest.approx([1000, 600, 200])
    for index, sigma in enumerate((1.0, 0.6)):
        plan.evaluate(sigma)
        assert plan.step_index == index
    with pytest.raises(RuntimeError, match=r"evaluation 2 .* sigma 0.6, where the plan has 0.2"):
        plan.evaluate(0.6)
    plan.evaluate(0.2)
    with pytest.raises(RuntimeError, match="the plan has none"):
        plan.evaluate(0.2)
    assert np.isclose(plan.levels, [1.0, 0.6, 0.2]).all()


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from integrations.comfyui.adapters import FluxAdapter, SD3Adapter

    monkeypatch.setattr(ADAPTERS, "_added", {})
    ADAPTERS.add("comfyui_flux", FluxAdapter)
    ADAPTERS.add("comfyui_flux", FluxAdapter)  # its file, loaded once more
    assert list(ADAPTERS).count("comfyui_flux") == 1 and len(ADAPTERS) == len(list(ADAPTERS))
    for name in ("comfyui_flux", "flux"):
        with pytest.raises(ValueError, match=f"'{name}' already"):
            ADAPTERS.add(name, SD3Adapter)
