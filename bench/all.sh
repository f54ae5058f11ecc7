#!/bin/sh
# Every comparison of RESULTS.md, one after the other, as rows of its table; about half an hour on two quiet cores.
#   sh bench/all.sh [rows.csv]       TRL=.venv-trl TRL_PPO=.venv-trl-ppo OURS=.venv
set -e
data=${1:-sample}
ours=${OURS:-.venv}/bin/python
compare() { "$ours" bench/compare.py "$@" --data "$data"; }
trl="--trl-python ${TRL:-.venv-trl}/bin/python"
ppo="--trl-python ${TRL_PPO:-.venv-trl-ppo}/bin/python"
for dtype in bfloat16 float32; do
    for rank in 0 16; do
        compare sft $trl --dtype $dtype --lora-rank $rank --steps 5
    done
    compare generate $trl --dtype $dtype --steps 3
done
for rank in 0 16; do
    compare dpo $trl --dtype bfloat16 --lora-rank $rank --steps 4
    compare ppo $ppo --dtype bfloat16 --lora-rank $rank --steps 1 --warm-up 0
done
