"""Training data: rows of a soap_dataset -> chats -> tokens with labels -> packs, distributed to the processes."""

import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from arctic_training.config.data import DataSourceConfig
from arctic_training.data.sft_factory import DataCollatorForCausalLM, SFTDataFactory
from arctic_training.data.source import DataSource
from arctic_training.data.utils import DatasetType
from datasets import Dataset, load_from_disk
from torch.utils.data import DataLoader

import prompts
from common import chat_template
from common.dataset import load_split
from common.errors import UserError
from common.files import lock
from prompts import SECTIONS, prompts_hash, training_messages
from training import tokens
from training.errors import fail
from training.packing import best_fit_packs
from training.plan import PackSampler, RowSizes, RunPlan, SharedPacks
from training.settings import MODEL_REMEDY, SOAPDataConfig

ROWS_FOR_ONE_PROCESS = 20_000  # the tokenizer's own threads take seconds; above this, use `num_proc` processes


class SOAPDataSourceConfig(DataSourceConfig):
    name_or_path: Path = Path("./soap_dataset")
    """ Folder written by preprocess_data.py, relative to the working folder. """


def load_rows(config: SOAPDataSourceConfig) -> Dataset:
    """Return the rows of a source. Ends the run with one line if there is no such dataset."""
    try:
        return load_split(config.name_or_path, config.split)
    except UserError as error:
        fail(*str(error).rsplit("; ", 1))


class SOAPDataSource(DataSource):
    """`type: soap`: turn each row of a soap_dataset split into system prompt, dialogue, and the note as JSON."""

    name = "soap"
    config: SOAPDataSourceConfig

    def load(self, config: SOAPDataSourceConfig, split: str) -> DatasetType:
        """Return the split as a dataset with one column, `messages`: a list of {role, content}."""
        rows = load_rows(config)
        return rows.map(
            lambda row: {"messages": training_messages(row["dialogue"], {key: row[key] for key in SECTIONS})},
            remove_columns=rows.column_names,
            desc=f"Formatting {split}",
        )

    @property
    def cache_path_args(self) -> tuple[dict, ...]:
        """Add everything the tokens depend on, so that changed data, prompts, templates or code get a new cache."""
        template = hashlib.sha256(str(self.trainer.tokenizer.chat_template).encode()).hexdigest()
        code = (__file__, tokens.__file__, prompts.__file__, chat_template.__file__)
        content = {
            "rows": tokens.file_fingerprint(self.config.name_or_path / self.config.split),
            "prompts": prompts_hash(),
            "template": template,
            "vocabulary": len(self.trainer.tokenizer),
            "code": [tokens.file_fingerprint(Path(file)) for file in code],
        }
        return (*super().cache_path_args, content)


class SOAPDataFactory(SFTDataFactory):
    """`type: soap`: tokenize with labels on the note only, and build loaders that distribute packs to the processes."""

    name = "soap"
    config: SOAPDataConfig
    default_source_cls = SOAPDataSource

    def __call__(self) -> tuple[DataLoader, DataLoader | None]:
        """Return the loader for training, and the one for validation if there is validation data."""
        rows, held_out = self._tokenized(self.config.sources), self._tokenized(self.config.eval_sources)
        if self.config.train_eval_split[1]:
            rows, held_out = self.split_data(rows)
        return self.create_dataloader(rows), self.validation_loader(held_out) if held_out else None

    def _tokenized(self, source_configs: list[DataSourceConfig]) -> Dataset | None:
        """Return the rows of all sources from the cache. The first process builds it, one run at a time."""
        if not source_configs:
            return None
        sources = self._get_data_sources(source_configs)
        path = self.cache_path(sources)
        if self.is_main_process_by_path:
            with lock(self.config.cache_dir / "lock", wait=True):
                if not path.exists():
                    self._build(sources, path)
        dist.barrier()
        self.trainer._set_seeds(self.trainer.config.seed)  # building the cache may have drawn random numbers
        return load_from_disk(str(path))

    def _build(self, sources: list[DataSource], path: Path) -> None:
        if self.config.fail_on_missing_cache:
            raise FileNotFoundError(f"the token cache {path} does not exist, and fail_on_missing_cache is set")
        draft = path.with_suffix(".incomplete")
        self.load(sources).save_to_disk(draft)
        draft.rename(path)

    def process(self, dataset: DatasetType) -> DatasetType:
        try:
            return dataset.map(
                self._encode,
                batched=True,
                remove_columns=dataset.column_names,
                num_proc=self.config.num_proc if len(dataset) > ROWS_FOR_ONE_PROCESS else None,
                desc="Tokenizing",
            )
        except tokens.TemplateError as error:
            fail(str(error), MODEL_REMEDY)

    def _encode(self, rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        examples = tokens.encode_examples(self.tokenizer, rows["messages"])
        return {**examples, "attention_mask": [[1] * len(ids) for ids in examples["input_ids"]]}

    def create_dataloader(self, dataset: DatasetType) -> DataLoader:
        """Return the loader of this process's packs for all epochs."""
        trainer, config = self.trainer, self.trainer.config
        plan = RunPlan(
            RowSizes.of(dataset),
            self.config.max_length if self.config.best_fit_packing else None,
            seed=config.seed,
            epochs=config.epochs,
            accumulation=config.gradient_accumulation_steps,
            processes=trainer.world_size,
            train_iters=config.train_iters,
            min_iterations=config.min_iterations,
        )
        return self._loader(dataset, PackSampler(plan, trainer.global_rank), self.config.dl_num_workers)

    def validation_loader(self, rows: DatasetType) -> DataLoader:
        """Return the loader of this process's share of the validation packs, in a fixed order.

        It has no workers: they would be forked during training, when another thread may hold a lock.
        """
        lengths = RowSizes.of(rows).tokens
        packs = [[row] for row in range(len(rows))]
        if self.config.best_fit_packing:
            packs = best_fit_packs(lengths, self.config.max_length)
        return self._loader(rows, SharedPacks(packs, self.trainer.global_rank, self.trainer.world_size), workers=0)

    def _loader(self, rows: DatasetType, sampler: PackSampler | SharedPacks, workers: int) -> DataLoader:
        pad = DataCollatorForCausalLM(self.tokenizer, self.config)
        return DataLoader(
            rows.remove_columns("attention_mask"),
            batch_sampler=sampler,
            collate_fn=lambda pack: pad([join_rows(pack)]),
            num_workers=workers,
            persistent_workers=workers > 0,  # arctic_training sets it without workers too, which PyTorch rejects
            generator=torch.Generator(),  # for the workers' seeds, so that they do not use up dropout's random numbers
        )


def join_rows(rows: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    """Concatenate samples into one pack. Positions restart at 0 in each sample, which lets attention separate them."""
    if "position_ids" in rows[0]:  # already joined by arctic_training's `pack_samples`
        return rows[0]
    lengths = [len(row["input_ids"]) for row in rows]
    joined = {key: list(chain.from_iterable(row[key] for row in rows)) for key in ("input_ids", "labels")}
    positions = list(chain.from_iterable(range(length) for length in lengths))
    return {**joined, "position_ids": positions, "packed_sample_seqlens": lengths}
