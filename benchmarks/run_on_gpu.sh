#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests marked `cuda`, then the demos. Logs and JSON go to the folder given
# (default: benchmarks/results); a short table comes last.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/gpu.txt"
# Memory is measured in tests/gpu/test_capture.py, so it has the GPU to itself; the rest may share it.
python3 -m pytest -q -n 0 -m cuda tests/gpu/test_capture.py >"$out/capture.log" 2>&1
python3 -m pytest -q -n 8 -m cuda tests/gpu --deselect tests/gpu/test_capture.py >"$out/end_to_end.log" 2>&1
for model in ${MODELS:-mlp llama minilm}; do
    python3 -m cudagraph_backend demo --device cuda --model "$model" --json "$out/demo_$model.json" >"$out/demo_$model.txt" 2>&1
done

for log in "$out"/capture.log "$out"/end_to_end.log; do
    grep -E "^(FAILED|ERROR)" "$log" | cut -c1-180
    tail -n 1 "$log"
done
tail -n 20 "$out"/demo_*.txt
