#!/usr/bin/env bash
# The demo: from text to a table and a figure of RetoMaton, by the same five commands that a researcher types.
#
#   examples/retomaton/demo.sh                 the State of the Union addresses, about ten minutes on two cores
#   examples/retomaton/demo.sh --short         a tenth of the text and a worse model, about two minutes
#   examples/retomaton/demo.sh --text FOLDER   any folder of .txt files (docs/own_text.md)
#   examples/retomaton/demo.sh --test N        the last N files by name are the test text (1); 10% is that share of the text
#   examples/retomaton/demo.sh --valid N       the N files before them are for validation (2), or a share such as 10%
#   examples/retomaton/demo.sh --join-lines W  W is yes, no, or auto: whether lines are joined to paragraphs
#   examples/retomaton/demo.sh --out FOLDER    where everything goes (demo-run, or demo-run-short)
#
# Each command line is shown before it runs. A stage that ran to its end is not run again; delete the folder to start
# afresh. It ends with table.md, results.json, ppl_vs_foss.png, .svg and .pdf in the folder.
set -euo pipefail

source "$(dirname "$0")/stages.sh"

text=() parts=()
size=full
out=
while (($#)); do
    case $1 in
        --short) size=short ;;
        --text) [[ -d ${2:-} ]] || fail "--text: found ${2:-nothing}, expected a folder of .txt files"
            text=(--text "$(realpath "$2")"); shift ;;
        --test | --valid) [[ ${2:-} =~ ^[1-9][0-9]*%?$ ]] || fail "$1: found ${2:-nothing}, expected a number of files, or 10%"
            parts+=("$1" "$2"); shift ;;
        --join-lines) [[ ${2:-} =~ ^(yes|no|auto)$ ]] || fail "$1: found ${2:-nothing}, expected yes, no or auto"
            parts+=("$1" "$2"); shift ;;
        --out) [[ -n ${2:-} ]] || fail "--out: found nothing, expected a folder"
            out=$(realpath -m "$2"); shift ;;
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit ;;
        *) fail "found $1, expected --short, --text FOLDER, --test N, --valid N, --join-lines or --out FOLDER" ;;
    esac
    shift
done
cd "$(dirname "$0")/../.."
VENV=${VENV:-.venv}
if [[ -d $VENV ]]; then PATH=$(realpath "$VENV")/bin:$PATH; fi

# The only differences between the two sizes: how much text, how long to train, how long the sweeps.
if [[ $size == full ]]; then
    RUN=${out:-demo-run} speeches=100 updates=3000 lists=256 sample=150000
    skips=(0.25 0.5 0.75) taus=(9999999 256 64 16 4 1)
else
    RUN=${out:-demo-run-short} speeches=20 updates=400 lists=64 sample=40000
    skips=(0.5) taus=(9999999 64 1)
