#!/usr/bin/env bash
# The one command line: installs what a verb needs into .venv, then starts it. `./run.sh help` lists the verbs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'TXT'
./run.sh [KNOB=value ...]             the demo: make its data, train, score, show what came out
./run.sh train [FOLDER] [KNOB=v ...]  train and score on all GPUs of this machine, or on the CPU
./run.sh check [FOLDER] [KNOB=v ...]  are the knobs valid, what will run, how large will it be
./run.sh doctor [KNOB=v ...]          is this machine ready, how many steps will a run have
./run.sh data VERB ...                download | demo | text FILES... --name N | verify FOLDER
./run.sh knobs [WORD ...]             every knob: name, default, meaning; or those with WORD
./run.sh runs [COLUMN] [--csv]        the runs in logs/ as a table, sorted by a column such as bpb
./run.sh show [RUN]                   a finished run in short (default: the newest in logs/)
./run.sh compare A B                  two groups of runs: difference, t-test, verdict
./run.sh report RUN ...               one HTML page with pictures, of one or several runs
./run.sh sweep KNOB=a,b ... [-- KNOB=v ...]    train every combination; the same command resumes
./run.sh tune KNOB=a..b ... [-- KNOB=v ...]    search with Optuna
./run.sh sample RUN ["a prompt"]      text from a finished run: TEMPERATURE=0.8 SEED=1 LENGTH=200
./run.sh audit ARTIFACT [KNOB=v ...]  try to refute an artifact's score
./run.sh replay RUN [KNOB=v ...]      run again what a log tells of, compare what comes out
./run.sh submit NAME RUN ...          the folder of a submission; ./run.sh check FOLDER checks one
./run.sh test [PYTEST ARGS]           run the tests
./run.sh help all                     the rest: bench, mirror, setup, lock, variables

FOLDER has a config.env, such as records/pr1855. A RUN is a run id in logs/, or the path of a log.
TXT
}

usage_all() {
  usage
  cat <<'TXT'

./run.sh check FOLDER                check the folder of a submission, also other people's; exit 1 if it fails
./run.sh doctor --quick              without the speed probe
./run.sh audit --static PATH         read a submission's sources for what was ruled illegal
./run.sh mirror RUN wandb|tensorboard    copy a run's log there (WANDB=1, TENSORBOARD=1: while it trains)
./run.sh bench [PART ...]            measure against floors: versions blocks attention rotary kernels step chunks
                                     quantize sgd tests unlooped loader text
./run.sh bench --gpu                 all of these on one GPU at the record's shape, in ten minutes and one JSON
./run.sh bench contest [--data TRAIN --val VAL --tokenizer MODEL] ["NAME: KNOB=value ..." ...]
                                     does a change make a better model: small runs of one thread, paired by seed
./run.sh bench NAME ...              a file of bench/, bench/studies/ or tests/stress/, such as evaluation ARTIFACT,
                                     codec ARTIFACT, plain_step, systems; fuzz [SECONDS] [TARGET ...], faults, soak
./run.sh setup [data|tools|dev ...]  install packages into .venv; the verbs do it when it is needed
./run.sh lock                        make the requirements*.lock anew (needs the package index)

Variables. Relative paths are those of this folder; what is for other programs goes before the command.
PYTHON=python3.12     another interpreter for .venv (3.10 or newer); torch >= 2.9 that it has is used
TORCH_INDEX=URL       where torch is installed from (default: the builds for CPUs where there is no GPU; empty: pip's index)
NPROC=2               number of processes of a run (default: one for each GPU, or 1)
OMP_NUM_THREADS=4     threads of one process (default on a CPU: all cores, divided by the processes)
AUDIT=1               audit the artifact that a run has made
GPUS_PER_RUN=1        of a sweep or a study: as many runs as fit are trained at a time; LAUNCHER=slurm: as one array
TRIALS=20 STUDY=name  of tune; the same command elsewhere joins the study
OUT=report.html       of report
AUTHOR=.. GITHUB_ID=..    of submit
TXT
}

fail() { echo "run.sh: $*" >&2; exit 2; }

pip_install() {
  .venv/bin/python -m pip install --disable-pip-version-check "$@" ||
    fail "the installation failed (see above); once the cause is mended, the same command tries again"
}

refuse_link() {  # packages of others are not ours to change
  [ ! -L .venv ] || fail ".venv is a link to $(readlink -f .venv), whose packages are not those of $1:" \
    "install them there with .venv/bin/python -m pip, or remove the link"
}

make_venv() {
  local python=${PYTHON:-python3} site=""
  command -v "$python" >/dev/null || fail "no '$python' here: install Python 3.10 or newer, or set PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" -V) is too old: 3.10 or newer is needed; set PYTHON=python3.x"
  refuse_link requirements.txt
  # A Python that has torch already (a GPU image, say) lends it, so that its CUDA build is kept.
  if "$python" -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9))' 2>/dev/null
  then
    site=--system-site-packages
  fi
  echo "run.sh: making .venv with $("$python" -V)${site:+ and the torch that it has}" >&2
  "$python" -m venv --clear $site .venv ||
    fail "'$python -m venv' does not work: install it (Debian, Ubuntu: apt-get install python3-venv)"
}

