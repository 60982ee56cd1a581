"""Test train.py: the loss equals the stock one, runs learn and resume after a kill, errors take one line."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, rows, save_dataset
from test_tokens import QWEN3_LIKE

import prompts

BIN = Path(sys.executable).parent
MAX_LENGTH = 1024
RUN_FILES = ["global_step_13", "loss.png", "train-log.jsonl"]  # the files that a finished run leaves


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train_module():
    """Return the trainer module, with the data, plan and settings modules as attributes."""
    import train  # noqa: F401 - registers the classes of `type: soap`
    from training import data, plan, settings, trainer

    return SimpleNamespace(**vars(trainer) | {"data": data, "plan": plan, "settings": settings})


@pytest.fixture(scope="module")
def model_path(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model with a chat template that opens the answer with an empty think block, like Qwen3's."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model, path)
    (path / "chat_template.jinja").write_text(QWEN3_LIKE)
    return path


def load_model(path: Path, attention: str = "sdpa", **config):
    from transformers import AutoModelForCausalLM

    config = {"dtype": "float32"} | config
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, **config)


def make_pack(train, model_path: Path, n: int = 3):
    """Return the examples of n rows, and their padded batch from packing and arctic_training's collator."""
    from arctic_training.data.sft_factory import DataCollatorForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    examples = [
        train.tokens.encode_example(tokenizer, prompts.training_messages(row["dialogue"], row)) for row in rows(n)
    ]
    collator = DataCollatorForCausalLM(tokenizer, SimpleNamespace(pad_to="div_length", div_length=64))
    return examples, collator([train.data.join_rows(examples)])


