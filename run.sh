#!/usr/bin/env bash
# MiniLLM, the whole story: from a bare machine to a small model that chats in Chinese and English.
#
#   bash run.sh                      set up, then every stage (about 20 minutes on 2 CPU cores)
#   bash run.sh --smoke-test         the same stages, trimmed to minutes, with checks; writes to out/smoke only
#   bash run.sh check                what this machine offers to training, and what to fix
#   bash run.sh pretrain             one stage: setup data tokenizer pretrain sft reward dpo ppo grpo eval chat test
#   bash run.sh --from sft           do this stage and everything after it again
#
# A finished stage is skipped when its flags, input files and parents are unchanged; an interrupted one goes on.
# Settings: PYTHON=python3.12  VENV_DIR=.venv  OUT=out  SEED=42  PRESET=nano|tiny|small|base|moe
#           DATA_ARGS PRETRAIN_ARGS SFT_ARGS REWARD_ARGS DPO_ARGS PPO_ARGS GRPO_ARGS EVAL_ARGS: flags added to a stage
set -euo pipefail
unset CDPATH  # with it, `cd` prints where it went
cd "$(dirname "${BASH_SOURCE[0]}")"

STAGES=(data tokenizer pretrain sft reward dpo ppo grpo eval)
WANT=all FROM="" SMOKE=0
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke-test) SMOKE=1 ;;
        --from) [ $# -ge 2 ] || { echo "error: --from needs a stage; see: bash run.sh --help" >&2; exit 2; }
            FROM="$2"; shift ;;
        -h|--help) sed -n '2,12p' "$0" | cut -c3-; exit 0 ;;
        all|setup|check|data|tokenizer|pretrain|sft|reward|dpo|ppo|grpo|eval|chat|test)
            [ "$WANT" = all ] || { echo "error: '$WANT' and '$1'; name one stage, or --from $WANT" >&2; exit 2; }
            WANT="$1" ;;
        *) echo "error: '$1' is not a stage or flag; see: bash run.sh --help" >&2; exit 2 ;;
    esac
    shift
done
if [ -n "$FROM" ] && [[ " ${STAGES[*]} " != *" $FROM "* ]]; then
    echo "error: --from '$FROM' is not one of: ${STAGES[*]}" >&2; exit 2
fi
if [ -n "$FROM" ] && [ "$WANT" != all ]; then
    echo "error: --from $FROM with '$WANT'; --from is for the whole story; give one of them" >&2; exit 2
fi
PYTHON="${PYTHON:-python3}" VENV_DIR="${VENV_DIR:-.venv}" SEED="${SEED:-42}"
OUT="${OUT:-out}"
[ "$SMOKE" = 1 ] && OUT="$OUT/smoke"
export PYTHONUTF8=1

# -- Set-up: virtual environment, packages, the two Rust modules where cargo exists. Markers make the second time quick.
setup() {   # $1: requirements file
    local py="$VENV_DIR/bin/python" sources mark
    [ -x "$py" ] || { echo "setup: virtual environment in $VENV_DIR"; "$PYTHON" -m venv "$VENV_DIR"; }
    mark="$VENV_DIR/.installed-$(cat requirements.txt "$1" | cksum | cut -d' ' -f1)"
    if [ ! -e "$mark" ]; then
        echo "setup: installing $1 (torch is large: a few minutes)"
        "$py" -m pip install --quiet --disable-pip-version-check -r "$1"
        touch "$mark"
    fi
    local crate what instead
    for crate in rustbpe rustdecode; do
        what="the Rust tokenizer" instead="the Python one gives the same tokens, more slowly"
        [ "$crate" = rustdecode ] && what="decoding in Rust" instead="torch gives the same answers, more slowly"
        sources="$(cat $crate/Cargo.* $crate/src/*.rs $crate/pyproject.toml | cksum | cut -d' ' -f1)"
        mark="$VENV_DIR/.$crate-$sources"
        if [ ! -e "$mark" ] && command -v cargo > /dev/null; then
            echo "setup: building $what"
            if "$py" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps "./$crate"; then
                touch "$mark"
            else
                echo "setup: $what did not build; $instead"
            fi
        fi
    done
    PY="$(cd "$VENV_DIR/bin" && pwd)/python"
}

