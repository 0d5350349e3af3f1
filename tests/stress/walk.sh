#!/usr/bin/env bash
# A participant's day on a laptop, from a fresh clone: check, sweep, kill, resume, compare, report, submit, run again.
#
#     tests/stress/walk.sh >walk.txt 2>&1        about fifteen minutes on two cores
#
# Every command is printed as typed, with its exit status where that is not 0. It stops where something else than the
# planned interruption fails. `script` gives none of them a terminal, so no bars are in the recording.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

step() {  # step EXPECTED_STATUS COMMAND
  local status=0
  printf '\n$ %s\n' "$2"
  bash -c "$2" </dev/null || status=$?
  [ "$status" = 0 ] || echo "[exit status $status]"
  [ "$status" = "$1" ] || { echo "walk.sh: expected status $1" >&2; exit 1; }
}

small="PRESET=demo MAX_WALLCLOCK_SECONDS=0 ITERATIONS=60 EVAL_SECONDS_BUDGET=600 DIAGNOSTIC_EVALS=ema,quantized"  # not by the clock
step 0 "./run.sh data demo"
step 0 "./run.sh doctor PRESET=demo"
step 130 "timeout --signal=INT 45 ./run.sh sweep SEED=42,0 MATRIX_LR=0.018,0.03 -- $small; exit 130"
step 0 "./run.sh sweep SEED=42,0 MATRIX_LR=0.018,0.03 -- $small"
step 0 "./run.sh sweep SEED=42,0 MATRIX_LR=0.018,0.03 -- $small"
step 0 "./run.sh compare A='MATRIX_LR=0.018-*' B='MATRIX_LR=0.03-*'"
step 0 "./run.sh report logs/MATRIX_LR=*.jsonl OUT=logs/report.html"
step 0 "./run.sh submit Walk logs/MATRIX_LR=0.018-*.jsonl AUTHOR='Ada Lovelace' GITHUB_ID=ada BLURB='The demo, as it is.' SEEDS=2"
folder=$(echo records/track_non_record_16mb/*_Walk)
step 0 "ls -l $folder"
step 0 "./run.sh check $folder"
step 0 "cd $folder && DATA_PATH=$PWD/data/datasets/demo_sp1024 $small LOG_DIR=/tmp/walk-$$ RUN_ID=inside ITERATIONS=40 \\
    $PWD/.venv/bin/python train_gpt.py | tail -n 12"
