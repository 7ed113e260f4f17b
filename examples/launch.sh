#!/usr/bin/env bash
# On every machine of a job: writes this machine's accelerate config, then leads the run (machine 0) or joins it.
#
#   launch.sh RECIPE RUN [KEY=VALUE ...]     RUN: the run's folder, on a disk that all machines share
#
# The scheduler's own variables say where, under these names:
#   MACHINES   how many                      MACHINE   which of them this is, from 0
#   ADDRESS    where machine 0 is reached    PORT      one that is free there (29500)
#   GPUS       on each machine               ENGINE    fsdp2 (the frozen base divided) or ddp (a whole base each)
set -euo pipefail

recipe="$1" run="$2"
shift 2
machines="${MACHINES:?how many}" machine="${MACHINE:?which, from 0}" address="${ADDRESS:?of machine 0}"
gpus="${GPUS:?on each machine}"
case "${ENGINE:-fsdp2}" in
fsdp2) engine=$'distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}' ;;
ddp) engine='distributed_type: MULTI_GPU' ;;
*)
  echo "ENGINE: ${ENGINE}, expected fsdp2 or ddp" >&2
  exit 2
  ;;
esac

config="$(mktemp -d)/machine.yaml"
cat >"$config" <<CONFIG
$engine
num_machines: $machines
machine_rank: $machine
num_processes: $((machines * gpus))
main_process_ip: $address
main_process_port: ${PORT:-29500}
use_cpu: false
CONFIG

# what a scheduler sets for torchrun would speak to the one within preftune, too
unset PET_NNODES PET_NPROC_PER_NODE PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT
# `exec`: the scheduler's signals reach preftune, which writes a checkpoint and ends
if [ "$machine" -eq 0 ]; then
  exec preftune run "$recipe" "$@" --output-dir "$run" --launch "$config"
fi
exec preftune join "$run" --launch "$config"
