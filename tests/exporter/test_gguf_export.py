"""GGUF files as people fetch them, from the command line to what reads the artefact."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime_genai
from tokenizers import Tokenizer

from tests.exporter.forked_commands import run as dlo
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import save_tiny_llama
from tests.tiny_sentencepiece import VOCABULARY, gguf_metadata, many_texts, train_sentencepiece

BASIC_TEXTS = 100


def test_gguf_is_exported_whole_when_split_biased_and_with_sentencepiece(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path)
    metadata = gguf_metadata(model) | {"tokenizer.ggml.eot_token_id": 5, "llama.rope.freq_base": None}
    folder = save_tiny_llama(
        tmp_path / "tiny", layers=2, vocab=VOCABULARY, hidden=64, intermediate=96, attention_bias=True
    )
    left_out = [f"blk.{layer}.attn_output.bias" for layer in (0, 1)]
    first = save_tiny_gguf(
        folder, tmp_path / "model.gguf", "Q8_0", metadata=metadata, left_out=left_out, tensors_per_part=10
    )
    result = dlo("export", first, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "parity PASS" in result.stdout
    assert "warning" not in result.stderr
    assert json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["eos_token_id"] == [2, 5]
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    genai_tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(tmp_path / "out")))
    for text in filter(str.strip, many_texts()[:BASIC_TEXTS]):
        assert tokenizer.encode(text, add_special_tokens=False).ids == model.encode(text), text
        if "\0" not in text:  # a C string ends there
            assert list(genai_tokenizer.encode(text)) == model.encode(text), text


def test_gguf_is_exported_with_a_warning_when_its_tokenizer_is_unknown(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "tiny", layers=1)
    file = save_tiny_gguf(folder, tmp_path / "model.gguf", metadata={"tokenizer.ggml.model": "of-tomorrow"})
    result = dlo("export", file, "-o", tmp_path / "out", "--no-parity")
    assert result.returncode == 0
    assert result.stderr.count("warning: ") == 1
    assert "tokenizer.ggml.model is 'of-tomorrow', which is not known here: no tokenizer is written" in result.stderr
    assert (tmp_path / "out" / "model.onnx").exists()
    assert not (tmp_path / "out" / "tokenizer.json").exists()
