#!/usr/bin/env bash
# Install the wheels of a directory into a fresh environment and use them from an empty one, as a newcomer would.
#   try-wheel.sh DIST [PACKAGES]    with PACKAGES, a directory of installed dependencies, nothing is downloaded
set -euo pipefail
dist=$(realpath "$1")
empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
cd "$empty"
python3 -m venv env
if [ -n "${2:-}" ]; then
    env/bin/pip install --quiet --no-index --no-deps "$dist"/candle_mi_parity-*.whl
    site=$(env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf 'import site; site.addsitedir(%s)\n' "'$2'" >"$site/dependencies.pth"
else
    env/bin/pip install --quiet "$dist"/candle_mi_parity-*.whl
fi
mkdir work
cd work
parity=../env/bin/candle-mi-parity
ends() { local code=0; "${@:2}" || code=$?; [ "$code" -eq "$1" ]; } # ends CODE COMMAND…
$parity --help >help.txt
ends 2 $parity run --candidate stored:0.2.2 # says which package has what is stored
../env/bin/pip install --quiet --no-index --no-deps "$dist"/candle_mi_parity_stored-*.whl
$parity run --candidate stored:0.2.2 --cases 'llama/*' --only traces
$parity run --candidate 0.2.2 --cases llama/hub --only traces
../env/bin/python - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("model")
PY
ends 1 $parity check model --tokens 1,2,3,4,5 # transformers 5 saves it, which candle-mi misreads
echo 'def test_mine(assert_parity): assert_parity(model="model", tokens=[[1, 2, 3]], candidate="torch")' >test_mine.py
../env/bin/python -m pytest --quiet test_mine.py
ends 2 $parity maint fields # says that it needs a clone
