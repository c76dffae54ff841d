"""Training data: files -> rows -> examples of token ids and labels -> batches."""
