#!/usr/bin/env bash
# The paper's Law-MT results, from raw text to tables and figures: a language model of another domain with a datastore
# of legal text (its Figure 4), and the same model fine-tuned on legal text with a datastore of its own (its Table 1).
#
#   examples/retomaton/reproduce_law.sh --text FOLDER              all of it: a GPU for days, 150 GB of disk
#   examples/retomaton/reproduce_law.sh --download                 takes the released models, datastores, indexes and
#                                                                  clusters instead of making them: 25 GB, one GPU
#   examples/retomaton/reproduce_law.sh --scale small --text FOLDER --lm-text FOLDER
#                                                                  the same path on local text and a small model, under
#                                                                  half an hour on two cores; not the paper's numbers
#
# --text FOLDER    raw legal text, one sentence a line: files named *train*, *valid* (or *dev*) and *test*; of several
#                  *test* files each gets its own tables and figures
# --lm-text FOLDER small scale: tokenised text of another domain for the language model, named *train* and *valid*
# --out FOLDER     where everything goes (reproduce-law, or ...-small)
# --megabytes N    small scale: how much of each training text to use (8)
# --evaluate N     small scale: how many kilobytes of the validation text and of each test text to use (200)
# --updates N      small scale: how long to train (3000); fine-tuning takes a third of it
# --plan           only say what would be done, and what it takes
#
# Each command line is shown before it runs. If the script is interrupted, the same command continues: complete stages are
# skipped. Delete the folder to start from the beginning.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/lib.sh"
parse_options "$@"
RUN=${OUT:-$ROOT/reproduce-law$([[ $SCALE == small ]] && echo -small || true)}
DATA=$RUN/data-bin
TUNED=$RUN/finetuned/checkpoint_best.pt
K=1024
# Sentence by sentence, without context; perplexity per word.
LM=(--sample-break-mode eos --context-window 0 --max-tokens 2048 --remove-bpe)
STORE=(--sample-break-mode eos --context-window 0 --max-tokens 2048)
PREPARE=examples/language_model/prepare-law-mt.sh

# pieces TRAIN VALID FLAGS...: these texts and the tests in RAW through Moses and BPE (flags of prepare-law-mt.sh); sets
# PIECES, the results for the tests.
pieces() {
    local train=$1 valid=$2 i
    shift 2
    PIECES=()
    stage bpe-law "$PREPARE" --train "$train" --valid "$valid" --dest "$RUN/law-text" "$@"
    for i in "${!SPLITS[@]}"; do
        stage "bpe-law-${SPLITS[i]}" "$PREPARE" --test "${RAW[i]}" --dest "$RUN/law-text/${SPLITS[i]}" "$@"
        PIECES+=("$RUN/law-text/${SPLITS[i]}/test.txt")
    done
}

# clusterings FOLDER: MEMBERS of about one cluster for a hundred entries and one for five hundred.
clustered_datastore() {
    local count
    build_datastore "$@"
    count=$(entries "$RUN/$1/dstore16")
    build_datastore "$@" $((count / 100)) $((count / 500))
}

