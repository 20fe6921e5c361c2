"""`--trt`: from a routed graph to TensorRT engines.

`plan` decides what to build and refuses what cannot be had; `export` writes the graphs and describes the engines;
`engines` takes them from the cache or has them built, each in a process of its own (`worker`, `build`); `twin` makes
the fp32 graph that parity runs in an engine's place.
"""