fi
((${#text[@]})) || text=(--train "$speeches")
text+=("${parts[@]}")
data=$RUN/data-bin
model=$RUN/checkpoints/checkpoint_best.pt
dstore=$RUN/dstore
# At this size, more than four threads make it slower.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))}
SECONDS=0
begin "$size $updates $lists $sample ${text[*]}"
mkdir -p "$RUN/results" "$dstore"

# --- text, binarised text, language model ---------------------------------------------------------------------------

stage text python examples/retomaton/prepare_sotu.py "$RUN/text" "${text[@]}"

[[ -e $RUN/done/preprocess ]] || rm -rf "$data"
stage preprocess python preprocess.py --only-source --thresholdsrc 2 --workers 2 --destdir "$data" \
    --trainpref "$RUN/text/train.txt" --validpref "$RUN/text/valid.txt" --testpref "$RUN/text/test.txt"

# The architecture of the WikiText-103 model with fewer and narrower layers. The most frequent eighth of the words gets
# the full width, the next three eighths a quarter of it, the rest a sixteenth.
words=$(wc -l <"$data/dict.txt")
first=$((words / 8 > 4 ? words / 8 : 4))
cutoff=$first,$((words / 2 > first ? words / 2 : first + 1))
stage train python train.py "$data" --task language_modeling --save-dir "$RUN/checkpoints" \
    --arch transformer_lm_wiki103 --decoder-layers 2 --decoder-attention-heads 4 --decoder-ffn-embed-dim 512 \
    --decoder-embed-dim 128 --decoder-input-dim 128 --decoder-output-dim 128 \
    --adaptive-input-cutoff "$cutoff" --adaptive-softmax-cutoff "$cutoff" --adaptive-softmax-dropout 0 \
    --dropout 0.1 --attention-dropout 0 --activation-dropout 0 \
    --criterion adaptive_loss --ddp-backend no_c10d --optimizer adam --lr-scheduler cosine \
    --lr 1e-5 --max-lr 3e-3 --warmup-updates 100 --warmup-init-lr 1e-5 --clip-norm 1.0 \
    --tokens-per-sample 256 --sample-break-mode none --max-tokens 1024 --max-update "$updates" \
    --no-epoch-checkpoints --save-interval-updates 500 --keep-interval-updates 1 --log-format simple --log-interval 100

# --- datastore, index, clusters -------------------------------------------------------------------------------------

# Every token is scored, and every key made, with at least this many tokens of context.
lm=(--path "$model" --sample-break-mode none --context-window 128 --max-tokens 4096)
keys=(--model-overrides "{'knn_keytype': 'last_ffn_input'}" --knn-keytype last_ffn_input)

stage save python eval_lm.py "$data" "${lm[@]}" "${keys[@]}" --gen-subset train \
    --save-knnlm-dstore --dstore-mmap "$dstore/dstore16" --dstore-fp16

# At least four hundred entries per list of the index.
entries=$(($(wc -c <"$dstore/dstore16_vals.npy") / 8))
lists=$((entries / 400 < lists ? entries / 400 + 1 : lists))

stage build python build_dstore.py --dstore_mmap "$dstore/dstore16" --dstore_fp16 --faiss_index "$dstore/knn.index" \
    --ncentroids "$lists" --code_size 32

# About one cluster per hundred entries; an entry's value takes 8 bytes.
clusters=$((entries > 100 ? entries / 100 : 1))
sample=$((entries < sample ? entries : sample))
stage kmeans python kmeans.py --dstore "$dstore/dstore16" --num-clusters "$clusters" --sample "$sample" \
    --algorithm two-level --save "$dstore/clusters"

# --- one evaluation a method ----------------------------------------------------------------------------------------

# evaluate NAME FLAGS...: the test text with these flags
evaluate() {
    local name=$1
    shift
    stage "eval-$name" python eval_lm.py "$data" "${lm[@]}" --gen-subset test "$@" \
        --results-json "$RUN/results/$name.json"
}

# Keys have an eighth of the paper's dimensions: at temperature 1 the softmax puts nearly all its mass on the nearest entry.
knn=("${keys[@]}" --knnlm --dstore-filename "$dstore/dstore16" --indexfile "$dstore/knn.index"
    --k 512 --probe 8 --lmbda 0.2 --knn-temp 6 --knn-sim-func do_not_recomp_l2 --no-load-keys --move-dstore-to-mem)

evaluate lm
evaluate knnlm "${knn[@]}" --no-pointer
for share in "${skips[@]}"; do
    evaluate "skip-$share" "${knn[@]}" --strategy random_skip --skip-probability "$share"
done
for tau in "${taus[@]}"; do
    evaluate "retomaton-$tau" "${knn[@]}" --min-knns "$tau"
    evaluate "clusters-$tau" "${knn[@]}" --min-knns "$tau" \
        --members "$dstore/clusters_s${sample}_k${clusters}_members.pkl"
done

# --- table and picture ----------------------------------------------------------------------------------------------

show python examples/retomaton/report.py "$RUN/results" --output "$RUN"
python examples/retomaton/report.py "$RUN/results" --output "$RUN"
printf '\nIn %s: table.md, results.json, ppl_vs_foss.png, .svg and .pdf. ' "$RUN"
printf 'This run took %d min %d s.\n' $((SECONDS / 60)) $((SECONDS % 60))
