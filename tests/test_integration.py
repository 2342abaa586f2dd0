"""What is changed in xfuser, and how it is undone: in this process, without ranks.

What the changes are for runs in `test_native.py`, `test_runner.py` and `test_source_documents.py`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
from support.worlds import python

from xfuser_fastcache.backends import BACKENDS
from xfuser_fastcache.cli import doctor
from xfuser_fastcache.config.cache_config import CacheConfig
from xfuser_fastcache.xdit import integration, points
from xfuser_fastcache.xdit.compat import IncompatibleXfuserError, has_accelerator
from xfuser_fastcache.xdit.integration import CPU_SWITCH
from xfuser_fastcache.xdit.pipeline_classes import WRAPPERS

ROOT = Path(__file__).resolve().parent.parent


def fresh(code: str, path: str = "") -> str:
    """Standard output of `code` in an interpreter of its own, with `path` first on `sys.path`."""
    start = f"import sys\nsys.path[:0] = [{str(ROOT)!r}]\n"
    start += f"sys.path[:0] = [{path!r}]\n" if path else ""
    done = python("-c", start + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def xfuser() -> Any:
    """xfuser on the CPU, with what `import xfuser_fastcache` makes of it."""
    from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform

    enable_cpu_platform()
    import xfuser

    return xfuser


def test_import_loads_neither_xfuser_nor_torch() -> None:
    code = """
        import json, sys
        import xfuser_fastcache
        from xfuser_fastcache.xdit.integration import install
        before = list(sys.meta_path)
        install()
        assert sys.meta_path == before
        heavy = ("xfuser", "torch", "diffusers", "transformers", "numpy")
        print(json.dumps([name for name in heavy if name in sys.modules]))
    """
    # `python` has torch imported.
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=120)
    assert json.loads(done.stdout) == []


# Every object that a patch could touch: attributes of the patched modules, of their classes, and of
# the runner's settings.
SNAPSHOT = """
import importlib, json
from xfuser_fastcache.xdit import integration, points
from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform

def snapshot():
    found = {}
    for name in integration.PATCHES:
        module = importlib.import_module(name)
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                for inner, part in vars(value).items():
                    found[f"{name}.{key}.{inner}"] = id(part)
                if "settings" in vars(value):
                    found[f"{name}.{key}.methods"] = list(value.settings.step_cache_config or ())
    found["finders"] = list(map(id, sys.meta_path))  # last: xfuser brings some of its own
    return found

def changed(a, b):
    return sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
"""


def test_uninstall_restores_every_attribute_however_xfuser_came_to_be_loaded() -> None:
    printed = fresh(
        SNAPSHOT
        + """
enable_cpu_platform()
as_they_load = snapshot()
integration.uninstall()
integration.uninstall()
plain = snapshot()
integration.install()
in_place = snapshot()
integration.install()
twice = snapshot()
import xfuser.model_executor.pipelines.fastcache_pipeline as alias
integration.uninstall()
left = changed(plain, snapshot())
try:
    import xfuser.model_executor.pipelines.fastcache_pipeline
    left.append("alias")
except ModuleNotFoundError:
    pass
