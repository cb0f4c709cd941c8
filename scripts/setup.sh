#!/bin/sh
# Puts in place what a make target needs, and nothing that is already there. The Makefile calls it:
#   setup.sh venv                 the virtual environment with the program (.venv/bin/mrelay)
#   setup.sh dev                  what testing and checking need, on top of `venv`
#   setup.sh page                 what testing the web page needs, on top of `dev`
#   setup.sh promtool             promtool, which tests alert rules and metrics (.venv/bin/promtool)
#   setup.sh root WHAT ...        a way to be root, and system commands and libraries (lib….so.N), from
#                                 Debian packages if missing
#   setup.sh wish WHAT ...        the same, but what can't be had is done without: its tests skip
# POSIX sh; never asks a question. PYTHON=/path/to/python3.x chooses the interpreter.
set -eu

cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin # where Debian keeps ethtool, ldconfig and smcrouted, absent from a user's PATH
venv=.venv
oldest='(3, 11)' # requires-python in pyproject.toml

say() { printf 'setup: %s\n' "$*" >&2; }

# fail PROBLEM REMEDY
fail() {
    printf 'setup: error: %s\n  remedy: %s\n' "$1" "$2" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# ---- Debian packages ---------------------------------------------------------------------------

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

# need_root WHAT COMMAND: end with the remedy unless WHAT, which is COMMAND, can run as root.
need_root() {
    [ "$(id -u)" -eq 0 ] && return
    have sudo || fail "$1 needs root, and there is no sudo" "as root: $2"
    sudo -n true 2>/dev/null || fail "$1 needs root, sudo wants a password, and set-up never asks" \
        "run 'sudo -v' first, then make again; or as root: $2"
}

# can_install PACKAGES: end with the remedy unless apt-get and the privilege for it are there.
can_install() {
    have apt-get || fail "$1 missing, and this system has no apt-get" \
        "install what is missing with your own package manager, then run make again"
    need_root "installing $1" "apt-get install $1"
}

# quietly COMMAND ...: show what it printed only when it fails.
quietly() {
    log=$(mktemp)
    status=0
    "$@" </dev/null >"$log" 2>&1 || status=$?
    [ "$status" -eq 0 ] || cat "$log" >&2
    rm -f "$log"
    return "$status"
}

apt_update() {
    quietly as_root apt-get update -q || say "apt-get update failed; going on with the package lists at hand"
}

# apt_install PACKAGE ...
apt_install() {
    can_install "$*"
    say "installing Debian packages: $*"
    apt_update
    quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@" ||
        fail "apt-get could not install: $*" \
            "read apt's message above; check the network and /etc/apt/sources.list, then run make again"
}

# package_of WHAT: the Debian package that holds a command or a library.
package_of() {
    case $1 in
        ip | bridge | tc) echo iproute2 ;;
        smcrouted) echo smcroute ;;
        libbpf.so.1) echo libbpf1 ;;
        *) echo "$1" ;;
    esac
}

# present WHAT: whether a command is in PATH, or a library where the loader looks.
present() {
    case $1 in
        lib*.so.*) ldconfig -p 2>/dev/null | grep -qF "$1 " ;;
        *) have "$1" ;;
    esac
}

# optional WHAT: whether to do without it. libbpf is for the fast path, which the relay can do without; older releases
# have no package of it.
optional() {
    [ "$1" = libbpf.so.1 ] || return 1
    if have apt-cache; then
        apt-cache show iproute2 >/dev/null 2>&1 || apt_update # a fresh image has no package lists
        apt-cache show libbpf1 >/dev/null 2>&1 && return 1
    fi
    say "no package has $1 here (Debian 12, Ubuntu 24.04 and later do): no fast path, and its tests are skipped"
}

install_tools() {
    missing=''
    for tool in "$@"; do
        present "$tool" || optional "$tool" || missing="$missing $(package_of "$tool")"
    done
    [ -n "$missing" ] || return 0
    # shellcheck disable=SC2086  # a list of package names
    apt_install $missing
    case $missing in *smcroute*) silence smcroute smcroute-helper ;; esac
    case $missing in *igmpproxy*) silence igmpproxy ;; esac
}

# In a subshell, which `fail` may end.
install_wishes() {
    for tool in "$@"; do
        present "$tool" || (install_tools "$tool") || say "no $tool here: its tests are skipped"
    done
}