if [[ $SCALE == small ]]; then
    [[ -n $TEXT && -n $LM_TEXT ]] || fail "--scale small needs --text FOLDER and --lm-text FOLDER"
    plan 4 "small scale: $MEGABYTES MB of $LM_TEXT for the language model and of $TEXT for datastore and fine-tuning
 1 BPE and binarise, 2 min   2 train $UPDATES updates, 5 min   3 datastore, index, clusters, 4 min
 4 scores, searches, AdaptRet, sweeps, 5 min   5 fine-tune, 2 min   6 steps 3 and 4 again; 4 GB of memory"
    begin "small $MEGABYTES $EVALUATE $UPDATES $TEXT $LM_TEXT"
    lm_train=$(text_of "$LM_TEXT" train) lm_valid=$(text_of "$LM_TEXT" valid dev)
    train=$(text_of "$TEXT" train) valid=$(text_of "$TEXT" valid dev)
    tests_of "$TEXT"
    stage text-lm first_lines "$lm_train" $((MEGABYTES * 1000)) "$RUN/lm.train.txt"
    stage text-lm-valid first_lines "$lm_valid" "$EVALUATE" "$RUN/lm.valid.txt"
    stage text-law first_lines "$train" $((MEGABYTES * 1000)) "$RUN/law.train.raw"
    stage text-law-valid first_lines "$valid" "$EVALUATE" "$RUN/law.valid.raw"
    RAW=()
    for i in "${!TESTS[@]}"; do
        RAW+=("$RUN/law.${SPLITS[i]}.raw")
        stage "text-law-${SPLITS[i]}" first_lines "${TESTS[i]}" "$EVALUATE" "${RAW[i]}"
    done
    stage codes subword-nmt learn-bpe -s 6000 --input "$RUN/lm.train.txt" --output "$RUN/bpecodes"
    stage bpe-lm-train subword-nmt apply-bpe -c "$RUN/bpecodes" --input "$RUN/lm.train.txt" --output "$RUN/lm.train.bpe"
    stage bpe-lm-valid subword-nmt apply-bpe -c "$RUN/bpecodes" --input "$RUN/lm.valid.txt" \
        --output "$RUN/lm.valid.bpe"
    pieces "$RUN/law.train.raw" "$RUN/law.valid.raw" --codes "$RUN/bpecodes" --no-escape --workers 2
    [[ -e $RUN/done/preprocess-lm ]] || rm -rf "$RUN/data-bin-lm"
    stage preprocess-lm python preprocess.py --only-source --workers 2 --destdir "$RUN/data-bin-lm" \
        --trainpref "$RUN/lm.train.bpe" --validpref "$RUN/lm.valid.bpe"
    MODEL=$RUN/checkpoints/checkpoint_best.pt
    small_model "$(wc -l <"$RUN/data-bin-lm/dict.txt")"
    stage train python train.py "$RUN/data-bin-lm" --save-dir "$RUN/checkpoints" "${ARCHITECTURE[@]}" \
        "${OPTIMISATION[@]}" --sample-break-mode none --max-lr 3e-3 --max-update "$UPDATES"
    DICTIONARY=$RUN/data-bin-lm/dict.txt
    INDEX=(--ncentroids 1024 --code_size 32) SAMPLE=150000 K=512
    SEARCH=(--probe 16 --knn-sim-func do_not_recomp_l2 --no-load-keys --move-dstore-to-mem)
    TAUS=("${SMALL_TAUS[@]}")
    LMBDA_LAW='' LMBDA_TUNED='' KNN_TEMP='' TITLE="Adaptation stand-in ($(basename "$TEXT"))" PAPER=''
else
    INDEX=(--num_keys_to_add_at_a_time 500000) SAMPLE=40000000 PAPER=law
    SEARCH=(--probe 32 --knn-sim-func do_not_recomp_l2 --no-load-keys --move-dstore-to-mem)
    LMBDA_LAW=0.9 LMBDA_TUNED=0.25 KNN_TEMP=1 TITLE="Law-MT"
    if ((DOWNLOAD)); then
        plan 30 "full scale from the released files: models 13 GB with their archive, indexes 3 GB, values and clusters 1 GB
 1 download   2 scores and searches, minutes on a GPU   3 sweeps, tables, figures, half an hour; 16 GB of memory"
    else
        [[ -n $TEXT ]] || fail "found neither --text FOLDER nor --download, expected one of them"
        plan 150 "full scale from the text: the language model is downloaded (it was never trained for the paper)
 1 BPE and binarise, 10 min   2 datastore of 59 GB and index, hours on a GPU   3 clusters, hours on many cores
 4 scores, searches, sweeps, an hour   5 fine-tune, a day on 4 GPUs   6 steps 2 to 4 again; 32 GB of memory"
    fi
    begin "full $DOWNLOAD $TEXT"
    fetch https://dl.fbaipublicfiles.com/fairseq/models/lm/wmt19.en.tar.gz "$RUN/download/wmt19.en.tar.gz"
    stage unpack-lm tar -xzf "$RUN/download/wmt19.en.tar.gz" -C "$RUN/download"
    MODEL=$(find "$RUN/download/wmt19.en" -name model.pt | head -n 1)
    DICTIONARY=$(dirname "$MODEL")/dict.txt
fi

