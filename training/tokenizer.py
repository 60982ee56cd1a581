"""`tokenizer.type: soap`, the default: load the tokenizer and check its chat template before any data is processed."""

from arctic_training.tokenizer.factory import TokenizerFactory
from transformers import PreTrainedTokenizerBase

from training import tokens
from training.errors import fail
from training.settings import MODEL_REMEDY


class SOAPTokenizerFactory(TokenizerFactory):
    name = "soap"

    def create_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, with a padding token. Exit with one line if its template cannot render a note."""
        notify = print if self.trainer.global_rank == 0 else lambda _: None
        try:
            tokenizer = tokens.load_tokenizer(self.config.name_or_path, notify)
        except tokens.TemplateError as error:
            fail(str(error), MODEL_REMEDY)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
