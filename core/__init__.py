"""What every stage shares: the error tree, JSONL with rejects, durable files. Imports nothing heavy."""
