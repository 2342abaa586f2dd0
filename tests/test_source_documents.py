"""The usage blocks of FastCache's documents, typed as they stand there, on the toys.

Three substitutions only: `import xfuser_fastcache` stands before a block, `scripts/` stands for
`examples/`, and a toy's folder for a hub name. Where a block names what it does not make (`model`,
`engine_config`) or leaves a call's arguments out (`...`), the names and arguments are given here.
The texts on the method and on other caches have no usage block.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.worlds import ROOT, launch

TOYS = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
    "black-forest-labs/FLUX.1-schnell": "flux",
}
OMITTED = "..."
CALL = 'prompt="a red ring", height=128, width=128, num_inference_steps=8, max_sequence_length=32'


@dataclass(frozen=True)
class Block:
    """A block of code in a document.

    Attributes:
        code: as it stands there.
        given: what it takes for granted.
        then: checks of what it has made.
    """

    code: str
    given: str = ""
    then: str = ""


_LOADED = """
from diffusers import StableDiffusion3Pipeline
model = StableDiffusion3Pipeline.from_pretrained(
    "stabilityai/stable-diffusion-3-medium-diffusers"
)
"""
_WRAPPED = (
    "from xfuser.model_executor.pipelines.fastcache_pipeline import "
    "xFuserFastCachePipelineWrapper\n"
    f"{_LOADED}fastcache_wrapper = xFuserFastCachePipelineWrapper(model)\n"
)
_COUNTED = """
assert result.images[0].size == (128, 128)
assert stats["steps"] == 30 and stats["generations"] == 1
assert 0 < stats["block_approx_ratio"] < 1, stats["block_approx_ratio"]
"""

BLOCKS = {
    "usage guide: basic usage": Block(
        """
from xfuser.model_executor.pipelines.fastcache_pipeline import xFuserFastCachePipelineWrapper
from diffusers import StableDiffusion3Pipeline

# Load your diffusion model
model = StableDiffusion3Pipeline.from_pretrained("stabilityai/stable-diffusion-3-medium-diffusers")

# Create FastCache wrapper
fastcache_wrapper = xFuserFastCachePipelineWrapper(model)

# Enable FastCache with optional parameters
fastcache_wrapper.enable_fastcache(
    cache_ratio_threshold=0.05,  # Relative change threshold for caching
    motion_threshold=0.1,        # Threshold for motion saliency
)

# Run inference with FastCache acceleration
result = fastcache_wrapper(
    prompt="a photo of an astronaut riding a horse on the moon",
    num_inference_steps=30,
)

# Get cache statistics
stats = fastcache_wrapper.get_cache_statistics()
print(stats)
""",
        then=_COUNTED,
    ),
    "usage guide: parallel inference": Block(
        """
# Enable FastCache in your pipeline
fastcache_wrapper = xFuserFastCachePipelineWrapper(model)
fastcache_wrapper.enable_fastcache()

# Apply parallel inference (USP, PipeFusion, etc.)
paralleler = xDiTParallel(fastcache_wrapper, engine_config, input_config)

# Run inference with both FastCache and parallel acceleration
result = paralleler(...)
""",
        given="parallel",
        then="parallel",
    ),
    "framework: token merging": Block(
        """
from xfuser.model_executor.cache.diffusers_adapters.flux import apply_cache_on_transformer

# Enable token merging with FastCache
apply_cache_on_transformer(
    transformer,
    use_cache="Fast",
    enable_token_merge=True,        # Enable token merging
    token_merge_k=5,                # Number of nearest neighbors for spatial density
    token_merge_lambda=1.0,         # Temporal saliency weight
    num_stages=3,                   # Number of pyramidal stages
    merge_ratio=0.5,                # Token reduction ratio per stage
    motion_threshold=0.1,
    rel_l1_thresh=0.05,
)
""",
        given="""
