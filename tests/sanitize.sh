#!/usr/bin/env bash
# Runs the tests that are marked "kernels" on kernels built with the address and undefined-behaviour sanitizers.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${VENV:-.venv}/bin/python")
if ! command -v gcc >/dev/null; then
  echo "no gcc: the kernels are not sanitized"
  exit 0
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp -r src/dnw tests pyproject.toml "$scratch"
rm -f "$scratch"/dnw/compile/_kernels*.so "$scratch"/dnw/kernels/_*_native*.so
sanitized() { gcc -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -shared -fPIC -o "$scratch/$2" "$1" -lm; }
sanitized src/dnw/compile/_kernels.c dnw/compile/_kernels.so
sanitized src/dnw/kernels/exchange.c dnw/kernels/_exchange_native.so
sanitized src/dnw/kernels/graph.c dnw/kernels/_graph_native.so
cd "$scratch"
export PYTHONPATH=$scratch:$scratch/tests ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 DNW_FRESH_MEMORY=1
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
"$python" -c "from dnw.compile._native import kernels; assert '$scratch' in kernels()._name, kernels()"
"$python" -c "from dnw.kernels._exchange import library; assert '$scratch' in library()._name, library()"
"$python" -c "from dnw.kernels._graph import library; assert '$scratch' in library()._name, library()"
"$python" -m pytest -q -n auto --dist loadgroup -p no:cacheprovider -o timeout=600 -m kernels $(grep -l mark.kernels tests/test_*.py)
