# Functions of reproduce_wikitext103.sh and reproduce_law.sh: options, stages that are skipped when complete, resumable
# downloads, and all steps from a trained language model to tables and figures. Sourced, not run.
#
# The caller sets the arrays and names in capitals that a function's comment lists. No state but files (stages.sh).

S3=https://retomaton.s3.us-east-2.amazonaws.com
HERE=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
ROOT=$(realpath "$HERE/../..")
source "$HERE/stages.sh"
TAUS=(9999999 1024 512 256 128 64 32 16 4 1)
SMALL_TAUS=(9999999 256 64 16 4 1)
SHARES=(0.1 0.3 0.5 0.7 0.9)

# parse_options "$@": sets SCALE, OUT, TEXT, LM_TEXT, MEGABYTES, EVALUATE (kilobytes), UPDATES, DOWNLOAD, PLAN_ONLY;
# enters the repository.
parse_options() {
    SCALE=full OUT='' TEXT='' LM_TEXT='' MEGABYTES=8 EVALUATE=200 UPDATES=3000 DOWNLOAD=0 PLAN_ONLY=0
    while (($#)); do
        case $1 in
            --scale) [[ ${2:-} == full || ${2:-} == small ]] || fail "--scale: found ${2:-nothing}, expected full or small"
                SCALE=$2; shift ;;
            --text | --lm-text) [[ -d ${2:-} ]] || fail "$1: found ${2:-nothing}, expected a folder"
                if [[ $1 == --text ]]; then TEXT=$(realpath "$2"); else LM_TEXT=$(realpath "$2"); fi; shift ;;
            --out) [[ -n ${2:-} ]] || fail "--out: found nothing, expected a folder"
                OUT=$(realpath -m "$2"); shift ;;
            --megabytes | --evaluate | --updates)
                [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "$1: found ${2:-nothing}, expected a number"
                case $1 in --updates) UPDATES=$2 ;; --evaluate) EVALUATE=$2 ;; *) MEGABYTES=$2 ;; esac
                shift ;;
            --download) DOWNLOAD=1 ;;
            --plan) PLAN_ONLY=1 ;;
            -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit ;;
            *) fail "found $1, expected --scale, --text, --lm-text, --out, --megabytes, --evaluate, --updates, --download or --plan" ;;
        esac
        shift
    done
    cd "$ROOT"
    local venv=${VENV:-.venv}
    if [[ -d $venv ]]; then PATH=$(realpath "$venv")/bin:$PATH; fi
    export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
    GPU=()
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then GPU=(--knnlm-gpu); fi
}

# plan GIGABYTES TEXT: prints the plan; stops if the disk is too small, or if only the plan was requested.
plan() {
    local free folder=$RUN
    while [[ ! -d $folder ]]; do folder=$(dirname "$folder"); done
    free=$(($(df -Pk "$folder" | awk 'END {print $4}') / 1000000))
    printf '%s\n' "$2" "disk: about $1 GB in $RUN, which has $free GB free" \
        "cores: $(nproc); memory: $(awk '/MemTotal/ {printf "%d GB", $2 / 1e6}' /proc/meminfo 2>/dev/null || echo unknown)" \
        "GPU for searches: $( ((${#GPU[@]})) && echo yes || echo no)" 
    if ((PLAN_ONLY)); then exit 0; fi
    if (($1 > free)) && ! compgen -G "$RUN/done/save-*" >/dev/null; then fail "$RUN: $free GB free, about $1 GB needed; choose another --out"; fi
}

# fetch URL FILE [BYTES]: downloads once, continues an incomplete file, and checks the size (the server's, unless given).
fetch() {
    local url=$1 file=$2 want=${3:-} have
    if [[ -z $want && ! -e $file ]]; then
        want=$(curl -fsSIL "$url" | tr -d '\r' | awk 'tolower($1) == "content-length:" {n = $2} END {print n}') ||
            fail "$url: cannot be reached; check the network, or build it by leaving out --download"
    fi
    if [[ -e $file ]]; then
        have=$(stat -c %s "$file")
        if [[ -z $want || $have == "$want" ]]; then return; fi
        fail "$file: found $have bytes, expected $want; delete it"
    fi
    mkdir -p "$(dirname "$file")"
    show curl -fL --retry 5 -C - -o "$file.part" "$url"
    curl -fL --retry 5 -C - -o "$file.part" "$url" ||
        fail "$url: the download stopped; run the same command again to go on"
    have=$(stat -c %s "$file.part")
    if [[ -n $want && $have != "$want" ]]; then fail "$file.part: found $have bytes, expected $want; delete it"; fi
    mv "$file.part" "$file"
}