ways = [changed(plain, patched) for patched in (as_they_load, in_place, twice)]
print(json.dumps([*ways, changed(in_place, twice), left]))
"""
    )
    as_they_load, in_place, twice, by_second_call, left = json.loads(printed.splitlines()[-1])
    assert as_they_load == in_place == twice
    assert by_second_call == left == []
    for name in integration.PATCHES:
        assert any(key.startswith(f"{name}.") for key in in_place), f"{name} is not patched"


@pytest.mark.parametrize("version", ["0.6.3", "0.9.0"])
def test_a_release_that_is_not_tried_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: version)
    said = f"xfuser {version} .*expected 0.7.x or 0.8.x"
    for name, patch in integration.PATCHES.items():
        with pytest.raises(IncompatibleXfuserError, match=said):
            patch(types.ModuleType(name))


@pytest.mark.parametrize("name", sorted(integration.PATCHES))
def test_a_place_that_is_gone_is_left_alone_and_named(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    patch = integration.PATCHES[name]
    patch(module := types.ModuleType(name))
    assert [key for key in vars(module) if not key.startswith("__")] == []
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"{patch.brings} does not work here: {name}.")
    assert patch.needs[0] in message and "does not exist" in message


@pytest.mark.parametrize("version", ["0.7.1", "0.8.0"])
def test_an_untested_release_is_told_with_what_was_probed(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    version: str,
) -> None:
    package = tmp_path / "xfuser"
    base = package / "model_executor" / "pipelines" / "base_pipeline.py"
    base.parent.mkdir(parents=True)
    base.write_text("class xFuserPipelineBaseWrapper:\n    def __init__(self): ...\n")
    (package / "config").mkdir()
    (package / "config" / "args.py").write_text(
        "class xFuserArgs:\n    def add_cli_args(self): ...\n    create_config = None\n"
    )
    spec = types.SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(points.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: version)
    points._warn_of.cache_clear()
    found = points.probed()
    assert found["xfuser.model_executor.pipelines.base_pipeline"] == []
    assert found["xfuser.config.args"] == ["xFuserArgs.add_runner_args", "xFuserArgs.create_config"]
    assert found["xfuser.model_executor.models.runner_models.base_model"] == ["the module"]
    # The others go on: this one is there.
    module = types.ModuleType("xfuser.model_executor.models.transformers.base_transformer")
    module.xFuserTransformerBaseWrapper = type("xFuserTransformerBaseWrapper", (), {})
    try:
        for _ in range(2):
            integration.PATCHES[module.__name__](module)
        assert hasattr(module.xFuserTransformerBaseWrapper, "enable_cache")
    finally:
        wrapper = module.xFuserTransformerBaseWrapper
        integration._CHANGES._undo[:] = [
            undo for undo in integration._CHANGES._undo if undo.args[0] is not wrapper
        ]
    (message,) = (record.getMessage() for record in caplog.records)
    assert f"xfuser {version} was not tested" in message and "0.7.0" in message
    assert "xfuser.config.args: xFuserArgs.add_runner_args, xFuserArgs.create_config" in message
    assert "base_pipeline: all there" in message


def test_every_place_is_there_in_the_installed_xfuser_and_nothing_else_is_changed(
    xfuser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert points.probed() == {name: [] for name in integration.PATCHES}
    rows = doctor.integration()
    assert {row["module"] for row in rows} == set(integration.PATCHES)
    assert all(row["brings"] and not row["missing"] for row in rows)
    loaded = {name: importlib.import_module(name) for name in integration.PATCHES}
    wrapped: list[str] = []
    monkeypatch.setattr(integration, "_wrap", lambda _module, path, _around: wrapped.append(path))
    monkeypatch.setattr(integration._CHANGES, "add", lambda *_: None)
    for name, patch in integration.PATCHES.items():
        wrapped.clear()
        patch(loaded[name])
        assert sorted(wrapped) == sorted(patch.needs if wrapped else ())


def test_a_module_that_xfuser_has_itself_is_left_alone(tmp_path: Path) -> None:
    package = tmp_path / "xfuser" / "model_executor" / "pipelines"
    package.mkdir(parents=True)
    for folder in (package, *list(package.parents)[:2]):
        (folder / "__init__.py").touch()
    (package / "fastcache_pipeline.py").write_text("xFuserFastCachePipelineWrapper = 'its own'\n")
    printed = fresh(
        """
        import xfuser_fastcache
        from xfuser.model_executor.pipelines.fastcache_pipeline import (
            xFuserFastCachePipelineWrapper as found,
        )
        print(found)
        """,
        str(tmp_path),
    )
    assert printed.strip() == "its own"


def test_names_of_the_documents_exist_under_xfuser(xfuser: Any) -> None:
    from xfuser.model_executor.cache.diffusers_adapters import flux, pixart, sd3
    from xfuser.model_executor.pipelines import fastcache_pipeline

    import xfuser_fastcache
    from xfuser_fastcache.xdit import pipeline

    for module in (flux, sd3, pixart):
        assert module.apply_cache_on_transformer is xfuser_fastcache.apply_cache_on_transformer
    wrapper = fastcache_pipeline.xFuserFastCachePipelineWrapper
    assert wrapper is pipeline.xFuserFastCachePipelineWrapper
    # xfuser's own deprecated function of the package above them stays what it is.
    from xfuser.model_executor.cache import diffusers_adapters

    own = diffusers_adapters.apply_cache_on_transformer
    assert own.__module__ == "xfuser.model_executor.cache.diffusers_adapters"


def parsed(xfuser: Any, adder: str, *flags: str) -> Any:
    from xfuser.config import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    getattr(xfuser.xFuserArgs, adder)(parser)
    return parser.parse_args(["--model", "m", *flags])


@pytest.mark.parametrize("adder", ["add_cli_args", "add_runner_args"])
def test_cache_method_takes_our_names_beside_xdits(
    xfuser: Any, capsys: pytest.CaptureFixture[str], adder: str
) -> None:
    for method in (*integration.METHODS, "teacache", "fbcache", "dbcache"):
        assert parsed(xfuser, adder, "--cache-method", method).cache_method == method
    assert parsed(xfuser, adder).cache_method is None
    with pytest.raises(SystemExit):
        parsed(xfuser, adder, "--cache_method", "fast")
    said = capsys.readouterr().err
    assert "dbcache" in said and "fastcache" in said and "TaylorSeer" in said


def test_use_cache_on_the_command_line_is_still_fast_attentions(xfuser: Any) -> None:
    assert parsed(xfuser, "add_cli_args").use_cache is False
    assert parsed(xfuser, "add_cli_args", "--use_cache").use_cache is True


def test_every_backend_has_a_method_of_its_name() -> None:
    assert integration.METHODS == {"fastcache": "Fast", **{name: name for name in BACKENDS}}
    for method, backend in integration.METHODS.items():
        assert integration.requested(method).use_cache == backend


def test_methods_that_are_not_ours_are_left_to_xdit() -> None:
    for method in (None, "teacache", "fbcache", "dbcache"):
        assert integration.requested(method, '{"residual_diff_threshold": 0.1}') is None


def test_json_and_a_mapping_ask_for_the_same() -> None:
    asked = integration.requested("fastcache", '{"cache_ratio_threshold": 0.2}')
    assert asked == integration.requested("fastcache", {"cache_ratio_threshold": 0.2})
    assert asked == CacheConfig(use_cache="Fast", cache_ratio_threshold=0.2)
    named = integration.requested("fastcache", {"use_cache": "Fb"})
    assert named == integration.requested("Fb")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fastcache", "{", "cache_config='{' is not valid JSON"),
        ("fastcache", "[1]", "must hold a mapping of options"),
        ("fastcache", '{"treshold": 1}', "unknown cache option 'treshold'"),
        ("fastcache", '{"cache_ratio_threshold": -1}', "cache_ratio_threshold=-1"),
        ("Fb", '{"use_cache": "Tea"}', "cache_method='Fb' and use_cache='Tea' ask for two"),
    ],
)
def test_wrong_options_say_what_is_wrong(method: str, options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        integration.requested(method, options)


EXAMPLES = {  # what xDiT's own scripts hand over, whatever the flags
    "use_teacache": False, "use_fbcache": False, "rel_l1_thresh": 0.12,
    "return_hidden_states_first": False, "num_steps": 28,
}  # fmt: skip


@pytest.mark.parametrize(
    ("cache_args", "backend"),
    [
        (None, None),
        ({}, None),
        (EXAMPLES, None),
        ({"use_teacache": True}, None),
        ({"cache_method": "fbcache", "rel_l1_thresh": 0.1}, None),
        ({"use_cache": "Fast"}, "Fast"),
        ({**EXAMPLES, "use_cache": "Tea"}, "Tea"),
        ({"cache_method": "Custom"}, "Custom"),
        ({"cache_method": "fastcache", "cache_config": '{"rel_l1_thresh": 0.12}'}, "Fast"),
    ],
)
def test_cache_args_are_ours_only_where_they_name_a_backend_of_ours(
    cache_args: Any, backend: str | None
) -> None:
    config = integration._in_cache_args(cache_args)
    assert (config and config.use_cache) == backend
    if config is not None and "rel_l1_thresh" in str(cache_args):
        assert config.cache_ratio_threshold == 0.12


@pytest.mark.parametrize(
    ("cache_args", "message"),
    [
        (
            {"use_cache": "Fast", "use_teacache": True},
            "by use_teacache in cache_args=",
        ),
        (
            {"use_cache": "Fast", "cache_method": "dbcache"},
            "by cache_method in cache_args=",
        ),
        ({"use_cache": "Fast", "preset_kwargs": {}}, "unknown cache option 'preset_kwargs'"),
    ],
)
def test_contradicting_cache_args_are_refused(cache_args: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        integration._in_cache_args(cache_args)


def test_the_same_cache_may_be_asked_for_twice_but_not_two() -> None:
    fast, fb = CacheConfig(), CacheConfig(use_cache="Fb")
    assert integration._one_of({"a": None, "b": None}) is None
    assert integration._one_of({"a": fast, "b": None, "c": CacheConfig()}) == fast
    with pytest.raises(ValueError, match="a and c ask for different caches"):
        integration._one_of({"a": fast, "b": None, "c": fb})


@pytest.mark.parametrize(
    ("model", "place", "own"),
    [
        ("FLUX.1-dev", "flux.xFuserFluxModel", ["teacache", "dbcache"]),
        ("FLUX.1-Kontext-dev", "flux.xFuserFluxKontextModel", ["dbcache"]),
        ("SD3.5", "stable_diffusion.xFuserStableDiffusionModel", ["dbcache"]),
        # It sets its methods anew for each instance.
        ("Wan2.2-T2V", "wan.xFuserWan22T2VModel", ["dbcache"]),
    ],
)
def test_models_of_the_runner_take_our_methods(
    xfuser: Any, model: str, place: str, own: list[str]
) -> None:
    module, _, name = place.partition(".")
    runner_models = importlib.import_module(f"xfuser.model_executor.models.runner_models.{module}")
    made = getattr(runner_models, name)(xfuser.xFuserArgs(model=model, cache_method="fastcache"))
    assert [*made.settings.step_cache_config][-len(integration.METHODS) :] == [*integration.METHODS]
    assert set(own) <= set(made.settings.step_cache_config)
    # The class goes on as xfuser has made it.
    assert not set(integration.METHODS) & set(
        getattr(runner_models, name).settings.step_cache_config or ()
    )


def test_a_model_without_step_caches_of_xdits_takes_ours_and_not_xdits(xfuser: Any) -> None:
    from xfuser.model_executor.models.runner_models.z_image import xFuserZImageTurboModel

    made = xFuserZImageTurboModel(xfuser.xFuserArgs(model="Z-Image-Turbo", cache_method="Fast"))
    assert [*made.settings.step_cache_config] == [*integration.METHODS]
    with pytest.raises(ValueError, match="does not support step caching"):
        xFuserZImageTurboModel(xfuser.xFuserArgs(model="Z-Image-Turbo", cache_method="dbcache"))
    assert not xFuserZImageTurboModel.capabilities.supports_step_caching


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("cosmos3.xFuserCosmos3NanoModel", "Cosmos3: not yet; it takes lists"),
        ("minimax_h3.xFuserMiniMaxH3Model", "MiniMax-H3: not yet; "),
        # Its transformer is a Wan's, and xDiT's own step cache takes it.
        ("causal_wan.xFuserCausalWanModel", "causal Wan: it draws 3 frames at a time"),
    ],
)
def test_a_model_of_the_runner_that_is_not_supported_says_why(
    xfuser: Any, place: str, why: str
) -> None:
    module, _, name = place.partition(".")
    runner_models = importlib.import_module(f"xfuser.model_executor.models.runner_models.{module}")
    config = xfuser.xFuserArgs(model=name, cache_method="fastcache", input_images=[])
    with pytest.raises(ValueError, match=f"{why}.*docs/models.md.*docs/extending.md"):
        getattr(runner_models, name)(config)


IMPORTS = """
import xfuser_fastcache
from xfuser.model_executor.pipelines.fastcache_pipeline import xFuserFastCachePipelineWrapper
from xfuser.model_executor.cache.diffusers_adapters.flux import apply_cache_on_transformer
from xfuser import xFuserArgs, xDiTParallel
print("imported")
"""


def imported(**environment: str) -> subprocess.CompletedProcess[str]:
    """Type the import lines of the source documents in a process of its own."""
    return python("-c", IMPORTS, environment=environment)


needs_no_accelerator = pytest.mark.skipif(has_accelerator(), reason="xfuser imports by itself here")


@needs_no_accelerator
def test_the_error_of_the_import_says_how_to_do_without_an_accelerator() -> None:
    done = imported()
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    for words in (
        "NotImplementedError: No Accelerators",
        "enable_cpu_platform()",
        CPU_SWITCH + "=1",
    ):
        assert words in last


@needs_no_accelerator
def test_a_variable_of_the_environment_lets_the_import_lines_run_as_typed() -> None:
    done = imported(**{CPU_SWITCH: "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported"


def test_another_value_of_that_variable_is_refused() -> None:
    done = imported(**{CPU_SWITCH: "yes"})
    assert done.returncode == 1
    assert f"{CPU_SWITCH}='yes' is not allowed; give 1, or 0" in done.stderr


def test_every_pipeline_class_of_xfuser_is_told_of() -> None:
    """One that is left out compares no inputs, and no error outside of a forward pass is named."""
    printed = fresh(
        """
import importlib, json, pkgutil
from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform
enable_cpu_platform()
import xfuser.model_executor.pipelines as pipelines
from xfuser.model_executor.pipelines.base_pipeline import xFuserPipelineBaseWrapper as base
found = {}
for module in pkgutil.iter_modules(pipelines.__path__):
    for name, value in vars(importlib.import_module(f"{pipelines.__name__}.{module.name}")).items():
        own = isinstance(value, type) and value.__module__.endswith(f".{module.name}")
        if own and base in value.__bases__:
            found[module.name] = name
print(json.dumps(found))
"""
    )
    found = json.loads(printed.splitlines()[-1])
    found.pop("pipeline_stable_diffusion_xl")  # a UNet
    assert found == WRAPPERS
