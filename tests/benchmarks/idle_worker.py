"""A worker that does nothing, and tells which process it is."""

import os

from benchmarks.common.workers import serve

if __name__ == "__main__":
    serve(lambda: None, {"process": os.getpid()})
