# Shared set-up of the launch scripts: sourced by them, does nothing by itself. Works from any directory, with spaces
# in the path.
#
# What a person may set:
#   PYTHON                                the Python to make .venv with, instead of the first that fits
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL    pip's own, for a registry of one's own or for torch's CPU build
#
# shellcheck shell=bash

repository="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$repository/.venv"
# 3.11 first: development and continuous integration run on it.
python_names=(python3.11 python3.12 python3.13 python3.10 python3.14 python3 python)

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# Prints the path of the first Python that really runs, is 3.10 or newer, and can make virtual environments. A name on
# PATH proves little: the shims of a version manager are there for versions that are not.
find_python() {
    local name candidate without_venv=""
    local names=("${python_names[@]}")
    if [[ -n "${PYTHON:-}" ]]; then names=("$PYTHON"); fi
    for name in "${names[@]}"; do
        while IFS= read -r candidate; do
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 </dev/null || continue
            if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1 </dev/null; then
                printf '%s\n' "$candidate"
                return 0
            fi
            without_venv="${without_venv:-$candidate}"
        done < <(type -ap -- "$name")
    done
    if [[ -n "$without_venv" ]]; then
        say "$without_venv cannot make virtual environments: its modules venv and ensurepip are missing." \
            "On Debian and Ubuntu they are a package of their own; install python3-venv (or python3.11-venv, to match)."
    elif [[ -n "${PYTHON:-}" ]]; then
        say "PYTHON=$PYTHON does not run, or is older than 3.10. Set it to a Python of 3.10 or newer, or unset it."
    else
        say "no Python of 3.10 or newer was found on PATH (tried ${python_names[*]})." \
            "Install one, or set PYTHON to its path."
    fi
    return 1
}

# Prints what an installation with the extra $1 depends on; .venv holds it in a stamp once it is installed. The path is
# part of it, since a virtual environment does not survive being moved.
setup_fingerprint() {
    printf '%s [%s]\n' "$venv" "$1"
    cksum <"$repository/pyproject.toml"
    cksum <"$repository/constraints.txt"
}

# Is the extra $1 installed, as the files ask for now? The extra dev contains demo.
setup_is_current() {
    local extra
    [[ -x "$venv/bin/python" ]] || return 1
    for extra in "$1" dev; do
        if [[ "$(cat -- "$venv/.setup-$extra" 2>/dev/null)" == "$(setup_fingerprint "$extra")" ]]; then return 0; fi
    done
    return 1
}

# Was .venv installed under another path? Then its programs name interpreters that are not there.
venv_was_moved() {
    local stamp
    for stamp in "$venv"/.setup-*; do
        [[ -e "$stamp" && "$(cat -- "$stamp")" != "$venv ["* ]] && return 0
    done
    return 1
}

# Makes .venv where there is none that works.
make_venv() {
    local python
    if ! venv_was_moved && "$venv/bin/python" -m pip --version >/dev/null 2>&1 </dev/null; then
        "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' </dev/null && return 0
        say "$venv has a Python older than 3.10. Remove it, and start again."
        return 1
    fi
    python="$(find_python)" || return 1
    if [[ -e "$venv" || -L "$venv" ]]; then
        say "$venv is unfinished or was moved; making it anew."
        rm -rf -- "$venv"
    fi
    say "making .venv with $python"
    "$python" -m venv "$venv" </dev/null
}

# setup EXTRA [PIP ARGUMENT ...]: afterwards .venv has grafter with this extra, and its programs are first on PATH.
# Otherwise it prints the reason and returns non-zero.
setup() {
    local extra="$1"
    shift
    if ! setup_is_current "$extra"; then
        make_venv || return 1
        say "installing grafter[$extra] into .venv (the first time takes some minutes)"
        # In the directory, with relative names: pip reads no path with spaces as a requirement.
        if ! (cd -- "$repository" && "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --quiet \
            "$@" -c constraints.txt -e ".[$extra]" </dev/null >&2); then
            say "the installation failed; pip's message is above. Where torch must come from another registry," \
                "give it with --index URL, or set PIP_INDEX_URL or PIP_EXTRA_INDEX_URL. Then start again."
            return 1
        fi
        setup_fingerprint "$extra" >"$venv/.setup-$extra"
    fi
    export PATH="$venv/bin:$PATH"
}
