#!/usr/bin/env bash
# What can only be known on a GPU, in at most eight minutes: does each CUDA path compute what the
# others do, what does a step cost, and do capture, loss scaling, DDP, the stop and DPO work.
#
#   recipes/benchmarks/gpu.sh [--rehearse] [OUT]
#
# Needs Python with torch and Triton; pytest for the tests, transformers (and accelerate) for the
# stop, trl and datasets for DPO. No network. WHEELS=DIR installs what is missing from wheels there.
# Each part has a time limit of its own and a log; OUT/parts.csv says how each ended. A part that
# fails or hangs takes no other with it. --rehearse: tiny sizes on a CPU, the kernel interpreted.
set -u
rehearse=""
if [ "${1:-}" = --rehearse ]; then rehearse=--rehearse; shift; fi
cd "$(dirname "$0")/../.." || exit 2
out=${1:-${OUT:-recipes/benchmarks/optimizer_step_gpu/results}}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
export PYTHONPATH=$PWD:$PWD/recipes PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 2
  export PYTHONPATH=$PYTHONPATH:$site
fi
echo "part,status,seconds,limit" > "$out/parts.csv"
failed=0

part() { # NAME LIMIT COMMAND...: in its own time, with its own log
  local name=$1 limit=$2 status began=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  case $status in
    0) status=ok ;;
    3) status="left out" ;;
    124 | 137) status="out of time"; failed=1 ;;
    *) status="failed ($status)"; failed=1 ;;
  esac
  echo "$name,$status,$((SECONDS - began)),$limit" >> "$out/parts.csv"
  echo "== $name: $status, $((SECONDS - began)) s of $limit"
  [ "$status" = ok ] && tail -n 3 "$out/$name.log" || tail -n 12 "$out/$name.log"
}

measure() { part "$1" "$2" "$python" -m benchmarks.optimizer_step_gpu.parts "$1" $rehearse --out "$out"; }

cells=(-m gpu)
[ -n "$rehearse" ] && cells=(-k "test_matches_the_single_tensor_path and fused_triton and cpu")
part versions 15 "$python" -m poprisk_integrations.cli env
part tests 150 "$python" -m pytest -q -p no:cacheprovider -W default "${cells[@]}" tests/unit/optim
measure step 110
measure capture 25
measure scaler 25
measure ddp 25
measure stop 60
measure dpo 70
exit $failed
