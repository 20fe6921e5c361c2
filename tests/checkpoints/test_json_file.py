import json

from dlo_export.checkpoints.files.json_file import json_text


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
