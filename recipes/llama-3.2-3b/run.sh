#!/usr/bin/env bash
# Llama-3.2-3B: every table and figure of the paper, with the steps of ../paper.sh; --dry-run rehearses them offline.
set -euo pipefail
export FAMILY=llama-3.2-3b
export INSTRUCT=meta-llama/Llama-3.2-3B-Instruct
export TOKENIZER=meta-llama/Llama-3.2-3B-Instruct # the base's vocabulary and the template it is tuned with
exec "$(dirname "${BASH_SOURCE[0]}")/../paper.sh" "$@"
