#!/usr/bin/env bash
# Installs a wheel in an empty environment and draws a picture with it, from an empty folder.
#
#   bash scripts/dev/try_wheel.sh dist/xfuser_fastcache-*.whl dist/xfuser_fastcache-*.tar.gz
#
#   PYTHON  interpreter to make the environment with; default python3
#
# The second file, the sdist, brings the toys.
set -euo pipefail

wheel="$(realpath "$1")"
sdist="$(realpath "$2")"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

"${PYTHON:-python3}" -m venv venv
python="$folder/venv/bin/python"
# The CPU's build, where there is no GPU to need the several GB of CUDA's.
"$python" -m pip install -q --disable-pip-version-check --extra-index-url \
    https://download.pytorch.org/whl/cpu "torch==2.13.0"
"$python" -m pip install -q --disable-pip-version-check "$wheel"

mkdir empty
cd empty
export PATH="$folder/venv/bin:$PATH" XFUSER_FASTCACHE_CPU=1 HF_HUB_OFFLINE=1
fastcache doctor
fastcache toys toys --source "$sdist"
fastcache generate --model toys/flux --prompt "a large red ring, top left, on dark blue" \
    --use_cache Fast --cache_config '{"computed_steps": 10}' --baseline --output_dir drawn
test -s drawn/comparison.png
