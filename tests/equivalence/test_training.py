"""Training against plain loops: PEFT with torch's AdamW for one expert, each expert alone for a pool."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlplora.cli.fit import main as fit
from dlplora.data.datamodule import ExpertDataModule
from dlplora.tasks.registry import get_suite
from dlplora.training.settings import expert_generator, initial_lora_a
from tests.toy_tasks import NAMES, write_tasks

STEPS, BATCH = 7, 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("rows"))


def train(config: str, backbone: Path, rows: Path, out: Path, tasks: str, *more: str) -> Path:
    arguments = ["fit", "--config", f"configs/train/{config}.yaml", "--model.init_args.backbone", str(backbone)]
    arguments += ["--data.init_args.suite", f"local:{tasks}", "--data.init_args.data_root", str(rows)]
    arguments += ["--data.init_args.num_steps", str(STEPS), "--data.init_args.batch_size", str(BATCH), "--seed_everything", "3"]
    arguments += ["--model.init_args.lora.lora_dropout", "0", "--model.init_args.optimizer.warmup_steps", "2"]
    arguments += ["--model.init_args.export_folder", str(out), "--trainer.default_root_dir", f"{out}_logs", *more]
    assert fit(arguments) == 0
    return out


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def by_hand(backbone: Path, rows: Path, task: str, steps: int = STEPS, accumulate: int = 1) -> dict[str, torch.Tensor]:
    """The same rows, the same start, PEFT's layers, HF's own loss, torch's AdamW and clipping; ``accumulate`` batches are one."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModelForCausalLM.from_pretrained(backbone)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = expert_generator(3, task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(initial_lora_a((parameter.shape[0], parameter.shape[1]), generator))
    data = ExpertDataModule(suite=f"local:{task}", data_root=str(rows), batch_size=BATCH, num_steps=steps, seed=3)
    plan_source = get_suite(f"local:{task}", str(rows)).task(task).items("train", 3000, 3)

    class Shell:
        def __init__(self) -> None:
            self.tokenizer = tokenizer

    class Trainer:
        lightning_module, world_size, global_rank, current_epoch = Shell(), 1, 0, 0

    data.trainer = Trainer()  # type: ignore[assignment]
    data.setup("fit")
    plan = data.schedule([task])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    updates = steps // accumulate
    for update in range(updates):
        fall = min(1.0, (updates - update) / (0.6 * updates))
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (update + 1) / 2) * fall
        ids, labels = [], []
        for _, index in [row for part in range(accumulate) for row in plan.batch(update * accumulate + part)]:
            item = plan_source[index]
            prompt = tokenizer(item.prompt)["input_ids"]
            whole = tokenizer(f"{item.prompt} {item.answer}")["input_ids"] + [tokenizer.eos_token_id]
            ids.append(whole)
            labels.append([-100] * len(prompt) + whole[len(prompt) :])
        width = max(map(len, ids))
        batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        targets = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
        model(input_ids=batch, attention_mask=mask, labels=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    from peft import get_peft_model_state_dict

    return {name: tensor.detach() for name, tensor in get_peft_model_state_dict(model).items()}


def test_an_expert_is_what_a_plain_peft_loop_trains(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    ours = exported(train("expert", tiny_llama_folder, rows, tmp_path / "it", "pets", "--data.init_args.tasks", "all"))
    truth = by_hand(tiny_llama_folder, rows, "pets")
    assert set(ours) == set(truth)
    moved = max(float(tensor.abs().max()) for name, tensor in truth.items() if "lora_B" in name)
    assert moved > 5e-3
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", ["sequential", "joint"])
def test_a_pool_is_its_experts_trained_alone(mode: str, tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    options = ["--model.init_args.mode", mode, "--trainer.gradient_clip_val", "1.0"]
    pool = train("experts", tiny_llama_folder, rows, tmp_path / mode, ",".join(NAMES), *options)
    for name in NAMES:
        truth = by_hand(tiny_llama_folder, rows, name)
        for key, tensor in exported(pool / name).items():
            torch.testing.assert_close(tensor, truth[key], atol=5e-4, rtol=1e-3)


def test_experts_train_together_on_layers_with_flattened_inputs(rows: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """OPT hands (B * T, I) to fc1 and fc2: rows of different experts must not mix, and fewer vectors than tokens are refused."""
    from transformers import OPTConfig, OPTForCausalLM

    from dlplora.errors import IncompatibleAdapterError
    from dlplora.training.grouped_lora import ActiveGroup, GroupedLoRALinear

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = OPTForCausalLM(OPTConfig(vocab_size=len(tiny_tokenizer), **sizes, max_position_embeddings=128, init_std=0.2))
    model.save_pretrained(tmp_path / "opt")
    tiny_tokenizer.save_pretrained(tmp_path / "opt")
    pools = {}
    for mode in ("sequential", "joint"):
        options = ["--model.init_args.mode", mode, "--model.init_args.lora.target_modules", "[q_proj,fc1,fc2]"]
        pools[mode] = train("experts", tmp_path / "opt", rows, tmp_path / mode, ",".join(NAMES), *options)
    for name in NAMES:
        alone = exported(pools["sequential"] / name)
        assert any("fc1" in key for key in alone)
        for key, tensor in exported(pools["joint"] / name).items():
            torch.testing.assert_close(tensor, alone[key], atol=5e-4, rtol=1e-3)
    active = ActiveGroup([(torch.ones(2, 1, 4), torch.ones(2, 3, 1))])
    active.grid.note(torch.nn.Identity(), (torch.zeros(2, 5),))
    layer = GroupedLoRALinear(torch.nn.Linear(4, 3), 0, active, 1.0, 0.0)
    assert layer(torch.ones(10, 4)).shape == (10, 3)
    with pytest.raises(IncompatibleAdapterError, match="mode=sequential"):
        layer(torch.ones(6, 4))


@pytest.mark.parametrize("mode", ["sequential", "joint"])
def test_accumulated_gradients_and_recomputed_layers_change_nothing(mode: str, tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    options = ["--model.init_args.mode", mode, "--trainer.gradient_clip_val", "1.0", "--trainer.accumulate_grad_batches", "2"]
    options += ["--data.init_args.num_steps", "10"]
    plain = train("experts", tiny_llama_folder, rows, tmp_path / mode, ",".join(NAMES), *options)
    again = [*options, "--model.init_args.gradient_checkpointing", "true"]
    recomputed = train("experts", tiny_llama_folder, rows, tmp_path / f"{mode}_again", ",".join(NAMES), *again)
    for name in NAMES:
        truth = by_hand(tiny_llama_folder, rows, name, steps=10, accumulate=2)
        for key, tensor in exported(plain / name).items():
            torch.testing.assert_close(tensor, truth[key], atol=5e-4, rtol=1e-3)
            assert torch.equal(exported(recomputed / name)[key], tensor)


@pytest.mark.parametrize("config", ["expert", "experts"])
def test_recomputation_runs_layers_twice(config: str, tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    calls: list[bool] = []
    forward = LlamaAttention.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.training)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", counted)
    counts, weights = [], []
    for flag in ("false", "true"):
        calls.clear()
        options = ["--model.init_args.gradient_checkpointing", flag, "--model.init_args.lora.lora_dropout", "0.3"]
        options += ["--data.init_args.tasks", "all"] if config == "expert" else ["--model.init_args.mode", "joint"]
        folder = train(config, tiny_llama_folder, rows, tmp_path / flag, "pets", *options, "--trainer.limit_val_batches", "0")
        counts.append(len(calls))
        weights.append(exported(folder if config == "expert" else folder / "pets"))
    assert counts[1] - counts[0] == 2 * STEPS  # two layers, each once more a step
    if config == "experts":
        assert not any(calls)  # the frozen base model stays in evaluation mode
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_exported_experts_load_in_peft(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    from dlplora.inference.fused_model import FusedCausalLM

    options = ["--model.init_args.lora.rank", "3", "--model.init_args.lora.use_rslora", "true"]
    pool = train("experts", tiny_llama_folder, rows, tmp_path / "pool", ",".join(NAMES), *options)
    manifest = json.loads((pool / "pool.json").read_text())
    assert [adapter["name"] for adapter in manifest["adapters"]] == list(NAMES)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    ids = torch.tensor([[1, 5, 9, 40, 33, 7]])
    fused = FusedCausalLM.from_pretrained(tiny_llama_folder, pool=pool, method="avg_delta")
    for index, name in enumerate(NAMES):
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), str(pool / name)).eval()
        with torch.no_grad(), fused.routing(torch.nn.functional.one_hot(torch.tensor(index), 3).float()):
            torch.testing.assert_close(fused(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    config = json.loads((pool / "pets" / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["bias"]) == (3, True, "none")


def test_another_task_joins_a_pool_and_the_rest_stays(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    pool = train("experts", tiny_llama_folder, rows, tmp_path / "pool", "colors,pets,echo", "--data.init_args.tasks", "colors,pets")
    before = exported(pool / "colors")
    train("experts", tiny_llama_folder, rows, pool, "colors,pets,echo", "--data.init_args.tasks", "echo")
    manifest = json.loads((pool / "pool.json").read_text())
    assert [adapter["name"] for adapter in manifest["adapters"]] == ["colors", "pets", "echo"]
    assert all(torch.equal(before[key], tensor) for key, tensor in exported(pool / "colors").items())


@pytest.mark.parametrize(
    ("option", "part"),
    [
        (["--trainer.accumulate_grad_batches", "2"], "multiple of accumulate_grad_batches (2)"),
        (["--trainer.max_epochs", "2"], "one epoch"),
        (["--model.init_args.lora.bias", "all"], "bias 'none'"),
        (["--model.init_args.group_size", "0"], "'group_size' must be at least 1"),
        (["--trainer.gradient_clip_algorithm", "value"], "clips by norm"),
    ],
)
def test_settings_that_would_change_the_experts_are_refused(
    option: list[str], part: str, tiny_llama_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        train("experts", tiny_llama_folder, rows, tmp_path / "pool", "pets", *option)
    assert part in capsys.readouterr().err
    assert not (tmp_path / "pool").exists()


class PowerCutError(RuntimeError):
    """Stands for whatever ends a process between two steps."""


@pytest.mark.parametrize(
    ("config", "module", "tasks", "last_step"),
    [
        ("expert", "dlplora.training.expert.LitExpert", "pets", 4),
        ("experts", "dlplora.training.expert_pool.LitExpertPool", "pets,echo", 9),
        ("router", "dlplora.training.router.LitRouter", "pets,echo", 5),
    ],
)
def test_a_resumed_run_ends_at_the_same_weights(
    config: str, module: str, tasks: str, last_step: int, tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The run dies after ``last_step``, its newest resume file is damaged on top, and the same command goes on from the one before."""
    content = yaml.safe_load(Path(f"configs/train/{config}.yaml").read_text())
    content["trainer"]["callbacks"] = [
        {"class_path": "dlplora.training.checkpoints.ResumeCheckpoint", "init_args": {"every_n_steps": 2, "keep": 3}}
    ]
    content["model"]["init_args"] |= {"backbone": str(tiny_llama_folder)}
    data = {"suite": f"local:{tasks}", "data_root": str(rows), "batch_size": BATCH} | ({} if config == "router" else {"num_steps": STEPS})
    content["data"]["init_args"] |= data | ({"tasks": "all"} if config == "expert" else {})
    if config != "router":
        content["model"]["init_args"]["lora"]["lora_dropout"] = 0.3
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(content))
    command = ["fit", "--config", str(tmp_path / "it.yaml"), "--trainer.max_epochs", "1", "--ckpt_path", "last"]

    def run(name: str) -> int:
        return fit(
            [
                *command,
                "--model.init_args.export_folder",
                str(tmp_path / name),
                "--trainer.default_root_dir",
                str(tmp_path / f"{name}_logs"),
            ]
        )

    assert run("whole") == 0
    room, _, name = module.rpartition(".")
    cls = getattr(importlib.import_module(room), name)
    original = cls.training_step

    def dying(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == last_step:
            raise PowerCutError
        return original(self, batch, batch_idx)  # type: ignore[no-any-return]

    monkeypatch.setattr(cls, "training_step", dying)
    with pytest.raises(PowerCutError):
        run("parts")
    monkeypatch.setattr(cls, "training_step", original)
    saved = sorted((tmp_path / "parts_logs" / "checkpoints").glob("*.ckpt"))
    frozen = [key for key in torch.load(saved[0], weights_only=True)["state_dict"] if "lora" not in key and "router." not in key]
    assert not frozen
    saved[-1].write_bytes(saved[-1].read_bytes()[:500])
    assert run("parts") == 0
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors"))
    assert files
    for file in files:
        first, second = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert set(first) == set(second)
        assert all(torch.equal(first[key], second[key]) for key in first), file


@pytest.mark.parametrize("preset", ["meteora_full", "mole_lr", "xlora_frozen"])
def test_gates_resume_to_the_same_weights(
    preset: str, tiny_llama_folder: Path, rows: Path, make_adapter: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """As above, for what ``LitFusion`` trains; its resume files hold what the method trains, and nothing of base model or pool."""
    from dlplora.training.fusion import LitFusion

    for seed, name in enumerate(("pets", "echo")):
        make_adapter(tmp_path / "pool" / name, seed=seed)
    content = yaml.safe_load(Path("configs/train/fusion.yaml").read_text())
    content["trainer"]["callbacks"][0]["init_args"] = {"every_n_steps": 2, "keep": 3}
    content["model"]["init_args"] |= {"method": preset, "pretrained": str(tiny_llama_folder), "pool": str(tmp_path / "pool")}
    content["model"]["init_args"]["optimizer"] |= {"lr": 0.05, "warmup_steps": 1}
    content["data"]["init_args"] |= {"suite": "local:pets,echo", "data_root": str(rows), "batch_size": BATCH, "num_steps": STEPS}
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(content))

    def run(name: str) -> int:
        folders = ["--model.init_args.export_folder", str(tmp_path / name), "--trainer.default_root_dir", str(tmp_path / f"{name}_logs")]
        return fit(["fit", "--config", str(tmp_path / "it.yaml"), "--ckpt_path", "last", *folders])

    assert run("whole") == 0
    original = LitFusion.training_step

    def dying(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 5:
            raise PowerCutError
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LitFusion, "training_step", dying)
    with pytest.raises(PowerCutError):
        run("parts")
    monkeypatch.setattr(LitFusion, "training_step", original)
    saved = sorted((tmp_path / "parts_logs" / "checkpoints").glob("*.ckpt"))
    first = load_file(tmp_path / "whole" / "method.safetensors")
    begun = torch.load(saved[0], weights_only=True)["state_dict"]
    own = {f"fused.method.{key}" for key in first}
    copies = {key for key in begun if key.endswith((".lora_a", ".lora_b"))}  # trained copies go by the name of the layer that runs them
    assert set(begun) - copies <= own
    assert sorted(map(tuple, (tensor.shape for tensor in begun.values()))) == sorted(
        map(tuple, (tensor.shape for tensor in first.values()))
    )
    assert run("parts") == 0
    second = load_file(tmp_path / "parts" / "method.safetensors")
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    learned = [key for key in first if f"fused.method.{key}" in begun and not torch.equal(first[key], begun[f"fused.method.{key}"])]
    assert learned  # it did go on learning after the resume file


def test_a_resume_file_with_code_in_it_is_refused(tiny_llama_folder: Path, rows: Path, tmp_path: Path, capsys: Any) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"global_step": 1, "state_dict": Evil()}, tmp_path / "bad.ckpt")
    with pytest.raises(AssertionError):
        train(
            "expert",
            tiny_llama_folder,
            rows,
            tmp_path / "it",
            "pets",
            "--data.init_args.tasks",
            "all",
            "--ckpt_path",
            str(tmp_path / "bad.ckpt"),
        )
    assert "cannot read checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "it").exists()