if ((DOWNLOAD)); then
    fetch "$S3/law/law_preprocessed.tar.gz" "$RUN/download/law_preprocessed.tar.gz"
    stage unpack tar -xzf "$RUN/download/law_preprocessed.tar.gz" -C "$RUN/download"
    DATA=$(dirname "$(find "$RUN/download" -path '*law*' -name dict.txt | head -n 1)")
    TUNED=$RUN/download/finetuned.pt
    tuned=dstore16_finetuned_size19068709_embed1536_fp16
    fetch "$S3/law/finetuned.pt" "$TUNED"
    fetch "$S3/law/dstore16_vals.npy" "$RUN/download/dstore16_vals.npy" $((19068709 * 8))
    fetch "$S3/law/knn.19048862.index" "$RUN/download/knn.19048862.index"
    fetch "$S3/law/${tuned}_vals.npy" "$RUN/download/${tuned}_vals.npy" $((19068709 * 8))
    fetch "$S3/law/knn_finetuned.index" "$RUN/download/knn_finetuned.index"
    for file in law_clusters_s40000000_k200000_members.pkl law_clusters_s40000000_k400000_members.pkl \
        law_finetuned_clusters_s20000000_k200000_members.pkl; do
        fetch "$S3/law/$file" "$RUN/download/$file"
    done
    SEARCH+=(--dstore-size 19068709)
    TESTS=(test) SPLITS=(test)
    MEMBERS=("$RUN/download/law_clusters_s40000000_k200000_members.pkl"
        "$RUN/download/law_clusters_s40000000_k400000_members.pkl")
    LMBDA=$LMBDA_LAW
    methods law "$DATA" "$MODEL" "$RUN/download/dstore16" "$RUN/download/knn.19048862.index" "$TITLE, news LM" law
    MEMBERS=("$RUN/download/law_finetuned_clusters_s20000000_k200000_members.pkl") LMBDA=$LMBDA_TUNED
    methods law-finetuned "$DATA" "$TUNED" "$RUN/download/$tuned" "$RUN/download/knn_finetuned.index" \
        "$TITLE, fine-tuned LM" law-finetuned
    report law law-finetuned
    exit
fi

if [[ $SCALE == full ]]; then
    train=$(text_of "$TEXT" train) valid=$(text_of "$TEXT" valid dev)
    tests_of "$TEXT"
    RAW=("${TESTS[@]}")
    pieces "$train" "$valid" --codes "$(dirname "$MODEL")/bpecodes" --workers "$(nproc)"
fi
[[ -e $RUN/done/preprocess ]] || rm -rf "$DATA"
stage preprocess python preprocess.py --only-source --workers 2 --srcdict "$DICTIONARY" --destdir "$DATA" \
    --trainpref "$RUN/law-text/train.txt" --validpref "$RUN/law-text/valid.txt" \
    --testpref "$(joined "${PIECES[@]}")"
if [[ $SCALE == small ]]; then
    clustered_datastore law "$DATA" "$MODEL"
else
    build_datastore law "$DATA" "$MODEL" 200000 400000
fi
LMBDA=$LMBDA_LAW
methods law "$DATA" "$MODEL" "$RUN/law/dstore16" "$RUN/law/knn.index" "$TITLE, LM of another domain" "$PAPER"

mkdir -p "$RUN/finetuned"
restore=(--restore-file "$MODEL" --reset-optimizer --reset-dataloader --reset-lr-scheduler --reset-meters)
if [[ -e $RUN/finetuned/checkpoint_last.pt ]]; then restore=(); fi # a killed stage goes on by itself
if [[ $SCALE == small ]]; then
    stage finetune python train.py "$DATA" --save-dir "$RUN/finetuned" "${restore[@]}" "${ARCHITECTURE[@]}" \
        "${OPTIMISATION[@]}" --sample-break-mode eos --max-lr 1e-3 --max-update $((UPDATES / 3))
    clustered_datastore law-finetuned "$DATA" "$TUNED"
else
    stage finetune python train.py --task language_modeling "$DATA" --save-dir "$RUN/finetuned" "${restore[@]}" \
        --arch transformer_lm_gbw --decoder-embed-dim 1536 --decoder-input-dim 1024 --decoder-output-dim 1024 \
        --decoder-layers 20 --decoder-ffn-embed-dim 6144 --max-update 30000 --max-lr 1.0 --t-mult 2 \
        --lr-period-updates 27000 --lr-scheduler cosine --lr-shrink 0.6 --warmup-updates 4000 \
        --warmup-init-lr 1e-07 --min-lr 1e-09 --optimizer nag --lr 0.0001 --clip-norm 0.1 \
        --criterion cross_entropy --max-tokens 1024 --update-freq 2 --tokens-per-sample 512 --seed 1 --fp16 \
        --sample-break-mode eos --skip-invalid-size-inputs-valid-test --ddp-backend=no_c10d
    build_datastore law-finetuned "$DATA" "$TUNED" 200000
    PAPER=law-finetuned
fi
LMBDA=$LMBDA_TUNED
methods law-finetuned "$DATA" "$TUNED" "$RUN/law-finetuned/dstore16" "$RUN/law-finetuned/knn.index" \
    "$TITLE, fine-tuned LM" "$PAPER"
report law law-finetuned
