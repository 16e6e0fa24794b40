#!/usr/bin/env bash
# SLURM: one torchrun a node, which starts one rank a GPU. Submit from the checkout, a shared folder; what follows the
# script goes to train.py:
#
#   sbatch --nodes 2 launch/slurm.sh --config configs/llama_1b.yaml
#   sbatch --nodes 2 launch/slurm.sh --config configs/llama_1b.yaml --parallel.strategy zero --parallel.zero_stage 2
#
#SBATCH --job-name=loqt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=runs/slurm-%j.log
#SBATCH --signal=TERM@120
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

torchrun=torchrun
[[ -x .venv/bin/torchrun ]] && torchrun=$PWD/.venv/bin/torchrun

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node

exec srun "$torchrun" \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head_node:$port" \
    launch/train.py "$@"
