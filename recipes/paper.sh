#!/usr/bin/env bash
# Every table and figure of the paper for one family of models. recipes/<family>/run.sh calls this.
#
#   recipes/llama-3.2-3b/run.sh --dry-run     rehearse all of it offline, with tiny random models
#   recipes/llama-3.2-3b/run.sh               do it; what is finished is not done again
#
# Set before:
#   HARMBENCH     a checkout of github.com/centerforaisafety/HarmBench
#   MT_BENCH      a folder with MT-Bench's question.jsonl and judge_prompts.jsonl
#   JUDGE_URL     an OpenAI-compatible endpoint, its key in OPENAI_API_KEY
#   JUDGE_MODEL   the model asked there
# May be set:
#   BEHAVIORS     HarmBench's behaviours (default: the 80 of its validation set)
#   ATTACKER      writes the prompts of Zero-Shot and SFS (default: Mixtral 8x7B, as HarmBench does)
#   NUM_PROCESSES processes of a training; divide gradient_accumulation_steps by it
#   STEPS         of a training of the sweeps (default: 500)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${1:-} == --dry-run ]]; then
  exec python recipes/rehearse.py "$FAMILY"
elif [[ $# -gt 0 ]]; then
  echo "run.sh: unknown option $1; --dry-run is the only one" >&2
  exit 2
fi
for name in HARMBENCH MT_BENCH JUDGE_URL JUDGE_MODEL; do
  [[ -n ${!name:-} ]] || { echo "run.sh: $name is not set; recipes/paper.sh says what it is" >&2; exit 2; }
done

runs=runs/$FAMILY
recipe=recipes/$FAMILY
behaviors=${BEHAVIORS:-$HARMBENCH/data/behavior_datasets/harmbench_behaviors_text_val.csv}
targets=$HARMBENCH/data/optimizer_targets/harmbench_targets_text.json

# step FILE COMMAND…: run the command, unless the last file that it writes is there.
step() {
  if [[ -e $1 ]]; then
    echo "have $1"
    return
  fi
  echo "+ ${*:2}"
  "${@:2}"
}

# train METHOD NAME: by NAME's YAML file, from its last checkpoint where it was interrupted.
train() {
  local checkpoint
  checkpoint=$({ find "$runs/$2" -maxdepth 1 -name 'checkpoint-*' 2>/dev/null || true; } | sort -V | tail -n 1)
  step "$runs/$2/plot_align_record.json" plot-align "$1" --config "$recipe/$2.yaml" \
    ${checkpoint:+--resume_from_checkpoint "$checkpoint"} ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"}
}

# redteam FOLDER MODEL [option…]
redteam() {
  plot-align redteam "$2" --behaviors "$behaviors" --targets "$targets" --skip_copyright \
    --judge harmbench,refusal --harmbench "$HARMBENCH" --options recipes/attacks.yaml --output "$1" "${@:3}"
}

# Data, the same for all families.
step runs/data/hh/sft.jsonl python recipes/data/hh_rlhf.py Anthropic/hh-rlhf \
  --output runs/data/hh/train.jsonl --sft runs/data/hh/sft.jsonl
step runs/data/hh/test.jsonl python recipes/data/hh_rlhf.py Anthropic/hh-rlhf --split test \
  --output runs/data/hh/test.jsonl
step runs/data/logic/sft.jsonl python recipes/data/logic.py \
  --gsm8k openai/gsm8k --math DigitalLearningGmbH/MATH-lighteval \
  --output runs/data/logic/train.jsonl --sft runs/data/logic/sft.jsonl
step runs/data/logic/test.jsonl python recipes/data/logic.py \
  --gsm8k openai/gsm8k --math DigitalLearningGmbH/MATH-lighteval --split test \
  --output runs/data/logic/test.jsonl

# Preferences, and the sixteen models.
for data in hh logic; do
  step "$runs/$data.record.json" plot-align estimate "runs/data/$data/train.jsonl" --tokenizer "$TOKENIZER" \
    --output "$runs/$data.safetensors"
  for plot in "" -plot; do
    train sft "$data-sft$plot"
  done
  for plot in "" -plot; do
    train dpo "$data-dpo$plot"
    train dpo "$data-aot$plot"
    train pro "$data-pro$plot"
  done
done

# Tables: human values, and logic and problem solving.
for data in hh logic; do
  plot-align evaluate "$INSTRUCT" "$runs/$data"-{sft,dpo,aot,pro}{,-plot} --suite recipes/suite.yaml \
    --reference "$runs/$data-sft" --preference "$runs/$data.safetensors" \
    --behaviors "$behaviors" --targets "$targets" --mt_bench "$MT_BENCH" \
    --judge_url "$JUDGE_URL" --judge_model "$JUDGE_MODEL" --allow_code_execution --output "$runs/evaluation/$data"
done

# Robustness: ASR of six attacks; against the number of cases (Zero-Shot) and against GCG's update steps.
for method in sft dpo aot pro; do
  plain=hh-$method
  step "$runs/redteam/redteam-$plain-$plain-plot-direct-gcg-pez-gbda-uat.json" \
    redteam "$runs/redteam" "$runs/$plain" --compare "$runs/$plain-plot" \
    --attacks direct,gcg,pez,gbda,uat --snapshots 10,50,100,250,500
  step "$runs/redteam/redteam-$plain-$plain-plot-zero_shot-sfs.json" \
    redteam "$runs/redteam" "$runs/$plain" --compare "$runs/$plain-plot" \
    --attacks zero_shot,sfs --attacker "${ATTACKER:-mistralai/Mixtral-8x7B-Instruct-v0.1}"
done

# Sensitivity to alpha, beside DEFT's reward; and what stands in for transport with embeddings: KL, JS, the 0-1 cost,
# other lines, the bare token id.
step "$runs/alpha/summary.json" plot-align sweep --train "$recipe/hh-dpo-plot.yaml" --output "$runs/alpha" \
  --steps "${STEPS:-500}" --divergence w1 deft_log --alpha 0.01 0.1 1 10 100
step "$runs/ablations/summary.json" plot-align sweep --train "$recipe/hh-dpo-plot.yaml" --output "$runs/ablations" \
  --steps "${STEPS:-500}" --divergence w1 kl js tv --geometry norm vocabulary principal sliced
for model in "$runs"/alpha/runs/*/ "$runs"/ablations/runs/*/; do
  name=$(basename "$model")
  step "$runs/redteam/redteam-$name-direct.json" redteam "$runs/redteam" "$model" --attacks direct
done

# Overhead: a step with PLOT against the same without, interleaved.
step "$runs/overhead.json" python benchmarks/overhead.py --shapes "$FAMILY" --what step --arms on paper measured \
  --dtype bfloat16 --output "$runs/overhead.json"

# Three pages: human values with robustness, logic and problem solving, sensitivity and ablations.
plot-align report "$runs"/evaluation/hh "$runs"/hh-*/plot_align_record.json "$runs/hh.record.json" \
  "$runs"/redteam/redteam-hh-*.json -o "$runs/human-values.html" --title "$FAMILY: human values" \
  --paper --baseline hh-dpo
plot-align report "$runs"/evaluation/logic "$runs"/logic-*/plot_align_record.json "$runs/logic.record.json" \
  -o "$runs/logic.html" --title "$FAMILY: logic and problem solving" --paper --baseline logic-dpo
plot-align report "$runs"/{alpha,ablations}/summary.json "$runs"/redteam/redteam-dpo-*.json \
  -o "$runs/sensitivity.html" --title "$FAMILY: sensitivity to alpha, and ablations" --paper
