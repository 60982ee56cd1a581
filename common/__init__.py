"""Code that the scripts share: errors, the console, files, the dataset, chat templates, and rules for LoRA adapters."""
