"""The groups in which the help of each command shows its flags, and what has no effect in it (see
`fairseq.flag_help`)."""

from __future__ import annotations

from dataclasses import replace

from fairseq.flag_help import Layout

_LOSS_SCALE = """
--fp16-no-flatten-grads --fp16-init-scale --fp16-scale-window --fp16-scale-tolerance --min-loss-scale
--threshold-loss-scale
"""
_TRAINING_ONLY = f"""
--log-interval --log-format --tensorboard-logdir --criterion --optimizer --lr-scheduler --empty-cache-freq
--all-gather-list-size {_LOSS_SCALE}
"""
_OF_CHECKPOINT = "the checkpoint's setting counts"

PREPROCESSING = Layout(
    groups={
        "Text": "--trainpref --validpref --testpref --only-source --source-lang --target-lang --align-suffix",
        "Words": "--tokenizer --bpe",
        "Tokens of a Hugging Face model": """
            --hf-tokenizer --hf-documents --document-separator --text-field --name-field --hf-eos""",
        "Dictionary": """
            --srcdict --tgtdict --joined-dictionary --thresholdsrc --thresholdtgt --nwordssrc --nwordstgt
            --padding-factor --dict-only""",
        "Output": "--destdir --dataset-impl --workers --no-progress-bar",
        "Files of earlier runs": "--force",
        "Extensions and help": "--user-dir --help",
    },
    accepted="--alignfile",
    hidden=f"--task --seed --cpu --fp16 --bf16 --memory-efficient-fp16 {_TRAINING_ONLY}",
    needs="--trainpref",
    example="%(prog)s --only-source --trainpref train.txt --validpref valid.txt --testpref test.txt --destdir data-bin",
)

TRAINING = Layout(
    groups={
        "Model and data": "data --arch --task --train-subset --dataset-impl --output-dictionary-size",
        "Samples and batches": """
            --sample-break-mode --tokens-per-sample --max-target-positions --truncate-sequence --add-bos-token
            --max-tokens --max-sentences --required-batch-size-multiple --num-workers --curriculum
            --fix-batches-to-gpus --self-target --future-target --past-target""",
        "Optimisation": """
            --criterion --optimizer --lr --lr-scheduler --min-lr --stop-min-lr --update-freq --clip-norm
            --sentence-avg""",
        "When to stop": "--max-update --max-epoch --patience",
        "Validation": """
            --valid-subset --validate-interval --validate-interval-updates --disable-validation
            --fixed-validation-seed --max-tokens-valid --max-sentences-valid --skip-invalid-size-inputs-valid-test
            --best-checkpoint-metric --maximize-best-checkpoint-metric""",
        "Checkpoints to save": """
            --save-dir --save-interval --save-interval-updates --keep-interval-updates --keep-last-epochs
            --keep-best-checkpoints --no-epoch-checkpoints --no-last-checkpoints --no-save-optimizer-state --no-save""",
        "Files of earlier runs": """
            --restore-file --finetune-from-model --reset-optimizer --reset-lr-scheduler --reset-dataloader
            --reset-meters --optimizer-overrides --force""",
        "Output": "--results-json --log-interval --log-format --no-progress-bar --tensorboard-logdir",
        "Device and precision": f"""
            --cpu --device-id --seed --torch-compile --fp16 --bf16 --memory-efficient-fp16 {_LOSS_SCALE}
            --empty-cache-freq""",
        "Extensions and help": "--tokenizer --bpe --user-dir --help",
    },
    accepted="""
        --ddp-backend --distributed-world-size --distributed-rank --distributed-backend
        --distributed-init-method --distributed-port --distributed-no-spawn --bucket-cap-mb
        --find-unused-parameters --broadcast-buffers --fast-stat-sync --all-gather-list-size
        --decoder-normalize-before --character-embeddings --character-filters --character-embedding-dim
        --char-embedder-highway-layers""",
    hidden="""
        --knn-keytype --probe --k --dstore-size --dstore-filename --indexfile --lmbda --knn-sim-func
        --faiss-metric-type --no-load-keys --dstore-fp16 --move-dstore-to-mem""",
    texts={
        "--task": "language_modeling: to be given, as fairseq's default, translation, is not in this package",
        "--tokens-per-sample": "longest sample (default: 1024)",
        "--max-tokens": "most tokens in a batch; this or --max-sentences is needed",
        "--tokenizer": "kept in the checkpoint, for models opened from Python: moses, nltk, space",
        "--bpe": "likewise: fastbpe, gpt2, sentencepiece, subword_nmt",
        "--character-embeddings": "refused: character convolutions are not supported",
        "--character-filters": "of character embeddings",
        "--character-embedding-dim": "of character embeddings",
        "--char-embedder-highway-layers": "of character embeddings",
    },
    needs="--task --max-tokens",
    example="%(prog)s data-bin --task language_modeling --arch transformer_lm --optimizer adam --lr 0.0005"
    " --tokens-per-sample 512 --max-tokens 4096 --max-update 5000 --save-dir checkpoints",
)

