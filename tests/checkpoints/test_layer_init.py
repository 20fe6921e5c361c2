import ml_dtypes
import numpy as np
import pytest

from dlo_export.checkpoints.depth import layer_init
from dlo_export.checkpoints.depth.layer_init import LayerInitError, canonical_init, preserves_function, slerp_shares
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from tests.initial_arrays import init_tensor

ROLE = "self_attn.q_proj.weight"
RNG = np.random.default_rng(0)
SOURCE, PREVIOUS = RNG.standard_normal((2, 6, 5)).astype(np.float32)


@pytest.mark.parametrize("init", ["zero_out", "zeros", "identity"])
def test_init_zeroes_only_output_projections_when_zero_out(init: str) -> None:
    for role in ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias"):
        assert not init_tensor(init, role, SOURCE, PREVIOUS).any()
    for role in (ROLE, "mlp.gate_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"):
        np.testing.assert_array_equal(init_tensor(init, role, SOURCE, PREVIOUS), SOURCE)
    assert canonical_init(init) == "zero_out"
    assert preserves_function(init)


def test_init_returns_own_memory_when_copy() -> None:
    copied = init_tensor("copy", "mlp.down_proj.weight", SOURCE)
    np.testing.assert_array_equal(copied, SOURCE)
    assert not np.shares_memory(copied, SOURCE)
    assert not preserves_function("copy")


def test_init_is_the_mean_when_linear() -> None:
    np.testing.assert_allclose(init_tensor("linear", ROLE, SOURCE, PREVIOUS), (SOURCE + PREVIOUS) / 2, rtol=1e-6)


@pytest.mark.parametrize("init", ["linear", "slerp"])
def test_init_falls_back_to_copy_when_there_is_no_previous_layer(init: str) -> None:
    result = init_tensor(init, ROLE, SOURCE, None)
    np.testing.assert_array_equal(result, SOURCE)
    assert not np.shares_memory(result, SOURCE)


def test_slerp_keeps_raw_norms_when_vectors_are_orthogonal() -> None:
    first, second = np.array([[3.0, 0.0]], np.float32), np.array([[0.0, 1.0]], np.float32)
    mixed = init_tensor("slerp", ROLE, second, first)
    np.testing.assert_allclose(mixed, [[3 * np.sqrt(0.5), np.sqrt(0.5)]], rtol=1e-6)


def test_slerp_equals_the_textbook_formula_when_vectors_are_general() -> None:
    a, b = PREVIOUS.ravel().astype(np.float64), SOURCE.ravel().astype(np.float64)
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    expected = (np.sin(angle / 2) / np.sin(angle)) * (a + b)
    np.testing.assert_allclose(init_tensor("slerp", ROLE, SOURCE, PREVIOUS).ravel(), expected, rtol=2e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_slerp_is_plain_lerp_when_nearly_parallel(sign: float) -> None:
    other = (sign * 3 * SOURCE + 1e-3).astype(np.float32)
    assert slerp_shares(ArrayTensor(other), ArrayTensor(SOURCE)) == (0.5, 0.5)
    np.testing.assert_allclose(init_tensor("slerp", ROLE, SOURCE, other), (other + SOURCE) / 2, rtol=1e-5, atol=1e-6)


def test_slerp_is_plain_lerp_when_one_tensor_is_zero() -> None:
    np.testing.assert_allclose(init_tensor("slerp", ROLE, SOURCE, np.zeros_like(SOURCE)), SOURCE / 2)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("init", ["zero_out", "copy", "linear", "slerp", "random"])
def test_init_keeps_dtype_and_rounds_once_when_not_fp32(init: str, dtype: type) -> None:
    source, previous = SOURCE.astype(dtype), PREVIOUS.astype(dtype)
    result = init_tensor(init, ROLE, source, previous)
    assert result.dtype == dtype
    if init in ("linear", "slerp") and result.itemsize == 2:
        exact = init_tensor(init, ROLE, source.astype(np.float32), previous.astype(np.float32))
        np.testing.assert_array_equal(result, exact.astype(dtype))


def test_random_is_reproducible_and_distinct_when_seeded() -> None:
    weight = np.empty((64, 64), np.float32)
    first = init_tensor("random", ROLE, weight, seed=(7, 4), initializer_range=0.05)
    np.testing.assert_array_equal(first, init_tensor("random", ROLE, weight, seed=(7, 4), initializer_range=0.05))
    assert abs(first.std() - 0.05) < 0.005
    assert (first != init_tensor("random", ROLE, weight, seed=(7, 9), initializer_range=0.05)).any()
    assert (first != init_tensor("random", "mlp.up_proj.weight", weight, seed=(7, 4), initializer_range=0.05)).any()
    assert (init_tensor("random", "input_layernorm.weight", weight[0]) == 1).all()
    assert not init_tensor("random", "self_attn.q_proj.bias", weight[0]).any()


@pytest.mark.parametrize("init", ["random", "slerp", "linear_zero_out", "copy"])
def test_rows_are_those_of_the_whole_whichever_are_asked_for(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = init_tensor(init, ROLE, SOURCE, PREVIOUS)
    tensor = layer_init.InitialTensor(init, ROLE, ArrayTensor(SOURCE), ArrayTensor(PREVIOUS))
    for step in (1, 2, 4, 6):  # that are computed at once
        monkeypatch.setattr(layer_init, "rows_at_once", lambda rows, nbytes, step=step: step)
        for start, stop in ((0, 6), (0, 2), (3, 4), (5, 6), (4, 9)):
            np.testing.assert_array_equal(tensor.rows(start, stop), whole[start:stop])


def test_init_zeroes_the_mixture_when_linear_zero_out() -> None:
    assert not init_tensor("linear_zero_out", "self_attn.o_proj.weight", SOURCE, PREVIOUS).any()
    np.testing.assert_allclose(
        init_tensor("linear_zero_out", ROLE, SOURCE, PREVIOUS), (SOURCE + PREVIOUS) / 2, rtol=1e-6
    )


def test_init_raises_when_unknown_or_shapes_differ() -> None:
    with pytest.raises(LayerInitError, match=r"found 'stack', expected one of zero_out.*\n\nhint: "):
        init_tensor("stack", ROLE, SOURCE)
    with pytest.raises(LayerInitError, match=r"q_proj.weight has shape \(3, 5\)"):
        init_tensor("slerp", ROLE, SOURCE, PREVIOUS[:3])
