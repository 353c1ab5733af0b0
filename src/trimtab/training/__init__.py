"""Training: one loop for pretraining, fine-tuning and context extension, on the model code that serves."""
