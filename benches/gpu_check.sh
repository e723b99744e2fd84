#!/usr/bin/env bash
# Builds, tests and measures everything on a machine with a GPU, in one call of under ten minutes:
# the limits of the stages add up to 595 seconds.
# Usage: benches/gpu_check.sh [FOLDER for logs and the results' CSV and table]
# Needs a CUDA torch with triton, nvcc, pybind11, ninja, pytest, pytest-benchmark, transformers.
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
  [ $status = 0 ] || failed=1
  summary+=("$(printf '%-10s %-6s %4ds  %s' "$name" \
    "$([ $status = 0 ] && echo ok || echo "rc $status")" $((SECONDS - begun)) \
    "$(grep -v '^$' "$out/$name.log" | tail -n 1 | cut -c1-110)")")
}

summary=()
failed=0
everything=(-m "slow or not slow" --maxfail=20)
stage build 110 python3 setup.py build_ext --inplace
stage info 15 python3 -m fastmerge info
if command -v nvidia-smi >/dev/null; then
  stage gpu 10 nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
fi
stage device 120 python3 -m pytest -q "${everything[@]}" tests/gpu tests/kernels
stage benches 150 python3 -m pytest -q benches/bench_{streaming,linear,step,dispatch}.py \
  --device cuda --rounds 15 --benchmark-disable --results "$out/gpu.csv"
if command -v compute-sanitizer >/dev/null; then
  few="cuda and (511 or 8193 or special or in_place)"
  for tool in memcheck racecheck; do
    stage $tool 25 compute-sanitizer --tool $tool --error-exitcode 1 --target-processes all \
      python3 -m pytest -q -x tests/gpu/test_cuda_kernels.py -k "$few"
  done
fi
stage suite 140 python3 -m pytest -q "${everything[@]}" --ignore tests/gpu --ignore tests/kernels
grep -hE '^(P[0-9]|D |FAILED|ERROR)' "$out"/{device,benches,suite}.log
grep -hE '^(P[0-9]|D )' "$out/benches.log" >"$out/gpu-table.txt"
printf '%s\n' "${summary[@]}"
exit $failed
