"""Looking into a model: what its parts do, measured on prompts and shown as a picture."""
