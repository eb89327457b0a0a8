#!/bin/bash
# A job on several nodes without a scheduler. Start this on each node, from the root of the repository:
#   NODES=2 HEAD=node0:29500 bash examples/multi_node.sh --config examples/configs/one_node.toml --ep 16
# HEAD is the name of one node and a free port there. --out must be a folder that all nodes share.
set -euo pipefail

: "${NODES:?set it to the number of nodes}" "${HEAD:?set it to name:port of one node}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # restarted ranks must not find the addresses of the ones before
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240   # seconds for a step and a checkpoint after SIGTERM; torch 2.11 gives 30

exec torchrun \
  --nnodes "$NODES" --nproc-per-node "${GPUS:-8}" \
  --rdzv-id "${JOB:-pretrain}" --rdzv-backend c10d --rdzv-endpoint "$HEAD" \
  --max-restarts 3 \
  examples/pretrain.py "$@"
