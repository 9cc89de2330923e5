#!/usr/bin/env bash
# Makes the reference curves of run.sh again, with the flags that run.sh has now: after a change of recipe, model, data
# or tokenizer. Only the seed of the training differs between the runs; the data stay those of seed 42.
#
#   bash assets/curves/make.sh smoke                        of the smoke test (about 2 minutes a seed on 2 CPU cores)
#   SEEDS="42 43" bash assets/curves/make.sh default        of the default run on a CPU (about 15 minutes a seed)
#   bash assets/curves/make.sh gpu                          of the default run on a GPU
#
# Settings: SEEDS="42 43 44", and those of run.sh. What is done is skipped, what was interrupted goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

KIND="${1:-smoke}" SEEDS="${SEEDS:-42 43 44}"
SMOKE="" LONG=125 SHORT=25 AT=""       # steps between evaluations of the long and of the short stages
[ "$KIND" = smoke ] && SMOKE=--smoke-test LONG=30 SHORT=10 AT=/smoke

for seed in $SEEDS; do
    for name in data tokenizer pretrain sft reward dpo; do
        OUT="out/curves-$seed" SEED=42 \
            PRETRAIN_ARGS="${PRETRAIN_ARGS:-} --seed $seed --eval_interval $LONG" \
            SFT_ARGS="${SFT_ARGS:-} --seed $seed --eval_interval $LONG" \
            REWARD_ARGS="${REWARD_ARGS:-} --seed $seed --eval_interval $SHORT" \
            DPO_ARGS="${DPO_ARGS:-} --seed $seed --eval_interval $SHORT" \
            bash run.sh $SMOKE $name
    done
done
for name in pretrain sft reward dpo; do
    runs=()
    for seed in $SEEDS; do runs+=("out/curves-$seed$AT/logs/$name"); done
    "${VENV_DIR:-.venv}/bin/python" logs.py "${runs[@]}" --reference "assets/curves/$name-$KIND.json"
done
