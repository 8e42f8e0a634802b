import importlib
import importlib.util
import sys

import pytest

from d2go_commands import D2SCALE_TRAIN, LACKS_QUANTIZATION, RETINANET, errors
from d2scale.errors import MissingPackageError


@pytest.fixture
def put_back(monkeypatch):
    """Treat a module as one that torch has removed, and put it back."""
    from d2scale.d2go import environment

    def run(source, *functions):
        name = "torch.ao.gone_package.gone"
        monkeypatch.setattr(environment, "_REMOVED", {name: (source, functions)})
        monkeypatch.delitem(sys.modules, name, raising=False)
        environment.put_back_quantization()
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
        return importlib.import_module(name)

    return run


def test_functions_are_those_of_the_other_package(put_back):
    module = put_back("math", "sqrt")
    assert module.sqrt(4.0) == 2.0
    assert importlib.util.find_spec(module.__name__) is not None


def test_without_the_other_package_a_call_says_what_to_install(put_back):
    module = put_back("no_such_package.quantize", "prepare")
    with pytest.raises(MissingPackageError, match=r"needs torchao.*pip install torchao"):
        module.prepare()


def test_what_torch_has_is_left_alone(monkeypatch):
    from d2scale.d2go import environment

    monkeypatch.setattr(environment, "_REMOVED", {"torch.nn.modules": ("math", ("sqrt",))})
    before = sys.modules["torch.nn.modules"]
    environment.put_back_quantization()
    assert sys.modules["torch.nn.modules"] is before


@pytest.mark.skipif(
    not LACKS_QUANTIZATION or importlib.util.find_spec("torchao") is not None,
    reason="needs a torch without PT2E, and no torchao",
)
def test_quantization_without_torchao_is_one_line(d2go, tmp_path):
    output = d2go(RETINANET, "QUANTIZATION.PT2E", "True", name=D2SCALE_TRAIN, status=2)
    (line,) = errors(output)
    assert "QUANTIZATION.PT2E with this version of torch needs torchao" in line
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.skipif(not LACKS_QUANTIZATION, reason="needs a torch without PT2E")
def test_d2go_quantizes_by_torchao():
    import torch
    from d2go.quantization import modeling
    from d2go.runner import GeneralizedRCNNRunner

    cfg = GeneralizedRCNNRunner.get_default_cfg()
    cfg.QUANTIZATION.PT2E = True
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    images = torch.rand(1, 3, 8, 8)
    prepared = modeling.prepare_fake_quant_model(cfg, model, False, (images,))
    prepared(images)
    quantized = modeling.convert_to_quantized_model(cfg, prepared)
    torch.testing.assert_close(quantized(images), model(images), rtol=0.0, atol=0.05)
    assert not torch.equal(quantized(images), model(images))
