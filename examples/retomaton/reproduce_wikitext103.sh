#!/usr/bin/env bash
# The paper's WikiText-103 results, from raw text to tables and figures: perplexity over the share of searches saved, for
# kNN-LM, AdaptRet, and RetoMaton with several clusterings and without clusters (its Figures 3 and 5).
#
#   examples/retomaton/reproduce_wikitext103.sh                    all of it: 8 GPUs for days, 250 GB of disk
#   examples/retomaton/reproduce_wikitext103.sh --download         takes the released model, datastore, index and
#                                                                  clusters instead of making them: 12 GB, one GPU
#   examples/retomaton/reproduce_wikitext103.sh --scale small --text FOLDER
#                                                                  the same path on local text and a small model, under
#                                                                  half an hour on two cores; not the paper's numbers
#
# --text FOLDER    a folder with texts, tokens separated by spaces, named *train*, *valid* and *test* (at full scale they
#                  are fetched by examples/language_model/prepare-wikitext-103.sh where they are not given); of several
#                  *test* files each gets its own tables and figures
# --out FOLDER     where everything goes (reproduce-wikitext103, or ...-small)
# --megabytes N    small scale: how much of the training text to use (8)
# --evaluate N     small scale: how many kilobytes of the validation text and of each test text to use (200)
# --updates N      small scale: how long to train (3000)
# --plan           only say what would be done, and what it takes
#
# Each command line is shown before it runs. If the script is interrupted, the same command continues: complete stages are
# skipped. Delete the folder to start from the beginning.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/lib.sh"
parse_options "$@"
RUN=${OUT:-$ROOT/reproduce-wikitext103$([[ $SCALE == small ]] && echo -small || true)}
DATA=$RUN/data-bin
MODEL=$RUN/checkpoints/checkpoint_best.pt
LMBDA=0.25 KNN_TEMP=1 K=1024 MERGE=15 NEIGHBOURS=()

if [[ $SCALE == small ]]; then
    [[ -n $TEXT ]] || fail "--scale small needs --text FOLDER"
    plan 3 "small scale: $MEGABYTES MB of $TEXT
 1 binarise, 1 min   2 train $UPDATES updates, 5 to 10 min   3 save and index the datastore, 4 min
 4 three clusterings, 4 min   5 scores, searches, AdaptRet, 5 min   6 sweeps, tables, figures, 4 min; 4 GB of memory"
    begin "small $MEGABYTES $EVALUATE $UPDATES $TEXT"
    train=$(text_of "$TEXT" train) valid=$(text_of "$TEXT" valid dev)
    tests_of "$TEXT"
    stage text first_lines "$train" $((MEGABYTES * 1000)) "$RUN/train.tokens"
    stage text-valid first_lines "$valid" "$EVALUATE" "$RUN/valid.tokens"
    tests=()
    for i in "${!TESTS[@]}"; do
        tests+=("$RUN/${SPLITS[i]}.tokens")
        stage "text-${SPLITS[i]}" first_lines "${TESTS[i]}" "$EVALUATE" "${tests[i]}"
    done
    [[ -e $RUN/done/preprocess ]] || rm -rf "$DATA"
    stage preprocess python preprocess.py --only-source --thresholdsrc 3 --workers 2 --destdir "$DATA" \
        --trainpref "$RUN/train.tokens" --validpref "$RUN/valid.tokens" \
        --testpref "$(joined "${tests[@]}")"
    small_model "$(wc -l <"$DATA/dict.txt")"
    stage train python train.py "$DATA" --save-dir "$RUN/checkpoints" "${ARCHITECTURE[@]}" "${OPTIMISATION[@]}" \
        --sample-break-mode none --max-lr 3e-3 --max-update "$UPDATES"
    LM=(--sample-break-mode none --context-window 128 --max-tokens 4096)
    STORE=("${LM[@]}") INDEX=(--ncentroids 1024 --code_size 32) SAMPLE=150000 K=512 LMBDA='' KNN_TEMP=''
    SEARCH=(--probe 16 --knn-sim-func do_not_recomp_l2 --no-load-keys --move-dstore-to-mem)
    NEIGHBOURS=(--k 16 --probe 2)
    TAUS=("${SMALL_TAUS[@]}")
    # as in the paper, one cluster for a hundred entries and one for a thousand
    build_datastore wiki "$DATA" "$MODEL"
    count=$(entries "$RUN/wiki/dstore16")
    build_datastore wiki "$DATA" "$MODEL" $((count / 100)) $((count / 1000))
    methods wiki "$DATA" "$MODEL" "$RUN/wiki/dstore16" "$RUN/wiki/knn.index" "In-domain stand-in ($(basename "$TEXT"))"
    report wiki
    exit
