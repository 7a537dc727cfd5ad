"""What may stand in --model_args: strictness, the two ways to set method parameters, lists of experts."""

from __future__ import annotations

import pytest

from dlplora.errors import ConfigError
from dlplora.evaluation.launch import usable_device
from dlplora.evaluation.model_args import ModelArgs, parse_model_args


def test_nothing_means_the_embedded_model_with_dlp() -> None:
    model, harness = parse_model_args({"batch_size": 4, "device": None})
    assert model == ModelArgs()
    assert (model.method, model.pretrained, model.pool, model.dtype) == ("dlp", None, None, "float32")
    assert harness == {"batch_size": 4}


def test_dotted_keys_and_the_mapping_meet() -> None:
    model, _ = parse_model_args({"method_params": {"p": 0.3, "k": 2}, "method.k": 4, "method.selector": "topk"})
    assert model.method_params == {"p": 0.3, "k": 4, "selector": "topk"}


def test_the_mapping_may_be_json_text() -> None:
    model, _ = parse_model_args({"method_params": '{"flag": true, "p": 0.5}'})
    assert model.method_params == {"flag": True, "p": 0.5}
    with pytest.raises(ConfigError, match="must be a JSON object"):
        parse_model_args({"method_params": "p:0.5"})
    with pytest.raises(ConfigError, match="must map settings"):
        parse_model_args({"method_params": "[1]"})


@pytest.mark.parametrize("given", ["a+b", "[a,b]", ["a", "b"], ("a", "b"), "['a', 'b']"])
@pytest.mark.parametrize("key", ["names", "adapters"])
def test_names_in_every_spelling(key: str, given: object) -> None:
    assert parse_model_args({key: given})[0].names == ("a", "b")


def test_names_twice_or_empty_are_refused() -> None:
    with pytest.raises(ConfigError, match="same option"):
        parse_model_args({"names": "a", "adapters": "b"})
    with pytest.raises(ConfigError, match="joined by"):
        parse_model_args({"names": "a++b"})


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'pretrain'\. Did you mean 'pretrained'"):
        parse_model_args({"pretrain": "x"})
    with pytest.raises(ConfigError, match="unknown key 'peft'"):
        parse_model_args({"peft": "x"})


def test_values_of_the_wrong_type() -> None:
    with pytest.raises(ConfigError, match="trust_remote_code"):
        parse_model_args({"trust_remote_code": "maybe"})


def test_numbers_that_are_names_become_text() -> None:
    model, _ = parse_model_args({"pretrained": 42, "revision": 1.5})
    assert (model.pretrained, model.revision) == ("42", "1.5")


def test_device_falls_back_only_from_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable_device("cuda:0") == torch.device("cpu")
    assert usable_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert usable_device("cuda:0") == torch.device("cuda:0")
    assert usable_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="unknown device 'gpuu'"):
        usable_device("gpuu")
