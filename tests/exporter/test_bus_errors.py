"""A mapped file that is cut short while it is read."""

import subprocess
import sys

from dlo_export.exporter.exit_codes import FILE_CUT_SHORT, MACHINE

CODE = """
import mmap, os, sys
from dlo_export.exporter.bus_errors import report_bus_errors
report_bus_errors()
with open(sys.argv[1], "r+b") as file:
    view = mmap.mmap(file.fileno(), 0)
    os.truncate(sys.argv[1], 0)
    view[1 << 20]
"""


def test_command_ends_with_a_message_when_a_mapped_file_is_cut_short(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(2 << 20))
    result = subprocess.run([sys.executable, "-c", CODE, path], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (MACHINE, f"error: {FILE_CUT_SHORT}\n")
