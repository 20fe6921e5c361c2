"""`--static-cache` on a CPU: what skips attention, or whole layers, on a cache that ONNX Runtime writes in place."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.model_types import RoutingKind, leaves_keys
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, ExportResult, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.graph_passes.spec.provenance import LAYER_KEY
from dlo_export.runtimes.artefact.description import MODEL_NAME
from tests.bare_session import BareSession, InPlaceSession, left_padded
from tests.tiny_families import ROPES, route_tiny_family, save_tiny_family
from tests.tiny_models import save_tiny_llama

DATA = Path(__file__).parents[1] / "data"
SLOTS = 48
SHAPE = {"hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_dim": 16}
ROUTED = (0, 2)
KINDS: dict[RoutingKind, dict[str, str]] = {
    "mlp": {},
    "layer": {"model_type": "llama_dlo"},
    "attention": {"model_type": "llama_dlo_attn"},
    "attention-active": {"model_type": "llama_dlo_attn", "routing_kv": "active"},
}
IDS = np.random.default_rng(3).integers(3, 97, (1, 20))
CUTS = (5, 6, 7, 13, *range(14, 21))  # a prompt, tokens, a chunk behind them, tokens


def exported(model: Path, output: Path, **options: object) -> ExportResult:
    return export_model(ExportRequest(str(model), output, **options), Reporter())  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["masked", "compact", "if"])
def lowering(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> RoutingKind:
    return request.param  # type: ignore[no-any-return]  # pytest's


@pytest.fixture(scope="module")
def model(kind: RoutingKind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static") / "model"
    routed = (True, False, True)
    return save_tiny_llama(folder, **SHAPE, **KINDS[kind], routed=routed, thresholds={2: 0.4})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def static(model: Path, lowering: str, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return exported(model, tmp_path_factory.mktemp(lowering) / "static", lowering=lowering, static_cache=SLOTS)


@pytest.fixture(scope="module")
def growing(model: Path, lowering: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(model, tmp_path_factory.mktemp(lowering) / "growing", lowering=lowering, parity=False).folder


def attentions(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node | None]]:
    """Every attention, and the outermost If that it stands in."""
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            yield node, None
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from ((inner, node) for inner, _ in attentions(attribute.as_graph()))


def test_artefact_equals_pytorch(kind: RoutingKind, lowering: str, static: ExportResult) -> None:
    assert static.description.parity.verdict == "PASS", static.parity_summary
    inputs = {spec.name: spec.shape for spec in static.description.interface.inputs}
    assert list(inputs)[:2] == ["input_ids", "kv_lengths"]
    assert inputs["past_key_values.0.key"][1:] == (2, SLOTS, 16)
    states = () if leaves_keys(kind) else ROUTED
    assert {name for name in inputs if "active" in name} == {f"past_active.{layer}" for layer in states}
    assert all(inputs[f"past_active.{layer}"][1:] == (1, SLOTS, 1) for layer in states)
    # Compaction has two of a layer, for steps that are long and for others.
    found = attentions(ir.load(static.folder / MODEL_NAME).graph)
    conditional = {int(node.metadata_props[LAYER_KEY]): holder is not None for node, holder in found}
    skipped = lowering != "masked" and kind != "mlp"
    assert conditional == {layer: skipped and layer in ROUTED for layer in range(3)}


def test_steps_write_what_a_growing_cache_holds_and_no_other_slot(
    kind: RoutingKind, static: ExportResult, growing: Path
) -> None:
    """Slots that nobody has written hold sevens, and are active by what they hold: nobody may see them."""
    bare, in_place = BareSession(growing / MODEL_NAME), InPlaceSession(static.folder / MODEL_NAME, fill=7.0)
    mask, positions = np.ones_like(IDS), np.arange(IDS.shape[1])[np.newaxis]
    wanted = bare.logits_of(IDS, mask, positions, CUTS)
    np.testing.assert_allclose(in_place.logits_of(IDS, CUTS), wanted, rtol=0, atol=2e-5)
    skipped = 0
    for name, expected in bare.state.items():
        found = in_place.slots(name)
        rows = np.moveaxis(found, 2, 0) if found.ndim == 4 else found
        assert (rows[IDS.shape[1] :] == 7.0).all(), name
        if expected.ndim == 2:
            np.testing.assert_array_equal(found[:, 0, : IDS.shape[1], 0], expected, err_msg=name)
            skipped += np.count_nonzero(~expected)
            continue
        np.testing.assert_allclose(found[:, :, : IDS.shape[1]], expected, rtol=0, atol=2e-5, err_msg=name)
        np.testing.assert_array_equal(found[:, :, : IDS.shape[1]] == 0, expected == 0, err_msg=name)
    assert leaves_keys(kind) or 0 < skipped < len(ROUTED) * IDS.shape[1]


@pytest.mark.parametrize("kind", ["layer", "attention-active"], indirect=True)
@pytest.mark.parametrize("lowering", ["masked"], indirect=True)
def test_who_is_hidden_is_told_of_tokens_and_not_of_slots(static: ExportResult, tmp_path: Path) -> None:
    """Of 100,000 slots, a prompt of 512 tokens would be told in 200 MB per layer."""
    shutil.copytree(static.folder, tmp_path / "out")
    model = ir.load(tmp_path / "out" / MODEL_NAME)
    hides = [value for node, _ in attentions(model.graph) for value in node.inputs[10:] if value is not None]
    assert len(hides) == len(ROUTED)
    model.graph.outputs.extend(hides)
    ir.save(model, tmp_path / "out" / MODEL_NAME)
    session = InPlaceSession(tmp_path / "out" / MODEL_NAME)
    state = {name: session.slots(name) for name in session.state}
    for start, stop in ((0, 7), (7, 8), (8, 12)):
        feeds = {"input_ids": IDS[:, start:stop], "kv_lengths": np.array([stop]), **state}
        told = session.session.run([value.name for value in hides], feeds)
        assert {hide.shape for hide in told} == {(1, 1, stop - start, stop)}


def test_batch_decodes_together_behind_prompts_of_its_own(static: ExportResult, growing: Path) -> None:
    samples = [IDS[:, :9], IDS[:, 4:7], IDS[:, 6:20]]
    ids, mask, positions = left_padded(samples)
    length = ids.shape[1]
    cuts = [length - 3, *range(length - 2, length + 1)]
    wanted = BareSession(growing / MODEL_NAME).logits_of(ids, mask, positions, cuts)
    with open_artefact(static.folder) as runner:
        runner.reset(len(samples))
        pieces = [
            runner.step(ids[:, start:stop], mask[:, :stop], positions[:, start:stop]).logits
            for start, stop in zip([0, *cuts[:-1]], cuts, strict=True)
        ]
    real = mask.astype(bool)
    np.testing.assert_allclose(np.concatenate(pieces, 1)[real], wanted[real], rtol=0, atol=2e-5)


def test_head_runs_for_the_last_token_alone_when_asked_to(model: Path, static: ExportResult, tmp_path: Path) -> None:
    options = {"lowering": static.description.lowering, "static_cache": SLOTS, "last_logits": True}
    result = exported(model, tmp_path / "out", parity=False, **options)
    whole, last = (InPlaceSession(each.folder / MODEL_NAME) for each in (static, result))
    for stop in CUTS:
        logits = [session.step(IDS[:, session.tokens : stop]) for session in (whole, last)]
        assert logits[1].shape[1] == 1
        np.testing.assert_allclose(logits[1], logits[0][:, -1:], rtol=0, atol=2e-5)
    samples = [IDS[:, :9], IDS[:, 4:7]]
    ids, mask, positions = left_padded(samples)
    found = []
    for folder in (static.folder, result.folder):
        with open_artefact(folder) as runner:
            runner.reset(len(samples))
            found.append(runner.step(ids, mask, positions, last_logits=True).logits)
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("cached", [False, True], ids=["at-once", "token-by-token"])
@pytest.mark.parametrize("routing", ["mlp", "layer"])
def test_artefact_equals_the_authors_code_when_its_cache_is_static(
    routing: str, lowering: str, cached: bool, tmp_path: Path
) -> None:
    reference = DATA / f"reference_{routing}_routed"
    result = exported(reference, tmp_path / "out", lowering=lowering, parity=False, static_cache=32)
    values = np.load(reference / "expected.npz")
    for sample in range(3):
        ids, expected = values[f"ids_{sample}"], values[f"logits_{sample}"]
        length = ids.shape[1]
        cuts = (2, *range(3, length + 1)) if cached else (length,)
        logits = InPlaceSession(result.folder / MODEL_NAME).logits_of(ids, cuts)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "values", "routing", "lowering", "dtype"),
    [
        ("llama", ROPES["yarn"], "layer", "if", "fp32"),
        ("granite", ROPES["yarn"], "attention-active", "compact", "fp32"),
        ("qwen3", ROPES["llama3"], "attention", "if", "fp32"),
        ("smollm3", {}, "layer", "compact", "fp16"),
        ("olmo2", {}, "attention-active", "if", "fp32"),
        ("qwen2", {}, "layer", "if", "fp16"),
    ],
    ids=str,
)
def test_families_equal_pytorch(
    family: str, values: dict[str, object], routing: RoutingKind, lowering: str, dtype: str, tmp_path: Path
) -> None:
    save_tiny_family(tmp_path / "model", family, **{**values, "head_dim": 16})
    route_tiny_family(tmp_path / "model", routing)
    result = exported(tmp_path / "model", tmp_path / "out", lowering=lowering, static_cache=SLOTS, dtype=dtype)
    assert result.description.parity.verdict == "PASS", result.parity_summary


def test_slots_are_refused_when_no_machine_holds_them_and_told_of_beyond_the_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llama(tmp_path / "model", **SHAPE)  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match="--static-cache 2147483647: a KV cache of so many tokens takes 1535 GB"
    ) as error:
        exported(model, tmp_path / "out", static_cache=2**31 - 1, weights=False)
    assert not (tmp_path / "out").exists()
    most = int(str(error.value.hint).split()[2])
    token = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, their size, bytes
    assert most * token <= 1 << 40 < (most + 1) * token
    for slots in (128, 129):
        exported(model, tmp_path / str(slots), static_cache=slots, parity=False)
        said = f"--static-cache {slots} is beyond the model's context of 128 tokens"
        assert (said in capsys.readouterr().err) == (slots > 128)


@pytest.mark.parametrize("values", [{"head_dim": 12}, ROPES["dynamic"]], ids=["narrow heads", "dynamic rope"])
def test_refusal_names_the_model_and_its_layers_once(values: dict[str, object], tmp_path: Path) -> None:
    save_tiny_family(tmp_path / "model", "llama", **values)
    with pytest.raises(InputError, match=r"attention of layers 0, 1, 2, 3: ") as error:
        exported(tmp_path / "model", tmp_path / "out", static_cache=SLOTS)
    assert error.value.message.startswith(f"{tmp_path / 'model'}: ")
    assert not (tmp_path / "out").exists()


def test_lowering_is_chosen_as_without_a_static_cache(model: Path, tmp_path: Path) -> None:
    chosen = [
        exported(model, tmp_path / str(slots), parity=False, static_cache=slots).description.lowering
        for slots in (None, SLOTS)
    ]
    assert chosen[0] == chosen[1] != "masked"


def test_export_refuses_when_a_cuda_graph_cannot_capture_what_skips_attention(
    kind: RoutingKind, model: Path, tmp_path: Path
) -> None:
    if kind == "mlp":
        pytest.skip("the plugin's operators are captured")
    with pytest.raises(InputError, match=r"no lowering makes skip at fixed shapes|skips or masks attention"):
        exported(model, tmp_path / "out", static_cache=SLOTS, provider="cuda", dtype="fp16")
    assert not (tmp_path / "out").exists()
