#!/usr/bin/env bash
# Start a script with DeepSpeed's launcher.
#
#   launch/deepspeed.sh SCRIPT ARGUMENTS...                                   one node, every GPU
#   HOSTFILE=hostfile launch/deepspeed.sh SCRIPT ARGUMENTS...                 on the first node, which reaches the
#                                                                             others by ssh without a password
#   HOSTFILE=hostfile NODE_RANK=0 launch/deepspeed.sh SCRIPT ARGUMENTS...     on each node with its place in the
#                                                                             hostfile, where there is no ssh
#
# GPUS         ranks, on one node (default: every GPU; on several nodes the hostfile says)
# MASTER_ADDR  where the ranks meet (default: the first host of the hostfile)
set -euo pipefail
: "${1:?give the script to start: launch/deepspeed.sh SCRIPT ARGUMENTS...}"
options=(--master_port "${MASTER_PORT:-29500}")
if [ -z "${HOSTFILE:-}" ]; then
    [ -z "${GPUS:-}" ] || options+=(--num_gpus "$GPUS")
else
    first=$(grep -v '^[[:space:]]*\(#\|$\)' "$HOSTFILE" | head -n 1 | cut -d ' ' -f 1)
    options+=(--hostfile "$HOSTFILE" --master_addr "${MASTER_ADDR:-$first}")
    [ -z "${NODE_RANK:-}" ] || options+=(--no_ssh --node_rank "$NODE_RANK")
fi
exec deepspeed "${options[@]}" --no_local_rank "$@"
