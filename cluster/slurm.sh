#!/bin/bash
# A run on a Slurm cluster, without Ray: torchrun on every node, the same result as anywhere else.
# Fill in: the partition. It runs `.venv/bin/torchrun` of the folder that it is submitted from: the project's, on a file
#          system that all nodes share, in whose `.venv` `pip install -e .` was said once.
# Use:     sbatch --nodes 2 --gpus-per-node 4 cluster/slurm.sh --config configs/pretrain/... data.source=/shared/shards
# Costs:   what your centre asks.
# Has run: not under Slurm; torchrun, which it starts, runs in the tests.
#SBATCH --job-name=distssl
#SBATCH --partition=FILL_IN_PARTITION
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=48
#SBATCH --signal=TERM@300       # five minutes before the limit: save a checkpoint and stop
#SBATCH --requeue
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
per_node=${SLURM_GPUS_ON_NODE:-1}
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / per_node))
srun .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$per_node" \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
  launch.py pretrain "$@"
