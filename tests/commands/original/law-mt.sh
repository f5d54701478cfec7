# The commands for Law-MT with the WMT19 language model, as users paste them; each begins with its name.

# == law-preprocess
TEXT=law
python preprocess.py --only-source \
    --trainpref $TEXT/train.txt --validpref $TEXT/valid.txt --testpref $TEXT/test.txt \
    --srcdict wmt19.en/dict.txt --destdir data-bin/law --workers 20

# == law-lm
python eval_lm.py data-bin/law \
    --path wmt19.en/model.pt \
    --sample-break-mode eos --max-tokens 2048 --context-window 0 \
    --softmax-batch 1024 --gen-subset test --remove-bpe

# == law-save
python eval_lm.py data-bin/law \
    --path wmt19.en/model.pt \
    --sample-break-mode eos --max-tokens 2048 \
    --softmax-batch 1024 --gen-subset train \
    --context-window 0 --tokens-per-sample 512 \
    --dstore-mmap checkpoints/law/dstore16 --knn-keytype 'last_ffn_input' \
    --dstore-size 19068709 --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --log-interval 100 --save-knnlm-dstore --dstore-fp16

# == law-build
python build_dstore.py \
    --dstore_mmap checkpoints/law/dstore16 \
    --dstore_size 19068709 \
    --faiss_index checkpoints/law/knn.19048862.index \
    --num_keys_to_add_at_a_time 500000 \
    --starting_point 0

# == law-kmeans
python kmeans.py --dstore checkpoints/law/dstore16 --dstore-size 19068709 \
    --num-clusters 200000 --sample 40000000 --dim 1536 --save checkpoints/law/law_clusters

# == law-knnlm
python eval_lm.py data-bin/law \
    --path wmt19.en/model.pt \
    --sample-break-mode eos --max-tokens 2048 \
    --context-window 0 --softmax-batch 1024000 \
    --gen-subset test --dstore-filename checkpoints/law/dstore16 \
    --indexfile checkpoints/law/knn.19048862.index \
    --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --k 1024 --lmbda 0.9 --dstore-size 19068709 --knn-keytype last_ffn_input \
    --probe 32 --knnlm --dstore-fp16 --knn-sim-func "do_not_recomp_l2" --no-load-keys --move-dstore-to-mem --knnlm-gpu \
    --remove-bpe --no-pointer

# == law-no-clusters
python eval_lm.py data-bin/law \
    --path wmt19.en/model.pt \
    --sample-break-mode eos --max-tokens 2048 \
    --context-window 0 --softmax-batch 1024000 \
    --gen-subset test --dstore-filename checkpoints/law/dstore16 \
    --indexfile checkpoints/law/knn.19048862.index \
    --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --k 1024 --lmbda 0.9 --dstore-size 19068709 --knn-keytype last_ffn_input \
    --probe 32 --knnlm --dstore-fp16 --knn-sim-func "do_not_recomp_l2" --no-load-keys --move-dstore-to-mem --knnlm-gpu \
    --remove-bpe --min-knns 1 --max-knns 1024

# == law-retomaton
MEMBERS=checkpoints/law/law_clusters_s40000000_k200000_members.pkl
python eval_lm.py data-bin/law \
    --path wmt19.en/model.pt \
    --sample-break-mode eos --max-tokens 2048 \
    --context-window 0 --softmax-batch 1024000 \
    --gen-subset test --dstore-filename checkpoints/law/dstore16 \
    --indexfile checkpoints/law/knn.19048862.index \
    --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --k 1024 --lmbda 0.9 --dstore-size 19068709 --knn-keytype last_ffn_input \
    --probe 32 --knnlm --dstore-fp16 --knn-sim-func "do_not_recomp_l2" --no-load-keys --move-dstore-to-mem --knnlm-gpu \
    --remove-bpe --min-knns 1 --max-knns 1024 --members ${MEMBERS}

# == law-retomaton-always
MEMBERS=checkpoints/law/law_clusters_s40000000_k200000_members.pkl
python eval_lm.py data-bin/law \
    --path wmt19.en/model.pt \
    --sample-break-mode eos --max-tokens 2048 \
    --context-window 0 --softmax-batch 1024000 \
    --gen-subset test --dstore-filename checkpoints/law/dstore16 \
    --indexfile checkpoints/law/knn.19048862.index \
    --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --k 1024 --lmbda 0.9 --dstore-size 19068709 --knn-keytype last_ffn_input \
    --probe 32 --knnlm --dstore-fp16 --knn-sim-func "do_not_recomp_l2" --no-load-keys --move-dstore-to-mem --knnlm-gpu \
    --remove-bpe --min-knns 9999999 --max-knns 1024 --members ${MEMBERS}

