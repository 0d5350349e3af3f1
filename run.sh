#!/usr/bin/env bash
# The one command line. `./run.sh help` lists the verbs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here"

usage() {
  cat <<'TXT'
./run.sh [KNOB=value ...]       set up, prepare the demo data, train and score the demo, print what came out
./run.sh train KNOB=value ...   train and score on all GPUs of this machine (torchrun), or in one CPU process
./run.sh check KNOB=value ...   validate the knobs, print layer plan, routes and predicted artifact size; no training
./run.sh train|check FOLDER ... the same with the knobs of FOLDER/config.env, such as records/pr1855; KNOB=value and the
                                environment come first
./run.sh doctor [KNOB=value]    is this machine ready: packages, GPUs, links, kernels, room, data, and a speed probe that
                                predicts the steps of a run (--quick: without); each warning with its remedy
./run.sh data VERB ...          data/prepare.py: download --variant V | demo | text FILES... --name NAME | verify DIR
./run.sh show [RUN]             table of a finished run (default: the newest in logs/)
./run.sh sweep KNOB=a,b ... [-- KNOB=value ...]   train every combination (or a list: sweep FILE), one after another or
                                packed on the GPUs (GPUS_PER_RUN=1); the same command resumes; LAUNCHER=slurm
./run.sh tune KNOB=a..b ... [-- KNOB=value ...]   search with Optuna: TRIALS=20, early stopping on VAL_LOSS_EVERY; the same
                                command elsewhere joins the study
./run.sh compare A B            two groups of runs: difference, Welch's t-test, verdict under both rules (logs, run ids,
                                globs, submission.json, or scores: A=1.0576,1.0573 B='logs/wider-*')
./run.sh report RUN ...         one HTML page with pictures of one or several runs (OUT=report.html)
./run.sh submit NAME RUN ...    the folder of a submission from the logs of its runs (AUTHOR=.. GITHUB_ID=..)
./run.sh check FOLDER           every check on the folder of a submission, also other people's; exit 1 if it fails
./run.sh replay RUN [KNOB=..]   run again what a log tells of, from the log alone, and compare what comes out
./run.sh mirror RUN wandb|tensorboard   copy a run's log there (WANDB=1, TENSORBOARD=1: while it trains)
./run.sh knobs                  every knob by group: name, type, default, demo's value, one line
./run.sh audit ARTIFACT KNOB=.. try to refute an artifact's score: causality, normalisation, order; exit 1 if it can
./run.sh audit --static PATH    read a submission's sources for what was ruled illegal
./run.sh bench [SECTION ...]    measure the parts against their floors: step profile kernels loader artifact
./run.sh bench --gpu            on one GPU: the CUDA tests, then all of these at the record's shape, in one JSON
./run.sh bench NAME ...         bench/NAME.py: evaluation ARTIFACT | codec ARTIFACT | ngram [MILLIONS] | plain_step |
                                encoding MODEL CORPUS | caseops TRAIN VAL | scaling [JSON] | memory | systems [NAME ...] |
                                faults [WORD ...] | soak [RUNS]
./run.sh bench fuzz [SECONDS] [TARGET ...]        search for inputs that break a reader; --mutations N: count
./run.sh test [PYTEST ARGS]     set up and run the tests; without arguments all, on up to four cores
./run.sh setup                  make .venv and install requirements.txt; the verbs above do it when it is needed
./run.sh lock                   make requirements.lock: the hashes of what setup installs (needs the package index)
./run.sh help                   this text

Relative paths are those of the folder where run.sh lies. Variables for other programs go before the command.
PYTHON=python3.12 ./run.sh ...  another interpreter for .venv (3.10 or newer)
AUDIT=1 ./run.sh train ...      audit the artifact that the run has made
NPROC=2 ./run.sh train ...      number of processes (default: one for each GPU, or 1)
TXT
}

fail() { echo "run.sh: $*" >&2; exit 2; }

sha256='import hashlib; print(hashlib.sha256(open("requirements.txt", "rb").read()).hexdigest())'

install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" ||
    fail "the installation failed (see above); once the cause is mended, the same command tries again"
}

# Hashes of all platforms' files for Python 3.10 and newer, of all that is needed but torch and what comes with it.
lock() {
  local room
  room=$(mktemp -d)
  install --target "$room" uv==0.13.9
  {
    echo "# Made by ./run.sh lock from the requirements.txt whose SHA-256 is"
    echo "# of $(.venv/bin/python -c "$sha256")"
    grep -vE '^(torch|triton)==' requirements.txt | PYTHONPATH=$room .venv/bin/python -m uv pip compile - --quiet \
      --universal --python-version 3.10 --generate-hashes --no-header --no-annotate
  } >"$room/requirements.lock" || fail "no lock was made, see above"
  mv "$room/requirements.lock" requirements.lock
  rm -r "$room"
}

