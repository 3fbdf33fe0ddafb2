#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests marked `cuda`, capture parity, the demos, the benchmarks. Logs, rows and
# plots go to the folder given (default: benchmarks/results), and all of them to results.tar.gz there; a short table comes
# last.
#
#   PARTS="tests parity demos suite"   only some of these; the suite alone takes up to MINUTES
#   MINUTES=12                  the suite starts nothing after that, and says what it left out
#   TOPICS="serving memory"     only these topics of the suite
#   COMMIT=abc1234              where the history of the repository is not there to ask
#   PACK=1                      write nothing but results.tar.gz and summary.txt to the folder
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-benchmarks/results}")
mkdir -p "$out"
work=$out
[ -n "${PACK:-}" ] && work=$(mktemp -d)
python=${PYTHON:-python3}
parts=" ${PARTS:-tests parity demos suite} "

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$work/gpu.txt"

if [[ $parts == *" tests "* ]]; then
    # Tests that measure free memory wait until the others have left the GPU.
    "$python" -m pytest -q -n 8 -m cuda >"$work/tests.log" 2>&1
fi
if [[ $parts == *" parity "* ]]; then
    "$python" -m tests.parity --device cuda --jobs 16 --json "$work/parity.json" ${COMMIT:+--commit "$COMMIT"} \
        >"$work/parity.txt" 2>&1
fi
if [[ $parts == *" demos "* ]]; then
    for model in ${MODELS:-mlp llama minilm}; do
        "$python" -m cudagraph_backend demo --device cuda --model "$model" --json "$work/demo_$model.json" \
            >"$work/demo_$model.txt" 2>&1
    done
fi
if [[ $parts == *" suite "* ]]; then
    # shellcheck disable=SC2086
    "$python" -m benchmarks ${TOPICS:-} --device cuda --out "$work" --minutes "${MINUTES:-12}" \
        ${COMMIT:+--commit "$COMMIT"} 2>&1 | tee "$work/suite.txt"
    "$python" -m benchmarks table "$work" >"$work/tables.md"
fi

{
    if [[ $parts == *" tests "* ]]; then
        for log in "$work"/tests.log; do
            grep -E "^(FAILED|ERROR)" "$log" | cut -c1-180
            tail -n 1 "$log"
        done
    fi
    [[ $parts == *" parity "* ]] && grep -E "^(\||\*\*)" "$work/parity.txt" | cut -c1-180
    [[ $parts == *" demos "* ]] && tail -n 20 "$work"/demo_*.txt
    # The end table of the suite: from its header on.
    [[ $parts == *" suite "* ]] && sed -n '/^topic  /,$p' "$work/suite.txt"
} | tee "$out/summary.txt"

tar -C "$work" --exclude=results.tar.gz -czf "$out/results.tar.gz" .
[ "$work" = "$out" ] || rm -r "$work"
