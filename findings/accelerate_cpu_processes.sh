#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0 (CPU build), Python 3.11, a machine without a GPU; seen 2026-11-28.
#
# The good guess: `accelerate launch --cpu --num_processes 2`, or a configuration file with distributed_type MULTI_CPU and
# num_processes 2, starts two processes on a CPU ("The total number of processes to be launched in parallel"), and
# --multi_gpu does nothing useful without a GPU.
#
# What happens: both of the first start one process and say nothing of the number; it gets MASTER_ADDR, but no WORLD_SIZE.
# (Several on a CPU are left to mpirun, by --mpirun_hostfile.) --multi_gpu starts two on a machine without a GPU, by torchrun;
# there accelerate's own PartialState() still takes each of them for the only one, process 0 of 1, so that both "main processes"
# write; PartialState(cpu=True) sees two.
#
#   --cpu --num_processes 2                               1 started: process 0 of 1, WORLD_SIZE unset
#   --config_file with MULTI_CPU and num_processes 2      1 started: process 0 of 1, WORLD_SIZE unset
#   --multi_gpu --num_processes 2                         2 started: process 0 of 1 (twice), WORLD_SIZE 2
#   the same and PartialState(cpu=True)                   2 started: process 0 and 1 of 2, WORLD_SIZE 2
set -euo pipefail
if compgen -G "/dev/nvidia[0-9]*" >/dev/null; then echo "needs a machine without a GPU: nothing was tried"; exit 77; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HOME="$folder/home" # no configuration of the user's own
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check accelerate==1.15.0
cat >"$folder/show.py" <<'PY'
import os
import sys

from accelerate import PartialState

state = PartialState(cpu="cpu=True" in sys.argv)
print(f"process {state.process_index} of {state.num_processes}, WORLD_SIZE {os.environ.get('WORLD_SIZE', 'unset')}")
PY
cat >"$folder/cpus.yaml" <<'YAML'
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_CPU
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
same_network: true
use_cpu: true
YAML
common=(--num_machines 1 --mixed_precision no --dynamo_backend no)
tried() {
  local expected=$1 argument=$2 seen
  shift 2
  seen=$(OMP_NUM_THREADS=1 "$folder/venv/bin/accelerate" launch "$@" "$folder/show.py" "$argument" 2>"$folder/said" | sort)
  echo "$* ($argument) -> ${seen//$'\n'/ | }"
  if grep -qi "num_processes" "$folder/said"; then echo "changed: it says something of the number"; cat "$folder/said"; exit 1; fi
  [[ "$seen" == "$expected" ]] || { echo "changed: expected $expected"; exit 1; }
}
one="process 0 of 1, WORLD_SIZE unset"
tried "$one" cpu=False --cpu --num_processes 2 "${common[@]}"
tried "$one" cpu=True --cpu --num_processes 2 "${common[@]}"
tried "$one" cpu=False --config_file "$folder/cpus.yaml"
two=(--multi_gpu --num_processes 2 --main_process_port 0 "${common[@]}")
tried "process 0 of 1, WORLD_SIZE 2"$'\n'"process 0 of 1, WORLD_SIZE 2" cpu=False "${two[@]}"
tried "process 0 of 2, WORLD_SIZE 2"$'\n'"process 1 of 2, WORLD_SIZE 2" cpu=True "${two[@]}"
