"""One run on many processes: who does what, and tensors of which each process holds a part."""