_POINTERS = "Pointers of RetoMaton"

EVALUATION = Layout(
    groups={
        "Model and data": "data --path --gen-subset --model-overrides --dataset-impl --output-dictionary-size --task",
        "Context and batches": """
            --context-window --sample-break-mode --truncate-sequence --max-tokens --max-sentences --num-workers
            --num-shards --shard-id""",
        "Windows": "--max-length --stride --rolling --drop-remainder --group-documents",
        "Hugging Face models": "--hf-dtype --hf-device-map --knn-module",
        "Words": "--remove-bpe --bpe --output-word-probs --output-word-stats",
        "Retrieval": "--knnlm --lmbda --knn-temp --strategy --check-strategy --lockstep-tokens",
        "Datastore": """
            --dstore-filename --dstore-dir --dstore-size --dstore-fp16 --dstore-weights --no-load-keys
            --move-dstore-to-mem --knn-keytype""",
        "Search index": "--indexfile --index --k --probe --knn-sim-func --faiss-metric-type --index-recall --knnlm-gpu",
        _POINTERS: """
            --no-pointer --min-knns --max-knns --members --tie-order --target-foss --target-foss-subset
            --target-foss-tokens""",
        "What later commands read": """
            --save-knnlm-dstore --dstore-mmap --save-scores --save-searches --save-features""",
        "Output": "--results-json --results-path --no-progress-bar",
        "Files of earlier runs": "--check --force",
        "Device and precision": "--cpu --fp16 --bf16 --memory-efficient-fp16 --seed",
        "Extensions and help": "--user-dir --help",
    },
    accepted="""
        --softmax-batch --local --quiet --tokens-per-sample --max-target-positions --add-bos-token --self-target
        --future-target --past-target""",
    hidden=f"--tokenizer --skip-invalid-size-inputs-valid-test --required-batch-size-multiple {_TRAINING_ONLY}",
    texts={
        "--max-tokens": "most tokens in a batch (default: 36000, with Hugging Face models 4096)",
        "--task": "language_modeling, the only one here and the default",
        "--bpe": "how words were cut, with --remove-bpe of the same name: fastbpe, gpt2, sentencepiece, subword_nmt",
        "--memory-efficient-fp16": "the same as --fp16 here",
        "--seed": "seed of strategies that draw at random (default: 1)",
        "--tokens-per-sample": "the checkpoint's counts (of Hugging Face models: this one)",
        **dict.fromkeys(("--max-target-positions", "--add-bos-token", "--future-target"), _OF_CHECKPOINT),
        **dict.fromkeys(("--self-target", "--past-target"), "refused unless the model has such targets"),
    },
    needs="--path",
    example="%(prog)s data-bin --path checkpoints/checkpoint_best.pt --gen-subset valid --knnlm"
    " --dstore-filename dstore --indexfile index --members members.pkl --lmbda 0.25",
)