# setup GROUP ...: .venv has what requirements.txt and each requirements-GROUP.txt name. A file is installed once for
# each of its contents and each Python: .venv/stamp-FILE has both.
setup() {
  if [ ! -x .venv/bin/python ] || { [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" -VV)" != "$(.venv/bin/python -VV)" ]; }; then
    make_venv
  fi
  local file stamp group ready=
  for file in requirements.txt $(for group in "$@"; do echo "requirements-$group.txt"; done); do
    [ -f "$file" ] || fail "no $file: expected setup, or setup data|tools|dev ..."
    stamp=$(cat "$file"; .venv/bin/python -VV)
    [ "$(cat ".venv/stamp-$file" 2>/dev/null)" != "$stamp" ] || continue
    refuse_link "$file"
    echo "run.sh: installing" $(grep -oE '^[A-Za-z_-]+' "$file" | uniq) "(once; it may take minutes)" >&2
    install_file "$file"
    echo "$stamp" >".venv/stamp-$file"
    ready="run.sh: $file is installed, after $SECONDS s in all: .venv has $(du -sh .venv | cut -f1)"
  done
  [ -z "$ready" ] || echo "$ready" >&2
}

# First what is pinned to its files' hashes; then torch and Triton, if they are wanted: builds for CPUs, CUDA and ROCm
# share a version, not a hash, and which one a machine needs its own index says.
install_file() {
  local lock=${1%.txt}.lock wanted=.venv/wanted.txt borrowed= torch index
  if grep -qs "^# of $(digest "$1")$" "$lock"; then
    pip_install --quiet --require-hashes -r "$lock"
  else
    echo "run.sh: $lock was not made from this $1: installing without hashes" >&2
  fi
  if grep -qs "site-packages = true" .venv/pyvenv.cfg; then
    if .venv/bin/python -c 'import torch' 2>/dev/null; then
      borrowed='^(torch|triton)=='
    else
      echo "run.sh: .venv does not see that torch (it lies in an environment of its own): installing another" >&2
    fi
  fi
  grep -vE "${borrowed:-^#}" "$1" >$wanted || true
  if torch=$(grep '^torch==' $wanted); then
    index=${TORCH_INDEX-$(torch_index)}
    echo "run.sh: $torch comes from ${index:-the index of pip}: about 200 MB for CPUs, over 500 MB with CUDA;" \
      "TORCH_INDEX=URL sets another index, TORCH_INDEX= that of pip" >&2
    pip_install $([ -t 2 ] || echo --quiet) ${index:+--index-url "$index"} "$torch"  # a terminal shows the progress
  fi
  pip_install --quiet -r $wanted
}

# Where Linux has no GPU and nobody has given pip an index: that of the builds for CPUs, if it answers. PyPI's are for CUDA.
torch_index() {
  local cpu=https://download.pytorch.org/whl/cpu
  if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! compgen -G '/dev/nvidia*' >/dev/null &&
    [[ ! $(.venv/bin/python -m pip config list) =~ index|find-links ]]; then
    .venv/bin/python -c "import urllib.request as r; r.urlopen('$cpu/torch/', timeout=10)" 2>/dev/null && echo $cpu ||
      echo "run.sh: $cpu cannot be reached" >&2
  fi
}

