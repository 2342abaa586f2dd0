"""Package metadata; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
(VERSION,) = re.findall(
    r'^__version__ = "(.+)"$',
    (ROOT / "xfuser_fastcache" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
)
# The ends of these ranges are tested: connections build on a class of uvicorn, heads on ASGI alone.
SERVE = ["fastapi>=0.115,<0.166", "uvicorn>=0.30,<0.55", "prometheus-client"]

setup(
    name="xfuser-fastcache",
    version=VERSION,
    description="A step cache for xDiT (xfuser) that takes the same branch on every rank",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    keywords=["diffusion", "transformers", "cache", "xDiT", "diffusers", "distributed"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={
        "xDiT": "https://github.com/xdit-project/xDiT",
        "FastCache": "https://arxiv.org/abs/2505.20353",
    },
    packages=find_packages(
        include=[
            "xfuser_fastcache",
            "xfuser_fastcache.*",
            "diffusers_adapters",
            "diffusers_adapters.*",
        ],
    ),
    package_data={
        "xfuser_fastcache": ["py.typed"],
        "diffusers_adapters": ["py.typed"],
        "xfuser_fastcache.calibration.prompts": ["*.txt"],
        "xfuser_fastcache.serving.page": ["*.html", "*.css", "*.js"],
    },
    install_requires=[
        "torch>=2.6",
        # xfuser imports triton even where there is no GPU, and does not ask for it.
        'triton; platform_system=="Linux"',
        # Older ones do not import beside transformers 5.
        "diffusers>=0.37",
        # Tested with 0.7.0; what another release lacks is probed, and left alone with a warning.
        "xfuser>=0.7,<0.9",
        "yunchang",
        "transformers",
        "tokenizers",
        # transformers reads checkpoints whose tokenizer is a bare spiece.model (PixArt) with it;
        # sentencepiece itself comes with xfuser.
        "protobuf",
        "safetensors",
        "numpy",
        "scipy",
        "pyyaml",
        "tqdm",
        "rich",
        "matplotlib",
        "scikit-image",
    ],
    extras_require={
        "flash-attn": ["flash-attn"],
        "serve": SERVE,
        "ray": ["ray"],
        # mp4; xfuser 0.7 asks for it as well. ftfy mends characters in prompts of Wan's pipelines.
        "video": ["av>=12", "ftfy"],
        "bench": ["cache-dit>=1.5,<1.6"],
        # Formats of weights; each by itself will do.
        "quantization": ["torchao", "bitsandbytes", "gguf"],
        # Linter, formatter and type checker change their minds between minor versions.
        "test": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist>=3",
            "ruff==0.17.*",
            "mypy==2.4.*",
            "httpx",
            *SERVE,
        ],
    },
    entry_points={
        "console_scripts": [
            "fastcache = xfuser_fastcache.cli:main",
            "xdit-fastcache = xfuser_fastcache.xdit.runner:launch",
        ],
        "xfuser_fastcache.adapters": [
            "flux = diffusers_adapters.flux:FluxAdapter",
            "flux2 = diffusers_adapters.flux2:Flux2Adapter",
            "sd3 = diffusers_adapters.sd3:SD3Adapter",
            "pixart = diffusers_adapters.pixart:PixArtAdapter",
            "wan = diffusers_adapters.wan:WanAdapter",
            "wan_vace = diffusers_adapters.wan:WanVACEAdapter",
            "qwen_image = diffusers_adapters.qwen_image:QwenImageAdapter",
            "z_image = diffusers_adapters.z_image:ZImageAdapter",
            "krea2 = diffusers_adapters.krea2:Krea2Adapter",
            "hunyuan_video = diffusers_adapters.hunyuan_video:HunyuanVideoAdapter",
            "hunyuan_video15 = diffusers_adapters.hunyuan_video15:HunyuanVideo15Adapter",
            "cogvideox = diffusers_adapters.cogvideox:CogVideoXAdapter",
            "consisid = diffusers_adapters.consisid:ConsisIDAdapter",
            "sana = diffusers_adapters.sana:SanaAdapter",
            "lumina2 = diffusers_adapters.lumina2:Lumina2Adapter",
            "hunyuan_dit = diffusers_adapters.hunyuan_dit:HunyuanDiTAdapter",
            "ltx2 = diffusers_adapters.ltx2:LTX2Adapter",
            "latte = diffusers_adapters.latte:LatteAdapter",
            "ideogram4 = diffusers_adapters.ideogram4:Ideogram4Adapter",
        ],
        "xfuser_fastcache.layouts": ["xdit = xfuser_fastcache.xdit.groups:XDiTLayout"],
    },
)
