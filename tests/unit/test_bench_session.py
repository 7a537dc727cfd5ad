"""``dlplora bench latency``: shapes, systems, the configuration, and what it refuses."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.bench import session
from dlplora.bench.hardware import require_memory, resident_bytes, step_bytes
from dlplora.bench.model_shapes import first_experts, load_shape, meta_model, needed_bytes, random_bank, share_weights
from dlplora.bench.released_loop import KeptExperts, LoopedLoRALinear
from dlplora.bench.rounds import round_orders
from dlplora.bench.session import run_bench
from dlplora.bench.settings import BenchConfig, Group, load_bench_config
from dlplora.bench.setup import BenchSetup, Entry
from dlplora.bench.systems import BUILTIN, ForcedRerouter, build_system, known_systems, make_workload
from dlplora.cli.bench import config_of
from dlplora.cli.main import build_parser, main
from dlplora.errors import ConfigError
from dlplora.inference.backbones import NANO_ASSETS
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.kernels.backends import BACKENDS
from dlplora.methods.registry import available_presets, build_method
from dlplora.reporting.latency.records import LatencyRecord, read_latency, reroutes_in
from dlplora.types import PromptBatch

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"prompt": (8,), "new_tokens": 2, "repeats": 2, "warmup": 0}
MILLIONS = {
    "smollm2-135m": 134.52,
    "qwen2-0.5b": 494.03,
    "qwen2-1.5b": 1543.71,
    "qwen2-7b": 7615.62,
    "llama2-7b": 6738.42,
    "llama3-8b": 8030.26,
}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> BenchSetup:
    model, tokenizer = load_shape("tiny", "float32", CPU)
    bank = random_bank(model, [f"expert_{index}" for index in range(4)])
    # adapters of the benchmark are small; here a difference between experts has to show
    for entry in bank.modules.values():
        entry.lora_a.mul_(20)
        entry.lora_b.mul_(20)
    return BenchSetup(model=model, tokenizer=tokenizer, bank=bank, folder=tmp_path_factory.mktemp("setup"))


def logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_shapes_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    assert sum(parameter.numel() for parameter in meta_model(name).parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_bytes_of_backbone_and_pool() -> None:
    # Qwen-2 0.5B: q 896 -> 896 and v 896 -> 128 at rank 8 in 24 layers are 540672 numbers per adapter
    assert needed_bytes("qwen2-0.5b", torch.bfloat16, 1000) == (494_032_768 * 2, 540_672 * 1000 * 2)
    with pytest.raises(ConfigError, match=r"does not fit into .* GB free on cpu: backbone x 1000000000.0 GB, 3 experts 0.0 GB. Use less"):
        require_memory({"backbone x": 10**18, "3 experts": 1000}, CPU, "Use less.")


def test_a_second_tree_shares_weights_but_not_layers(setup: BenchSetup) -> None:
    twin = share_weights(setup.model)
    assert twin.model.layers[0].self_attn is not setup.model.model.layers[0].self_attn
    assert twin.lm_head.weight is setup.model.lm_head.weight
    assert resident_bytes(setup.model, twin) == resident_bytes(setup.model)
    before = logits(setup.model, torch.tensor([[1, 5, 9]]))
    twin.model.layers[0].self_attn.q_proj = torch.nn.Identity()
    assert torch.equal(logits(setup.model, torch.tensor([[1, 5, 9]])), before)


def test_smaller_pools_are_views_of_the_largest(setup: BenchSetup) -> None:
    small = first_experts(setup.bank, 2)
    path = next(iter(small.modules))
    assert small.names == ("expert_0", "expert_1")
    assert small.modules[path].lora_a.data_ptr() == setup.bank.modules[path].lora_a.data_ptr()
    assert small.nbytes * 2 == setup.bank.nbytes


def test_step_bytes_by_hand(setup: BenchSetup) -> None:
    # tiny: two layers; q, o 32x32, k, v 32x16, mlp 3x32x48, two norms of 32; one norm of 32; a head of 3072x32; the embedding is looked up
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32 + 3072 * 32
    cached = 2 * 2 * 2 * 8 * (3 * 10)  # layers, keys and values, heads, width; three rows of ten tokens
    assert step_bytes(setup.model, 3, 10) == 4 * (weights + cached)


def test_every_system_computes_what_it_claims(setup: BenchSetup) -> None:
    """PEFT's models, driven here without a clock, against our fused layer on the same experts."""
    ids = make_workload(setup.tokenizer, CPU, 2, 9, 2).prompts.input_ids
    fused = FusedCausalLM(share_weights(setup.model), setup.tokenizer, setup.bank, build_method("avg_delta"), backend="reference")

    def build_method_system(weights: torch.Tensor) -> torch.Tensor:
        with fused.routing(weights):
            return logits(fused, ids)

    base = build_system(setup, Entry(system="base", experts=0)).modules[0]
    assert torch.equal(logits(base, ids), logits(setup.model, ids))
    single = build_system(setup, Entry(system="peft_single", experts=1)).modules[0]
    one_hot = torch.eye(4)
    torch.testing.assert_close(logits(single, ids), build_method_system(one_hot[0]), atol=1e-5, rtol=1e-5)
    assert (build_method_system(one_hot[0]) - build_method_system(one_hot[1])).abs().max() > 1e-2
    mixed = build_system(setup, Entry(system="peft_mixed", experts=4)).modules[0]
    torch.testing.assert_close(logits(mixed, ids, adapter_names=["0", "1"]), build_method_system(one_hot[:2]), atol=1e-5, rtol=1e-5)
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.float32}


