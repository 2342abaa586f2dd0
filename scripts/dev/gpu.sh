#!/usr/bin/env bash
# Measures on a GPU machine that has torch but no network.
#
#   gpu.sh wheels       where there is a network: download what such a machine lacks into .whl
#   gpu.sh run [ARGS]   there: install it and this package aside, then `fastcache bench-gpu ARGS`
#
#   GPU_PYTHON    version of Python there, for `wheels`; default 3.12
#   GPU_SITE      folder that `run` installs into; default a new one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# torch, transformers and what these bring are there already, scipy and rich not; an older
# importlib_metadata, since the newest one wants a package more.
wheels=(diffusers==0.42.1 "cache-dit>=1.5,<1.6" importlib_metadata==8.7.0 scipy)

case "${1:-}" in
wheels)
    rm -rf .whl
    platforms=()
    for glibc in 2_28 2_27 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
    python3 -m pip download -q --no-deps --only-binary=:all: --implementation cp \
        --python-version "${GPU_PYTHON:-3.12}" "${platforms[@]}" --platform manylinux2014_x86_64 \
        -d .whl "${wheels[@]}"
    du -sh .whl
    ;;
run)
    shift
    site="${GPU_SITE:-$(mktemp -d)}"
    # Installed, and not only on the path: adapters are found by their entry points.
    python3 -m pip install -q --no-index --no-deps --no-build-isolation --no-compile \
        --no-cache-dir --upgrade --target "$site" .whl/*.whl .
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
    exec python3 -m xfuser_fastcache.cli bench-gpu "$@"
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
