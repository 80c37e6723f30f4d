#!/bin/sh
# Installs pytunnel for the current user from the checkout that this script lies in; `--help` tells the rest.
# All of it is in functions and the last line calls them, so that half a script does nothing.
set -eu

usage() {
    cat <<'END'
Usage: sh install.sh [OPTION]

Installs (or upgrades) pytunnel for you from this checkout, with pipx, else with uv, else in a
virtual environment of its own with a link in ~/.local/bin. Root is not needed.

  --demo [ARG...]   install, then run `pytunnel demo ARG...`
  --test [ARG...]   run the tests (`pytest ARG...`) in .venv in this checkout; installs nothing else
  --uninstall       undo the install
  --help            show this text
END
}

say() { printf '%s\n' "$*"; }
complain() { printf 'error: %s\n' "$*" >&2; }
die() { complain "$*"; exit 1; }
misuse() { complain "$*"; exit 2; }

# Asks the program itself, as a name on PATH proves little: a pyenv shim may have nothing behind it.
works() { "$1" --version >/dev/null 2>&1; }

# A step's own output is of interest only when the step fails.
quietly() {
    output=$("$@" 2>&1) && return
    printf '%s\n' "$output" >&2
    return 1
}

is_recent_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Debian's python3 comes without ensurepip, and then `python3 -m venv` fails.
can_make_venvs() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

# Sets PYTHON: the newest that can make virtual environments, else the newest.
find_python() {
    PYTHON=
    for candidate in python3.14 python3.13 python3.12 python3.11 python3 python; do
        is_recent_python "$candidate" || continue
        PYTHON=${PYTHON:-$candidate}
        if can_make_venvs "$candidate"; then
            PYTHON=$candidate
            return
        fi
    done
    [ -n "$PYTHON" ] || die "no Python 3.11 or newer on PATH: install one (Debian, Ubuntu: sudo apt-get install python3 python3-venv) and run this again"
}

# make_venv DIR: makes the virtual environment DIR, unless there is a working one.
make_venv() {
    if is_recent_python "$1/bin/python" && "$1/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    find_python
    can_make_venvs "$PYTHON" || add_ensurepip
    say "Making the virtual environment $1 with $PYTHON"
    # --clear: what is there may be a run that was cut short, or belong to a Python that is gone.
    quietly "$PYTHON" -m venv --clear "$1" || die "$PYTHON -m venv failed (its output is above)"
}

add_ensurepip() {
    package=$("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if ! works apt-get; then
        die "$PYTHON cannot make virtual environments: install its venv and ensurepip modules, or pipx or uv, and run this again"
    elif [ "$(id -u)" != 0 ]; then
        die "$PYTHON cannot make virtual environments: run 'sudo apt-get install $package', then this again"
    fi
    say "Installing the Debian package $package, which $PYTHON needs to make virtual environments"
    quietly apt-get update || complain "apt-get update failed: trying with the package lists at hand"
    quietly env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$package" ||
        die "apt-get install $package failed (its output is above)"
    can_make_venvs "$PYTHON" || die "$PYTHON cannot make virtual environments even with $package installed"
}

pip_install() {
    venv=$1
    shift
    quietly "$venv/bin/python" -m pip install -q --disable-pip-version-check "$@" ||
        die "pip install failed (its output is above)"
}

pipx_has_it() { works pipx && pipx list --short 2>/dev/null | grep -q '^pytunnel '; }
uv_has_it() { works uv && uv tool list 2>/dev/null | grep -q '^pytunnel '; }

install() {
    # What has it already goes on having it: two installs would fight over ~/.local/bin/pytunnel.
    if pipx_has_it; then with=pipx
    elif uv_has_it; then with=uv
    elif [ -d "$OWN_VENV" ]; then with=own_venv
    elif works pipx; then with=pipx
    elif works uv; then with=uv
    else with=own_venv
    fi
    "install_with_$with"
    version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$CHECKOUT/pytunnel.py")
    say "Installed pytunnel $version: $BIN/pytunnel"
    case ":$PATH:" in
        *":$BIN:"*) ;;
        *)
            say "$BIN is not on your PATH; to add it, put this line in ~/.profile (zsh: ~/.zprofile) and log in again:"
            say "  export PATH=\"$BIN:\$PATH\""
            ;;
    esac
}

