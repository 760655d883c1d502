#!/usr/bin/env bash
# Without a scheduler: starts node.sh on each node over ssh, from any machine that reaches them.
#   bash ssh.sh node0 node1 -- --config config.yaml [--key value ...]
# This folder and the Python environment must be at the same paths on all nodes. PORT, PER_NODE
# and WAIT are passed on (see node.sh). Ends when all nodes have ended, and ends all if one fails.
set -euo pipefail

nodes=()
while [[ $# -gt 0 && $1 != -- ]]; do nodes+=("$1"); shift; done
[[ $# -gt 0 && ${#nodes[@]} -gt 0 ]] || { echo "usage: bash ssh.sh NODE ... -- ARGUMENT ..." >&2; exit 2; }
shift

variables="HEAD=${nodes[0]} NODES=${#nodes[@]} RUN_ID=ssh-$$ PORT=${PORT:-29500}"
variables+=" PER_NODE=${PER_NODE:-gpu} WAIT=${WAIT:-600}"
arguments=$(printf ' %q' "$@")
folder=$(printf '%q' "$PWD")
path=$(printf '%q' "$PATH")

pids=()
# A terminal per connection (-tt), so that what runs there ends with it.
for node in "${nodes[@]}"; do
  ssh -tt "$node" "cd $folder && PATH=$path $variables ADDRESS=$node bash node.sh$arguments" </dev/null &
  pids+=($!)
done
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for _ in "${pids[@]}"; do wait -n; done # the first that fails ends this script