def soap_loss(train, model, batch: dict, attention: str = "sdpa"):
    config = SimpleNamespace(sequence_parallel_size=1, model=SimpleNamespace(attn_implementation=attention))
    trainer = SimpleNamespace(config=config, device=model.device, model=model)
    return train.SOAPTrainer.loss.__wrapped__(trainer, dict(batch))


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(ours: dict, stock: dict) -> None:
    import torch

    for name, gradient in stock.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def per_sample_attention(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Compute the result of varlen_attn on the CPU, one sample at a time."""
    import torch

    before, after = window_size
    assert after == 0, "not causal"
    assert isinstance(max_q, int) and max_q == max_k == int(cu_q.diff().max())
    assert cu_q.dtype == torch.int32 and cu_q.equal(cu_k)
    outputs = []
    for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        q, k, v = (states[start:end].transpose(0, 1)[None] for states in (query, key, value))
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        seen = seen if before < 0 else seen.triu(-before)
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def test_loss_and_gradients_of_a_pack_equal_the_stock_trainers(train_module, model_path):
    model = load_model(model_path)
    _, batch = make_pack(train_module, model_path)
    stock_batch = {key: batch[key] for key in ("input_ids", "labels", "position_ids")}
    stock = model(**stock_batch, use_cache=False).loss
    stock_gradients = gradients(model, stock)
    ours = soap_loss(train_module, model, batch)
    assert ours.item() == pytest.approx(stock.item(), rel=1e-6)
    assert_same_gradients(gradients(model, ours), stock_gradients)


class Engine:
    """DeepSpeed's engine for one process: it divides the loss by the number of micro-batches in a step."""

    def __init__(self, model, accumulation: int):
        self.model, self.accumulation, self.global_steps, self.device = model, accumulation, 0, model.device
        self.train, self.parameters = model.train, model.parameters

    def __call__(self, **batch):
        return self.model(**batch)

    def backward(self, loss) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self.global_steps = 1


def test_loss_and_gradients_of_a_step_equal_those_of_one_big_batch(train_module, model_path, monkeypatch):
    """Use packs of 1, 2 and 4 samples, which a mean of means would weigh equally."""
    import torch

    from training import processes

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(train_module.deepspeed.runtime.engine, "autocast_if_enabled", lambda _: torch.enable_grad())
    counts = (1, 2, 4)
    packs = [make_pack(train_module, model_path, count)[1] for count in counts]
    model = load_model(model_path)
    total, labelled = 0, 0
    for pack in packs:
        batch = {key: pack[key] for key in ("input_ids", "labels", "position_ids")}
        number = (batch["labels"][:, 1:] != -100).sum().item()
        total, labelled = total + model(**batch, use_cache=False).loss * number, labelled + number
    expected = gradients(model, total / labelled)
    means = [model(**{k: p[k] for k in ("input_ids", "labels", "position_ids")}, use_cache=False).loss for p in packs]
    assert abs(sum(means) / 3 - total / labelled) > 1e-3, "the packs are too similar for this test"

    trainer = train_module.SOAPTrainer.__new__(train_module.SOAPTrainer)
    plan = SimpleNamespace(packs_per_step=3, labelled=lambda _: labelled, tokens=lambda _: 0)
    loader = SimpleNamespace(batch_sampler=SimpleNamespace(plan=plan))
    config = SimpleNamespace(gradient_accumulation_steps=3, seed=1, kill_switch_path=Path("none"), loss_log_interval=0)
    config.model = SimpleNamespace(attn_implementation="sdpa")
    trainer.config, trainer.train_dataloader, trainer.model = config, loader, Engine(model, 3)
    trainer.device, trainer.global_rank, trainer.optimizer = model.device, 0, None
    trainer.micro_batch = trainer.global_step = trainer.epoch_idx = trainer.global_step_at_start_this_run = 0
    trainer.unlogged, trainer.loss_sum, trainer.max_norm = None, torch.zeros(()), 0.0
    trainer.clips_itself, trainer.scheduler = True, SimpleNamespace(get_last_lr=lambda: [1.0])
    model.zero_grad()
    for pack in packs:
        train_module.SOAPTrainer.step.__wrapped__(trainer, dict(pack))
    record, totals, norm = trainer.unlogged
    assert isinstance(totals, processes.StepTotals) and record.step == 1
    assert totals.read()[0] / record.labelled == pytest.approx((total / labelled).item(), rel=1e-6)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_gradients(ours, expected)
    assert norm.read()[0] == pytest.approx(torch.nn.utils.get_total_norm(expected.values()).item(), rel=1e-5)


@pytest.mark.parametrize("logged", [False, True])
def test_a_stop_file_ends_the_run_before_and_after_its_step_is_logged(train_module, logged):
    trainer = train_module.SOAPTrainer.__new__(train_module.SOAPTrainer)
    config = SimpleNamespace(exit_iteration_this_run=0, exit_iteration=0, early_stopping_patience=0)
    config.kill_switch_path = Path("stop")
    trainer.config, trainer.global_step, trainer.global_step_this_run, trainer.progress = config, 3, 3, None
    trainer.no_improvement = trainer.stop_seen = False
    for seen in (False, True):
        record = SimpleNamespace(labelled=1)
        numbers = SimpleNamespace(read=lambda seen=seen: (1.0, seen))
        trainer.unlogged = record, numbers, SimpleNamespace(read=lambda: [1.0])
        if logged:
            trainer.log_step()
        assert trainer.need_early_exit() == seen
    assert trainer.early_stop_reason == "detected kill switch stop"


def test_the_output_head_runs_on_labelled_positions_only(train_module, model_path):
    model = load_model(model_path)
    _, batch = make_pack(train_module, model_path)
    rows_seen = []
    model.lm_head.register_forward_hook(lambda _, args, __: rows_seen.append(args[0].shape[1]))
    soap_loss(train_module, model, batch)
    assert rows_seen == [(batch["labels"][0, 1:] != -100).sum().item()]


def test_a_pack_has_the_loss_and_gradients_of_its_separate_samples(train_module, model_path):
    import torch

    model = load_model(model_path)
    examples, batch = make_pack(train_module, model_path)
    total, labelled = 0, 0
    for example in examples:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        count = (labels[:, 1:] != -100).sum().item()
        total, labelled = total + model(input_ids=ids, labels=labels).loss * count, labelled + count
    apart = total / labelled
    apart_gradients = gradients(model, apart)
    packed = soap_loss(train_module, model, batch)
    assert packed.item() == pytest.approx(apart.item(), rel=1e-5)
    assert_same_gradients(gradients(model, packed), apart_gradients)


SLIDING = {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize("config", [{}, SLIDING], ids=["full", "sliding"])
def test_variable_length_attention_gives_the_stock_loss_and_gradients(train_module, model_path, monkeypatch, config):
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", per_sample_attention)
    train_module.attention.register_varlen()
    _, batch = make_pack(train_module, model_path)
    model = load_model(model_path, **config)
    stock_gradients = gradients(model, stock := soap_loss(train_module, model, batch))
    model = load_model(model_path, train_module.attention.VARLEN, **config)
    ours = soap_loss(train_module, model, batch, train_module.attention.VARLEN)
    assert ours.item() == pytest.approx(stock.item(), rel=1e-6)
    assert_same_gradients(gradients(model, ours), stock_gradients)


def test_a_model_with_capped_attention_gets_an_error_that_names_eager(train_module):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    train_module.attention.register_varlen()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, attn_implementation=train_module.attention.VARLEN))
    with pytest.raises(ValueError, match="attn_implementation: eager"):
        model(input_ids=train_module.torch.ones(1, 4, dtype=int))


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_errors_are_no_larger_than_the_stock_trainers(train_module, model_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    train_module.attention.register_varlen()
    _, batch = make_pack(train_module, model_path)
    stock_batch = {key: batch[key].cuda() for key in ("input_ids", "labels", "position_ids")}
    model = load_model(model_path).cuda()
    exact = gradients(model, exact_loss := model(**stock_batch, use_cache=False).loss)
    model = load_model(model_path, dtype="bfloat16").cuda()
    stock = gradients(model, stock_loss := model(**stock_batch, use_cache=False).loss)
    model = load_model(model_path, train_module.attention.VARLEN, dtype="bfloat16").cuda()
    ours = gradients(model, our_loss := soap_loss(train_module, model, batch, train_module.attention.VARLEN))
    assert abs(our_loss - exact_loss) <= 2 * abs(stock_loss - exact_loss) + 1e-3 * exact_loss
    for name, gradient in exact.items():
        error, allowed = ((other[name].float() - gradient).norm() / gradient.norm() for other in (ours, stock))
        assert error <= 2 * allowed + 0.01, name


def test_sample_bounds_are_the_starts_and_the_end(train_module):
    import torch

    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]])
    bounds, longest = train_module.attention.sample_bounds(positions)
    assert bounds.tolist() == [0, 3, 4, 8] and bounds.dtype == torch.int32
    assert longest == 4


def test_padding_follows_the_last_sample_and_has_no_labels(train_module, model_path):
    examples, batch = make_pack(train_module, model_path)
    lengths = [len(example["input_ids"]) for example in examples]
    padding = batch["input_ids"].shape[1] - sum(lengths)
    bounds, _ = train_module.attention.sample_bounds(batch["position_ids"])
    assert padding > 0 and bounds.diff().tolist() == [*lengths[:-1], lengths[-1] + padding]
    assert (batch["labels"][0, sum(lengths) :] == -100).all()


@pytest.mark.parametrize(
    ("gpu", "dtype", "expected", "reason"),
    [
        (None, "float32", "sdpa", "no GPU"),
        ((7, 5), "float16", "sdpa", "older than Ampere"),
        ((8, 0), "float32", "sdpa", "needs bfloat16 or float16"),
        ((8, 0), "bfloat16", "varlen", None),
    ],
)
def test_attention_falls_back_to_a_supported_one_and_gives_the_reason(monkeypatch, gpu, dtype, expected, reason):
    import torch

    from training.attention import supported_attention

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    used, why = supported_attention("varlen", getattr(torch, dtype))
    assert used == expected
    assert why is None if reason is None else reason in why


