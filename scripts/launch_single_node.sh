#!/usr/bin/env bash
# Runs scripts/generate.py or scripts/serve.py on several ranks of this machine.
#
#   launch_single_node.sh generate|serve [--nproc_per_node N] FLAGS...
#
#   --nproc_per_node N   ranks; default one a GPU. Without a GPU it is needed.
#   FLAGS                go to the script: --config, --ulysses_degree, ...
#
#   FASTCACHE_VENV       as in setup.sh; without such an environment, python3 on PATH
#   OMP_NUM_THREADS      threads a rank; default the cores divided by the ranks
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

script="$(script_of "${1:-}")"
shift
ranks="" flags=()
while (($#)); do
    case "$1" in
        --nproc_per_node)
            [[ -n "${2:-}" ]] || die "$1 needs a value"
            ranks="$2"
            shift
            ;;
        --nproc_per_node=*) ranks="${1#*=}" ;;
        --nnodes* | --node_rank* | --master_*) die "${1%%=*} is for launch_multi_node.sh" ;;
        *) flags+=("$1") ;;
    esac
    shift
done
[[ -n "$ranks" ]] || ranks="$(count_gpus)"
need_number --nproc_per_node "$ranks" 1
cores="$(nproc)"
run_torchrun --standalone --nproc_per_node "$ranks" "$script" ${flags[@]+"${flags[@]}"}