# Makes .venv if its Python or requirements.txt are not the ones it was made from. A Python that has torch 2.9 or newer
# already (a GPU image, say) lends it to .venv, so that its CUDA build is kept.
setup() {
  local python=${PYTHON:-python3} stamp
  if [ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ]; then
    stamp=$(cat requirements.txt; .venv/bin/python -VV)
    [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ] || return 0
  fi
  command -v "$python" >/dev/null || fail "no '$python' here: install Python 3.10 or newer, or set PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" -V) is too old: 3.10 or newer is needed; set PYTHON=python3.x"
  if [ -x .venv/bin/python ] && [ "$(cat .venv/stamp 2>/dev/null)" = "$(cat requirements.txt; "$python" -VV)" ]; then
    return 0
  fi
  local site="" wanted=requirements.txt hash
  if "$python" -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9))' 2>/dev/null
  then
    site=--system-site-packages
    echo "run.sh: using the torch that $("$python" -c 'import sys; print(sys.executable)') has" >&2
  fi
  [ ! -L .venv ] || fail ".venv is a link to $(readlink -f .venv), whose packages are not those of requirements.txt:" \
    "making it anew would empty that folder; install them there with .venv/bin/python -m pip, or remove the link"
  echo "run.sh: making .venv with $("$python" -V) and installing requirements.txt (once; minutes)" >&2
  "$python" -m venv --clear $site .venv ||
    fail "'$python -m venv' does not work: install it (Debian, Ubuntu: apt-get install python3-venv)"
  if [ -n "$site" ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    echo "run.sh: .venv does not see it (it lies in an environment of its own): installing another" >&2
  elif [ -n "$site" ]; then
    wanted=.venv/requirements.txt
    grep -vE '^(torch|triton)==' requirements.txt >"$wanted"
  fi
  # First what is pinned to its files' hashes, in requirements.lock; then torch, if it is wanted: builds for CPUs, CUDA
  # and ROCm share a version, not a hash, and which one a machine needs its own index says.
  hash=$(.venv/bin/python -c "$sha256")
  if grep -qs "^# of $hash$" requirements.lock; then
    install --require-hashes -r requirements.lock
  else
    echo "run.sh: requirements.lock was not made from this requirements.txt: installing without hashes" >&2
  fi
  install -r "$wanted"
  (cat requirements.txt; .venv/bin/python -VV) >.venv/stamp
}

# KNOB=value arguments become environment variables of this process and its children.
take_knobs() {
  local pair
  for pair in "$@"; do
    [[ $pair =~ ^[A-Z][A-Z0-9_]*=.* ]] || fail "'$pair': expected KNOB=value, such as SEED=42 (./run.sh knobs lists them)"
    export "${pair?}"
    case ${pair%%=*} in NPROC | AUDIT | PYTHON) ;; *) KNOBS_TYPED="${KNOBS_TYPED:-} ${pair%%=*}" ;; esac
  done
  export KNOBS_TYPED=${KNOBS_TYPED:-}  # train_gpt.py refuses those of these names that are no knobs
}

