#!/usr/bin/env bash
# WikiText-103 as text: wikitext-103/wiki.{train,valid,test}.tokens in the present folder, ready for preprocess.py.
#
#   examples/language_model/prepare-wikitext-103.sh                    download (about 310 MB), check, write
#   examples/language_model/prepare-wikitext-103.sh --local PATH       from files that you have: a folder or a zip
#   examples/language_model/prepare-wikitext-103.sh --help             all options
#
# If the script is interrupted, the same command continues.
set -euo pipefail

here=$(dirname "$(realpath "$0")")
root=$(realpath "$here/../..")
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" "$here/prepare_wikitext_103.py" "$@"
