"""The routed Llama in PyTorch: the reference model, calibration of its routers, training.

Importing this package imports neither torch nor transformers; `import dlo_export.modeling.llama_dlo` registers the
routed models with transformers' Auto classes.
"""
