"""What builds say with -v."""

import dataclasses

from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.build_display import show_builds
from tests.exporter.tiny_engines import save_request


def test_lines_tell_stages_and_log_when_asked_for_details(tmp_path, capsys):
    (tmp_path / "engines").mkdir()
    request = save_request(tmp_path)
    request = dataclasses.replace(request, output=tmp_path / "engines" / "tiny.engine")
    with show_builds(Reporter(verbose=True)) as listener:
        listen = listener(request)
        listen({"event": "stage_started", "name": "parse"})
        listen({"event": "progress", "fraction": 0.5, "phase": "timing"})
        listen({"event": "stage_finished", "name": "parse", "seconds": 1.5, "peak_bytes": 3 << 29})
        listen({"event": "log", "severity": "WARNING", "text": "slow"})
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "engine tiny.engine: parse: 1.50 s, 1.50 GB at most",
        "engine tiny.engine: WARNING: slow",
    ]
