"""A bare session of the oldest ONNX Runtime that runs an artefact; it has no tokenizer."""

import json
import pathlib
import sys

import numpy as np
import onnxruntime

folder, request = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
ids, tokens, total = request["prompt"], [], 0
past = {
    value.name: np.zeros([1, value.shape[1], 0, value.shape[3]], np.float32)
    for value in session.get_inputs()
    if value.name.startswith("past_key_values.")
}
while len(tokens) < request["new_tokens"] and not (tokens and tokens[-1] in np.atleast_1d(ends)):
    fed = np.array([tokens[-1:] or ids], np.int64)
    first, total = total, total + fed.shape[1]
    feeds = {
        "input_ids": fed,
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(first, total)[np.newaxis],
    }
    names = [value.name for value in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {**feeds, **past}), strict=True))
    tokens.append(int(outputs["logits"][0, -1].argmax()))
    past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
print(json.dumps({"prompt": ids, "tokens": tokens, "version": onnxruntime.__version__}))