_NOT_EXAMINED = {  # flags of an evaluation that the doctor does not look at
    "Words": "",
    "What later commands read": "",
    "Retrieval": "--knnlm --lmbda --knn-temp --strategy --check-strategy",
    "Search index": "--indexfile --index --k --probe --knn-sim-func --faiss-metric-type",
    _POINTERS: "--no-pointer --min-knns --max-knns --members --tie-order --target-foss",
    "Output": "--results-json",
    "Files of earlier runs": "--force",
}

DOCTOR = replace(
    EVALUATION,
    groups={title: flags for title, flags in {**EVALUATION.groups, **_NOT_EXAMINED}.items() if flags},
    hidden=f"""
        {EVALUATION.hidden} {EVALUATION.groups["Words"]} {EVALUATION.groups["What later commands read"]}
        --lockstep-tokens --target-foss-subset --target-foss-tokens --index-recall --knnlm-gpu --results-path
        --no-progress-bar --check""",
    texts={**EVALUATION.texts, "--knnlm": "implied by --dstore-filename"},
    example="%(prog)s data-bin --path checkpoints/checkpoint_best.pt --gen-subset valid --dstore-filename dstore"
    " --indexfile index --members members.pkl --lmbda 0.25",
)

_NOT_GENERATING = {  # flags of an evaluation that say nothing of prompts
    "Context and batches": "--max-sentences",
    "Windows": "",
    "Words": "--tokenizer --bpe",
    _POINTERS: "--no-pointer --min-knns --max-knns --members --tie-order",
    "What later commands read": "",
    "Search index": "--indexfile --index --k --probe --knn-sim-func --faiss-metric-type --knnlm-gpu",
    "Retrieval": "--knnlm --lmbda --knn-temp --strategy --check-strategy",
    "Model and data": "data --path --model-overrides --task",
    "Output": "--json --results-json --no-progress-bar",
    "Files of earlier runs": "--force",
}

INTERACTIVE = Layout(
    groups={
        "Prompts": "--input --prefix-size --buffer-size",
        "Generation": """
            --max-len-b --max-len-a --min-len --beam --nbest --lenpen --unnormalized --unkpen --no-repeat-ngram-size
            --sampling --sampling-topk --sampling-topp --temperature --draft""",
        **{title: flags for title, flags in {**EVALUATION.groups, **_NOT_GENERATING}.items() if flags},
    },
    hidden=f"""
        --skip-invalid-size-inputs-valid-test --required-batch-size-multiple {_TRAINING_ONLY} --gen-subset
        --dataset-impl --output-dictionary-size --context-window --sample-break-mode --truncate-sequence --max-tokens
        --num-workers --num-shards --shard-id {EVALUATION.groups["Windows"]} --remove-bpe --output-word-probs
        --output-word-stats --lockstep-tokens --index-recall --target-foss --target-foss-subset --target-foss-tokens
        {EVALUATION.groups["What later commands read"]} --results-path --check {EVALUATION.accepted}""",
    texts={
        "--max-sentences": "prompts that are continued together (default: 1; always 1 with --beam and --draft)",
        "--task": "language_modeling, the only one here and the default",
        "--tokenizer": "how a prompt is cut into words: moses, nltk, space",
        "--bpe": "and words into pieces: fastbpe, gpt2, sentencepiece, subword_nmt",
        "--memory-efficient-fp16": "the same as --fp16 here",
        "--seed": "seed of sampling, and of strategies that draw at random (default: 1)",
        "--results-json": "write settings, versions, counts and times here",
    },
    needs="--path",
    example="%(prog)s data-bin --path checkpoints/checkpoint_best.pt --input prompts.txt --max-len-b 50 --knnlm"
    " --dstore-filename dstore --indexfile index --members members.pkl --lmbda 0.25",
)
