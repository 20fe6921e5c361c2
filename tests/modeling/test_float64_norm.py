import numpy as np
import torch

from dlo_export.exporter.sources.source import open_source
from dlo_export.modeling.float64_norm import Float64RMSNorm
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from dlo_export.modeling.routing import TokenRouter
from tests.tiny_models import save_tiny_llama


def test_model_computes_in_float64_throughout_when_it_is_asked_to(tmp_path):
    source = open_source(save_tiny_llama(tmp_path / "model", routed=[True, False, True]), None)
    model = llama_dlo_from_tensors(source.config_json(), source.tensors(), dtype=torch.float64)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Float64RMSNorm | TokenRouter):
            module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output.dtype}))
    with torch.inference_mode():
        output = model(torch.arange(12).reshape(1, -1))
    assert len(seen) == 3 * 9 + 2 + 2
    assert set(seen.values()) == {output.router_scores[0].dtype} == {torch.float64}


def test_norm_is_that_of_its_formula_when_values_are_small():
    class Norm:
        weight = torch.nn.Parameter(torch.tensor([1.5, -0.5], dtype=torch.float64))
        variance_epsilon = 1e-5

    values = np.array([[3e-3, -4e-3]])
    expected = values / np.sqrt((values**2).mean() + 1e-5) * [1.5, -0.5]
    with torch.inference_mode():
        found = Float64RMSNorm(Norm())(torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-14)
