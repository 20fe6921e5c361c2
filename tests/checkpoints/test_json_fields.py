import pytest

from dlo_export.checkpoints.files.json_fields import MAX_INTEGER, JsonFields


def test_fields_are_read_when_they_are_valid():
    fields = JsonFields({"layers": 3, "eps": 1e-5, "tied": True, "ends": [1, 2], "pad": -1, "null": None})
    assert (fields.integer("layers"), fields.number("eps"), fields.flag("tied")) == (3, 1e-5, True)
    assert (fields.tokens("ends", 0), fields.token("pad", 7)) == ((1, 2), None)
    assert (fields.integer("null", 5), fields.integer("absent", 6)) == (5, 6)  # null says "not given"
    assert fields.problems == []


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        ("integer", True, "a positive integer"),
        ("integer", 0, "a positive integer"),
        ("integer", 2.0, "a positive integer"),
        ("integer", MAX_INTEGER + 1, "a positive integer"),
        ("positive_number", 0, "a positive number"),
        ("positive_number", float("inf"), "a positive number"),
        ("positive_number", -1e-50, "a positive number"),
        ("positive_number", 1e-50, "1.2e-38 at least"),
        ("number", float("nan"), "a finite number"),
        ("number", "1", "a finite number"),
        ("flag", 1, "true or false"),
        ("integer", None, "a positive integer"),
    ],
)
def test_field_is_a_problem_when_it_is_of_another_kind(read, value, expected):
    fields = JsonFields({"field": value})
    getattr(fields, read)("field")
    found = "is missing" if value is None else f"is {value!r}"
    assert fields.problems == [f"field {found}, expected {expected}"]
    assert not fields.are_valid("other", "field")


def test_problems_are_all_told_with_their_places_when_objects_are_nested():
    fields = JsonFields({"layers": -1, "rope": {"theta": "x"}})
    fields.integer("layers", largest=10)
    fields.nested("rope", fields.values["rope"]).number("theta", least=0.5)
    fields.tokens("ends", -3)
    assert fields.problems == [
        "layers is -1, expected an integer from 1 to 10",
        "rope.theta is 'x', expected a finite number from 0.5 on",
        "ends is -3, expected a token id or a list of them",
    ]
    assert fields.are_valid("rope")
