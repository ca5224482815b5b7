#!/usr/bin/env bash
# What a GPU is worth most for, in 25 minutes, resumably: the tests that need one, the costs of a step, then rows of the paper's
# tables. Called again it goes on where it stopped; what is finished is kept in results/gpu.
#
#   DATA=folder with cifar10   OUT=where runs go (runs/gpu)   MINUTES=25   PYTHON=.venv/bin/python
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python} DATA=${DATA:-data} OUT=${OUT:-runs/gpu} MINUTES=${MINUTES:-25}
end=$((SECONDS + 60 * MINUTES))
left() { echo $((end - SECONDS)); }
mkdir -p "$OUT"
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device is at hand"' || exit 1

once() { # NAME COMMAND...: runs it once; what it prints is kept
  local name=$1
  shift
  [ -f "$OUT/$name.done" ] && return
  [ "$(left)" -gt 60 ] || return
  timeout --signal=INT "$(left)" "$@" 2>&1 | tee "$OUT/$name.log"
  [ "${PIPESTATUS[0]}" -eq 0 ] && touch "$OUT/$name.done"
}

row() { # RECIPE CHANGES...: trains it, or goes on
  local out="$OUT/$(echo "$*" | tr ' =/' '---')"
  [ -f "$out.done" ] && return
  [ "$(left)" -gt 60 ] || return
  if [ -f "$out/last.pt" ]; then
    timeout --signal=INT "$(left)" "$PYTHON" -m dnw resume "$out"
  else
    rm -rf "$out"
    timeout --signal=INT "$(left)" "$PYTHON" -m dnw train "$@" device=cuda --data-dir "$DATA" --out "$out"
  fi && touch "$out.done" && "$PYTHON" -m dnw results "$out" --save results/gpu
}

once tests "$PYTHON" -m pytest -q -m gpu
once selection "$PYTHON" benchmarks/selection.py --steps-only
once chain_step "$PYTHON" benchmarks/chain_step.py
once tiny_step "$PYTHON" benchmarks/tiny_step.py
for seed in 0 1 2; do
  row cifar10 "seeds=$seed"
  row cifar10_random_original "seeds=$seed"
  row cifar10_random "seeds=$seed"
done
for name in dnw random no_update targeted_dropout l1_anneal; do
  row "cifar10_mobilenet_${name}_x225" epochs=40
done
row cifar10_mobilenet_x25 epochs=40
row cifar10_discrete epochs=80
row cifar10_discrete_random epochs=80
for density in 0.1 0.05 0.02 0.2 0.5; do
  row cifar10_resnet18_dnw "density=$density" epochs=40
done