from diffusers import FluxPipeline
pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-schnell")
transformer = pipe.transformer
""",
        then=f"""
from xfuser_fastcache import get_cache_statistics
result = pipe({CALL})
stats = get_cache_statistics(transformer)
assert stats["steps"] == 8
assert 0 < stats["spatial_approx_ratio"] < 1, stats
assert 0 <= stats["block_approx_ratio"] < 1, stats
""",
    ),
    "framework: basic usage": Block(
        """
from xfuser.model_executor.pipelines.fastcache_pipeline import xFuserFastCachePipelineWrapper
from diffusers import StableDiffusion3Pipeline

# Load your diffusion model
model = StableDiffusion3Pipeline.from_pretrained("stabilityai/stable-diffusion-3-medium-diffusers")

# Create FastCache wrapper with linear approximation
fastcache_wrapper = xFuserFastCachePipelineWrapper(model)

# Enable FastCache linear approximation
fastcache_wrapper.enable_fastcache(
    cache_ratio_threshold=0.05,     # Threshold for block-level linear approximation
    motion_threshold=0.1,           # Threshold for spatial linear approximation
    significance_level=0.05,        # Statistical confidence for linear approximation
)

# Run inference with linear approximation acceleration
result = fastcache_wrapper(
    prompt="a photo of an astronaut riding a horse on the moon",
    num_inference_steps=30,
)

# Analyze linear approximation statistics
stats = fastcache_wrapper.get_cache_statistics()
print(f"Spatial linear approximation ratio: {stats['spatial_approx_ratio']:.2%}")
print(f"Block linear approximation ratio: {stats['block_approx_ratio']:.2%}")
""",
        then=_COUNTED,
    ),
    "framework: advanced configuration": Block(
        """
# Fine-tune linear approximation parameters
fastcache_wrapper.enable_fastcache(
    cache_ratio_threshold=0.03,     # More aggressive block approximation
    motion_threshold=0.15,          # More conservative spatial approximation
    adaptive_beta=[0.1, 0.2, 0.05, 0.01],  # Custom adaptive threshold parameters
    enable_spatial_approx=True,     # Enable spatial linear approximation
    enable_block_approx=True,       # Enable block linear approximation
)
""",
        given=_WRAPPED,
        then=f"""
result = fastcache_wrapper({CALL})
stats = fastcache_wrapper.get_cache_statistics()
assert stats["steps"] == 8 and stats["spatial_approx_ratio"] > 0, stats
""",
    ),
    "framework: parallel inference": Block(
        """
# Combine linear approximation with parallel inference
fastcache_wrapper = xFuserFastCachePipelineWrapper(model)
fastcache_wrapper.enable_fastcache()

# Apply parallel inference with linear approximation benefits
paralleler = xDiTParallel(fastcache_wrapper, engine_config, input_config)
result = paralleler(...)  # Benefits from both linear approximation and parallelization
""",
        given="parallel",
        then="parallel",
    ),
}

BENCHMARKS = {
    "usage guide": r"""
python examples/fastcache_benchmark.py \
    --model_type flux \
    --model "black-forest-labs/FLUX.1-schnell" \
    --prompt "a beautiful landscape with mountains and a lake" \
    --num_inference_steps 30 \
    --cache_ratio_threshold 0.05 \
    --motion_threshold 0.1
""",
    "framework": r"""
# Compare linear approximation methods
python examples/fastcache_benchmark.py \
    --model_type flux \
    --model "black-forest-labs/FLUX.1-schnell" \
    --prompt "a beautiful landscape with mountains and a lake" \
    --num_inference_steps 30 \
    --cache_ratio_threshold 0.05 \
    --motion_threshold 0.1 \
    --analyze_approximation_quality
""",
}


def substituted(code: str) -> str:
    """A block with the three substitutions."""
    for name, toy in TOYS.items():
        code = code.replace(name, str(ROOT / "toys" / toy))
    return code.replace("examples/", "scripts/")


def script(names: list[str], flags: str = "") -> str:
    """Return a program that runs blocks one after another, each with names of its own."""
    given = f"""
