#!/usr/bin/env bash
# Makes a vLLM server take new weights of a whole model: `rollout_command` for full fine-tuning.
#
#   scripts/vllm_reload.sh http://127.0.0.1:8000 FOLDER
#
# The server needs VLLM_SERVER_DEV_MODE=1, and to see FOLDER under the same path. Without the second request it would go
# on answering from keys and values of the old weights. Exit status: 0 when the new ones answer.
set -euo pipefail
url=${1:?the address of the server} folder=${2:?the folder of the weights}
post() { curl --fail-with-body --silent --show-error --noproxy '*' -X POST "$url$1" "${@:2}"; }

post /collective_rpc -H 'Content-Type: application/json' \
    -d "{\"method\": \"reload_weights\", \"kwargs\": {\"weights_path\": \"$folder\"}}"
post /reset_prefix_cache | grep -q '"success": *true'