def test_an_explicitly_chosen_attention_is_kept():
    import torch

    from training.attention import supported_attention

    assert supported_attention("eager", torch.float32) == ("eager", None)


# --- token cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache_key(train_module, tmp_path):
    """Return a function that gives the cache name for tmp_path/soap_dataset."""

    def key(template: str = QWEN3_LIKE) -> str:
        class Tokenizer:
            chat_template = template
            __len__ = lambda self: 1000  # noqa: E731

        config = SimpleNamespace(model_dump=lambda **_: {})
        trainer = SimpleNamespace(tokenizer=Tokenizer(), config=SimpleNamespace(tokenizer=config))
        factory = SimpleNamespace(
            config=SimpleNamespace(model_dump=lambda **_: {}, cache_dir=tmp_path), trainer=trainer
        )
        source = SimpleNamespace(name_or_path=tmp_path / "soap_dataset", split="train", model_dump=lambda: {})
        return train_module.data.SOAPDataSource(factory, source).cache_path.name

    save_dataset(tmp_path / "soap_dataset", {"train": rows(3)})
    return key


def test_the_same_data_uses_the_same_cache(cache_key, tmp_path):
    before = cache_key()
    shutil.rmtree(tmp_path / "soap_dataset")
    save_dataset(tmp_path / "soap_dataset", {"train": rows(3)})
    assert cache_key() == before


def test_a_changed_note_at_the_same_path_gets_a_new_cache(cache_key, tmp_path):
    before = cache_key()
    changed = rows(3)
    changed[1]["P"] = changed[1]["P"].replace("every 6", "every 8")
    shutil.rmtree(tmp_path / "soap_dataset")
    save_dataset(tmp_path / "soap_dataset", {"train": changed})
    assert cache_key() != before


def test_a_changed_prompt_or_template_gets_a_new_cache(cache_key, train_module, monkeypatch):
    before = cache_key()
    assert cache_key(template=QWEN3_LIKE + " ") != before
    monkeypatch.setattr("training.data.prompts_hash", lambda: "another")
    assert cache_key() != before


@pytest.mark.parametrize("name", ["training/data.py", "training/tokens.py", "prompts.py", "common/chat_template.py"])
def test_changed_code_gets_a_new_cache(cache_key, train_module, monkeypatch, tmp_path, name):
    from training import data

    before = cache_key()
    modules = {"training/data.py": data, "training/tokens.py": data.tokens, "prompts.py": prompts}
    modules["common/chat_template.py"] = data.chat_template
    changed = tmp_path / Path(name).name
    changed.write_text((ROOT / name).read_text() + "\n")
    monkeypatch.setattr(modules[name], "__file__", str(changed))
    assert cache_key() != before


# --- schedule --------------------------------------------------------------------------------------------------------


def loader(train, packs: int, **settings) -> SimpleNamespace:
    """Return a stand-in for the loader, with a plan of this many packs per epoch."""
    sizes = train.plan.RowSizes([10] * packs, [3] * packs)
    plan = train.RunPlan(sizes, None, **{"seed": 1, "epochs": 1, "accumulation": 1, "processes": 1} | settings)
    return SimpleNamespace(batch_sampler=SimpleNamespace(plan=plan))


def horizon(train, **settings) -> int:
    return train.SOAPTrainer.training_horizon.fget(SimpleNamespace(plan=loader(train, **settings).batch_sampler.plan))


def test_the_schedule_counts_optimizer_steps(train_module):
    assert horizon(train_module, packs=9, epochs=6, accumulation=1) == 54
    assert horizon(train_module, packs=9, epochs=6, accumulation=4) == 13
    assert horizon(train_module, packs=9, epochs=6, accumulation=4, train_iters=5) == 5


def test_too_few_packs_for_one_step_end_the_run_with_an_error(train_module, capsys):
    with pytest.raises(SystemExit):
        horizon(train_module, packs=3, epochs=1, accumulation=4)
    assert "3 packs in 1 epochs are too few for one step of 4: lower" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "data: 4 rows, 1 longer than max_length 1,024 and dropped, 2 packs; 2 steps in 1 epochs"),
        ({"min_iterations": 9}, "data: 4 rows, 2 packs; 2 steps in 1 epochs"),
        ({"train_eval_split": (0.5, 0.5)}, "data: 4 rows, 2 packs; 2 steps in 1 epochs"),
    ],
)
def test_rows_are_reported_too_long_only_if_nothing_else_changes_the_count(
    train_module, tmp_path, capsys, changes, line
):
    from datasets import Dataset

    source = {"name_or_path": save_dataset(tmp_path / "soap_dataset", {"train": rows(4)}), "split": "train"}
    split = {"train_eval_split": changes.get("train_eval_split", (1.0, 0.0))}
    data = train_module.settings.SOAPDataConfig(
        type="soap", sources=[source], max_length=1024, cache_dir=tmp_path, **split
    )
    config = SimpleNamespace(data=data, epochs=1, min_iterations=changes.get("min_iterations", 0), checkpoint=[])
    packs = loader(train_module, packs=2)
    packs.dataset = Dataset.from_dict({"input_ids": [[1]] * 3})
    trainer = SimpleNamespace(config=config, train_dataloader=packs, plan=packs.batch_sampler.plan, training_horizon=2)
    train_module.SOAPTrainer._print_data(trainer)
    assert capsys.readouterr().out.splitlines()[-1] == line


