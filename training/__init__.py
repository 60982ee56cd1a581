"""The parts of train.py: tokens and labels, packs, attention, checkpoints, processes, progress."""
