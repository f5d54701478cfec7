# The commands for WikiText-103, as users paste them; each begins with its name.

# == wiki-preprocess
TEXT=examples/language_model/wikitext-103
python preprocess.py \
    --only-source \
    --trainpref $TEXT/wiki.train.tokens \
    --validpref $TEXT/wiki.valid.tokens \
    --testpref $TEXT/wiki.test.tokens \
    --destdir data-bin/wikitext-103 \
    --workers 20

# == wiki-train
python train.py --task language_modeling \
    data-bin/wikitext-103 \
  --save-dir checkpoints/ \
  --arch transformer_lm_wiki103 \
  --max-update 286000 --max-lr 1.0 --t-mult 2 --lr-period-updates 270000 --lr-scheduler cosine --lr-shrink 0.75 \
  --warmup-updates 16000 --warmup-init-lr 1e-07 --min-lr 1e-09 --optimizer nag --lr 0.0001 --clip-norm 0.1 \
  --criterion adaptive_loss --max-tokens 3072 --update-freq 3 --tokens-per-sample 3072 --seed 1 \
  --sample-break-mode none --skip-invalid-size-inputs-valid-test --ddp-backend=no_c10d

# == wiki-lm
python eval_lm.py data-bin/wikitext-103 \
    --path checkpoints/wt103/wt103_checkpoint_best.pt \
    --sample-break-mode complete --max-tokens 3072 \
    --context-window 2560 --softmax-batch 1024 --batch-size 2 \
    --gen-subset valid

# == wiki-save
python eval_lm.py data-bin/wikitext-103 \
    --path checkpoints/wt103/wt103_checkpoint_best.pt \
    --sample-break-mode none --max-tokens 3072 \
    --softmax-batch 1024 --gen-subset train \
    --context-window 1536 --tokens-per-sample 1536 \
    --dstore-mmap checkpoints/wt103/dstore16 --knn-keytype 'last_ffn_input' \
    --dstore-size 103225485 --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --save-knnlm-dstore --dstore-fp16

# == wiki-build
python build_dstore.py \
    --dstore_mmap checkpoints/wt103/dstore16 \
    --dstore_size 103225485 \
    --faiss_index checkpoints/wt103/knn16.index \
    --num_keys_to_add_at_a_time 500000 \
    --starting_point 0

# == wiki-kmeans
python kmeans.py \
    --dstore checkpoints/wt103/dstore16 --dstore-size 103225485 \
    --num-clusters 1000000 --sample 40000000 --dim 1024 \
    --save

# == wiki-kmeans-save
SAVE=checkpoints/wt103/clusters
python kmeans.py --dstore checkpoints/wt103/dstore16 --dstore-size 103225485 \
    --num-clusters 1000000 --sample 40000000 --dim 1024 --save ${SAVE}

# == wiki-knnlm
python eval_lm.py data-bin/wikitext-103 \
    --path checkpoints/wt103/wt103_checkpoint_best.pt \
    --sample-break-mode complete --max-tokens 3072 \
    --context-window 2560 --softmax-batch 1024000 --batch-size 2 \
    --gen-subset valid --dstore-filename checkpoints/wt103/dstore16 \
    --indexfile checkpoints/wt103/knn16.index \
    --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --k 1024 --lmbda 0.25 --dstore-size 103225485 --knn-keytype last_ffn_input \
    --probe 32 --knnlm --dstore-fp16 --knn-sim-func "do_not_recomp_l2" --no-load-keys --move-dstore-to-mem --knnlm-gpu --no-pointer

# == wiki-no-clusters
python eval_lm.py data-bin/wikitext-103 \
    --path checkpoints/wt103/wt103_checkpoint_best.pt \
    --sample-break-mode complete --max-tokens 3072 \
    --context-window 2560 --softmax-batch 1024000 --batch-size 2 \
    --gen-subset valid --dstore-filename checkpoints/wt103/dstore16 \
    --indexfile checkpoints/wt103/knn16.index \
    --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --k 1024 --lmbda 0.25 --dstore-size 103225485 --knn-keytype last_ffn_input \
    --probe 32 --knnlm --dstore-fp16 --knn-sim-func "do_not_recomp_l2" --no-load-keys --move-dstore-to-mem --knnlm-gpu --min-knns 1 --max-knns 1024

# == wiki-retomaton
MEMBERS=checkpoints/wt103/clusters_s40000000_k1000000_members.pkl
python eval_lm.py data-bin/wikitext-103 \
    --path checkpoints/wt103/wt103_checkpoint_best.pt \
    --sample-break-mode complete --max-tokens 3072 \
    --context-window 2560 --softmax-batch 1024000 --batch-size 2 \
    --gen-subset valid --dstore-filename checkpoints/wt103/dstore16 \
    --indexfile checkpoints/wt103/knn16.index \
    --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --k 1024 --lmbda 0.25 --dstore-size 103225485 --knn-keytype last_ffn_input \
    --probe 32 --knnlm --dstore-fp16 --knn-sim-func "do_not_recomp_l2" --no-load-keys --move-dstore-to-mem --knnlm-gpu --min-knns 1 --max-knns 1024 --members ${MEMBERS}

# == wiki-retomaton-100
MEMBERS=checkpoints/wt103/clusters_s40000000_k1000000_members.pkl
python eval_lm.py data-bin/wikitext-103 \
    --path checkpoints/wt103/wt103_checkpoint_best.pt \
    --sample-break-mode complete --max-tokens 3072 \
    --context-window 2560 --softmax-batch 1024000 --batch-size 2 \
    --gen-subset valid --dstore-filename checkpoints/wt103/dstore16 \
    --indexfile checkpoints/wt103/knn16.index \
    --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --k 1024 --lmbda 0.25 --dstore-size 103225485 --knn-keytype last_ffn_input \
    --probe 32 --knnlm --dstore-fp16 --knn-sim-func "do_not_recomp_l2" --no-load-keys --move-dstore-to-mem --knnlm-gpu --min-knns 100 --max-knns 1024 --members ${MEMBERS}

# == wiki-retomaton-always
MEMBERS=checkpoints/wt103/clusters_s40000000_k1000000_members.pkl
python eval_lm.py data-bin/wikitext-103 \
    --path checkpoints/wt103/wt103_checkpoint_best.pt \
    --sample-break-mode complete --max-tokens 3072 \
    --context-window 2560 --softmax-batch 1024000 --batch-size 2 \
    --gen-subset valid --dstore-filename checkpoints/wt103/dstore16 \
    --indexfile checkpoints/wt103/knn16.index \
    --model-overrides "{'knn_keytype': 'last_ffn_input'}" \
    --k 1024 --lmbda 0.25 --dstore-size 103225485 --knn-keytype last_ffn_input \
    --probe 32 --knnlm --dstore-fp16 --knn-sim-func "do_not_recomp_l2" --no-load-keys --move-dstore-to-mem --knnlm-gpu --min-knns 9999999 --max-knns 1024 --members ${MEMBERS}
