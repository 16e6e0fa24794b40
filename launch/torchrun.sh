#!/usr/bin/env bash
# One node, one rank a GPU (or RANKS of them, on the CPU if there is no GPU), FSDP2 by default:
#
#   launch/torchrun.sh --config configs/llama_1b.yaml
#   RANKS=2 launch/torchrun.sh --config configs/quickstart.yaml --parallel.strategy zero
#
# Two nodes and more: the same command on each node, with what differs. All nodes must see the same code and data; the
# run folder is written by rank 0 only.
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh --config configs/llama_1b.yaml    # on 10.0.0.1
#   NODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/torchrun.sh --config configs/llama_1b.yaml    # on the other
#
# RESTARTS=3 starts a job whose rank has died again, up to three times; it goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}

# the environment of the checkout, if there is one, else whatever is active
torchrun=torchrun
[[ -x .venv/bin/torchrun ]] && torchrun=.venv/bin/torchrun

if [[ ${NODES:-1} -eq 1 ]]; then
    where=(--standalone)
else
    where=(--nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600} # told to stop, ranks may take their time to save
exec "$torchrun" "${where[@]}" --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-0}" launch/train.py "$@"
