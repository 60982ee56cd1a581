"""Code that the three scripts share: UserError, file locks, atomic writes, the dataset, chat templates, LoRA rules."""
