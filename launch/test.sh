#!/usr/bin/env bash
# Run the test suite on all cores, after the same set-up as the demo's.
#
#   ./launch/test.sh [--index URL] [OPTIONS OF pytest]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh

pip_arguments=()
if [[ "${1:-}" == --index ]]; then
    if (($# < 2)); then
        say "usage: ./launch/test.sh [--index URL] [OPTIONS OF pytest]"
        exit 2
    fi
    pip_arguments=(--extra-index-url "$2")
    shift 2
fi
setup dev ${pip_arguments[@]+"${pip_arguments[@]}"} || exit 2
# The tests start many processes of their own: each with a thread per core would only wait for the others.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n "$(python -c 'import os; print(os.cpu_count() or 1)')" "$@"
