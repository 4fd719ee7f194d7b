"""Text in, batches out: data sets, tokenizer, sources and pipelines."""
