"""What train.py is made of: tokens and labels, packs, attention, checkpoints, processes, progress."""
