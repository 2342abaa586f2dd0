"""What installing and importing promise: entry points, a light import, and the order of rooms.

Pure CPU. The order is read off the source by `ast`, so it holds for imports inside functions and
for modules that cannot be imported on this machine.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from support.worlds import python

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("xfuser_fastcache", "diffusers_adapters")

# Top to bottom: a module imports only rooms below its own.
HOUSE = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
ROOMS = tuple(line.split()[0] for line in HOUSE.split("```")[1].strip().splitlines())
# Each file in these folders is understood alone: it shares nothing with its neighbours but base.
METHODS = ("gates", "forecasters", "tokens")
# These folders are one room in several files.
SHARED = tuple(sorted(set(ROOMS) - {"gates", "forecasters"}))


def imported_names(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """Every dotted name that a module imports, at any depth, as (line, name)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                drop = node.level - is_package
                parents = parents[: len(parents) - drop]
                base = ".".join([*parents, base] if base else parents)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:
            function = ast.unparse(node.func).rsplit(".", 1)[-1]
            argument = node.args[0]
            if function in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                found.append((node.lineno, str(argument.value)))
    return found


def complaint(module: str, is_package: bool, target: str) -> str | None:
    """Why `module` may not import `target`, or None where it may."""
    package, *inside = module.split(".")
    top, *path = target.split(".")
    room = inside[0] if inside else ""
    room_of_target = path[0] if path else ""

    if top == "xfuser" and (package, room) != ("xfuser_fastcache", "xdit"):
        return "only xdit/ imports xfuser"
    if top == "toys":
        return "toys are no part of the wheel: calibration.checkout finds them"
    if top == "diffusers" and package != "diffusers_adapters":
        # Model classes are also offered by the top level, under names that end like this.
        if room_of_target in ("models", "pipelines") or room_of_target.endswith("Model"):
            return "only diffusers_adapters/ imports the models and pipelines of diffusers"
    if package != "xfuser_fastcache" or top != package or not inside:
        return None  # the rest is about rooms, and the package's __init__ may import any

    if room not in ROOMS:
        return f"'{room}' has no place in ROOMS: add it where it belongs"
    if room_of_target not in ROOMS:
        return f"'{room_of_target or top}' is no room: import from the module that defines it"
    in_base = path[1:2] == ["base"]
    if room == room_of_target:
        if is_package or room in SHARED or in_base:
            return None
        return f"in {room}/ only base is shared"
    if ROOMS.index(room_of_target) < ROOMS.index(room):
        return f"{room_of_target} is above {room}"
    if room in METHODS[:2] and room_of_target in METHODS[:2] and not in_base:
        return "a gate or forecaster knows no other concrete one"
    return None


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Broken import rules of one module, each with its line and reason."""
    found = []
    for line, target in imported_names(source, module, is_package):
        reason = complaint(module, is_package, target)
        if reason:
            found.append(f"{module}:{line}: imports {target}: {reason}")
    return found


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def fresh(code: str) -> str:
    """Standard output of `code` in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_source_follows_import_rules() -> None:
    files = sources()
    assert files
    found = []
    for path in files:
        is_package = path.name == "__init__.py"
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if is_package else parts)
        found += violations(path.read_text(encoding="utf-8"), module, is_package)
    assert not found, "\n".join(found)


def test_every_folder_of_modules_is_a_package() -> None:
    bare = {path.parent for path in sources() if not (path.parent / "__init__.py").exists()}
    assert not bare, f"the wheel would leave out {sorted(map(str, bare))}: add __init__.py"


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("engine", "from xfuser_fastcache.hooks import attach", "hooks is above engine"),
        ("engine", "def f():\n    from . import apply", "apply is above engine"),
        ("config", "from .measurements.moments import SLOTS", "measurements is above config"),
        ("consensus", "import xfuser_fastcache.gates.base", "gates is above consensus"),
        ("state", "from xfuser_fastcache import CacheConfig", "'CacheConfig' is no room"),
        ("engine", "import xfuser_fastcache", "'xfuser_fastcache' is no room"),
        ("helpers", "from .config import CacheConfig", "'helpers' has no place"),
        ("gates.tea", "from .first_block import FirstBlockGate", "only base is shared"),
        ("gates.tea", "from . import first_block", "only base is shared"),
        ("gates.tea", "from xfuser_fastcache.gates import TeaGate", "only base is shared"),
        ("gates.tea", "from ..forecasters.taylor import X", "no other concrete one"),
        ("forecasters.reuse", "from ..gates.base import Gate", "gates is above"),
        ("hooks", "import xfuser", "only xdit/ imports xfuser"),
        ("benchmarks.quality", "from toys.captions import draw", "toys are no part of the wheel"),
        ("hooks", "import importlib\nimportlib.import_module('xfuser.envs')", "only xdit/"),
        ("hooks", "from diffusers.models import FluxTransformer2DModel", "only diffusers_adapters"),
        ("xdit.plugin", "from diffusers import pipelines", "only diffusers_adapters"),
        ("hooks", "from diffusers import FluxTransformer2DModel", "only diffusers_adapters"),
    ],
)
def test_planted_violation_is_found(module: str, source: str, reason: str) -> None:
    found = violations(source, f"xfuser_fastcache.{module}")
    assert len(found) == 1 and reason in found[0], found


def test_planted_violation_in_other_packages_is_found() -> None:
    assert violations("from xfuser import envs", "diffusers_adapters.flux")
    assert violations("import xfuser", "xfuser_fastcache", is_package=True)
    assert violations("from ..apply import f", "xfuser_fastcache.gates", is_package=True)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine", "from xfuser_fastcache.gates.base import Gate"),
        ("backends", "from .gates import chi_square"),
        ("gates.tea", "from .base import Gate"),
        ("gates.tea", "from ..config import CacheConfig"),
        ("xdit.pipeline", "import xfuser\nfrom .groups import XDiTLayout"),
        ("hooks", "from diffusers.hooks import ModelHook"),
        ("consensus", "import statistics"),
    ],
)
def test_allowed_import_passes(module: str, source: str) -> None:
    assert not violations(source, f"xfuser_fastcache.{module}")


