"""optimum's ORTModelForCausalLM, on transformers 4: a text as its tokenizer gives it, or ids, several left-padded."""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

folder, request = sys.argv[1], json.loads(sys.argv[2])
model = ORTModelForCausalLM.from_pretrained(folder)
prompt = request["prompt"]
if isinstance(prompt, str):
    # As users write it: whatever the tokenizer gives goes into the model.
    inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
else:
    rows = prompt if isinstance(prompt[0], list) else [prompt]
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
output = model.generate(**inputs, max_new_tokens=request["new_tokens"], do_sample=False)
ids = inputs["input_ids"].tolist()
tokens = output[:, len(ids[0]) :].tolist()
several = not isinstance(prompt, str) and isinstance(prompt[0], list)
print(json.dumps({"prompt": ids if several else ids[0], "tokens": tokens if several else tokens[0]}))
