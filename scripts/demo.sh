#!/usr/bin/env bash
# Runs the main job on the embedded toy: 2 ranks (Ulysses 2), uncached and with the Fast cache.
# Writes runs/demo/{baseline,cached,comparison}.png and runs/demo/report.json.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
venv="${FASTCACHE_VENV:-.venv}"
[[ "$venv" == /* ]] || venv="$root/$venv"

cd "$root"
# Two ranks share the machine: one thread each. The toy needs no network.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# The libraries' chatter would hide the progress bars.
export LOG_LEVEL=warning TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
exec "$venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 \
    scripts/generate.py --config configs/toy_flux_fast.yaml --ulysses_degree 2 \
    --baseline --repeat 3 --output_dir runs/demo "$@"
