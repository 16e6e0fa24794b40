#!/usr/bin/env bash
# Ranks started by MPI, any strategy (default: FSDP2). Needs mpi4py (pip install 'loqt-scale[mpi]') and an MPI; the
# ranks find one another through it and then talk over NCCL, or gloo on the CPU.
#
#   RANKS=2 launch/mpirun.sh --config configs/quickstart.yaml --parallel.strategy zero
#
# Two nodes with 8 GPUs each (Open MPI; the host file has lines such as `10.0.0.1 slots=8`):
#
#   RANKS=16 HOSTFILE=hosts launch/mpirun.sh --config configs/llama_1b.yaml
#
# MASTER_ADDR, if set, is the address of rank 0 that the others should use (where a node has several networks).
set -euo pipefail
cd "$(dirname "$0")/.."

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}

python=python
[[ -x .venv/bin/python ]] && python=.venv/bin/python
mpirun=mpirun
[[ -x .venv/bin/mpirun ]] && mpirun=.venv/bin/mpirun

options=(-np "$ranks" --bind-to none) # a rank has threads: do not tie it to one core
[[ -n ${HOSTFILE:-} ]] && options+=(--hostfile "$HOSTFILE" -x LOQT_SCALE_NOTICE_SECONDS)
[[ -n ${MASTER_ADDR:-} ]] && options+=(-x MASTER_ADDR)
[[ $(id -u) -eq 0 ]] && options+=(--allow-run-as-root) # containers

# mpirun kills the ranks a second after a SIGTERM or Ctrl-C, and passes SIGUSR1 on: told to stop, they may take their
# time to save. A process group of its own (-m), since a terminal's Ctrl-C would reach mpirun too.
export LOQT_SCALE_NOTICE_SECONDS=${LOQT_SCALE_NOTICE_SECONDS:-inf}
set -m
"$mpirun" "${options[@]}" "$python" launch/train.py "$@" </dev/null &
job=$!
set +m
trap 'kill -USR1 $job 2>/dev/null || true' TERM INT HUP USR1
while kill -0 $job 2>/dev/null; do
    wait $job || true # a signal ends the waiting as well
done
wait $job # is over: its status is ours
