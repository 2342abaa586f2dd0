"""Which models the cache runs on: the table of xfuser's families, and what the command prints."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from diffusers import ChromaTransformer2DModel, DiffusionPipeline
from support.worlds import ROOT, WorldFailed, launch, python
from torch import nn

from diffusers_adapters.registry import adapters
from xfuser_fastcache import apply_cache_on_pipeline, apply_cache_on_transformer
from xfuser_fastcache.cli import main, models
from xfuser_fastcache.xdit.families import FAMILIES, Example, Family, family_of

NAMES = """
import importlib, json, pkgutil
from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform
enable_cpu_platform()
from xfuser.model_executor import pipelines as pipeline_classes
from xfuser.model_executor.models import runner_models
from xfuser.model_executor.models.runner_models.base_model import MODEL_REGISTRY
from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister
for package in (runner_models, pipeline_classes):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
pipelines = xFuserPipelineWrapperRegister._XFUSER_PIPE_MAPPING
since = {name: model.min_diffusers_version for name, model in MODEL_REGISTRY.items()}
print(json.dumps([since, [made.__name__ for made in pipelines]]))
"""


def test_no_model_of_xfusers_is_left_out() -> None:
    done = python("-c", NAMES)
    assert done.returncode == 0, done.stderr
    since, pipelines = json.loads(done.stdout.splitlines()[-1])
    assert len(since) > 50 and len(pipelines) > 10
    found = {name: family_of(name) for name in (*since, *pipelines)}
    assert [name for name, family in found.items() if family is None] == []
    assert {family.title for family in found.values()} == {family.title for family in FAMILIES}
    for name, asked in since.items():
        if asked is not None and asked != "source":
            assert version(found[name].since) >= version(asked), name


def version(text: str) -> list[int]:
    return [int(part) for part in text.split(".")[:2]]


def test_a_family_has_an_adapter_or_a_reason_and_an_adapter_has_a_family() -> None:
    for family in FAMILIES:
        assert bool(family.adapter) != bool(family.why_not), family.title
        assert bool(family.adapter) == bool(family.example), family.title
    assert {family.adapter for family in FAMILIES} - {""} == set(adapters())


def test_a_family_joins_by_its_adapter_alone() -> None:
    """What moves, decides and tells the time names no model's class, nor does an adapter another's.

    ConsisID and VACE are subclasses of their base models' adapters.
    """
    package = ROOT / "xfuser_fastcache"
    rooms = ("engine.py", "hooks.py", "passage.py", "assembly.py", "clock", "decisions", "gates")
    rooms += ("forecasters", "tokens", "state", "consensus", "measurements", "models")
    files = [package / "xdit" / "groups.py"]
    for room in rooms:
        files += [package / room] if room.endswith(".py") else (package / room).glob("*.py")
    classes = {adapter.model_class: adapter for adapter in adapters().values()}
    named = [(f.name, c) for f in files for c in classes if f'"{c}"' in f.read_text()]
    assert len(files) > 50 and named == []
    for module in (ROOT / "diffusers_adapters").glob("*.py"):
        own = {c for c, of in classes.items() if Path(inspect.getfile(of)) == module}
        assert {c for c in classes if f'"{c}"' in module.read_text()} == own


def test_sizes_are_those_of_a_picture_and_a_video() -> None:
    flux = Example("black-forest-labs/FLUX.1-dev", (16, 128, 128), 4, 3072)
    assert (flux.tokens, flux.anchor_bytes(False)) == (4096, 4096 * 3072 * 2)
    assert flux.anchor_bytes(True) == 16 * 128 * 128 * 2
    video = family_of("Wan2.1-T2V").example
    assert video.tokens == 75_600


def test_the_page_is_what_the_command_writes(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    assert main(["models", "--output", str(page)]) == 0
    assert page.read_text() == (ROOT / "docs" / "models.md").read_text()


def test_the_command_shows_what_runs_where_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    found = {row["models"]: row for row in json.loads(capsys.readouterr().out)}
    wan = found["Wan 2.1, 2.2"]
    assert (wan["transformer"], wan["runner"]) == ("WanTransformer3DModel", True)
    assert "ulysses 2" in wan["layouts"] and "pipefusion 2" not in wan["layouts"]
    assert "UNet" in found["Stable Diffusion XL"]["why_not"]
    assert main(["models"]) == 0
    assert "not supported: Stable Diffusion XL: its model is a UNet" in capsys.readouterr().out


def test_another_packages_adapter_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(adapters()["flux"]):
        model_class = "OtherTransformer2DModel"

    monkeypatch.setattr(models, "loaded", lambda group: {**adapters(), "other": Other})
    (row,) = (row for row in models.rows() if row["adapter"] == "other")
    assert models.cells_of(row)[:3] == ["other", "OtherTransformer2DModel", "diffusers' pipeline"]


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.error], ids=lambda f: f.title)
def test_what_xdit_itself_cannot_draw_ends_in_its_error(family: Family) -> None:
    name = {"LingBot-Video": "LingBot-Video-Dense"}[family.title]
    with pytest.raises(WorldFailed) as failed:
        launch("runner_worker.py", 1, ".", "--model", name, "--prompt", "ring", timeout_s=120)
    assert family.error in failed.value.output


def test_a_unet_is_refused_by_name_with_a_pointer() -> None:
    pipe = DiffusionPipeline()
    pipe.unet = type("UNet2DConditionModel", (nn.Linear,), {})(2, 2)
    for apply in (
        lambda: apply_cache_on_pipeline(pipe),
        lambda: apply_cache_on_transformer(pipe.unet),
    ):
        with pytest.raises(ValueError, match="UNet2DConditionModel.*docs/models.md.*DeepCache"):
            apply()


@pytest.mark.parametrize(
    ("model", "nearest"),
    [
        (type("WanAnimateTransformer3DModel", (nn.Linear,), {}), "WanTransformer3DModel"),
        (type("StableAudioDiTModel", (nn.Linear,), {}), "FluxTransformer2DModel"),
    ],
)
def test_a_model_that_is_not_supported_hears_the_nearest_by_its_name(
    model: type, nearest: str
) -> None:
    with pytest.raises(ValueError, match=f"{model.__name__} is not supported.*{nearest}") as found:
        apply_cache_on_transformer(model(2, 2))
    assert "docs/extending.md" in str(found.value) and "`fastcache models`" in str(found.value)


def test_a_model_that_is_not_supported_hears_first_who_has_such_lists_of_blocks() -> None:
    model = ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
    )
    with pytest.raises(ValueError, match=r"nearest to it are FluxTransformer2DModel, ") as found:
        apply_cache_on_transformer(model)
    assert "PixArt" not in str(found.value)
