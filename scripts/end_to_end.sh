#!/bin/sh
# Goes from problems to a better policy, offline: builds pairs, trains, evaluates before and after, and compares.
#   scripts/end_to_end.sh GSM8K_TRAIN.jsonl GSM8K_TEST.jsonl OUTPUT_FOLDER
# It uses SmolLM2-135M, 4 responses to each of 100 training problems, 20 steps, and 50 test problems.
set -eu
train=$1 test=$2 out=$3

step() {
    name=$1; shift
    began=$(date +%s)
    "$@"
    echo "== $name: $(($(date +%s) - began)) s"
}

responses="sampling.max_new_tokens=128 generation.batch_size=32 generation.chunk=128"
plan="model=smollm2 data=gsm8k data.problems.path=$train data.problems.limit=100 pairing.samples=4
    pairing.chosen=own_then_gold sampling.temperature=0.8 $responses"
bench="benchmark=gsm8k benchmark.gsm8k.path=$test benchmark_limit=50 $responses"

step pairs sage build-pairs $plan hydra.run.dir="$out/pairs"
step train sage train model=smollm2 data.path="$out/pairs/pairs.jsonl" steps=20 batch_size=4 data.max_length=384 \
    micro_batch_tokens=1024 optimizer.lr=5e-6 loss.nll_weight=0.1 hydra.run.dir="$out/train"
step before sage eval model=smollm2 $bench hydra.run.dir="$out/before"
step after sage eval model=hf model.path="$out/train/final" $bench hydra.run.dir="$out/after"
step compare sage eval --compare "$out/before" "$out/after"
