#!/bin/sh
# Goes from problems to a better policy on the packaged arithmetic task, in minutes on a CPU: builds pairs, trains,
# evaluates before and after, and compares.
#   scripts/end_to_end_arithmetic.sh OUTPUT_FOLDER
set -eu
out=$1
bench="benchmark=arithmetic sampling.max_new_tokens=32 generation.batch_size=256 generation.chunk=512"

sage build-pairs +experiment=arithmetic hydra.run.dir="$out/pairs"
sage train +experiment=arithmetic data.path="$out/pairs/pairs.jsonl" hydra.run.dir="$out/train"
sage eval model=arithmetic $bench hydra.run.dir="$out/before"
sage eval model=hf model.path="$out/train/final" $bench hydra.run.dir="$out/after"
sage eval --compare "$out/before" "$out/after"
