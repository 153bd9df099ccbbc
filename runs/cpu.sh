#!/usr/bin/env bash
# The life of a model on two CPU cores, from pictures with noisy captions to a search over them. Reads top to bottom.
#
#   bash runs/cpu.sh WEB HUMAN HELD TEST OUT
#
# WEB, HUMAN, HELD, TEST: folders of pictures with captions (any layout `openblip info FOLDER` understands): many noisy
# ones, a few that people wrote, some more of these to see how far the filter can be trusted, and some to measure on. OUT: where everything goes. Every step resumes: run it again after
# an interruption and what is finished is not done again. Steps 2 to 5 in one command, and for more rounds than one:
#
#   openblip bootstrap --data WEB --human HUMAN --held-out 4 --threshold 0.8 --out OUT --rounds 2
#
# Needs `pip install -e ".[demo]"` and requirements/parts.txt.
set -euo pipefail
web=$1 human=$2 held=$3 test=$4 out=$5
mkdir -p "$out"

# 1. What is there?
openblip info "$web"

# 2. Pre-train on the noisy web: ITC + ITM + LM over a frozen DINOv2 ViT-S/14, text from MiniLM.
openblip train small_pretrain --data "$web" --out "$out/pretrain"

# 3. The two halves of CapFilt, fine-tuned separately from the same weights on what people wrote.
openblip train small_caption   --data "$human" --init "$out/pretrain/model" --out "$out/captioner"
openblip train small_retrieval --data "$human" --init "$out/pretrain/model" --out "$out/filter"

# 4. Write a caption for every web picture, judge both texts, keep what matches; look at $out/clean/report.html. So small
#    a filter is judged by both of its heads, and believed less than the paper's (docs/results.md).
openblip capfilt --data "$web" --human "$human" --captioner "$out/captioner/model" --filter "$out/filter/model" \
  --calibrate "$held" --threshold 0.8 --out "$out/clean"

# 5. A new model from scratch on the bootstrapped captions, and what it gained.
openblip train small_pretrain --data "$out/clean/parquet" --out "$out/bootstrapped"
for name in pretrain bootstrapped; do
  openblip eval retrieval --data "$test" --model "$out/$name/model" --out "$out/$name/retrieval.json"
  openblip eval caption --data "$test" --model "$out/$name/model" --out "$out/$name/caption.json"
done

# 6. Use it.
openblip search "a dog" --data "$test" --model "$out/bootstrapped/model"
