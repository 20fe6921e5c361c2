"""`--trt`: from a routed graph to TensorRT engines.

* `plan` decides what to build and refuses what cannot be had (`backend`: who builds); `twin` makes the fp32 graph that
  parity runs in an engine's place; `float16_range` measures whether fp16 holds the residual stream.
* `export` writes the graphs and describes the engines; `engines` takes each from the cache (`engine_cache`, found by
  its `engine_fingerprint`) or has it built as its `engine_request` says.
* A build is a process of its own: `build_queue` runs several, `build_process` is one seen from outside, which hears its
  `build_events`; `build_outcome` says how it ended, `build_display` shows it. Inside, `build_worker` calls `build`,
  with TensorRT's messages in `build_log` and its phases in `build_progress`.
* What TensorRT parsed is checked before it is built: `network_checks`, with `nodes` and `census`.

What a built engine is to everybody else stands in `runtimes/artefact/engine_record.py`.
"""
