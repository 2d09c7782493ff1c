#!/usr/bin/env bash
# Build, test and measure ttaq on a machine with a GPU and no network, within ten minutes.
#
# usage: bash bench/gpu.sh OUT [COMMIT]
#
# OUT receives the rows (<machine>.csv), the tables (report.md) and the logs. COMMIT names the tree where it has no git
# history. Wheels in .whl/ are installed beside the packages that are there. A step that fails leaves the later ones to
# run; the exit status is then 1, and 3 where there is no CUDA device.
set -u
if [ $# -lt 1 ]; then
    echo "usage: bash bench/gpu.sh OUT [COMMIT]" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=$(command -v python3) || { echo "gpu.sh: there is no python3 on PATH" >&2; exit 2; }
limit=500 # seconds for the steps, one of which never gets more than is left; the report comes after them
failed=()

# step NAME SECONDS LOG COMMAND...: run a command under its own limit; keep its output in LOG and show the end of it.
step() {
    local name=$1 most=$2 log=$out/$3 left=$((limit - SECONDS)) status=0 start=$SECONDS
    shift 3
    if [ "$left" -lt 5 ]; then
        echo "== $name: left out, the time is spent"
        failed+=("$name")
        return
    fi
    echo "== $name ==" >>"$log"
    timeout --kill-after=5 $((most < left ? most : left)) "$@" >"$log.part" 2>&1 || status=$?
    cat "$log.part" >>"$log"
    if [ "$status" -ne 0 ]; then
        failed+=("$name")
        tail -n 25 "$log.part"
    fi
    rm -f "$log.part"
    echo "== $name: status $status$([ "$status" -eq 124 ] && echo ', timed out'), $((SECONDS - start)) s"
}

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)'
case $? in
    0) ;;
    3)
        echo "gpu.sh: no CUDA device: torch.cuda.is_available() is false here; run this where there is a GPU." >&2
        exit 3
        ;;
    *)
        echo "gpu.sh: $python cannot import torch; put the python3 that has it first on PATH." >&2
        exit 2
        ;;
esac

if compgen -G ".whl/*.whl" >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    step "carried wheels" 60 install.log "$python" -m pip install --no-index --no-deps --no-compile --upgrade \
        --target "$site" .whl/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" - <<'PY' | tee "$out/machine.txt"
import importlib.util
import platform

import torch

print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.cuda.get_device_name(0)}")
needed = ("triton", "timm", "numpy", "safetensors", "rich", "typer", "PIL", "scipy", "pytest", "hypothesis", "ninja", "setuptools")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
print("missing: " + (", ".join(missing) if missing else "nothing"))
PY
{ nvcc --version || /usr/local/cuda/bin/nvcc --version || echo "no nvcc"; } 2>/dev/null | tail -n 1

step "build" 150 install.log "$python" -m pip install --no-index --no-build-isolation --no-deps -e .
step "import" 60 install.log "$python" -P -c \
    'from ttaq.kernels import _native; print({k: _native.reason(k) or "built" for k in ("cpu", "cuda")})'
tail -n 1 "$out/install.log"
step "pytest -m gpu" 150 pytest.log "$python" -P -m pytest -m gpu -q tests
tail -n 1 "$out/pytest.log"

commit=()
git rev-parse HEAD >/dev/null 2>&1 || commit=(--commit "${2:-unrecorded}")
run_op() { step "bench $1" 150 bench.log "$python" -m bench run "$1" --results "$out" "${commit[@]}"; }
run_op packed_linear
run_op skinny_linear
step "bench map" 90 bench.log "$python" -m bench map --seconds 0.02 --results "$out" "${commit[@]}"
if "$python" -c 'import timm' 2>/dev/null; then
    step "bench models" 120 bench.log "$python" -m bench models --seconds 0.2 --results "$out" "${commit[@]}"
else
    echo "== bench models: left out, timm is not installed"
fi
for op in packed_conv2d fake_quant codes activation_codes soft_round perturb prologue log2; do run_op "$op"; done

timeout 30 "$python" -m bench report --results "$out" --output "$out/report.md" || failed+=("report")
for part in map models; do
    timeout 20 "$python" -m bench "$part" --table --results "$out" | tee "$out/$part.md"
done
timeout 30 "$python" -m bench report --results "$out" --short
if [ ${#failed[@]} -gt 0 ]; then
    echo "gpu.sh: $SECONDS s; failed: $(IFS=,; echo "${failed[*]}")"
    exit 1
fi
echo "gpu.sh: $SECONDS s; every step passed"