install_with_pipx() {
    find_python
    say "Installing $CHECKOUT with pipx"
    quietly pipx install --force --python "$PYTHON" "$CHECKOUT" || die "pipx install failed (its output is above)"
    BIN=$(pipx environment --value PIPX_BIN_DIR 2>/dev/null) || BIN=$LOCAL_BIN
}

install_with_uv() {
    say "Installing $CHECKOUT with uv"
    # --reinstall-package: uv would else take the wheel that it built of an earlier state of the checkout.
    quietly uv tool install --force --reinstall-package pytunnel --python '>=3.11' "$CHECKOUT" ||
        die "uv tool install failed (its output is above)"
    BIN=$(uv tool dir --bin)
}

install_with_own_venv() {
    BIN=$LOCAL_BIN
    if [ -e "$BIN/pytunnel" ] && ! is_our_link; then
        die "$BIN/pytunnel is there and not from this script: remove it and run this again"
    fi
    make_venv "$OWN_VENV"
    say "Installing $CHECKOUT in $OWN_VENV"
    pip_install "$OWN_VENV" "$CHECKOUT"
    mkdir -p "$BIN"
    ln -sf "$OWN_VENV/bin/pytunnel" "$BIN/pytunnel"
}

is_our_link() { [ "$(readlink "$LOCAL_BIN/pytunnel")" = "$OWN_VENV/bin/pytunnel" ]; }

uninstall() {
    removed=
    if pipx_has_it; then
        quietly pipx uninstall pytunnel || die "pipx uninstall failed (its output is above)"
        removed="pytunnel from pipx"
        say "Removed $removed"
    fi
    if uv_has_it; then
        quietly uv tool uninstall pytunnel || die "uv tool uninstall failed (its output is above)"
        removed="pytunnel from uv's tools"
        say "Removed $removed"
    fi
    if is_our_link || [ -d "$OWN_VENV" ]; then
        if is_our_link; then rm "$LOCAL_BIN/pytunnel"; fi
        rm -rf "$OWN_VENV"
        rmdir "${OWN_VENV%/venv}" 2>/dev/null || : # stays when there is more in it
        removed="$OWN_VENV and its link in $LOCAL_BIN"
        say "Removed $removed"
    fi
    [ -n "$removed" ] || say "pytunnel is not installed for you: nothing to remove"
    state=${PYTUNNEL_STATE_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/pytunnel}
    [ ! -d "$state" ] || say "Tokens and names stay in $state: remove it, too, when you will not need them again"
}

run_tests() {
    cd "$CHECKOUT"
    make_venv .venv
    say "Installing the checkout with what its tests need in .venv"
    pip_install .venv -e '.[test,dev]'
    say "Running the tests"
    exec .venv/bin/python -m pytest -n auto --dist loadfile "$@"
}

main() {
    action=${1:-}
    [ $# -eq 0 ] || shift
    case $action in
        '' | --demo | --test) ;;
        --uninstall) [ $# -eq 0 ] || misuse "--uninstall takes no arguments" ;;
        --help | -h) usage && return ;;
        *) misuse "unknown option $action (see --help)" ;;
    esac
    [ -n "${HOME:-}" ] || die "HOME is not set"
    CHECKOUT=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
    [ -f "$CHECKOUT/pytunnel.py" ] || die "there is no pytunnel.py in $CHECKOUT: run install.sh from a checkout of pytunnel"
    OWN_VENV=${XDG_DATA_HOME:-$HOME/.local/share}/pytunnel/venv
    LOCAL_BIN=$HOME/.local/bin

    # No `&&` after a function here: it would switch off `set -e` inside the function.
    case $action in
        --test) run_tests "$@" ;;
        --uninstall) uninstall ;;
        --demo)
            install
            exec "$BIN/pytunnel" demo "$@"
            ;;
        *)
            install
            say "Try it: $BIN/pytunnel demo"
            ;;
    esac
}

main "$@"
