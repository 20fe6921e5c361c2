from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path

import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.graph_passes.lowerings.record import LoweringRecord, Target, Workload
from dlo_export.graph_passes.lowerings.registry import (
    NOTHING_ROUTED,
    asked_lowering,
    find_lowering,
    lowering_names,
    lowering_records,
    suitable_lowerings,
)

DOCS = Path(__file__).parents[2] / "docs"
RECORDS = list(lowering_records())


def test_names_are_those_of_the_records_and_unique_for_every_target() -> None:
    assert set(lowering_names()) == {record.name for record in RECORDS}
    served = collections.Counter((record.name, target) for record in RECORDS for target in record.targets)
    assert set(served.values()) == {1}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record.name}-{record.targets[0]}")
def test_record_is_consistent_with_its_pass(record: LoweringRecord) -> None:
    assert (record.skips == "nothing") == (record.make_pass is None)
    assert record.capturable == (record.not_capturable is None)
    assert record.reason
    assert set(record.domains) <= record.stage.domains
    if record.make_pass is not None:
        assert type(record.make_pass(Workload())).__name__ in record.stage.makers
    if record.make_pass is not None and "tensorrt" in record.targets:
        assert record.tensorrt_layers
        assert record.tensorrt_start is None or record.tensorrt_start in record.tensorrt_layers


def test_masked_form_is_to_be_had_for_every_target() -> None:
    for target in {target for record in RECORDS for target in record.targets}:
        assert find_lowering("masked", target).make_pass is None
        assert find_lowering(NOTHING_ROUTED, target).make_pass is None


def test_finding_refuses_with_the_choices_when_target_has_no_lowering_of_the_name() -> None:
    with pytest.raises(InputError, match="hint: onnxruntime-cpu has plugin, if, compact, masked") as error:
        find_lowering("plugins", "onnxruntime-cpu")
    assert "--lowering plugins: is unknown" in str(error.value)


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt"])
def test_what_stands_where_nothing_is_routed_cannot_be_asked_for(target: Target) -> None:
    with pytest.raises(InputError, match=f"--lowering {NOTHING_ROUTED}: is unknown\n\nhint: {target} has "):
        asked_lowering(NOTHING_ROUTED, target)


AUTO = {
    "onnxruntime": ("onnxruntime-cpu", Workload(), ["compact"]),
    "onnxruntime, whole layers": ("onnxruntime-cpu", Workload(routing="layer"), ["compact"]),
    "tensorrt": ("tensorrt", Workload(), ["compact"]),
    "tensorrt, whole layers": ("tensorrt", Workload(routing="layer"), ["compact"]),
    "whole layers with plugins": ("tensorrt", Workload(routing="layer", plugins_at_hand=True), ["compact"]),
    "single decode, attention": ("tensorrt", Workload("decode", max_batch=1, routing="attention"), ["compact"]),
    "plugins": ("tensorrt", Workload(plugins_at_hand=True), ["plugin", "compact"]),
    "prefill": ("tensorrt", Workload("prefill", plugins_at_hand=True), ["compact"]),
    "single decode": ("tensorrt", Workload("decode", max_batch=1), ["if", "compact"]),
    "batched decode": ("tensorrt", Workload("decode", max_batch=4), ["compact"]),
}


@pytest.mark.parametrize(("target", "workload", "expected"), AUTO.values(), ids=AUTO)
def test_auto_prefers_when_workload_is(target: str, workload: Workload, expected: list[str]) -> None:
    assert [record.name for record in suitable_lowerings(target, workload)] == expected


def test_names_are_known_without_reading_the_passes() -> None:
    code = (
        "import sys; from dlo_export.graph_passes.lowerings.registry import lowering_names; "
        "assert lowering_names(); sys.exit('onnx_ir' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", lowering_names())
def test_documentation_tells_when_to_choose_it(name: str) -> None:
    table = (DOCS / "artefact.md").read_text(encoding="utf-8").split("## Lowerings")[1].split("\n## ")[0]
    assert f"| `{name}`" in table
