#!/bin/bash
# A job on 64 nodes of 8 GPUs under SLURM. Start it from the root of the repository, with the package installed:
#   sbatch examples/slurm.sh [flags of examples/pretrain.py]
# SLURM signals the job before its time is over. The job saves, and is queued again until all steps are done.
#SBATCH --job-name=pretrain
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

OUT=${OUT:-runs/cluster} # on a file system that all nodes share
GPUS=${GPUS:-8}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
RESUME=()
compgen -G "$OUT/step-*" > /dev/null && RESUME=(--resume)

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # restarted ranks must not find the addresses of the ones before
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240   # seconds for a step and a checkpoint after SIGTERM; torch 2.11 gives 30

# One launcher per node. It passes SIGTERM on to the ranks, which finish their step and save. Wait for them.
srun torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" \
  --max-restarts 3 \
  examples/pretrain.py --config examples/configs/cluster.toml --out "$OUT" "${RESUME[@]}" "$@" &
JOB=$!
STOPPED=
trap 'STOPPED=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
wait "$JOB"
STATUS=$?
if [[ $STOPPED ]]; then
  wait "$JOB" # the trap has ended the first wait
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$STATUS"
