#!/usr/bin/env bash
# Law-MT as text for the WMT19 English language model: raw sentences through Moses' tokeniser and the model's BPE codes
# to law/{train,valid,test}.txt in the present folder, ready for preprocess.py --srcdict.
#
#   examples/language_model/prepare-law-mt.sh --train train.en --valid dev.en --test test.en --codes wmt19.en/bpecodes
#   examples/language_model/prepare-law-mt.sh --help                   all options
#
# If the script is interrupted, the same command continues with the first file that is missing.
set -euo pipefail

here=$(dirname "$(realpath "$0")")
root=$(realpath "$here/../..")
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" "$here/prepare_law_mt.py" "$@"
