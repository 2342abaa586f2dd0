"""How weights are held: in which format, and where until they are needed.

xDiT's own programs do this each for its model; here its flags act on every pipeline of xfuser.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from xfuser_fastcache.assembly import adapter_of, blocks_held

_OFFLOADS = (
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_group_cpu_offload",
)
# Flags of xDiT's that nothing reads here -> what to do instead.
_INERT = {
    "use_teacache": "give --use_cache Tea",
    "use_fbcache": "give --use_cache Fb",
    "use_ray": "start the ranks with torchrun",
    "use_fp8_t5_encoder": "leave it out; xDiT's runner (xdit-fastcache) quantises text encoders",
    "gemm_config": "leave it out; xDiT's runner (xdit-fastcache) reads it",
    "img_file_path": "leave it out; this draws from prompts alone",
    "vae_tile_size_height": "give --enable_tiling alone",
    "vae_tile_size_width": "give --enable_tiling alone",
    "vae_tile_overlap_height": "give --enable_tiling alone",
    "vae_tile_overlap_width": "give --enable_tiling alone",
}


def _torchao(kind: str) -> Callable[[torch.dtype], Any]:
    def made(dtype: torch.dtype) -> Any:
        from diffusers import TorchAoConfig
        from torchao import quantization

        return TorchAoConfig(getattr(quantization, kind)())

    return made


def _bitsandbytes(**options: Any) -> Callable[[torch.dtype], Any]:
    def made(dtype: torch.dtype) -> Any:
        from diffusers import BitsAndBytesConfig

        compute = {"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in options else {}
        return BitsAndBytesConfig(**options, **compute)

    return made


LAYERWISE = "layerwise_fp8"
# Name of --quantization -> the package that it needs, whether it needs a GPU, and what makes
# diffusers' configuration of it; None where none is needed.
QUANTIZATIONS: dict[str, tuple[str, bool, Callable[[torch.dtype], Any] | None]] = {
    LAYERWISE: ("diffusers", False, None),
    "torchao_int8": ("torchao", False, _torchao("Int8WeightOnlyConfig")),
    "torchao_fp8": ("torchao", True, _torchao("Float8WeightOnlyConfig")),
    "bitsandbytes_8bit": ("bitsandbytes", True, _bitsandbytes(load_in_8bit=True)),
    "bitsandbytes_4bit": (
        "bitsandbytes",
        True,
        _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    ),
}


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of formats that xDiT has none for."""
    ours = flags.add_argument_group("Weights")
    ours.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="format of the transformer, by diffusers"
    )
    ours.add_argument("--gguf", metavar="FILE", help="GGUF file of the transformer")


def check(options: argparse.Namespace, arguments: Any, on_gpu: bool) -> None:
    """Refuse flags that would do nothing here, or that contradict each other.

    Args:
        options: flags of `xdit_parser`.
        arguments: xDiT's `xFuserArgs` of the same flags.
        on_gpu: whether there is a GPU.

    Raises:
        ValueError: such a flag; the message says what to do instead.
    """
    for name, mend in _INERT.items():
        if getattr(options, name, None):
            raise ValueError(f"--{name} does nothing in this command; {mend}")
    together = [f"--{name}" for name in _OFFLOADS if getattr(options, name, False)]
    if len(together) > 1:
        raise ValueError(f"{' and '.join(together)} offload the same weights; give one of them")
    gemms = str(arguments.gemm_quantization)
    if gemms not in ("none", "int8", "fp8"):
        raise ValueError(
            f"--gemm_quantization {gemms} is not for this command; give int8 or fp8, or run xDiT's "
            "runner (xdit-fastcache)"
        )
    formats = {
        "gemm_quantization": None if gemms == "none" else gemms,
        "quantization": options.quantization,
        "gguf": options.gguf,
    }
    given = [f"--{name} {value}" for name, value in formats.items() if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both say how weights are held; give one of them")
    needs = {"gemm_quantization": ("torchao", gemms == "fp8"), "gguf": ("gguf", False)}
    if options.quantization:
        needs["quantization"] = QUANTIZATIONS[options.quantization][:2]
    for name, value in formats.items():
        if value:
            package, needs_gpu = needs[name]
            _require(f"--{name} {value}", package, needs_gpu and not on_gpu)


def _require(flag: str, package: str, lacks_gpu: bool) -> None:
    if find_spec(package) is None:
        raise ValueError(f"{flag} needs {package}, which is not installed: pip install {package}")
    if lacks_gpu:
        raise ValueError(f"{flag} needs a GPU; without one, give --quantization torchao_int8")


def loading(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained` has to be given beside the model and its dtype."""
    given: dict[str, Any] = {}
    if options.download_dir:
        given["cache_dir"] = options.download_dir
    if options.trust_remote_code:
        given["trust_remote_code"] = True
    make = QUANTIZATIONS[options.quantization][2] if options.quantization else None
    if make is not None:
        from diffusers.quantizers import PipelineQuantizationConfig

        given["quantization_config"] = PipelineQuantizationConfig(
            quant_mapping={"transformer": make(dtype)}
        )
    if options.gguf:
        given["transformer"] = _from_gguf(options, dtype)
    return given


def _from_gguf(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    import diffusers

    _, name = diffusers.DiffusionPipeline.load_config(options.model)["transformer"]
    return getattr(diffusers, name).from_single_file(
        options.gguf,
        config=options.model,
        subfolder="transformer",
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
    )


def quantise(
    pipeline: Any, options: argparse.Namespace, arguments: Any, device: torch.device
) -> None:
    """Change the format of a loaded transformer, before xfuser wraps it.

    Args:
        pipeline: diffusers'.
        options, arguments: as of `check`.
        device: that computes.
    """
    transformer = pipeline.transformer
    if options.quantization == LAYERWISE:
        transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.dtype
        )
    if arguments.use_int8_gemms or arguments.use_fp8_gemms:
        from xfuser.core.utils import runner_utils

        how = "int8" if arguments.use_int8_gemms else "fp8"
        convert = getattr(runner_utils, f"quantize_linear_layers_to_{how}")
        # The blocks alone, as in xDiT's runner.
        for blocks in blocks_held(transformer, adapter_of(transformer)).values():
            convert(list(blocks), device=device)


def place(pipe: Any, options: argparse.Namespace, device: torch.device) -> None:
    """Put a wrapped pipeline where it computes, or let its weights come when they are needed.

    Args:
        pipe: xfuser's.
        options: as of `check`.
        device: that computes; also the host, where offloading only rehearses.
    """
    if options.enable_tiling:
        pipe.vae.enable_tiling()
    if options.enable_slicing:
        pipe.vae.enable_slicing()
    on_gpu = device.type != "cpu"
    if options.enable_model_cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
    elif options.enable_sequential_cpu_offload and on_gpu:
        pipe.enable_sequential_cpu_offload(device=device)
    elif options.enable_sequential_cpu_offload:
        # By itself: diffusers calls the host "cpu:0", a name by which accelerate loses parameters.
        from accelerate import cpu_offload

        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                cpu_offload(part, device)
    elif options.enable_group_cpu_offload:
        # Streams overlap what only a device has: transfers and computing.
        streams = {"use_stream": True, "record_stream": True, "non_blocking": True}
        pipe.enable_group_offload(
            onload_device=device,
            offload_type="leaf_level",
            **(streams if on_gpu else {}),
        )
    elif on_gpu:
        pipe.to(device)
