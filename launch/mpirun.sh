#!/usr/bin/env bash
# Start a Python script with Open MPI's mpirun.
#
#   RANKS=8 launch/mpirun.sh SCRIPT ARGUMENTS...                              one node
#   RANKS=16 HOSTS=node1:8,node2:8 launch/mpirun.sh SCRIPT ARGUMENTS...       several, on node1
#
# MPI starts the processes and carries nothing between them: the ranks meet as under torchrun.
set -euo pipefail
: "${1:?give the script to start: launch/mpirun.sh SCRIPT ARGUMENTS...}"
: "${RANKS:?set RANKS to the number of processes on all nodes, one a GPU}"
where=()
[ -z "${HOSTS:-}" ] || where=(--host "$HOSTS")
first=${HOSTS:-127.0.0.1}
export MASTER_ADDR=${MASTER_ADDR:-${first%%[:,]*}} MASTER_PORT=${MASTER_PORT:-29500}
# shellcheck disable=SC2016  # the ranks expand it
exec mpirun -np "$RANKS" "${where[@]}" --bind-to none -x MASTER_ADDR -x MASTER_PORT ${MPI_ARGS:-} bash -c '
    export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK
    exec python "$@"' rank "$@"
