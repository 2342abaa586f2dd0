"""Weights in other formats, and elsewhere until they are needed: the cache works as ever.

One world of ranks a layout runs all ways; on a CPU, offloading moves weights from host to host.
Formats of packages that are not installed are left out.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.worlds import ROOT, run_world

INT8 = ["--quantization", "torchao_int8"]
GEMMS = ["--gemm_quantization", "int8"]
LAYERWISE = ["--quantization", "layerwise_fp8"]
MODEL, GROUPS = ["--enable_model_cpu_offload"], ["--enable_group_cpu_offload"]
SEQUENTIAL = ["--enable_sequential_cpu_offload", "--enable_tiling", "--enable_slicing"]
# What a parameter of the blocks has to be for the way to be in effect.
FORMATS = {" ".join(INT8): "Int8Tensor", " ".join(GEMMS): "Int8Tensor"}
FORMATS[" ".join(LAYERWISE)] = "float8_e4m3fn"
TORCHAO = [INT8, GEMMS, [*INT8, *GROUPS]] if find_spec("torchao") else []
CASES = [
    pytest.param("flux", [], [LAYERWISE, MODEL, SEQUENTIAL, GROUPS, *TORCHAO], id="flux"),
    pytest.param("flux", ["--ulysses_degree", "2"], [LAYERWISE, GROUPS, *TORCHAO], id="ulysses"),
    pytest.param(
        "sd3", ["--pipefusion_parallel_degree", "2"], [LAYERWISE, MODEL, *TORCHAO],
        id="pipefusion", marks=pytest.mark.slow,
    ),
    pytest.param(
        "pixart", ["--use_cfg_parallel"], [LAYERWISE, SEQUENTIAL, *TORCHAO],
        id="cfg", marks=pytest.mark.slow,
    ),
]  # fmt: skip


def check(found: dict[int, dict[str, Any]], ways: list[list[str]]) -> None:
    """Check every way on every rank."""
    for way in map(" ".join, ways):
        ranks = [each["found"][way] for each in found.values()]
        assert any(rank["identical"] for rank in ranks), way  # somebody has a picture
        for rank in ranks:
            assert all(rank["identical"]) and rank["restored"], way
            assert rank["differs"] and rank["finite"], way
            assert rank["skipped"] == pytest.approx(2 / 6), way
        assert len({rank["digest"] for rank in ranks}) == 1, way
        wanted = FORMATS.get(way)
        assert wanted is None or all(rank["formats"].get(wanted) for rank in ranks), way


@pytest.mark.gloo
@pytest.mark.parametrize(("toy", "layout", "ways"), CASES)
def test_the_cache_works_on_weights_held_otherwise(
    toy: str, layout: list[str], ways: list[list[str]]
) -> None:
    ranks = 2 if layout else 1
    found = run_world("weights_worker.py", ranks, toy, json.dumps(layout), json.dumps(ways))
    check(found, ways)


@pytest.mark.gloo
@pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")
def test_the_cache_works_on_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "flux.gguf"
    write_gguf(path)
    way = ["--gguf", str(path)]
    found = run_world(
        "weights_worker.py", 2, "flux", json.dumps(["--ulysses_degree", "2"]), json.dumps([way])
    )
    check(found, [way])
    assert found[0]["found"][" ".join(way)]["formats"]["GGUFParameter"] > 0


def write_gguf(path: Path) -> None:
    """Write the toy FLUX's transformer with the weights of its blocks in Q8_0."""
    import gguf
    from safetensors.numpy import load_file

    writer = gguf.GGUFWriter(path, "flux")
    kind = gguf.GGMLQuantizationType.Q8_0
    (source,) = (ROOT / "toys" / "flux" / "transformer").glob("*.safetensors")
    for name, tensor in load_file(source).items():
        if "transformer_blocks" in name and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def refusal() -> Any:
    """Return what `weights.check` says to flags."""
    from xfuser_fastcache.xdit.cpu_platform import enable_cpu_platform

    enable_cpu_platform()
    from xfuser import xFuserArgs

    from xfuser_fastcache.xdit import weights
    from xfuser_fastcache.xdit.loaded import xdit_parser

    def said(*flags: str, on_gpu: bool = False) -> str:
        options = xdit_parser().parse_args(["--model", "m", *flags])
        with pytest.raises(ValueError) as raised:
            weights.check(options, xFuserArgs.from_cli_args(options), on_gpu)
        return str(raised.value)

    return said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--use_teacache"], "--use_teacache does nothing in this command; give --use_cache Tea"),
        (["--use_fp8_t5_encoder"], "leave it out"),
        (["--img_file_path", "x.png"], "draws from prompts alone"),
        (["--vae_tile_size_height", "64"], "give --enable_tiling alone"),
        ([*MODEL, *GROUPS], "--enable_model_cpu_offload and --enable_group_cpu_offload offload"),
        ([*LAYERWISE, "--gguf", "x.gguf"], "both say how weights are held; give one of them"),
        ([*LAYERWISE, *GEMMS], "both say how weights are held"),
        (["--gemm_quantization", "fp4"], "give int8 or fp8, or run xDiT's runner"),
        (["--gemm_quantization", "low=fp4,high=fp8"], "give int8 or fp8"),
    ],
)
def test_flags_that_do_nothing_here_are_refused(refusal: Any, flags: list[str], words: str) -> None:
    assert words in refusal(*flags)


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        (["--quantization", "bitsandbytes_4bit"], "bitsandbytes"),
        (["--quantization", "torchao_fp8"], "torchao"),
        (["--gemm_quantization", "fp8"], "torchao"),
        (["--gguf", "x.gguf"], "gguf"),
    ],
)
def test_a_format_names_the_package_and_the_device_that_it_lacks(
    refusal: Any, monkeypatch: pytest.MonkeyPatch, flags: list[str], package: str
) -> None:
    from xfuser_fastcache.xdit import weights

    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    assert f"pip install {package}" in refusal(*flags, on_gpu=True)
    monkeypatch.setattr(weights, "find_spec", lambda name: name)
    if package != "gguf":
        assert "needs a GPU; without one, give --quantization torchao_int8" in refusal(*flags)
