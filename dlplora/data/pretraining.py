"""Packed, loss-weighted blocks of text and a tokenizer trained on them, from the nano documents or a suite's training rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dlplora.data.batching import BatchSchedule, StepLoader
from dlplora.errors import ConfigError
from dlplora.tasks.registry import get_suite
from dlplora.tasks.types import Split

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}"


def train_tokenizer(documents: list[str], words: list[str], vocab_size: int, max_length: int) -> Any:
    """A byte-level BPE tokenizer that adds ``<s>`` by itself and encodes any text.

    Args:
        documents: Text to learn merges from; ``§`` marks are dropped.
        words: Words that should become single tokens, with and without a leading space.
        vocab_size: Upper bound of the vocabulary.
        max_length: ``model_max_length`` written into the tokenizer.

    Returns:
        A ``PreTrainedTokenizerFast``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [document.replace("§", "") for document in documents] + [f" {word}" for word in words for _ in range(40)]
    raw.train_from_iterator(corpus, trainer)
    raw.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=max_length, padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pack(documents: list[str], tokenizer: Any, block_size: int, low: float, end: float) -> tuple[Tensor, Tensor]:
    """Documents end to end as ``<s> text </s>``, cut into blocks.

    Args:
        documents: Texts with ``§`` toggles; each starts in the low-weight state.
        tokenizer: As returned by ``train_tokenizer``.
        block_size: Tokens per block, T.
        low: Loss weight of set-up text; predictable text has weight 1.
        end: Loss weight of ``</s>`` (0 after a prompt without its answer).

    Returns:
        Token ids int32 (N, T) and loss weights float32 (N, T); the incomplete last block is dropped.
    """
    ids: list[int] = []
    weights: list[float] = []
    pieces_of = [document.split("§") for document in documents]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch([piece for pieces in pieces_of for piece in pieces], add_special_tokens=False))
    for document, pieces in zip(documents, pieces_of, strict=True):
        ids.append(tokenizer.bos_token_id)
        weights.append(0.0)
        for i in range(len(pieces)):
            piece = next(encoded).ids
            ids += piece
            weights += [1.0 if i % 2 else low] * len(piece)
        ids.append(tokenizer.eos_token_id)
        weights.append(0.0 if document.endswith("Answer:") else end)
    blocks = len(ids) // block_size
    shape = (blocks, block_size)
    count = blocks * block_size
    return (
        torch.from_numpy(np.array(ids[:count], dtype=np.int32)).view(shape),
        torch.from_numpy(np.array(weights[:count], dtype=np.float32)).view(shape),
    )


