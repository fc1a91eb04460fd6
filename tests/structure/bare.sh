#!/bin/sh
# usage: bare.sh PYTHON EXTRA…
# Installs the package with one extra and nothing else, as an image does, and runs in that environment
# the tests of what may be imported where. For each extra a new environment in a temporary folder.
set -eu
python=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
trap 'exit 130' INT TERM

# From a copy: pip builds beside the sources and leaves its folders there.
mkdir "$temporary/source"
(cd "$root" && cp -R pyproject.toml README.md LICENSE app worker migrations "$temporary/source")
for extra in "$@"; do
  echo "An environment with the extra '$extra' alone:"
  "$python" -m venv "$temporary/$extra"
  "$temporary/$extra/bin/python" -m pip --disable-pip-version-check install -q --no-input \
    -c "$root/constraints.txt" "$temporary/source[$extra]" pytest
  (cd "$root" && LUTHIER_BARE_EXTRA=$extra "$temporary/$extra/bin/pytest" -p no:cacheprovider --noconftest \
    tests/structure/test_bare_interpreter.py)
done
