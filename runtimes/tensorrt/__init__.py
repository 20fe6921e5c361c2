"""Runs an artefact's TensorRT engines.

`engines` reads them, `engine_check` says whether they may run here, `runner` is the runner: it chooses profiles
(`shapes`), reads engines (`engine_runtime`) and runs steps (`execution`) on a `device`. `backend` says what TensorRT
and TensorRT-RTX are, `gpu` which GPU is here, also for who builds engines.
"""
