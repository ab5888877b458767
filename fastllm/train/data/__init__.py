"""Data of training: documents and conversations in, packed micro batches out."""
