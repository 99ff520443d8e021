#!/bin/bash
# A run on a Slurm cluster, without Ray: torchrun on every node, the same result as anywhere else.
# Fill in: the partition. It runs `.venv/bin/torchrun` of the folder that it is submitted from: the project's, on a file
#          system that all nodes share, in whose `.venv` `pip install -e .` was said once.
# Use:     sbatch --nodes 2 --gpus-per-node 4 cluster/slurm.sh --config configs/pretrain/... data.source=/shared/shards
#          A job that is requeued, or submitted again after its time limit, goes on from the last checkpoint.
# Costs:   what your centre asks.
# Has run: not under Slurm; torchrun, which it starts, runs in the tests.
#SBATCH --job-name=distssl
#SBATCH --partition=FILL_IN_PARTITION
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=48
#SBATCH --signal=TERM@300       # five minutes before the limit: save a checkpoint and stop; torchrun waits 30 s for it
#SBATCH --requeue               # after a node failed or was taken away; not at the time limit
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
per_node=${SLURM_GPUS_ON_NODE:-1}
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / per_node))
# Since Slurm 22.05 srun does not take over sbatch's --cpus-per-task, and would bind all ranks of a node to one core.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$per_node" \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
  launch.py pretrain "$@"
