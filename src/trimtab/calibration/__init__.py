"""What is fitted for a base model, one method a file; `trimtab.attachment` is what comes out."""
