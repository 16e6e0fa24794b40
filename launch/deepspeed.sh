#!/usr/bin/env bash
# One node, one rank a GPU (or RANKS of them, on the CPU if there is no GPU), ZeRO:
#
#   launch/deepspeed.sh --config configs/llama_1b.yaml --parallel.zero_stage 2
#   RANKS=2 launch/deepspeed.sh --config configs/quickstart.yaml --parallel.zero_config configs/zero_3.json
#
# Two nodes and more: a host file, one line a node (`10.0.0.1 slots=8`). With password-less ssh between the nodes (and
# pdsh installed) once, on the first node; LAUNCHER=openmpi, mpich, impi or slurm starts the ranks another way:
#
#   HOSTFILE=hosts launch/deepspeed.sh --config configs/llama_1b.yaml
#
# Without ssh the same command on each node, numbered in the order of the host file:
#
#   HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/deepspeed.sh --config configs/llama_1b.yaml
#   HOSTFILE=hosts NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/deepspeed.sh --config configs/llama_1b.yaml
set -euo pipefail
cd "$(dirname "$0")/.."

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}

deepspeed=deepspeed
[[ -x .venv/bin/deepspeed ]] && deepspeed=.venv/bin/deepspeed

if [[ -z ${HOSTFILE:-} ]]; then
    where=(--num_gpus "$ranks") # ranks, also on the CPU
elif [[ -n ${NODE_RANK:-} ]]; then
    where=(--hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
else
    where=(--hostfile "$HOSTFILE" --launcher "${LAUNCHER:-pdsh}")
fi
exec "$deepspeed" --master_port "${MASTER_PORT:-29500}" "${where[@]}" launch/train.py --parallel.strategy zero "$@"
