#!/usr/bin/env bash
# Runs scripts/generate.py or scripts/serve.py on several machines; start it once on each.
#
#   launch_multi_node.sh generate|serve --nnodes N --node_rank R --master_addr HOST \
#       [--master_port PORT] [--nproc_per_node M] [--interface NAME] [--join_timeout_s S] FLAGS...
#
#   --nnodes N           machines
#   --node_rank R        this one, from 0. Number 0 holds rank 0: it writes, or answers HTTP.
#   --master_addr HOST   name or IPv4 address of number 0, as the others reach it
#   --master_port PORT   of number 0; default 29500, the same on all
#   --nproc_per_node M   ranks on this machine; default one a GPU. Without a GPU it is needed.
#   --interface NAME     network interface between the machines; default the one that has or leads
#                        to HOST. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are set to it, unless
#                        they are set already.
#   --join_timeout_s S   longest wait for the other machines; default 300
#   FLAGS                go to the script; the same on all machines
#
#   FASTCACHE_VENV, OMP_NUM_THREADS   as in launch_single_node.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

script="$(script_of "${1:-}")"
shift
nnodes="" node_rank="" master_addr="" master_port=29500 ranks="" interface="" join_timeout_s=300
flags=()
while (($#)); do
    name="${1%%=*}"
    case "$name" in
        --nnodes | --node_rank | --master_addr | --master_port | --nproc_per_node | --interface | \
            --join_timeout_s)
            if [[ "$1" == *=* ]]; then
                value="${1#*=}"
            else
                value="${2:-}"
                shift $(($# > 1 ? 1 : 0))
            fi
            [[ -n "$value" ]] || die "$name needs a value"
            [[ "$name" != --nproc_per_node ]] || name=--ranks
            printf -v "${name#--}" %s "$value"
            ;;
        *) flags+=("$1") ;;
    esac
    shift
done
need_number --nnodes "$nnodes" 2
need_number --node_rank "$node_rank" 0
((node_rank < nnodes)) || die "--node_rank $node_rank: with --nnodes $nnodes give 0 to $((nnodes - 1))"
[[ -n "$master_addr" ]] ||
    die "--master_addr is needed: name or address of machine 0, as the others reach it"
need_number --master_port "$master_port" 1
need_number --join_timeout_s "$join_timeout_s" 1
[[ -n "$ranks" ]] || ranks="$(count_gpus)"
need_number --nproc_per_node "$ranks" 1

address="$(getent ahostsv4 "$master_addr" | awk 'NR == 1 { print $1 }' || true)"
[[ -n "$address" ]] || die "--master_addr $master_addr: no such host"
command -v ip >/dev/null || die "the command ip is missing (package iproute2)"
# Empty where the address belongs to another machine.
holder="$(ip -o -4 addr show | awk -v address="$address/" 'index($4, address) == 1 { print $2 }' | head -n 1)"
if [[ "$node_rank" == 0 && -z "$holder" ]]; then
    die "--master_addr $master_addr ($address) is no address of this machine, but --node_rank is 0." \
        "Start number 0 there, or give an address of this one: $(hostname -I)"
fi
if [[ -z "$interface" ]]; then
    interface="${holder:-$(ip -o route get "$address" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p')}"
    [[ -n "$interface" ]] || die "no route to $address: give --interface, or mend the network"
fi
ip link show dev "$interface" >/dev/null 2>&1 ||
    die "--interface $interface: no such interface; there are" \
        "$(ip -o link show | sed 's/^[0-9]*: \([^:@]*\).*/\1/' | tr '\n' ' ')"
# Left alone, gloo takes the address that this host's own name has, often a loopback one.
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"

if ((node_rank > 0)); then
    until (exec 3<>"/dev/tcp/$address/$master_port") 2>/dev/null; do
        ((SECONDS < join_timeout_s)) ||
            die "machine 0 does not answer at $address:$master_port after $join_timeout_s s:" \
                "is it started, and does its firewall let this port through?"
        sleep 0.5
    done
fi
cores="$(nproc)"
echo "$launcher: machine $node_rank of $nnodes, $ranks rank(s), meeting at" \
    "$address:$master_port over $GLOO_SOCKET_IFNAME"
run_torchrun --nnodes "$nnodes" --node_rank "$node_rank" --nproc_per_node "$ranks" \
    --master_addr "$address" --master_port "$master_port" \
    --rdzv_conf "timeout=$join_timeout_s" "$script" ${flags[@]+"${flags[@]}"}