def test_init_files_may_import_their_own() -> None:
    assert not violations("from .apply import f", "xfuser_fastcache", is_package=True)
    assert not violations("from .tea import T", "xfuser_fastcache.gates", is_package=True)


def test_import_is_light() -> None:
    # CUDA's entry is replaced by a counter, so that this can fail on a machine without a GPU too.
    report = json.loads(
        fresh(
            "import json, sys, torch\n"
            "calls = []\n"
            "torch.cuda._lazy_init = lambda: calls.append(1)\n"
            "import xfuser_fastcache\n"
            "loaded = [name for name in ('xfuser', 'diffusers') if name in sys.modules]\n"
            "cuda = bool(calls) or torch.cuda.is_initialized()\n"
            "print(json.dumps({'loaded': loaded, 'cuda': cuda}))\n"
        ).splitlines()[-1]
    )
    assert report == {"loaded": [], "cuda": False}


DECLARED = {
    ("console_scripts", "fastcache"): "xfuser_fastcache.cli:main",
    ("console_scripts", "xdit-fastcache"): "xfuser_fastcache.xdit.runner:launch",
    ("xfuser_fastcache.adapters", "flux"): "diffusers_adapters.flux:FluxAdapter",
    ("xfuser_fastcache.adapters", "flux2"): "diffusers_adapters.flux2:Flux2Adapter",
    ("xfuser_fastcache.adapters", "sd3"): "diffusers_adapters.sd3:SD3Adapter",
    ("xfuser_fastcache.adapters", "pixart"): "diffusers_adapters.pixart:PixArtAdapter",
    ("xfuser_fastcache.adapters", "wan"): "diffusers_adapters.wan:WanAdapter",
    ("xfuser_fastcache.adapters", "wan_vace"): "diffusers_adapters.wan:WanVACEAdapter",
    ("xfuser_fastcache.adapters", "qwen_image"): "diffusers_adapters.qwen_image:QwenImageAdapter",
    ("xfuser_fastcache.adapters", "z_image"): "diffusers_adapters.z_image:ZImageAdapter",
    ("xfuser_fastcache.adapters", "krea2"): "diffusers_adapters.krea2:Krea2Adapter",
    ("xfuser_fastcache.adapters", "hunyuan_video"): (
        "diffusers_adapters.hunyuan_video:HunyuanVideoAdapter"
    ),
    ("xfuser_fastcache.adapters", "hunyuan_video15"): (
        "diffusers_adapters.hunyuan_video15:HunyuanVideo15Adapter"
    ),
    ("xfuser_fastcache.adapters", "cogvideox"): "diffusers_adapters.cogvideox:CogVideoXAdapter",
    ("xfuser_fastcache.adapters", "consisid"): "diffusers_adapters.consisid:ConsisIDAdapter",
    ("xfuser_fastcache.adapters", "sana"): "diffusers_adapters.sana:SanaAdapter",
    ("xfuser_fastcache.adapters", "lumina2"): "diffusers_adapters.lumina2:Lumina2Adapter",
    ("xfuser_fastcache.adapters", "hunyuan_dit"): (
        "diffusers_adapters.hunyuan_dit:HunyuanDiTAdapter"
    ),
    ("xfuser_fastcache.adapters", "ltx2"): "diffusers_adapters.ltx2:LTX2Adapter",
    ("xfuser_fastcache.adapters", "latte"): "diffusers_adapters.latte:LatteAdapter",
    ("xfuser_fastcache.adapters", "ideogram4"): "diffusers_adapters.ideogram4:Ideogram4Adapter",
    ("xfuser_fastcache.layouts", "xdit"): "xfuser_fastcache.xdit.groups:XDiTLayout",
}


def test_entry_points_are_declared() -> None:
    points = distribution("xfuser-fastcache").entry_points
    found = {(point.group, point.name): point.value for point in points}
    assert found == DECLARED, "run scripts/setup.sh after changing entry points in setup.py"


def test_listing_entry_points_imports_nothing() -> None:
    listed, loaded = json.loads(
        fresh(
            "import json, sys\n"
            "from importlib.metadata import entry_points\n"
            "names = [p.name for g in ('adapters', 'layouts')\n"
            "         for p in entry_points(group='xfuser_fastcache.' + g)]\n"
            "heavy = ('torch', 'xfuser', 'diffusers', 'xfuser_fastcache', 'diffusers_adapters')\n"
            "print(json.dumps([names, [m for m in heavy if m in sys.modules]]))\n"
        )
    )
    assert {"flux", "xdit"} <= set(listed)
    assert loaded == []


@pytest.mark.parametrize("key", DECLARED, ids=lambda key: key[1])
def test_entry_point_loads(key: tuple[str, str]) -> None:
    # Loading must not import xfuser, which fails where there is no GPU.
    group, name = key
    module, attribute = DECLARED[key].split(":")
    shown, xfuser_loaded = json.loads(
        python(
            "-c",
            "import json, sys\n"
            "from importlib.metadata import entry_points\n"
            f"(point,) = entry_points(group={group!r}, name={name!r})\n"
            "found = point.load()\n"
            "shown = found.__module__ + ':' + found.__qualname__\n"
            "print(json.dumps([shown, 'xfuser' in sys.modules]))\n",
        ).stdout.splitlines()[-1]
    )
    assert shown == f"{module}:{attribute}"
    assert not xfuser_loaded
