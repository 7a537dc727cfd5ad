"""Parts of training by hand: batches, encoding, schedules, the optimizer of the base model, disturbed prompts."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dlplora.data.batching import BatchSchedule, StepLoader, TaskStream, parts_by_length
from dlplora.data.encoding import collate, encode_items, encode_pairs
from dlplora.errors import ConfigError, TaskError
from dlplora.inference.backbones import NANO_ASSETS
from dlplora.modules.router import MiniMLPRouter
from dlplora.tasks.types import Item
from dlplora.training.checkpoints import AtomicCheckpointIO
from dlplora.training.config_check import first_reason
from dlplora.training.muon import MuonWithAdamW, orthogonalize
from dlplora.training.router import LitRouter, expected_calibration_error
from dlplora.training.settings import LoRASettings, OptimizerSettings, derive_seed, is_logged, step_rng


def test_every_row_once_a_pass_and_the_same_in_any_company() -> None:
    stream = TaskStream("pets", 7, 3)
    rows = [stream.row(position) for position in range(21)]
    assert all(sorted(rows[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert rows[:7] != rows[7:14]
    assert TaskStream("pets", 7, 3).row(16) == rows[16]  # any position alone
    assert [TaskStream("cats", 7, 3).row(position) for position in range(7)] != rows[:7]


def test_tasks_come_equally_often_whatever_their_size() -> None:
    lengths = {"small": [1] * 3, "large": list(range(1, 51))}
    plan = BatchSchedule(lengths, batch_size=6, seed=1, length_group=4)
    seen = Counter(name for step in range(40) for name, _ in plan.batch(step))
    assert seen["small"] == seen["large"] == 120
    again = BatchSchedule(lengths, batch_size=6, seed=1, length_group=4)
    assert [again.batch(step) for step in (17, 3, 39)] == [plan.batch(step) for step in (17, 3, 39)]
    other = BatchSchedule(lengths, batch_size=6, seed=2, length_group=4)
    assert [other.batch(step) for step in range(8)] != [plan.batch(step) for step in range(8)]


def test_length_groups_save_padding_and_lose_no_row() -> None:
    lengths = {"a": [int(x) for x in np.random.default_rng(0).integers(5, 60, size=96)]}

    def padding(group: int) -> int:
        plan = BatchSchedule(lengths, batch_size=8, seed=0, length_group=group)
        batches = [[lengths["a"][row] for _, row in plan.batch(step)] for step in range(12)]
        return sum(len(batch) * max(batch) - sum(batch) for batch in batches)

    grouped = BatchSchedule(lengths, batch_size=8, seed=0, length_group=12)
    assert sorted(row for step in range(12) for _, row in grouped.batch(step)) == list(range(96))
    assert padding(12) < 0.3 * padding(1)


def test_a_loader_goes_on_where_it_stood() -> None:
    loader = StepLoader(lambda step: {"step": step}, 5)
    iterator = iter(loader)
    assert [next(iterator)["step"] for _ in range(2)] == [0, 1]
    resumed = StepLoader(lambda step: {"step": step}, 5)
    resumed.load_state_dict(loader.state_dict())
    assert [batch["step"] for batch in resumed] == [2, 3, 4]
    assert [batch["step"] for batch in resumed] == [0, 1, 2, 3, 4]


def test_the_border_between_prompt_and_answer_is_lm_evals(tiny_tokenizer: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    class Bare(HFLM):
        def __init__(self) -> None:
            self.tokenizer, self.backend, self.add_bos_token = tiny_tokenizer, "causal", None
            self.custom_prefix_token_id = None

    for context, continuation in (("the cat", " sees a box"), ("Mia  ", " likes"), ("a\n", "b")):
        ours = encode_pairs(tiny_tokenizer, [context], [continuation])[0]
        assert ours == tuple(Bare()._encode_pair(context, continuation))


def test_encoded_rows_and_their_loss_positions(tiny_tokenizer: Any) -> None:
    items = [Item("t", "the cat sees", "a box"), Item("t", "a", "the plum and the pear")]
    encoded = encode_items(tiny_tokenizer, items, 64)
    for item, row in zip(items, encoded.items, strict=True):
        assert tiny_tokenizer.decode(row.ids[1:-1]) == f"{item.prompt} {item.answer}"
        assert (row.ids[0], row.ids[-1]) == (tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id)
        assert tiny_tokenizer.decode(row.ids[1 : row.num_prompt]) == item.prompt
    batch = collate(encoded.items, 0)
    flat_next = torch.cat([batch["input_ids"], torch.zeros(2, 1, dtype=torch.long)], dim=1)[:, 1:].flatten()
    assert torch.equal(flat_next[batch["hidden_index"]], batch["targets"])
    assert float(batch["weights"].sum()) == pytest.approx(1.0)
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["targets"])
    short = encode_items(tiny_tokenizer, items, 9)
    assert short.num_truncated >= 1
    assert all(len(row) <= 9 for row in short.items)
    assert short.items[1].ids.tolist()[-1] == tiny_tokenizer.eos_token_id
    with pytest.raises(TaskError, match="no prompt fits before it"):
        encode_items(tiny_tokenizer, items, 3)


def test_schedule_by_hand() -> None:
    settings = OptimizerSettings(lr=2.0, warmup_steps=4, decay_fraction=0.5)
    factors = [settings.rate_factor(step, 10) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    short = OptimizerSettings(warmup_steps=20, decay_fraction=0.6)  # a router on few rows never came near its rate
    assert [round(short.rate_factor(step, 10), 3) for step in range(10)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.833, 0.667, 0.5, 0.333, 0.167]
    assert max(OptimizerSettings(warmup_steps=20, decay_fraction=1.0).rate_factor(step, 8) for step in range(8)) == pytest.approx(7 / 8)
    assert [OptimizerSettings(warmup_steps=0, decay_fraction=0).rate_factor(step, 3) for step in range(3)] == [1.0, 1.0, 1.0]
    built = settings.build([torch.nn.Parameter(torch.ones(1))], 10, period=10)
    rates = []
    for _ in range(12):
        rates.append(built["optimizer"].param_groups[0]["lr"])
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([2 * factor for factor in [*factors, *factors[:2]]])
    for bad in ({"lr": 0.0}, {"warmup_steps": -1}, {"decay_fraction": 1.5}):
        with pytest.raises(ConfigError, match="optimizer"):
            OptimizerSettings(**bad)
    for worse in ({"rank": 0}, {"lora_dropout": 1.0}, {"target_modules": ()}):
        with pytest.raises(ConfigError, match="lora"):
            LoRASettings(**worse)
    assert LoRASettings(rank=4, lora_alpha=8, use_rslora=True).scaling == 4.0


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 16), (16, 40), (8, 8)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=generator)))
        assert float(values.min()) > 0.3
        assert float(values.max()) < 1.3
    weight = torch.nn.Parameter(torch.zeros(8, 32))
    norm = torch.nn.Parameter(torch.zeros(8))
    optimizer = MuonWithAdamW([weight], [norm], lr=0.1, adam_lr=0.01, weight_decay=0.0)
    weight.grad, norm.grad = torch.randn(8, 32, generator=generator), torch.randn(8, generator=generator)
    optimizer.step()
    values = torch.linalg.svdvals(weight.detach())
    assert 0.03 < float(values.min()) <= float(values.max()) < 0.13
    torch.testing.assert_close(norm.detach(), -0.01 * norm.grad.sign(), atol=1e-5, rtol=0)


def test_random_numbers_of_a_step_leave_the_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with step_rng(1, 2, 0, torch.device("cpu")):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with step_rng(1, 2, 0, torch.device("cpu")):
        assert torch.equal(torch.rand(3), inside)
    with step_rng(1, 2, 1, torch.device("cpu")):
        assert not torch.equal(torch.rand(3), inside)
    assert derive_seed("a", 1) == derive_seed("a", 1) != derive_seed("a", 2)


@pytest.mark.parametrize(("drop", "noise"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.3), (0.9, 0.9)])
def test_disturbed_prompts(drop: float, noise: float, tiny_tokenizer: Any) -> None:
    module = LitRouter(token_drop=drop, token_noise=noise)
    module.__dict__["tokenizer"] = tiny_tokenizer
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 40, (300,), generator=generator)
    mask = (torch.arange(40)[None] < lengths[:, None]).long()
    ids = torch.randint(3, 300, (300, 40), generator=generator)
    torch.manual_seed(0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(300)}
    out = module.disturbed(batch)
    kept = out["attention_mask"].bool()
    assert bool(kept[:, 0].all())
    assert torch.equal(out["input_ids"][:, 0], ids[:, 0])
    assert not bool((kept & (mask == 0)).any())
    movable = mask.bool()
    movable[:, 0] = False
    dropped = (~kept)[movable].float().mean()
    replaced = (out["input_ids"] != ids)[movable].float().mean()
    assert float(dropped) == pytest.approx(drop / 2, abs=0.04)
    assert float(replaced) == pytest.approx(noise / 2, abs=0.04)
    if drop == noise == 0.0:
        assert torch.equal(out["input_ids"], ids)
        assert torch.equal(kept, mask.bool())


def test_rates_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        LitRouter(token_drop=1.0)


def test_calibration_error_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1])
    # bins of 1/15: 0.9 twice (one right), 0.6 (right), 0.8 (right)
    assert expected_calibration_error(probabilities, labels) == pytest.approx((abs(0.5 - 0.9) * 2 + (1 - 0.6) + (1 - 0.8)) / 4)


def test_a_failed_write_leaves_the_old_resume_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step=1.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"global_step": 1}, path)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        writer.save_checkpoint({"global_step": 2}, path)
    assert writer.load_checkpoint(path) == {"global_step": 1}
    with pytest.raises(ConfigError, match="not found"):
        writer.load_checkpoint(tmp_path / "no.ckpt")


def test_long_parser_messages_become_one_line() -> None:
    text = "Parser key \"model\":\n  Does not validate against any of the Union subtypes\n  - Expected a <class 'int'>\n" + "x" * 900
    reason = first_reason(text)
    assert "\n" not in reason
    assert len(reason) <= 400
    assert reason.startswith("model: Expected a int")
    assert first_reason("") == "the configuration cannot be parsed"


@pytest.mark.skipif(not (NANO_ASSETS / "router").is_dir(), reason="the embedded router is not there")
def test_the_shipped_router_knows_wordings_it_never_saw() -> None:
    from dlplora.inference.loading import load_backbone
    from dlplora.tasks.nano import nano_suite

    model, tokenizer = load_backbone(None, dtype="float32", device="cpu")
    router = MiniMLPRouter.load(NANO_ASSETS / "router", model.get_input_embeddings())
    assert router.num_trained_parameters <= 5_000_000
    right = total = 0
    for task in nano_suite().tasks:
        for item in task.items("test", 20):
            ids = torch.tensor([tokenizer(item.prompt)["input_ids"]])
            with torch.no_grad():
                probabilities, _ = router.probabilities(ids, torch.ones_like(ids))
            right += router.names[int(probabilities.argmax())] == task.name
            total += 1
    assert total == 26 * 20
    assert right / total >= 0.97
    assert math.isfinite(float(router.temperature))
    assert 0.05 < float(router.temperature) < 20


def test_rows_of_a_step_are_cut_with_the_least_padding() -> None:
    assert parts_by_length([25, 28, 30, 31, 35, 40, 45, 122], 2) == [7, 8]
    assert parts_by_length([9] * 7 + [10], 2) == [4, 8]  # 7 and 1 would need the memory of 63 tokens, 40 are what two equal batches need
    rng = np.random.default_rng(0)
    for _ in range(60):
        lengths = sorted(rng.integers(1, 130, rng.integers(1, 10)).tolist())
        count = int(rng.integers(1, len(lengths) + 1))
        bound = -(-len(lengths) // count) * lengths[-1]

        def sizes(ends: Sequence[int], lengths: list[int] = lengths) -> list[int]:
            return [(end - start) * lengths[end - 1] for start, end in itertools.pairwise([0, *ends])]

        every = [sizes([*inner, len(lengths)]) for inner in itertools.combinations(range(1, len(lengths)), count - 1)]
        found = parts_by_length(lengths, count)
        assert len(found) == count
        assert found == sorted(set(found))
        assert found[-1] == len(lengths)
        assert max(sizes(found)) <= bound
        assert sum(sizes(found)) == min(sum(one) for one in every if max(one) <= bound)


@pytest.mark.parametrize(("every", "logged"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (0, []), (-1, [])])
def test_no_batch_is_logged_every_zero_steps(every: int, logged: list[int]) -> None:
    trainer = SimpleNamespace(log_every_n_steps=every)
    assert [batch for batch in range(4) if is_logged(trainer, batch)] == logged
