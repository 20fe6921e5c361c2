"""An artefact through a bare onnxruntime session, by the documented interface alone: no code of the project."""

import numpy as np
import onnxruntime as ort

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bool)": np.bool_}


class BareSession:
    """The graph and its KV cache, which grows."""

    def __init__(self, path):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1  # tests share the cores, and a waiting thread spins
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.past = [value for value in self.session.get_inputs() if value.name.startswith("past_")]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def reset(self, batch):
        self.state = {
            value.name: np.zeros(
                (batch, *(size if isinstance(size, int) else 0 for size in value.shape[1:])), TYPES[value.type]
            )
            for value in self.past
        }

    def step(self, ids, mask, positions):
        feeds = {
            "input_ids": np.asarray(ids, np.int64),
            "attention_mask": np.asarray(mask, np.int64),
            "position_ids": np.asarray(positions, np.int64),
        }
        outputs = dict(zip(self.outputs, self.session.run(None, feeds | self.state), strict=True))
        self.state = {
            name: outputs[name.replace("past_key_values", "present").replace("past_active", "present_active")]
            for name in self.state
        }
        return outputs

    def logits_of(self, ids, mask, positions, cuts):
        """Logits of all columns, fed in the pieces that `cuts` ends."""
        self.reset(ids.shape[0])
        pieces = []
        for start, stop in zip([0, *cuts[:-1]], cuts, strict=True):
            pieces.append(self.step(ids[:, start:stop], mask[:, :stop], positions[:, start:stop])["logits"])
        return np.concatenate(pieces, axis=1)


class InPlaceSession:
    """A graph of `--static-cache`: past and present are one buffer, and a step's tokens go into its next slots."""

    def __init__(self, path, batch=1, fill=0.0):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.state = {
            value.name: ort.OrtValue.ortvalue_from_numpy(np.full((batch, *value.shape[1:]), fill, TYPES[value.type]))
            for value in self.session.get_inputs()
            if value.name.startswith("past_")
        }
        self.tokens = 0

    def slots(self, name):
        """Of a state, what every slot holds."""
        return self.state[name].numpy()

    def step(self, ids):
        """Logits of the next tokens [batch, sequence]."""
        ids = np.asarray(ids, np.int64)
        self.tokens += ids.shape[1]
        binding = self.session.io_binding()
        binding.bind_output("logits")
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("kv_lengths", np.full(len(ids), self.tokens, np.int64))
        for name, buffer in self.state.items():
            binding.bind_ortvalue_input(name, buffer)
            present = name.replace("past_key_values", "present").replace("past_active", "present_active")
            binding.bind_ortvalue_output(present, buffer)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    def logits_of(self, ids, cuts):
        """Logits of all columns, fed in the pieces that `cuts` ends."""
        return np.concatenate([self.step(ids[:, self.tokens : stop]) for stop in cuts], axis=1)


def left_padded(samples):
    """One batch of token ids [1, n] of unequal length: ids, mask, positions."""
    length = max(sample.shape[1] for sample in samples)
    ids, mask, positions = (np.zeros((len(samples), length), np.int64) for _ in range(3))
    for row, sample in enumerate(samples):
        n = sample.shape[1]
        ids[row, -n:], mask[row, -n:], positions[row, -n:] = sample[0], 1, np.arange(n)
    return ids, mask, positions
