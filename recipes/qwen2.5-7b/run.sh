#!/usr/bin/env bash
# Qwen2.5-7B: every table and figure of the paper, with the steps of ../paper.sh; --dry-run rehearses them offline.
set -euo pipefail
export FAMILY=qwen2.5-7b
export INSTRUCT=Qwen/Qwen2.5-7B-Instruct
export TOKENIZER=Qwen/Qwen2.5-7B # the base's vocabulary and the template it is tuned with
exec "$(dirname "${BASH_SOURCE[0]}")/../paper.sh" "$@"