# text_of FOLDER NAME...: the only file in the folder whose name contains one of the names.
text_of() {
    local folder=$1 name file found=()
    shift
    for name in "$@"; do
        for file in "$folder"/*"$name"*; do
            if [[ -f $file ]]; then found+=("$file"); fi
        done
    done
    ((${#found[@]} == 1)) || fail "$folder: found ${#found[@]} files named *$1*, expected one"
    echo "${found[0]}"
}

# tests_of FOLDER: sets TESTS, the files in the folder named *test*, and SPLITS, what preprocess.py calls them: test,
# test1 and so on.
tests_of() {
    local file
    TESTS=() SPLITS=()
    for file in "$1"/*test*; do
        if [[ ! -f $file ]]; then continue; fi
        SPLITS+=("test$( ((${#TESTS[@]})) && echo ${#TESTS[@]} || true)")
        TESTS+=("$file")
    done
    ((${#TESTS[@]})) || fail "$1: found 0 files named *test*, expected at least one"
}

# joined WORDS...: with commas between them.
joined() { local IFS=,; echo "$*"; }

# first_lines FILE KILOBYTES OUT: about that much of the text's beginning, in whole lines.
first_lines() {
    head -c "$(($2 * 1000))" "$1" | sed '$d' >"$3.tmp"
    if (($(stat -c %s "$1") <= $2 * 1000)); then cp "$1" "$3.tmp"; fi
    mv "$3.tmp" "$3"
}

# small_model WORDS: fills ARCHITECTURE and OPTIMISATION for a language model that two cores train in minutes: the
# WikiText-103 architecture with fewer and narrower layers, frequent words in full width, rare ones in less.
small_model() {
    local cutoff=$(($1 / 8)),$(($1 / 2))
    ARCHITECTURE=(--task language_modeling --arch transformer_lm_wiki103 --decoder-layers 2 --decoder-attention-heads 4
        --decoder-ffn-embed-dim 512 --decoder-embed-dim 128 --decoder-input-dim 128 --decoder-output-dim 128
        --adaptive-input-cutoff "$cutoff" --adaptive-softmax-cutoff "$cutoff" --adaptive-softmax-dropout 0
        --dropout 0.1 --attention-dropout 0 --activation-dropout 0 --criterion adaptive_loss --ddp-backend no_c10d)
    OPTIMISATION=(--optimizer adam --lr-scheduler cosine --lr 1e-5 --warmup-init-lr 1e-5
        --warmup-updates $((UPDATES / 30 + 1)) --clip-norm 1.0 --tokens-per-sample 256 --max-tokens 1024
        --no-epoch-checkpoints --save-interval-updates 500
        --keep-interval-updates 1 --skip-invalid-size-inputs-valid-test --log-format simple --log-interval 100)
}

# build_datastore NAME DATA MODEL CLUSTERS...: datastore, index and clusterings under $RUN/NAME. Reads LM (flags of
# eval_lm for text and context), STORE (more of them when saving), INDEX (flags of build_dstore.py), SAMPLE and, where
# neighbours are to be merged greedily into clusters too, MERGE and NEIGHBOURS (flags of their search). Sets MEMBERS.
build_datastore() {
    local name=$1 data=$2 model=$3 count folder=$RUN/$1
    shift 3
    mkdir -p "$folder"
    stage "save-$name" python eval_lm.py "$data" --path "$model" "${STORE[@]}" --gen-subset train \
        --knn-keytype last_ffn_input --save-knnlm-dstore --dstore-mmap "$folder/dstore16" --dstore-fp16
    stage "build-$name" python build_dstore.py --dstore_mmap "$folder/dstore16" --faiss_index "$folder/knn.index" \
        "${INDEX[@]}"
    MEMBERS=()
    for count in "$@"; do
        stage "cluster-$name-$count" python kmeans.py --dstore "$folder/dstore16" --num-clusters "$count" \
            --sample "$SAMPLE" --save "$folder/kmeans" --algorithm two-level
        MEMBERS+=("$folder/kmeans_s${SAMPLE}_k${count}_members.pkl")
    done
    if [[ -n ${MERGE:-} && $# -gt 0 ]]; then
        stage "greedy-$name" python -m fairseq_cli.greedy_merge --dstore "$folder/dstore16" \
            --indexfile "$folder/knn.index" --merge "$MERGE" "${NEIGHBOURS[@]}" --output members \
            --save "$folder/greedy"
        MEMBERS+=("$folder/greedy_merge${MERGE}_members.pkl")
    fi
}

# entries PREFIX: how many entries a datastore has; a value takes 8 bytes.
entries() { echo $(($(stat -c %s "$1_vals.npy") / 8)); }

# methods NAME DATA MODEL PREFIX INDEXFILE TITLE [PAPER]: everything from a datastore to tables and figures, under
# $RUN/NAME; for the first test text they are called results, for others results1 and so on. Reads LM, SEARCH (flags of
# the search), K, MEMBERS, TESTS, SPLITS, GPU, and LMBDA and KNN_TEMP, which are chosen by perplexity on the validation
# text where they are empty.
methods() {
    local name=$1 data=$2 model=$3 prefix=$4 index=$5 title=$6 paper=${7:-} split i heading output folder=$RUN/$1 own=()
    local stores=(--dstore-filename "$prefix" --indexfile "$index" "${SEARCH[@]}" "${GPU[@]}")
    mkdir -p "$folder"
    for split in valid "${SPLITS[@]}"; do
        stage "scores-$name-$split" python eval_lm.py "$data" --path "$model" "${LM[@]}" --gen-subset "$split" \
            --knnlm "${stores[@]}" --k "$K" --lmbda 0.25 --no-pointer --save-scores "$folder/scores-$split" \
            --save-searches --save-features --results-json "$folder/knnlm-$split.json"
    done
    local lmbda=$LMBDA temperature=$KNN_TEMP
    if [[ -z $lmbda ]]; then
        stage "tune-$name" python -m fairseq_cli.sweep --scores "$folder/scores-valid" --output "$folder/tune" \
            "${stores[@]}" --k "$K" --strategy knnlm retomaton --min-knns 9999999 1 --members "${MEMBERS[0]}" \
            --lmbda 0.05 0.1 0.15 0.2 0.25 0.3 0.4 0.5 0.6 0.7 0.8 0.9 --knn-temp 1 2 4 6 8 12 16 24 32 48 64 \
            --figure "$folder/tune" --title "$title: validation text"
        read -r lmbda temperature < <(python "$HERE/tables.py" "$folder/tune.json" --best knnlm)
        echo "chosen on the validation text: --lmbda $lmbda --knn-temp $temperature"
    fi
    stage "adaptret-$name" python -m fairseq_cli.adaptret --scores "$folder/scores-valid" --data "$data" \
        --save "$folder/adaptret.pt" "${stores[@]}" --k "$K" --knn-temp "$temperature"
    if [[ -n $paper ]]; then own=(--paper "$paper"); fi
    for i in "${!SPLITS[@]}"; do
        split=${SPLITS[i]} heading=$title output=$folder/${SPLITS[i]/test/results}
        if ((${#SPLITS[@]} > 1)); then heading="$title: $(basename "${TESTS[i]}")"; fi
        stage "sweep-$name-$split" python -m fairseq_cli.sweep --scores "$folder/scores-$split" --output "$output" \
            "${stores[@]}" --k "$K" --lmbda "$lmbda" --knn-temp "$temperature" \
            --strategy knnlm "random_skip --skip-probability ${SHARES[*]}" \
            "adaptret --adaptret-checkpoint $folder/adaptret.pt --target-foss 0 ${SHARES[*]}" retomaton \
            --members "${MEMBERS[@]}" none --min-knns "${TAUS[@]}" --figure "$output" --title "$heading" "${own[@]}"
        local table=(python "$HERE/tables.py" "$output.json" --title "$heading" "${own[@]}"
            --output "$folder/tables${split#test}.md")
        show "${table[@]}"
        "${table[@]}"
    done
}

# report: ends a run; all tables in one file.
report() {
    local name
    for name in "$@"; do cat "$RUN/$name"/tables*.md; echo; done >"$RUN/tables.md"
    printf '\nIn %s: tables.md; in each folder results.json, .csv, .md and the figures. ' "$RUN"
    printf 'This run took %d min %d s.\n' $((SECONDS / 60)) $((SECONDS % 60))
}
