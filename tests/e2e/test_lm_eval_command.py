"""The lm_eval command from arguments to results, offline, on a tiny base model with a random router."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dlplora.lm_eval import command, guard

TASK = "dlplora_nano_object_counting"


@pytest.fixture(scope="module")
def router(tiny_llama_folder: Path, tiny_pool: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM

    from dlplora.methods.base import MethodContext
    from dlplora.methods.dlp import DLP
    from dlplora.modules.lora_bank import AdapterBank

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    context = MethodContext(tokenizer=tiny_tokenizer, embedding=model.get_input_embeddings())
    return DLP.example_artifacts(tmp_path_factory.mktemp("router"), AdapterBank.from_pool(tiny_pool), context)["router"]


@pytest.fixture
def model_args(tiny_llama_folder: Path, tiny_pool: Path, router: Path) -> str:
    return f"method=dlp,pretrained={tiny_llama_folder},pool={tiny_pool},router={router}"


def results_in(folder: Path) -> dict[str, Any]:
    (found,) = folder.rglob("results_*.json")
    return json.loads(found.read_text())


def test_the_whole_command(model_args: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "dlplora", "--model_args", f"{model_args},method.renormalize=sum"]
    arguments += ["--tasks", f"{TASK},dlplora_nano_news_summary", "--limit", "3", "--batch_size", "4", "--device", "cpu"]
    arguments += ["--gen_kwargs", "max_gen_toks=6", "--output_path", str(tmp_path), "--log_samples"]
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert TASK in shown
    saved = results_in(tmp_path)
    assert saved["n-samples"][TASK]["effective"] == 3
    assert saved["config"]["dlplora_method"] == "dlp"
    assert saved["config"]["dlplora_routing"]["num_plans"] == 6
    (samples,) = tmp_path.rglob(f"samples_{TASK}_*.jsonl")
    assert len(samples.read_text().splitlines()) == 3


def test_a_group_and_the_user_s_own_task(model_args: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "tasks"
    mine.mkdir()
    (mine / "docs.py").write_text(
        "import datasets\n\n\ndef build(**_):\n"
        "    return datasets.DatasetDict({'test': datasets.Dataset.from_list([{'q': 'the cat', 'a': 'sees'}] * 3)})\n"
    )
    (mine / "mine.yaml").write_text(
        "task: my_task\ncustom_dataset: !function docs.build\noutput_type: loglikelihood\ntest_split: test\ndoc_to_text: '{{q}}'\n"
        "doc_to_target: '{{a}}'\nmetric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]\n"
    )
    arguments = ["run", "--model", "dlplora", "--model_args", model_args, "--tasks", "my_task", "--device", "cpu"]
    arguments += ["--output_path", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:  # lm-eval's own thousands of tasks take 20 s to index and are not under test
        patch.setattr(guard, "_only_our_tasks", lambda options: True)
        assert command.main([*arguments, "--include_path", str(mine)]) == 0
    assert results_in(tmp_path)["results"]["my_task"]["perplexity,none"] > 1
    assert "my_task" in capsys.readouterr().out


def test_settings_of_the_method_as_a_mapping(model_args: str, tmp_path: Path) -> None:
    """Both spellings give the same answers, which are not those of the default."""
    found = {}
    for name, setting in (
        ("dotted", "method.selector=argmax"),
        ("mapping", 'method_params={"selector":"argmax","renormalize":"sum"}'),
        ("default", "seed=0"),
    ):
        arguments = ["--model", "dlplora", "--model_args", f"{model_args},{setting}", "--tasks", TASK, "--limit", "3", "--batch_size", "4"]
        assert command.main([*arguments, "--device", "cpu", "--output_path", str(tmp_path / name)]) == 0
        found[name] = results_in(tmp_path / name)["config"]["dlplora_routing"]
    assert found["mapping"] == found["dotted"] != found["default"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("method=dlp", "method=dpl"), "unknown method 'dpl'. Did you mean 'dlp'"),
        (("method=dlp", "method=dlp,method.pp=0.3"), "unknown key 'pp'"),
        (("method=dlp", 'method=dlp,method_params={"pp":0.3}'), "unknown key 'pp'"),
        (("method=dlp", "method=dlp,method_params={'top_p':0.3}"), "must be a JSON object with double quotes"),
        (("pool=", "pools="), "unknown key 'pools'. Did you mean 'pool'"),
        (("pool=", "pool=/nowhere"), "/nowhere"),
        (("method=dlp", "method=dlp,batch_size=-1"), "'batch_size' must be a whole number of at least 1, auto or auto:N, got -1."),
        (("method=dlp", "method=dlp,max_length=abc"), "'max_length' must be int"),
        (("method=dlp", "method=dlp,dtype=int8"), "unknown dtype 'int8'"),
        (("method=dlp", "method=dlp,prefix_token_id=99999"), "'prefix_token_id' is 99999"),
    ],
)
def test_mistakes_are_one_line(change: tuple[str, str], message: str, model_args: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "dlplora", "--model_args", model_args.replace(*change), "--tasks", TASK, "--limit", "1", "--device", "cpu"]
    assert command.main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lm_eval: ")
    assert message in last


@pytest.mark.parametrize("limit", ["-1", "0", "nan"])
def test_a_limit_below_one_question(limit: str, model_args: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lm-eval itself ends in a traceback here, or evaluates nothing."""
    arguments = [
        "--model",
        "dlplora",
        "--model_args",
        model_args,
        "--tasks",
        TASK,
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "out"),
    ]
    assert command.main([*arguments, "--limit", limit]) == 2
    assert (
        capsys.readouterr().err
        == f"lm_eval: --limit must be a positive number of questions per task, or a share of them below 1, got {limit}.\n"
    )
    assert not (tmp_path / "out").exists()


