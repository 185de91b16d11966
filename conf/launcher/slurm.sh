#!/bin/bash
# Train on several nodes under SLURM, with one task per GPU. Nodes and settings are arguments:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 conf/launcher/slurm.sh dataset=celeba_hq model=large
#SBATCH --job-name=nvae
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
# Two minutes before the time limit the training saves and requeues the job, which then resumes.
#SBATCH --signal=USR1@120
#SBATCH --requeue

exec srun --wait=300 python -m nvae_lightning.train trainer=multinode \
    trainer.num_nodes="$SLURM_JOB_NUM_NODES" trainer.devices="$SLURM_NTASKS_PER_NODE" "$@"
