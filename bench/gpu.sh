#!/usr/bin/env bash
# Everything a GPU is needed for, in one command and nine minutes: bash bench/gpu.sh OUT
#
# Writes results.json, summary.md, logs and profiler traces to OUT. Installs nothing; a package that is missing leaves out
# what needs it. Each part is limited in time, and a part that fails does not keep the others from running.
#   PARTS       which: "tests label gpu table3 training memcheck racecheck" (default: all)
#   LIMITS      seconds of each of these parts (default "140 40 125 75 65 60 30")
#   GPU_OPTIONS more options of `python -m bench`, such as --peer instance-loss=PATH
#   DRY=1       without a GPU: tiny sizes on the CPU, and nothing that needs one
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
dry=${DRY:-}
read -r -a limits <<<"${LIMITS:-140 40 125 75 65 60 30}"
names=(tests label gpu table3 training memcheck racecheck)
status=()

limit_of() {
  for i in "${!names[@]}"; do [ "${names[$i]}" = "$1" ] && echo "${limits[$i]}"; done
}

part() { # name, command...: run it for at most its limit; SIGINT first, so that it can still report
  local name=$1 start=$SECONDS
  shift
  [[ " ${PARTS:-${names[*]}} " == *" $name "* ]] || return 0
  echo "== $name"
  timeout -s INT -k 10 "$(limit_of "$name")" "$@" >"$out/$name.log" 2>&1
  local code=$?
  [ $code = 124 ] || [ $code = 137 ] && code="$code (out of time)"
  status+=("| $name | $code | $((SECONDS - start)) |")
}

measure() { # suite, options...: no case begins in the last part of its time; the figures so far are kept
  local suite=$1
  shift
  [ -n "$dry" ] && set -- "$@" --small --repeats 2
  # shellcheck disable=SC2086
  part "$suite" "$python" -m bench "$suite" --seconds 4 --slow-seconds 4 --case-seconds 40 \
    --deadline $(($(limit_of "$suite") * 7 / 10)) "$@" ${GPU_OPTIONS:-} --out "$out/results.json"
}

sanitizer() { # name: the small steps under a tool of compute-sanitizer; the first run only fills the kernel cache
  if [ -z "$dry" ] && command -v compute-sanitizer >/dev/null; then
    part "$1" bash -c "$python -m bench.sanitize && PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $1 \
      --target-processes application-only --print-limit 20 --error-exitcode 9 $python -m bench.sanitize"
  elif [ -n "$dry" ]; then
    part "$1" "$python" -m bench.sanitize
  else
    status+=("| $1 | left out: no compute-sanitizer | |")
  fi
}

rm -f "$out/results.json"
# The files run side by side, each in processes of its own, several with pytest-xdist: most of their time is Triton's compiler
# and the CPU's results, which take one core each, and a kernel that hangs, or an illegal access, after which CUDA fails for
# good, does not hide the other tests. Status 5: everything in a file is skipped.
export python limit=$(($(limit_of tests) - 20))
part tests bash -c 'logs=$(mktemp -d) status=0
workers=$("$python" -c "import os, xdist; print(\"-n\", os.cpu_count() // 4, \"--dist worksteal\")" 2>/dev/null)
for name in label engine segments metrics training parallel; do
  timeout --foreground -s INT -k 15 "$limit" "$python" -m pytest "tests/gpu/test_${name}_gpu.py" $workers -v \
    -p no:cacheprovider -o filterwarnings= -o faulthandler_timeout=60 --durations=5 --tb=short >"$logs/$name" 2>&1 &
done
for job in $(jobs -p); do
  wait "$job"
  code=$?
  [ $code = 0 ] || [ $code = 5 ] || status=$code
done
cat "$logs"/*
exit $status'
measure label
measure gpu --trace "$out/traces"
measure table3
measure training
sanitizer memcheck
sanitizer racecheck

{
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader 2>/dev/null
  printf '\n| part | exit | s |\n|---|---|---|\n'
  printf '%s\n' "${status[@]}"
  if [ -f "$out/tests.log" ]; then
    printf '\n## tests\n\n'
    grep -aE '^(FAILED|ERROR)|^=+ .*(passed|failed|error|skipped|no tests)' "$out/tests.log" | tail -40
  fi
  printf '\n'
  [ -f "$out/results.json" ] && "$python" -m bench report "$out/results.json"
  for name in label gpu table3 training memcheck racecheck; do
    if [ -f "$out/$name.log" ] && ! grep -qF "| $name | 0 |" <<<"$(printf '%s\n' "${status[@]}")"; then
      printf '\n## %s, log\n\n' "$name"
      tail -20 "$out/$name.log"
    fi
  done
} >"$out/summary.md" 2>/dev/null
cut -c1-400 "$out/summary.md" | head -c 11000
