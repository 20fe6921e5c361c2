import pytest

from dlo_export.checkpoints import interface
from dlo_export.checkpoints.interface import (
    continuation_of,
    is_interface_name,
    is_state_input,
    layers_with,
    parse_past,
    parse_present,
)


@pytest.mark.parametrize("layer", [0, 7, 10, 123])
@pytest.mark.parametrize("part", interface.CACHE_PARTS)
def test_cache_names_are_read_back_when_written(layer, part):
    past, present = interface.past_name(layer, part), interface.present_name(layer, part)
    assert parse_past(past) == parse_present(present) == (layer, part)
    assert parse_past(present) is None
    assert parse_present(past) is None
    assert continuation_of(past) == present
    assert is_state_input(past)
    assert not is_state_input(present)


@pytest.mark.parametrize(
    "layer_and_part",
    [
        "01.key",
        "-1.key",
        "+1.key",
        "1.keys",
        "1.query",
        "1",
        "1.key\n",
        ".key",
        "{i}.key",
        "\u0661.key",
        "1\u0661.key",
        "9" * 5000 + ".key",
    ],
)
def test_name_is_no_cache_when_its_layer_or_part_is_another(layer_and_part):
    assert parse_past(f"past_key_values.{layer_and_part}") is None
    assert parse_present(f"present.{layer_and_part}") is None
    assert parse_past(None) is None


def test_decisions_continue_when_a_routed_layer_keeps_them():
    assert is_state_input("past_active.4")
    assert continuation_of("past_active.4") == "present_active.4"
    assert not is_state_input("past_active.04")
    assert not is_state_input("past_active." + "9" * 5000)


@pytest.mark.parametrize("name", ["input_ids", "present.0.key", "past_active.x", ""])
def test_continuation_is_refused_when_an_input_is_no_state(name):
    with pytest.raises(ValueError, match="is no state input"):
        continuation_of(name)


@pytest.mark.parametrize(
    "name",
    [
        *(*interface.TOKEN_INPUTS, "write_indices", "kv_lengths", "logits"),
        *("past_key_values.9.value", "present.9.key", "past_active.1", "present_active.1"),
        *("router_scores.1", "force_active.1", "hidden.1"),
    ],
)
def test_name_belongs_to_the_interface_when_a_graph_may_show_it(name):
    assert is_interface_name(name)
    assert not is_interface_name(f"{name}.inner")
    assert not is_interface_name(f"x{name}")


def test_layers_are_counted_by_number_when_names_come_in_any_order():
    names = ["hidden.10", "hidden.2", "hidden.x", "hidden.02", "present.3.key", "present.5.value", "present.1.key"]
    assert layers_with(names, interface.hidden_name("{i}")) == (2, 10)
    assert layers_with(names, interface.present_name("{i}", "key")) == (1, 3)
    assert layers_with([], interface.hidden_name("{i}")) == ()
