"""Training speed of a pool of experts, compared with PEFT one by one: ``python -m benchmarks.training_speed``.

Nano, or another base model: ``--backbone smollm2-135m --suite skills --dtype bfloat16``.

All modes get the same rows in the same batches, the same initial weights, AdamW, schedule and clipping, so all end at the same loss; a
common evaluation of the exported adapters checks this. Each run is a separate process (so that peak memory is its own), and the modes
alternate.

* ``peft_one_by_one``: ``get_peft_model``, the model's own loss, a plain loop; one adapter after another.
* ``sequential``, ``joint``: the expert-pool trainer, one expert at a time or several in one batch.
* ``sequential_unsorted``: without grouping rows of similar length.
* ``joint_recompute``: with activations recomputed in the backward pass.
* ``joint_accumulate``: half the rows per batch, two batches per step (other batches, so the loss differs in the last digits).
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dlplora.bench.hardware import ContentionMonitor
from dlplora.bench.timing import synchronize
from dlplora.cli.terminal import split_names
from dlplora.data.batching import BatchSchedule
from dlplora.data.datamodule import ExpertPoolDataModule
from dlplora.data.encoding import EncodedSet, collate, encode_items
from dlplora.errors import DLPLoRAError
from dlplora.provenance import provenance
from dlplora.reporting.latency.records import FOLDER, save_bench
from dlplora.reporting.latency.training import ONE_BY_ONE, TrainingMode, TrainingRecord, markdown
from dlplora.tasks.registry import get_suite
from dlplora.training.expert_pool import LitExpertPool, plan_groups
from dlplora.training.frozen import DTYPES, load_frozen, load_tokenizer
from dlplora.training.settings import LoRASettings, OptimizerSettings, expert_generator, initial_lora_a

LORA = LoRASettings(lora_dropout=0.0)
OPTIMIZER = OptimizerSettings(warmup_steps=5)
MAX_LENGTH = 512
MODES = (ONE_BY_ONE, "sequential", "joint", "sequential_unsorted", "joint_recompute", "joint_accumulate")


class Watch(L.Callback):
    """Wall time of all training steps, and how many of the tokens were padding."""

    def __init__(self) -> None:
        self.seconds, self.computed, self._start = 0.0, 0, 0.0
        self._real: Tensor | int = 0

    @property
    def real(self) -> int:
        """Tokens that are no padding."""
        return int(self._real)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start when everything is loaded."""
        synchronize(pl_module.device)
        self._start = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Count tokens."""
        self.count(batch)

    def count(self, batch: Any) -> None:
        """Add one batch; its size is known, and its real tokens are supervised or not, but never padding."""
        self.computed += batch["input_ids"].numel()
        self._real = self._real + batch["attention_mask"].sum()  # stays on its device: to read it would wait for the step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop after the last step."""
        synchronize(pl_module.device)
        self.seconds = time.perf_counter() - self._start


def _data(options: argparse.Namespace) -> dict[str, Any]:
    return {"num_train": options.num_train, "num_validation": options.num_validation, "seed": 0}


def _names(options: argparse.Namespace) -> tuple[str, ...]:
    return get_suite(options.suite).names[: options.num_tasks]


def _encoded(options: argparse.Namespace, split: str, num: int) -> dict[str, EncodedSet]:
    tokenizer, suite = load_tokenizer(options.backbone), get_suite(options.suite)
    return {name: encode_items(tokenizer, suite.task(name).items(split, num, 0), MAX_LENGTH) for name in _names(options)}  # type: ignore[arg-type]


