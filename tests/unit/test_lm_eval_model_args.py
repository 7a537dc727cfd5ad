"""What may stand in --model_args: strictness, the two ways to set method parameters, lists of experts."""

from __future__ import annotations

import json

import pytest

from dlplora.errors import ConfigError
from dlplora.lm_eval.distributed import usable_device
from dlplora.lm_eval.harness_options import parse_harness_options, present_device, require_fit
from dlplora.lm_eval.model_args import ModelArgs, parse_model_args, split_text, with_mappings_as_json


def test_nothing_means_the_embedded_model_with_dlp() -> None:
    model, harness = parse_model_args({"batch_size": 4, "device": None})
    assert model == ModelArgs()
    assert (model.method, model.pretrained, model.pool, model.dtype) == ("dlp", None, None, "auto")
    assert harness == {"batch_size": 4}


def test_dotted_keys_and_the_mapping_meet() -> None:
    model, _ = parse_model_args({"method_params": {"threshold": 0.3, "top_k": 2}, "method.top_k": 4, "method.selector": "topk"})
    assert model.method_params == {"threshold": 0.3, "top_k": 4, "selector": "topk"}


def test_the_mapping_may_be_json_text() -> None:
    model, _ = parse_model_args({"method_params": '{"flag": true, "p": 0.5}'})
    assert model.method_params == {"flag": True, "p": 0.5}
    with pytest.raises(ConfigError, match="must be a JSON object"):
        parse_model_args({"method_params": "p:0.5"})
    with pytest.raises(ConfigError, match="must map settings"):
        parse_model_args({"method_params": "[1]"})


def test_texts_with_mappings() -> None:
    assert split_text('method=dlp,method_params={"top_p":0.6,"selector":"nucleus"},names=[a,b],device=cpu') == {
        "method": "dlp",
        "method_params": {"top_p": 0.6, "selector": "nucleus"},
        "names": "[a,b]",
        "device": "cpu",
    }
    assert split_text('{"method":"dlp","method_params":{"a":{"b":1}}}') == {"method": "dlp", "method_params": {"a": {"b": 1}}}
    assert split_text("dtype=float32,seed=3,trust_remote_code=true") == {"dtype": "float32", "seed": 3, "trust_remote_code": True}
    for text, part in (("method_params={'p':1}", "double quotes"), ("method_params={", "JSON object"), ('{"a":1', "JSON object")):
        with pytest.raises(ConfigError, match=part):
            split_text(text)
    with pytest.raises(ConfigError, match="expected key=value, got 'dlp'"):
        split_text('dlp,method_params={"p":1}')


@pytest.mark.parametrize("spelling", [["--model_args", "{}"], ["--model_args={}"], ["-a", "{}"]])
def test_a_command_line_with_a_mapping_becomes_json(spelling: list[str]) -> None:
    text = 'method=dlp,method_params={"top_p":0.6}'
    given = [part.replace("{}", text) for part in spelling]
    found = with_mappings_as_json(["run", *given, "--tasks", "x"])
    assert found[0] == "run"
    assert found[-2:] == ["--tasks", "x"]
    assert json.loads(found[2]) == {"method": "dlp", "method_params": {"top_p": 0.6}}
    several = with_mappings_as_json(["--model_args", "method=dlp", 'method_params={"top_p":0.6}', "--tasks", "x"])
    assert json.loads(several[1]) == {"method": "dlp", "method_params": {"top_p": 0.6}}
    plain = ["--model_args", "method=dlp,names=[a,b]", "seed=1", "--limit", "2"]
    assert with_mappings_as_json(plain) == plain


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", -1.0), ("batch_size", 0), ("batch_size", "-1"), ("batch_size", "abc"), ("batch_size", ""), ("batch_size", 2.5),
        ("batch_size", True), ("batch_size", "auto:x"), ("batch_size", "auto:0"), ("batch_size", "automatic"), ("max_batch_size", 0),
        ("max_batch_size", "abc"), ("max_length", 0), ("max_length", -5.0), ("max_length", "abc"), ("max_length", 2.5), ("max_length", ""),
        ("softmax_dtype", "foo"), ("softmax_dtype", "int8"), ("mixed_precision_dtype", "auto"), ("add_bos_token", "maybe"),
        ("prefix_token_id", "x"), ("prefix_token_id", -1.0), ("enable_thinking", True), ("enable_thinking", "perhaps"),
        ("chat_template_args", 3),
    ],
)  # fmt: skip
def test_options_of_the_harness_are_checked(key: str, value: object) -> None:
    """lm-eval reads ``-1`` as ``-1.0``, and takes a batch size below one for an evaluation of no questions."""
    with pytest.raises(ConfigError, match=rf"^--model_args: .*{key}"):
        parse_model_args({key: value})


def test_options_of_the_harness_become_what_it_expects() -> None:
    import torch

    given = {"batch_size": "4", "max_length": 64, "softmax_dtype": torch.float32, "max_batch_size": 8.0, "add_bos_token": None, "pool": "p"}
    expected = {"batch_size": 4, "max_length": 64, "softmax_dtype": "float32", "max_batch_size": 8}
    assert parse_harness_options(given) == expected
    for value in ("auto", "auto:3"):
        assert parse_harness_options({"batch_size": value}) == {"batch_size": value}
    assert parse_harness_options({"enable_thinking": True, "think_end_token": "</think>"})["enable_thinking"] is True


def test_a_context_beyond_a_table_of_positions_is_refused() -> None:
    from transformers import GPT2Config, LlamaConfig

    table, rotary = GPT2Config(n_positions=64), LlamaConfig(max_position_embeddings=64)
    with pytest.raises(ConfigError, match="'max_length' is 65, but the base model has 64 positions"):
        require_fit({"max_length": 65}, table, 10)
    require_fit({"max_length": 64}, table, 10)
    require_fit({"max_length": 65}, rotary, 10)
    with pytest.raises(ConfigError, match="'prefix_token_id' is 10, but the tokenizer has 10 tokens"):
        require_fit({"prefix_token_id": 10}, rotary, 10)


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert present_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert present_device("cuda:1") == torch.device("cuda:1")
    for name in ("cuda:2", "mps", "meta"):
        with pytest.raises(ConfigError, match=f"device '{name}' does not exist"):
            present_device(name)
