"""onnxruntime-genai: the folder as it is; several prompts padded at the right, as its tokenizer does."""

import json
import sys

import numpy as np
import onnxruntime_genai as og

folder, request = sys.argv[1], json.loads(sys.argv[2])
model = og.Model(folder)
ids = request["prompt"]
if isinstance(ids, str):
    ids = og.Tokenizer(model).encode(ids).tolist()
several = isinstance(ids[0], list)
rows = ids if several else [ids]
longest = max(map(len, rows))
with open(f"{folder}/genai_config.json") as file:
    padding = json.load(file)["model"]["pad_token_id"]
parameters = og.GeneratorParams(model)
parameters.set_search_options(do_sample=False, max_length=longest + request["new_tokens"], batch_size=len(rows))
generator = og.Generator(model, parameters)
generator.append_tokens(np.array([row + [padding] * (longest - len(row)) for row in rows], np.int32))
while not generator.is_done():
    generator.generate_next_token()
tokens = [generator.get_sequence(row).tolist()[longest:] for row in range(len(rows))]
print(json.dumps({"prompt": ids, "tokens": tokens if several else tokens[0]}))
