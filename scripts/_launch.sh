# Shared by launch_single_node.sh and launch_multi_node.sh, which source it.

launcher="$(basename "${BASH_SOURCE[1]}")"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

die() {
    echo "$launcher: $*" >&2
    exit 2
}

# Checks that option $1 has the value $2, a whole number of at least $3.
need_number() {
    [[ -n "$2" ]] || die "$1 is needed; give a whole number of at least $3"
    [[ "$2" =~ ^[0-9]+$ && "$2" -ge "$3" ]] ||
        die "$1 $2: give a whole number of at least $3"
}

# Prints the number of GPUs; nothing where there are none.
count_gpus() {
    local found
    found="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)"
    [[ "$found" == 0 ]] || echo "$found"
}

# Prints the path of the script that $1 names.
script_of() {
    case "$1" in
        generate | serve) echo "$root/scripts/$1.py" ;;
        "") die "say what to run first: generate or serve" ;;
        *) die "'$1' is nothing to run; the first argument is generate or serve" ;;
    esac
}

# Runs torchrun with the given arguments in place of this shell, so that signals reach it.
# Python is that of setup.sh, or the one on PATH.
run_torchrun() {
    local venv="${FASTCACHE_VENV:-.venv}" python
    [[ "$venv" == /* ]] || venv="$root/$venv"
    python="$venv/bin/python"
    [[ -x "$python" ]] || python="$(command -v python3 || true)"
    [[ -n "$python" ]] || die "no Python: run scripts/setup.sh, or put python3 on PATH"
    "$python" -c 'import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in ("torch", "xfuser")))' ||
        die "$python lacks torch or xfuser: run scripts/setup.sh, or activate your environment"
    # Ranks share the cores.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / ranks > 1 ? cores / ranks : 1))}"
    exec "$python" -m torch.distributed.run "$@"
}