import xfuser_fastcache
from xfuser import xDiTParallel, xFuserArgs
from xfuser.model_executor.pipelines.fastcache_pipeline import xFuserFastCachePipelineWrapper
{_LOADED}
engine_config, input_config = xFuserArgs(
    height=128, width=128, num_inference_steps=8, max_sequence_length=32, {flags}
).create_config()
engine_config.runtime_config.dtype = model.transformer.dtype
"""
    then = """
stats = fastcache_wrapper.get_cache_statistics()
assert stats["steps"] == 8 and stats["collectives_per_step"] == 1, stats
KEPT.append(paralleler)  # deleted, it would destroy the process groups
"""
    lines = [
        "import sys",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform, finish",
        "enable_cpu_platform()",  # the tests' machine has no GPU, xfuser needs one
        "KEPT = []",
    ]
    for name in names:
        block = BLOCKS[name]
        parts = ["import xfuser_fastcache", given if block.given == "parallel" else block.given]
        parts += [block.code.replace(OMITTED, CALL) if OMITTED in block.code else block.code]
        parts += [then if block.then == "parallel" else block.then]
        code = substituted("\n".join(parts))
        lines += [f"exec(compile({code!r}, {name!r}, 'exec'), {{'KEPT': KEPT}})"]
        lines += [f"print('TYPED', {name!r}, flush=True)"]
    return "\n".join([*lines, "finish()", ""])


def typed(output: str) -> list[str]:
    return [line.removeprefix("TYPED ") for line in output.splitlines() if "TYPED" in line]


@pytest.mark.gloo
def test_every_python_block_runs_as_it_stands(tmp_path: Path) -> None:
    program = tmp_path / "documents.py"
    program.write_text(script(list(BLOCKS)))
    assert typed(launch(program, 1)) == list(BLOCKS)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["ulysses_degree=2", "ring_degree=2", "pipefusion_parallel_degree=2"]
)
def test_the_parallel_blocks_run_on_two_ranks(tmp_path: Path, flags: str) -> None:
    names = [name for name in BLOCKS if "parallel" in name]
    program = tmp_path / "documents.py"
    mends = "from xfuser_fastcache.xdit.mends import mend_xfuser\nmend_xfuser()\nKEPT = []"
    program.write_text(script(names, flags).replace("KEPT = []", mends))
    assert sorted(typed(launch(program, 2))) == sorted(names * 2)


def arguments_of(name: str) -> list[str]:
    """The arguments of a benchmark command of the documents."""
    lines = BENCHMARKS[name].replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith("python")]
    program, script_path, *arguments = shlex.split(substituted(line))
    assert (program, script_path) == ("python", "scripts/fastcache_benchmark.py")
    return arguments


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_benchmark_takes_every_flag_of_the_command(name: str) -> None:
    from scripts.dev import fastcache_benchmark

    options = fastcache_benchmark.parse(arguments_of(name))
    assert options.model == str(ROOT / "toys" / "flux")
    assert (options.num_inference_steps, options.motion_threshold) == (30, 0.1)
    config = fastcache_benchmark.fast_config(options)
    assert config.resolved().token_plan[0]["name"] == "motion_static"
    assert config.cache_ratio_threshold == 0.05
    analyzed = "--analyze_approximation_quality" in BENCHMARKS[name]
    assert options.analyze_approximation_quality == analyzed


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_benchmark_command_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "scripts/fastcache_benchmark.py", *arguments_of(name),
            "--output_dir", str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for method in ("Baseline", "FastCache", "TeaCache", "First-Block-Cache"):
        assert method in done.stdout
    assert "could not run" not in done.stdout
    assert ("PSNR" in done.stdout) == ("--analyze_approximation_quality" in BENCHMARKS[name])
