#!/usr/bin/env bash
# Watch two real jobs exchange tensors, and learn which layer of the target is wrong: in a table, and in a report that
# opens in the browser where there is a display.
#
#   ./launch/demo.sh [--fault norm|rope|none] [--layer N] [--no-floor] [--index URL] [-- OPTIONS OF grafter locate]
#
# The first run makes .venv and installs into it. --index URL is a registry to ask besides pip's own, for instance the
# one that PyTorch's install page gives for the CPU build. The exit code is 0 where grafter locate judged as it should:
# it names a layer, or none with --fault none.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh

usage() {
    say "usage: ./launch/demo.sh [--fault norm|rope|none] [--layer N] [--no-floor] [--index URL] [-- LOCATE OPTIONS]"
    exit 2
}

fault=norm layer=2 with_floor=yes pip_arguments=()
while (($#)); do
    case "$1" in
    --fault) fault="${2:-}" && shift 2 || usage ;;
    --layer) layer="${2:-}" && shift 2 || usage ;;
    --index) pip_arguments=(--extra-index-url "${2:-}") && shift 2 || usage ;;
    --no-floor) with_floor=no && shift ;;
    --) shift && break ;;
    *) usage ;;
    esac
done
[[ "$fault" =~ ^(norm|rope|none)$ && "$layer" =~ ^[0-3]$ ]] || usage

setup demo ${pip_arguments[@]+"${pip_arguments[@]}"} || exit 2

# Nothing is downloaded, and progress bars of a model of 3 MB say nothing.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
# One thread a rank, as torchrun would set it (with a warning).
export OMP_NUM_THREADS=1

# Relative paths: the commands below then hold nothing that needs quoting, wherever the repository lies.
model=grafter_out/demo/model
mkdir -p grafter_out/demo
python launch/demo/make_model.py "$model"

target="torchrun --standalone --nproc-per-node 2 launch/demo/target.py $model"
arguments=(--baseline "python launch/demo/baseline.py $model" --target "$target --fault $fault --layer $layer")
# Neither script mentions grafter: this is all that says where to look.
arguments+=(--attach "model.embed_tokens" --attach ":LlamaDecoderLayer" --points "name.endswith('.out')")
# With the tensors on disk, the report also shows where in a tensor the two differ.
arguments+=(--set "dump_filter=name.endswith('.out')")
if [[ "$with_floor" == yes ]]; then arguments+=(--floor "$target --fault none"); fi

# At a display, the report is opened; in a build, it is only written.
if [[ -z "${CI:-}" && -t 1 ]]; then arguments+=(--open); fi

code=0
grafter locate "${arguments[@]}" --out "grafter_out/demo/$(date +%Y%m%d-%H%M%S)-$$" "$@" || code=$?
# `grafter locate` ends with 1 where it names a layer: here that is success.
if [[ "$fault" == none ]]; then exit "$code"; fi
case "$code" in
1) exit 0 ;;
0) exit 1 ;;
*) exit "$code" ;;
esac
