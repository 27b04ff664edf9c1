"""Keras 3.15 with its torch backend: AdditiveAttention, original against patched."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle

import pytest
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")
if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: see tests/peers/requirements.txt", allow_module_level=True)
keras = pytest.importorskip("keras", reason="Keras: something that it imports is missing")
if keras.backend.backend() != "torch":
    pytest.skip("Keras runs on another backend", allow_module_level=True)

from attn_kernels import patch, patching, unpatch

B, TQ, TK, DIM = 3, 4, 6, 8


def make(dtype="float32", **options):
    torch.manual_seed(0)
    layer = keras.layers.AdditiveAttention(dtype=dtype, **options)
    layer.build([(B, TQ, DIM), (B, TK, DIM), (B, TK, DIM)])
    patched = keras.layers.AdditiveAttention(dtype=dtype, **options)
    patched.build([(B, TQ, DIM), (B, TK, DIM), (B, TK, DIM)])
    patched.set_weights(layer.get_weights())
    return layer, patched, patch(patched)


def inputs(dtype=torch.float32, count=3):
    torch.manual_seed(1)
    shapes = ((B, TQ, DIM), (B, TK, DIM), (B, TK, DIM))[:count]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


VALUE_MASK = torch.arange(TK) < torch.tensor([6, 3, 1])[:, None]
QUERY_MASK = torch.arange(TQ) < torch.tensor([4, 2, 3])[:, None]
CALLS = {
    "plain": {},
    "scores": {"return_attention_scores": True},
    "value mask": {"mask": [None, VALUE_MASK], "return_attention_scores": True},
    "both masks": {"mask": [QUERY_MASK, VALUE_MASK], "return_attention_scores": True},
    "causal": {"use_causal_mask": True, "return_attention_scores": True},
    "causal and masks": {"mask": [QUERY_MASK, VALUE_MASK], "use_causal_mask": True},
    "training": {"training": True},
}


def run(layer, given, options):
    result = layer(given, **options)
    results = list(result) if isinstance(result, tuple) else [result]
    scale = [variable.value for variable in layer.trainable_variables]
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in results)
    return [*results, *torch.autograd.grad(loss, [*given, *scale])]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("use_scale", [True, False])
def test_same_results_and_gradients(use_scale, count, name):
    layer, patched, report = make(use_scale=use_scale)
    assert len(report.replaced) == 1
    given = inputs(count=count)
    for got, expected in zip(run(patched, given, CALLS[name]), run(layer, given, CALLS[name]), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert report.fallbacks == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes(dtype):
    exact, _, _ = make()
    layer, patched, report = make(dtype=dtype)
    given = inputs(count=2)
    right = exact(given, **CALLS["value mask"])[0].double()
    low = [x.detach().to(getattr(torch, dtype)) for x in given]
    theirs, ours = (one(low, **CALLS["value mask"])[0].double() for one in (layer, patched))
    largest = right.abs().max().item()
    resolution = torch.finfo(getattr(torch, dtype)).eps
    assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max() + resolution * largest
    assert report.fallbacks == []


def test_what_falls_through():
    layer, patched, report = make(dropout=0.5)
    given = inputs()
    nothing = VALUE_MASK.clone()
    nothing[1] = False
    options = {"mask": [None, nothing]}
    torch.testing.assert_close(patched(given, **options), layer(given, **options))
    patched(given, training=True)
    for one in make(dtype="float64")[:2]:
        assert one([x.detach().double() for x in given]).dtype == torch.float32  # Keras's, and so ours
    reasons = [fallback.reason for fallback in report.fallbacks]
    assert reasons == ["a row with nothing to attend", "dropout of the alignments"]
    with pytest.raises(ValueError, match="must be called on a list of inputs"):
        patched(given[0])


def test_a_functional_model_traced_saved_and_copied(tmp_path):
    query, value = keras.Input((TQ, DIM)), keras.Input((TK, DIM))
    context = keras.layers.AdditiveAttention()([query, value])
    model = keras.Model([query, value], keras.layers.Dense(2)(context))
    given = [x.detach() for x in inputs(count=2)]
    expected = model(given)
    names = list(model.state_dict())
    report = patch(model)
    assert [cls for _, cls in report.replaced] == [keras.layers.AdditiveAttention]
    torch.testing.assert_close(model(given), expected)
    assert list(model.state_dict()) == names and report.fallbacks == []
    attention = next(layer for layer in model.layers if isinstance(layer, patching.Fused))
    assert attention([keras.Input((TQ, DIM)), keras.Input((TK, DIM))]).shape == (None, TQ, DIM)  # symbolic
    model.save(tmp_path / "model.keras")
    for other in (
        keras.saving.load_model(tmp_path / "model.keras"),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        torch.testing.assert_close(other(given), expected)
        assert len(patch(other).replaced) == 1
        torch.testing.assert_close(other(given), expected)
    unpatch(model)
    assert not any(isinstance(layer, patching.Fused) for layer in model.layers)
    torch.testing.assert_close(model(given), expected)


def test_config_and_fit():
    layer, patched, _ = make()
    assert patched.get_config().keys() == layer.get_config().keys()
    query, value = keras.Input((TQ, DIM)), keras.Input((TK, DIM))
    context = keras.layers.AdditiveAttention()([query, value])
    model = keras.Model([query, value], keras.layers.Dense(1)(context))
    patch(model)
    model.compile(optimizer="sgd", loss="mse")
    given = [x.detach().numpy() for x in inputs(count=2)]
    before = model.get_weights()
    model.fit(given, given[0][..., :1], epochs=1, verbose=0)
    assert any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))


def test_implicit_masks():
    """Those that Embedding layers hand on."""

    def make_model():
        query, value = keras.Input((TQ,), dtype="int32"), keras.Input((TK,), dtype="int32")
        embedding = keras.layers.Embedding(9, DIM, mask_zero=True)
        context = keras.layers.AdditiveAttention()([embedding(query), embedding(value)])
        return keras.Model([query, value], context)

    model, original = make_model(), make_model()
    original.set_weights(model.get_weights())
    report = patch(model)
    given = [torch.randint(1, 9, mask.shape) * mask for mask in (QUERY_MASK, VALUE_MASK)]
    torch.testing.assert_close(model(given), original(given))
    assert len(report.replaced) == 1 and report.fallbacks == []
    assert (model(given)[1, 2:] == 0).all()  # the query's mask


def test_layers_that_pytorch_does_not_see():
    class Several(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = keras.layers.AdditiveAttention()
            self.others = [keras.layers.AdditiveAttention(), keras.layers.AdditiveAttention()]

        def call(self, given):
            return self.first(given) + sum(layer(given) for layer in self.others)

    model, given = Several(), inputs(count=2)
    expected = model(given)
    report = patch(model)
    assert len(report.replaced) == 3 and len({name for name, _ in report.replaced}) == 3
    torch.testing.assert_close(model(given), expected)
    assert len(unpatch(model)) == 3 and report.fallbacks == []
