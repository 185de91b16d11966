#!/bin/bash
# Train on several machines without a scheduler. Start it on every machine, with the host name of the first one:
#   NUM_NODES=2 NUM_DEVICES=8 FIRST=node1 conf/launcher/torchrun.sh hydra.run.dir=/shared/run dataset=celeba_hq model=large
# The same command resumes the run; after a failure torchrun itself restarts all ranks, at most MAX_RESTARTS times.

# Otherwise restarted ranks read the addresses of the ended ones (torch 2.15).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes="$NUM_NODES" --nproc-per-node="$NUM_DEVICES" \
    --max-restarts="${MAX_RESTARTS:-3}" --rdzv-backend=c10d --rdzv-endpoint="$FIRST:${PORT:-29400}" \
    -m nvae_lightning.train trainer=multinode trainer.num_nodes="$NUM_NODES" ckpt_path=last "$@"
