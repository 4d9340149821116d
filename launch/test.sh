#!/usr/bin/env bash
# Run the test suite on all cores, after the same set-up as the demo's; or the tests between real programs alone.
#
#   ./launch/test.sh [--index URL] [--e2e] [OPTIONS OF pytest]
#
# --e2e runs tests/e2e instead of the rest: transformers, torchtitan and megatron-core graft between each other. Their
# packages are installed into .venv first.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh

# The extra e2e beside dev, once for each state of the files that it depends on. Not by `setup`, which takes an
# installation of dev to contain every other extra.
install_e2e() {
    if [[ "$(cat -- "$venv/.setup-e2e" 2>/dev/null)" == "$(setup_fingerprint e2e)" ]]; then return 0; fi
    say "installing grafter[e2e] into .venv (400 MB on disk, no CUDA)"
    if ! python -m pip install --no-input --disable-pip-version-check --quiet \
        ${pip_arguments[@]+"${pip_arguments[@]}"} -c constraints.txt -e ".[e2e]" </dev/null >&2; then
        say "the installation failed; pip's message is above."
        return 1
    fi
    setup_fingerprint e2e >"$venv/.setup-e2e"
}

e2e=""
pip_arguments=()
while [[ "${1:-}" == --index || "${1:-}" == --e2e ]]; do
    if [[ "$1" == --e2e ]]; then
        e2e=yes
        shift
        continue
    fi
    if (($# < 2)); then
        say "usage: ./launch/test.sh [--index URL] [--e2e] [OPTIONS OF pytest]"
        exit 2
    fi
    pip_arguments=(--extra-index-url "$2")
    shift 2
done
setup dev ${pip_arguments[@]+"${pip_arguments[@]}"} || exit 2
# The tests start many processes of their own: each with a thread per core would only wait for the others.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Bytecode is kept, whatever the environment says: hundreds of processes would compile grafter and the test modules.
unset PYTHONDONTWRITEBYTECODE
if [[ -n "$e2e" ]]; then
    install_e2e || exit 2
    # One pair at a time: each is up to four ranks.
    exec python -m pytest tests/e2e "$@"
fi
# One worker more than cores: a good part of the tests waits for processes rather than computes. Each begins with a
# stretch of files, so that what a file's tests share is mostly made once.
exec python -m pytest -n "$(python -c 'import os; print((os.cpu_count() or 1) + 1)')" --dist worksteal "$@"