@pytest.mark.parametrize(("every", "by_epoch", "printed"), [(2, 0, True), (1, 0, False), (2, 1, False), (0, 0, False)])
def test_a_run_too_short_to_save_a_resume_state_prints_a_notice(
    train_module, tmp_path, capsys, every, by_epoch, printed
):
    from datasets import Dataset

    data = train_module.settings.SOAPDataConfig(type="soap", sources=[], cache_dir=tmp_path)
    resume = SimpleNamespace(type="resume", save_every_n_steps=every, save_every_n_epochs=by_epoch)
    export = SimpleNamespace(type="export", save_every_n_steps=9, save_every_n_epochs=0)
    config = SimpleNamespace(data=data, epochs=1, min_iterations=0, checkpoint=[export, resume])
    packs = loader(train_module, packs=2)
    packs.dataset = Dataset.from_dict({"input_ids": [[1]] * 2})
    trainer = SimpleNamespace(config=config, train_dataloader=packs, plan=packs.batch_sampler.plan, training_horizon=2)
    train_module.SOAPTrainer._print_data(trainer)
    line = f"resume: no state will be saved before the end, because save_every_n_steps is {every}"
    assert (line in capsys.readouterr().out) == printed


# --- settings that must match on resume ------------------------------------------------------------------------------


@pytest.fixture
def identity(train_module, tmp_path):
    """Return a function that gives the identity of a run, with settings changed by name (`__` separates levels)."""
    from arctic_training.config.model import ModelConfig
    from arctic_training.config.optimizer import OptimizerConfig
    from arctic_training.config.tokenizer import TokenizerConfig
    from arctic_training.scheduler.hf_factory import HFSchedulerConfig

    save_dataset(tmp_path / "soap_dataset", {"train": rows(3), "validation": rows(4)[3:]})

    def identity(**changes) -> dict[str, str]:
        source = {"name_or_path": tmp_path / "soap_dataset", "split": "train"}
        settings = {
            "model": {"name_or_path": "model", "peft_config": {"peft_type": "Lora", "r": 8}},
            "tokenizer": {"name_or_path": "model"},
            "data": {"type": "soap", "sources": [source], "cache_dir": tmp_path},
            "optimizer": {"learning_rate": 1e-3},
            "scheduler": {"name": "cosine", "warmup_ratio": 0.1},
            "deepspeed": {"zero_optimization": {"stage": 0}, "gradient_clipping": 1.0},
            **{"epochs": 1, "train_iters": 0, "min_iterations": 0, "gradient_accumulation_steps": 1, "seed": 1},
            "world_size": 2,
        }
        for name, value in changes.items():
            place = settings
            *parents, last = (int(part) if part.isdigit() else part for part in name.split("__"))
            for parent in parents:
                place = place[parent]
            place[last] = value
        kinds = {"model": ModelConfig, "tokenizer": TokenizerConfig, "data": train_module.settings.SOAPDataConfig}
        kinds |= {"optimizer": OptimizerConfig, "scheduler": HFSchedulerConfig}
        config = SimpleNamespace(**settings | {part: kind(**settings[part]) for part, kind in kinds.items()})
        return train_module.SOAPTrainer.identity.fget(SimpleNamespace(config=config))

    return identity


@pytest.mark.parametrize(
    ("setting", "value", "key"),
    [
        ("optimizer__learning_rate", 2e-3, "optimizer.learning_rate"),
        ("scheduler__warmup_ratio", 0.2, "scheduler.warmup_ratio"),
        ("model__peft_config__r", 16, "model.peft_config.r"),
        ("tokenizer__name_or_path", "another", "tokenizer.name_or_path"),
        ("data__sources__0__sample_count", 2, "data.sources.0.sample_count"),
        ("data__sources__0__sample_ratio", 0.5, "data.sources.0.sample_ratio"),
        ("data__sources__0__sample_seed", 7, "data.sources.0.sample_seed"),
        ("data__best_fit_packing", True, "data.best_fit_packing"),
        ("data__pack_samples", True, "data.pack_samples"),
        ("data__max_length", 512, "data.max_length"),
        ("data__seed", 7, "data.seed"),
        ("deepspeed__zero_optimization", {"stage": 3}, "ZeRO stage"),
        ("deepspeed__gradient_clipping", 0.5, "gradient_clipping"),
        ("gradient_accumulation_steps", 2, "gradient_accumulation_steps"),
        ("world_size", 1, "world_size"),
    ],
)
def test_each_setting_that_must_not_change_on_resume_is_named(identity, setting, value, key):
    before, after = identity(), identity(**{setting: value})
    assert [name for name in before | after if before.get(name) != after.get(name)] == [key]


def test_changed_rows_make_a_different_run(identity, tmp_path):
    before = identity()
    shutil.rmtree(tmp_path / "soap_dataset")
    save_dataset(tmp_path / "soap_dataset", {"train": rows(4)[1:]})
    after = identity()
    assert [name for name in before if before[name] != after[name]] == ["rows"]


def test_a_run_may_resume_with_other_speed_memory_and_path_settings(identity, tmp_path):
    changes = {"model__disable_activation_checkpoint": True, "model__attn_implementation": "eager"}
    changes |= {"data__num_proc": 2, "data__dl_num_workers": 0, "data__cache_dir": tmp_path / "elsewhere"}
    changes |= {"data__eval_sources": [{"name_or_path": tmp_path / "soap_dataset", "split": "validation"}]}
    assert identity(**changes) == identity()


def test_all_processes_of_a_run_compute_the_same_identity(identity, monkeypatch):
    first = identity()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert identity() == first


# --- runs of arctic_training -----------------------------------------------------------------------------------------