digest() { .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"; }

# Hashes of all platforms' files for Python 3.10 and newer, of all that is needed but torch and what comes with it. All
# files are solved together first, so that each package has one version whatever is installed.
lock() {
  local room file
  room=$(mktemp -d)
  pip_install --quiet --target "$room" uv==0.13.9
  compile() {
    grep -hvE '^(torch|triton)==' "$1" | PYTHONPATH=$room .venv/bin/python -m uv pip compile - --quiet --universal \
      --python-version 3.10 --no-header --no-annotate "${@:2}"
  }
  cat requirements*.txt >"$room/all"
  compile "$room/all" >"$room/solved" || fail "no lock was made, see above"
  for file in requirements*.txt; do
    {
      echo "# Made by ./run.sh lock from the $file whose SHA-256 is"
      echo "# of $(digest "$file")"
      compile "$file" --constraint "$room/solved" --generate-hashes
    } >"$room/lock" || fail "no lock was made, see above"
    mv "$room/lock" "${file%.txt}.lock"
  done
  rm -r "$room"
}

# start GROUPS MODULE ARGUMENT ...: this process becomes the program.
start() {
  setup $1
  exec .venv/bin/python -m "${@:2}"
}

verb=demo
if [[ $# -gt 0 && ! $1 =~ ^[A-Z][A-Z0-9_]*= ]]; then
  verb=$1
  shift
fi
for argument in "$@"; do  # the only argument that this script reads itself
  case $argument in PYTHON=*) PYTHON=${argument#*=} ;; esac
done
case $verb in
  demo) start "" tools.launch demo "$@" ;;
  train) start "" tools.launch train "$@" ;;
  check)
    if [ -d "${1:-}" ] && ! [[ -f $1/config.env && ! -f $1/submission.json && ! -f $1/train_gpt.py ]]; then
      start "" tools.submission check "$@"
    fi
    start "" tools.predict "$@"
    ;;
  data)
    case ${1:-} in
      demo | verify) start "" data.prepare "$@" ;;
      *) start data data.prepare "$@" ;;
    esac
    ;;
  knobs) start "" tools.knobs "$@" ;;
  runs) start "" tools.runs "$@" ;;
  show) start "" tools.show "$@" ;;
  report) start "" tools.report "$@" ;;
  sample) start "" tools.sample "$@" ;;
  audit) start "" tools.audit "$@" ;;
  replay) start "" tools.replay "$@" ;;
  mirror) start "" tools.mirror "$@" ;;
  submit) start "" tools.submission submit "$@" ;;
  doctor) start tools tools.doctor "$@" ;;
  compare) start tools tools.compare "$@" ;;
  sweep) start tools tools.sweep "$@" ;;
  tune) start tools tools.tune "$@" ;;
  bench)
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-2000}  # as in tools/launch.py
    for place in bench bench/studies tests/stress; do
      if grep -qs '^if __name__' "$place/${1:-all}.py"; then
        case $place/${1:-all} in tests/stress/*) groups=dev ;; bench/contest) groups=tools ;; *) groups= ;; esac
        start "$groups" "${place//\//.}.${1:-all}" "${@:2}"
      fi
    done
    case " $* " in *" --gpu "*) groups=dev ;; *) groups= ;; esac # its CUDA tests
    start "$groups" bench.all "$@"
    ;;
  test)
    setup data tools dev
    [ $# -gt 0 ] || set -- -n auto --maxprocesses 4 --dist loadfile # the tests of a file share what they made
    exec env OMP_NUM_THREADS=1 .venv/bin/python -m pytest "$@"
    ;;
  setup) setup "$@" ;;
  lock) setup; lock ;;
  help | -h | --help) if [ "${1:-}" = all ]; then usage_all; else usage; fi ;;
  *) fail "'$verb': no such verb; ./run.sh help lists them" ;;
esac
