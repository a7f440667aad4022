#!/usr/bin/env bash
# The first minutes on a GPU, in commands of less than ten minutes each; results in OUT as they come.
#
#   benchmarks/first_gpu.sh check OUT     is it right: 5 minutes at most
#   benchmarks/first_gpu.sh speed OUT     how fast is it: 7 minutes at most
#   benchmarks/first_gpu.sh tune OUT      which block shapes are the fastest, and attention with them: 8 minutes at most
#
# Every part has its own seconds and its own process group (benchmarks/gpu_all.py), and the whole its own limit here.
# Without a GPU all are dry runs at tiny shapes.
set -euo pipefail
stage=${1:?check, speed or tune} out=${2:?a folder for results}
case $stage in
  check) minutes=5 ;;
  speed) minutes=7 ;;
  tune) minutes=8 ;;
  *) echo "first_gpu.sh: $stage is neither check nor speed nor tune" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
mkdir -p "$out"
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(pwd)/.triton}  # shared by all parts: what one compiles, none compiles again
exec timeout --kill-after=15 $((minutes * 60 + 20)) python benchmarks/gpu_all.py --stage "$stage" --minutes "$minutes" --out "$out"