def one_by_one(options: argparse.Namespace, out: Path) -> Watch:
    """PEFT and a plain loop."""
    from peft import get_peft_model

    watch, device = Watch(), torch.device(options.device)
    for name, encoded in _encoded(options, "train", options.num_train).items():
        model = get_peft_model(load_frozen(options.backbone, options.dtype), LORA.peft_config()).to(device).train()
        generator = expert_generator(0, name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".lora_A." in key:
                    parameter.copy_(initial_lora_a((parameter.shape[0], parameter.shape[1]), generator))
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        built = OPTIMIZER.build(parameters, options.num_steps)
        schedule = BatchSchedule({name: encoded.lengths}, options.batch_size, 0)
        synchronize(device)
        start = time.perf_counter()
        for step in range(options.num_steps):
            batch = collate([encoded.items[index] for _, index in schedule.batch(step)], 0)
            watch.count(batch)
            inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask", "labels")}
            model(**inputs).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            built["optimizer"].step()
            built["lr_scheduler"]["scheduler"].step()
            built["optimizer"].zero_grad()
        synchronize(device)
        watch.seconds += time.perf_counter() - start
        model.save_pretrained(str(out / name))
    return watch


def pool(options: argparse.Namespace, out: Path, mode: str) -> Watch:
    """The expert-pool trainer."""
    way, _, extra = mode.partition("_")
    halves = 2 if extra == "accumulate" else 1
    watch = Watch()
    module = LitExpertPool(
        lora=LORA, optimizer=OPTIMIZER, seed=0, mode=way, group_size=options.group_size, export_folder=str(out),  # type: ignore[arg-type]
        gradient_checkpointing=extra == "recompute", backbone=options.backbone, dtype=options.dtype,
    )  # fmt: skip
    data = ExpertPoolDataModule(
        suite=options.suite, tasks=list(_names(options)), batch_size=options.batch_size // halves, num_steps=options.num_steps * halves,
        length_group=1 if extra == "unsorted" else 8, **_data(options),
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="gpu" if options.device.startswith("cuda") else "cpu", devices=1, max_epochs=1, gradient_clip_val=1.0,
        accumulate_grad_batches=halves, callbacks=[watch], limit_val_batches=0, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(out),
    )  # fmt: skip
    trainer.fit(module, data)
    return watch


@torch.no_grad()
def validation_loss(options: argparse.Namespace, folder: Path) -> float:
    """Mean over tasks of the loss of held-out answers under the exported adapters, by PEFT and the model's own loss."""
    from peft import PeftModel

    losses = []
    for name, encoded in _encoded(options, "validation", options.num_validation).items():
        frozen = load_frozen(options.backbone, options.dtype)
        model = PeftModel.from_pretrained(frozen, str(folder / name)).to(options.device).eval()
        batch = collate(encoded.items, 0)
        losses.append(float(model(**{key: batch[key].to(options.device) for key in ("input_ids", "attention_mask", "labels")}).loss))
    return sum(losses) / len(losses)


def child(options: argparse.Namespace) -> dict[str, Any]:
    """Train one way, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        watch = one_by_one(options, out) if options.child == ONE_BY_ONE else pool(options, out, options.child)
        if options.device.startswith("cuda"):
            peak = int(torch.cuda.max_memory_allocated())
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        loss = validation_loss(options, out)
    return {"train_s": watch.seconds, "peak": peak, "loss": loss, "real": watch.real, "padding": 1 - watch.real / watch.computed}


def measure(options: argparse.Namespace, arguments: Sequence[str], tell: Callable[[str], object]) -> TrainingRecord:
    """All systems, interleaved."""
    watch = ContentionMonitor(torch.device(options.device))
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in options.modes}
    for number in range(options.repeats):
        for mode in list(runs) if number % 2 == 0 else list(reversed(runs)):
            tell(f"round {number + 1}/{options.repeats}: {mode}")
            command = [sys.executable, "-m", "benchmarks.training_speed", *arguments, "--child", mode]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise DLPLoRAError(f"{mode} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            runs[mode].append(json.loads(done.stdout.strip().splitlines()[-1]))
    modes = {
        mode: TrainingMode(
            train_s=[run["train_s"] for run in listed], peak_memory_bytes=[run["peak"] for run in listed],
            validation_loss=listed[0]["loss"], padding=listed[0]["padding"],
        )
        for mode, listed in runs.items()
    }  # fmt: skip
    default = plan_groups(dict.fromkeys(_names(options), 1.0), "auto", options.group_size, torch.device(options.device).type)
    settings = {name: getattr(options, name) for name in ("num_steps", "batch_size", "group_size", "num_train", "num_validation")}
    return TrainingRecord(
        backbone=options.backbone or "nano",
        tasks=list(_names(options)),
        settings={**settings, "rank": LORA.rank, "dtype": options.dtype},
        tokens=next(iter(runs.values()))[0]["real"],
        device=options.device,
        default_mode="sequential" if all(len(group) == 1 for group in default) else "joint",
        modes=modes,
        warnings=watch.warnings(),
        provenance=provenance(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", metavar="NAME", help="base model (default: nano)")
    parser.add_argument("--suite", default="nano", help="its first tasks are trained (default: nano)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the base model (default: float32)")
    parser.add_argument("--num-tasks", type=int, default=5, help="experts (default: 5)")
    parser.add_argument("--num-steps", type=int, default=40, help="steps of every expert (default: 40)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of every expert per step (default: 16)")
    parser.add_argument("--group-size", type=int, default=5, help="experts in a joint batch (default: 5)")
    parser.add_argument("--num-train", type=int, default=600, help="training rows of a task (default: 600)")
    parser.add_argument("--num-validation", type=int, default=64, help="held-out rows of a task (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--modes", metavar="A,B", default=",".join(MODES), help=f"ways to train (default: {', '.join(MODES)})")
    parser.add_argument("--out", metavar="DIR", help="folder of the record (default: results/bench, or results/scratch/bench if dirty)")
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Measure, write the record, print its table."""
    given = sys.argv[1:]
    options = _parser().parse_args(given)
    if min(options.num_tasks, options.num_steps, options.batch_size // 2, options.group_size, options.repeats) < 1:
        print("error: every number must be at least 1, and --batch-size at least 2.", file=sys.stderr)
        return 2
    options.modes = split_names(options.modes)
    if not options.modes or not set(options.modes) <= set(MODES):
        print(f"error: --modes takes names among {', '.join(MODES)}, got {', '.join(options.modes) or 'none'}.", file=sys.stderr)
        return 2
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"error: device '{options.device}' was asked for, but torch finds no GPU; use --device cpu.", file=sys.stderr)
        return 2
    if options.child:
        print(json.dumps(child(options)))
        return 0
    record = measure(options, given, lambda text: print(text, file=sys.stderr, flush=True))
    clean = record.provenance.get("git", {}).get("dirty") is not True
    folder = Path(options.out) if options.out else FOLDER if clean else Path("results/scratch/bench")
    stamp = record.created[:19].replace("-", "").replace(":", "")
    path = save_bench(record, folder / f"training-{Path(record.backbone).name}-{record.device.split(':')[0]}-{stamp}.json")
    print(f"wrote {path}", file=sys.stderr)
    print(markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
