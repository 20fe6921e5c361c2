"""onnxruntime-genai: the folder as it is."""

import json
import sys

import onnxruntime_genai as og

folder, request = sys.argv[1], json.loads(sys.argv[2])
model = og.Model(folder)
ids = request["prompt"]
if isinstance(ids, str):
    ids = og.Tokenizer(model).encode(ids).tolist()
parameters = og.GeneratorParams(model)
parameters.set_search_options(do_sample=False, max_length=len(ids) + request["new_tokens"])
generator = og.Generator(model, parameters)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps({"prompt": ids, "tokens": generator.get_sequence(0).tolist()[len(ids) :]}))
