#!/usr/bin/env bash
# Builds, tests and measures everything that needs a GPU, in one call of under ten minutes.
# Usage: benches/gpu_check.sh [FOLDER for logs and the results' CSV]
# Needs a CUDA torch with triton, nvcc, pybind11, ninja, pytest and pytest-benchmark.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benches/results}
mkdir -p "$out"
export FASTMERGE_CUDA=1 FASTMERGE_NATIVE=1 PYTHONUNBUFFERED=1

stage() { # name, seconds allowed, command...
  local name=$1 limit=$2
  shift 2
  local begun=$SECONDS
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  summary+=("$(printf '%-8s %-6s %4ds  %s' "$name" \
    "$([ $status = 0 ] && echo ok || echo "rc $status")" $((SECONDS - begun)) \
    "$(grep -v '^$' "$out/$name.log" | tail -n 1 | cut -c1-110)")")
}

summary=()
stage build 150 python3 setup.py build_ext --inplace
stage info 30 python3 -m fastmerge info
stage tests 200 python3 -m pytest -q -x --maxfail=20 tests/gpu tests/kernels/values
stage benches 180 python3 -m pytest -q benches --device cuda --rounds 20 --benchmark-disable \
  --results "$out/gpu.csv"
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$out/gpu.txt" 2>&1
fi
cat "$out/info.log"
grep -E '^(P[0-9]|FAILED|ERROR)' "$out/benches.log" "$out/tests.log" -h
printf '%s\n' "${summary[@]}"
