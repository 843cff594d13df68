#!/bin/sh
# What a machine must have before anything is installed: `check_machine.sh PYTHON`. Else a sentence and exit code 1.
python=$1
name_another="name another with make PYTHON=..."

fail() {
    echo "$1" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 ||
    fail "Muster needs Python 3.11 or newer, and there is no $python here: install it, or $name_another"

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    fail "$python does not run: install Python 3.11 or newer, or $name_another"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Muster needs Python 3.11 or newer, and $python is $version: install a newer one, or $name_another"

"$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
    fail "$python cannot make virtual environments: install its venv module (on Debian: apt install python3-venv)"

for compiler in "${CXX:-c++}" g++ clang++; do
    command -v "$compiler" >/dev/null 2>&1 && exit 0
done
echo "hint: there is no C++ compiler here; everything works without one"
