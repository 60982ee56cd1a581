"""Shared parts of the tests: a tiny Qwen3 model that writes notes, a LoRA adapter for it, and a small dataset."""

import json
from pathlib import Path

import pytest

import prompts

ROOT = Path(__file__).resolve().parent.parent

# A chat template that, as Qwen3's, answers enable_thinking=False with an empty think block.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]

# What the tiny model has learned to write, whatever the dialogue, and to judge, whatever the note.
LEARNED_VERDICT = {"reason": "The same story.", "verdict": "pass"}
LEARNED_NOTE = {
    "S": "Reports a dry cough for three days. Denies fever.",
    "O": "Temperature 37.1 C. Lungs are clear.",
    "A": "Viral bronchitis.",
    "P": "Fluids and rest. Return in 7 days if not better.",
}


def rows(n: int) -> list[dict[str, str]]:
    """n different dialogues with their notes."""
    return [
        {
            "dialogue": f"Doctor: What brings you in?\nPatient: A dry cough for {k + 2} days, no fever.\n"
            f"Doctor: Temperature is 37.{k % 10} C, lungs are clear. Drink fluids, come back in {k + 5} days.",
            "S": f"Patient {k} reports a dry cough for {k + 2} days. Denies fever. No chest pain on the left side.",
            "O": f"Temperature 37.{k % 10} C. Lungs are clear. No wheezing on the right side.",
            "A": f"Viral bronchitis, day {k + 2}. No sign of pneumonia.",
            "P": f"Fluids and rest. Acetaminophen 500 mg every 6 hours. Return in {k + 5} days if not better.",
        }
        for k in range(n)
    ]


def save_dataset(path: Path, splits: dict[str, list[dict[str, str]]]) -> Path:
    """A folder as preprocess_data.py writes it."""
    from datasets import Dataset, DatasetDict

    DatasetDict({name: Dataset.from_list(part) for name, part in splits.items()}).save_to_disk(path)
    return path


def build_tokenizer():
    """A byte-level BPE tokenizer of about 1,000 tokens, trained on the project's prompts."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [prompts.SYSTEM_PROMPT, prompts.JUDGE_SYSTEM_PROMPT, *(json.dumps(row) for row in rows(20))]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 model of two layers that was trained, in seconds, to write LEARNED_NOTE and judge LEARNED_VERDICT."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = {}
    for step in range(160):
        row, section = rows(20)[step % 20], prompts.SECTIONS[step % 4]
        if step % 2:
            messages, answer = prompts.note_messages(row["dialogue"]), prompts.write_note(LEARNED_NOTE)
        else:
            messages = prompts.judge_messages(row["dialogue"], section, row[section], LEARNED_NOTE[section])
            answer = json.dumps(LEARNED_VERDICT)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **prompts.CHAT_TEMPLATE_KWARGS)
        learned = [*tokenizer.encode(answer), tokenizer.eos_token_id]
        loss = model(
            input_ids=torch.tensor([prompt + learned]), labels=torch.tensor([[-100] * len(prompt) + learned])
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step % 2] = loss.item()
    assert max(losses.values()) < 0.05, f"the tiny model did not learn its answers: losses {losses}"
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of rank 4 for `tiny_model`, with random weights that change what it writes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("adapters") / "adapter"
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six test dialogues, as preprocess_data.py writes them."""
    return save_dataset(tmp_path_factory.mktemp("data") / "soap_dataset", {"train": rows(4), "test": rows(6)})