def write_config(folder: Path, model_path: Path, name: str, **changes) -> Path:
    """Write a YAML for a run of 13 optimizer steps of 4 packs each, with a resume state every 2 steps."""
    run = folder / name
    soap = {"type": "soap", "name_or_path": str(folder / "soap_dataset")}
    config = {
        "type": "soap",
        "code": str(ROOT / "train.py"),
        "model": {"name_or_path": str(model_path), "dtype": "fp32", "attn_implementation": "varlen"},
        "data": {
            "type": "soap",
            "sources": [{**soap, "split": "train"}],
            "eval_sources": [{**soap, "split": "validation"}],
            "max_length": MAX_LENGTH,
            "best_fit_packing": True,
            "div_length": 64,
            "num_proc": 1,
            "dl_num_workers": 1,
            "cache_dir": str(folder / "tokens"),
        },
        "deepspeed": {"zero_optimization": {"stage": 0}},
        "optimizer": {"type": "cpu_adam", "learning_rate": 1e-3, "weight_decay": 0.0},
        "scheduler": {"name": "cosine", "warmup_ratio": 0.1},
        "epochs": 6,
        "gradient_accumulation_steps": 4,
        "eval_interval": 6,
        "train_log_iter_interval": 0,
        "loss_log_interval": 0,
        "train_log_metrics_path": str(run / "train-log.jsonl"),
        "kill_switch_path": str(run / "stop"),
        "checkpoint": [
            {"type": "export", "output_dir": str(run), "save_end_of_training": True},
            {"type": "resume", "output_dir": str(run / "resume"), "auto_resume": True, "save_every_n_steps": 2},
        ],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(config: Path, *arguments: str, mode: str = "train") -> subprocess.Popen:
    command = [BIN / "arctic_training", mode, config, "--master_port", str(free_port()), *arguments]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    log = config.with_suffix(".log").open("a")
    return subprocess.Popen(command, cwd=config.parent, env=environment, stdout=log, stderr=log, start_new_session=True)


def run(config: Path, *arguments: str) -> tuple[int, str]:
    """Run to the end; return the exit status and the output."""
    log = config.with_suffix(".log")
    before = log.stat().st_size if log.exists() else 0
    status = start(config, *arguments).wait(timeout=900)
    return status, log.read_text()[before:]


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train-log.jsonl").read_text().splitlines()]


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    long = {**rows(1)[0], "dialogue": "Doctor: Go on.\nPatient: It hurts.\n" * 200}
    save_dataset(folder / "soap_dataset", {"train": [*rows(27), long, long], "validation": rows(31)[27:]})
    return folder


@pytest.fixture(scope="module")
def uninterrupted(workplace: Path, model_path: Path) -> SimpleNamespace:
    before = set(Path("/dev/shm").iterdir())
    status, output = run(write_config(workplace, model_path, "uninterrupted"))
    assert status == 0, output[-3000:]
    return SimpleNamespace(
        folder=workplace / "uninterrupted",
        output=output,
        log=read_log(workplace / "uninterrupted"),
        shared_memory=[path for path in Path("/dev/shm").glob("deepspeed*") if path not in before],
    )


def kill_when_resumable(config: Path, *arguments: str) -> None:
    """Start a run, and kill all its processes (SIGKILL) once it has written a complete resume state."""
    process = start(config, *arguments)
    deadline = time.monotonic() + 240
    while not list((config.with_suffix("") / "resume").glob("*/complete.json")):
        assert process.poll() is None and time.monotonic() < deadline, config.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def killed(workplace: Path, model_path: Path) -> Path:
    """Return the YAML of a killed run with the same settings as `uninterrupted`."""
    config = write_config(workplace, model_path, "killed")
    kill_when_resumable(config)
    return config


def losses(log: list[dict]) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in log if "loss" in record}


def validation_losses(log: list[dict]) -> list[float]:
    return [record["validation_loss"] for record in log if "validation_loss" in record]


def test_an_error_about_a_port_in_use_names_the_option_to_change_it(train_module):
    from torch.distributed import TCPStore

    from training.errors import explain

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError) as caught:
            TCPStore("127.0.0.1", port, is_master=True)
    problem, remedy = explain(caught.value)
    assert f"port: {port}" in problem
    assert "--master_port" in remedy


MISTAKE = """
import torch
from arctic_training.exceptions import RegistryError
from training.errors import report_in_one_line
report_in_one_line()
raise {}
"""
NO_ROOM = 'torch.OutOfMemoryError("no room")'
MORE_ROOM = (
    "set `model.disable_activation_checkpoint: false` in the YAML, with which an unfinished run can resume, "
    "then lower `data.max_length`"
)
NO_TYPE = 'RegistryError("no type. Ensure that it is there: soap")'  # every process reads this from the YAML


@pytest.mark.parametrize(
    ("error", "rank", "lines"),
    [
        (NO_ROOM, "0", ["", f"error: out of memory (no room): {MORE_ROOM}"]),
        (NO_ROOM, "1", ["", f"error: out of memory (no room) (process 1): {MORE_ROOM}"]),
        (NO_TYPE, "0", ["", "error: no type (choose from soap): correct the YAML"]),
        (NO_TYPE, "1", [""]),
    ],
)
def test_a_common_error_is_printed_once_and_others_by_their_process(error, rank, lines):
    environment = {**os.environ, "RANK": rank, "LOCAL_RANK": rank}
    command = [sys.executable, "-c", MISTAKE.format(error)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines() == lines


@pytest.mark.parametrize(("local_rank", "printed"), [("0", 1), ("1", 0)])
def test_an_error_common_to_a_machines_processes_is_printed_once(monkeypatch, capsys, local_rank, printed):
    from training.errors import fail

    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit):
        fail("no dataset", "make one")
    assert capsys.readouterr().err.count("error: no dataset (process 2): make one") == printed


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("micro_batch_size", 2, "raise `gradient_accumulation_steps`"),
        ("sequence_parallel_size", 2, "lower `data.max_length`"),
        ("overfit_first_batch", True, "set `sample_count`"),
        ("eval_log_iter_interval", 2, "raise `eval_interval`"),
        ("mem_profiler", "step", "`e2e` records the whole run"),
        ("data.mask_inputs", False, "the loss covers only the note"),
        ("data.ignore_empty_think", True, "is masked anyway"),
        ("data.drop_last", True, "works only with pack_samples"),
        ("wandb", {"enable": True}, "set `report_to: [wandb]`"),
    ],
)
def test_an_unsupported_setting_is_rejected_with_the_alternative(
    train_module, model_path, tmp_path, setting, value, remedy
):
    from pydantic import ValidationError

    from training.errors import explain

    data = {"type": "soap", "sources": [], "cache_dir": tmp_path, "best_fit_packing": True}
    config = {"type": "soap", "model": {"name_or_path": model_path}, "data": data}
    section, _, name = setting.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(ValidationError) as caught:
        train_module.SOAPTrainerConfig(**config)
    problem, _ = explain(caught.value)
    assert problem.startswith((f"{setting}: ", f"{section}: Value error, {name} ")) and remedy in problem


