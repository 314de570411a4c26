"""FID's Inception-v3: against torch-fidelity's network and resize, and what is said of its weights."""

import importlib
import importlib.util
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from maskdit_jax.errors import UserError
from maskdit_jax.evaluation.features import inception
from maskdit_jax.interop import inception as names
from maskdit_jax.models.inception import SIDE, InceptionV3, resize

FIDELITY = "torch_fidelity"


@pytest.fixture(scope="module")
def oracle():
    """torch-fidelity's module of the network, without the package's face, which needs torchvision."""
    spec = importlib.util.find_spec(FIDELITY)
    if spec is None:
        pytest.skip("torch-fidelity is not installed: pip install --no-deps torch-fidelity==0.4.0")
    before = {name: module for name, module in sys.modules.items() if name.startswith(FIDELITY)}
    package = types.ModuleType(FIDELITY)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[FIDELITY] = package
    yield importlib.import_module(f"{FIDELITY}.feature_extractor_inceptionv3")
    for name in [name for name in sys.modules if name.startswith(FIDELITY)]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("height, width", [(8, 8), (32, 32), (256, 256), (299, 299), (300, 300), (64, 48)])
def test_resize_has_the_bits_of_tensorflow_1(oracle, height, width):
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.float32)
    expected = oracle.interpolate_bilinear_2d_like_tensorflow1x(
        torch.from_numpy(images).permute(0, 3, 1, 2), size=(SIDE, SIDE), align_corners=False
    )
    np.testing.assert_array_equal(resize(jnp.asarray(images)), expected.permute(0, 2, 3, 1).numpy())


@pytest.fixture(scope="module")
def network(oracle, tmp_path_factory):
    """torch-fidelity's network with random weights that keep the size of activations, and its file."""
    with pytest.MonkeyPatch.context() as patch:  # its constructor would fetch weights
        patch.setattr(oracle, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(oracle.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = oracle.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    rng = np.random.default_rng(0)
    for name, x in net.state_dict().items():
        if x.ndim == 4:
            x.copy_(torch.from_numpy(rng.normal(0, np.sqrt(2 / x[0].numel()), x.shape)))
        elif name.endswith(("running_var", "bn.weight")):
            x.copy_(torch.from_numpy(rng.uniform(0.8, 1.2, x.shape)))
        elif x.ndim == 1:
            x.copy_(torch.from_numpy(rng.normal(0, 0.2, x.shape)))
    file = tmp_path_factory.mktemp("inception") / names.FILES[0]
    torch.save(net.state_dict(), file)
    return net, file


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_as_users_do", "messages")
def test_features_are_torch_fidelitys(network, caplog):
    """All three outputs; the file is said not to be the published one, and its hash is the extractor's."""
    net, file = network
    extractor = inception(file, batch_size=1)
    assert names.SHA256 in caplog.text and extractor.digest in caplog.text
    images = np.random.default_rng(1).integers(0, 256, (2, 40, 56, 3), np.uint8)
    images[1] = images[1, :1]  # another texture, so that the two differ in every feature
    spatial = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: spatial.append(out[:, :7]))
    pool, logits = net(torch.from_numpy(images).permute(0, 3, 1, 2))
    expected = {"pool": pool, "logits": logits, "spatial": spatial[0].permute(0, 2, 3, 1).flatten(1)}
    features = extractor.extract(images)
    assert features.keys() == expected.keys()
    assert {name: x.shape[1] for name, x in features.items()} == {
        "pool": 2048,
        "spatial": 2023,
        "logits": 1008,
    }
    for name, x in expected.items():
        x = x.numpy()
        assert np.abs(x[0] - x[1]).max() > 0.05 * np.sqrt(np.mean(x**2)), name  # they tell images apart
        assert np.abs(features[name] - x).max() < 1e-4 * np.sqrt(np.mean(x**2)), name
    np.testing.assert_array_equal(extractor.extract(images[1:])["pool"], features["pool"][1:])  # alone
    grey = extractor.extract(images[..., :1])["pool"]
    np.testing.assert_array_equal(grey, extractor.extract(images[..., :1].repeat(3, axis=-1))["pool"])


@pytest.mark.slow
def test_names_and_shapes_are_torch_fidelitys(network):
    net, _ = network
    theirs = {name: tuple(x.shape) for name, x in net.state_dict().items() if x.ndim}
    params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(0))))[1])
    assert names._torch_shapes(params) == theirs


def test_an_absent_file_says_where_it_is_to_be_had(tmp_path):
    with pytest.raises(UserError) as refused:
        names.read_weights(tmp_path / "x.pth", {})
    for fragment in (*names.FILES, names.SHA256, "toshas/torch-fidelity", "mseitzer/pytorch-fid"):
        assert fragment in str(refused.value)
