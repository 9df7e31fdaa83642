#!/usr/bin/env bash
# Everything a GPU is needed for, in one command: bash bench/gpu.sh OUT
#
# Writes logs, results.json and summary.md to OUT. Installs nothing. Each part is limited in time, and a part that fails
# does not keep the others from running.
#   PARTS       which: "tests label gpu memcheck racecheck" (default: all)
#   LIMITS      seconds of each of these parts (default "110 70 200 45 45")
#   GPU_OPTIONS more options of `python -m bench gpu`, such as --peer instance-loss=PATH
#   DRY=1       without a GPU: tiny sizes on the CPU, and nothing that needs one
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
dry=${DRY:-}
read -r -a limits <<<"${LIMITS:-110 70 200 45 45}"
names=(tests label gpu memcheck racecheck)
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

sanitizer() { # name: the small steps under a tool of compute-sanitizer; the first run only fills the kernel cache
  if [ -z "$dry" ] && command -v compute-sanitizer >/dev/null; then
    part "$1" bash -c "$python -m bench.sanitize && PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $1 \
      --target-processes application-only --print-limit 20 --error-exitcode 9 $python -m bench.sanitize"
  elif [ -n "$dry" ]; then
    part "$1" "$python" -m bench.sanitize
  fi
}

part tests "$python" -m pytest tests/gpu -v -p no:cacheprovider -o filterwarnings= --durations=15 --tb=short
label_options=() gpu_options=()
[ -n "$dry" ] && label_options=(--repeats 1 --small) gpu_options=(--small --repeats 2)
part label "$python" -m bench label "${label_options[@]}" --out "$out/label.json"
# shellcheck disable=SC2086
part gpu "$python" -m bench gpu "${gpu_options[@]}" ${GPU_OPTIONS:-} --out "$out/gpu.json"
sanitizer memcheck
sanitizer racecheck

"$python" - "$out" <<'END'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
parts = {path.stem: json.loads(path.read_text()) for path in (out / "label.json", out / "gpu.json") if path.exists()}
(out / "results.json").write_text(json.dumps(parts, indent=1, ensure_ascii=False) + "\n")
for name in parts:
    (out / f"{name}.json").unlink()
END
{
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader 2>/dev/null
  printf '\n| part | exit | s |\n|---|---|---|\n'
  printf '%s\n' "${status[@]}"
  printf '\n## tests\n\n'
  grep -aE '^(FAILED|ERROR)|^=+ .*(passed|failed|error|skipped|no tests)' "$out/tests.log" | tail -40
  for name in label gpu; do
    printf '\n## %s\n\n' "$name"
    if grep -aq '^|' "$out/$name.log" 2>/dev/null; then
      sed -n '/^|/,$p' "$out/$name.log"
    else
      tail -30 "$out/$name.log"
    fi
  done
  for name in memcheck racecheck; do
    if [ -f "$out/$name.log" ]; then
      printf '\n## %s\n\n' "$name"
      tail -8 "$out/$name.log"
    fi
  done
} >"$out/summary.md" 2>/dev/null
cut -c1-400 "$out/summary.md" | head -c 11000