def test_the_module_runs_as_a_program(model_args: str) -> None:
    arguments = ["--model", "dlplora", "--model_args", model_args, "--tasks", TASK, "--limit", "1", "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "dlplora.lm_eval"]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert TASK in done.stdout


@pytest.mark.slow
def test_two_processes_share_the_questions(model_args: str, tmp_path: Path) -> None:
    """The questions are divided; the results and the routing statistics cover all of them, as in one process."""
    arguments = ["--model", "dlplora", "--model_args", model_args, "--tasks", TASK, "--limit", "5", "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dlplora.lm_eval"]
    together = [*launch, *arguments, "--output_path", str(tmp_path / "two")]
    done = subprocess.run(together, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "on rank 1" in done.stderr
    assert command.main([*arguments, "--output_path", str(tmp_path / "one")]) == 0
    two, one = results_in(tmp_path / "two"), results_in(tmp_path / "one")
    assert two["n-samples"][TASK]["effective"] == 5
    assert two["results"] == one["results"]
    for name, value in one["config"]["dlplora_routing"].items():
        assert two["config"]["dlplora_routing"][name] == pytest.approx(value), name


def test_methods_that_need_examples_find_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded pool brings its suite along; a pool of one's own finds rows under DLPLORA_DATA, or says that it has none."""
    arguments = ["--model", "dlplora", "--tasks", TASK, "--limit", "2", "--device", "cpu", "--model_args"]
    assert command.main([*arguments, "method=lorauter"]) == 0
    assert TASK in capsys.readouterr().out


def test_a_pool_without_rows_is_told_so(tiny_llama_folder: Path, tiny_pool: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.delenv("DLPLORA_DATA", raising=False)
    arguments = ["--model", "dlplora", "--tasks", TASK, "--limit", "2", "--device", "cpu", "--model_args"]
    assert command.main([*arguments, f"method=lorauter,pretrained={tiny_llama_folder},pool={tiny_pool}"]) == 2
    assert "needs 20 training inputs of every expert" in capsys.readouterr().err


def test_an_unknown_task_of_ours_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--model", "dlplora", "--tasks", "dlplora_nano_mqc", "--limit", "1", "--device", "cpu"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lm_eval: unknown task dlplora_nano_mqc.")
    assert "dlplora_nano_mcq" in last


def test_outside_a_repository_git_says_nothing(model_args: str, tmp_path: Path) -> None:
    """In a process of its own: git writes to the terminal, not to Python's streams."""
    arguments = ["--model", "dlplora", "--model_args", model_args, "--tasks", TASK, "--limit", "2", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "dlplora.lm_eval", *arguments, "--output_path", str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fatal" not in done.stderr
    assert results_in(tmp_path)["git_hash"] is None