fi

LM=(--sample-break-mode complete --context-window 2560 --max-tokens 3072)
STORE=(--sample-break-mode none --context-window 1536 --max-tokens 3072 --dstore-size 103225485)
SEARCH=(--probe 32 --dstore-size 103225485 --knn-sim-func do_not_recomp_l2 --no-load-keys --move-dstore-to-mem)
INDEX=(--num_keys_to_add_at_a_time 500000)
SAMPLE=40000000
if ((DOWNLOAD)); then
    plan 20 "full scale from the released files: model 1 GB, values 0.8 GB, index 7.5 GB, clusters 2.5 GB
 1 download   2 scores and searches of 0.46 M tokens, an hour on a GPU   3 sweeps, tables, figures, an hour; 24 GB of memory"
    begin "full download"
    fetch "$S3/wt103/wiki103_preprocessed.tar.gz" "$RUN/download/wiki103_preprocessed.tar.gz"
    stage unpack tar -xzf "$RUN/download/wiki103_preprocessed.tar.gz" -C "$RUN/download"
    DATA=$(dirname "$(find "$RUN/download" -name dict.txt | head -n 1)")
    MODEL=$RUN/download/wt103_checkpoint_best.pt
    fetch https://nlp.stanford.edu/projects/knnlm/wt103_checkpoint_best.pt "$MODEL"
    fetch "$S3/wt103/dstore16_vals.npy" "$RUN/download/dstore16_vals.npy" $((103225485 * 8))
    fetch "$S3/wt103/knn16.index" "$RUN/download/knn16.index"
    MEMBERS=() TESTS=(test) SPLITS=(test)
    for file in clusters_s40000000_k1000000_members.pkl clusters_s20000000_k500000_members.pkl \
        dstore_merge15_members_sp.pkl; do
        fetch "$S3/wt103/$file" "$RUN/download/$file"
        MEMBERS+=("$RUN/download/$file")
    done
    methods wiki "$DATA" "$MODEL" "$RUN/download/dstore16" "$RUN/download/knn16.index" "WikiText-103, test" wikitext103
    report wiki
    exit
fi
plan 250 "full scale from the text:
 1 text and binarised text, an hour   2 train, 8 GPUs for days   3 save the datastore, 211 GB, hours on a GPU
 4 index of 7.5 GB, hours   5 four clusterings, days on many cores   6 scores and searches, an hour on a GPU
 7 sweeps, tables, figures, an hour; 64 GB of memory"
begin "full $TEXT"
if [[ -z $TEXT ]]; then
    TEXT=$RUN/text
    mkdir -p "$TEXT"
    stage text bash -c "cd '$TEXT' && bash '$ROOT/examples/language_model/prepare-wikitext-103.sh'"
    TEXT=$(dirname "$(find "$TEXT" -name wiki.train.tokens | head -n 1)")
fi
[[ -e $RUN/done/preprocess ]] || rm -rf "$DATA"
train=$(text_of "$TEXT" train) valid=$(text_of "$TEXT" valid dev)
tests_of "$TEXT"
stage preprocess python preprocess.py --only-source --workers "$(nproc)" --destdir "$DATA" \
    --trainpref "$train" --validpref "$valid" --testpref "$(joined "${TESTS[@]}")"
stage train python train.py --task language_modeling "$DATA" --save-dir "$RUN/checkpoints" \
    --arch transformer_lm_wiki103 --max-update 286000 --max-lr 1.0 --t-mult 2 --lr-period-updates 270000 \
    --lr-scheduler cosine --lr-shrink 0.75 --warmup-updates 16000 --warmup-init-lr 1e-07 --min-lr 1e-09 \
    --optimizer nag --lr 0.0001 --clip-norm 0.1 --criterion adaptive_loss --max-tokens 3072 --update-freq 3 \
    --tokens-per-sample 3072 --seed 1 --sample-break-mode none --skip-invalid-size-inputs-valid-test \
    --ddp-backend=no_c10d --fp16
build_datastore wiki "$DATA" "$MODEL" 1000000 500000 100000
methods wiki "$DATA" "$MODEL" "$RUN/wiki/dstore16" "$RUN/wiki/knn.index" "WikiText-103, test" wikitext103
report wiki
