#!/usr/bin/env bash
# Start a script with torchrun: FSDP, DDP, or DeepSpeed through HF Trainer and Accelerate.
#
#   launch/torchrun.sh SCRIPT ARGUMENTS...                                    one node, every GPU
#   NNODES=2 MASTER_ADDR=node1 launch/torchrun.sh SCRIPT ARGUMENTS...         the same line on each node
#
# GPUS      ranks a node (default: every GPU)
# JOB       tells apart jobs that meet on one node (default: alphaadam)
set -euo pipefail
: "${1:?give the script to start: launch/torchrun.sh SCRIPT ARGUMENTS...}"
NNODES=${NNODES:-1}
if [ "$NNODES" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
    echo "NNODES=$NNODES without MASTER_ADDR: set MASTER_ADDR to the name of one node, the same on all" >&2
    exit 2
fi
endpoint=${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}
unset MASTER_ADDR MASTER_PORT # the agents agree on their own; the ranks get theirs from them
exec torchrun --nnodes "$NNODES" --nproc-per-node "${GPUS:-auto}" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "${JOB:-alphaadam}" "$@"
