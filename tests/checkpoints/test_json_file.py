import json

import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files import json_file
from dlo_export.checkpoints.files.json_file import json_text, read_json


def test_json_text_keeps_every_value_when_lists_are_put_on_one_line():
    values = {
        "shapes": [[1, 2], [3]],
        "texts": ["x [ y", "a ] b", " [ ", "two\nlines", "two  spaces", "ü"],
        "empty": [],
        "nested": [{"numbers": [1.5, None, True], "brace": ["{", "}"]}],
    }
    text = json_text(values)
    assert json.loads(text) == values
    assert "    [1, 2],\n    [3]\n" in text
    assert text.isascii()


def test_file_is_refused_unread_when_it_is_too_large(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as stream:  # takes no room on the disk
        stream.truncate(json_file.MAX_BYTES + 1)
    with pytest.raises(InputError, match=r"config\.json: has 268435457 bytes, expected at most 268435456\n\nhint: "):
        read_json(path)
