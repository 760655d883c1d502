#!/usr/bin/env bash
# This node's part of the run. The same command on each node, in any order:
#   HEAD=node0 bash node.sh --config config.yaml [--key value ...]
# HEAD      name or address of the node where the agents meet, as all nodes see it
# PORT      a free port there                                   (29500)
# NODES     how many nodes                                      (2)
# PER_NODE  processes on this one; gpu: one per GPU             (gpu)
# RUN_ID    the same on all nodes, another for each run         (poprisk)
# WAIT      seconds to wait for the other nodes                 (600)
# ADDRESS   name or address of this node, as the others see it  (what its resolver says)
set -euo pipefail
: "${HEAD:?name the node where the agents meet, e.g. HEAD=node0 bash node.sh ...}"

exec torchrun \
  --nnodes "${NODES:-2}" \
  --nproc-per-node "${PER_NODE:-gpu}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$HEAD:${PORT:-29500}" \
  --rdzv-id "${RUN_ID:-poprisk}" \
  --rdzv-conf "join_timeout=${WAIT:-600}" \
  ${ADDRESS:+--local-addr "$ADDRESS"} \
  "${SCRIPT:-train.py}" "$@"