class WorldTextDataModule(L.LightningDataModule):
    """Fresh documents for every step; nothing is seen twice.

    Args:
        num_documents: Documents in the training set.
        block_size: Tokens per block.
        batch_size: Blocks a batch.
        vocab_size: Upper bound of the tokenizer's vocabulary.
        max_length: Positions the base model supports.
        low_weight: Loss weight of set-up text.
        end_weight: Loss weight of the end token.
        seed: Seed of documents and order.
        tokenizer_folder: Reuse this tokenizer instead of training one.
    """

    def __init__(
        self,
        num_documents: int = 700_000,
        block_size: int = 128,
        batch_size: int = 20,
        vocab_size: int = 3072,
        max_length: int = 512,
        low_weight: float = 0.15,
        end_weight: float = 0.3,
        seed: int = 0,
        tokenizer_folder: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokenizer: Any = None
        self._train: TensorDataset | None = None
        self._validation: TensorDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Write the documents and encode them; about one minute for the default size."""
        from dlplora.tasks.nano.world_text import documents, task_words

        if self._train is not None:
            return
        h = self.hparams
        texts = documents(h["num_documents"], h["seed"])
        if h["tokenizer_folder"]:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(Path(h["tokenizer_folder"]))
        else:
            self.tokenizer = train_tokenizer(texts[:60_000], task_words(), h["vocab_size"], h["max_length"])
        weighting = (h["block_size"], h["low_weight"], h["end_weight"])
        self._train = TensorDataset(*pack(texts, self.tokenizer, *weighting))
        held_out = documents(2_000, h["seed"] + 1_000_003)
        self._validation = TensorDataset(*(part[:128] for part in pack(held_out, self.tokenizer, *weighting)))

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled blocks; the order is a function of the seed."""
        assert self._train is not None
        generator = torch.Generator().manual_seed(self.hparams["seed"])
        return DataLoader(self._train, batch_size=self.hparams["batch_size"], shuffle=True, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        """128 blocks of documents from another seed."""
        assert self._validation is not None
        return DataLoader(self._validation, batch_size=self.hparams["batch_size"])


class RowsTextDataModule(L.LightningDataModule):
    """The text of a suite's training rows, to pretrain a small base model if none can be downloaded.

    Prompts and answers are documents of their own, in random order: the base model learns the words and the forms of the tasks, but which
    answer belongs to which question is left to the experts. Test rows are never read; validation rows give the loss curve.

    Args:
        suite: Name of the suite.
        data_root: Folder of its rows; None reads ``DLPLORA_DATA``.
        tasks: Some of its tasks; None takes all.
        num_steps: Batches in all; blocks are reshuffled after each pass.
        block_size: Tokens per block.
        batch_size: Blocks a batch.
        vocab_size: Upper bound of the tokenizer's vocabulary.
        max_length: Positions the base model supports.
        seed: Seed of the order; None is the seed of the run.
    """

    def __init__(
        self,
        suite: str = "paper_local",
        data_root: str | None = None,
        tasks: list[str] | None = None,
        num_steps: int = 1500,
        block_size: int = 512,
        batch_size: int = 6,
        vocab_size: int = 4096,
        max_length: int = 1024,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokenizer: Any = None
        self._blocks: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def seed(self) -> int:
        """Seed of the order."""
        return 0 if self.hparams["seed"] is None else int(self.hparams["seed"])

    def setup(self, stage: str | None = None) -> None:
        """Train the tokenizer on the training rows and encode both splits."""
        if self._blocks:
            return
        h = self.hparams
        texts = {split: self._documents(split) for split in ("train", "validation")}
        self.tokenizer = train_tokenizer(texts["train"], [], h["vocab_size"], h["max_length"])
        self._blocks = {split: pack(documents, self.tokenizer, h["block_size"], 1.0, 1.0) for split, documents in texts.items()}
        if not len(self._blocks["train"][0]):
            raise ConfigError(f"data: the training rows have less text than one block of {h['block_size']} tokens. Lower block_size.")

    def _documents(self, split: Split) -> list[str]:
        suite = get_suite(self.hparams["suite"], self.hparams["data_root"]).select(self.hparams["tasks"])
        rows = [item for task in suite.tasks for item in task.rows.get(split, ())]
        texts = [item.prompt for item in rows] + [item.answer for item in rows if item.choices is None]
        order = np.random.default_rng([self.seed, len(texts)]).permutation(len(texts))
        return [texts[index].replace("§", "") for index in order]

    def train_dataloader(self) -> StepLoader:
        """``num_steps`` batches, each a pure function of seed and step."""
        ids, weights = self._blocks["train"]
        schedule = BatchSchedule({"text": [1] * len(ids)}, self.hparams["batch_size"], self.seed, length_group=1)

        def make(step: int) -> Any:
            rows = torch.tensor([row for _, row in schedule.batch(step)])
            return [ids[rows], weights[rows]]

        return StepLoader(make, self.hparams["num_steps"])

    def val_dataloader(self) -> StepLoader:
        """The blocks of the validation rows, at most 24."""
        ids, weights = (part[:24] for part in self._blocks["validation"])
        size = self.hparams["batch_size"]
        return StepLoader(lambda step: [part[step * size : (step + 1) * size] for part in (ids, weights)], -(-len(ids) // size))
