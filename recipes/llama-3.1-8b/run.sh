#!/usr/bin/env bash
# Llama-3.1-8B: every table and figure of the paper, with the steps of ../paper.sh; --dry-run rehearses them offline.
set -euo pipefail
export FAMILY=llama-3.1-8b
export INSTRUCT=meta-llama/Llama-3.1-8B-Instruct
export TOKENIZER=meta-llama/Llama-3.1-8B-Instruct # the base's vocabulary and the template it is tuned with
exec "$(dirname "${BASH_SOURCE[0]}")/../paper.sh" "$@"
