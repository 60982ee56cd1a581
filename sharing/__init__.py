"""Use a trained model: write single notes, export the model and its records for other tools, fill in its model card."""
