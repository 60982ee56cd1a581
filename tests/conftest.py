"""Fixtures that the tests share: a tiny Qwen3 model that writes notes, a LoRA adapter for it, and a small dataset."""

import asyncio
import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import hypothesis
import pytest

import prompts
from evaluation.engines.base import Completion, LanguageModel, Request

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # the threads of two programs would compete for the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LONG_FILES = ("test_train.py", "test_distributed.py")  # if started last, one of them would run alone at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


# No test may fail because the machine is busy. Separate tests measure speed.
hypothesis.settings.register_profile("any_speed", deadline=None)
hypothesis.settings.load_profile("any_speed")

# Like Qwen3's chat template, this one adds an empty think block for enable_thinking=False.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
# Arguments of eval.py: run both engines in the tiny model's own type. On many CPUs the default is float32.
AS_SAVED = ["--engine_args", '{"dtype": "bfloat16"}', "--judge_engine_args", '{"dtype": "bfloat16"}']
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]

# The tiny model has learned to give these answers to every dialogue and every note.
LEARNED_VERDICT = {"reason": "The same story.", "verdict": "pass"}
LEARNED_NOTE = {
    "S": "Reports a dry cough for three days. Denies fever.",
    "O": "Temperature 37.1 C. Lungs are clear.",
    "A": "Viral bronchitis.",
    "P": "Fluids and rest. Return in 7 days if not better.",
}


def assert_linear(read: Callable[[str], object], build: Callable[[int], str]) -> None:
    """Assert that the time to read the text `build(n)` is linear in n, whether or not it contains a note."""

    def seconds(text: str) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            with contextlib.suppress(prompts.NoteError):
                read(text)
            best = min(best, time.process_time() - start)
        return best

    short, long = seconds(build(5_000)), seconds(build(40_000))
    assert long < 8 * 3 * short + 0.05, f"8 times the text took {long / short:.0f} times as long"


# complaint, denied symptom, finding, diagnosis, treatment
_VISITS = [
    ("a dry cough", "fever", "Lungs are clear", "Viral bronchitis", "Fluids and honey"),
    (
        "pain in the left knee",
        "any fall",
        "Swelling of the left knee",
        "Osteoarthritis of the left knee",
        "Ibuprofen 400 mg",
    ),
    ("burning on urination", "flank pain", "Urine shows nitrites", "Urinary tract infection", "Nitrofurantoin 100 mg"),
    ("headaches behind the right eye", "vomiting", "Pupils are equal", "Migraine without aura", "Sumatriptan 50 mg"),
    (
        "an itchy rash on both arms",
        "new soap",
        "Red papules on the forearms",
        "Contact dermatitis",
        "Hydrocortisone cream 1%",
    ),
    ("heartburn after meals", "weight loss", "Abdomen is soft", "Reflux disease", "Omeprazole 20 mg"),
    (
        "dizziness on standing",
        "palpitations",
        "Blood pressure falls by 25 mmHg",
        "Orthostatic hypotension",
        "Salt and water",
    ),
]


def rows(n: int) -> list[dict[str, str]]:
    """Return n different dialogues with their notes. Row k says to return in k + 5 days, which identifies it."""
    result = []
    for k in range(n):
        complaint, denied, finding, diagnosis, treatment = _VISITS[k % len(_VISITS)]
        result.append(
            {
                "dialogue": f"Doctor: What brings you in?\nPatient: {complaint} for {k + 2} days, no {denied}.\n"
                f"Doctor: {finding}, pulse {60 + k}. It is {diagnosis}. {treatment}, and come back in {k + 5} days.",
                "S": f"The patient reports {complaint} for {k + 2} days. Denies {denied}.",
                "O": f"{finding}. Pulse {60 + k}. No distress.",
                "A": f"{diagnosis} since {k + 2} days. No sign of anything worse.",
                "P": f"{treatment} every 6 hours. No sports. Return in {k + 5} days if not better.",
            }
        )
    return result


def save_dataset(path: Path, splits: dict[str, list[dict[str, str]]]) -> Path:
    """Save a dataset as preprocess_data.py does, and return its folder."""
    from datasets import Dataset, DatasetDict

    DatasetDict({name: Dataset.from_list(part) for name, part in splits.items()}).save_to_disk(path)
    return path


def build_tokenizer():
    """Return a byte-level BPE tokenizer of about 1,000 tokens, trained on the project's prompts."""
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


def build_model(path: Path) -> Path:
    """Train a Qwen3 model of two layers, in seconds, to write LEARNED_NOTE and LEARNED_VERDICT. Return its folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads do not speed up such a small model
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
    torch.set_num_threads(threads)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def perturbed(model: Path, folder: Path, seed: int = 3) -> Path:
    """Write a copy of the model to `folder`, with random changes to its weights that change its answers."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, noise = load_file(model / "model.safetensors"), torch.Generator().manual_seed(seed)
    shutil.copytree(model, folder)
    for name, weight in weights.items():
        change = 1 + 0.3 * torch.randn(weight.shape, generator=noise)
        weights[name] = (weight.float() * change).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a LoRA adapter of rank 4 for `tiny_model`, with random weights that change its answers."""
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
    """Return a dataset with six test dialogues, as preprocess_data.py writes it."""
    return save_dataset(tmp_path_factory.mktemp("data") / "soap_dataset", {"train": rows(4), "test": rows(6)})


def chats(model: LanguageModel, requests: Iterable[Request]) -> list[Completion]:
    """Return the model's answers, in the order of the requests."""

    async def ask_all() -> list[Completion]:
        return await asyncio.gather(
            *(model.chat(request.messages, request.group, request.schema, **request.sampling) for request in requests)
        )

    return asyncio.run(ask_all())


class FakeModel(LanguageModel):
    """Answer at once, with `answer(messages, attempt)`, and record the chats.

    A question about a statement, whose sampling asks for log-probabilities, is answered with yes if the rest of the
    prompt contains the statement. Such questions are in `questions`, all other chats in `asked`.
    """

    def __init__(self, answer: Callable[[prompts.Messages, int], str], window: int = 1000):
        super().__init__("fake model", window)
        self.answer = answer
        self.asked: list[str] = []
        self.questions: list[str] = []
        self.sampled: list[tuple[str, dict]] = []
        self.closed = False

    def close(self) -> None:
        self.closed = True
        super().close()

    def _send(self, number: int, request: Request) -> None:
        chat = json.dumps(request.messages)
        if request.sampling.get("logprobs"):
            self.questions.append(chat)
            rest, _, question = request.messages[-1]["content"].rpartition(prompts.STATEMENT_LABEL)
            yes = 0.9 if question.partition("\n")[0][1:-1] in rest else 0.1
            tokens = {"yes": math.log(yes), "no": math.log(1 - yes)}
            self.report({"id": number, "text": "yes", "finish_reason": "length", "first_token": tokens})
            return
        self.asked.append(chat)
        self.sampled.append((chat, request.sampling))
        text = self.answer(request.messages, self.asked.count(chat))
        self.report({"id": number, "text": text, "finish_reason": "stop", "prompt_tokens": 9, "output_tokens": 5})
