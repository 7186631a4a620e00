#!/bin/sh
# LoRA on 4-bit weights (QLoRA) under ZeRO-3; the packed weights are sharded too. MODEL and DATASET are names on the hub
# or folders. All other flags are those of run_lora.sh; what follows here overrides them, and flags of yours override both.
#   MODEL=runs/assets/causal_lm DATASET=runs/assets/chat examples/sft/run_qlora.sh --max_seq_len 256
set -e
here=$(dirname "$0")
export CONFIG="${CONFIG:-$here/zero3_qlora.yaml}" PROCESSES="${PROCESSES:-2}" OUTPUT="${OUTPUT:-runs/sft-qlora}"
exec "$here/run_lora.sh" \
    --per_device_train_batch_size 2 \
    --per_device_eval_batch_size 2 \
    --use_reentrant True \
    --use_4bit_quantization True \
    --use_nested_quant True \
    --bnb_4bit_compute_dtype bfloat16 \
    --bnb_4bit_quant_storage_dtype bfloat16 \
    "$@"