@pytest.fixture
def resume_engine(train_module, monkeypatch, tmp_path):
    """Return the resume engine of a run at its second step, with a model that saves nothing."""
    from training import checkpoints

    monkeypatch.setattr(checkpoints.dist, "barrier", lambda: None)
    config = SimpleNamespace(model=SimpleNamespace(peft_config=None))
    trainer = SimpleNamespace(config=config, global_rank=0, epoch_idx=0, global_step=2, wandb_run_id=None)
    trainer.identity, trainer.device = {"seed": "1"}, train_module.torch.device("cpu")
    trainer.best = train_module.BestStep()
    engine = checkpoints.ResumeEngine(trainer, SimpleNamespace(output_dir=tmp_path))
    save = lambda folder, tag, **_: (folder / tag).mkdir(exist_ok=True)  # noqa: E731
    model = SimpleNamespace(save_checkpoint=save, optimizer=None)
    return SimpleNamespace(engine=engine, save=lambda: engine.save(model), folder=tmp_path)


@pytest.mark.parametrize(
    ("saved", "early_stop", "cleared"),
    [({"export": 2}, False, True), ({"export": 1}, False, False), ({}, False, False), ({"export": 2}, True, False)],
)
def test_a_resume_state_is_removed_only_after_the_final_export(
    train_module, resume_engine, capsys, saved, early_stop, cleared
):
    resume_engine.save()
    state = resume_engine.engine.newest
    trainer = SimpleNamespace(progress=None, training_finished=True, early_stop=early_stop, global_rank=0)
    trainer.log_step, trainer.keeps_best, trainer.no_improvement = lambda: None, False, False
    trainer.checkpoint_engines, trainer.saved_at, trainer.global_step = [resume_engine.engine, *saved], saved, 2
    train_module.SOAPTrainer.post_train_callback(trainer)
    assert state.exists() != cleared
    assert (f"{state} is kept: rerun the same command to resume" in capsys.readouterr().out) != cleared


@pytest.mark.parametrize(("every", "early_stop", "due"), [(5, True, True), (0, True, False), (5, False, False)])
def test_a_stopped_run_saves_its_state_if_resume_is_enabled(train_module, resume_engine, every, early_stop, due):
    engine = resume_engine.engine
    engine.config = SimpleNamespace(
        enabled=True, save_every_n_steps=every, save_every_n_epochs=0, save_end_of_training=False
    )
    trainer = SimpleNamespace(global_step=3, epoch_finished=False, training_finished=True, early_stop=early_stop)
    trainer.no_improvement = False
    assert train_module.SOAPTrainer._due(trainer, engine) == due


def test_copies_of_a_state_are_neither_resumed_nor_removed(resume_engine):
    resume_engine.save()
    newest = resume_engine.engine.newest
    for name in (f"{newest.name}_backup", f"copy_of_{newest.name}", "mine_9"):
        shutil.copytree(newest, resume_engine.folder / name)
    assert resume_engine.engine.newest == newest
    resume_engine.engine.clear()
    names = [f"copy_of_{newest.name}", f"{newest.name}_backup", "mine_9"]
    assert sorted(path.name for path in resume_engine.folder.iterdir()) == names


def test_a_resume_state_becomes_complete_atomically(resume_engine, monkeypatch):
    def write_half(path: Path, text: str) -> None:
        path.write_bytes(text.encode()[:5])
        raise OSError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_half)
        with pytest.raises(OSError, match="killed here"):
            resume_engine.save()
    assert resume_engine.engine.newest is None
    resume_engine.save()
    assert resume_engine.engine.newest == resume_engine.folder / "epoch_0_global_step_2"
    assert [path.name for path in resume_engine.engine.newest.iterdir()] == ["complete.json"]


def test_two_exports_due_at_the_same_step_are_both_written(train_module, monkeypatch):
    saved = []
    monkeypatch.setattr(train_module.ExportEngine, "save", lambda self, _: saved.append(self.config))
    engines = [train_module.ExportEngine(None, number) for number in range(2)]
    trainer = SimpleNamespace(checkpoint_engines=engines, saved_at={}, global_step=4, model=None, _due=lambda _: True)
    trainer.log_step, trainer.early_stop = lambda: None, False
    for _ in range(2):
        train_module.SOAPTrainer.checkpoint.__wrapped__(trainer)
    assert saved == [0, 1]


