"""For other people's tests: an export that must be equal to PyTorch."""

from __future__ import annotations

from pathlib import Path

from dlo_export.exporter.export import ExportRequest, ExportResult, export_model
from dlo_export.exporter.progress import Reporter


def assert_parity(
    model: str | Path,
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    lowering: str = "auto",
    allow_ambiguous: bool = False,
) -> ExportResult:
    """Exports a model and asserts that parity passes.

    Args:
        model: Checkpoint folder, `.gguf`, `.onnx`, or hub id in the local cache.
        output: Where the artefact goes; it must not exist.
        adapter: DloAdapter folder.
        lowering: What routed layers become.
        allow_ambiguous: Accept that near-ties of routers flipped.

    Returns:
        The artefact.

    Raises:
        AssertionError: Parity did not run, or was ambiguous and that is not allowed.
        dlo_export.exporter.export.ParityFailedError: It failed; the report is in the message.
        dlo_export.checkpoints.errors.InputError: The model cannot be exported.
    """
    request = ExportRequest(
        str(model), Path(output), adapter=None if adapter is None else Path(adapter), lowering=lowering
    )
    result = export_model(request, Reporter())
    verdict = result.description.parity.verdict
    accepted = {"PASS", "AMBIGUOUS"} if allow_ambiguous else {"PASS"}
    if verdict not in accepted:  # no `assert`: Python -O would drop it
        raise AssertionError(f"{result.folder}: {result.parity_summary}")
    return result