# -- One stage: say why and how long, keep its output in a log, name the log when it fails.
stage() {   # $1: name; $2: why, with the time to expect; rest: command
    local name="$1" why="$2" log="$OUT/logs/$1.log" start=$SECONDS
    shift 2
    mkdir -p "$OUT/logs"
    printf '\n== %s: %s\n   %s\n' "$name" "$why" "${*/#$PY/python}"
    local status=0
    # -i: Ctrl-C is for the command, whose last words tee has to pass on
    "$@" 2>&1 | tee -i "$log" || status="${PIPESTATUS[0]}"
    if [ "$status" != 0 ]; then
        printf 'error: stage %s failed with exit code %s; its log is %s\n' "$name" "$status" "$log" >&2
        exit "$status"
    fi
    printf '== %s took %d s\n' "$name" $((SECONDS - start))
}

# The data keep a mark of what they were made from, and of their names; the other scripts have marks of their own
marked() {  # $1: folder; $2: text that decides its content; true when it was made from just that and nothing is missing
    [ -e "$1/.made_from" ] && [ "$(cat "$1/.made_from")" = "$(cksum <<< "$2 $(ls "$1")")" ]
}
mark() { cksum <<< "$2 $(ls "$1")" > "$1/.made_from"; }

run_stage() {
    local d="$OUT/data" key redo="--if_needed 1" common
    [ "${REDO:-0}" = 1 ] && redo="--overwrite 1"
    common=(--save_dir "$OUT" --cache_dir "$OUT/cache" --seed "$SEED" $redo)
    case "$1" in
    data)
        key="$(cat make_data.py) $SEED $DATA_SIZE ${DATA_ARGS:-}"
        if [ "${REDO:-0}" = 0 ] && marked "$d" "$key"; then echo "== data: $d is up to date"; return; fi
        rm -f "$d/.made_from"  # before the first file is replaced
        stage data "write the embedded bilingual world for every stage (10 s)" \
            "$PY" make_data.py --output "$d" --seed "$SEED" $DATA_SIZE ${DATA_ARGS:-}
        mark "$d" "$key" ;;
    tokenizer)
        stage tokenizer "learn 3072 tokens from 2 MB of that text, all it can fill (seconds; a minute without Rust)" \
            "$PY" tokenizer.py train --data_path "$d/tokenizer.jsonl" --vocab_size 3072 --sample_mb 2 \
            --output "$OUT/tokenizer" --retrain_tokenizer "${REDO:-0}" ;;
    pretrain)
        stage pretrain "learn to predict the next token of plain text ($PRETRAIN_TIME)" \
            "$PY" train_pretrain.py "${common[@]}" --preset "$PRESET" --tokenizer "$OUT/tokenizer" \
            --data_path "$d/pretrain.train.jsonl" \
            --val_path "$d/pretrain.heldout.jsonl" $PRETRAIN ${PRETRAIN_ARGS:-} ;;
    sft)
        stage sft "learn to answer instead of continuing ($SFT_TIME)" \
            "$PY" train_sft.py "${common[@]}" --data_path "$d/sft.train.jsonl" \
            --val_path "$d/sft.heldout.jsonl" --replay_path "$d/pretrain.train.jsonl" $SFT ${SFT_ARGS:-} ;;
    reward)
        stage reward "learn which of two answers people prefer ($REWARD_TIME)" \
            "$PY" train_reward.py "${common[@]}" --data_path "$d/preference.train.jsonl" \
            --val_path "$d/preference.heldout.jsonl" $REWARD ${REWARD_ARGS:-} ;;
    dpo)
        stage dpo "prefer those answers directly, without a reward model ($DPO_TIME)" \
            "$PY" train_dpo.py "${common[@]}" --data_path "$d/preference.train.jsonl" \
            --val_path "$d/preference.heldout.jsonl" $DPO ${DPO_ARGS:-} ;;
    ppo)
        # the prompts of the pairs: of other questions the reward model has never seen an answer
        stage ppo "reinforcement learning against the reward model ($PPO_TIME)" \
            "$PY" train_ppo.py "${common[@]}" --data_path "$d/preference.train.jsonl" \
            --val_path "$d/preference.heldout.jsonl" $PPO ${PPO_ARGS:-} ;;
    grpo)
        stage grpo "reinforcement learning on answers a rule can check ($GRPO_TIME)" \
            "$PY" train_grpo.py "${common[@]}" --data_path "$d/rl.train.jsonl" \
            --val_path "$d/rl.heldout.jsonl" $GRPO ${GRPO_ARGS:-} ;;
    eval)
        stage eval "all checkpoints side by side on held-out data ($EVAL_TIME)" \
            "$PY" eval.py --mode score --weight all --save_dir "$OUT" --data_dir "$d" \
            --samples 3 --report "$OUT" $EVAL ${EVAL_ARGS:-} ;;
    esac
}