# The knobs of a folder's config.env that the environment does not set itself. Whoever wrote that file decides no more
# than knobs: a name is looked up in train_gpt.py before it is expanded or exported (LD_PRELOAD, a[$(command)]).
take_folder() {
  local line name known
  [ -f "$1/config.env" ] || fail "$1: no config.env there; expected a folder such as records/pr1855"
  [ "$(wc -c <"$1/config.env")" -le 65536 ] || fail "$1/config.env: over 64 KiB; expected lines KNOB=value"
  known=" $(sed -nE -e 's/^    ([a-z0-9_]+): (bool|int|float|str) = .*/\1/p' -e '/^RENAMED/,/^KNOB_PREFIXES/p' \
    train_gpt.py | grep -oE '^[a-z0-9_]+$|[A-Z][A-Z0-9_]+' | tr '[:lower:]\n' '[:upper:] ')"
  while read -r line || [ -n "$line" ]; do
    [[ -n $line && $line != \#* ]] || continue
    name=${line%%=*}
    [[ $line == *=* && $name =~ ^[A-Z0-9_]+$ && $known == *" $name "* ]] ||
      fail "$1/config.env: $(printf %q "${line:0:80}"): expected KNOB=value (./run.sh knobs lists them)"
    [ -n "${!name+set}" ] || take_knobs "$line"
  done <"$1/config.env"
}

# The arguments of a verb that takes KNOB=value, and a folder before them.
take_arguments() {
  if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
    take_knobs "${@:2}"
    take_folder "$1"
  else
    take_knobs "$@"
  fi
}

train() {
  local processes=${NPROC:-1}
  [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$processes: expected a number of processes, 1 or more"
  [ -n "${NPROC:-}" ] || [ "${DEVICE:-auto}" = cpu ] ||
    processes=$(.venv/bin/python -c 'import torch; print(max(1, torch.cuda.device_count()))')
  if [ "$processes" -gt 1 ]; then
    .venv/bin/python -m torch.distributed.run --standalone --nproc_per_node="$processes" train_gpt.py
  else
    .venv/bin/python train_gpt.py
  fi
}

# The log and the artifact of the run RUN_ID.
log() { echo "${LOG_DIR:-logs}/$RUN_ID.jsonl"; }
artifact() { echo "${EVAL_ONLY:-${ARTIFACT_DIR:-${LOG_DIR:-logs}}/$RUN_ID.bin}"; }

# AUDIT=1: try to refute the score of the artifact that the run has just made.
audit() {
  [ "${AUDIT:-0}" = 0 ] || .venv/bin/python records/audit.py "$(artifact)" "LOG=$(log)"
}

verb=demo
if [[ $# -gt 0 && ! $1 =~ ^[A-Z][A-Z0-9_]*= ]]; then
  verb=$1
  shift
fi
case $verb in
  demo)
    take_knobs "$@"
    setup
    .venv/bin/python data/prepare.py demo
    export PRESET=${PRESET:-demo} RUN_ID=${RUN_ID:-demo-$(date +%Y%m%d-%H%M%S)}
    train
    audit
    echo
    .venv/bin/python records/summary.py "$(log)"
    cat <<TXT

Next: ./run.sh knobs                                       every knob
      ./run.sh train PRESET=demo SEED=42 MATRIX_LR=0.02    the demo with other values
      EVAL_ONLY=$(artifact) ./run.sh train            score the same artifact again
      ./run.sh data text FILES... --name mine              your own text
TXT
    ;;
  train)
    take_arguments "$@"
    setup
    [ "${AUDIT:-0}" = 0 ] || export RUN_ID=${RUN_ID:-audited-$(date +%Y%m%d-%H%M%S)}
    train
    audit
    ;;
  check)
    if [ -d "${1:-}" ] && ! [[ -f $1/config.env && ! -f $1/submission.json && ! -f $1/train_gpt.py ]]; then
      setup
      exec .venv/bin/python records/submission.py check "$1"
    fi
    take_arguments "$@"
    setup
    exec .venv/bin/python train_gpt.py --check
    ;;
  data) setup; exec .venv/bin/python data/prepare.py "$@" ;;
  audit) setup; exec .venv/bin/python records/audit.py "$@" ;;
  bench)
    setup
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-2000}  # as train_gpt.py sets it
    if grep -qs '^if __name__' "bench/${1:-all}.py"; then
      exec .venv/bin/python -m "bench.${1:-all}" "${@:2}"
    fi
    exec .venv/bin/python -m bench.all "$@"
    ;;
  report) setup; exec .venv/bin/python records/report.py "$@" ;;
  submit) setup; exec .venv/bin/python records/submission.py submit "$@" ;;
  mirror) setup; exec .venv/bin/python records/mirror.py "$@" ;;
  replay) setup; exec .venv/bin/python records/replay.py "$@" ;;
  show) setup; exec .venv/bin/python records/summary.py "$@" ;;
  doctor) setup; exec .venv/bin/python records/doctor.py "$@" ;;
  sweep) setup; exec .venv/bin/python records/sweep.py "$@" ;;
  tune) setup; exec .venv/bin/python records/tune.py "$@" ;;
  compare) setup; exec .venv/bin/python records/compare.py "$@" ;;
  knobs) setup; exec .venv/bin/python train_gpt.py --help ;;
  test)
    setup
    [ $# -gt 0 ] || set -- -n auto --maxprocesses 4 --dist loadfile # the tests of a file share what they made
    exec env OMP_NUM_THREADS=1 .venv/bin/python -m pytest "$@"
    ;;
  setup) setup ;;
  lock) setup; lock ;;
  help | -h | --help) usage ;;
  *) usage >&2; fail "'$verb': no such verb" ;;
esac
