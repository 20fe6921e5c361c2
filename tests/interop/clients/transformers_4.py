"""The tokenizer of an artefact in transformers 4: what it makes of a text for a model, and the text of the ids."""

import json
import sys

from transformers import AutoTokenizer

folder, request = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(request["prompt"])
text = tokenizer.decode(inputs["input_ids"], skip_special_tokens=True)
print(json.dumps({"inputs": sorted(inputs), "ids": inputs["input_ids"], "text": text}))
