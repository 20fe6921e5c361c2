"""The model itself: depth scaling, adapters, and in PyTorch the routed reference model and router calibration.

Importing this package imports neither torch nor transformers. `adapter` and `expansion` need NumPy alone;
`import dlo_export.modeling.llama_dlo` registers the routed model with transformers' Auto classes.
"""
