"""What a run starts from: initial weights, a grown model, adapters, another tokenizer."""
