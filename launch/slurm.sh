#!/usr/bin/env bash
# SLURM: one torchrun a node, which starts one rank a GPU (RANKS of them, if that is set; one a core where there is no
# GPU). Submit from the checkout, a shared folder; what follows the script goes to train.py:
#
#   sbatch --nodes 2 launch/slurm.sh --config configs/llama_1b.yaml
#   sbatch --nodes 2 launch/slurm.sh --config configs/llama_1b.yaml --parallel.strategy zero --parallel.zero_stage 2
#
# Two minutes before its time is up the job saves and ends; submitted again, it goes on. A chain of three, one after
# another (a job that finds the run finished ends at once):
#
#   for i in 1 2 3; do sbatch --dependency singleton --nodes 2 launch/slurm.sh --config configs/llama_1b.yaml; done
#
#SBATCH --job-name=loqt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

torchrun=torchrun
[[ -x .venv/bin/torchrun ]] && torchrun=$PWD/.venv/bin/torchrun

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600} # the ranks may take their time to save
export LOQT_SCALE_NOTICE_SECONDS=${LOQT_SCALE_NOTICE_SECONDS:-120} # as above: a run that needs longer to save says so
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node

exec srun "$torchrun" \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${RANKS:-${SLURM_GPUS_ON_NODE:-auto}}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head_node:$port" \
    launch/train.py "$@"