# -- Tests: what CI runs
if [ "$WANT" = test ]; then
    setup requirements-dev.txt
    "$PY" -m ruff check .
    if command -v cargo > /dev/null; then
        for crate in rustbpe rustdecode; do
            (cd $crate && cargo fmt --check && cargo clippy --quiet --all-targets -- -D warnings && cargo test --quiet)
        done
    else
        echo "cargo is not installed: the Rust checks are skipped, the tests use the Python tokenizer and torch"
    fi
    exec "$PY" -m pytest
fi

setup requirements.txt
[ "$WANT" = setup ] && { echo "ready: $PY"; exit 0; }
if [ "$WANT" = check ]; then exec "$PY" common.py --check; fi
if [ "$WANT" = chat ]; then exec "$PY" eval.py --stream 1 --save_dir "$OUT"; fi

# -- How much of everything: a CPU gets the nano model, a GPU the small one; the smoke test a corner of each
FOUND='import torch; print("cuda" if torch.cuda.is_available() else "cpu")'
DEVICE=cpu
[ "$SMOKE" = 1 ] || DEVICE="$("$PY" -c "$FOUND")"
if [ "$SMOKE" = 1 ]; then
    PRESET="${PRESET:-nano}"
    DATA_SIZE="--pretrain_mb 3 --sft_samples 6000 --preference_pairs 1500 --rl_prompts 1000"
    PRETRAIN_TIME="30 s" SFT_TIME="30 s" REWARD_TIME="15 s" DPO_TIME="15 s" PPO_TIME="15 s"
    GRPO_TIME="15 s" EVAL_TIME="15 s"
    PRETRAIN="--device cpu --max_steps 240" SFT="--device cpu --max_steps 240"
    REWARD="--device cpu --max_steps 30" DPO="--device cpu --max_steps 20 --eval_prompts 100"
    PPO="--device cpu --max_steps 2 --eval_prompts 64"
    GRPO="--device cpu --max_steps 4 --optimizer muon --muon_learning_rate 2e-3 --learning_rate 1e-3 --eval_prompts 128"
    EVAL="--device cpu --limit 60"
elif [ "$DEVICE" = cuda ]; then
    PRESET="${PRESET:-small}"
    DATA_SIZE="--pretrain_mb 40 --sft_samples 90000"
    PRETRAIN_TIME="minutes on a GPU" SFT_TIME="a minute or two" REWARD_TIME="a minute"
    DPO_TIME="a minute" PPO_TIME="2 minutes"
    GRPO_TIME="2 minutes" EVAL_TIME="a minute"
    PRETRAIN="" SFT="--epochs 2" REWARD="" DPO="" PPO="" GRPO="" EVAL=""
else
    PRESET="${PRESET:-nano}"
    DATA_SIZE="--pretrain_mb 20 --sft_samples 90000"
    PRETRAIN_TIME="4 minutes on 2 cores" SFT_TIME="9 minutes" REWARD_TIME="3 minutes"
    DPO_TIME="20 s" PPO_TIME="30 s" GRPO_TIME="2 minutes" EVAL_TIME="30 s"
    PRETRAIN="--max_steps 1500" SFT="--max_steps 3500" EVAL=""
    # a small model takes larger steps than the scripts' defaults, which suit the small preset. Its four blocks have no
    # room to judge an answer as well as to expect one: two new ones on top learn that.
    REWARD="--extra_layers 2 --freeze_backbone 1 --epochs 2 --optimizer muon --muon_learning_rate 8e-3"
    REWARD="$REWARD --learning_rate 1e-3"
    DPO="--max_steps 94 --learning_rate 1e-4" PPO="--learning_rate 5e-5 --eval_prompts 400"
    GRPO="--optimizer muon --muon_learning_rate 3e-3 --learning_rate 1e-3 --schedule linear --max_steps 150"
    GRPO="$GRPO --eval_prompts 256"
fi

if [ "$WANT" != all ]; then
    [ -n "$FROM" ] && { echo "error: --from goes with the whole story, not with one stage" >&2; exit 2; }
    run_stage "$WANT"
    exit 0
fi
BEGIN=$SECONDS
for name in "${STAGES[@]}"; do
    [ "$name" = "$FROM" ] && REDO=1
    run_stage "$name"
done
"$PY" eval.py --mode summary --save_dir "$OUT"
[ "$SMOKE" = 1 ] && "$PY" tests/smoke_checks.py "$OUT"
printf '\nThe whole story took %d min %d s. Its page: %s/report.html\n' \
    $(((SECONDS - BEGIN) / 60)) $(((SECONDS - BEGIN) % 60)) "$OUT"
if [ "$SMOKE" = 1 ]; then
    echo "Next: bash run.sh"
else
    echo "Chat with it: bash run.sh chat"
fi