@pytest.mark.slow
def test_a_run_learns_and_logs_each_step_and_the_validation_loss(uninterrupted):
    steps = losses(uninterrupted.log)
    validation = validation_losses(uninterrupted.log)
    assert list(steps) == list(range(1, 14))
    assert steps[13] < 0.7 * steps[1]
    assert len(validation) == 3 and validation[-1] < validation[0], "after steps 6, 12 and 13 (the last one)"
    assert (uninterrupted.folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_leaves_one_loadable_checkpoint_and_no_resume_state(uninterrupted):
    from transformers import AutoTokenizer

    assert sorted(path.name for path in uninterrupted.folder.iterdir()) == RUN_FILES
    model = load_model(uninterrupted.folder / "global_step_13")
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted.folder / "global_step_13")
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.chat_template == QWEN3_LIKE
    assert (uninterrupted.folder / "global_step_13" / "generation_config.json").exists()


@pytest.mark.slow
def test_the_token_cache_can_be_built_before_the_run(workplace, model_path):
    config = write_config(workplace, model_path, "packs")
    assert start(config, mode="process-data").wait(timeout=300) == 0, config.with_suffix(".log").read_text()[-3000:]
    assert config.with_suffix(".log").read_text().count("9 packs; 13 steps in 6 epochs") == 1
    assert not (workplace / "packs" / "resume").exists()


@pytest.mark.slow
def test_a_run_leaves_no_shared_memory(uninterrupted):
    assert uninterrupted.shared_memory == []


@pytest.mark.slow
def test_each_step_is_logged_with_its_learning_rate(uninterrupted):
    """Expect a warm-up of one step, the peak, then a cosine that reaches 0 at step 14, with 4 packs per step."""
    rates = [record["lr"] for record in uninterrupted.log if "lr" in record]
    assert rates == pytest.approx([5e-4] + [5e-4 * (1 + math.cos(math.pi * step / 12)) for step in range(12)])


@pytest.mark.slow
def test_each_step_is_logged_with_its_gradient_norm(uninterrupted):
    norms = [record["gradient_norm"] for record in uninterrupted.log if "lr" in record]
    assert len(norms) == 13 and min(norms) > 0 and len(set(norms)) == 13


@pytest.mark.slow
def test_dropped_packs_at_the_end_are_reported(uninterrupted):
    assert uninterrupted.output.count("data: the last 2 packs are dropped: a step needs 4\n") == 1


@pytest.mark.slow
def test_rows_over_max_length_are_counted(uninterrupted):
    assert (
        "data: 29 rows, 2 longer than max_length 1,024 and dropped, 9 packs; 13 steps in 6 epochs"
        in uninterrupted.output
    )


@pytest.mark.slow
def test_a_run_on_the_cpu_prints_the_attention_it_uses(uninterrupted):
    assert uninterrupted.output.count("attention: sdpa instead of varlen, because there is no GPU") == 1


@pytest.mark.slow
def test_an_unfinished_run_rejects_another_learning_rate_in_one_line(workplace, killed, model_path):
    shutil.copytree(workplace / "killed", workplace / "faster")
    optimizer = {"type": "cpu_adam", "learning_rate": 2e-3, "weight_decay": 0.0}
    status, output = run(write_config(workplace, model_path, "faster", optimizer=optimizer))
    assert status == 2
    (line,) = error_lines(output)
    assert "a different optimizer.learning_rate (0.001, now 0.002)" in line
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_like_an_uninterrupted_one(workplace, killed, uninterrupted):
    status, output = run(killed)
    assert status == 0, output[-3000:]
    (resumed,) = re.findall(r"resumed at step (\d+) of 13", output)
    assert int(resumed) % 2 == 0 and 2 <= int(resumed) < 13
    log = read_log(workplace / "killed")
    assert list(losses(log)) == list(losses(uninterrupted.log))
    assert list(losses(log).values()) == pytest.approx(list(losses(uninterrupted.log).values()), rel=1e-4)
    assert validation_losses(log) == pytest.approx(validation_losses(uninterrupted.log), rel=1e-4)
    assert sorted(path.name for path in (workplace / "killed").iterdir()) == RUN_FILES


@pytest.mark.slow
def test_a_stopped_run_resumes_from_its_last_step(workplace, model_path, uninterrupted):
    status, output = run(write_config(workplace, model_path, "stopped", exit_iteration_this_run=5))
    assert status == 0 and "global_step_5 is kept: rerun the same command to resume" in output, output[-3000:]
    status, output = run(write_config(workplace, model_path, "stopped"))
    assert status == 0 and "resumed at step 5 of 13" in output, output[-3000:]
    resumed = losses(read_log(workplace / "stopped"))
    assert list(resumed.values()) == pytest.approx(list(losses(uninterrupted.log).values()), rel=1e-4)


