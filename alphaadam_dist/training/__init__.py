"""What the training recipes share: data, models, logging, checkpoints and plots, on the Hugging Face Trainer."""
