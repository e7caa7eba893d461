#!/usr/bin/env bash
# Install a wheel into a fresh environment and use it from an empty directory, as a newcomer would.
#   try-wheel.sh WHEEL [PACKAGES]    with PACKAGES, a directory of installed dependencies, nothing else is downloaded
set -euo pipefail
wheel=$(realpath "$1")
empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
cd "$empty"
python3 -m venv env
if [ -n "${2:-}" ]; then
    env/bin/pip install --quiet --no-index --no-deps "$wheel"
    site=$(env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf 'import site; site.addsitedir(%s)\n' "'$2'" >"$site/dependencies.pth"
else
    env/bin/pip install --quiet "$wheel"
fi
mkdir work
cd work
parity=../env/bin/candle-mi-parity
$parity --help >help.txt
$parity run --candidate stored:0.2.2 --cases 'llama/*' --only traces
$parity run --candidate 0.2.2 --cases llama/hub --only traces
../env/bin/python - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("model")
PY
$parity check model --tokens 1,2,3,4,5 && exit 1 || [ $? -eq 1 ] # transformers 5 saves it, which candle-mi misreads
echo 'def test_mine(assert_parity): assert_parity(model="model", tokens=[[1, 2, 3]], candidate="torch")' >test_mine.py
../env/bin/python -m pytest --quiet test_mine.py
$parity maint fields && exit 1 || [ $? -eq 2 ] # says that it needs a clone