# silence SERVICE ...: Debian starts multicast routers on the host with their packages; we want the commands, not a
# router here. Only reached when this run installed the package, so nobody's own service is stopped.
silence() {
    [ -d /run/systemd/system ] || return 0
    for service in "$@"; do
        as_root systemctl disable --quiet --now "$service.service" || true
    done
    say "the service $1 is left disabled"
}

# Debian's promtool comes with a Prometheus that would start here; all we want of the package is this one program. Its
# tests skip without it.
extract_promtool() {
    have promtool || [ -x $venv/bin/promtool ] && return
    folder=$(mktemp -d)
    if have apt-get && have dpkg-deb; then
        say "fetching promtool from Debian's package of Prometheus"
        apt-cache show prometheus >/dev/null 2>&1 || apt_update
        # root's apt would rather fetch as another user, who may not write there
        (cd "$folder" && quietly apt-get download -q -o APT::Sandbox::User=root prometheus) &&
            dpkg-deb --fsys-tarfile "$folder"/prometheus_*.deb | tar -x -C "$folder" ./usr/bin/promtool &&
            install -m 755 "$folder/usr/bin/promtool" $venv/bin/promtool
    fi
    rm -rf "$folder"
    [ -x $venv/bin/promtool ] || say "no promtool here: its tests are skipped"
}

# ---- Python ------------------------------------------------------------------------------------

# A command may be there and still not run (a pyenv shim of a version that is not selected).
new_enough() { "$1" -c "import sys; sys.exit(sys.version_info < $oldest)" 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-python3 /usr/bin/python3 python3.13 python3.12 python3.11}; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# Debian's own `python3` if that will do, else a newer one beside it (Ubuntu 22.04 has 3.11).
install_python() {
    have python3 || apt_install python3 python3-venv
    find_python >/dev/null && return
    can_install python3.11
    say "$(python3 --version 2>&1) is too old; asking apt for a newer one"
    apt_update
    for version in 3.13 3.12 3.11; do
        apt-cache show "python$version-venv" >/dev/null 2>&1 || continue
        apt_install "python$version" "python$version-venv"
        return
    done
    fail "Python 3.11 or newer is needed; here is $(python3 --version 2>&1), and apt has none newer" \
        "install one (python.org, pyenv, deadsnakes) and run: make PYTHON=/path/to/python3.x"
}

chosen_python() {
    find_python && return
    [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a working Python 3.11 or newer" \
        "give the path of another one, or leave PYTHON out"
    install_python
    find_python || fail "the Python just installed does not run" "see the messages above"
}

# Debian splits ensurepip off into pythonX.Y-venv; elsewhere it is part of Python.
need_ensurepip() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null && return
    real=$("$1" -c 'import os, sys; print(os.path.realpath(sys.executable))')
    case $real in
        /usr/bin/python3*) apt_install "${real##*/}-venv" ;;
        *) fail "$real lacks the ensurepip or venv module" \
            "use another Python: make PYTHON=/usr/bin/python3" ;;
    esac
}

make_venv() {
    new_enough $venv/bin/python && $venv/bin/python -m pip --version >/dev/null 2>&1 && return
    python=$(chosen_python)
    need_ensurepip "$python"
    say "making $venv with $("$python" --version) ($python)"
    "$python" -m venv --clear $venv || fail "could not make $venv" "see Python's message above"
}

pip_install() {
    PIP_NO_INPUT=1 $venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" >&2 ||
        fail "pip could not install the packages" "read pip's message above; it needs pypi.org: behind \
a proxy set HTTPS_PROXY (and PIP_CERT if it has its own certificate), with a mirror PIP_INDEX_URL"
}

# Only wheels: no compiler needed, and no package's set-up code is run.
install_locked() {
    say "installing $(grep -c '==' "$1") locked packages ($1)"
    pip_install --require-hashes --only-binary :all: -r "$1"
}

# ---- what make asks for ------------------------------------------------------------------------

case ${1:-} in
    venv)
        make_venv
        install_locked requirements.lock
        say "building mrelay"
        pip_install --no-deps --no-build-isolation --no-index --editable .
        ;;
    dev | page) install_locked "requirements-$1.lock" ;;
    promtool) extract_promtool ;;
    root)
        shift
        need_root "this target" "the same make command"
        install_tools "$@"
        ;;
    wish)
        shift
        install_wishes "$@"
        ;;
    *) fail "setup.sh does not know '${1:-}'" "use make; 'make help' lists the targets" ;;
esac
