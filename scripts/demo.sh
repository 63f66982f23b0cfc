#!/bin/sh
# What `make demo` runs: a small model that is confidently wrong in places, aligned by SAGE and by plain DPO on the same
# pairs. It answers 500 held-out problems before, during and after training. `sage report` compares the two runs, and
# the last lines say what selection did.
#   scripts/demo.sh OUTPUT_FOLDER
set -eu
out=$1
sage=${SAGE:-sage}
plan="+experiment=arithmetic +benchmark=arithmetic benchmark_limit=null"

$sage train $plan hydra.run.dir="$out/sage"
$sage train $plan +baseline=dpo hydra.run.dir="$out/dpo"
$sage report "$out/sage" "$out/dpo" --output "$out"
"$(dirname "$(command -v "$sage")")/python" "$(dirname "$0")/demo_result.py" "$out"