def test_the_released_loop_computes_the_definition(setup: BenchSetup) -> None:
    system = build_system(setup, Entry(system="released_loop", experts=4))
    model = system.modules[0]
    workload = make_workload(setup.tokenizer, CPU, 1, 11, 2)
    assert system.route is not None
    weights = system.route(workload)
    assert weights is not None
    fused = FusedCausalLM(share_weights(setup.model), setup.tokenizer, setup.bank, build_method("avg_delta"), backend="reference")
    mixed = torch.tensor([[0.0, 0.3, 0.0, 0.7]])
    layer = next(module for module in model.modules() if isinstance(module, LoopedLoRALinear))
    for given in (weights, mixed):
        layer.kept.take(given)
        with fused.routing(given):
            expected = logits(fused, workload.prompts.input_ids)
        torch.testing.assert_close(logits(model, workload.prompts.input_ids), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="one prompt at a time, got 2"):
        KeptExperts().take(torch.ones(2, 4))


def test_forced_reroutes_happen_where_the_arithmetic_expects_them(setup: BenchSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    system = build_system(setup, Entry(system="dlp", experts=4, kept=2, reroute_every=3))
    workload = make_workload(setup.tokenizer, CPU, 2, 9, 10)
    assert system.route is not None
    weights = system.route(workload)
    assert weights is not None
    assert (weights != 0).sum(dim=-1).tolist() == [2, 2]
    widths: list[int] = []
    original = ForcedRerouter._reroute

    def noted(self: ForcedRerouter, generated: torch.Tensor) -> None:
        original(self, generated)
        widths.append(generated.shape[1])
        texts = [str(setup.tokenizer.decode(row % 3072, skip_special_tokens=True)) for row in generated]
        views = [prompt.strip() + text for prompt, text in zip(workload.prompts.texts, texts, strict=True)]
        expected = self.model.method.route(PromptBatch.from_texts(views, setup.tokenizer))
        assert self.state is not None
        assert torch.equal(self.state.weights, expected)

    monkeypatch.setattr(ForcedRerouter, "_reroute", noted)
    assert system.generate(workload).shape == (2, 19)
    assert widths == [3, 6, 9]
    assert reroutes_in(10, 3) == 3


def test_workloads_have_different_rows_of_one_length(setup: BenchSetup) -> None:
    prompts = make_workload(setup.tokenizer, CPU, 32, 50, 2).prompts
    assert prompts.input_ids.shape == (32, 50)
    assert bool((prompts.attention_mask == 1).all())
    assert len({tuple(row) for row in prompts.input_ids.tolist()}) == 32


def test_all_names_every_system_and_preset() -> None:
    assert set(known_systems()) == set(BUILTIN) | set(available_presets())
    entries = Group(systems=("all",), experts=(4,), reroute_every=(8,)).entries()
    assert len(entries) == len(set(entries))
    forced = {entry.system for entry in entries if entry.reroute_every}
    assert "dlp" in forced
    assert "dlp_code" not in forced  # routes once per prompt
    assert "xlora" not in forced


def test_settings_apply_where_they_mean_something() -> None:
    group = Group(systems=("base", "peft_single", "dlp", "dlp@1000", "ties"), experts=(2, 26), kept=(1, 2))
    assert [(one.system, one.experts, one.kept) for one in group.entries()] == [
        ("base", 0, None), ("peft_single", 1, None), ("dlp", 2, 1), ("dlp", 2, 2), ("dlp", 26, 1), ("dlp", 26, 2), ("dlp", 1000, None),
        ("ties", 2, None), ("ties", 26, None),
    ]  # fmt: skip
    every = Group(systems=("base", "dlp"), backends=("all",)).entries()
    assert [one.backend for one in every] == ["auto", "auto", *BACKENDS]


def test_the_former_name_of_systems_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("shape: tiny\ngroups:\n  a:\n    contenders: [base, dlp]\n")
    assert load_bench_config(str(path)).groups["a"].systems == ("base", "dlp")
    given = build_parser().parse_args("bench latency --shape tiny --contenders base,dlp".split())
    assert config_of(given).groups["command"].systems == ("base", "dlp")
    path.write_text("shape: tiny\ngroups:\n  a:\n    systems: [base]\n    contenders: [base, dlp]\n")
    with pytest.raises(ConfigError, match="unknown key 'contenders'"):
        load_bench_config(str(path))


@pytest.mark.parametrize("name", ["nano", "smollm2", "qwen2-0.5b", "gpu-1.5b", "gpu-8b", "smoke", "gpu-smoke"])
def test_shipped_configurations_load(name: str) -> None:
    assert load_bench_config(name).groups


def test_a_folder_of_trained_artifacts_is_used_where_it_fits(tmp_path: Path) -> None:
    """The embedded artifacts stand in for a folder that ``dlplora reproduce`` has left."""
    with pytest.raises(ConfigError, match="has no folder 'pool'"):
        BenchConfig(runs=str(tmp_path), groups={"a": Group()})
    runs = tmp_path / "runs"
    for role in ("pool", "router", "trained/mole"):
        shutil.copytree(NANO_ASSETS / role, runs / role)
    config = BenchConfig(
        runs=str(runs),
        groups={"a": Group(systems=("base", "peft_single", "dlp", "mole"), **SMALL)},
    )
    record = run_bench(config)
    assert record.adapters["a"].startswith("trained, rank ")
    assert [one.contender for one in record.measurements] == ["base", "peft_single", "dlp", "mole"]
    assert record.skipped == {}
    for experts in ((3,), (3, 26)):
        config = BenchConfig(runs=str(runs), groups={"a": Group(systems=("base", "dlp"), experts=experts, **SMALL)})
        with pytest.raises(ConfigError, match="has 26 adapters, --experts asks for 3"):
            run_bench(config)


def test_a_pool_of_another_size_is_timed_and_not_replaced(tmp_path: Path) -> None:
    names = sorted(path.name for path in (NANO_ASSETS / "pool").iterdir() if path.is_dir())[:2]
    for name in names:
        shutil.copytree(NANO_ASSETS / "pool" / name, tmp_path / "pool" / name)
    for systems, sizes in ((("base", "avg_delta"), [0, 2]), (("base", "peft_single"), [0, 1])):
        record = run_bench(BenchConfig(runs=str(tmp_path), groups={"a": Group(systems=systems, **SMALL)}))
        assert record.adapters["a"].startswith("trained, rank ")
        assert [one.experts for one in record.measurements] == sizes
    with pytest.raises(ConfigError, match="has 2 adapters, --experts asks for 26"):
        run_bench(BenchConfig(runs=str(tmp_path), groups={"a": Group(systems=("base", "avg_delta"), experts=(26,), **SMALL)}))


def test_a_place_that_takes_no_record_is_refused_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "run_bench", lambda *given, **options: pytest.fail("timed"))
    (tmp_path / "file").touch()
    for out in ("file/record.json", "file"):
        assert main(["bench", "latency", "--config", "smoke", "--out", str(tmp_path / out)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "--out: cannot write in" in line


@pytest.mark.parametrize("works", [0, 1, 2])  # warm-up is off: a turn for the memory, then two rounds
def test_one_system_that_fails_loses_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch, works: int) -> None:
    timed, turns = session.time_once, itertools.count()

    def faulty(system: Any, workload: Any) -> Any:
        if system.entry.system == "avg_delta" and next(turns) >= works:
            raise RuntimeError("a compiler\nhas failed")
        return timed(system, workload)

    monkeypatch.setattr(session, "time_once", faulty)
    record = run_bench(BenchConfig(groups={"a": Group(systems=("base", "avg_delta", "dlp"), **SMALL)}))
    assert [(one.contender, len(one.ttft_s)) for one in record.measurements] == [("base", 2), ("dlp", 2)]
    ((what, why),) = record.skipped.items()
    assert what.startswith("a: avg_delta")
    assert why == "RuntimeError: a compiler has failed"


def timed_in_order(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> tuple[list[str], LatencyRecord]:
    """A benchmark of three systems with a clock that counts the turns; who took them, and the record."""
    order: list[str] = []

    def timed(system: Any, workload: Any) -> tuple[float, float]:
        order.append(system.entry.system)
        return 2.0 * len(order), 1.0 * len(order)

    monkeypatch.setattr(session, "time_once", timed)
    group = Group(systems=("base", "peft_single", "avg_delta"), experts=(2,), prompt=(4,), new_tokens=2, repeats=4, warmup=1)
    return order, run_bench(BenchConfig(shape="tiny", seed=seed, groups={"a": group}))


def test_rounds_are_random_backwards_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    order, record = timed_in_order(monkeypatch)
    names = [one.contender for one in record.measurements]
    # a warm-up and a run for the memory each; then four rounds of a generation off the clock, by who comes last, and three on it
    assert order[:6] == ["base", "base", "peft_single", "peft_single", "avg_delta", "avg_delta"]
    rounds = [order[start : start + 4] for start in range(6, len(order), 4)]
    assert len(rounds) == 4
    for number, (off_the_clock, *turns) in enumerate(rounds):
        assert off_the_clock == turns[-1]
        assert sorted(turns) == sorted(names)
        assert turns == sorted(names, key=lambda name: record.measurements[names.index(name)].positions[number])
        if number % 2:
            assert turns == rounds[number - 1][:0:-1]
    for one in record.measurements:  # the clock counts turns: a sample of round r at position p is turn 6 + 4 r + 1 (off the clock) + p + 1
        assert one.tpot_s == [8.0 + 4 * number + position for number, position in enumerate(one.positions)]
        assert one.ttft_s == [2 * value for value in one.tpot_s]
    base, single = (next(one for one in record.measurements if one.contender == name) for name in ("base", "peft_single"))
    row = next(row for row in record.summary if row["contender"] == "peft_single")
    ratios = [a / b for a, b in zip(single.tpot_s, base.tpot_s, strict=True)]
    assert row["tpot_over_base"]["median"] == pytest.approx(statistics.median(ratios))
    assert row["tpot_over_base"]["of_minima"] == pytest.approx(min(single.tpot_s) / min(base.tpot_s))
    assert row["tpot_s"]["min"] == min(single.tpot_s)
    assert (record.weights, record.shape, record.seed, record.measurements[0].warmup) == ("random", "tiny", 0, 1)
    assert timed_in_order(monkeypatch)[0] == order
    assert timed_in_order(monkeypatch, seed=1)[0] != order


def test_every_position_is_taken_equally_often() -> None:
    orders = round_orders(5, 4000, 0)
    for index in range(5):
        places = [order.index(index) for order in orders]
        assert sum(places) == 2 * len(orders)  # exactly, by the pairs
        # by chance: each place 800 times of 4000, standard deviation below 36
        assert all(abs(places.count(place) - 800) < 180 for place in range(5))


def test_a_system_has_a_backend_of_its_own(setup: BenchSetup) -> None:
    entries = Group(systems=("base", "avg_delta:merged", "dlp@3:dense", "dlp"), experts=(4,)).entries()
    assert [(one.system, one.experts, one.backend) for one in entries[1:]] == [
        ("avg_delta", 4, "merged"), ("dlp", 3, "dense"), ("dlp", 4, "auto"),
    ]  # fmt: skip
    workload = make_workload(setup.tokenizer, CPU, 2, 9, 4)
    merged = build_system(setup, entries[1])
    assert merged.backend(workload) == "merged"
    plain = build_system(setup, Entry(system="avg_delta", experts=4, backend="reference"))
    assert torch.equal(merged.generate(workload), plain.generate(workload))


def test_the_command_times_methods_and_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--shape tiny --systems base,peft_single,released_loop,dlp,meteora_gate,multitask_r64 --experts 3 --kept 2 --batch 1,2"
    arguments += f" --prompt 8 --new-tokens 4 --reroute-every 2 --repeats 2 --warmup 0 --out {tmp_path}/it.json"
    assert main(["bench", "latency", *arguments.split()]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Shape `tiny`")
    assert "| `dlp, re-routed every 2` | 3 | 2 |" in shown.out
    record = read_latency(tmp_path / "it.json")
    names = [(one.contender, one.reroute_every, one.batch_size) for one in record.measurements]
    assert names[:5] == [("base", None, 1), ("peft_single", None, 1), ("released_loop", None, 1), ("dlp", None, 1), ("dlp", 2, 1)]
    assert ("released_loop", None, 2) not in names
    by_name = {one.contender: one for one in record.measurements if one.batch_size == 2 and not one.reroute_every}
    assert (by_name["dlp"].experts_kept, by_name["dlp"].granularity, by_name["meteora_gate"].granularity) == (2.0, "sentence", "token")
    assert (by_name["dlp"].backend in BACKENDS, by_name["meteora_gate"].backend, by_name["base"].backend) == (True, "dense", "")
    assert by_name["base"].resident_bytes == 4 * record.parameters + 2 * 16  # two buffers of four rotary frequencies
    assert set(record.skipped) == {"command: multitask_r64 (3 experts)", "command: released_loop (3 experts), batch 2"}
    assert record.weights == "random"
    assert json.loads((tmp_path / "it.json").read_text())["summary"][0]["tpot_over_base"]["median"] == 1.0


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("--shape qwen", "unknown shape 'qwen'. Did you mean 'qwen2-7b'?"),
        ("--systems dpl", "unknown system 'dpl'. Did you mean 'dlp'?"),
        ("--systems dlp@many", "expected NAME@NUM_EXPERTS"),
        ("--experts 0", "'experts' must be at least 1, got 0"),
        ("--experts a", "--experts takes whole numbers"),
        ("--kept 0", "'kept' must be at least 1"),
        ("--reroute-every 1", "'reroute_every' must be at least 2"),
        ("--new-tokens 1", "'new_tokens' must be at least 2"),
        ("--repeats 0", "'repeats' must be at least 1"),
        ("--repeats 5", "'repeats' must be even, got 5"),
        ("--systems base:merged", "'base' has no kernel backend"),
        ("--backends fast", "unknown backend 'fast'"),
        ("--dtype float8", "unknown dtype 'float8'"),
        ("--device gpu", "unknown device 'gpu'"),
        ("--device meta", "device 'meta' does not exist"),
        ("--experts 4 --kept 99", "'kept' asks for 99 experts of a pool of 4"),
        ("--config nowhere", "unknown benchmark 'nowhere'"),
        ("--config nano --batch 2", "--batch belongs to a single group"),
        ("--compile --shape tiny", "--compile needs a GPU"),
    ],
)
def test_bad_input_ends_with_one_line(options: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", *options.split()]) == 2
    shown = capsys.readouterr()
    assert part in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert not shown.out