@pytest.mark.slow
def test_a_killed_adapter_run_resumes_and_leaves_an_adapter_that_peft_loads(workplace, model_path):
    from peft import PeftModel

    lora = {"peft_type": "Lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = {"name_or_path": str(model_path), "dtype": "fp32", "attn_implementation": "varlen", "peft_config": lora}
    config = write_config(workplace, model_path, "adapter", model=model)
    kill_when_resumable(config)
    status, output = run(config)
    assert status == 0, output[-3000:]
    assert "resumed at step" in output
    steps = losses(read_log(workplace / "adapter"))
    assert list(steps) == list(range(1, 14))
    adapted = PeftModel.from_pretrained(load_model(model_path), workplace / "adapter" / "global_step_13")
    moved = [parameter.abs().max().item() for name, parameter in adapted.named_parameters() if "lora_B" in name]
    assert len(moved) == 6 and min(moved) > 0


def stop_after(workplace: Path, model_path: Path, name: str, steps: int, **changes) -> tuple[int, str]:
    """Stop a run after `steps`, then run it to the end; return the exit status and the output of the second start."""
    status, output = run(write_config(workplace, model_path, name, exit_iteration_this_run=steps, **changes))
    assert status == 0, output[-3000:]
    return run(write_config(workplace, model_path, name, **changes))


@pytest.mark.slow
def test_a_resumed_run_repeats_dropout_exactly(workplace, model_path):
    lora = {
        "peft_type": "Lora",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.5,
        "target_modules": ["q_proj", "down_proj"],
    }
    model = {"name_or_path": str(model_path), "dtype": "fp32", "attn_implementation": "sdpa", "peft_config": lora}
    status, output = run(write_config(workplace, model_path, "dropout", model=model, epochs=3))
    assert status == 0, output[-3000:]
    config = write_config(workplace, model_path, "dropout-stopped", model=model, epochs=3)
    data = yaml.safe_load(config.read_text())["data"] | {"dl_num_workers": 0}
    status, output = stop_after(workplace, model_path, "dropout-stopped", 3, model=model, epochs=3, data=data)
    assert status == 0 and "resumed at step 3 of 6" in output, output[-3000:]
    course, resumed = (losses(read_log(workplace / name)) for name in ("dropout", "dropout-stopped"))
    assert list(resumed) == [1, 2, 3, 4, 5, 6]
    assert list(resumed.values()) == pytest.approx(list(course.values()), rel=1e-6)


@pytest.mark.slow
def test_the_best_step_is_exported_and_a_worsening_run_stops_early(workplace, model_path):
    changes = {"optimizer": {"type": "cpu_adam", "learning_rate": 0.5, "weight_decay": 0.0}, "eval_interval": 1}
    changes |= {"scheduler": {"name": "constant", "warmup_ratio": 0.0}, "early_stopping_patience": 3}
    status, output = run(write_config(workplace, model_path, "worse", **changes))
    assert status == 0, output[-3000:]
    log = read_log(workplace / "worse")
    validations = {line["step"]: line["validation_loss"] for line in log if "validation_loss" in line}
    best = min(validations, key=validations.get)
    assert max(validations) == best + 3 < 13
    assert [line["step"] for line in log if line.get("best")][-1] == best
    assert sorted(path.name for path in (workplace / "worse").iterdir()) == [
        f"global_step_{best}",
        "loss.png",
        "train-log.jsonl",
    ]
    assert f"best validation loss: {validations[best]:.4f} at step {best}, exported to" in output
    assert "*** Exiting training early because training has not improved validation 3 times in a row" in output


@pytest.mark.slow
def test_a_resumed_mixed_adamw_run_ends_like_an_uninterrupted_one(workplace, model_path):
    model = {"name_or_path": str(model_path), "dtype": "bf16", "attn_implementation": "sdpa"}
    optimizer = {"type": "mixed_adamw", "learning_rate": 1e-3, "weight_decay": 0.01}
    changes = {"model": model, "optimizer": optimizer, "epochs": 3}
    status, output = run(write_config(workplace, model_path, "mixed", **changes))
    assert status == 0, output[-3000:]
    status, output = stop_after(workplace, model_path, "mixed-stopped", 3, **changes)
    assert status == 0 and "resumed at step 3 of 6" in output, output[-3000:]
    course, resumed = (losses(read_log(workplace / name)) for name in ("mixed", "mixed-stopped"))
    assert list(resumed.values()) == pytest.approx(list(course.values()), rel=1e-6)
    assert (workplace / "mixed-stopped" / "global_step_6" / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize(
    ("wanted", "gpu", "hardware", "used"),
    [
        ("bf16", True, False, "fp32"),
        ("bf16", True, True, "bf16"),
        ("bf16", False, False, "bf16"),
        ("fp16", True, False, "fp16"),
        ("fp32", True, False, "fp32"),
    ],
)
def test_a_gpu_without_bfloat16_trains_in_float32_and_says_so(
    train_module, model_path, monkeypatch, capsys, wanted, gpu, hardware, used
):
    import torch
    from arctic_training.config.model import ModelConfig

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: hardware or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    model = ModelConfig(name_or_path=str(model_path), dtype=wanted)
    assert train_module.SOAPTrainerConfig.validate_model(model).dtype.name.lower() == used
    line = "dtype: fp32 instead of bf16, because Tesla T4 has no bfloat16 hardware; weights take twice the memory\n"
    assert capsys.readouterr().out == ("" if used == wanted else line)


@pytest.mark.slow
def test_train_py_resumes_a_killed_run_of_the_launcher_to_the_same_end(workplace, model_path, uninterrupted):
    config = write_config(workplace, model_path, "alone")
    kill_when_resumable(config)
    command = [sys.executable, ROOT / "train.py", config]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step" in done.stdout and "deepspeed.launcher" not in done.stdout + done.stderr
    course, expected = losses(read_log(workplace / "alone")), losses(uninterrupted.log)
    assert list(course.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    assert sorted(path.name for path in (workplace / "alone").iterdir()) == RUN_FILES


@pytest.mark.slow
def test_train_py_reports_a_wrong_setting_in_one_line(workplace, model_path):
    config = write_config(workplace, model_path, "wrong", epochs="many")
    done = subprocess.run([sys.executable, ROOT / "train.py", config], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and len(error_lines(done.stderr)) == 1 and "epochs" in done.stderr


@pytest.mark.slow
def test_a_bfloat16_model_learns_with_cpu_adam_at_zero_stage_0(workplace, model_path):
    model = {"name_or_path": str(model_path), "dtype": "bf16", "attn_implementation": "sdpa"}
    status, output = run(write_config(workplace, model_path, "half-precision", model=model))
    assert status == 0, output[-3000:]
    steps = losses(read_log(workplace / "half-precision"))
    assert steps[13] < 0.7 * steps[1]


@pytest.mark.slow
def test_a_missing_dataset_error_gives_the_command_to_build_it(tmp_path, model_path):
    status, output = run(write_config(tmp_path, model_path, "nothing"))
    assert status == 2
    assert len(error_lines(output)) == 1 and "python preprocess_data.py" in error_lines(output)[0]
    assert "Traceback" not in output