# == law-lambdas
MEMBERS=checkpoints/law/law_clusters_s40000000_k200000_members.pkl
for LMBDA in 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9; do
python eval_lm.py data-bin/law \
    --path wmt19.en/model.pt \
    --sample-break-mode eos --max-tokens 2048 \
    --context-window 0 --softmax-batch 1024000 \
    --gen-subset test --dstore-filename checkpoints/law/dstore16 \
    --indexfile checkpoints/law/knn.19048862.index \
    --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --k 1024 --lmbda ${LMBDA} --dstore-size 19068709 --knn-keytype last_ffn_input \
    --probe 32 --knnlm --dstore-fp16 --knn-sim-func "do_not_recomp_l2" --no-load-keys --move-dstore-to-mem --knnlm-gpu \
    --remove-bpe --min-knns 1 --max-knns 1024 --members ${MEMBERS}
done

# == law-finetune
python train.py --task language_modeling data-bin/law \
    --save-dir checkpoints/law-finetune --restore-file wmt19.en/model.pt --reset-optimizer --reset-dataloader \
    --arch transformer_lm_gbw --decoder-embed-dim 1536 --decoder-input-dim 1024 --decoder-output-dim 1024 \
    --decoder-layers 20 --decoder-ffn-embed-dim 6144 \
    --max-update 30000 --max-lr 1.0 --t-mult 2 --lr-period-updates 27000 --lr-scheduler cosine --lr-shrink 0.6 \
    --warmup-updates 4000 --warmup-init-lr 1e-07 --min-lr 1e-09 --optimizer nag --lr 0.0001 --clip-norm 0.1 \
    --criterion cross_entropy --max-tokens 1024 --update-freq 2 --tokens-per-sample 512 --seed 1 --fp16 \
    --sample-break-mode eos --skip-invalid-size-inputs-valid-test --ddp-backend=no_c10d

# == finetuned-lm
python eval_lm.py data-bin/law --path checkpoints/law/finetuned.pt \
    --sample-break-mode eos --max-tokens 2048 --context-window 0 --softmax-batch 1024 --gen-subset test --remove-bpe

# == finetuned-save
python eval_lm.py data-bin/law --path checkpoints/law/finetuned.pt \
    --sample-break-mode eos --max-tokens 2048 --softmax-batch 1024 --gen-subset train \
    --context-window 0 --tokens-per-sample 512 \
    --dstore-mmap checkpoints/law/dstore16_finetuned_size19068709_embed1536_fp16 --knn-keytype 'last_ffn_input' \
    --dstore-size 19068709 --model-overrides "{'knn_keytype': 'last_ffn_input'}" --save-knnlm-dstore --dstore-fp16

# == finetuned-build
python build_dstore.py \
    --dstore_mmap checkpoints/law/dstore16_finetuned_size19068709_embed1536_fp16 --dstore_size 19068709 \
    --faiss_index checkpoints/law/knn_finetuned.index --num_keys_to_add_at_a_time 500000 --starting_point 0

# == finetuned-knnlm
python eval_lm.py data-bin/law \
    --path checkpoints/law/finetuned.pt \
    --sample-break-mode eos --max-tokens 2048 \
    --context-window 0 --softmax-batch 1024000 \
    --gen-subset test --dstore-filename checkpoints/law/dstore16_finetuned_size19068709_embed1536_fp16 \
    --indexfile checkpoints/law/knn_finetuned.index \
    --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --k 1024 --lmbda 0.25 --dstore-size 19068709 --knn-keytype last_ffn_input \
    --probe 32 --knnlm --dstore-fp16 --knn-sim-func "do_not_recomp_l2" --no-load-keys --move-dstore-to-mem --knnlm-gpu \
    --remove-bpe --no-pointer

# == finetuned-retomaton
MEMBERS=checkpoints/law/law_finetuned_clusters_s20000000_k200000_members.pkl
python eval_lm.py data-bin/law \
    --path checkpoints/law/finetuned.pt \
    --sample-break-mode eos --max-tokens 2048 \
    --context-window 0 --softmax-batch 1024000 \
    --gen-subset test --dstore-filename checkpoints/law/dstore16_finetuned_size19068709_embed1536_fp16 \
    --indexfile checkpoints/law/knn_finetuned.index \
    --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --k 1024 --lmbda 0.25 --dstore-size 19068709 --knn-keytype last_ffn_input \
    --probe 32 --knnlm --dstore-fp16 --knn-sim-func "do_not_recomp_l2" --no-load-keys --move-dstore-to-mem --knnlm-gpu \
    --remove-bpe --min-knns 1 --max-knns 1024
