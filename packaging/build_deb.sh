#!/bin/sh
# Builds dist/mrelay_VERSION_ARCH.deb: build_deb.sh PYTHON, the interpreter of an environment with mrelay in it.
# The package brings its own libraries, from requirements.lock with their hashes, in a virtual environment that uses
# the system's Python of the same minor version; nothing is downloaded when it is installed.
set -eu

python=$1
cd "$(dirname "$0")/.."
version=$("$python" -c 'import mrelay; print(mrelay.__version__)')
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
next=3.$((${minor#3.} + 1))
arch=$(dpkg --print-architecture)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
home=$root/usr/lib/mrelay
site=$home/lib/python$minor/site-packages
umask 022

put() { install -D -m 644 "$1" "$root/$2"; }

# ---- the program and its libraries ---------------------------------------------------------------

mkdir -p "$site" "$home/bin" "$work/source"
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# The compiler for bpf/ is taken from the environment; it is large, and nothing runs it.
awk '/^[^ ]/ { keep = !/^ziglang==/ } keep' requirements.lock >"$work/requirements.lock"
"$python" -m pip install --quiet --no-compile --target "$site" --only-binary :all: --require-hashes \
    -r "$work/requirements.lock"
cp -r pyproject.toml setup.py MANIFEST.in README.md LICENSE bpf src "$work/source"
rm -rf "$work/source"/src/*.egg-info
"$python" -m pip install --quiet --no-compile --target "$site" --no-deps --no-build-isolation --no-index \
    "$work/source"
# Needed to build only; and commands of the libraries', whose first line names this machine's Python.
rm -rf "$site"/setuptools* "$site"/pkg_resources "$site"/_distutils_hack "$site"/distutils-precedence.pth "$site/bin"
find "$site" -name tests -type d -prune -exec rm -rf {} +
ln -s "/usr/bin/python$minor" "$home/bin/python"
printf 'home = /usr/bin\ninclude-system-site-packages = false\nversion = %s\n' "$minor" >"$home/pyvenv.cfg"
"$python" -m compileall -q -s "$root" --invalidation-mode unchecked-hash "$site"
mkdir -p "$root/usr/bin"
printf '#!/usr/lib/mrelay/bin/python -I\nfrom mrelay.cli import main\n\nmain()\n' >"$root/usr/bin/mrelay"
chmod 755 "$root/usr/bin/mrelay"

# ---- what the system needs of it -----------------------------------------------------------------

put packaging/mrelay.service lib/systemd/system/mrelay.service
put packaging/mrelay.sysusers usr/lib/sysusers.d/mrelay.conf
put packaging/mrelay.tmpfiles usr/lib/tmpfiles.d/mrelay.conf
put packaging/relay.toml etc/mrelay/relay.toml
put packaging/debian/copyright usr/share/doc/mrelay/copyright
put docs/man/mrelay.1 usr/share/man/man1/mrelay.1
put CHANGELOG.md usr/share/doc/mrelay/changelog
put README.md usr/share/doc/mrelay/README.md
gzip -9n "$root/usr/share/man/man1/mrelay.1" "$root/usr/share/doc/mrelay/changelog"
"$python" -m mrelay completion bash >"$work/completion"
put "$work/completion" usr/share/bash-completion/completions/mrelay

# ---- the package ---------------------------------------------------------------------------------

mkdir "$root/DEBIAN"
sed -e "s/@VERSION@/$version/; s/@ARCH@/$arch/; s/@MINOR@/$minor/; s/@NEXT@/$next/" \
    -e "s/@SIZE@/$(du -sk --exclude=DEBIAN "$root" | cut -f1)/" packaging/debian/control >"$root/DEBIAN/control"
echo /etc/mrelay/relay.toml >"$root/DEBIAN/conffiles"
for script in postinst prerm postrm; do
    install -m 755 "packaging/debian/$script" "$root/DEBIAN/$script"
done
mkdir -p dist
dpkg-deb --root-owner-group -Zxz -z1 --build "$root" "dist/mrelay_${version}_$arch.deb"
