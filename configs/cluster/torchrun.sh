#!/usr/bin/env bash
# One run on several machines with torchrun: start this on every one of them, with the same HEAD.
#
#   HEAD=node-0:29400 NODES=2 configs/cluster/torchrun.sh --config configs/paper/llama-3.1-8b.yaml \
#     --config fsdp2 --trainer.strategy.data_parallel_size 16 --trainer.accumulate_grad_batches 16 \
#     --checkpoint.dirpath runs/llama-3.1-8b/checkpoints
#
# On one machine HEAD and NODES may be left out. DEVICES (8) is the number of devices of each machine, LOGS (runs/logs) the
# folder of the ranks' output, RUN (leap) a name that all machines of a run have in common. If a rank dies, torchrun ends all others and says which one it was;
# what each rank wrote lies in LOGS. A run that died is started again with --ckpt_path last added.
set -euo pipefail

NODES=${NODES:-1}
DEVICES=${DEVICES:-8} # of each machine
[ "$NODES" -eq 1 ] || : "${HEAD:?has no value, and NODES is $NODES. Give the first machine and a free port: HEAD=node-0:29400}"
HEAD=${HEAD:-localhost:0} # port 0: any that is free
LOGS=${LOGS:-runs/logs}

# torchrun gives each rank one thread otherwise, and a graded prior is computed on the CPU.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + DEVICES - 1) / DEVICES))}

# The ranks write a checkpoint at SIGUSR1 too, and may need minutes for it, where torchrun kills them after 30
# seconds (torch 2.11 does so whatever this says).
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

exec torchrun \
  --nnodes "$NODES" --nproc-per-node "$DEVICES" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RUN:-leap}" \
  --max-restarts 0 --log-dir "$LOGS" --redirects 3 --tee 0:3 \
  -m leap_pl fit "$@" --trainer.num_nodes "$NODES" --trainer.devices "$DEVICES"
